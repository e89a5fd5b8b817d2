/// A compressed projection in one call: y = [x ; x D] S + bias.
#pragma once

#include <cstdint>
#include <variant>

#include "cospadi/dtype.hpp"
#include "cospadi/export.h"
#include "cospadi/packed.hpp"
#include "cospadi/sparse_gemm.hpp"

namespace cospadi {

/// What a projection multiplies by, as a checkpoint stores it. Borrowed.
struct LinearMatrix {
  int64_t d_in = 0;
  bool has_identity = false;  ///< the d_in inputs are atoms, before the learned ones
  /// The K learned atoms: none; floating-point numbers [d_in x K]; or int8 with one scale per atom,
  /// whose rows are the atoms [K x d_in].
  std::variant<std::monostate, ConstTypedMatrix, PackedCoeffs> dictionary;
  /// S over all atoms: n_atoms = K, plus d_in if the inputs are atoms.
  std::variant<SparseMatrix, PackedSparseMatrix> code;
  ConstTypedVector bias;  ///< [d_out], or null data
};

/// y = z S + bias with z = x D, or [x ; x D] if the inputs are atoms.
///
/// x [rows x d_in] and y [rows x d_out] with any row strides, each float, bfloat16 or binary16; y
/// must not overlap x. x D is rounded to the type of x; sums are in float, in an order that depends
/// on the sizes and on whether there are many rows, and y is rounded once. Results are the same
/// bits for any `n_threads` (0 means OpenMP's default). The mask of S is trusted, see sparse_gemm.
///
/// For few rows D and S are read once, as they are stored. For many rows D is laid out atom by atom
/// first, which costs a pass over it for every 1024 rows at most.
/// Workspace: that of sparse_gemm, z for at most 1024 rows at a time, and for many rows a copy of a
/// floating-point dictionary. Throws Error for shapes, sizes, strides and null pointers before y is
/// written, and if there is no memory.
COSPADI_API void linear(ConstTypedMatrix x,
                        const LinearMatrix& matrix,
                        TypedMatrix y,
                        int n_threads);

}  // namespace cospadi
