/// Exact orthogonal matching pursuit for many signals over one dictionary, in Gram form.
#pragma once

#include <cstdint>

#include "cospadi/export.h"
#include "cospadi/matrix.hpp"

namespace cospadi {

/// How the next atom is chosen. With r the residual, d_j an atom and q_j its part orthogonal to the
/// atoms chosen so far:
enum class Selection {
  kOmp,   ///< largest |<d_j, r>| / |d_j|: orthogonal matching pursuit
  kOrmp,  ///< largest |<q_j, r>| / |q_j|: order-recursive MP (orthogonal least squares), the atom
          ///< that lowers the error most; SPAMS' `omp` is this one
};

struct OmpOptions {
  int64_t sparsity = 1;  ///< atoms per signal s, 1 <= s <= n_atoms; every signal gets exactly s
  Selection selection = Selection::kOmp;
  int num_threads = 0;  ///< 0: OpenMP's default
  /// Candidate rows computed per pass over the history; 0 chooses. It changes the speed only: the
  /// result is the same to the bit. 1 is the plain step-by-step algorithm (tests, benchmarks).
  int block_size = 0;
};

struct OmpStats {
  int64_t n_padded = 0;         ///< support entries filled because every other atom was dependent
  int64_t workspace_bytes = 0;  ///< memory held during the call, all threads
  int64_t n_passes = 0;         ///< passes over a history, all signals
  int64_t n_rows = 0;  ///< history rows computed, all signals (at most n_passes * block size)
};

/// Relative squared distance up to which an atom counts as dependent on the chosen ones:
/// |q_j|^2 <= tolerance * |d_j|^2. The kernel also carries the rounding error of every |q_j|^2
/// along and treats an atom that has less than that left as dependent, which matters once the
/// chosen atoms are nearly dependent themselves.
template <class T>
constexpr T omp_dependence_tolerance() {
  return sizeof(T) == 4 ? T(1e-5) : T(1e-10);
}

/// Bytes of workspace that omp_encode holds: one arena per thread (about sparsity * n_atoms
/// elements) and one scaled copy of the Gram; independent of the number of signals. Throws
/// Error(kInvalidArgument) when the sizes are out of range or do not fit in 64 bits.
template <class T>
COSPADI_API int64_t omp_workspace_bytes(int64_t n_atoms,
                                        int64_t n_signals,
                                        const OmpOptions& options);

/// Codes every signal y with exactly `options.sparsity` atoms: y ~ sum_i coeffs[i] d_{indices[i]},
/// the coefficients being the least-squares solution on the chosen support.
///
/// Batch-OMP with the inverse-Cholesky history ("v0": Zhu et al., Electronics 9/1507, 2020), whose
/// rows are computed for several candidate atoms per pass so that the history is read at BLAS-3
/// speed. Time about 1.4 n_atoms sparsity^2 flops per signal. T is float or double.
///
/// @param gram              [n_atoms x n_atoms] D^T D, symmetric, finite; atoms need no unit norm,
/// a
///                          zero atom is never chosen. Borrowed for the call.
/// @param correlations      [n_signals x n_atoms] row n is D^T y_n, finite. Borrowed.
/// @param signal_energies   [n_signals] |y_n|^2, or null. Borrowed.
/// @param indices           [n_signals x sparsity] out: support, strictly ascending per row
/// @param coeffs            [n_signals x sparsity] out: coefficients in the order of `indices`
/// @param residual_energies [n_signals] out, or null: |y_n - D x_n|^2, at least 0, from
///                          |y_n|^2 minus the explained energy, so absolutely accurate to a few
///                          roundings of |y_n|^2; needs signal_energies
///
/// Equal scores are broken by the lowest atom index. Dependent atoms are never chosen; when no
/// other is left the support is filled with the lowest unused indices at coefficient 0, counted in
/// n_padded. The result is the same for every thread count. Outputs must not alias inputs.
/// Throws Error(kInvalidArgument) for shapes, sparsity, non-finite or negative-diagonal inputs
/// (naming argument and position), Error(kOutOfMemory) if the workspace cannot be allocated.
template <class T>
COSPADI_API OmpStats omp_encode(MatrixView<const T> gram,
                                MatrixView<const T> correlations,
                                const T* signal_energies,
                                const OmpOptions& options,
                                MatrixView<int32_t> indices,
                                MatrixView<T> coeffs,
                                T* residual_energies);

}  // namespace cospadi
