/* Sets the compiler to x86-64-v3 for the rest of the file, where it can be. */
#include "levels.h"

#if HAVE_LEVELS
#define LEVEL(name) name##_v3
#pragma GCC target("arch=x86-64-v3")
#endif
