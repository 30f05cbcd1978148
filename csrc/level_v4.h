/* Sets the compiler to x86-64-v4 for the rest of the file, where it can be. */
#include "levels.h"

#if HAVE_LEVELS
#define LEVEL(name) name##_v4
#pragma GCC target("arch=x86-64-v4")
#endif
