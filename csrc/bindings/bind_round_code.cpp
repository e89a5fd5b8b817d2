#include "bindings/bindings.hpp"
#include "cospadi/round_code.hpp"

namespace cospadi::bindings {
namespace {

/// `indices` and `errors` may be 0.
py::tuple bound_round_code(uintptr_t gram,
                           int64_t n_atoms,
                           int64_t gram_stride,
                           uintptr_t indices,
                           int64_t indices_stride,
                           uintptr_t coeffs,
                           int64_t n_rows,
                           int64_t sparsity,
                           int64_t coeffs_stride,
                           uintptr_t steps,
                           int64_t n_steps,
                           int64_t steps_stride,
                           int32_t limit,
                           int64_t group,
                           bool by_energy,
                           float damping,
                           int sweeps,
                           uintptr_t fields,
                           uintptr_t errors,
                           int num_threads) {
  RoundCodeOptions options;
  options.limit = limit;
  options.group = group;
  options.order = by_energy ? RoundOrder::kEnergy : RoundOrder::kIndex;
  options.damping = damping;
  options.sweeps = sweeps;
  options.num_threads = num_threads;
  RoundCodeStats stats;
  {
    const py::gil_scoped_release released;
    stats = round_code({address<const float>(gram), n_atoms, n_atoms, gram_stride},
                       {address<const int32_t>(indices), n_rows, sparsity, indices_stride},
                       {address<const float>(coeffs), n_rows, sparsity, coeffs_stride},
                       {address<const float>(steps), n_rows, n_steps, steps_stride},
                       options,
                       {address<int32_t>(fields), n_rows, sparsity},
                       address<float>(errors));
  }
  return py::make_tuple(stats.n_raised, stats.n_plain, stats.n_moves, stats.workspace_bytes);
}

}  // namespace

void bind_round_code(py::module_& m) { m.def("round_code", &bound_round_code); }

}  // namespace cospadi::bindings
