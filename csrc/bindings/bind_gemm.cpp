#include "bindings/bindings.hpp"
#include "core/gemm.hpp"

namespace cospadi::bindings {
namespace {

template <class T>
void bound_gemm(T alpha,
                uintptr_t a,
                int64_t m,
                int64_t k,
                int64_t a_row_stride,
                int64_t a_col_stride,
                uintptr_t b,
                int64_t n,
                int64_t b_row_stride,
                int64_t b_col_stride,
                T beta,
                uintptr_t c,
                int64_t c_stride,
                int n_threads) {
  const py::gil_scoped_release released;
  detail::gemm<T>(alpha,
                  {address<const T>(a), m, k, a_row_stride, a_col_stride},
                  {address<const T>(b), k, n, b_row_stride, b_col_stride},
                  beta,
                  MatrixView<T>(address<T>(c), m, n, c_stride),
                  n_threads);
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("gemm_f32", &bound_gemm<float>);
  m.def("gemm_f64", &bound_gemm<double>);
}

}  // namespace cospadi::bindings
