// Stand-in for CUDA's binary16.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};
struct __half {
  unsigned short bits;
  __half() = default;
  __half(const __half_raw& raw) : bits(raw.x) {}
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const unsigned sign = static_cast<unsigned>(h.bits & 0x8000U) << 16;
  const unsigned magnitude = h.bits & 0x7fffU;
  if (magnitude >= 0x7c00U) return __uint_as_float(sign | 0x7f800000U | (magnitude & 0x3ffU) << 13);
  if (magnitude >= 0x400U) return __uint_as_float(sign | ((magnitude << 13) + (112U << 23)));
  const float value = static_cast<float>(magnitude) * 0x1p-24F;
  return sign ? -value : value;
}
/// Rounds to nearest, ties to even; every NaN to 0x7fff, as devices do.
inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  const unsigned sign = bits >> 16 & 0x8000U;
  const float magnitude = std::fabs(x);
  if (x != x) return __half_raw{0x7fff};
  if (magnitude >= 65520.0F) return __half_raw{static_cast<unsigned short>(sign | 0x7c00U)};
  if (magnitude < 0x1p-14F) {
    const auto steps = static_cast<unsigned>(std::nearbyint(magnitude * 0x1p24F));
    return __half_raw{static_cast<unsigned short>(sign | steps)};
  }
  unsigned rest = (bits & 0x7fffffffU) - (112U << 23);
  rest += 0xfff + (rest >> 13 & 1);
  return __half_raw{static_cast<unsigned short>(sign | rest >> 13)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }
