#include "cospadi/omp.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/buffer.hpp"
#include "core/check.hpp"
#include "core/finite.hpp"
#include "core/parallel.hpp"
#include "cpu/kernel_table.hpp"

namespace cospadi {
namespace {

using detail::AlignedBuffer;
using detail::checked_product;
using detail::require;
using detail::require_finite;
using detail::require_shape;

constexpr int64_t kMaxAtoms = std::numeric_limits<int32_t>::max() / 2;
constexpr int kMaxBlockSize = 256;

template <class T>
const cpu::OmpEntry<T>& entry() {
  if constexpr (sizeof(T) == 4) {
    return cpu::kernels().omp_f32;
  } else {
    return cpu::kernels().omp_f64;
  }
}

/// Sizes of one call, all of them checked.
struct Plan {
  int n_threads;
  int64_t block_size;
  int64_t gram_stride;
  int64_t gram_bytes;
  int64_t arena_bytes;
  int64_t total_bytes;
};

template <class T>
Plan make_plan(int64_t n_atoms, int64_t n_signals, const OmpOptions& options) {
  require(n_atoms >= 1 && n_atoms <= kMaxAtoms,
          "gram: expected 1 to " + std::to_string(kMaxAtoms) + " atoms, got " +
              std::to_string(n_atoms));
  require(options.sparsity >= 1 && options.sparsity <= n_atoms,
          "sparsity: expected 1 to n_atoms = " + std::to_string(n_atoms) + ", got " +
              std::to_string(options.sparsity));
  require(options.block_size >= 0 && options.block_size <= kMaxBlockSize,
          "block_size: expected 0 (automatic) to " + std::to_string(kMaxBlockSize) + ", got " +
              std::to_string(options.block_size));
  const cpu::OmpEntry<T>& kernel = entry<T>();
  Plan plan{};
  plan.n_threads = detail::resolve_threads(options.num_threads, n_signals);
  plan.block_size = options.block_size > 0 ? options.block_size : kernel.default_block_size;
  plan.gram_stride = kernel.gram_stride(n_atoms);
  plan.gram_bytes = checked_product(checked_product(n_atoms, plan.gram_stride, "gram copy"),
                                    static_cast<int64_t>(sizeof(T)),
                                    "gram copy");
  // The history and the factor take less than 32 bytes per pair of atom and step.
  checked_product(checked_product(n_atoms, options.sparsity, "history"), 32, "history");
  plan.arena_bytes = kernel.arena_bytes(n_atoms, options.sparsity, plan.block_size);
  plan.total_bytes = checked_product(plan.arena_bytes, plan.n_threads, "workspace");
  require(!__builtin_add_overflow(plan.total_bytes, plan.gram_bytes, &plan.total_bytes),
          "workspace: the size does not fit in 64 bits");
  return plan;
}

/// Copies the Gram with atoms scaled to unit norm, so that scores and the dependence test need no
/// division and do not depend on the atoms' lengths.
template <class T>
void scale_gram(MatrixView<const T> gram, int64_t stride, int n_threads, T* scales, T* scaled) {
  const int64_t k = gram.rows;
  for (int64_t j = 0; j < k; ++j) {
    const T energy = gram(j, j);
    scales[j] = energy >= std::numeric_limits<T>::min() ? T(1) / std::sqrt(energy) : T(0);
  }
  detail::parallel_for(k, n_threads, [&](int64_t i, int) {
    const T* source = gram.row(i);
    T* target = scaled + i * stride;
    for (int64_t j = 0; j < k; ++j) target[j] = source[j] * scales[i] * scales[j];
    std::fill(target + k, target + stride, T(0));
  });
}

template <class T>
void check_arguments(MatrixView<const T> gram,
                     MatrixView<const T> correlations,
                     const T* signal_energies,
                     const OmpOptions& options,
                     MatrixView<int32_t> indices,
                     MatrixView<T> coeffs,
                     const T* residual_energies) {
  const int64_t n = correlations.rows;
  const int64_t k = gram.rows;
  require_shape(gram, k, k, "gram");
  require_shape(correlations, n, k, "correlations");
  require_shape(indices, n, options.sparsity, "indices");
  require_shape(coeffs, n, options.sparsity, "coeffs");
  require(residual_energies == nullptr || signal_energies != nullptr,
          "residual_energies: need signal_energies");
  require_finite(gram, "gram");
  require_finite(correlations, "correlations");
  if (signal_energies != nullptr) {
    require_finite(MatrixView<const T>(signal_energies, 1, n), "signal_energies");
  }
  for (int64_t j = 0; j < k; ++j) {
    if (gram(j, j) >= T(0)) continue;
    throw Error(ErrorCode::kInvalidArgument,
                "gram: diagonal element " + std::to_string(j) + " is negative (" +
                    std::to_string(static_cast<double>(gram(j, j))) + ")");
  }
}

}  // namespace

template <class T>
int64_t omp_workspace_bytes(int64_t n_atoms, int64_t n_signals, const OmpOptions& options) {
  return make_plan<T>(n_atoms, n_signals, options).total_bytes;
}

template <class T>
OmpStats omp_encode(MatrixView<const T> gram,
                    MatrixView<const T> correlations,
                    const T* signal_energies,
                    const OmpOptions& options,
                    MatrixView<int32_t> indices,
                    MatrixView<T> coeffs,
                    T* residual_energies) {
  const int64_t n_signals = correlations.rows;
  const Plan plan = make_plan<T>(gram.rows, n_signals, options);
  check_arguments(gram, correlations, signal_energies, options, indices, coeffs, residual_energies);
  OmpStats stats;
  if (n_signals == 0) return stats;

  const AlignedBuffer<std::byte> gram_memory(plan.gram_bytes, detail::Pages::kHuge);
  const AlignedBuffer<T> scales(gram.rows);
  const AlignedBuffer<std::byte> arenas(plan.arena_bytes * plan.n_threads, detail::Pages::kHuge);
  T* scaled_gram = reinterpret_cast<T*>(gram_memory.data());
  scale_gram(gram, plan.gram_stride, plan.n_threads, scales.data(), scaled_gram);

  cpu::OmpProblem<T> problem{};
  problem.gram = scaled_gram;
  problem.gram_stride = plan.gram_stride;
  problem.scales = scales.data();
  problem.n_atoms = gram.rows;
  problem.sparsity = options.sparsity;
  problem.block_size = plan.block_size;
  problem.tolerance = omp_dependence_tolerance<T>();
  problem.is_ormp = options.selection == Selection::kOrmp;

  std::vector<OmpStats> thread_stats(static_cast<size_t>(plan.n_threads));
  const cpu::OmpEntry<T>& kernel = entry<T>();
  detail::parallel_for(n_signals, plan.n_threads, [&](int64_t n, int thread) {
    cpu::OmpSignal<T> signal{};
    signal.correlations = correlations.row(n);
    signal.indices = indices.row(n);
    signal.coeffs = coeffs.row(n);
    kernel.encode(problem, signal, arenas.data() + thread * plan.arena_bytes);
    if (residual_energies != nullptr) {
      const double residual = static_cast<double>(signal_energies[n]) - signal.explained;
      residual_energies[n] = static_cast<T>(std::max(residual, 0.0));
    }
    OmpStats& mine = thread_stats[static_cast<size_t>(thread)];
    mine.n_padded += signal.n_padded;
    mine.n_passes += signal.n_passes;
    mine.n_rows += signal.n_rows;
  });
  for (const OmpStats& mine : thread_stats) {
    stats.n_padded += mine.n_padded;
    stats.n_passes += mine.n_passes;
    stats.n_rows += mine.n_rows;
  }
  stats.workspace_bytes = plan.total_bytes;
  return stats;
}

// NOLINTBEGIN(bugprone-macro-parentheses): a type cannot be in parentheses
#define COSPADI_INSTANTIATE_OMP(T)                                              \
  template int64_t omp_workspace_bytes<T>(int64_t, int64_t, const OmpOptions&); \
  template OmpStats omp_encode<T>(MatrixView<const T>,                          \
                                  MatrixView<const T>,                          \
                                  const T*,                                     \
                                  const OmpOptions&,                            \
                                  MatrixView<int32_t>,                          \
                                  MatrixView<T>,                                \
                                  T*)
COSPADI_INSTANTIATE_OMP(float);
COSPADI_INSTANTIATE_OMP(double);
#undef COSPADI_INSTANTIATE_OMP
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace cospadi
