#include "bindings/bindings.hpp"
#include "core/cuda_fit.hpp"

namespace cospadi::bindings {
namespace {

using detail::require_launched;

void* stream_of(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

template <class T>
void bound_select_largest(uintptr_t scores,
                          int64_t n_rows,
                          int64_t n_scores,
                          int64_t count,
                          uintptr_t indices,
                          uintptr_t stream) {
  require_launched(cuda::select_largest(address<const T>(scores),
                                        n_rows,
                                        n_scores,
                                        count,
                                        address<int32_t>(indices),
                                        stream_of(stream)),
                   "select_largest");
}

void bound_project_rows(uintptr_t solution,
                        uintptr_t sparse,
                        uintptr_t dual,
                        uintptr_t last,
                        int64_t n_rows,
                        int64_t n_columns,
                        int64_t count,
                        float a,
                        float b,
                        uintptr_t indices,
                        uintptr_t moved,
                        uintptr_t stream) {
  require_launched(cuda::project_rows(address<const float>(solution),
                                      address<float>(sparse),
                                      address<float>(dual),
                                      address<const int32_t>(last),
                                      n_rows,
                                      n_columns,
                                      count,
                                      a,
                                      b,
                                      address<int32_t>(indices),
                                      address<int32_t>(moved),
                                      stream_of(stream)),
                   "project_rows");
}

void bound_gradient_step(uintptr_t product,
                         uintptr_t mask,
                         uintptr_t inverse_diagonal,
                         uintptr_t enough,
                         uintptr_t x,
                         uintptr_t residual,
                         uintptr_t direction,
                         uintptr_t energy,
                         int64_t n_rows,
                         int64_t n_columns,
                         uintptr_t stream) {
  require_launched(cuda::gradient_step(address<const float>(product),
                                       address<const float>(mask),
                                       address<const float>(inverse_diagonal),
                                       address<const float>(enough),
                                       address<float>(x),
                                       address<float>(residual),
                                       address<float>(direction),
                                       address<float>(energy),
                                       n_rows,
                                       n_columns,
                                       stream_of(stream)),
                   "gradient_step");
}

template <class T>
void bound_omp_encode(uintptr_t gram,
                      uintptr_t scales,
                      uintptr_t correlations,
                      int64_t n_signals,
                      int64_t n_atoms,
                      int64_t sparsity,
                      bool is_ormp,
                      uintptr_t workspace,
                      int64_t workspace_bytes,
                      uintptr_t indices,
                      uintptr_t coeffs,
                      uintptr_t n_padded,
                      uintptr_t stream) {
  require_launched(cuda::omp_encode(address<const T>(gram),
                                    address<const T>(scales),
                                    address<const T>(correlations),
                                    n_signals,
                                    n_atoms,
                                    sparsity,
                                    is_ormp,
                                    address<void>(workspace),
                                    workspace_bytes,
                                    address<int32_t>(indices),
                                    address<T>(coeffs),
                                    address<unsigned long long>(n_padded),
                                    stream_of(stream)),
                   "omp_encode");
}

}  // namespace

void bind_cuda_fit(py::module_& m) {
  m.def("cuda_select_largest_f32", &bound_select_largest<float>);
  m.def("cuda_select_largest_f64", &bound_select_largest<double>);
  m.def("cuda_project_rows", &bound_project_rows);
  m.def("cuda_gradient_step", &bound_gradient_step);
  m.def("cuda_omp_signal_bytes", &cuda::omp_signal_bytes);
  m.def("cuda_omp_encode_f32", &bound_omp_encode<float>);
  m.def("cuda_omp_encode_f64", &bound_omp_encode<double>);
}

}  // namespace cospadi::bindings
