#include "bindings/bindings.hpp"
#include "cospadi/dictionary.hpp"

namespace cospadi::bindings {
namespace {

template <class T>
py::tuple update_atoms(uintptr_t atoms,
                       int64_t atoms_stride,
                       uintptr_t signals,
                       int64_t signals_stride,
                       uintptr_t indices,
                       int64_t indices_stride,
                       uintptr_t coeffs,
                       int64_t coeffs_stride,
                       int64_t n_atoms,
                       int64_t dim,
                       int64_t n_signals,
                       int64_t sparsity,
                       int power_iterations,
                       int64_t block_size,
                       int sweeps,
                       bool is_reseeding,
                       int num_threads) {
  AtomUpdateOptions options;
  options.power_iterations = power_iterations;
  options.block_size = block_size;
  options.sweeps = sweeps;
  options.unused = is_reseeding ? UnusedAtoms::kReseed : UnusedAtoms::kSkip;
  options.num_threads = num_threads;
  AtomUpdateStats stats;
  {
    const py::gil_scoped_release release;
    stats = cospadi::update_atoms<T>(
        {address<const T>(signals), n_signals, dim, signals_stride},
        {address<const int32_t>(indices), n_signals, sparsity, indices_stride},
        options,
        {address<T>(atoms), n_atoms, dim, atoms_stride},
        {address<T>(coeffs), n_signals, sparsity, coeffs_stride});
  }
  return py::make_tuple(stats.objective_before,
                        stats.objective_after,
                        stats.n_unused,
                        stats.n_reseeded,
                        stats.n_halved,
                        stats.workspace_bytes);
}

}  // namespace

void bind_dictionary(py::module_& m) {
  m.def("update_atoms_f32", &update_atoms<float>);
  m.def("update_atoms_f64", &update_atoms<double>);
}

}  // namespace cospadi::bindings
