// What csrc/core hands to the atom update kernels; plain data only.
#pragma once

#include <cstdint>

namespace cospadi::cpu {

/// Some rows of the residual matrix, and the coefficients of one atom on them.
template <class T>
struct ResidualRows {
  T* residual;  // [n_signals x stride]
  int64_t stride;
  int64_t dim;
  const int32_t* rows;  // [n_rows] row numbers
  int64_t n_rows;
};

template <class T>
struct DictionaryEntry {
  /// residual = signal - sum_i coeffs[i] * atoms[indices[i], :], for one signal; all [dim].
  void (*subtract_atoms)(const T* signal,
                         const T* atoms,
                         int64_t atoms_stride,
                         const int32_t* indices,
                         const T* coeffs,
                         int64_t sparsity,
                         int64_t dim,
                         T* residual) noexcept;
  /// out [dim] = sum_i weights[i] * residual row i.
  void (*accumulate_rows)(const ResidualRows<T>& rows, const T* weights, T* out) noexcept;
  /// projections[i] = <residual row i, direction> + offset * old_coeffs[i]; then, if `old_atom` is
  /// not null, residual row i += old_coeffs[i] * old_atom - projections[i] * direction.
  void (*project_rows)(const ResidualRows<T>& rows,
                       const T* direction,
                       const T* old_coeffs,
                       T offset,
                       const T* old_atom,
                       T* projections) noexcept;
  /// Squared norm of one row, accumulated in double precision.
  double (*row_energy)(const T* row, int64_t dim) noexcept;
};

}  // namespace cospadi::cpu
