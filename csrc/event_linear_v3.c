/* event_linear.c for processors with AVX2. */
#include "level_v3.h"
#if HAVE_LEVELS
#include "event_linear.c"
#endif
