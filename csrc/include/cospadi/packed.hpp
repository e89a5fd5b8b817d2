/// Coefficients in fewer than 16 bits, and the product with a matrix that is stored so.
///
/// A packed row holds n fields of `bits` bits each: field j is bits [bits * j, bits * (j + 1)) of
/// the row, least significant bit first; zero bits pad the row to whole bytes.
#pragma once

#include <cstdint>

#include "cospadi/dtype.hpp"
#include "cospadi/export.h"
#include "cospadi/matrix.hpp"

namespace cospadi {

/// What a field means.
enum class CodeKind : int {
  kBFloat = 0,   ///< the upper bits of a bfloat16; 14 of them are CoSpaDi's Eq. 11
  kInteger = 1,  ///< a two's complement integer q; the coefficient is q times its scale
};

/// Form of the packed coefficients.
struct CodeFormat {
  CodeKind kind = CodeKind::kInteger;
  int bits = 8;  ///< 9 .. 16 for kBFloat (sign and exponent are always there), 2 .. 8 for kInteger
};

/// Narrowest and widest field of pack_fields and unpack_fields.
inline constexpr int kMinFieldBits = 2;
inline constexpr int kMaxFieldBits = 16;

/// Bytes of a packed row: ceil(bits n / 8).
constexpr int64_t packed_row_bytes(int64_t n, int bits) noexcept {
  return n / 8 * bits + (n % 8 * bits + 7) / 8;
}

/// Scales per output: ceil(sparsity / group), or one if group is 0.
constexpr int64_t scale_group_count(int64_t sparsity, int64_t group) noexcept {
  return group == 0 ? 1 : sparsity / group + (sparsity % group != 0 ? 1 : 0);
}

/// Coefficients [d_out x sparsity] as they are stored. Borrowed.
struct PackedCoeffs {
  int64_t sparsity = 0;
  CodeFormat format;
  MatrixView<const uint8_t> codes;  ///< [d_out x packed_row_bytes(sparsity, format.bits)]
  /// [d_out x scale_group_count(sparsity, group)]; null for kBFloat. Coefficient j of output n is
  /// its field times scale(n, j / group), or times scale(n, 0) if group is 0.
  ConstTypedMatrix scale;
  int64_t group = 0;
};

/// S [n_atoms x d_out] with exactly s packed coefficients in every column.
struct PackedSparseMatrix {
  int64_t n_atoms = 0;
  /// [d_out x mask_row_bytes(n_atoms)], see cospadi/mask.hpp; or null data: every output uses every
  /// atom, and s = n_atoms.
  MatrixView<const uint8_t> mask;
  PackedCoeffs coeffs;  ///< ascending by atom
};

/// y = z S + bias with packed coefficients; shapes, storage types, bias, the trusted mask, rounding
/// and threads as for sparse_gemm (cospadi/sparse_gemm.hpp).
///
/// A few columns at a time are decoded into a scratch that stays in the cache and multiplied from
/// there, so memory is read at the packed size (bytes without groups are multiplied as they are for
/// a few rows). Fields are exact in bfloat16: without groups the scale multiplies the finished sum;
/// with groups the columns are decoded to float, scale included, which costs the bfloat16 product.
/// Workspace: that of sparse_gemm, plus per thread the scratch: 64 columns, at most 4 bytes per
/// coefficient. Throws Error for shapes, sizes, formats and null pointers, before y is written.
COSPADI_API void packed_gemm(ConstTypedMatrix z,
                             const PackedSparseMatrix& s,
                             ConstTypedVector bias,
                             TypedMatrix y,
                             int n_threads);

/// Writes `values` [rows x n], each modulo 2^bits, to `packed` [rows x packed_row_bytes(n, bits)];
/// padding between rows of a strided matrix is not touched.
///
/// Throws Error for bits outside kMinFieldBits .. kMaxFieldBits, for shapes, and naming row and
/// column of the first value outside -2^(bits - 1) .. 2^bits - 1; `packed` is then unchanged.
COSPADI_API void pack_fields(MatrixView<const int32_t> values,
                             int bits,
                             MatrixView<uint8_t> packed,
                             int n_threads);

/// Writes the fields of `packed` [rows x packed_row_bytes(n, bits)] to `values` [rows x n]: as
/// two's complement if `is_signed`, else as 0 .. 2^bits - 1. Throws Error as pack_fields does.
COSPADI_API void unpack_fields(MatrixView<const uint8_t> packed,
                               int bits,
                               bool is_signed,
                               MatrixView<int32_t> values,
                               int n_threads);

/// Writes the coefficients, scale included, to `out` [d_out x sparsity]. Throws Error as
/// packed_gemm does.
COSPADI_API void decode_coeffs(const PackedCoeffs& coeffs, MatrixView<float> out, int n_threads);

}  // namespace cospadi
