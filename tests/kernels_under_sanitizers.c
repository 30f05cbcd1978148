/* Calls every kernel at every level that this processor has, on buffers of exactly the size that it may touch, for
 * AddressSanitizer and UndefinedBehaviorSanitizer to watch. Results are compared between the levels, and products with
 * a plain loop. Compiled and run by test_kernel_sanitizers.py. */
#include "event_driven.h"

#include <math.h>
#include <stdio.h>

static uint64_t state = 88172645463325252u;

static double uniform(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (double)(state >> 11) / 9007199254740992.0;
}

static void fail(const char *what, int64_t at) {
    fprintf(stderr, "%s at %lld\n", what, (long long)at);
    exit(1);
}

/* malloc, whose ends AddressSanitizer watches to the byte; the kernels want weights on a cache line. */
static void *get(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes ? bytes : 1)) fail("no memory", (int64_t)bytes);
    return memory;
}

static float *floats(int64_t n, double low, double high) {
    float *x = get(sizeof(float) * (size_t)n);
    for (int64_t k = 0; k < n; k++) x[k] = (float)(low + (high - low) * uniform());
    return x;
}

static uint8_t *packed_spikes(int64_t bytes, int ternary) {
    uint8_t *x = get((size_t)bytes * (size_t)(1 + ternary));
    for (int64_t k = 0; k < bytes; k++) {
        x[k] = (uint8_t)(256 * uniform());
        if (ternary) x[bytes + k] = (uint8_t)(256 * uniform()) & (uint8_t)~x[k];
    }
    return x;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define CALL(function, ...)                                                                                            \
    (level == 4 ? function##_v4(__VA_ARGS__) : level == 3 ? function##_v3(__VA_ARGS__) : function##_plain(__VA_ARGS__))
static int has(int level) {
    __builtin_cpu_init();
    if (level == 4)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return level == 1 || (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
}
#else
#define CALL(function, ...) function##_plain(__VA_ARGS__)
static int has(int level) { return level == 1; }
#endif

static const int64_t WIDTHS[] = {8, 16, 24, 40, 64};
static int64_t spikes_seen = 0;

static struct neuron make_neuron(int64_t batch, int64_t tokens, int64_t groups, int64_t width, int ternary,
                                 int iterations, int masked, double longest_decay) {
    const int64_t channels = groups * width;
    uint8_t *mask = masked ? get((size_t)(batch * tokens)) : NULL;
    for (int64_t k = 0; mask && k < batch * tokens; k++) mask[k] = uniform() < 0.7;
    return (struct neuron){
        .batch = batch, .tokens = tokens, .channels = channels, .groups = groups, .mask = mask,
        .v_threshold = floats(channels, 0.05, 0.4), .decay_forward = floats(groups, 0, longest_decay),
        .decay_backward = floats(groups, 0, longest_decay), .reset = floats(groups, 0, 1), .normalize = 1,
        .reset_iterations = iterations, .ternary = ternary, .surrogate = iterations, .alpha = 2.0f,
        .packed = get((size_t)(batch * tokens * channels / 8 * (1 + ternary)))};
}

static void free_neuron(struct neuron *p) {
    free((void *)p->mask);
    free((void *)p->v_threshold);
    free((void *)p->decay_forward);
    free((void *)p->decay_backward);
    free((void *)p->reset);
    free(p->packed);
}

static void run_neurons(int level, int64_t tokens, int64_t width, int ternary, int iterations, int masked,
                        double longest_decay, int threads) {
    const int64_t batch = 2, groups = 3, channels = groups * width, n = batch * tokens * channels;
    struct neuron p = make_neuron(batch, tokens, groups, width, ternary, iterations, masked, longest_decay);
    float *current = floats(n, -1, 1), *grad = floats(n, -1, 1);
    p.current = current;
    p.grad_spikes = grad;
    p.spikes = get(sizeof(float) * (size_t)n);
    p.grad_current = get(sizeof(float) * (size_t)n);
    p.grad_v_threshold = get(sizeof(float) * (size_t)(batch * channels));
    p.grad_decay_forward = get(sizeof(float) * (size_t)(batch * groups));
    p.grad_decay_backward = get(sizeof(float) * (size_t)(batch * groups));
    p.grad_reset = get(sizeof(float) * (size_t)(batch * groups));
    if (CALL(bpsn_forward, &p, threads) || CALL(bpsn_backward, &p, threads)) fail("no memory in a neuron", n);
    for (int64_t k = 0; k < n; k++) {
        const int bit = p.packed[k / 8] >> k % 8 & 1;
        const int minus = ternary ? p.packed[n / 8 + k / 8] >> k % 8 & 1 : 0;
        if (p.spikes[k] != (float)(bit - minus)) fail("packed spikes differ from the spikes", k);
        if (!isfinite(p.grad_current[k])) fail("a gradient that is not finite", k);
        spikes_seen += bit + minus;
    }
    free(current);
    free(grad);
    free(p.spikes);
    free(p.grad_current);
    free(p.grad_v_threshold);
    free(p.grad_decay_forward);
    free(p.grad_decay_backward);
    free(p.grad_reset);
    free_neuron(&p);
}

/* Columns of a block, and bytes of an input's weights in it. */
static int columns_of(int32_t weight_type) { return weight_type == FLOAT32 ? 32 : 64; }
static int64_t bytes_of(int32_t weight_type) { return weight_type >= INT8 ? 64 : 128; }
/* Tiles hold whole steps of 64 inputs. */
static int64_t stored_inputs(int64_t inputs, int32_t weight_type) {
    return weight_type == INT8_TILES ? (inputs + 63) / 64 * 64 : inputs;
}

static float weight_at(const struct product *q, const struct spike_lists *lists, int64_t input, int64_t output) {
    const int columns = columns_of(q->weight_type);
    const int64_t block = output / columns, c = output % columns, stored = stored_inputs(lists->inputs, q->weight_type);
    if (q->weight_type == INT8_TILES) {
        const int64_t tile = (block * 4 + c / 16) * (stored / 64) + input / 64;
        const int8_t *at = (const int8_t *)q->weight + tile * 1024 + input % 64 / 4 * 64 + c % 16 * 4 + input % 4;
        return q->scale[output] * (float)*at;
    }
    const uint8_t *row = (const uint8_t *)q->weight + (block * lists->inputs + input) * bytes_of(q->weight_type);
    if (q->weight_type == FLOAT32) return ((const float *)row)[c];
    if (q->weight_type == INT8) {
        const uint8_t byte = row[c % 16 * 4 + c / 16];
        return q->scale[output] * (float)(c / 16 % 2 ? (int8_t)byte : (int)byte - 128);
    }
    const int64_t line = c / 32, high = c / 16 % 2, k = c % 16;
    uint16_t word;
    memcpy(&word, row + 64 * line + 4 * k + 2 * high, 2);
    const uint32_t bits = (uint32_t)word << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void fill_weights(void *memory, int64_t bytes, int32_t weight_type) {
    for (int64_t k = 0; weight_type >= INT8 && k < bytes; k++) ((uint8_t *)memory)[k] = (uint8_t)(256 * uniform());
    for (int64_t k = 0; weight_type == FLOAT32 && k < bytes / 4; k++) ((float *)memory)[k] = (float)uniform() - 0.5f;
    for (int64_t k = 0; weight_type == BFLOAT16 && k < bytes / 2; k++) {
        const float value = (float)uniform() - 0.5f;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        ((uint16_t *)memory)[k] = (uint16_t)(bits >> 16);
    }
}

static void run_products(int level, int64_t tokens, int64_t inputs, int64_t groups, int64_t width, int32_t weight_type,
                         int ternary, int threads) {
    const int64_t batch = 2, rows = batch * tokens, outputs = groups * width;
    const int columns = columns_of(weight_type);
    const int64_t blocks = (outputs + columns - 1) / columns, stride = inputs + LIST_SLACK;
    const int64_t bytes = blocks * stored_inputs(inputs, weight_type) * bytes_of(weight_type);
    uint8_t *packed = packed_spikes(rows * inputs / 8, ternary);
    float *spikes = get(sizeof(float) * (size_t)(rows * inputs));
    for (int64_t k = 0; k < rows * inputs; k++)
        spikes[k] = (float)((packed[k / 8] >> k % 8 & 1) -
                            (ternary ? packed[rows * inputs / 8 + k / 8] >> k % 8 & 1 : 0));
    struct spike_lists lists = {rows, inputs, stride, 1 + ternary, get(2 * (size_t)((1 + ternary) * rows * stride)),
                                get(4 * (size_t)((1 + ternary) * rows)),
                                get((size_t)((1 + ternary) * rows * inputs / 8))};
    struct product q = {.outputs = outputs, .weight_type = weight_type, .weight = get((size_t)bytes),
                        .scale = floats(blocks * columns, 0.001, 0.01), .bias = floats(blocks * columns, -1, 1),
                        .addend = floats(rows * outputs, -1, 1), .result = get(sizeof(float) * (size_t)(rows * outputs))};
    fill_weights((void *)q.weight, bytes, weight_type);
    const int64_t listed = CALL(list_float_spikes, &lists, spikes, threads);
    if (memcmp(lists.packed, packed, (size_t)((1 + ternary) * rows * inputs / 8))) fail("packed otherwise", rows);
    if (listed != CALL(list_packed_spikes, &lists, packed, threads)) fail("the lists differ in length", listed);
    if (listed != CALL(count_packed_spikes, packed, (1 + ternary) * rows * inputs / 8, threads))
        fail("the count differs from the lists", listed);
    spikes_seen += listed;
    struct spike_lists turned = {inputs, rows, rows, 1 + ternary, get(2 * (size_t)((1 + ternary) * inputs * rows)),
                                  get(4 * (size_t)((1 + ternary) * inputs))};
    if (listed != CALL(list_packed_columns, &turned, packed, threads)) fail("the columns' lists differ", listed);
    for (int64_t i = 0; i < inputs; i++)
        for (int64_t k = 0; k < turned.counts[i]; k++)
            if (spikes[turned.indices[i * rows + k] * inputs + i] != 1) fail("a column's list is wrong", i);
    free(turned.indices);
    free(turned.counts);
    CALL(event_linear, &lists, &q, threads);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < outputs; k++) {
            double sum = q.bias[k] + q.addend[row * outputs + k];
            for (int64_t i = 0; i < inputs; i++)
                sum += (double)spikes[row * inputs + i] * weight_at(&q, &lists, i, k);
            if (!(fabs(sum - q.result[row * outputs + k]) < 1e-3)) fail("a product differs from its loop", k);
        }
    if (columns % width == 0 || width % columns == 0) {
        struct neuron p = make_neuron(batch, tokens, groups, width, ternary, 1, 1, 0.9);
        if (CALL(event_linear_bpsn, &lists, &q, &p, threads)) fail("no memory behind a product", rows);
        free_neuron(&p);
    }
    spikes[rows * inputs - 1] = 0.5f;
    if (CALL(list_float_spikes, &lists, spikes, threads) != -1) fail("0.5 was taken for a spike", rows);
    free(packed);
    free(spikes);
    free(lists.indices);
    free(lists.counts);
    free(lists.packed);
    free((void *)q.weight);
    free((void *)q.scale);
    free((void *)q.bias);
    free((void *)q.addend);
    free(q.result);
}

static void run_attention(int level, int64_t tokens, int64_t head_size, int ternary, int masked, int threads) {
    const int64_t batch = 2, heads = 2, channels = heads * head_size, bytes = batch * tokens * channels / 8;
    struct neuron p = make_neuron(batch, tokens, heads, head_size, ternary, 1, masked, 0.9);
    float *gain = floats(channels, 0.5, 1.5), *offset = floats(channels, -0.5, 0.5);
    uint8_t *query = packed_spikes(bytes, ternary), *key = packed_spikes(bytes, ternary);
    uint8_t *value = packed_spikes(bytes, ternary);
    float *context = get(sizeof(float) * (size_t)(batch * tokens * channels));
    struct attention a = {head_size, query, key, value, gain, offset, 0.25f, context};
    if (CALL(event_attention, &a, &p, threads)) fail("no memory in the attention", tokens);
    for (int64_t k = 0; k < batch * tokens * channels; k++)
        if (!(fabs(context[k]) <= 1.0001)) fail("a context beyond the mean of its values", k);
    free(gain);
    free(offset);
    free(query);
    free(key);
    free(value);
    free(context);
    free_neuron(&p);
}

int main(void) {
    int levels = 0;
    for (int level = 1; level <= 4; level++) {
        if (level == 2 || !has(level)) continue;
        levels++;
        for (int ternary = 0; ternary < 2; ternary++) {
            for (int64_t tokens = 1; tokens <= 70; tokens += tokens < 3 ? 1 : 33)
                for (int k = 0; k < 5; k++) {
                    const int threads = 1 + k % 2;
                    run_neurons(level, tokens, WIDTHS[k], ternary, k % 4, k % 2, 0.9, threads);
                    run_attention(level, tokens, WIDTHS[k], ternary, k % 2, threads);
                    for (int32_t type = FLOAT32; type <= INT8; type++)
                        run_products(level, tokens, 8 * (1 + 7 * k), 3, WIDTHS[k], type, ternary, threads);
                }
            /* Long enough, and soon enough forgotten, to go by windows. */
            for (int k = 0; k < 4; k++) run_neurons(level, 1300, WIDTHS[k], ternary, k, k % 2, 0.3, 1 + k % 2);
            run_attention(level, 3, 512, ternary, 1, 1);
            run_products(level, 2, 1024, 2, 128, INT8, ternary, 2);
            if (level < 4 || !has_spike_tiles()) continue;
            for (int64_t tokens = 1; tokens <= 49; tokens += 8)
                for (int k = 0; k < 5; k++)
                    run_products(level, tokens, 8 * (1 + 7 * k), 3, WIDTHS[k], INT8_TILES, ternary, 1 + k % 2);
        }
    }
    if (!spikes_seen) fail("no spike was ever seen", 0);
    printf("%d levels, %lld spikes\n", levels, (long long)spikes_seen);
    return 0;
}
