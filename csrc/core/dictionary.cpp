#include "cospadi/dictionary.hpp"

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "core/atom_update.hpp"
#include "core/check.hpp"
#include "core/finite.hpp"
#include "core/parallel.hpp"
#include "cpu/kernel_table.hpp"

namespace cospadi {
namespace {

// Signals per task, and the width of the slice of the atoms that stays in the L2 cache meanwhile.
constexpr int64_t kResidualRows = 64;
constexpr int64_t kResidualColumns = 128;

// Move of a unit atom in one alternation that counts as convergence: some ten roundings.
template <class T>
constexpr double kConvergedChange = sizeof(T) == 4 ? 1e-6 : 1e-12;

}  // namespace

namespace detail {

SupportIndex::SupportIndex(MatrixView<const int32_t> indices, int64_t n_atoms)
    : starts_(n_atoms + 1),
      rows_(indices.rows * indices.cols),
      positions_(indices.rows * indices.cols),
      bytes_((n_atoms + 1) * static_cast<int64_t>(sizeof(int64_t)) +
             2 * indices.rows * indices.cols * static_cast<int64_t>(sizeof(int32_t))) {
  int64_t* starts = starts_.data();
  std::fill_n(starts, n_atoms + 1, int64_t{0});
  for (int64_t n = 0; n < indices.rows; ++n) {
    for (int64_t i = 0; i < indices.cols; ++i) ++starts[indices(n, i) + 1];
  }
  for (int64_t atom = 0; atom < n_atoms; ++atom) {
    largest_count_ = std::max(largest_count_, starts[atom + 1]);
    starts[atom + 1] += starts[atom];
  }
  for (int64_t n = 0; n < indices.rows; ++n) {
    for (int64_t i = 0; i < indices.cols; ++i) {
      const int64_t at = starts[indices(n, i)]++;
      rows_.data()[at] = static_cast<int32_t>(n);
      positions_.data()[at] = static_cast<int32_t>(i);
    }
  }
  // Every start has moved to the next one's place.
  for (int64_t atom = n_atoms; atom > 0; --atom) starts[atom] = starts[atom - 1];
  starts[0] = 0;
}

template <class T>
double residual_energies(const AtomUpdate<T>& update, double* energies) {
  const MatrixView<T> residual = update.residual;
  const int64_t n_tasks = (residual.rows + kResidualRows - 1) / kResidualRows;
  parallel_for(n_tasks, update.n_threads, [&](int64_t task, int) {
    const int64_t last = std::min(residual.rows, (task + 1) * kResidualRows);
    for (int64_t n = task * kResidualRows; n < last; ++n) {
      energies[n] = update.kernels->row_energy(residual.row(n), residual.cols);
    }
  });
  return std::accumulate(energies, energies + residual.rows, 0.0);
}

template double residual_energies<float>(const AtomUpdate<float>&, double*);
template double residual_energies<double>(const AtomUpdate<double>&, double*);

}  // namespace detail

namespace {

using detail::AlignedBuffer;
using detail::AtomUpdate;
using detail::checked_product;
using detail::require;
using detail::require_finite;
using detail::require_shape;

template <class T>
const cpu::DictionaryEntry<T>& entry() {
  if constexpr (sizeof(T) == 4) {
    return cpu::kernels().dictionary_f32;
  } else {
    return cpu::kernels().dictionary_f64;
  }
}

template <class T>
void refresh_residual(const AtomUpdate<T>& update) {
  const int64_t n = update.signals.rows;
  const int64_t dim = update.signals.cols;
  const int64_t n_tasks = (n + kResidualRows - 1) / kResidualRows;
  detail::parallel_for(n_tasks, update.n_threads, [&](int64_t task, int) {
    const int64_t last = std::min(n, (task + 1) * kResidualRows);
    for (int64_t j = 0; j < dim; j += kResidualColumns) {
      for (int64_t row = task * kResidualRows; row < last; ++row) {
        update.kernels->subtract_atoms(update.signals.row(row) + j,
                                       update.atoms.data + j,
                                       update.atoms.stride,
                                       update.indices.row(row),
                                       update.coeffs.row(row),
                                       update.indices.cols,
                                       std::min(kResidualColumns, dim - j),
                                       update.residual.row(row) + j);
      }
    }
  });
}

/// Gives unused atoms the residual directions of the worst coded signals; returns how many.
template <class T>
int64_t reseed(const AtomUpdate<T>& update,
               const std::vector<int64_t>& unused,
               const std::vector<double>& energies) {
  std::vector<int64_t> worst(energies.size());
  std::iota(worst.begin(), worst.end(), int64_t{0});
  const size_t n_wanted = std::min(unused.size(), worst.size());
  std::partial_sort(worst.begin(),
                    worst.begin() + static_cast<std::ptrdiff_t>(n_wanted),
                    worst.end(),
                    [&](int64_t a, int64_t b) {
                      const double energy_a = energies[static_cast<size_t>(a)];
                      const double energy_b = energies[static_cast<size_t>(b)];
                      return energy_a != energy_b ? energy_a > energy_b : a < b;
                    });
  int64_t n_reseeded = 0;
  std::vector<T> direction(static_cast<size_t>(update.atoms.cols));
  for (size_t i = 0; i < n_wanted; ++i) {
    std::copy_n(update.residual.row(worst[i]), update.atoms.cols, direction.begin());
    if (!detail::normalise(direction.data(), update.atoms.cols)) break;
    std::copy(direction.begin(), direction.end(), update.atoms.row(unused[i]));
    ++n_reseeded;
  }
  return n_reseeded;
}

void check_indices(MatrixView<const int32_t> indices, int64_t n_atoms) {
  for (int64_t n = 0; n < indices.rows; ++n) {
    int64_t previous = -1;
    for (int64_t i = 0; i < indices.cols; ++i) {
      const int64_t index = indices(n, i);
      if (index <= previous || index >= n_atoms) {
        throw Error(ErrorCode::kInvalidArgument,
                    "indices: element " + detail::shape_text(n, i) + " is " +
                        std::to_string(index) +
                        "; expected strictly ascending values from 0 to below n_atoms = " +
                        std::to_string(n_atoms));
      }
      previous = index;
    }
  }
}

template <class T>
void check_arguments(MatrixView<const T> signals,
                     MatrixView<const int32_t> indices,
                     const AtomUpdateOptions& options,
                     MatrixView<T> atoms,
                     MatrixView<T> coeffs) {
  require_shape(atoms, atoms.rows, signals.cols, "atoms");
  require_shape(signals, signals.rows, signals.cols, "signals");
  require_shape(indices, signals.rows, indices.cols, "indices");
  require_shape(coeffs, signals.rows, indices.cols, "coeffs");
  const auto require_at_least_one = [](int64_t value, const char* name) {
    require(value >= 1, std::string(name) + ": expected at least 1, got " + std::to_string(value));
  };
  require(options.power_iterations >= 0,
          "power_iterations: expected at least 1, or 0 for iterating to convergence, got " +
              std::to_string(options.power_iterations));
  require_at_least_one(options.block_size, "block_size");
  require_at_least_one(options.sweeps, "sweeps");
  require(signals.rows <= INT32_MAX, "signals: more than 2^31 - 1 rows");
  checked_product(checked_product(signals.rows, signals.cols, "signals"), 8, "residual");
  checked_product(checked_product(signals.rows, indices.cols, "indices"), 8, "coefficients");
  check_indices(indices, atoms.rows);
  require_finite(MatrixView<const T>(atoms), "atoms");
  require_finite(signals, "signals");
  require_finite(MatrixView<const T>(coeffs), "coeffs");
}

}  // namespace

template <class T>
AtomUpdateStats update_atoms(MatrixView<const T> signals,
                             MatrixView<const int32_t> indices,
                             const AtomUpdateOptions& options,
                             MatrixView<T> atoms,
                             MatrixView<T> coeffs) {
  check_arguments(signals, indices, options, atoms, coeffs);
  AtomUpdateStats stats;
  const int64_t n_atoms = atoms.rows;
  const detail::SupportIndex support(indices, n_atoms);
  std::vector<int64_t> unused;
  for (int64_t atom = 0; atom < n_atoms; ++atom) {
    if (support.count(atom) == 0) unused.push_back(atom);
  }
  stats.n_unused = static_cast<int64_t>(unused.size());
  if (signals.rows == 0 || signals.cols == 0) return stats;

  const AlignedBuffer<T> residual(signals.rows * signals.cols);
  AtomUpdate<T> update{};
  update.signals = signals;
  update.indices = indices;
  update.atoms = atoms;
  update.coeffs = coeffs;
  update.residual = {residual.data(), signals.rows, signals.cols};
  update.support = &support;
  update.kernels = &entry<T>();
  const bool is_exact = options.power_iterations == 0;
  update.max_iterations = is_exact ? kMaxPowerIterations : options.power_iterations;
  update.tolerance = is_exact ? kConvergedChange<T> : 0.0;
  update.n_threads = detail::resolve_threads(options.num_threads, signals.rows);

  const int64_t block_size = std::min(options.block_size, std::max<int64_t>(n_atoms, 1));
  std::unique_ptr<detail::SequentialSweep<T>> sequential;
  std::unique_ptr<detail::BlockedSweep<T>> blocked;
  if (options.block_size == 1) {
    sequential = std::make_unique<detail::SequentialSweep<T>>(signals.cols, support);
  } else {
    checked_product(checked_product(3 * signals.rows, block_size, "block"), 8, "block");
    blocked = std::make_unique<detail::BlockedSweep<T>>(signals.rows, signals.cols, block_size);
  }
  stats.workspace_bytes = signals.rows * signals.cols * static_cast<int64_t>(sizeof(T)) +
                          support.bytes() + (sequential ? sequential->bytes() : blocked->bytes());

  std::vector<double> energies(static_cast<size_t>(signals.rows));
  for (int sweep = 0; sweep < options.sweeps; ++sweep) {
    refresh_residual(update);
    const double objective = detail::residual_energies(update, energies.data());
    if (sweep == 0) stats.objective_before = objective;
    if (sequential) {
      sequential->run(update);
    } else {
      stats.n_halved += blocked->run(update, objective);
    }
  }
  stats.objective_after = detail::residual_energies(update, energies.data());
  if (options.unused == UnusedAtoms::kReseed && !unused.empty()) {
    stats.n_reseeded = reseed(update, unused, energies);
  }
  return stats;
}

template AtomUpdateStats update_atoms<float>(MatrixView<const float>,
                                             MatrixView<const int32_t>,
                                             const AtomUpdateOptions&,
                                             MatrixView<float>,
                                             MatrixView<float>);
template AtomUpdateStats update_atoms<double>(MatrixView<const double>,
                                              MatrixView<const int32_t>,
                                              const AtomUpdateOptions&,
                                              MatrixView<double>,
                                              MatrixView<double>);

}  // namespace cospadi
