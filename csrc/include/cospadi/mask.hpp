/// Bit masks of the atoms that each output uses.
///
/// A mask is uint8 [n_rows x mask_row_bytes(n_atoms)]: bit (a & 7) of byte (a >> 3) of a row is set
/// if the row uses atom a. Bits at and above n_atoms are zero, and every row has the same number of
/// set bits, the sparsity s.
#pragma once

#include <cstdint>

#include "cospadi/export.h"
#include "cospadi/matrix.hpp"

namespace cospadi {

/// Bytes of one mask row: ceil(n_atoms / 8).
constexpr int64_t mask_row_bytes(int64_t n_atoms) noexcept {
  return n_atoms / 8 + (n_atoms % 8 != 0 ? 1 : 0);  // the sum n_atoms + 7 may not exist
}

/// Writes the mask of `indices` [n_rows x s], each row strictly ascending in 0 .. n_atoms - 1, to
/// `mask` [n_rows x mask_row_bytes(n_atoms)]; padding between rows of a strided mask is not
/// touched.
///
/// Throws Error naming the row of the first index that is out of range or out of order; `mask` is
/// then unchanged.
COSPADI_API void pack_mask(MatrixView<const int32_t> indices,
                           int64_t n_atoms,
                           MatrixView<uint8_t> mask);

/// Writes the atoms of each mask row, ascending, to `indices` [n_rows x s].
///
/// Throws Error as validate_mask does; `indices` is then unchanged.
COSPADI_API void unpack_mask(MatrixView<const uint8_t> mask,
                             int64_t n_atoms,
                             MatrixView<int32_t> indices);

/// Checks that every row of `mask` has exactly `sparsity` set bits and none at or above n_atoms.
///
/// Throws Error naming the first row that does not. This is the check that sparse_gemm relies on:
/// do it once, when a matrix is loaded or made.
COSPADI_API void validate_mask(MatrixView<const uint8_t> mask, int64_t n_atoms, int64_t sparsity);

}  // namespace cospadi
