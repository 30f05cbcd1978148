/* Calls every kernel at every level that this processor has, on buffers of exactly the size that it may touch, for
 * AddressSanitizer and UndefinedBehaviorSanitizer to watch. Results of each level are compared with those of the plain
 * one, and products with a loop. Compiled and run by test_kernel_levels.py. */
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

/* What the plain level computed, in the order in which it did, for the others to be held to. */
static uint8_t *recorded = NULL;
static size_t recorded_bytes = 0, recorded_room = 0, replayed = 0;
static int recording = 1;
static int64_t compared_bits = 0, differing_bits = 0;

/* What was recorded in this place; on the plain level `now` itself, which is recorded. */
static const void *at_plain(const void *now, size_t bytes) {
    if (recording) {
        while (recorded_bytes + bytes > recorded_room) {
            recorded_room = 2 * recorded_room + 4096;
            recorded = realloc(recorded, recorded_room);
            if (!recorded) fail("no memory for the records", (int64_t)recorded_room);
        }
        memcpy(recorded + recorded_bytes, now, bytes);
        recorded_bytes += bytes;
        return now;
    }
    if (replayed + bytes > recorded_bytes) fail("more results than the plain level has", (int64_t)replayed);
    replayed += bytes;
    return recorded + replayed - bytes;
}

/* Whether all spikes are those of the plain level. A potential that all but meets its threshold is rounded to either
 * side of it, so a few may differ; main() counts how many. */
static int same_spikes(const uint8_t *packed, int64_t bytes) {
    const uint8_t *plain = at_plain(packed, (size_t)bytes);
    int64_t differing = 0;
    for (int64_t k = 0; k < bytes; k++) differing += __builtin_popcount(packed[k] ^ plain[k]);
    compared_bits += 8 * bytes;
    differing_bits += differing;
    return !differing;
}

/* Sums of many products, whose parts cancel, differ by a few roundings of the largest. */
static void compare_floats(const char *what, const float *now, int64_t n, int comparable) {
    float *plain = get(sizeof(float) * (size_t)n), largest = 1;
    memcpy(plain, at_plain(now, sizeof(float) * (size_t)n), sizeof(float) * (size_t)n);
    for (int64_t k = 0; k < n; k++) largest = fmaxf(largest, fabsf(plain[k]));
    for (int64_t k = 0; comparable && k < n; k++)
        if (!(fabsf(now[k] - plain[k]) <= 1e-4f * largest)) fail(what, k);
    free(plain);
}

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

static void run_neurons(int64_t tokens, int64_t width, int ternary, int iterations, int masked,
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
    if (bpsn_forward(&p, threads) || bpsn_backward(&p, threads)) fail("no memory in a neuron", n);
    for (int64_t k = 0; k < n; k++) {
        const int bit = p.packed[k / 8] >> k % 8 & 1;
        const int minus = ternary ? p.packed[n / 8 + k / 8] >> k % 8 & 1 : 0;
        if (p.spikes[k] != (float)(bit - minus)) fail("packed spikes differ from the spikes", k);
        if (!isfinite(p.grad_current[k])) fail("a gradient that is not finite", k);
        spikes_seen += bit + minus;
    }
    const int same = same_spikes(p.packed, n / 8 * (1 + ternary));
    compare_floats("a gradient to a current differs from the plain level", p.grad_current, n, same);
    compare_floats("a gradient to a threshold differs", p.grad_v_threshold, batch * channels, same);
    compare_floats("a gradient to a decay differs", p.grad_decay_forward, batch * groups, same);
    compare_floats("a gradient to a backward decay differs", p.grad_decay_backward, batch * groups, same);
    compare_floats("a gradient to a reset differs", p.grad_reset, batch * groups, same);
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

static void run_products(int64_t tokens, int64_t inputs, int64_t groups, int64_t width, int32_t weight_type,
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
    const int64_t listed = list_float_spikes(&lists, spikes, threads);
    if (memcmp(lists.packed, packed, (size_t)((1 + ternary) * rows * inputs / 8))) fail("packed otherwise", rows);
    if (listed != list_packed_spikes(&lists, packed, threads)) fail("the lists differ in length", listed);
    if (listed != count_packed_spikes(packed, (1 + ternary) * rows * inputs / 8, threads))
        fail("the count differs from the lists", listed);
    spikes_seen += listed;
    struct spike_lists turned = {inputs, rows, rows, 1 + ternary, get(2 * (size_t)((1 + ternary) * inputs * rows)),
                                  get(4 * (size_t)((1 + ternary) * inputs))};
    if (listed != list_packed_columns(&turned, packed, threads)) fail("the columns' lists differ", listed);
    for (int64_t i = 0; i < inputs; i++)
        for (int64_t k = 0; k < turned.counts[i]; k++)
            if (spikes[turned.indices[i * rows + k] * inputs + i] != 1) fail("a column's list is wrong", i);
    free(turned.indices);
    free(turned.counts);
    event_linear(&lists, &q, threads);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < outputs; k++) {
            double sum = q.bias[k] + q.addend[row * outputs + k];
            for (int64_t i = 0; i < inputs; i++)
                sum += (double)spikes[row * inputs + i] * weight_at(&q, &lists, i, k);
            if (!(fabs(sum - q.result[row * outputs + k]) < 1e-3)) fail("a product differs from its loop", k);
        }
    if (weight_type != INT8_TILES) compare_floats("a product differs from the plain level", q.result, rows * outputs, 1);
    if (columns % width == 0 || width % columns == 0) {
        struct neuron p = make_neuron(batch, tokens, groups, width, ternary, 1, 1, 0.9);
        if (event_linear_bpsn(&lists, &q, &p, threads)) fail("no memory behind a product", rows);
        if (weight_type != INT8_TILES) same_spikes(p.packed, rows * outputs / 8 * (1 + ternary));
        free_neuron(&p);
    }
    spikes[rows * inputs - 1] = 0.5f;
    if (list_float_spikes(&lists, spikes, threads) != -1) fail("0.5 was taken for a spike", rows);
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

static void run_attention(int64_t tokens, int64_t head_size, int ternary, int masked, int threads) {
    const int64_t batch = 2, heads = 2, channels = heads * head_size, bytes = batch * tokens * channels / 8;
    struct neuron p = make_neuron(batch, tokens, heads, head_size, ternary, 1, masked, 0.9);
    float *gain = floats(channels, 0.5, 1.5), *offset = floats(channels, -0.5, 0.5);
    uint8_t *query = packed_spikes(bytes, ternary), *key = packed_spikes(bytes, ternary);
    uint8_t *value = packed_spikes(bytes, ternary);
    float *context = get(sizeof(float) * (size_t)(batch * tokens * channels));
    struct attention a = {head_size, query, key, value, gain, offset, 0.25f, context};
    if (event_attention(&a, &p, threads)) fail("no memory in the attention", tokens);
    for (int64_t k = 0; k < batch * tokens * channels; k++)
        if (!(fabs(context[k]) <= 1.0001)) fail("a context beyond the mean of its values", k);
    compare_floats("a context differs from the plain level", context, batch * tokens * channels, 1);
    same_spikes(p.packed, bytes * (1 + ternary));
    free(gain);
    free(offset);
    free(query);
    free(key);
    free(value);
    free(context);
    free_neuron(&p);
}

static void run_level(void) {
    for (int ternary = 0; ternary < 2; ternary++) {
        for (int64_t tokens = 1; tokens <= 70; tokens += tokens < 3 ? 1 : 33)
            for (int k = 0; k < 5; k++) {
                const int threads = 1 + k % 2;
                run_neurons(tokens, WIDTHS[k], ternary, k % 4, k % 2, 0.9, threads);
                run_attention(tokens, WIDTHS[k], ternary, k % 2, threads);
                for (int32_t type = FLOAT32; type <= INT8; type++)
                    run_products(tokens, 8 * (1 + 7 * k), 3, WIDTHS[k], type, ternary, threads);
            }
        /* Long enough, and soon enough forgotten, to go by windows. */
        for (int k = 0; k < 4; k++) run_neurons(1300, WIDTHS[k], ternary, k, k % 2, 0.3, 1 + k % 2);
        run_attention(3, 512, ternary, 1, 1);
        run_products(2, 1024, 2, 128, INT8, ternary, 2);
    }
}

static void run_tiles(void) {
    for (int ternary = 0; ternary < 2; ternary++)
        for (int64_t tokens = 1; tokens <= 49; tokens += 8)
            for (int k = 0; k < 5; k++)
                run_products(tokens, 8 * (1 + 7 * k), 3, WIDTHS[k], INT8_TILES, ternary, 1 + k % 2);
}

/* Where there are no tiles, or none are allowed, a product on them is refused and nothing is touched. */
static void refuse_tiles(void) {
    struct spike_lists lists = {.rows = 1, .inputs = 8};
    struct product q = {.outputs = 8, .weight_type = INT8_TILES};
    struct neuron p = {.batch = 1, .tokens = 1, .channels = 8, .groups = 1};
    if (event_linear(&lists, &q, 1) != NO_TILES || event_linear_bpsn(&lists, &q, &p, 1) != NO_TILES)
        fail("tiles were not refused", 0);
}

/* Prints the levels that ran, in order, and the number of spikes that were seen. */
int main(void) {
    static const char *const NAMES[] = {"plain", "avx2", "avx512", "amx"};
    if (kernels_version() != KERNELS_VERSION) fail("the library has another version", kernels_version());
    for (int32_t level = LEVEL_PLAIN; level <= LEVEL_AMX; level++) {
        cap_cpu_level(level);
        if (cpu_level() != level) continue;
        if (level < LEVEL_AMX) refuse_tiles();
        state = 88172645463325252u;
        recording = level == LEVEL_PLAIN;
        replayed = 0;
        if (level == LEVEL_AMX) run_tiles();
        else run_level();
        if (level < LEVEL_AMX && !recording && replayed != recorded_bytes) fail("results are missing", level);
        printf("%s ", NAMES[level]);
    }
    if (!spikes_seen) fail("no spike was ever seen", 0);
    if (differing_bits * 10000 > compared_bits) fail("spikes differ from the plain level", differing_bits);
    free(recorded);
    printf("%lld\n", (long long)spikes_seen);
    return 0;
}
