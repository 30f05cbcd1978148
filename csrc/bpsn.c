/* The Bidirectional Parallel Spiking Neuron from currents to spikes, and its gradients, in float32.
 *
 * The equations are those of the class BPSN in modeling_snn_bert/spiking_neurons.py. Arrays are [batch, tokens,
 * channels]; a work item is one row of the batch and one channel group, done in blocks of channels. What a block keeps
 * per token stays in the cache, so each call reads its inputs and writes its outputs once.
 *
 * This file is compiled once for each level of the instruction set, see kernels.h. */
#include "kernels.h"

/* Lanes of a vector. A block is as wide as two of them where the group has room for it. */
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define MAX_VECTORS 2

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t int_vector __attribute__((vector_size(4 * LANES)));
#if !defined(__AVX2__)
typedef uint8_t byte_vector __attribute__((vector_size(LANES)));
#endif

enum surrogate { ATAN, SIGMOID, TRIANGLE, RECTANGLE };

/* A block of `vectors` vectors, or of `narrow` < LANES channels in one vector. */
struct block {
    int vectors, narrow;
};

struct scratch {
    float *reciprocal; /* [tokens] */
    vector *grad_weight; /* [tokens], backward only: to n, not yet summed over the lanes */
    vector *later, *potential, *partial, *received; /* [tokens, vectors] */
};

struct group_gradients {
    double decay_forward, decay_backward, reset;
};

INLINE vector load(const float *from, int narrow) {
    vector x = {0};
    if (narrow) memcpy(&x, from, 4 * (size_t)narrow);
    else memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, vector x, int narrow) {
    if (narrow) memcpy(to, &x, 4 * (size_t)narrow);
    else memcpy(to, &x, sizeof x);
}

/* The rows that a block reads lie far apart, where the processor does not look ahead by itself. */
#define ROWS_AHEAD 16
INLINE void prefetch(const float *row, int64_t rows, int64_t stride, struct block block) {
    for (int i = 0; i < block.vectors; i++) __builtin_prefetch(row + rows * stride + LANES * i);
}

INLINE vector select_or_zero(int_vector mask, vector x) { return (vector)((int_vector)x & mask); }

INLINE vector fire(vector potential, vector threshold, int ternary) {
    const vector one = (vector){0} + 1.0f;
    vector spikes = select_or_zero(potential >= threshold, one);
    if (ternary) spikes -= select_or_zero(potential <= -threshold, one);
    return spikes;
}

/* e^x for x <= 0, to a few units in the last place: 2^k times a polynomial on half an octave either side of 0. */
INLINE vector exp_of_negative(vector x) {
    const vector lowest = (vector){0} - 87.0f;
    x = (vector)(((int_vector)x & (x > lowest)) | ((int_vector)lowest & ~(x > lowest)));
    vector octaves = x * 1.44269504f;
    int_vector k = __builtin_convertvector(octaves - 0.5f, int_vector);
    vector whole = __builtin_convertvector(k, vector);
    vector r = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    vector p = 1.98412698e-4f * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vector)((k + 127) << 23);
}

/* The functions of modeling_snn_bert/surrogate_gradients.py. */
INLINE vector derivative(vector x, int surrogate, float alpha) {
    const vector zero = {0};
    vector magnitude = (vector)((int_vector)x & 0x7fffffff);
    if (surrogate == ATAN) {
        vector scaled = x * (1.57079633f * alpha);
        return 0.5f * alpha / (scaled * scaled + 1.0f);
    }
    if (surrogate == SIGMOID) {
        vector e = exp_of_negative(-alpha * magnitude);
        return alpha * e / ((1.0f + e) * (1.0f + e));
    }
    if (surrogate == TRIANGLE) {
        vector height = 1.0f - alpha * magnitude;
        return alpha * select_or_zero(height > zero, height);
    }
    return select_or_zero(magnitude < 1.0f / (2.0f * alpha), zero + alpha);
}

/* The sign bits of the lanes, which are 0 or -1, to bytes of eight channels. */
INLINE void pack(uint8_t *to, int_vector fired, int narrow) {
#if defined(__AVX512F__)
    const uint16_t bits = (uint16_t)_mm512_movepi32_mask((__m512i)fired);
#elif defined(__AVX2__)
    const uint8_t bits = (uint8_t)_mm256_movemask_ps((__m256)fired);
#else
    /* Byte i of eight, each 0 or 1, times 2^(56 - 7 i) lands on bit 56 + i, and nothing else reaches it. */
    byte_vector flags = __builtin_convertvector(-fired, byte_vector);
    uint64_t eight;
    memcpy(&eight, &flags, sizeof eight);
    const uint8_t bits = (uint8_t)((eight * 0x0102040810204080u) >> 56);
#endif
    memcpy(to, &bits, narrow ? (size_t)narrow / 8 : sizeof bits);
}

/* 1 / n[t], the reciprocal of the total weight at each token, and 1 at masked tokens. */
INLINE void reciprocal_weights(const struct neuron *p, const uint8_t *mask, float f, float b, float *reciprocal) {
    int64_t tokens = p->tokens;
    if (!p->normalize) {
        for (int64_t t = 0; t < tokens; t++) reciprocal[t] = 1.0f;
        return;
    }
    double later = 0, earlier = 0;
    for (int64_t t = tokens - 1; t >= 0; t--) {
        reciprocal[t] = (float)(later *= b);
        later += mask ? mask[t] != 0 : 1;
    }
    for (int64_t t = 0; t < tokens; t++) {
        int valid = mask ? mask[t] != 0 : 1;
        earlier = f * earlier + valid;
        reciprocal[t] = valid ? (float)(1.0 / (earlier + reciprocal[t])) : 1.0f;
    }
}

/* The potentials, and the sweeps of the reset but for the second half of the last one, which the callers do.
 *
 * Leaves in `later` the scan of the currents from the last token to the first, in `potential` v, in `partial` what
 * earlier tokens' spikes send in the last sweep, and in `received` the result of the sweep before that, if any. */
INLINE void integrate(const struct neuron *p, const uint8_t *mask, const float *x, const float *threshold_at, float f,
                      float b, float reset, struct scratch s, struct block block, int several_sweeps) {
    const int64_t tokens = p->tokens, stride = p->channels;
    const int n = block.vectors, narrow = block.narrow, ternary = p->ternary;
    vector threshold[MAX_VECTORS], sum[MAX_VECTORS] = {{0}}, sent[MAX_VECTORS] = {{0}};
    for (int i = 0; i < n; i++) threshold[i] = load(threshold_at + LANES * i, narrow);
    for (int64_t t = tokens - 1; t >= 0; t--) {
        prefetch(x + t * stride, -ROWS_AHEAD, stride, block);
        for (int i = 0; i < n; i++) {
            sum[i] *= b;
            if (!mask || mask[t]) sum[i] += load(x + t * stride + LANES * i, narrow);
            s.later[t * n + i] = sum[i];
        }
    }
    for (int i = 0; i < n; i++) sum[i] = (vector){0};
    for (int64_t t = 0; t < tokens; t++) {
        const int valid = !mask || mask[t];
        prefetch(x + t * stride, ROWS_AHEAD, stride, block);
        for (int i = 0; i < n; i++) {
            vector before = f * sum[i];
            sum[i] = valid ? before + load(x + t * stride + LANES * i, narrow) : before;
            vector v = (before + s.later[t * n + i]) * s.reciprocal[t];
            s.potential[t * n + i] = v;
            if (!p->reset_iterations) continue;
            sent[i] *= f;
            s.partial[t * n + i] = sent[i];
            if (valid) sent[i] += fire(v, threshold[i], ternary);
        }
    }
    if (!several_sweeps) return;
    for (int64_t k = 0; k < tokens * n; k++) s.received[k] = (vector){0};
    for (int sweep = 1; sweep < p->reset_iterations; sweep++) {
        for (int i = 0; i < n; i++) sent[i] = (vector){0};
        for (int64_t t = tokens - 1; t >= 0; t--) {
            for (int i = 0; i < n; i++) {
                vector spikes = fire(s.potential[t * n + i] - reset * s.received[t * n + i], threshold[i], ternary);
                sent[i] *= b;
                s.received[t * n + i] = (s.partial[t * n + i] + sent[i]) * s.reciprocal[t];
                if (!mask || mask[t]) sent[i] += spikes;
            }
        }
        for (int i = 0; i < n; i++) sent[i] = (vector){0};
        for (int64_t t = 0; t < tokens; t++) {
            for (int i = 0; i < n; i++) {
                sent[i] *= f;
                s.partial[t * n + i] = sent[i];
                if (!mask || mask[t])
                    sent[i] += fire(s.potential[t * n + i] - reset * s.received[t * n + i], threshold[i], ternary);
            }
        }
    }
}

/* One token of the second half of the last sweep: the reset received there, from `sent` by later tokens. */
INLINE vector last_received(struct scratch s, int64_t at, int64_t t, vector *sent, vector threshold, float b,
                            float reset, int valid, int ternary, int several_sweeps) {
    vector before = s.potential[at];
    if (several_sweeps) before -= reset * s.received[at];
    *sent *= b;
    vector received = (s.partial[at] + *sent) * s.reciprocal[t];
    if (valid) *sent += fire(before, threshold, ternary);
    return received;
}

INLINE void forward_block(const struct neuron *p, int64_t row, int64_t channel, float f, float b, float reset,
                          struct scratch s, struct block block, int several_sweeps) {
    const int64_t tokens = p->tokens, stride = p->channels, start = row * tokens * stride + channel;
    const uint8_t *mask = p->mask ? p->mask + row * tokens : NULL;
    const int n = block.vectors, narrow = block.narrow;
    const float *threshold_at = p->v_threshold + channel;
    const int64_t plane = p->batch * tokens * stride / 8;
    integrate(p, mask, p->current + start, threshold_at, f, b, reset, s, block, several_sweeps);
    vector threshold[MAX_VECTORS], sent[MAX_VECTORS] = {{0}};
    for (int i = 0; i < n; i++) threshold[i] = load(threshold_at + LANES * i, narrow);
    for (int64_t t = tokens - 1; t >= 0; t--) {
        const int valid = !mask || mask[t];
        if (p->spikes) prefetch(p->spikes + start + t * stride, -ROWS_AHEAD, stride, block);
        for (int i = 0; i < n; i++) {
            vector v = s.potential[t * n + i];
            if (p->reset_iterations)
                v -= reset * last_received(s, t * n + i, t, sent + i, threshold[i], b, reset, valid, p->ternary,
                                           several_sweeps);
            const int64_t at = start + t * stride + LANES * i;
            const int_vector present = (int_vector){0} - valid;
            int_vector up = (v >= threshold[i]) & present, down = {0};
            if (p->ternary) down = (v <= -threshold[i]) & present;
            if (p->spikes) store(p->spikes + at, __builtin_convertvector(down - up, vector), narrow);
            if (p->packed) pack(p->packed + at / 8, up, narrow);
            if (p->packed && p->ternary) pack(p->packed + plane + at / 8, down, narrow);
        }
    }
}

INLINE float total(vector x) {
    float sum = 0;
    for (int k = 0; k < LANES; k++) sum += x[k];
    return sum;
}

INLINE void backward_block(const struct neuron *p, int64_t row, int64_t channel, float f, float b, float reset,
                           struct scratch s, struct block block, int several_sweeps, struct group_gradients *grads) {
    const int64_t tokens = p->tokens, stride = p->channels, start = row * tokens * stride + channel;
    const uint8_t *mask = p->mask ? p->mask + row * tokens : NULL;
    const int n = block.vectors, narrow = block.narrow;
    const float *threshold_at = p->v_threshold + channel, *x = p->current + start;
    integrate(p, mask, x, threshold_at, f, b, reset, s, block, several_sweeps);

    vector threshold[MAX_VECTORS], sent[MAX_VECTORS] = {{0}}, to_earlier[MAX_VECTORS] = {{0}};
    vector grad_threshold[MAX_VECTORS] = {{0}}, grad_reset[MAX_VECTORS] = {{0}};
    for (int i = 0; i < n; i++) threshold[i] = load(threshold_at + LANES * i, narrow);
    /* From the gradient of the spikes to that of the leaky sum, which takes the place of the potential; its scan from
     * later to earlier tokens takes the place of `partial`. */
    for (int64_t t = tokens - 1; t >= 0; t--) {
        const int valid = !mask || mask[t];
        vector grad_mean = {0};
        prefetch(p->grad_spikes + start + t * stride, -ROWS_AHEAD, stride, block);
        for (int i = 0; i < n; i++) {
            const int64_t at = t * n + i;
            vector v = s.potential[at], margin = v, received = {0};
            if (p->reset_iterations) {
                received = last_received(s, at, t, sent + i, threshold[i], b, reset, valid, p->ternary, several_sweeps);
                margin -= reset * received;
            }
            vector grad = {0};
            if (valid) {
                const vector grad_spikes = load(p->grad_spikes + start + t * stride + LANES * i, narrow);
                grad = grad_spikes * derivative(margin - threshold[i], p->surrogate, p->alpha);
                grad_threshold[i] -= grad;
                if (p->ternary) {
                    vector mirrored = grad_spikes * derivative(-margin - threshold[i], p->surrogate, p->alpha);
                    grad_threshold[i] += mirrored;
                    grad += mirrored;
                }
            }
            grad_reset[i] -= received * grad;
            grad_mean -= v * grad;
            grad *= s.reciprocal[t];
            to_earlier[i] = grad + f * to_earlier[i];
            s.potential[at] = grad;
            s.partial[at] = to_earlier[i];
        }
        /* v = sum / n, so d loss / d n = - grad v / n, in the group as a whole. */
        if (p->normalize) s.grad_weight[t] += grad_mean * s.reciprocal[t];
    }
    vector earlier[MAX_VECTORS] = {{0}}, to_later[MAX_VECTORS] = {{0}};
    vector grad_forward[MAX_VECTORS] = {{0}}, grad_backward[MAX_VECTORS] = {{0}};
    for (int64_t t = 0; t < tokens; t++) {
        const int valid = !mask || mask[t];
        prefetch(x + t * stride, ROWS_AHEAD, stride, block);
        prefetch(p->grad_current + start + t * stride, ROWS_AHEAD, stride, block);
        for (int i = 0; i < n; i++) {
            const int64_t at = t * n + i;
            grad_forward[i] += earlier[i] * s.partial[at];
            grad_backward[i] += to_later[i] * s.later[at];
            to_later[i] *= b;
            vector grad = valid ? to_later[i] + s.partial[at] : (vector){0};
            store(p->grad_current + start + t * stride + LANES * i, grad, narrow);
            to_later[i] += s.potential[at];
            earlier[i] *= f;
            if (valid) earlier[i] += load(x + t * stride + LANES * i, narrow);
        }
    }
    for (int i = 0; i < n; i++) {
        store(p->grad_v_threshold + row * p->channels + channel + LANES * i, grad_threshold[i], narrow);
        grads->decay_forward += total(grad_forward[i]);
        grads->decay_backward += total(grad_backward[i]);
        grads->reset += total(grad_reset[i]);
    }
}

/* The part of the decays' gradients that comes through n, with the derivatives of n carried along its scans. */
INLINE void weight_gradients(const struct neuron *p, const uint8_t *mask, float f, float b, const vector *grad_weight,
                             struct group_gradients *grads) {
    double weight = 0, slope = 0;
    for (int64_t t = 0; t < p->tokens; t++) {
        slope = weight + f * slope;
        weight = f * weight + (!mask || mask[t]);
        grads->decay_forward += total(grad_weight[t]) * slope;
    }
    weight = slope = 0;
    for (int64_t t = p->tokens - 1; t >= 0; t--) {
        slope = weight + b * slope;
        weight = b * weight + (!mask || mask[t]);
        grads->decay_backward += total(grad_weight[t]) * slope;
    }
}

/* Calls `action(block, several_sweeps)` with constants, so that the compiler unrolls what runs over a block. */
#define FOR_BLOCK(action, vectors_left, narrow_width)                                                                  \
    do {                                                                                                               \
        const int several = p->reset_iterations > 1;                                                                   \
        if ((vectors_left) >= 2) {                                                                                     \
            const struct block block = {2, 0};                                                                         \
            if (several) action(block, 1);                                                                             \
            else action(block, 0);                                                                                     \
        } else if ((vectors_left) == 1) {                                                                              \
            const struct block block = {1, 0};                                                                         \
            if (several) action(block, 1);                                                                             \
            else action(block, 0);                                                                                     \
        } else {                                                                                                       \
            const struct block block = {1, narrow_width};                                                              \
            if (several) action(block, 1);                                                                             \
            else action(block, 0);                                                                                     \
        }                                                                                                              \
    } while (0)

/* Vectors of the next block; 0 where fewer channels than lanes are left. */
INLINE int block_vectors(int64_t channels_left) {
    const int64_t vectors = channels_left / LANES;
    return (int)(vectors < MAX_VECTORS ? vectors : MAX_VECTORS);
}

static void forward_item(const struct neuron *p, int64_t row, int64_t group, struct scratch s) {
    const int64_t width = p->channels / p->groups;
    const float f = p->decay_forward[group], b = p->decay_backward[group], reset = p->reset[group];
    reciprocal_weights(p, p->mask ? p->mask + row * p->tokens : NULL, f, b, s.reciprocal);
    for (int64_t done = 0; done < width;) {
        const int64_t channel = group * width + done, left = width - done;
#define FORWARD(block, several) forward_block(p, row, channel, f, b, reset, s, block, several)
        FOR_BLOCK(FORWARD, block_vectors(left), (int)left);
#undef FORWARD
        done += left >= LANES ? LANES * block_vectors(left) : left;
    }
}

static void backward_item(const struct neuron *p, int64_t row, int64_t group, struct scratch s) {
    const int64_t width = p->channels / p->groups;
    const float f = p->decay_forward[group], b = p->decay_backward[group], reset = p->reset[group];
    const uint8_t *mask = p->mask ? p->mask + row * p->tokens : NULL;
    struct group_gradients grads = {0, 0, 0};
    reciprocal_weights(p, mask, f, b, s.reciprocal);
    memset(s.grad_weight, 0, sizeof(vector) * (size_t)p->tokens);
    for (int64_t done = 0; done < width;) {
        const int64_t channel = group * width + done, left = width - done;
#define BACKWARD(block, several) backward_block(p, row, channel, f, b, reset, s, block, several, &grads)
        FOR_BLOCK(BACKWARD, block_vectors(left), (int)left);
#undef BACKWARD
        done += left >= LANES ? LANES * block_vectors(left) : left;
    }
    if (p->normalize) weight_gradients(p, mask, f, b, s.grad_weight, &grads);
    p->grad_decay_forward[row * p->groups + group] = (float)grads.decay_forward;
    p->grad_decay_backward[row * p->groups + group] = (float)grads.decay_backward;
    p->grad_reset[row * p->groups + group] = (float)grads.reset;
}

/* Runs `item` for every row and group. Returns 0, or 1 if there is no memory for the scratch space. */
static int run(const struct neuron *p, void (*item)(const struct neuron *, int64_t, int64_t, struct scratch),
               int32_t threads) {
    const size_t vectors = (size_t)p->tokens * MAX_VECTORS * sizeof(vector);
    const size_t scalars = ((size_t)p->tokens * sizeof(float) + 63) / 64 * 64;
    const int64_t items = p->batch * p->groups;
    int failed = 0;
    if (threads > items) threads = (int32_t)items;
#pragma omp parallel num_threads(threads)
    {
        char *memory = aligned_alloc(64, (4 * vectors + vectors / MAX_VECTORS + scalars + 63) / 64 * 64);
        const unsigned state = flush_denormals();
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        const struct scratch s = {(float *)(memory + 4 * vectors + vectors / MAX_VECTORS),
                                  (vector *)(memory + 4 * vectors),
                                  (vector *)memory,
                                  (vector *)(memory + vectors),
                                  (vector *)(memory + 2 * vectors),
                                  (vector *)(memory + 3 * vectors)};
#pragma omp for schedule(static)
        for (int64_t k = 0; k < items; k++)
            if (memory) item(p, k / p->groups, k % p->groups, s);
        restore_denormals(state);
        free(memory);
    }
    return failed;
}

int LEVEL(bpsn_forward)(const struct neuron *p, int32_t threads) { return run(p, forward_item, threads); }

int LEVEL(bpsn_backward)(const struct neuron *p, int32_t threads) { return run(p, backward_item, threads); }
