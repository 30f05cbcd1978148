/* Sets the compiler to x86-64-v4 for the rest of the file, where it can be. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define HAVE_LEVEL 1
#define LEVEL(name) name##_v4
#pragma GCC target("arch=x86-64-v4")
#else
#define HAVE_LEVEL 0
#endif
