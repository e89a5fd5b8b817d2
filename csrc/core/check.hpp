// Argument checks. Each message names the argument, what was expected and what came.
#pragma once

#include <cstdint>
#include <string>

#include "cospadi/matrix.hpp"
#include "cospadi/status.hpp"

namespace cospadi::detail {

inline void require(bool ok, const std::string& message) {
  if (!ok) throw Error(ErrorCode::kInvalidArgument, message);
}

inline std::string shape_text(int64_t rows, int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

/// Checks pointer, sizes and stride of one matrix argument against its expected shape.
template <class T>
void require_shape(const MatrixView<T>& m, int64_t rows, int64_t cols, const char* name) {
  require(m.rows == rows && m.cols == cols,
          std::string(name) + ": expected shape " + shape_text(rows, cols) + ", got " +
              shape_text(m.rows, m.cols));
  require(m.stride >= m.cols,
          std::string(name) + ": row stride " + std::to_string(m.stride) +
              " is smaller than the row length " + std::to_string(m.cols));
  require(m.data != nullptr || rows == 0 || cols == 0, std::string(name) + ": null pointer");
}

/// a * b, or an error naming `what` when the product does not fit in int64.
inline int64_t checked_product(int64_t a, int64_t b, const char* what) {
  int64_t result = 0;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result)) {
    throw Error(ErrorCode::kInvalidArgument,
                std::string(what) + ": the size " + std::to_string(a) + " x " + std::to_string(b) +
                    " does not fit in 64 bits");
  }
  return result;
}

}  // namespace cospadi::detail
