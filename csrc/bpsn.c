/* The Bidirectional Parallel Spiking Neuron from currents to spikes, and its gradients, in float32.
 *
 * The equations are those of the class BPSN in modeling_snn_bert/spiking_neurons.py. Arrays are [batch, tokens,
 * channels]; a work item is one row of the batch and one channel group, done in blocks of channels and, where the row
 * is long, in windows of tokens. What a block keeps per token of a window stays in the cache, so each call reads its
 * inputs from memory once and writes its outputs once.
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

/* How a group cuts its sequences: into windows of `step` tokens. `memory` is the number of tokens after which neither
 * of its decays has left anything of what there was, so that a scan which starts so far outside of a window is as good
 * inside it as one over the whole sequence. */
struct plan {
    int64_t step, memory;
};

/* A window, in tokens from its first one. Its results are those of the tokens before `next`, where the next window
 * begins. They need the gradients of the leaky sum up to `graded` (backward only), the potentials up to `end`, and the
 * currents up to `seen`: each is scanned from later to earlier tokens on the way to the one before. */
struct window {
    int64_t next, graded, end, seen;
};

/* What a vector of channels hands from one window to the next: its scans from earlier to later tokens, and the sums
 * over all tokens. */
struct carried {
    vector sum, earlier, to_later;
    vector grad_threshold, grad_reset, grad_forward, grad_backward;
};

/* The same for a group, of the scans that make n and its derivatives to the decays. */
struct group_carried {
    double total, weight, slope, grad_forward, grad_backward;
};

struct scratch {
    float *reciprocal; /* [tokens of a window] */
    vector *grad_weight; /* [tokens], backward only: to n, not yet summed over the lanes */
    vector *later, *potential, *partial, *received; /* [tokens, vectors] */
    struct carried *carried; /* [vectors of a row] */
    vector *sent; /* [vectors of a row, sweeps]: what spikes send to later tokens */
    struct group_carried *groups; /* [groups of a row] */
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

/* The rows that a block reads lie far apart, where the processor does not look ahead by itself. So each loop over
 * tokens fetches what the next loop will want, and the last one the currents of the block beside. The first block of a
 * window has none before it: there the loop over the currents fetches some rows ahead. */
#define ROWS_AHEAD 16
INLINE void prefetch(const float *rows, int64_t row, int64_t stride, struct block block) {
    for (int i = 0; i < block.vectors; i++) __builtin_prefetch(rows + row * stride + LANES * i);
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
    if (surrogate == RECTANGLE) {
        return select_or_zero(magnitude < 1.0f / (2.0f * alpha), zero + alpha);
    }
    /* A number that this library does not know must not train as one that it does. */
    return zero + __builtin_nanf("");
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

/* 1 / n[t], the reciprocal of the total weight at each token of a window, and 1 at masked tokens. */
INLINE void reciprocal_weights(const struct neuron *p, const uint8_t *mask, float f, float b, struct window w,
                               double *total, float *reciprocal) {
    if (!p->normalize) {
        for (int64_t t = 0; t < w.end; t++) reciprocal[t] = 1.0f;
        return;
    }
    double later = 0, earlier = *total;
    for (int64_t t = w.seen - 1; t >= 0; t--) {
        later *= b;
        if (t < w.end) reciprocal[t] = (float)later;
        later += mask ? mask[t] != 0 : 1;
    }
    for (int64_t t = 0; t < w.end; t++) {
        int valid = mask ? mask[t] != 0 : 1;
        earlier = f * earlier + valid;
        reciprocal[t] = valid ? (float)(1.0 / (earlier + reciprocal[t])) : 1.0f;
        if (t == w.next - 1) *total = earlier;
    }
}

/* The potentials, and the sweeps of the reset but for the second half of the last one, which the callers do.
 *
 * Leaves in `later` the scan of the currents from the last token to the first, in `potential` v, in `partial` what
 * earlier tokens' spikes send in the last sweep, and in `received` the result of the sweep before that, if any. Fetches
 * the first `wanted_rows` rows of `wanted`, which are for the caller. */
INLINE void integrate(const struct neuron *p, const uint8_t *mask, const float *x, const float *threshold_at, float f,
                      float b, float reset, struct scratch s, struct block block, int several_sweeps, struct window w,
                      const float *wanted, int64_t wanted_rows) {
    const int64_t stride = p->channels, sweeps = p->reset_iterations;
    const int n = block.vectors, narrow = block.narrow, ternary = p->ternary;
    vector threshold[MAX_VECTORS], sum[MAX_VECTORS] = {{0}}, sent[MAX_VECTORS] = {{0}};
    for (int i = 0; i < n; i++) threshold[i] = load(threshold_at + LANES * i, narrow);
    int64_t t = w.seen;
    while (--t >= w.end)
        for (int i = 0; i < n; i++) {
            sum[i] *= b;
            if (!mask || mask[t]) sum[i] += load(x + t * stride + LANES * i, narrow);
        }
    for (; t >= 0; t--) {
        prefetch(x, t - ROWS_AHEAD, stride, block);
        for (int i = 0; i < n; i++) {
            sum[i] *= b;
            if (!mask || mask[t]) sum[i] += load(x + t * stride + LANES * i, narrow);
            s.later[t * n + i] = sum[i];
        }
    }
    for (int i = 0; i < n; i++) {
        sum[i] = s.carried[i].sum;
        if (sweeps) sent[i] = s.sent[i * sweeps];
    }
    t = 0;
    for (int64_t until = w.next; t < w.end; until = w.end) {
        for (; t < until; t++) {
            const int valid = !mask || mask[t];
            if (t < wanted_rows) prefetch(wanted, t, stride, block);
            for (int i = 0; i < n; i++) {
                vector before = f * sum[i];
                sum[i] = valid ? before + load(x + t * stride + LANES * i, narrow) : before;
                vector v = (before + s.later[t * n + i]) * s.reciprocal[t];
                s.potential[t * n + i] = v;
                if (!sweeps) continue;
                sent[i] *= f;
                s.partial[t * n + i] = sent[i];
                if (valid) sent[i] += fire(v, threshold[i], ternary);
            }
        }
        for (int i = 0; until == w.next && i < n; i++) {
            s.carried[i].sum = sum[i];
            if (sweeps) s.sent[i * sweeps] = sent[i];
        }
    }
    if (!several_sweeps) return;
    for (int64_t k = 0; k < w.end * n; k++) s.received[k] = (vector){0};
    for (int sweep = 1; sweep < sweeps; sweep++) {
        for (int i = 0; i < n; i++) sent[i] = (vector){0};
        for (t = w.end - 1; t >= 0; t--) {
            for (int i = 0; i < n; i++) {
                vector spikes = fire(s.potential[t * n + i] - reset * s.received[t * n + i], threshold[i], ternary);
                sent[i] *= b;
                s.received[t * n + i] = (s.partial[t * n + i] + sent[i]) * s.reciprocal[t];
                if (!mask || mask[t]) sent[i] += spikes;
            }
        }
        for (int i = 0; i < n; i++) sent[i] = s.sent[i * sweeps + sweep];
        for (t = 0; t < w.end; t++) {
            for (int i = 0; i < n; i++) {
                if (t == w.next) s.sent[i * sweeps + sweep] = sent[i];
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
                          struct scratch s, struct block block, int several_sweeps, int64_t first, struct window w) {
    const int64_t stride = p->channels, start = (row * p->tokens + first) * stride + channel;
    const uint8_t *mask = p->mask ? p->mask + row * p->tokens + first : NULL;
    const int n = block.vectors, narrow = block.narrow;
    const float *threshold_at = p->v_threshold + channel, *x = p->current + start;
    const int64_t plane = p->batch * p->tokens * stride / 8;
    integrate(p, mask, x, threshold_at, f, b, reset, s, block, several_sweeps, w,
              p->spikes ? p->spikes + start : NULL, p->spikes ? w.next : 0);
    vector threshold[MAX_VECTORS], sent[MAX_VECTORS] = {{0}};
    for (int i = 0; i < n; i++) threshold[i] = load(threshold_at + LANES * i, narrow);
    for (int64_t t = w.end - 1; t >= w.next; t--)
        for (int i = 0; i < n; i++)
            last_received(s, t * n + i, t, sent + i, threshold[i], b, reset, !mask || mask[t], p->ternary,
                          several_sweeps);
    for (int64_t t = w.next - 1; t >= 0; t--) {
        const int valid = !mask || mask[t];
        prefetch(x + LANES * n, t, stride, block);
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
    for (int64_t t = w.next; t < w.seen; t++) prefetch(x + LANES * n, t, stride, block);
}

INLINE float total(vector x) {
    float sum = 0;
    for (int k = 0; k < LANES; k++) sum += x[k];
    return sum;
}

INLINE void backward_block(const struct neuron *p, int64_t row, int64_t channel, float f, float b, float reset,
                           struct scratch s, struct block block, int several_sweeps, int64_t first, struct window w) {
    const int64_t stride = p->channels, start = (row * p->tokens + first) * stride + channel;
    const uint8_t *mask = p->mask ? p->mask + row * p->tokens + first : NULL;
    const int n = block.vectors, narrow = block.narrow;
    const float *threshold_at = p->v_threshold + channel, *x = p->current + start;
    integrate(p, mask, x, threshold_at, f, b, reset, s, block, several_sweeps, w,
              p->grad_spikes + start, w.graded);

    vector threshold[MAX_VECTORS], sent[MAX_VECTORS] = {{0}}, to_earlier[MAX_VECTORS] = {{0}};
    vector grad_threshold[MAX_VECTORS], grad_reset[MAX_VECTORS];
    for (int i = 0; i < n; i++) threshold[i] = load(threshold_at + LANES * i, narrow);
    int64_t t = w.end - 1;
    for (; t >= w.graded; t--)
        for (int i = 0; i < n; i++)
            last_received(s, t * n + i, t, sent + i, threshold[i], b, reset, !mask || mask[t], p->ternary,
                          several_sweeps);
    /* From the gradient of the spikes to that of the leaky sum, which takes the place of the potential; its scan from
     * later to earlier tokens takes the place of `partial`. */
    int64_t from = w.next;
    do {
        /* The sums are over this window's own tokens. */
        for (int i = 0; i < n; i++) grad_threshold[i] = grad_reset[i] = (vector){0};
        for (; t >= from; t--) {
            const int valid = !mask || mask[t];
            vector grad_mean = {0};
            if (t < w.next) prefetch(p->grad_current + start, t, stride, block);
            for (int i = 0; i < n; i++) {
                const int64_t at = t * n + i;
                vector v = s.potential[at], margin = v, received = {0};
                if (p->reset_iterations) {
                    received = last_received(s, at, t, sent + i, threshold[i], b, reset, valid, p->ternary,
                                             several_sweeps);
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
        from = 0;
    } while (t >= 0);
    vector earlier[MAX_VECTORS], to_later[MAX_VECTORS];
    vector grad_forward[MAX_VECTORS] = {{0}}, grad_backward[MAX_VECTORS] = {{0}};
    for (int i = 0; i < n; i++) {
        earlier[i] = s.carried[i].earlier;
        to_later[i] = s.carried[i].to_later;
    }
    for (t = 0; t < w.next; t++) {
        const int valid = !mask || mask[t];
        prefetch(x + LANES * n, t, stride, block);
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
    for (; t < w.seen; t++) prefetch(x + LANES * n, t, stride, block);
    for (int i = 0; i < n; i++) {
        s.carried[i].earlier = earlier[i];
        s.carried[i].to_later = to_later[i];
        s.carried[i].grad_threshold += grad_threshold[i];
        s.carried[i].grad_reset += grad_reset[i];
        s.carried[i].grad_forward += grad_forward[i];
        s.carried[i].grad_backward += grad_backward[i];
    }
}

/* The part of the decays' gradients that comes through n, with the derivatives of n carried along its scans. */
INLINE void weight_gradients(const uint8_t *mask, float f, float b, struct window w, const vector *grad_weight,
                             struct group_carried *group) {
    double weight = group->weight, slope = group->slope;
    for (int64_t t = 0; t < w.next; t++) {
        slope = weight + f * slope;
        weight = f * weight + (!mask || mask[t]);
        group->grad_forward += total(grad_weight[t]) * slope;
    }
    group->weight = weight;
    group->slope = slope;
    weight = slope = 0;
    for (int64_t t = w.seen - 1; t >= 0; t--) {
        slope = weight + b * slope;
        weight = b * weight + (!mask || mask[t]);
        if (t < w.next) group->grad_backward += total(grad_weight[t]) * slope;
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

/* A power of a decay below which a sum in float32 does not notice what it is multiplied with. */
#define NEGLIGIBLE 1e-10
/* Tokens of a window at least, and the most of them that it may touch for its scratch space to stay in the cache. */
enum { SHORTEST_WINDOW = 512, LONGEST_WINDOW = 2048, SHORTEST_MEMORY = 16 };

/* The plan of a group follows from its decays and the shapes alone, so that the threads change no result. */
INLINE struct plan plan_group(const struct neuron *p, int64_t group) {
    const struct plan whole = {p->tokens, 0};
    if (p->tokens <= 2 * SHORTEST_WINDOW) return whole;
    const float f = p->decay_forward[group], b = p->decay_backward[group];
    double power = f > b ? f : b;
    int64_t memory = 1;
    while (memory < SHORTEST_MEMORY || (power > NEGLIGIBLE && memory < LONGEST_WINDOW)) {
        power *= power;
        memory *= 2;
    }
    const int64_t outside = (2 + (int64_t)p->reset_iterations) * memory;
    const int64_t step = 2 * outside > SHORTEST_WINDOW ? 2 * outside : SHORTEST_WINDOW;
    if (step + outside > LONGEST_WINDOW || p->tokens <= 2 * step) return whole;
    const int64_t windows = (p->tokens + step - 1) / step;
    return (struct plan){(p->tokens + windows - 1) / windows, memory};
}

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE struct window window_at(const struct neuron *p, int64_t first, struct plan plan, int backward) {
    const int64_t left = p->tokens - first, next = min(plan.step, left);
    const int64_t graded = min(next + (backward ? plan.memory : 0), left);
    const int64_t end = min(graded + p->reset_iterations * plan.memory, left);
    return (struct window){next, graded, end, min(end + plan.memory, left)};
}

/* Vectors of the next block; 0 where fewer channels than lanes are left. */
INLINE int block_vectors(int64_t channels_left) {
    const int64_t vectors = channels_left / LANES;
    return (int)(vectors < MAX_VECTORS ? vectors : MAX_VECTORS);
}

INLINE int64_t group_vectors(const struct neuron *p) { return (p->channels / p->groups + LANES - 1) / LANES; }

static void forward_window(const struct neuron *p, int64_t row, int64_t group, int64_t first, struct window w,
                           struct scratch s) {
    const int64_t width = p->channels / p->groups, sweeps = p->reset_iterations;
    const float f = p->decay_forward[group], b = p->decay_backward[group], reset = p->reset[group];
    const uint8_t *mask = p->mask ? p->mask + row * p->tokens + first : NULL;
    reciprocal_weights(p, mask, f, b, w, &s.groups->total, s.reciprocal);
    for (int64_t done = 0; done < width;) {
        const int64_t channel = group * width + done, left = width - done;
#define FORWARD(block, several) forward_block(p, row, channel, f, b, reset, s, block, several, first, w)
        FOR_BLOCK(FORWARD, block_vectors(left), (int)left);
#undef FORWARD
        s.carried += left >= LANES ? block_vectors(left) : 1;
        s.sent += (left >= LANES ? block_vectors(left) : 1) * sweeps;
        done += left >= LANES ? LANES * block_vectors(left) : left;
    }
}

static void backward_window(const struct neuron *p, int64_t row, int64_t group, int64_t first, struct window w,
                            struct scratch s) {
    const int64_t width = p->channels / p->groups, sweeps = p->reset_iterations;
    const float f = p->decay_forward[group], b = p->decay_backward[group], reset = p->reset[group];
    const uint8_t *mask = p->mask ? p->mask + row * p->tokens + first : NULL;
    reciprocal_weights(p, mask, f, b, w, &s.groups->total, s.reciprocal);
    memset(s.grad_weight, 0, sizeof(vector) * (size_t)w.graded);
    for (int64_t done = 0; done < width;) {
        const int64_t channel = group * width + done, left = width - done;
#define BACKWARD(block, several) backward_block(p, row, channel, f, b, reset, s, block, several, first, w)
        FOR_BLOCK(BACKWARD, block_vectors(left), (int)left);
#undef BACKWARD
        s.carried += left >= LANES ? block_vectors(left) : 1;
        s.sent += (left >= LANES ? block_vectors(left) : 1) * sweeps;
        done += left >= LANES ? LANES * block_vectors(left) : left;
    }
    if (p->normalize) weight_gradients(mask, f, b, w, s.grad_weight, s.groups);
}

/* The gradients of a group's parameters, from the sums over all windows. */
static void write_gradients(const struct neuron *p, int64_t row, int64_t group, const struct carried *carried,
                            const struct group_carried *sums) {
    const int64_t width = p->channels / p->groups;
    double decay_forward = 0, decay_backward = 0, reset = 0;
    for (int64_t done = 0; done < width; done += LANES, carried++) {
        store(p->grad_v_threshold + row * p->channels + group * width + done, carried->grad_threshold,
              width - done < LANES ? (int)(width - done) : 0);
        decay_forward += total(carried->grad_forward);
        decay_backward += total(carried->grad_backward);
        reset += total(carried->grad_reset);
    }
    p->grad_decay_forward[row * p->groups + group] = (float)(decay_forward + sums->grad_forward);
    p->grad_decay_backward[row * p->groups + group] = (float)(decay_backward + sums->grad_backward);
    p->grad_reset[row * p->groups + group] = (float)reset;
}

/* Groups of one row and one plan. They take each window together, so that a page of memory is visited once. */
static void run_groups(const struct neuron *p, int64_t row, int64_t group, int64_t end, struct plan plan,
                       struct scratch s, int backward) {
    const int64_t vectors = group_vectors(p), sweeps = p->reset_iterations;
    memset(s.carried, 0, sizeof *s.carried * (size_t)((end - group) * vectors));
    memset(s.sent, 0, sizeof *s.sent * (size_t)((end - group) * vectors * sweeps));
    memset(s.groups, 0, sizeof *s.groups * (size_t)(end - group));
    for (int64_t first = 0; first < p->tokens; first += plan.step) {
        const struct window w = window_at(p, first, plan, backward);
        for (int64_t k = 0; k < end - group; k++) {
            struct scratch own = s;
            own.carried += k * vectors;
            own.sent += k * vectors * sweeps;
            own.groups += k;
            (backward ? backward_window : forward_window)(p, row, group + k, first, w, own);
        }
    }
    for (int64_t k = 0; backward && k < end - group; k++)
        write_gradients(p, row, group + k, s.carried + k * vectors, s.groups + k);
}

/* The next `bytes` of the scratch space, from a cache line's start. */
INLINE void *take(char *memory, size_t *used, size_t bytes) {
    void *taken = memory ? memory + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return taken;
}

/* The scratch space of one thread, or with no memory its size only, in `used`. Forward, nobody reads `later` once there
 * is a potential, and the less there is to keep in the cache the better. */
INLINE struct scratch divide(const struct neuron *p, int64_t tokens, int backward, char *memory, size_t *used) {
    const size_t window = sizeof(vector) * MAX_VECTORS * (size_t)tokens;
    const size_t vectors = (size_t)(p->groups * group_vectors(p));
    struct scratch s;
    s.later = take(memory, used, window);
    s.potential = backward ? take(memory, used, window) : s.later;
    s.partial = take(memory, used, window);
    s.received = take(memory, used, p->reset_iterations > 1 ? window : 0);
    s.grad_weight = take(memory, used, sizeof(vector) * (size_t)tokens);
    s.reciprocal = take(memory, used, sizeof(float) * (size_t)tokens);
    s.carried = take(memory, used, sizeof(struct carried) * vectors);
    s.sent = take(memory, used, sizeof(vector) * vectors * (size_t)p->reset_iterations);
    s.groups = take(memory, used, sizeof(struct group_carried) * (size_t)p->groups);
    return s;
}

/* Runs every group of every row. Returns 0, or 1 if there is no memory for the scratch space. */
static int run(const struct neuron *p, int backward, int32_t threads) {
    const int64_t items = p->batch * p->groups;
    int64_t tokens = 0;
    for (int64_t group = 0; group < p->groups; group++) {
        const int64_t touched = window_at(p, 0, plan_group(p, group), backward).end;
        if (touched > tokens) tokens = touched;
    }
    size_t bytes = 0;
    divide(p, tokens, backward, NULL, &bytes);
    int failed = 0;
    if (threads > items) threads = (int32_t)items;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int32_t thread = 0; thread < threads; thread++) {
        char *memory = aligned_alloc(64, bytes);
        const unsigned state = flush_denormals();
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        size_t used = 0;
        const struct scratch s = divide(p, tokens, backward, memory, &used);
        const int64_t last = items * (thread + 1) / threads;
        for (int64_t k = items * thread / threads, next; memory && k < last; k = next) {
            const struct plan plan = plan_group(p, k % p->groups);
            for (next = k + 1; next < last && next % p->groups; next++) {
                const struct plan other = plan_group(p, next % p->groups);
                if (other.step != plan.step || other.memory != plan.memory) break;
            }
            run_groups(p, k / p->groups, k % p->groups, k % p->groups + next - k, plan, s, backward);
        }
        restore_denormals(state);
        free(memory);
    }
    return failed;
}

int LEVEL(bpsn_forward)(const struct neuron *p, int32_t threads) { return run(p, 0, threads); }

int LEVEL(bpsn_backward)(const struct neuron *p, int32_t threads) { return run(p, 1, threads); }
