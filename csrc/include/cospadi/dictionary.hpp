/// Dictionary step of the learner: better atoms and coefficients for given supports (K-SVD).
#pragma once

#include <cstdint>

#include "cospadi/export.h"
#include "cospadi/matrix.hpp"

namespace cospadi {

/// What happens to an atom that no signal uses.
enum class UnusedAtoms {
  kSkip,    ///< stays as it is (what the CoSpaDi paper does)
  kReseed,  ///< becomes the residual direction of the worst coded signal; each signal serves once
};

/// Most alternations per atom and sweep when `power_iterations` is 0.
inline constexpr int kMaxPowerIterations = 200;

struct AtomUpdateOptions {
  /// Alternations d <- E^T x, x <- E d per atom and sweep, from the current coefficients. 0: to
  /// convergence, until an alternation moves the atom by less than 1e-6 (float) or 1e-12 (double),
  /// at most kMaxPowerIterations times. That is the best rank-one update, the first singular
  /// vectors of E, as far as the gap to its second singular value lets the iteration tell them
  /// apart.
  int power_iterations = 1;
  /// Atoms updated together against one residual. 1: strictly sequential K-SVD. More: block Jacobi
  /// by dense products; equal quality up to about 128 at k = 2 s. A block that would raise the
  /// objective is undone and halved, so the objective never increases beyond rounding.
  int64_t block_size = 64;
  int sweeps = 1;  ///< passes over all atoms; the residual is recomputed at the start of each
  UnusedAtoms unused = UnusedAtoms::kSkip;
  int num_threads = 0;  ///< 0: OpenMP's default
};

struct AtomUpdateStats {
  double objective_before = 0.0;  ///< |Y - X D|^2, summed in double precision
  double objective_after = 0.0;   ///< the same from the residual as the last sweep left it
  int64_t n_unused = 0;           ///< atoms without any signal
  int64_t n_reseeded = 0;
  int64_t n_halved = 0;         ///< blocks undone and halved because they raised the objective
  int64_t workspace_bytes = 0;  ///< held during the call
};

/// Updates atoms and coefficients in place; supports stay.
///
/// Per atom d with coefficients x on the signals Omega that use it and E = R_Omega + x d^T (R the
/// residual): d <- E^T x / |E^T x|, x <- E d, `power_iterations` times. An update of norm zero
/// leaves atom and coefficients alone. With p alternations done, time `(2 p + 1) 2 n_signals
/// sparsity dim` flops per sequential sweep and `(4 p + 4) n_signals n_atoms dim` per blocked one.
/// T is float or double.
///
/// @param signals [n_signals x dim] rows y_n, finite. Borrowed for the call.
/// @param indices [n_signals x sparsity] support, strictly ascending per row, below n_atoms
/// @param atoms   [n_atoms x dim] in and out, finite; every atom that is updated has unit norm
/// @param coeffs  [n_signals x sparsity] in and out, finite, in the order of `indices`
///
/// Workspace: n_signals * dim elements, 8 bytes per coefficient, and in the blocked variant
/// (3 n_signals + 3 dim) * block_size elements. The result is the same for every thread count.
/// Views must not overlap. Throws Error(kInvalidArgument) before anything is changed. Throws
/// Error(kOutOfMemory) if a workspace cannot be allocated: nothing is changed either, except in the
/// blocked variant if the small buffers of a product fail later, which leaves some blocks updated
/// and all of them consistent.
template <class T>
COSPADI_API AtomUpdateStats update_atoms(MatrixView<const T> signals,
                                         MatrixView<const int32_t> indices,
                                         const AtomUpdateOptions& options,
                                         MatrixView<T> atoms,
                                         MatrixView<T> coeffs);

}  // namespace cospadi
