/// Views over memory that the caller owns. Nothing here allocates or frees.
#pragma once

#include <cstdint>

namespace cospadi {

/// Row-major matrix [rows x cols]; element (i, j) is `data[i * stride + j]`, `stride >= cols`.
///
/// The memory is borrowed for the call. A const matrix is `MatrixView<const T>`.
template <class T>
struct MatrixView {
  T* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  MatrixView() = default;
  MatrixView(T* data_, int64_t rows_, int64_t cols_) : MatrixView(data_, rows_, cols_, cols_) {}
  MatrixView(T* data_, int64_t rows_, int64_t cols_, int64_t stride_)
      : data(data_), rows(rows_), cols(cols_), stride(stride_) {}
  /// A mutable view converts to a const one.
  template <class U>
    requires(!__is_same(U, T) && __is_same(const U, T))
  MatrixView(const MatrixView<U>& other)
      : MatrixView(other.data, other.rows, other.cols, other.stride) {}

  T* row(int64_t i) const { return data + i * stride; }
  T& operator()(int64_t i, int64_t j) const { return data[i * stride + j]; }
};

}  // namespace cospadi
