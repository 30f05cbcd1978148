/* The exported functions: each the best of its levels that this processor has and the caller allows. */
#include "event_driven.h"

#if HAVE_SPIKE_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* This file asks the processor what it can do, so nothing in it may be compiled for more than the plain one. Nothing
 * else may run before it has been asked: files of a higher level have no constructors. */
static int32_t level_cap = LEVEL_AMX;

#if HAVE_LEVELS
/* x86-64-v3 and x86-64-v4 by their parts: older compilers do not know the whole by its name. */
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
           __builtin_cpu_supports("movbe");
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

#if HAVE_SPIKE_TILES
/* Asks Linux for leave to use the tiles' registers, whose state makes a thread's context larger. */
static int may_use_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_TILE) || !(d & AMX_INT8)) return 0;
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
#endif

#define CHOOSE(call_v4, call_v3, call_plain)                                                                           \
    switch (at_most(vector_level())) {                                                                                 \
    case LEVEL_AVX512: return call_v4;                                                                                 \
    case LEVEL_AVX2: return call_v3;                                                                                   \
    default: return call_plain;                                                                                        \
    }
#else
#define CHOOSE(call_v4, call_v3, call_plain) return call_plain;
#endif

static int32_t at_most(int32_t level) {
    const int32_t cap = __atomic_load_n(&level_cap, __ATOMIC_RELAXED);
    return level < cap ? level : cap;
}

/* The highest level that processor and system have, below that of tiles. Threads that ask for the first time at once
 * all find the same. */
static int32_t vector_level(void) {
#if HAVE_LEVELS
    static int32_t found = -1;
    int32_t now = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (now < 0) {
        __builtin_cpu_init();
        now = !has_avx2() ? LEVEL_PLAIN : has_avx512() ? LEVEL_AVX512 : LEVEL_AVX2;
        __atomic_store_n(&found, now, __ATOMIC_RELAXED);
    }
    return now;
#else
    return LEVEL_PLAIN;
#endif
}

/* The system is asked for tiles by whoever is about to use them, and not when the library is loaded. */
static int tiles_usable(void) {
#if HAVE_SPIKE_TILES
    static int32_t found = -1;
    if (vector_level() < LEVEL_AVX512) return 0;
    int32_t now = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (now < 0) {
        now = may_use_tiles();
        __atomic_store_n(&found, now, __ATOMIC_RELAXED);
    }
    return now;
#else
    return 0;
#endif
}

EXPORT int32_t has_spike_tiles(void) { return at_most(LEVEL_AMX) == LEVEL_AMX && tiles_usable(); }

EXPORT int32_t highest_cpu_level(void) { return tiles_usable() ? LEVEL_AMX : vector_level(); }

EXPORT int32_t cpu_level(void) { return at_most(highest_cpu_level()); }

EXPORT void cap_cpu_level(int32_t cap) { __atomic_store_n(&level_cap, cap, __ATOMIC_RELAXED); }

/* A product that asks for tiles where there are none would end the process. */
static int lacks_tiles(const struct product *q) { return q->weight_type == INT8_TILES && !has_spike_tiles(); }

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
    if (lacks_tiles(q)) return NO_TILES;
    CHOOSE(event_linear_v4(p, q, threads), event_linear_v3(p, q, threads), event_linear_plain(p, q, threads))
}

EXPORT int event_linear_bpsn(const struct spike_lists *p, const struct product *q, const struct neuron *all,
                             int32_t threads) {
    if (lacks_tiles(q)) return NO_TILES;
    CHOOSE(event_linear_bpsn_v4(p, q, all, threads), event_linear_bpsn_v3(p, q, all, threads),
           event_linear_bpsn_plain(p, q, all, threads))
}

EXPORT int event_attention(const struct attention *a, const struct neuron *all, int32_t threads) {
    CHOOSE(event_attention_v4(a, all, threads), event_attention_v3(a, all, threads),
           event_attention_plain(a, all, threads))
}
