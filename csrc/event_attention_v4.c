/* event_attention.c for processors with AVX-512. */
#include "level_v4.h"
#if HAVE_LEVELS
#include "event_attention.c"
#endif
