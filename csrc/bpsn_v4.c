/* bpsn.c for processors with AVX-512. */
#include "level_v4.h"
#if HAVE_LEVELS
#include "bpsn.c"
#endif
