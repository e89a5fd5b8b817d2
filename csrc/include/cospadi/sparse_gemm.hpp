/// Product with a column-sparse matrix in its stored form.
#pragma once

#include <cstdint>

#include "cospadi/dtype.hpp"
#include "cospadi/export.h"
#include "cospadi/matrix.hpp"

namespace cospadi {

/// S [n_atoms x d_out] with exactly s coefficients in every column, as it is stored.
struct SparseMatrix {
  int64_t n_atoms = 0;
  /// [d_out x mask_row_bytes(n_atoms)], see cospadi/mask.hpp; or null data: every output uses every
  /// atom, and s = n_atoms.
  MatrixView<const uint8_t> mask;
  ConstTypedMatrix coeffs;  ///< [d_out x s], ascending by atom
};

/// y = z S + bias: y(r, j) = bias[j] + sum over the atoms a of column j of z(r, a) * S(a, j).
///
/// z [rows x n_atoms] and y [rows x d_out] with any row strides; y must not overlap the inputs.
/// bias [d_out] may have null data. Every operand may be float, bfloat16 or binary16, each on its
/// own; the sums are in float, in an order that depends on n_atoms and on whether there are many
/// rows, not on the thread count: results are the same bits for any `n_threads` (0 means OpenMP's
/// default). As in a dense product, a non-finite z(r, a) may make row r of y NaN also in columns
/// that do not use atom a.
///
/// The mask is trusted: call validate_mask once when the matrix is made or loaded. With a mask that
/// holds other than s bits per row the result is wrong, but nothing outside the operands is read.
///
/// Reads S once for up to about 16 rows (memory bound); for more rows S is expanded panel by panel
/// in the cache and multiplied as a dense matrix, 2 rows n_atoms d_out flops.
/// Workspace: z in float (rows x n_atoms, at most 512 rows at a time) plus a few hundred KiB per
/// thread. Throws Error for shapes, sizes and null pointers, before y is written.
COSPADI_API void sparse_gemm(
    ConstTypedMatrix z, const SparseMatrix& s, ConstTypedVector bias, TypedMatrix y, int n_threads);

}  // namespace cospadi
