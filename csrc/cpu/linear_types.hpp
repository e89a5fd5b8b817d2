// What the kernels of a compressed projection exchange with csrc/core.
#pragma once

#include <cstdint>

#include "cospadi/dtype.hpp"

namespace cospadi::cpu {

/// A dictionary as a checkpoint stores it: row i holds what input i is worth to every atom. Nothing
/// at or above `end` is read.
struct StoredDictionary {
  DType dtype;
  int64_t d_in;
  int64_t n_atoms;
  const void* data;
  int64_t stride;  ///< elements
  const void* end;
};

struct LinearKernels {
  /// Up to this many rows of x `multiply_dictionary` is the faster way.
  int64_t max_rows;
  /// Atoms that one pass over the inputs takes together.
  int64_t block;
  /// out(r, j) = sum over the inputs i of x(r, i) dictionary(i, first + j), for r < rows <=
  /// max_rows and j < n_atoms <= block, in the order of i. `x_dtype`:
  /// the type whose values x holds, as floats. `out` has room for `block` columns.
  void (*multiply_dictionary)(const StoredDictionary& dictionary,
                              int64_t first,
                              int64_t n_atoms,
                              DType x_dtype,
                              const float* x,
                              int64_t x_stride,
                              int64_t rows,
                              float* out,
                              int64_t out_stride) noexcept;
};

}  // namespace cospadi::cpu
