#include "bindings/bindings.hpp"
#include "cospadi/omp.hpp"

namespace cospadi::bindings {
namespace {

template <class T>
py::tuple omp_encode(uintptr_t gram,
                     int64_t gram_stride,
                     uintptr_t correlations,
                     int64_t correlations_stride,
                     uintptr_t signal_energies,
                     int64_t n_signals,
                     int64_t n_atoms,
                     int64_t sparsity,
                     bool is_ormp,
                     int num_threads,
                     int block_size,
                     uintptr_t indices,
                     uintptr_t coeffs,
                     uintptr_t residual_energies) {
  OmpOptions options;
  options.sparsity = sparsity;
  options.selection = is_ormp ? Selection::kOrmp : Selection::kOmp;
  options.num_threads = num_threads;
  options.block_size = block_size;
  OmpStats stats;
  {
    const py::gil_scoped_release release;
    stats = cospadi::omp_encode<T>(
        {address<const T>(gram), n_atoms, n_atoms, gram_stride},
        {address<const T>(correlations), n_signals, n_atoms, correlations_stride},
        address<const T>(signal_energies),
        options,
        {address<int32_t>(indices), n_signals, sparsity},
        {address<T>(coeffs), n_signals, sparsity},
        address<T>(residual_energies));
  }
  return py::make_tuple(stats.n_padded, stats.workspace_bytes, stats.n_passes, stats.n_rows);
}

}  // namespace

void bind_omp(py::module_& m) {
  m.def("omp_encode_f32", &omp_encode<float>);
  m.def("omp_encode_f64", &omp_encode<double>);
}

}  // namespace cospadi::bindings
