// Dense and decoded forms of S, and masks as bytes: one pass over memory each.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/operands.hpp"
#include "cuda/values.cuh"

namespace cospadi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kMaxBlocks = int64_t{1} << 20;  // a grid stride covers the rest

int blocks_for(int64_t items, int64_t per_block) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(items, per_block), 1, kMaxBlocks));
}

/// A warp per output: the population of each word, summed over the lanes below, says where the
/// coefficients of a word begin; then all lanes write one word at a time, side by side.
template <class Out>
__global__ void __launch_bounds__(kThreads) expand_kernel(CodeOperand s, Out* out, int64_t stride) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int n_words = (s.n_atoms + kWarpSize - 1) / kWarpSize;
  int64_t output = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  for (; output < s.d_out; output += static_cast<int64_t>(gridDim.x) * kWarps) {
    int before = 0;  // coefficients of the words up to `first`
    for (int first = 0; first < n_words; first += kWarpSize) {
      const uint32_t own = load_mask_word(s, output, first + lane);
      const int own_start = before + sum_of_lower_lanes(__popc(own), lane);
      const int n_here = min(kWarpSize, n_words - first);
      for (int i = 0; i < n_here; ++i) {
        const uint32_t bits = __shfl_sync(kAllLanes, own, i);
        const int start = __shfl_sync(kAllLanes, own_start, i);
        const int atom = kWarpSize * (first + i) + lane;
        if (atom >= s.n_atoms) continue;
        const int t = start + __popc(bits & low_bits(lane));
        // a mask that lies never reads beyond the coefficients
        const bool is_set = (bits >> lane & 1) != 0 && t < s.sparsity;
        from_float(is_set ? load_value(s, output, t) : 0.0F, out[output * stride + atom]);
      }
      before = __shfl_sync(kAllLanes, own_start + __popc(own), kWarpSize - 1);
    }
  }
}

__global__ void __launch_bounds__(kThreads) decode_kernel(CodeOperand s, float* out) {
  const int64_t n = static_cast<int64_t>(s.d_out) * s.sparsity;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < n; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t output = i / s.sparsity;
    out[i] = load_value(s, output, static_cast<int>(i - output * s.sparsity));
  }
}

__global__ void __launch_bounds__(kThreads)
    pack_bits_kernel(const uint8_t* flags, int64_t rows, int64_t n_atoms, uint8_t* mask) {
  const int64_t row_bytes = ceil_div(n_atoms, 8);
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < rows * row_bytes; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / row_bytes;
    const int64_t atom = 8 * (i - row * row_bytes);
    const uint8_t* source = flags + row * n_atoms + atom;
    const int n_bits = static_cast<int>(n_atoms - atom < 8 ? n_atoms - atom : 8);
    uint32_t byte = 0;
    for (int k = 0; k < n_bits; ++k) byte |= source[k] != 0 ? 1U << k : 0U;
    mask[i] = static_cast<uint8_t>(byte);
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack_bits_kernel(const uint8_t* mask, int64_t rows, int64_t n_atoms, uint8_t* flags) {
  const int64_t row_bytes = ceil_div(n_atoms, 8);
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < rows * n_atoms; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / n_atoms;
    const int64_t atom = i - row * n_atoms;
    flags[i] = mask[row * row_bytes + atom / 8] >> (atom % 8) & 1;
  }
}

}  // namespace

int expand_code(const CodeOperand& s, DType dtype, void* out, int64_t out_stride, Stream stream) {
  if (s.d_out == 0 || s.n_atoms == 0) return cudaSuccess;
  const int grid = blocks_for(s.d_out, kWarps);
  switch (dtype) {
    case DType::kFloat32:
      return launch(&expand_kernel<float>,
                    grid,
                    kThreads,
                    0,
                    stream,
                    s,
                    static_cast<float*>(out),
                    out_stride);
    case DType::kBFloat16:
      return launch(&expand_kernel<__nv_bfloat16>,
                    grid,
                    kThreads,
                    0,
                    stream,
                    s,
                    static_cast<__nv_bfloat16*>(out),
                    out_stride);
    case DType::kFloat16:
      return launch(&expand_kernel<__half>,
                    grid,
                    kThreads,
                    0,
                    stream,
                    s,
                    static_cast<__half*>(out),
                    out_stride);
  }
  return cudaErrorInvalidValue;
}

int decode_values(const CodeOperand& s, float* out, Stream stream) {
  const int64_t n = static_cast<int64_t>(s.d_out) * s.sparsity;
  if (n == 0) return cudaSuccess;
  return launch(&decode_kernel, blocks_for(n, kThreads), kThreads, 0, stream, s, out);
}

int pack_bits(const uint8_t* flags, int64_t rows, int64_t n_atoms, uint8_t* mask, Stream stream) {
  const int64_t n = rows * ceil_div(n_atoms, 8);
  if (n == 0) return cudaSuccess;
  return launch(
      &pack_bits_kernel, blocks_for(n, kThreads), kThreads, 0, stream, flags, rows, n_atoms, mask);
}

int unpack_bits(const uint8_t* mask, int64_t rows, int64_t n_atoms, uint8_t* flags, Stream stream) {
  const int64_t n = rows * n_atoms;
  if (n == 0) return cudaSuccess;
  return launch(&unpack_bits_kernel,
                blocks_for(n, kThreads),
                kThreads,
                0,
                stream,
                mask,
                rows,
                n_atoms,
                flags);
}

}  // namespace cospadi::cuda
