/* The exported functions: each the best of its levels that this processor has. */
#include "event_driven.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
static int level(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
        return 4;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") ? 3 : 1;
}
#define CHOOSE(call_v4, call_v3, call_plain)                                                                           \
    switch (level()) {                                                                                                 \
    case 4: return call_v4;                                                                                            \
    case 3: return call_v3;                                                                                            \
    default: return call_plain;                                                                                        \
    }
#else
#define CHOOSE(call_v4, call_v3, call_plain) return call_plain;
#endif

EXPORT int32_t kernels_version(void) { return KERNELS_VERSION; }

EXPORT int bpsn_forward(const struct neuron *p, int32_t threads) {
    CHOOSE(bpsn_forward_v4(p, threads), bpsn_forward_v3(p, threads), bpsn_forward_plain(p, threads))
}

EXPORT int bpsn_backward(const struct neuron *p, int32_t threads) {
    CHOOSE(bpsn_backward_v4(p, threads), bpsn_backward_v3(p, threads), bpsn_backward_plain(p, threads))
}

EXPORT int64_t list_float_spikes(const struct spike_lists *p, const float *spikes, int32_t threads) {
    CHOOSE(list_float_spikes_v4(p, spikes, threads), list_float_spikes_v3(p, spikes, threads),
           list_float_spikes_plain(p, spikes, threads))
}

EXPORT int64_t list_packed_spikes(const struct spike_lists *p, const uint8_t *packed, int32_t threads) {
    CHOOSE(list_packed_spikes_v4(p, packed, threads), list_packed_spikes_v3(p, packed, threads),
           list_packed_spikes_plain(p, packed, threads))
}

EXPORT int64_t count_packed_spikes(const uint8_t *packed, int64_t bytes, int32_t threads) {
    CHOOSE(count_packed_spikes_v4(packed, bytes, threads), count_packed_spikes_v3(packed, bytes, threads),
           count_packed_spikes_plain(packed, bytes, threads))
}

EXPORT int64_t list_packed_columns(const struct spike_lists *p, const uint8_t *packed, int32_t threads) {
    CHOOSE(list_packed_columns_v4(p, packed, threads), list_packed_columns_v3(p, packed, threads),
           list_packed_columns_plain(p, packed, threads))
}

EXPORT int event_linear(const struct spike_lists *p, const struct product *q, int32_t threads) {
    CHOOSE(event_linear_v4(p, q, threads), event_linear_v3(p, q, threads), event_linear_plain(p, q, threads))
}

EXPORT int event_linear_bpsn(const struct spike_lists *p, const struct product *q, const struct neuron *all,
                             int32_t threads) {
    CHOOSE(event_linear_bpsn_v4(p, q, all, threads), event_linear_bpsn_v3(p, q, all, threads),
           event_linear_bpsn_plain(p, q, all, threads))
}

EXPORT int event_attention(const struct attention *a, const struct neuron *all, int32_t threads) {
    CHOOSE(event_attention_v4(a, all, threads), event_attention_v3(a, all, threads),
           event_attention_plain(a, all, threads))
}
