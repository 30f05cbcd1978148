/* bpsn.c for processors with AVX2 and FMA. */
#include "level_v3.h"
#if HAVE_LEVELS
#include "bpsn.c"
#endif
