// Numbers of every storage type, and fields of a few bits, on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/operands.hpp"

namespace cospadi::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- one number ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

/// An integer of at most 22 bits to float without the conversion unit, which takes four times as
/// long as an addition: the integer is added to the lowest bits of 1.5 * 2^23.
__device__ __forceinline__ float small_int_to_float(int q) {
  return __int_as_float(0x4b400000 + q) - 12582912.0F;
}
__device__ __forceinline__ float to_float(int8_t x) { return small_int_to_float(x); }

__device__ __forceinline__ void from_float(float x, float& out) { out = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void from_float(float x, __half& out) { out = __float2half_rn(x); }

__device__ __forceinline__ float load_element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::kFloat16:
      return to_float(static_cast<const __half*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

__device__ __forceinline__ void store_element(float x, void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      from_float(x, static_cast<__nv_bfloat16*>(data)[i]);
      return;
    case DType::kFloat16:
      from_float(x, static_cast<__half*>(data)[i]);
      return;
    default:
      static_cast<float*>(data)[i] = x;
  }
}

/// z(row, atom) of the two matrices side by side.
__device__ __forceinline__ float load_row_element(const RowsOperand& z, int64_t row, int atom) {
  if (atom < z.n_first) return load_element(z.first, z.dtype, row * z.first_stride + atom);
  return load_element(z.second, z.dtype, row * z.second_stride + (atom - z.n_first));
}

// ---- mask words and fields ----

/// The lowest `n` bits set; n from 0 to 32.
__device__ __forceinline__ uint32_t low_bits(int n) {
  return n >= 32 ? 0xffffffffU : (1U << n) - 1;
}

/// 32 bits from byte `offset` of aligned words on; reads the words that hold bytes offset ..
/// offset + 4.
__device__ __forceinline__ uint32_t word_at_byte(const uint32_t* words, int offset) {
  const int i = offset / 4;
  return __funnelshift_r(words[i], words[i + 1], 8 * (offset % 4));
}

/// The field of at most 16 bits that begins at bit `start` of aligned words, on top of the result;
/// below it are bits of its neighbours. Reads the words that hold bits start .. start + 32.
__device__ __forceinline__ uint32_t field_on_top(const uint32_t* words, int64_t start, int bits) {
  const int64_t i = start / 32;
  const uint32_t window =
      __funnelshift_r(words[i], words[i + 1], static_cast<unsigned>(start % 32));
  return window << (32 - bits);
}

/// What a field stands for, without its scale: exact in bfloat16.
__device__ __forceinline__ float field_value(uint32_t on_top, int bits, bool is_integer) {
  if (is_integer) return small_int_to_float(static_cast<int>(on_top) >> (32 - bits));
  return __uint_as_float(on_top & ~low_bits(32 - bits));
}

/// The field that begins at bit `start` of bytes in global memory; no byte beyond it is read.
__device__ __forceinline__ uint32_t field_in_bytes(const uint8_t* bytes, int64_t start, int bits) {
  const int64_t first = start / 8;
  const int64_t last = (start + bits - 1) / 8;
  uint32_t window = 0;
  for (int64_t i = first; i <= last; ++i) {
    window |= static_cast<uint32_t>(bytes[i]) << (8 * static_cast<int>(i - first));
  }
  return window >> static_cast<int>(start % 8) << (32 - bits);
}

/// Scale of coefficient t of an output; 1 where there are none.
__device__ __forceinline__ float scale_of(const CodeOperand& s, int64_t output, int t) {
  if (s.scale == nullptr) return 1.0F;
  return load_element(
      s.scale, s.scale_dtype, output * s.scale_stride + (s.group == 0 ? 0 : t / s.group));
}

/// Coefficient t of an output straight from global memory, scale included.
__device__ __forceinline__ float load_value(const CodeOperand& s, int64_t output, int t) {
  const uint8_t* row = s.values + output * s.value_stride;
  switch (s.type) {
    case ValueType::kFloat32:
      return reinterpret_cast<const float*>(row)[t];
    case ValueType::kBFloat16:
      return to_float(reinterpret_cast<const __nv_bfloat16*>(row)[t]);
    case ValueType::kFloat16:
      return to_float(reinterpret_cast<const __half*>(row)[t]);
    default: {
      const bool is_integer = s.type == ValueType::kIntegerField;
      const uint32_t field = field_in_bytes(row, static_cast<int64_t>(t) * s.bits, s.bits);
      return field_value(field, s.bits, is_integer) * scale_of(s, output, t);
    }
  }
}

/// Mask word `word` of an output straight from global memory: positions at and above n_atoms are 0.
__device__ __forceinline__ uint32_t load_mask_word(const CodeOperand& s, int64_t output, int word) {
  const int left = s.n_atoms - kWarpSize * word;
  if (left <= 0) return 0;
  if (s.mask == nullptr) return low_bits(left);
  const uint8_t* bytes = s.mask + output * s.mask_stride + 4 * static_cast<int64_t>(word);
  const int n_bytes = left >= 25 ? 4 : (left + 7) / 8;
  uint32_t bits = 0;
  for (int i = 0; i < n_bytes; ++i) bits |= static_cast<uint32_t>(bytes[i]) << (8 * i);
  return bits & low_bits(left);
}

// ---- warps ----

/// Sum over the lanes below this one.
__device__ __forceinline__ int sum_of_lower_lanes(int value, int lane) {
  int sum = value;
#pragma unroll
  for (int by = 1; by < kWarpSize; by *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, by);
    if (lane >= by) sum += other;
  }
  return sum - value;
}

/// Sum over all lanes, in every lane, in a fixed order.
__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

}  // namespace cospadi::cuda
