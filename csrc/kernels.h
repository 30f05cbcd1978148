/* What the CPU kernels share. Plain C with GNU vectors (gcc, clang), so that the library needs neither the headers of
 * Python nor those of torch, and one build serves every version of both. */
#ifndef SNN_BERT_KERNELS_H
#define SNN_BERT_KERNELS_H

#include "levels.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

/* A file of kernels is compiled for the plain processor as it is, and again by its `_v3` and `_v4` neighbours, which set
 * the compiler to AVX2 or AVX-512 and the name of the level. dispatch.c chooses at each call. */
#ifndef LEVEL
#define LEVEL(name) name##_plain
#endif

/* Also in modeling_snn_bert/cpu_kernels.py, which refuses a library of another version. */
enum { KERNELS_VERSION = 5 };

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

/* A decay that meets silence soon makes denormal numbers, on which arithmetic is many times slower: they count as 0. */
INLINE unsigned flush_denormals(void) {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040u);
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1u << 24) : "memory");
    return (unsigned)before;
#else
    return 0;
#endif
}

INLINE void restore_denormals(unsigned before) {
#if defined(__x86_64__)
    _mm_setcsr(before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)before) : "memory");
#else
    (void)before;
#endif
}

struct neuron {
    int64_t batch, tokens, channels, groups;
    const float *current;
    const uint8_t *mask; /* [batch, tokens] or NULL */
    const float *v_threshold; /* [channels] */
    const float *decay_forward, *decay_backward, *reset; /* [groups] */
    int32_t normalize, reset_iterations, ternary, surrogate;
    float alpha;
    /* Forward: either may be NULL. Of the packed spikes bit k of byte i is channel 8 i + k; ternary neurons have a
     * second array of that size behind the first for the spikes of -1. */
    float *spikes;
    uint8_t *packed;
    /* Backward: gradients in and out; those of parameters are one sum per row of the batch. */
    const float *grad_spikes;
    float *grad_current; /* [batch, tokens, channels] */
    float *grad_v_threshold; /* [batch, channels] */
    float *grad_decay_forward, *grad_decay_backward, *grad_reset; /* [batch, groups] */
};

/* What a kernel returns in place of 0: NO_MEMORY if there is none for its scratch space, NO_TILES if it was asked for the
 * tiles of a processor that lacks them, or that the caller does not allow. */
enum { NO_MEMORY = 1, NO_TILES = 2 };

/* The highest level that processor, system and compiler have; the one in use; and the highest that may be used. */
EXPORT int32_t highest_cpu_level(void);
EXPORT int32_t cpu_level(void);
EXPORT void cap_cpu_level(int32_t cap);
EXPORT int32_t kernels_version(void);

/* Each kernel has a name at each of its levels, and its own name where it is exported. */
#define AT_PLAIN(name) name##_plain
#define AT_V3(name) name##_v3
#define AT_V4(name) name##_v4
#define EXPORTED(name) EXPORT name

#define DECLARE_BPSN(at)                                                                                               \
    int at(bpsn_forward)(const struct neuron *p, int32_t threads);                                                     \
    int at(bpsn_backward)(const struct neuron *p, int32_t threads);
DECLARE_BPSN(AT_PLAIN)
DECLARE_BPSN(AT_V3)
DECLARE_BPSN(AT_V4)
DECLARE_BPSN(EXPORTED)

#endif
