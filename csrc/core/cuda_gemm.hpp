// Checks in front of the CUDA launchers of csrc/cuda, and the device they run on.
//
// Addresses are device memory of `target.device`; the calls return when the kernels are in the
// stream, before they have run. Everything throws Error: kNoCuda in a build without CUDA,
// kInvalidArgument for sizes, formats and null pointers, kCuda for a launch that the device
// refused.
#pragma once

#include <cstdint>

#include "cuda/operands.hpp"

namespace cospadi {

/// Where kernels run: a stream of a device, as `cudaStream_t`; null is the default stream.
struct CudaTarget {
  int device = 0;
  cuda::Stream stream = nullptr;
};

/// Which kernel multiplies.
enum class CudaWay : int {
  kAuto = 0,
  kFew = 1,     ///< CUDA cores, cuda::kMaxFewRows rows per pass over S
  kTensor = 2,  ///< tensor cores, cuda::kTensorRows rows per pass
};

/// y = z S + bias; see cuda::multiply_few and cuda::multiply_tensor. y has z.rows rows.
void cuda_code_gemm(const cuda::RowsOperand& z,
                    const cuda::CodeOperand& s,
                    const cuda::OutputOperand& y,
                    CudaWay way,
                    const CudaTarget& target);

/// y = x D for at most cuda::kMaxFewRows rows; see cuda::multiply_dense.
void cuda_dense_gemm(const cuda::RowsOperand& x,
                     const void* dictionary,
                     int64_t dictionary_stride,
                     int64_t n,
                     const cuda::OutputOperand& y,
                     const CudaTarget& target);

/// See cuda::expand_code.
void cuda_expand(const cuda::CodeOperand& s,
                 DType dtype,
                 void* out,
                 int64_t out_stride,
                 const CudaTarget& target);

/// See cuda::decode_values.
void cuda_decode(const cuda::CodeOperand& s, float* out, const CudaTarget& target);

}  // namespace cospadi
