#include "cospadi/round_code.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "core/buffer.hpp"
#include "core/check.hpp"
#include "core/finite.hpp"
#include "core/parallel.hpp"
#include "cospadi/packed.hpp"
#include "cpu/kernel_table.hpp"

namespace cospadi {
namespace {

using detail::AlignedBuffer;
using detail::checked_product;
using detail::require;
using detail::require_finite;
using detail::require_shape;
using detail::shape_text;

constexpr int64_t kMaxAtoms = std::numeric_limits<int32_t>::max() / 2;

/// Sizes of one call, all of them checked.
struct Plan {
  cpu::RoundProblem problem;
  bool is_full;
  int64_t rows_per_task;
  int64_t n_tasks;
  int n_threads;
  int64_t factor_bytes;  // of one factor
  int64_t n_factors;
  int64_t arena_bytes;  // of one thread
  int64_t order_size;
  int64_t total_bytes;
};

Plan make_plan(int64_t n_atoms,
               int64_t n_rows,
               int64_t sparsity,
               bool is_full,
               const RoundCodeOptions& options) {
  require(n_atoms >= 1 && n_atoms <= kMaxAtoms,
          "gram: expected 1 to " + std::to_string(kMaxAtoms) + " atoms, got " +
              std::to_string(n_atoms));
  require(sparsity >= 1 && sparsity <= n_atoms,
          "coeffs: expected 1 to n_atoms = " + std::to_string(n_atoms) + " columns, got " +
              std::to_string(sparsity));
  require(!is_full || sparsity == n_atoms,
          "coeffs: without indices expected n_atoms = " + std::to_string(n_atoms) +
              " columns, got " + std::to_string(sparsity));
  require(n_rows >= 0, "coeffs: negative size");
  require(options.limit >= 1 && options.limit <= kMaxRoundLimit,
          "limit: expected 1 to " + std::to_string(kMaxRoundLimit) + ", got " +
              std::to_string(options.limit));
  require(options.group >= 0,
          "group: expected 0 (one step per row) or a number of coefficients, got " +
              std::to_string(options.group));
  require(
      options.damping >= 0.0F && std::isfinite(options.damping),
      "damping: expected a finite number of at least 0, got " + std::to_string(options.damping));
  require(options.sweeps >= 0,
          "sweeps: expected at least 0, got " + std::to_string(options.sweeps));
  // The factor and the buffers take less than 64 bytes per pair of coefficients (and 256 lanes).
  checked_product(checked_product(sparsity + 256, sparsity + 256, "factor"), 64, "factor");

  const cpu::RoundCodeEntry& kernel = cpu::kernels().round_code;
  Plan plan{};
  plan.is_full = is_full || sparsity == n_atoms;
  plan.order_size = options.order == RoundOrder::kEnergy ? n_atoms : 0;
  plan.problem.n_atoms = n_atoms;
  plan.problem.sparsity = sparsity;
  plan.problem.group = options.group == 0 ? sparsity : std::min(options.group, sparsity);
  plan.problem.n_steps = scale_group_count(sparsity, options.group);
  plan.problem.limit = static_cast<float>(options.limit);
  plan.problem.damping = options.damping;
  plan.problem.sweeps = options.sweeps;
  // Only whether there is an order counts for the sizes.
  static constexpr int32_t kSomeOrder = 0;
  plan.problem.order = plan.order_size > 0 ? &kSomeOrder : nullptr;
  plan.rows_per_task = plan.is_full ? kernel.rows_together : 1;
  plan.n_tasks = (n_rows + plan.rows_per_task - 1) / plan.rows_per_task;
  plan.n_threads = detail::resolve_threads(options.num_threads, plan.n_tasks);
  plan.factor_bytes = kernel.factor_bytes(plan.problem);
  plan.n_factors = plan.is_full ? 1 : plan.n_threads;
  plan.arena_bytes =
      plan.is_full ? kernel.rows_bytes(plan.problem) : kernel.row_bytes(plan.problem);
  const int64_t parts[] = {checked_product(plan.factor_bytes, plan.n_factors, "workspace"),
                           checked_product(plan.arena_bytes, plan.n_threads, "workspace"),
                           checked_product(plan.order_size, sizeof(int32_t), "workspace")};
  for (const int64_t bytes : parts) {
    require(!__builtin_add_overflow(plan.total_bytes, bytes, &plan.total_bytes),
            "workspace: the size does not fit in 64 bits");
  }
  return plan;
}

void require_ascending(MatrixView<const int32_t> indices, int64_t n_atoms) {
  for (int64_t i = 0; i < indices.rows; ++i) {
    int64_t previous = -1;
    for (int64_t t = 0; t < indices.cols; ++t) {
      const int64_t atom = indices(i, t);
      if (atom <= previous || atom >= n_atoms) {
        throw Error(ErrorCode::kInvalidArgument,
                    "indices: element " + shape_text(i, t) + " is " + std::to_string(atom) +
                        "; expected strictly ascending values from 0 to below n_atoms = " +
                        std::to_string(n_atoms));
      }
      previous = atom;
    }
  }
}

void check_values(MatrixView<const float> gram,
                  MatrixView<const int32_t> indices,
                  MatrixView<const float> coeffs,
                  MatrixView<const float> steps) {
  require_finite(gram, "gram");
  for (int64_t j = 0; j < gram.rows; ++j) {
    if (gram(j, j) >= 0.0F) continue;
    throw Error(ErrorCode::kInvalidArgument,
                "gram: diagonal element " + std::to_string(j) + " is negative (" +
                    std::to_string(gram(j, j)) + ")");
  }
  if (indices.data != nullptr) require_ascending(indices, gram.rows);
  require_finite(coeffs, "coeffs");
  require_finite(steps, "steps");
  for (int64_t i = 0; i < steps.rows; ++i) {
    for (int64_t g = 0; g < steps.cols; ++g) {
      if (steps(i, g) > 0.0F) continue;
      throw Error(ErrorCode::kInvalidArgument,
                  "steps: element " + shape_text(i, g) + " is not positive (" +
                      std::to_string(steps(i, g)) + ")");
    }
  }
}

/// Atoms by rising energy, of equal ones the highest index first: the reverse of how they are
/// fixed.
void order_atoms(MatrixView<const float> gram, int32_t* order) {
  std::iota(order, order + gram.rows, 0);
  std::sort(order, order + gram.rows, [&](int32_t a, int32_t b) {
    const float energy_a = gram(a, a);
    const float energy_b = gram(b, b);
    return energy_a != energy_b ? energy_a < energy_b : a > b;
  });
}

}  // namespace

int64_t round_code_workspace_bytes(int64_t n_atoms,
                                   int64_t n_rows,
                                   int64_t sparsity,
                                   bool is_full,
                                   const RoundCodeOptions& options) {
  return make_plan(n_atoms, n_rows, sparsity, is_full, options).total_bytes;
}

RoundCodeStats round_code(MatrixView<const float> gram,
                          MatrixView<const int32_t> indices,
                          MatrixView<const float> coeffs,
                          MatrixView<const float> steps,
                          const RoundCodeOptions& options,
                          MatrixView<int32_t> fields,
                          float* errors) {
  const int64_t n_rows = coeffs.rows;
  const int64_t s = coeffs.cols;
  Plan plan = make_plan(gram.rows, n_rows, s, indices.data == nullptr, options);
  cpu::RoundProblem& problem = plan.problem;
  require_shape(gram, gram.rows, gram.rows, "gram");
  require_shape(coeffs, n_rows, s, "coeffs");
  if (indices.data != nullptr) require_shape(indices, n_rows, s, "indices");
  require_shape(steps, n_rows, problem.n_steps, "steps");
  require_shape(fields, n_rows, s, "fields");
  check_values(gram, indices, coeffs, steps);
  RoundCodeStats stats;
  if (n_rows == 0) return stats;

  const AlignedBuffer<int32_t> order(plan.order_size);
  const AlignedBuffer<std::byte> factors(plan.factor_bytes * plan.n_factors, detail::Pages::kHuge);
  const AlignedBuffer<std::byte> arenas(plan.arena_bytes * plan.n_threads, detail::Pages::kHuge);
  if (plan.order_size > 0) order_atoms(gram, order.data());
  problem.gram = gram.data;
  problem.gram_stride = gram.stride;
  problem.order = order.data();

  const cpu::RoundCodeEntry& kernel = cpu::kernels().round_code;
  const auto row_at = [&](int64_t i) {
    cpu::RoundRow row{};
    row.indices = plan.is_full ? nullptr : indices.row(i);
    row.coeffs = coeffs.row(i);
    row.steps = steps.row(i);
    row.fields = fields.row(i);
    row.error = errors == nullptr ? nullptr : errors + i;
    return row;
  };
  const auto count = [](RoundCodeStats& into, cpu::FactorOutcome outcome, int64_t n) {
    if (outcome == cpu::FactorOutcome::kRaised) into.n_raised += n;
    if (outcome == cpu::FactorOutcome::kFailed) into.n_plain += n;
  };
  std::vector<RoundCodeStats> thread_stats(static_cast<size_t>(plan.n_threads));
  std::vector<cpu::RoundRow> rows(static_cast<size_t>(plan.n_threads * plan.rows_per_task));
  if (plan.is_full) count(stats, kernel.factor_all(problem, factors.data()), n_rows);
  detail::parallel_for(plan.n_tasks, plan.n_threads, [&](int64_t task, int thread) {
    RoundCodeStats& mine = thread_stats[static_cast<size_t>(thread)];
    cpu::RoundRow* batch = rows.data() + thread * plan.rows_per_task;
    std::byte* arena = arenas.data() + thread * plan.arena_bytes;
    const int64_t first = task * plan.rows_per_task;
    const int64_t n = std::min(plan.rows_per_task, n_rows - first);
    for (int64_t i = 0; i < n; ++i) batch[i] = row_at(first + i);
    if (plan.is_full) {
      kernel.round_rows(problem, batch, n, factors.data(), arena);
    } else {
      std::byte* factor = factors.data() + thread * plan.factor_bytes;
      count(mine, kernel.round_row(problem, batch[0], factor, arena), 1);
    }
    for (int64_t i = 0; i < n; ++i) mine.n_moves += batch[i].n_moves;
  });
  for (const RoundCodeStats& mine : thread_stats) {
    stats.n_raised += mine.n_raised;
    stats.n_plain += mine.n_plain;
    stats.n_moves += mine.n_moves;
  }
  stats.workspace_bytes = plan.total_bytes;
  return stats;
}

}  // namespace cospadi
