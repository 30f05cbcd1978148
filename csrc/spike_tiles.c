/* Products of packed spikes and int8 weights on the tiles of AMX, at a speed that does not depend on the firing rate.
 *
 * A tile multiplies 16 rows of 64 bytes by 64 inputs of 16 columns in 16 cycles. 64 spikes lie in 8 bytes of memory; as
 * a mask they become 64 bytes of a register in one instruction, so spikes are widened right before they are used, and
 * the units for vectors do that while the one for tiles multiplies. Sums are exact, in 32 bits.
 *
 * Weights lie in blocks of 64 columns, [blocks, 4 groups, steps, 16, 64]: a tile is 64 inputs (one step) of a group of
 * 16 columns, and a row of it four inputs of each column. Inputs are filled up to whole steps with zeros. */
#include "event_driven.h"

#if HAVE_SPIKE_TILES
#pragma GCC target("arch=x86-64-v4,amx-tile,amx-int8")

enum { ROWS = 16, BYTES = 64, TILE = ROWS * BYTES };

/* What a processor's documentation calls palette 1: eight tiles of 16 rows of 64 bytes. */
static const struct {
    uint8_t palette, start_row, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} EIGHT_WHOLE_TILES __attribute__((aligned(64))) = {
    .palette = 1, .bytes = {BYTES, BYTES, BYTES, BYTES, BYTES, BYTES, BYTES, BYTES},
    .rows = {ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS}};

void begin_spike_tiles(void) { _tile_loadconfig(&EIGHT_WHOLE_TILES); }

void end_spike_tiles(void) { _tile_release(); }

INLINE uint64_t load_bits(const uint8_t *from, int64_t bytes) {
    uint64_t bits = 0;
    if (bytes >= 8) memcpy(&bits, from, 8);
    else memcpy(&bits, from, (size_t)bytes);
    return bits;
}

/* Rows [first, first + rows) of one step as bytes: 0, 1, and -1 of ternary spikes. Rows behind these are not written. */
INLINE void widen(const struct spike_lists *p, int64_t first, int64_t rows, int64_t step, int8_t *to) {
    const int64_t width = (p->inputs + 7) / 8, left = width - 8 * step;
    const uint8_t *from = p->packed + first * width + 8 * step;
    for (int64_t row = 0; row < rows; row++, from += width) {
        __m512i bytes = _mm512_maskz_set1_epi8(load_bits(from, left), 1);
        if (p->lists == 2)
            bytes = _mm512_mask_set1_epi8(bytes, load_bits(from + p->rows * width, left), -1);
        _mm512_store_si512(to + row * BYTES, bytes);
    }
}

/* Sums of `rows` rows from `first` on, at most 32 (16 if `pair` is 0), over a block of 64 columns. */
INLINE void tile_sums(const struct spike_lists *p, const int8_t *block, int64_t first, int64_t rows, int pair,
                      int32_t *sums) {
    const int64_t steps = (p->inputs + BYTES - 1) / BYTES;
    /* One step is widened while the one before is multiplied. */
    int8_t spikes[2][2 * TILE] __attribute__((aligned(64))) = {{0}};
    for (int group = 0; group < 4; group += 2) {
        const int8_t *left = block + group * steps * TILE, *right = left + steps * TILE;
        _tile_zero(0);
        _tile_zero(1);
        if (pair) {
            _tile_zero(2);
            _tile_zero(3);
        }
        widen(p, first, rows, 0, spikes[0]);
        for (int64_t step = 0; step < steps; step++) {
            const int8_t *now = spikes[step % 2];
            if (step + 1 < steps) widen(p, first, rows, step + 1, spikes[(step + 1) % 2]);
            _tile_loadd(6, left + step * TILE, BYTES);
            _tile_loadd(7, right + step * TILE, BYTES);
            _tile_loadd(4, now, BYTES);
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            if (pair) {
                _tile_loadd(5, now + TILE, BYTES);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        }
        int32_t *to = sums + ROWS * group;
        enum { STRIDE = 4 * ROWS * sizeof(int32_t) };
        _tile_stored(0, to, STRIDE);
        _tile_stored(1, to + ROWS, STRIDE);
        if (pair) {
            _tile_stored(2, to + ROWS * STRIDE / sizeof(int32_t), STRIDE);
            _tile_stored(3, to + ROWS * STRIDE / sizeof(int32_t) + ROWS, STRIDE);
        }
    }
}

void spike_tile_sums(const struct spike_lists *p, const void *block, int64_t first, int64_t rows, int32_t *sums) {
    if (rows > ROWS) tile_sums(p, block, first, rows, 1, sums);
    else tile_sums(p, block, first, rows, 0, sums);
}

#endif
