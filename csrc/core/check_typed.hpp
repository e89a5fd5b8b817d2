// Checks and addresses of matrices whose storage type is known at run time only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/check.hpp"
#include "cospadi/dtype.hpp"

namespace cospadi::detail {

/// As require_shape, and that the matrix' size in bytes fits in 64 bits.
template <class Void>
void require_typed(const BasicTypedMatrix<Void>& m, int64_t rows, int64_t cols, const char* name) {
  require_shape(MatrixView<const char>(static_cast<const char*>(m.data), m.rows, m.cols, m.stride),
                rows,
                cols,
                name);
  checked_product(
      checked_product(std::max<int64_t>(m.rows, 1), m.stride, name), dtype_bytes(m.dtype), name);
}

inline const void* element(const ConstTypedMatrix& m, int64_t row, int64_t col) {
  return static_cast<const char*>(m.data) + (row * m.stride + col) * dtype_bytes(m.dtype);
}

inline void* element(const TypedMatrix& m, int64_t row, int64_t col) {
  return static_cast<char*>(m.data) + (row * m.stride + col) * dtype_bytes(m.dtype);
}

}  // namespace cospadi::detail
