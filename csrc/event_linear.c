/* Products of spikes and weights: sums over the weight rows of the inputs that fire.
 *
 * Two steps. `list_float_spikes` and `list_packed_spikes` turn spikes [rows, inputs] into one list of active inputs
 * per row, and `event_linear` adds up the weights of the listed inputs; one set of lists serves every product of the
 * same spikes. Ternary spikes have a second list per row, for the spikes of -1.
 *
 * Weights lie in blocks of output columns, [blocks, inputs, row]: a row of 64 int8, 64 bfloat16 or 32 float32 columns,
 * the last block filled up with zeros. A block stays in the L2 cache while a tile of rows passes over it, and an
 * active input costs one cache line of int8 weights or two of the others.
 *
 * INT8_TILES are products of another kind, from packed spikes; spike_tiles.c has them.
 *
 * Sums of int8 weights run in 16 bits for at most 256 inputs at a time and go on in 32 bits: they are exact. A
 * bfloat16 weight is widened to float32 before it is added. */
#include "event_driven.h"

enum { FLOAT_BYTES = 128, INT8_BYTES = 64, MAX_COLUMNS = 64, MAX_16_BIT_INPUTS = 256, TILE_ROWS = 128 };

/* The registers of a block's row; LANES floats fill one. */
enum { FLOAT_VECTORS = FLOAT_BYTES / VECTOR_BYTES, INT8_VECTORS = INT8_BYTES / VECTOR_BYTES, LANES = VECTOR_BYTES / 4 };

typedef uint16_t u16_vector __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES), may_alias));
typedef int16_t i16_vector __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES), may_alias));
typedef uint32_t u32_vector __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES), may_alias));
typedef float f32_vector __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES), may_alias));
typedef float loose_vector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t i32_vector __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES), may_alias));

/* 8 bytes that are 0 or 1 to bits: byte i times 2^(56 - 7 i) lands on bit 56 + i, and nothing else reaches it. */
INLINE unsigned pack8(const uint8_t *flags) {
    uint64_t bytes;
    memcpy(&bytes, flags, 8);
    return (unsigned)((bytes * 0x0102040810204080u) >> 56);
}

/* The lists of one row of float spikes, and its packed form unless p->packed is NULL. Returns their length, and counts
 * in `invalid` the entries that are no spikes. */
static int64_t list_float_row(const struct spike_lists *p, const float *spikes, int64_t row, int64_t *invalid) {
    enum { CHUNK = 64 };
    uint16_t *up = p->indices + row * p->stride, *down = up + p->rows * p->stride;
    const int64_t bytes = (p->inputs + 7) / 8;
    uint8_t *packed = p->packed ? p->packed + row * bytes : NULL;
    int64_t n_up = 0, n_down = 0;
    for (int64_t first = 0; first < p->inputs; first += CHUNK) {
        const int64_t size = p->inputs - first < CHUNK ? p->inputs - first : CHUNK;
        const float *x = spikes + row * p->inputs + first;
        float padded[CHUNK] = {0};
        if (size < CHUNK) {
            memcpy(padded, x, sizeof(float) * (size_t)size);
            x = padded;
        }
        uint8_t is_up[CHUNK], is_down[CHUNK];
        int32_t wrong = 0;
        for (int k = 0; k < CHUNK; k++) {
            is_up[k] = x[k] == 1.0f;
            wrong += (x[k] != 0.0f) & (x[k] != 1.0f);
        }
        for (int k = 0; k < CHUNK; k += 8) {
            const unsigned bits = pack8(is_up + k);
            n_up = append_positions(up, n_up, bits, first + k);
            if (packed && k < size) packed[(first + k) / 8] = (uint8_t)bits;
        }
        if (p->lists == 2) {
            int32_t downs = 0;
            for (int k = 0; k < CHUNK; k++) downs += is_down[k] = x[k] == -1.0f;
            for (int k = 0; k < CHUNK; k += 8) {
                const unsigned bits = pack8(is_down + k);
                n_down = append_positions(down, n_down, bits, first + k);
                if (packed && k < size) packed[p->rows * bytes + (first + k) / 8] = (uint8_t)bits;
            }
            wrong -= downs;
        }
        *invalid += wrong;
    }
    p->counts[row] = (int32_t)n_up;
    if (p->lists == 2) p->counts[p->rows + row] = (int32_t)n_down;
    return n_up + n_down;
}

/* Returns the number of spikes, or -1 if an entry is none. */
int64_t LEVEL(list_float_spikes)(const struct spike_lists *p, const float *spikes, int32_t threads) {
    int64_t listed = 0, invalid = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : listed, invalid) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < p->rows; row++) listed += list_float_row(p, spikes, row, &invalid);
    return invalid ? -1 : listed;
}

/* How many bits are set. */
int64_t LEVEL(count_packed_spikes)(const uint8_t *packed, int64_t bytes, int32_t threads) {
    enum { CHUNK = 4096 };
    int64_t count = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : count) schedule(static) if (threads > 1)
    for (int64_t chunk = 0; chunk < bytes; chunk += CHUNK) {
        const int64_t end = bytes - chunk < CHUNK ? bytes : chunk + CHUNK;
        int64_t k = chunk;
        for (; k + 8 <= end; k += 8) {
            uint64_t bits;
            memcpy(&bits, packed + k, 8);
            count += __builtin_popcountll(bits);
        }
        for (; k < end; k++) count += __builtin_popcount(packed[k]);
    }
    return count;
}

static int64_t list_packed_row(const struct spike_lists *p, const uint8_t *packed, int64_t row) {
    uint16_t *list = p->indices + row * p->stride;
    const int64_t bytes = p->inputs / 8;
    int64_t n = 0;
    packed += row * bytes;
    for (int64_t k = 0; k < bytes; k++) n = append_positions(list, n, packed[k], 8 * k);
    p->counts[row] = (int32_t)n;
    return n;
}

/* `packed` is [lists, rows, inputs / 8], as the neuron writes it: bit k of byte i is input 8 i + k. Returns the number
 * of spikes. */
int64_t LEVEL(list_packed_spikes)(const struct spike_lists *p, const uint8_t *packed, int32_t threads) {
    int64_t listed = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : listed) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < p->lists * p->rows; row++) listed += list_packed_row(p, packed, row);
    return listed;
}

/* The lists of the columns of `packed`, [lists, inputs, rows / 8]: row r of the lists holds the places along `inputs` at
 * which bit r is set. With tokens for inputs these are the lists of the transposed spikes, of which a gradient to
 * weights is a product. Eight bytes of all tokens are one work item. Returns the number of spikes. */
int64_t LEVEL(list_packed_columns)(const struct spike_lists *p, const uint8_t *packed, int32_t threads) {
    enum { CHUNK = 64 };
    const int64_t bytes = p->rows / 8, chunks = (p->rows + CHUNK - 1) / CHUNK;
    int64_t listed = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : listed) schedule(static) if (threads > 1)
    for (int64_t item = 0; item < p->lists * chunks; item++) {
        const int64_t plane = item / chunks, row = item % chunks * CHUNK;
        const int64_t width = p->rows - row < CHUNK ? p->rows - row : CHUNK;
        const uint8_t *from = packed + plane * p->inputs * bytes + row / 8;
        uint16_t *lists = p->indices + (plane * p->rows + row) * p->stride;
        int32_t *counts = p->counts + plane * p->rows + row;
        memset(counts, 0, sizeof(int32_t) * (size_t)width);
        for (int64_t t = 0; t < p->inputs; t++) {
            uint64_t bits = 0;
            memcpy(&bits, from + t * bytes, (size_t)width / 8);
            for (; bits; bits &= bits - 1) {
                const int k = __builtin_ctzll(bits);
                lists[k * p->stride + counts[k]++] = (uint16_t)t;
            }
        }
        for (int64_t k = 0; k < width; k++) listed += counts[k];
    }
    return listed;
}

/* Byte b of 32-bit word j of a row is the weight of column 16 b + j, plus 128 where b is even. So a word of 16 bits is
 * 2^8 hi + lo with hi signed and lo unsigned: the sum of all words modulo 2^16 and the exact sum of all hi give the sum
 * of all lo, a shift and two additions for two columns. */
INLINE void add_int8(const uint16_t *list, int64_t n, const uint8_t *block, int negative, i32_vector *sums) {
    for (int64_t first = 0; first < n; first += MAX_16_BIT_INPUTS) {
        const int64_t end = n - first < MAX_16_BIT_INPUTS ? n : first + MAX_16_BIT_INPUTS;
        u16_vector both[INT8_VECTORS] = {{0}};
        i16_vector high[INT8_VECTORS] = {{0}};
#pragma GCC unroll 2
        for (int64_t k = first; k < end; k++) {
            const u16_vector *row = (const u16_vector *)(block + (int64_t)list[k] * INT8_BYTES);
#pragma GCC unroll 4
            for (int u = 0; u < INT8_VECTORS; u++) {
                both[u] += row[u];
                high[u] += (i16_vector)row[u] >> 8;
            }
        }
        const int32_t excess = 128 * (int32_t)(end - first);
#pragma GCC unroll 4
        for (int u = 0; u < INT8_VECTORS; u++) {
            const u32_vector low = (u32_vector)(both[u] - ((u16_vector)high[u] << 8));
            const i32_vector even = (i32_vector)((u32_vector)high[u] << 16) >> 16, odd = (i32_vector)high[u] >> 16;
            const i32_vector of_bytes[4] = {(i32_vector)(low & 0xffffu) - excess, even,
                                            (i32_vector)(low >> 16) - excess, odd};
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) sums[INT8_VECTORS * b + u] += negative ? -of_bytes[b] : of_bytes[b];
        }
    }
}

/* 64 columns; the high half of 32-bit word k of line l is column 32 l + 16 + k, the low half column 32 l + k. */
INLINE void add_bfloat16(const uint16_t *list, int64_t n, const uint8_t *block, int negative, f32_vector *sums) {
    f32_vector low[FLOAT_VECTORS] = {{0}}, high[FLOAT_VECTORS] = {{0}};
    for (int64_t k = 0; k < n; k++) {
        const u32_vector *row = (const u32_vector *)(block + (int64_t)list[k] * FLOAT_BYTES);
#pragma GCC unroll 8
        for (int u = 0; u < FLOAT_VECTORS; u++) {
            low[u] += (f32_vector)(row[u] << 16);
            high[u] += (f32_vector)(row[u] & 0xffff0000u);
        }
    }
#pragma GCC unroll 8
    for (int u = 0; u < FLOAT_VECTORS; u++) {
        const int word = u * LANES, at = (word / 16 * 32 + word % 16) / LANES;
        sums[at] += negative ? -low[u] : low[u];
        sums[at + 16 / LANES] += negative ? -high[u] : high[u];
    }
}

/* 32 columns. Two sums of every other input each, because one would wait for its own last addition. */
INLINE void add_float32(const uint16_t *list, int64_t n, const uint8_t *block, int negative, f32_vector *sums) {
    f32_vector even[FLOAT_VECTORS] = {{0}}, odd[FLOAT_VECTORS] = {{0}};
    int64_t k = 0;
    for (; k + 2 <= n; k += 2) {
        const f32_vector *row = (const f32_vector *)(block + (int64_t)list[k] * FLOAT_BYTES);
        const f32_vector *next = (const f32_vector *)(block + (int64_t)list[k + 1] * FLOAT_BYTES);
#pragma GCC unroll 8
        for (int u = 0; u < FLOAT_VECTORS; u++) {
            even[u] += row[u];
            odd[u] += next[u];
        }
    }
    if (k < n) {
        const f32_vector *row = (const f32_vector *)(block + (int64_t)list[k] * FLOAT_BYTES);
        for (int u = 0; u < FLOAT_VECTORS; u++) even[u] += row[u];
    }
#pragma GCC unroll 8
    for (int u = 0; u < FLOAT_VECTORS; u++) sums[u] += negative ? -even[u] - odd[u] : even[u] + odd[u];
}

INLINE int columns_per_block(int32_t weight_type) { return weight_type == FLOAT32 ? 32 : 64; }

/* Bytes of the weights of one block. Tiles have their inputs filled up to whole steps of 64. */
INLINE int64_t block_bytes(int64_t inputs, int32_t weight_type) {
    if (weight_type == INT8_TILES) return (inputs + 63) / 64 * 64 * INT8_BYTES;
    return inputs * (weight_type == INT8 ? INT8_BYTES : FLOAT_BYTES);
}

INLINE void add_list(const struct spike_lists *p, int list, int64_t row, const uint8_t *block, int32_t weight_type,
                     f32_vector *sums) {
    const int64_t at = list * p->rows + row, n = p->counts[at];
    const uint16_t *indices = p->indices + at * p->stride;
    if (weight_type == INT8) add_int8(indices, n, block, list, (i32_vector *)sums);
    else if (weight_type == BFLOAT16) add_bfloat16(indices, n, block, list, sums);
    else add_float32(indices, n, block, list, sums);
}

/* The sums of rows [first, last) and one block, scaled, with the bias and the addend. `weight_type` is a constant where
 * this is called. */
INLINE void typed_block_sums(const struct spike_lists *p, const struct product *q, int64_t number, int64_t first,
                             int64_t last, const float *addend, float *result, int64_t stride, int64_t width,
                             int32_t weight_type) {
    const int columns = columns_per_block(weight_type), vectors = columns / LANES;
    const int64_t column = number * columns;
    const uint8_t *block = (const uint8_t *)q->weight + number * block_bytes(p->inputs, weight_type);
#if HAVE_SPIKE_TILES
    int32_t tile_sums[SPIKE_TILE_ROWS * MAX_COLUMNS] __attribute__((aligned(64)));
    if (weight_type == INT8_TILES) begin_spike_tiles();
#endif
    /* Of a block that is only partly there the last columns pass through a buffer. */
    const int whole = width == columns;
    loose_vector buffer[MAX_COLUMNS / LANES] = {{0}};
    for (int64_t row = first; row < last; row++, result += stride) {
        f32_vector sums[MAX_COLUMNS / LANES] = {{0}};
#if HAVE_SPIKE_TILES
        if (weight_type == INT8_TILES) {
            const int64_t at = (row - first) % SPIKE_TILE_ROWS, left = last - row;
            if (at == 0) {
                const int64_t rows = left < SPIKE_TILE_ROWS ? left : SPIKE_TILE_ROWS;
                /* They are written all at once, so the lines are fetched while their sums are made. */
                for (int64_t k = 0; k < rows; k++)
                    for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(result + k * stride + c, 1);
                spike_tile_sums(p, block, row, rows, tile_sums);
            }
            memcpy(sums, tile_sums + at * MAX_COLUMNS, sizeof(sums));
        } else
#endif
        {
            add_list(p, 0, row, block, weight_type, sums);
            if (p->lists == 2) add_list(p, 1, row, block, weight_type, sums);
        }
        const loose_vector *addends = buffer;
        loose_vector *to = whole ? (loose_vector *)result : buffer;
        if (addend) {
            const float *from = addend + (row - first) * stride;
            if (whole) addends = (const loose_vector *)from;
            else memcpy(buffer, from, sizeof(float) * (size_t)width);
        }
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) {
            f32_vector sum = sums[v];
            if (weight_type == INT8 || weight_type == INT8_TILES)
                sum = __builtin_convertvector((i32_vector)sum, f32_vector) *
                      ((const loose_vector *)(q->scale + column))[v];
            if (q->bias) sum += ((const loose_vector *)(q->bias + column))[v];
            if (addend) sum += addends[v];
            to[v] = sum;
        }
        if (!whole) memcpy(result, buffer, sizeof(float) * (size_t)width);
    }
#if HAVE_SPIKE_TILES
    if (weight_type == INT8_TILES) end_spike_tiles();
#endif
}

/* Rows [first, last) of one block of columns, [rows, width] with `stride` numbers from row to row. */
INLINE void block_sums(const struct spike_lists *p, const struct product *q, int64_t number, int64_t first,
                       int64_t last, const float *addend, float *result, int64_t stride, int64_t width) {
    if (q->weight_type == INT8) typed_block_sums(p, q, number, first, last, addend, result, stride, width, INT8);
    else if (q->weight_type == BFLOAT16)
        typed_block_sums(p, q, number, first, last, addend, result, stride, width, BFLOAT16);
    else if (q->weight_type == INT8_TILES)
        typed_block_sums(p, q, number, first, last, addend, result, stride, width, INT8_TILES);
    else typed_block_sums(p, q, number, first, last, addend, result, stride, width, FLOAT32);
}

static void product_tile(const struct spike_lists *p, const struct product *q, int64_t number, int64_t first,
                         int64_t last) {
    const int columns = columns_per_block(q->weight_type);
    const int64_t column = number * columns, at = first * q->outputs + column;
    const int64_t width = q->outputs - column < columns ? q->outputs - column : columns;
    block_sums(p, q, number, first, last, q->addend ? q->addend + at : NULL, q->result + at, q->outputs, width);
}

int LEVEL(event_linear)(const struct spike_lists *p, const struct product *q, int32_t threads) {
    const int columns = columns_per_block(q->weight_type);
    const int64_t blocks = (q->outputs + columns - 1) / columns, tiles = (p->rows + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t item = 0; item < blocks * tiles; item++) {
        const int64_t first = item % tiles * TILE_ROWS;
        product_tile(p, q, item / tiles, first, first + TILE_ROWS < p->rows ? first + TILE_ROWS : p->rows);
    }
    return 0;
}

/* One sequence and one block of columns, from spikes to spikes: the currents never leave the cache. */
static int neuron_tile(const struct spike_lists *p, const struct product *q, const struct neuron *all, int64_t number,
                       int64_t sequence, float *currents, uint8_t *packed) {
    const int columns = columns_per_block(q->weight_type);
    const int64_t column = number * columns, tokens = all->tokens, group_width = all->channels / all->groups;
    const int64_t width = q->outputs - column < columns ? q->outputs - column : columns;
    block_sums(p, q, number, sequence * tokens, (sequence + 1) * tokens, NULL, currents, width, width);
    struct neuron tile = *all;
    tile.batch = 1;
    tile.channels = width;
    tile.groups = width > group_width ? width / group_width : 1;
    tile.current = currents;
    tile.mask = all->mask ? all->mask + sequence * tokens : NULL;
    tile.v_threshold += column;
    tile.decay_forward += column / group_width;
    tile.decay_backward += column / group_width;
    tile.reset += column / group_width;
    tile.packed = packed;
    if (LEVEL(bpsn_forward)(&tile, 1)) return 1;
    for (int plane = 0; plane <= all->ternary; plane++) {
        uint8_t *to = all->packed + ((plane * all->batch + sequence) * tokens * all->channels + column) / 8;
        for (int64_t t = 0; t < tokens; t++)
            memcpy(to + t * all->channels / 8, packed + (plane * tokens + t) * width / 8, (size_t)width / 8);
    }
    return 0;
}

/* A product and the neuron behind it; writes all->packed only. A block of columns must hold whole channel groups, or
 * a group whole blocks, and the width of each must be a multiple of 8. Returns 0, or 1 if memory is short. */
int LEVEL(event_linear_bpsn)(const struct spike_lists *p, const struct product *q, const struct neuron *all,
                             int32_t threads) {
    const int columns = columns_per_block(q->weight_type);
    const int64_t blocks = (q->outputs + columns - 1) / columns;
    const size_t numbers = sizeof(float) * (size_t)(all->tokens * columns);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *memory = aligned_alloc(64, (numbers + numbers / 16 + 63) / 64 * 64);
        int short_of_memory = !memory;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < blocks * all->batch; item++)
            if (memory)
                short_of_memory |= neuron_tile(p, q, all, item / all->batch, item % all->batch, (float *)memory,
                                               (uint8_t *)memory + numbers);
        free(memory);
        if (short_of_memory) {
#pragma omp atomic write
            failed = 1;
        }
    }
    return failed;
}
