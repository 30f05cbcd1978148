/* What the kernels of event-driven inference share. */
#ifndef SNN_BERT_EVENT_DRIVEN_H
#define SNN_BERT_EVENT_DRIVEN_H

#include "kernels.h"

/* Bytes of a vector register. The compiler takes wider vectors too, but passes them through memory. */
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64 };
#elif defined(__AVX2__)
enum { VECTOR_BYTES = 32 };
#else
enum { VECTOR_BYTES = 16 };
#endif

/* Whether the compiler and the system know AMX; has_spike_tiles() says whether the processor does. */
#if HAVE_LEVELS && defined(__linux__)
#define HAVE_SPIKE_TILES 1
#else
#define HAVE_SPIKE_TILES 0
#endif

/* INT8_TILES: int8 weights in the layout of spike_tiles.c. */
enum weight_type { FLOAT32, BFLOAT16, INT8, INT8_TILES };

/* Spikes as lists: list k of row r starts at indices[(k * rows + r) * stride] and has counts[k * rows + r] entries.
 * `stride` is at least inputs + LIST_SLACK, and inputs are at most 65536. */
enum { LIST_SLACK = 64 };
struct spike_lists {
    int64_t rows, inputs, stride;
    int32_t lists; /* 1, or 2 for ternary spikes: the second one holds the spikes of -1 */
    uint16_t *indices;
    int32_t *counts;
    /* [lists, rows, bytes of inputs], bit k of byte i is input 8 i + k: what INT8_TILES reads in place of the lists, and
     * what list_float_spikes writes beside them; or NULL. */
    uint8_t *packed;
};

struct product {
    int64_t outputs;
    int32_t weight_type;
    const void *weight; /* in blocks, 64-byte aligned */
    const float *scale; /* [outputs] filled up to whole blocks, int8 only */
    const float *bias; /* [outputs] filled up to whole blocks, or NULL */
    const float *addend; /* [rows, outputs] or NULL: added to the result */
    float *result; /* [rows, outputs] */
};

/* Softmax attention between packed spikes, and the neuron behind it. */
struct attention {
    int64_t head_size;
    const uint8_t *query, *key, *value; /* packed, [lists, rows, channels / 8] */
    const float *gain, *offset; /* [channels]: of the queries' spikes gain * spike + offset enters the product */
    float scaling;
    float *context; /* [rows, channels]: the result without the neuron, or NULL */
};

typedef uint16_t u16x8 __attribute__((vector_size(16), aligned(2), may_alias));

/* The positions of the set bits of each byte, in order. */
extern uint16_t bit_positions[256][8];

/* Append `first` + the positions of the set bits to a list of n; without branches, so up to 8 slots are written behind
 * its end. */
INLINE int64_t append_positions(uint16_t *list, int64_t n, unsigned bits, int64_t first) {
    const u16x8 base = (u16x8){0} + (uint16_t)first;
    *(u16x8 *)(list + n) = *(const u16x8 *)bit_positions[bits] + base;
    return n + __builtin_popcount(bits);
}

/* Sums over one block of 64 columns for `rows` <= SPIKE_TILE_ROWS rows from `first` on, [SPIKE_TILE_ROWS, 64]; between
 * a begin and an end, in which the thread's tiles are set up. */
enum { SPIKE_TILE_ROWS = 32 };
EXPORT int32_t has_spike_tiles(void);
void begin_spike_tiles(void);
void spike_tile_sums(const struct spike_lists *p, const void *block, int64_t first, int64_t rows, int32_t *sums);
void end_spike_tiles(void);

#define DECLARE_EVENT_DRIVEN(at)                                                                                       \
    int64_t at(list_float_spikes)(const struct spike_lists *p, const float *spikes, int32_t threads);                  \
    int64_t at(list_packed_spikes)(const struct spike_lists *p, const uint8_t *packed, int32_t threads);               \
    int64_t at(count_packed_spikes)(const uint8_t *packed, int64_t bytes, int32_t threads);                            \
    int64_t at(list_packed_columns)(const struct spike_lists *p, const uint8_t *packed, int32_t threads);              \
    int at(event_linear)(const struct spike_lists *p, const struct product *q, int32_t threads);                       \
    int at(event_linear_bpsn)(const struct spike_lists *p, const struct product *q, const struct neuron *all,          \
                              int32_t threads);                                                                        \
    int at(event_attention)(const struct attention *a, const struct neuron *all, int32_t threads);
DECLARE_EVENT_DRIVEN(AT_PLAIN)
DECLARE_EVENT_DRIVEN(AT_V3)
DECLARE_EVENT_DRIVEN(AT_V4)
DECLARE_EVENT_DRIVEN(EXPORTED)

#endif
