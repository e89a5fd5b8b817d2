// What the column-sparse GEMM kernels of every instruction set exchange with csrc/core.
#pragma once

#include <cstdint>

#include "cospadi/dtype.hpp"
#include "cospadi/packed.hpp"

namespace cospadi::cpu {

/// Positions handled by one step: one 32-bit word of the mask.
inline constexpr int64_t kMaskWord = 32;

/// Most rows that any kernel takes at once in `multiply_few`, after padding.
inline constexpr int64_t kMaxFewRows = 32;

/// Upper bound of `panel_cols`.
inline constexpr int64_t kMaxPanelCols = 32;

/// An integer coefficient; the scale of its column multiplies the sum.
struct Int8 {
  int8_t value;
};

/// Coefficients that the kernels multiply as they are stored.
enum class CoeffType : int { kFloat32, kBFloat16, kFloat16, kInt8 };

constexpr int64_t coeff_bytes(CoeffType type) noexcept {
  return type == CoeffType::kInt8 ? 1 : (type == CoeffType::kFloat32 ? 4 : 2);
}

/// S in its stored form, or some of its columns decoded. `coeffs_end` is one past the last
/// coefficient of the last column: nothing at or above it is read, whatever the mask says.
struct SparseColumns {
  int64_t n_atoms;
  const uint8_t* mask;  ///< null: every column uses every atom
  int64_t mask_stride;
  CoeffType type;
  const void* coeffs;
  int64_t coeffs_stride;  ///< elements
  const void* coeffs_end;
  bool is_decoded;  ///< the coefficients are in the cache: there is nothing to fetch ahead
};

/// Fields that one step decodes.
inline constexpr int64_t kFieldBlock = 32;

/// Packed coefficients (see cospadi/packed.hpp). Nothing at or above `end` is read.
struct PackedColumns {
  CodeFormat format;
  int64_t sparsity;
  const uint8_t* codes;
  int64_t stride;  ///< bytes
  const uint8_t* end;
};

/// A part of z [rows x n_atoms] as the caller stores it.
struct StoredRows {
  DType dtype;
  int64_t rows;
  const void* data;
  int64_t stride;  ///< elements
};

/// Elements of packed operands: a float, or a pair of bfloat16 where the processor multiplies
/// pairs.
inline constexpr int64_t kElementBytes = 4;

struct SparseGemmKernels {
  /// Up to this many rows (at most kMaxFewRows) `multiply_few` is the faster way.
  int64_t max_few_rows;
  /// Up to this many rows 8-bit integers are best expanded as they are stored, with more of them
  /// decoded to bfloat16.
  int64_t max_byte_rows;
  /// Elements of the prepared form of `rows` rows of z.
  int64_t (*prepared_size)(int64_t rows, int64_t n_atoms) noexcept;
  /// Writes z in the order and type that `multiply_few` consumes, 64-byte aligned.
  void (*prepare)(const StoredRows& z, const SparseColumns& s, void* out) noexcept;
  /// out(r, j) = sum over the atoms a of column first + j of z(r, a) S(a, first + j), j <
  /// n_columns. `out` has room for padded rows: kMaxFewRows.
  void (*multiply_few)(const SparseColumns& s,
                       int64_t first,
                       int64_t n_columns,
                       const StoredRows& z,
                       const void* prepared,
                       float* out,
                       int64_t out_stride) noexcept;

  // The way for many rows: packed panels and the register tile of the dense GEMM. Depth is counted
  // in mask words; a word is kMaskWord floats or half as many pairs.
  int64_t panel_rows;  ///< rows of z in one packed panel
  int64_t panel_cols;  ///< columns of S in one packed panel
  /// Elements of one packed word of one row or column.
  int64_t (*word_elements)(DType z_dtype, CoeffType type) noexcept;
  /// Packs words word .. word + n_words of at most panel_rows rows of z.
  void (*pack_rows)(const StoredRows& z,
                    const SparseColumns& s,
                    int64_t word,
                    int64_t n_words,
                    void* panel) noexcept;
  /// Expands words word .. word + n_words of at most panel_cols columns of S from `first` on.
  /// `offsets` [panel_cols]: coefficients of each column consumed so far; zero before word 0.
  void (*expand_columns)(const SparseColumns& s,
                         DType z_dtype,
                         int64_t first,
                         int64_t n_columns,
                         int64_t word,
                         int64_t n_words,
                         int64_t* offsets,
                         void* panel) noexcept;
  /// c = a b + beta c for packed panels of n_words each.
  void (*multiply_panels)(DType z_dtype,
                          CoeffType type,
                          int64_t rows,
                          int64_t cols,
                          int64_t n_words,
                          const void* a,
                          const void* b,
                          float beta,
                          float* c,
                          int64_t c_stride) noexcept;

  /// out[i] = float(source[i]).
  void (*load_floats)(DType dtype, int64_t n, const void* source, float* out) noexcept;
  /// out[i] = values[i] * scale[i] + bias[i] rounded once to `dtype`; `scale` and `bias` may be
  /// null.
  void (*store_floats)(DType dtype,
                       int64_t n,
                       const float* values,
                       const float* scale,
                       const float* bias,
                       void* out) noexcept;

  /// Decodes columns first .. first + n_columns without their scales. `out` has room for whole
  /// blocks of kFieldBlock fields per column; what is beyond the last field is any value.
  void (*decode_columns)(const PackedColumns& s,
                         int64_t first,
                         int64_t n_columns,
                         BFloat16* out,
                         int64_t out_stride) noexcept;
  /// out[i] = values[i] * scales[i / group], i < n.
  void (*scale_values)(
      int64_t n, const BFloat16* values, const float* scales, int64_t group, float* out) noexcept;
};

}  // namespace cospadi::cpu
