// What the launchers of csrc/cuda take: sizes, strides and device addresses, and nothing else.
//
// Compiled by the host compiler as well, without CUDA's headers. Every launcher starts its kernels
// on `stream` of the current device and returns at once with cudaSuccess (0) or the cudaError_t of
// a refused launch; it allocates nothing, waits for nothing and reads no device memory from the
// host, so it can be captured in a CUDA graph. Sizes and pointers are checked by
// csrc/core/cuda_gemm.cpp.
#pragma once

#include <cstdint>

#include "cospadi/dtype.hpp"

struct CUstream_st;

namespace cospadi::cuda {

using Stream = CUstream_st*;

/// How a coefficient is stored.
enum class ValueType : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kBFloatField = 3,   ///< upper bits of a bfloat16, `bits` of them
  kIntegerField = 4,  ///< two's complement of `bits` bits, times its scale
};

/// S [n_atoms x d_out], column-sparse, in its stored form.
struct CodeOperand {
  int n_atoms = 0;
  int d_out = 0;
  int sparsity = 0;
  const uint8_t* mask = nullptr;  ///< null: every output uses every atom
  int64_t mask_stride = 0;        ///< bytes between outputs
  const uint8_t* values = nullptr;
  int64_t value_stride = 0;  ///< bytes between outputs
  ValueType type = ValueType::kFloat32;
  int bits = 32;
  const void* scale = nullptr;  ///< null without integer fields
  DType scale_dtype = DType::kFloat32;
  int64_t scale_stride = 0;  ///< elements between outputs
  int group = 0;             ///< coefficients per scale; 0: all of an output
};

/// z [rows x (n_first + n_second)]: two matrices of one dtype side by side, the second possibly
/// without columns. Strides in elements.
struct RowsOperand {
  DType dtype = DType::kFloat32;
  int rows = 0;
  const void* first = nullptr;
  int64_t first_stride = 0;
  int n_first = 0;
  const void* second = nullptr;
  int64_t second_stride = 0;
  int n_second = 0;
};

/// y [rows x d_out] and the bias [d_out] that is added to every row; `bias` may be null.
struct OutputOperand {
  DType dtype = DType::kFloat32;
  void* data = nullptr;
  int64_t stride = 0;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFloat32;
};

/// out [d_out x n_atoms] of `dtype` (row stride in elements): S transposed, zeros included. Scales
/// are applied; a value is rounded once.
int expand_code(const CodeOperand& s, DType dtype, void* out, int64_t out_stride, Stream stream);

/// out [d_out x sparsity]: the coefficients as floats, scales applied.
int decode_values(const CodeOperand& s, float* out, Stream stream);

/// mask [rows x ceil(n_atoms / 8)] from bytes [rows x n_atoms] that are zero or not; both dense.
int pack_bits(const uint8_t* flags, int64_t rows, int64_t n_atoms, uint8_t* mask, Stream stream);

/// flags [rows x n_atoms], 0 or 1, from mask [rows x ceil(n_atoms / 8)]; both dense.
int unpack_bits(const uint8_t* mask, int64_t rows, int64_t n_atoms, uint8_t* flags, Stream stream);

/// y = z S + bias for a few rows, sums in float in a fixed order. Reads S once per kMaxFewRows rows
/// (once per row where z does not fit into the shared memory).
inline constexpr int kMaxFewRows = 4;
int multiply_few(const RowsOperand& z, const CodeOperand& s, const OutputOperand& y, Stream stream);

/// Whether multiply_tensor takes these operands: z of 16 bits, and coefficients that are exact in
/// its type (no scale per group).
bool tensor_cores_take(const RowsOperand& z, const CodeOperand& s);

/// y = z S + bias on the tensor cores, kTensorRows rows at a time. cudaErrorNotSupported (801) if
/// the columns do not fit into the device's shared memory; nothing has been started then.
inline constexpr int kTensorRows = 16;
int multiply_tensor(const RowsOperand& z,
                    const CodeOperand& s,
                    const OutputOperand& y,
                    Stream stream);

/// y = x D for at most kMaxFewRows rows, D [d_in x n] row-major of the dtype of x.
int multiply_dense(const RowsOperand& x,
                   const void* dictionary,
                   int64_t dictionary_stride,
                   int n,
                   const OutputOperand& y,
                   Stream stream);

/// Name and description of a status, in static storage.
const char* status_text(int status);

}  // namespace cospadi::cuda
