/// Integer coefficients for a given support, rounded with error feedback.
#pragma once

#include <cstdint>

#include "cospadi/export.h"
#include "cospadi/matrix.hpp"

namespace cospadi {

/// Which coefficients are fixed first. Later ones absorb the errors of earlier ones, so those whose
/// errors cost most should come first.
enum class RoundOrder {
  kEnergy,  ///< by falling diagonal element of the Gram, ties from the lowest index (GPTQ's
            ///< act-order)
  kIndex,   ///< from the last coefficient of the row to the first
};

/// Largest RoundCodeOptions::limit.
inline constexpr int32_t kMaxRoundLimit = 1 << 20;

struct RoundCodeOptions {
  int32_t limit = 7;  ///< integers lie in -limit .. limit, 1 <= limit <= kMaxRoundLimit
  int64_t group = 0;  ///< consecutive coefficients that share a step; 0: all of a row
  RoundOrder order = RoundOrder::kEnergy;
  /// Ridge relative to the mean of the support's diagonal, for the feedback alone, finite and >= 0.
  float damping = 1e-3F;
  /// Passes of coordinate descent after the rounding, at most; a pass that changes nothing is the
  /// last. They can only lower the objective, most where many integers are at the limit; the first
  /// one costs most, a pass over the support's Gram.
  int sweeps = 4;
  int num_threads = 0;  ///< 0: OpenMP's default
};

struct RoundCodeStats {
  int64_t n_raised = 0;         ///< rows whose Gram needed a larger ridge than asked
  int64_t n_plain = 0;          ///< rows rounded without feedback: their Gram defied every ridge
  int64_t n_moves = 0;          ///< coefficients changed by coordinate descent, all rows
  int64_t workspace_bytes = 0;  ///< memory held during the call, all threads
};

/// Bytes of workspace that round_code holds: per thread the factor of one support (sparsity^2 / 2
/// elements), or with full support (`is_full`) one factor for all threads and a few rows per
/// thread; independent of the number of rows but for the number of threads. Throws
/// Error(kInvalidArgument) when the sizes are out of range or do not fit in 64 bits.
COSPADI_API int64_t round_code_workspace_bytes(int64_t n_atoms,
                                               int64_t n_rows,
                                               int64_t sparsity,
                                               bool is_full,
                                               const RoundCodeOptions& options);

/// Finds integers q with a small (x - step q)^T G_II (x - step q) for every row with support I and
/// real coefficients x, which are best the least-squares solution on I.
///
/// Babai's nearest plane, which is GPTQ with the exact inverse for the row's own support: with the
/// support in the order chosen, fixed first last, and G_II + ridge = R^T R (R upper triangular),
/// from the last coefficient to the first
///     q_j = round((x_j + (1 / R_jj) sum_{i > j} R_ji (x_i - step_i q_i)) / step_j),
/// ties to even, clamped to the limit. A Gram that is not positive definite (a pivot below 1e-6 of
/// its diagonal element) gets a ridge raised tenfold, from 1e-6 at least, up to eight times; then
/// the row is rounded plainly. Both are counted. Coordinate descent then takes the coefficients in
/// ascending order, each to its best integer given all others, unless the gain is no more than
/// rounding errors could pretend.
///
/// Time about s^3 / 3 flops per row; with full support that once, and s^2 per row. All in float.
///
/// @param gram    [A x A] symmetric, finite, no negative diagonal element. Borrowed for the call.
/// @param indices [n x s] supports, strictly ascending per row, below A; null data: full support,
///                s = A. Borrowed.
/// @param coeffs  [n x s] finite. Borrowed.
/// @param steps   [n x g] finite and positive, g = 1 without groups, else ceil(s / group):
///                coefficient j of a row has step j / group. Borrowed.
/// @param fields  [n x s] out: q
/// @param errors  [n] out, or null: (x - step q)^T G_II (x - step q) with the undamped Gram, from
///                sums in float, at least 0
///
/// The result is the same for every thread count. Outputs must not overlap inputs. Throws
/// Error(kInvalidArgument) for shapes, options and values (naming argument and position),
/// Error(kOutOfMemory) if the workspace cannot be allocated; nothing has been written then.
COSPADI_API RoundCodeStats round_code(MatrixView<const float> gram,
                                      MatrixView<const int32_t> indices,
                                      MatrixView<const float> coeffs,
                                      MatrixView<const float> steps,
                                      const RoundCodeOptions& options,
                                      MatrixView<int32_t> fields,
                                      float* errors);

}  // namespace cospadi
