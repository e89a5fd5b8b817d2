/* Which symbols a shared library shows. C99 and C++. */
#ifndef COSPADI_EXPORT_H
#define COSPADI_EXPORT_H

/* The library is compiled with hidden symbols; only what bears this mark is public. A static
 * library (COSPADI_STATIC, set by its CMake target) marks nothing, so that a program or library
 * around it does not pass the symbols on. */
#if defined(COSPADI_STATIC) || !defined(__GNUC__)
#define COSPADI_API
#define COSPADI_LOCAL
#else
#define COSPADI_API __attribute__((visibility("default")))
#define COSPADI_LOCAL __attribute__((visibility("hidden"))) /* inside of what is public */
#endif

#endif /* COSPADI_EXPORT_H */
