/* event_attention.c for processors with AVX2. */
#include "level_v3.h"
#if HAVE_LEVELS
#include "event_attention.c"
#endif
