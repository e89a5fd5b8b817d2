// Dense matrix product for the library's own use: no BLAS is linked.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cospadi/matrix.hpp"

namespace cospadi::detail {

/// Matrix [rows x cols] with any strides; element (i, j) is `data[i * row_stride + j *
/// col_stride]`. Borrowed memory. A transpose is a view with swapped strides; a row-major view
/// converts to one.
template <class T>
struct StridedView {
  T* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 0;

  StridedView() = default;
  StridedView(T* data_, int64_t rows_, int64_t cols_, int64_t row_stride_, int64_t col_stride_)
      : data(data_), rows(rows_), cols(cols_), row_stride(row_stride_), col_stride(col_stride_) {}
  StridedView(MatrixView<T> m) : StridedView(m.data, m.rows, m.cols, m.stride, 1) {}
  StridedView(MatrixView<std::remove_const_t<T>> m)
    requires(std::is_const_v<T>)
      : StridedView(m.data, m.rows, m.cols, m.stride, 1) {}

  StridedView transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

/// c = alpha a b + beta c.
///
/// a [m x k] and b [k x n] with any strides, c [m x n] row-major. c must not overlap a or b. With
/// beta = 0 c is not read; with alpha = 0 or k = 0 neither a nor b is read. T is float or double.
///
/// Each element is summed in an order that depends on k alone, so the result is the same bits for
/// any thread count and for any position of the row or column in its matrix. Workspace: at most
/// about 8 MiB (16 MiB for double), allocated and freed inside. `n_threads` = 0 means OpenMP's
/// default. May be called from inside a parallel region with `n_threads` = 1.
///
/// Throws Error for sizes that do not match, null data and failed allocation, before c is written.
///
/// a and b take part in no deduction, so row-major views can be passed as they are.
template <class T>
void gemm(T alpha,
          std::type_identity_t<StridedView<const T>> a,
          std::type_identity_t<StridedView<const T>> b,
          T beta,
          MatrixView<T> c,
          int n_threads);

extern template void gemm<float>(
    float, StridedView<const float>, StridedView<const float>, float, MatrixView<float>, int);
extern template void gemm<double>(
    double, StridedView<const double>, StridedView<const double>, double, MatrixView<double>, int);

}  // namespace cospadi::detail
