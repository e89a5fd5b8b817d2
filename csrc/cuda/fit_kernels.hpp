// Kernels of the fits on CUDA devices; built with CUDA, or by fit_unavailable.cpp without it.
//
// Pointers are device memory of the current device, matrices are row-major without gaps, `stream`
// is a cudaStream_t. Calls queue work and return; nothing is allocated, waited for or checked in
// device memory. They return a cudaError_t as a number, 0 for success (see error_text).
#pragma once

#include <cstdint>

namespace cospadi::cuda {

/// Text of a status, in static storage.
const char* error_text(int status) noexcept;

/// The indices of the `count` largest scores of every row, ascending; ties go to the lowest index.
/// Equal to cospadi::select_largest. A negative score counts as 0, a NaN as above infinity.
///
/// @param scores  [n_rows x n_scores], 1 <= count <= n_scores < 2^31
/// @param indices [n_rows x count] out
int select_largest(const float* scores,
                   int64_t n_rows,
                   int64_t n_scores,
                   int64_t count,
                   int32_t* indices,
                   void* stream) noexcept;
int select_largest(const double* scores,
                   int64_t n_rows,
                   int64_t n_scores,
                   int64_t count,
                   int32_t* indices,
                   void* stream) noexcept;

/// One projection of the splitting (python/cospadi/learn/splitting.py): with
/// v = dual + (a solution + b sparse), sparse takes the `count` largest |v| of every row with zeros
/// between them, dual takes v - sparse.
///
/// @param solution     [n_rows x n_columns]
/// @param sparse, dual [n_rows x n_columns] in and out
/// @param last         [n_rows x count] the support before, or null
/// @param indices      [n_rows x count] out, ascending
/// @param moved        one number; set to 1 if `last` differs from `indices`, else untouched
int project_rows(const float* solution,
                 float* sparse,
                 float* dual,
                 const int32_t* last,
                 int64_t n_rows,
                 int64_t n_columns,
                 int64_t count,
                 float a,
                 float b,
                 int32_t* indices,
                 int32_t* moved,
                 void* stream) noexcept;

/// One step of masked conjugate gradients for every row, behind its product with the Gram
/// (python/cospadi/learn/refit.py): step size, code, residual, energy, direction. A row whose
/// energy is not above `enough` stays as it is.
///
/// @param product [n_rows x n_columns] direction times Gram, not masked
/// @param mask, inverse_diagonal [n_rows x n_columns]
/// @param enough  [n_rows]
/// @param x, residual, direction [n_rows x n_columns] in and out
/// @param energy  [n_rows] in and out
int gradient_step(const float* product,
                  const float* mask,
                  const float* inverse_diagonal,
                  const float* enough,
                  float* x,
                  float* residual,
                  float* direction,
                  float* energy,
                  int64_t n_rows,
                  int64_t n_columns,
                  void* stream) noexcept;

/// Memory of one signal in omp_encode, `element_bytes` 4 or 8.
int64_t omp_signal_bytes(int64_t n_atoms, int64_t sparsity, int element_bytes) noexcept;

/// Exact orthogonal matching pursuit; the method of cospadi::omp_encode with equal supports where
/// rounding does not decide.
///
/// @param gram         [n_atoms x n_atoms] of atoms scaled to norm one, zero for a zero atom
/// @param scales       [n_atoms] 1 / norm, 0 for a zero atom
/// @param correlations [n_signals x n_atoms] with the atoms as they are
/// @param workspace    at least omp_signal_bytes; as many signals as fit run at a time
/// @param indices      [n_signals x sparsity] out, ascending
/// @param coeffs       [n_signals x sparsity] out, of the atoms as they are
/// @param n_padded     one number, increased by the entries that only fill supports up
int omp_encode(const float* gram,
               const float* scales,
               const float* correlations,
               int64_t n_signals,
               int64_t n_atoms,
               int64_t sparsity,
               bool is_ormp,
               void* workspace,
               int64_t workspace_bytes,
               int32_t* indices,
               float* coeffs,
               unsigned long long* n_padded,
               void* stream) noexcept;
int omp_encode(const double* gram,
               const double* scales,
               const double* correlations,
               int64_t n_signals,
               int64_t n_atoms,
               int64_t sparsity,
               bool is_ormp,
               void* workspace,
               int64_t workspace_bytes,
               int32_t* indices,
               double* coeffs,
               unsigned long long* n_padded,
               void* stream) noexcept;

}  // namespace cospadi::cuda
