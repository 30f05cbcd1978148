/* Softmax attention between spikes, from packed spikes to packed spikes.
 *
 * With binary keys the score of query i and key j is the sum of the query's channels at which the key fires, and with
 * binary values the context at channel d is the sum of the attention weights of the tokens whose value fires there. So
 * both products are sums over lists of spikes, as in event_linear.c, here of rows that run over a tile of queries:
 * queries [head_size, TILE] and weights [keys, TILE]. Masked tokens are no keys.
 *
 * A work item is one sequence and one head; the neuron behind it has one channel group per head. */
#include "event_driven.h"

enum { TILE = 64, LANES = VECTOR_BYTES / 4, VECTORS = TILE / LANES };

typedef float vector __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES), may_alias));
typedef int32_t int_vector __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES), may_alias));

/* Lists of the channels of one head at which each token's spikes are 1 or -1: token t of list k starts at
 * indices[(k * tokens + t) * stride]. */
struct head_lists {
    int64_t tokens, stride;
    int lists;
    uint16_t *indices, *counts;
};

struct head_scratch {
    vector *queries; /* [head_size, TILE] */
    vector *weights; /* [tokens, TILE] */
    vector *result; /* [head_size, TILE] */
    float *context; /* [tokens, head_size] */
    uint8_t *packed; /* [lists, tokens, head_size / 8] */
    uint16_t *tokens; /* the valid ones */
    struct head_lists keys; /* per token, channels */
    struct head_lists values; /* per channel, places in `tokens` */
};

/* 2^x for -126 < x <= 0, to an error of about one unit in the last place. */
INLINE vector exp2_of_negative(vector x) {
    const vector lowest = (vector){0} - 125.0f;
    const int_vector in_range = x > lowest;
    x = (vector)(((int_vector)x & in_range) | ((int_vector)lowest & ~in_range));
    const int_vector k = __builtin_convertvector(x - 0.5f, int_vector);
    const vector r = x - __builtin_convertvector(k, vector);
    vector p = 1.54035304e-4f * r + 1.33335581e-3f;
    p = p * r + 9.61812911e-3f;
    p = p * r + 5.55041087e-2f;
    p = p * r + 2.40226507e-1f;
    p = p * r + 6.93147181e-1f;
    p = p * r + 1.0f;
    return p * (vector)((k + 127) << 23);
}

INLINE vector larger(vector a, vector b) {
    const int_vector first = a > b;
    return (vector)(((int_vector)a & first) | ((int_vector)b & ~first));
}

/* The sum over the listed rows of `rows`, [.., TILE], times `sign`, added to `sums`. */
INLINE void add_rows(const uint16_t *list, int64_t n, const vector *rows, float sign, vector sums[VECTORS]) {
    vector total[VECTORS] = {{0}};
    for (int64_t k = 0; k < n; k++)
#pragma GCC unroll 16
        for (int i = 0; i < VECTORS; i++) total[i] += rows[(int64_t)list[k] * VECTORS + i];
    for (int i = 0; i < VECTORS; i++) sums[i] += sign * total[i];
}

INLINE void add_lists(const struct head_lists *p, int64_t at, const vector *rows, vector sums[VECTORS]) {
    for (int k = 0; k < p->lists; k++) {
        const int64_t list = k * p->tokens + at;
        add_rows(p->indices + list * p->stride, p->counts[list], rows, k ? -1.0f : 1.0f, sums);
    }
}

/* The queries' channels gain * spike + offset, transposed; times scaling * log2(e), since the weights are powers of 2. */
INLINE void load_queries(const struct attention *a, const struct neuron *all, int64_t first_row, int64_t channel,
                         int64_t tokens, struct head_scratch s) {
    const float scale = a->scaling * 1.44269504f;
    const int64_t row_bytes = all->channels / 8, plane = all->batch * all->tokens * row_bytes;
    float *to = (float *)s.queries;
    memset(to, 0, sizeof(float) * (size_t)(a->head_size * TILE));
    for (int64_t byte = 0; byte < a->head_size / 8; byte++) {
        int32_t up[TILE] = {0}, down[TILE] = {0};
        const uint8_t *from = a->query + first_row * row_bytes + channel / 8 + byte;
        for (int64_t t = 0; t < tokens; t++) up[t] = from[t * row_bytes];
        if (all->ternary)
            for (int64_t t = 0; t < tokens; t++) down[t] = from[plane + t * row_bytes];
        for (int bit = 0; bit < 8; bit++) {
            const int64_t d = 8 * byte + bit;
            const float gain = a->gain[channel + d] * scale, offset = a->offset[channel + d] * scale;
            for (int t = 0; t < TILE; t++)
                to[d * TILE + t] = (float)((up[t] >> bit & 1) - (down[t] >> bit & 1)) * gain + offset;
        }
    }
}

/* The lists of the keys by token, and those of the values by channel. */
INLINE int64_t fill_lists(const struct attention *a, const struct neuron *all, int64_t sequence, int64_t channel,
                          struct head_scratch s) {
    const int64_t row_bytes = all->channels / 8, bytes = a->head_size / 8, tokens = all->tokens;
    const uint8_t *mask = all->mask ? all->mask + sequence * tokens : NULL;
    int64_t valid = 0;
    for (int64_t t = 0; t < tokens; t++)
        if (!mask || mask[t]) s.tokens[valid++] = (uint16_t)t;
    for (int k = 0; k <= all->ternary; k++) {
        const int64_t first = ((k * all->batch + sequence) * tokens) * row_bytes + channel / 8;
        uint16_t *counts = s.values.counts + k * a->head_size;
        memset(counts, 0, sizeof(uint16_t) * (size_t)a->head_size);
        for (int64_t j = 0; j < valid; j++) {
            const uint8_t *key = a->key + first + s.tokens[j] * row_bytes;
            const uint8_t *value = a->value + first + s.tokens[j] * row_bytes;
            uint16_t *list = s.keys.indices + (k * tokens + j) * s.keys.stride, channels[512 + 8];
            int64_t n = 0, m = 0;
            for (int64_t i = 0; i < bytes; i++) n = append_positions(list, n, key[i], 8 * i);
            s.keys.counts[k * tokens + j] = (uint16_t)n;
            for (int64_t i = 0; i < bytes; i++) m = append_positions(channels, m, value[i], 8 * i);
            for (int64_t i = 0; i < m; i++) {
                const int64_t d = channels[i];
                s.values.indices[(k * a->head_size + d) * s.values.stride + counts[d]++] = (uint16_t)j;
            }
        }
    }
    return valid;
}

static void attend_to_tile(const struct attention *a, int64_t keys, int64_t first, int64_t tokens,
                           struct head_scratch s) {
    vector maximum[VECTORS], total[VECTORS] = {{0}};
    for (int i = 0; i < VECTORS; i++) maximum[i] = (vector){0} - 3e38f;
    for (int64_t j = 0; j < keys; j++) {
        vector scores[VECTORS] = {{0}};
        add_lists(&s.keys, j, s.queries, scores);
        for (int i = 0; i < VECTORS; i++) {
            maximum[i] = larger(maximum[i], scores[i]);
            s.weights[j * VECTORS + i] = scores[i];
        }
    }
    for (int64_t j = 0; j < keys; j++)
        for (int i = 0; i < VECTORS; i++) {
            const vector weight = exp2_of_negative(s.weights[j * VECTORS + i] - maximum[i]);
            total[i] += weight;
            s.weights[j * VECTORS + i] = weight;
        }
    for (int i = 0; keys && i < VECTORS; i++) total[i] = 1.0f / total[i];
    for (int64_t d = 0; d < a->head_size; d++) {
        vector sums[VECTORS] = {{0}};
        add_lists(&s.values, d, s.weights, sums);
        for (int i = 0; i < VECTORS; i++) s.result[d * VECTORS + i] = sums[i] * total[i];
    }
    const float *from = (const float *)s.result;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t d = 0; d < a->head_size; d++) s.context[(first + t) * a->head_size + d] = from[d * TILE + t];
}

static int attention_item(const struct attention *a, const struct neuron *all, int64_t sequence, int64_t head,
                          struct head_scratch s) {
    const int64_t size = a->head_size, channel = head * size, tokens = all->tokens;
    const int64_t keys = fill_lists(a, all, sequence, channel, s);
    for (int64_t first = 0; first < tokens; first += TILE) {
        const int64_t count = tokens - first < TILE ? tokens - first : TILE;
        load_queries(a, all, sequence * tokens + first, channel, count, s);
        attend_to_tile(a, keys, first, count, s);
    }
    const int64_t start = sequence * tokens * all->channels + channel;
    if (a->context)
        for (int64_t t = 0; t < tokens; t++)
            memcpy(a->context + start + t * all->channels, s.context + t * size, sizeof(float) * (size_t)size);
    struct neuron one = *all;
    one.batch = 1;
    one.channels = size;
    one.groups = 1;
    one.current = s.context;
    one.mask = all->mask ? all->mask + sequence * tokens : NULL;
    one.v_threshold += channel;
    one.decay_forward += head;
    one.decay_backward += head;
    one.reset += head;
    one.packed = s.packed;
    if (LEVEL(bpsn_forward)(&one, 1)) return 1;
    for (int plane = 0; plane <= all->ternary; plane++) {
        uint8_t *to = all->packed + (plane * all->batch * tokens * all->channels + start) / 8;
        for (int64_t t = 0; t < tokens; t++)
            memcpy(to + t * all->channels / 8, s.packed + (plane * tokens + t) * size / 8, (size_t)size / 8);
    }
    return 0;
}

/* Hands out pieces of one allocation, each aligned to 64 bytes; without an allocation it only counts. */
INLINE void *take(char *memory, int64_t *used, int64_t bytes) {
    char *piece = memory ? memory + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return piece;
}

INLINE struct head_scratch divide(char *memory, const struct attention *a, const struct neuron *all, int64_t *used) {
    const int64_t tokens = all->tokens, size = a->head_size, lists = 1 + all->ternary;
    struct head_scratch s;
    *used = 0;
    s.queries = take(memory, used, size * TILE * 4);
    s.weights = take(memory, used, tokens * TILE * 4);
    s.result = take(memory, used, size * TILE * 4);
    s.context = take(memory, used, tokens * size * 4);
    s.packed = take(memory, used, lists * tokens * size / 8);
    s.tokens = take(memory, used, tokens * 2);
    s.keys = (struct head_lists){tokens, size + 8, (int)lists, take(memory, used, lists * tokens * (size + 8) * 2),
                                 take(memory, used, lists * tokens * 2)};
    s.values = (struct head_lists){size, tokens, (int)lists, take(memory, used, lists * size * tokens * 2),
                                   take(memory, used, lists * size * 2)};
    return s;
}

/* Writes all->packed, the spikes of the neuron behind the attention, and a->context unless it is NULL. The head size
 * is a multiple of 8 and at most 512, tokens are fewer than 65536, and the neuron has a group per head. Returns 0, or
 * 1 if memory is short. */
int LEVEL(event_attention)(const struct attention *a, const struct neuron *all, int32_t threads) {
    const int64_t heads = all->channels / a->head_size;
    int64_t bytes;
    int failed = 0;
    divide(NULL, a, all, &bytes);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *memory = aligned_alloc(64, (size_t)bytes);
        int short_of_memory = !memory;
        int64_t used;
        const struct head_scratch s = divide(memory, a, all, &used);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < all->batch * heads; item++)
            if (memory) short_of_memory |= attention_item(a, all, item / heads, item % heads, s);
        free(memory);
        if (short_of_memory) {
#pragma omp atomic write
            failed = 1;
        }
    }
    return failed;
}
