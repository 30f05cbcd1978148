/* event_linear.c for processors with AVX-512. */
#include "level_v4.h"
#if HAVE_LEVELS
#include "event_linear.c"
#endif
