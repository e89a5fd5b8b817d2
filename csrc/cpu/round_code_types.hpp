// What csrc/core hands to the kernels that round coefficients; plain data only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cospadi::cpu {

/// One call, shared by all rows.
struct RoundProblem {
  const float* gram;  // [n_atoms x gram_stride]
  int64_t gram_stride;
  int64_t n_atoms;
  int64_t sparsity;
  int64_t n_steps;  // steps per row
  int64_t group;    // coefficients per step
  float limit;      // integers lie in -limit .. limit
  float damping;    // first ridge, relative to the mean of the support's diagonal
  int sweeps;
  /// [n_atoms] all atoms, those to be fixed last first; null: ascending, the last is fixed first.
  const int32_t* order;
};

/// One row in, and what became of it.
struct RoundRow {
  const int32_t* indices;  // [sparsity]; null: every atom
  const float* coeffs;     // [sparsity]
  const float* steps;      // [n_steps]
  int32_t* fields;         // [sparsity] out
  float* error;            // out, or null
  int64_t n_moves;         // out: coefficients changed by the sweeps
};

/// How the factorisation of a support's Gram ended.
enum class FactorOutcome {
  kClean,   // with the ridge that was asked for
  kRaised,  // with a larger one
  kFailed,  // not at all: coefficients are rounded on their own
};

struct RoundCodeEntry {
  /// Bytes of the factor of one support's Gram and of the arena that goes with it for one row.
  int64_t (*factor_bytes)(const RoundProblem& problem);
  int64_t (*row_bytes)(const RoundProblem& problem);
  /// Factors the Gram of a row's own support in `factor` and rounds the row.
  FactorOutcome (*round_row)(const RoundProblem& problem,
                             RoundRow& row,
                             std::byte* factor,
                             std::byte* arena) noexcept;
  /// Full support: the factor of the whole Gram is made once and used by all rows, `rows_together`
  /// of them side by side.
  int64_t rows_together;
  int64_t (*rows_bytes)(const RoundProblem& problem);
  FactorOutcome (*factor_all)(const RoundProblem& problem, std::byte* factor) noexcept;
  void (*round_rows)(const RoundProblem& problem,
                     RoundRow* rows,
                     int64_t n_rows,
                     std::byte* factor,
                     std::byte* arena) noexcept;
};

}  // namespace cospadi::cpu
