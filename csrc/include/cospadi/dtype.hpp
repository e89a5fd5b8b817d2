/// Storage types of floating-point operands; all arithmetic on them is done in float.
#pragma once

#include <cstdint>

namespace cospadi {

/// Bits of a bfloat16 (the upper half of a float).
struct BFloat16 {
  uint16_t bits;
};

/// Bits of an IEEE 754 binary16.
struct Float16 {
  uint16_t bits;
};

enum class DType : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
};

constexpr int64_t dtype_bytes(DType dtype) noexcept { return dtype == DType::kFloat32 ? 4 : 2; }

/// Row-major matrix [rows x cols] of `dtype`; strides count elements, `stride >= cols`. Borrowed.
///
/// `Void` is `void` for an output and `const void` for an input.
template <class Void>
struct BasicTypedMatrix {
  Void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
};

using TypedMatrix = BasicTypedMatrix<void>;
using ConstTypedMatrix = BasicTypedMatrix<const void>;

/// `size` elements side by side; `data` may be null for an operand that is left out. Borrowed.
struct ConstTypedVector {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t size = 0;
};

}  // namespace cospadi
