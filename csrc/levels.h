/* The levels of the instruction set that kernels are compiled for. */
#ifndef SNN_BERT_LEVELS_H
#define SNN_BERT_LEVELS_H

/* Whether the compiler can raise the level for a part of a file. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define HAVE_LEVELS 1
#else
#define HAVE_LEVELS 0
#endif

/* Also in modeling_snn_bert/cpu_kernels.py, in this order. */
enum cpu_level { LEVEL_PLAIN, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AMX };

#endif
