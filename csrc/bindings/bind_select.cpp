#include "bindings/bindings.hpp"
#include "cospadi/select.hpp"

namespace cospadi::bindings {
namespace {

template <class T>
void bound_select_largest(uintptr_t scores,
                          int64_t rows,
                          int64_t n_scores,
                          int64_t scores_stride,
                          int64_t count,
                          uintptr_t indices,
                          int num_threads) {
  const py::gil_scoped_release released;
  select_largest<T>({address<const T>(scores), rows, n_scores, scores_stride},
                    count,
                    num_threads,
                    {address<int32_t>(indices), rows, count});
}

}  // namespace

void bind_select(py::module_& m) {
  m.def("select_largest_f32", &bound_select_largest<float>);
  m.def("select_largest_f64", &bound_select_largest<double>);
}

}  // namespace cospadi::bindings
