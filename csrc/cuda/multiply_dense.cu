// y = x D for a few rows, D [d_in x n] row-major: every byte of D is read once, 16 at a time.
//
// A block takes a strip of columns over all of d_in, so that nothing is summed between blocks. The
// strip is as narrow as it must be for every multiprocessor to have one: 32 bytes of a row are a
// whole sector of the memory. Each thread keeps kUnroll loads in flight while it multiplies the
// ones before.
#include <algorithm>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/values.cuh"

namespace cospadi::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kUnroll = 8;
constexpr int kSharedInputs = 8192;  // floats of x in shared memory: below what must be asked for

template <class T, int kVector>
struct alignas(kVector * sizeof(T)) Elements {
  T value[kVector];
};

struct DenseShape {
  int d_in = 0;
  int n = 0;
  int64_t stride = 0;
  int lanes = 1;  ///< of a row: threads side by side; a power of two, at most 32
};

template <class T, int kVector>
__device__ __forceinline__ void load_group(const T* column,
                                           const DenseShape& shape,
                                           int row,
                                           int row_step,
                                           int end,
                                           bool is_inside,
                                           Elements<T, kVector> (&out)[kUnroll]) {
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int k = row + i * row_step;
    if (is_inside && k < end) {
      out[i] = *reinterpret_cast<const Elements<T, kVector>*>(column + k * shape.stride);
    } else {
#pragma unroll
      for (int v = 0; v < kVector; ++v) from_float(0.0F, out[i].value[v]);
    }
  }
}

template <class T, int kVector, int kRows>
__global__ void __launch_bounds__(kThreads)
    dense_kernel(RowsOperand x, const T* dictionary, DenseShape shape, OutputOperand y) {
  float* shared = dynamic_shared<float>();
  constexpr int kChunk = kSharedInputs / kRows;  // of d_in
  const int tid = static_cast<int>(threadIdx.x);
  const int row_step = kThreads / shape.lanes;
  const int own_row = tid / shape.lanes;
  const int own_column = tid % shape.lanes * kVector;
  const int first_column = static_cast<int>(blockIdx.x) * shape.lanes * kVector;
  const bool is_inside = first_column + own_column < shape.n;
  const T* column = dictionary + first_column + own_column;
  float sum[kRows][kVector] = {};
  for (int chunk = 0; chunk < shape.d_in; chunk += kChunk) {
    const int end = min(chunk + kChunk, shape.d_in);
    Elements<T, kVector> now[kUnroll];
    // on their way while x is converted
    load_group<T, kVector>(column, shape, chunk + own_row, row_step, end, is_inside, now);
    if (chunk > 0) __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T* source = static_cast<const T*>(x.first) + r * x.first_stride;
#pragma unroll 4
      for (int k = chunk + tid; k < end; k += kThreads) {
        shared[r * kChunk + k - chunk] = r < x.rows ? to_float(source[k]) : 0.0F;
      }
    }
    __syncthreads();
    for (int row = chunk + own_row; row < end; row += kUnroll * row_step) {
      Elements<T, kVector> next[kUnroll];
      load_group<T, kVector>(
          column, shape, row + kUnroll * row_step, row_step, end, is_inside, next);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int k = row + i * row_step;
        if (k < end) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float input = shared[r * kChunk + k - chunk];
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              sum[r][v] = __fmaf_rn(to_float(now[i].value[v]), input, sum[r][v]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) now[i] = next[i];
    }
  }
  // over the lanes of a warp that hold the same columns, then over the warps
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      for (int offset = kWarpSize / 2; offset >= shape.lanes; offset /= 2) {
        sum[r][v] += __shfl_xor_sync(kAllLanes, sum[r][v], offset);
      }
    }
  }
  __syncthreads();  // x is done with
  const int width = shape.lanes * kVector;
  const int warp = tid / kWarpSize;
  if (tid % kWarpSize < shape.lanes) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        shared[(warp * kRows + r) * width + own_column + v] = sum[r][v];
      }
    }
  }
  __syncthreads();
  for (int i = tid; i < kRows * width; i += kThreads) {
    const int r = i / width;
    const int output = first_column + i - r * width;
    if (r >= x.rows || output >= shape.n) continue;
    float total = 0.0F;
    for (int w = 0; w < kWarps; ++w) total += shared[w * kRows * width + i];
    if (y.bias != nullptr) total += load_element(y.bias, y.bias_dtype, output);
    store_element(total, y.data, y.dtype, r * y.stride + output);
  }
}

template <class T, int kVector, int kRows>
int launch_dense(const RowsOperand& x,
                 const void* dictionary,
                 DenseShape shape,
                 const OutputOperand& y,
                 int n_multiprocessors,
                 Stream stream) {
  // the widest strip that still gives (nearly) every multiprocessor one
  shape.lanes = kVector == 1 ? kWarpSize : 16;
  while (shape.lanes > 2 && shape.lanes * kVector > 16 &&
         10 * ceil_div(shape.n, shape.lanes * kVector) < 9 * n_multiprocessors) {
    shape.lanes /= 2;
  }
  const auto grid = static_cast<unsigned>(ceil_div(shape.n, shape.lanes * kVector));
  const size_t shared_bytes = sizeof(float) * kSharedInputs;
  static_assert(kWarps * kRows * kWarpSize * kVector <= 2 * kSharedInputs);
  return launch(&dense_kernel<T, kVector, kRows>,
                grid,
                kThreads,
                shared_bytes,
                stream,
                x,
                static_cast<const T*>(dictionary),
                shape,
                y);
}

template <class T>
int launch_type(const RowsOperand& x,
                const void* dictionary,
                const DenseShape& shape,
                const OutputOperand& y,
                int n_multiprocessors,
                Stream stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool is_aligned = shape.n % kVector == 0 && shape.stride % kVector == 0 &&
                          reinterpret_cast<uintptr_t>(dictionary) % 16 == 0;
  const auto start = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    return is_aligned
               ? launch_dense<T, kVector, kRows>(x, dictionary, shape, y, n_multiprocessors, stream)
               : launch_dense<T, 1, kRows>(x, dictionary, shape, y, n_multiprocessors, stream);
  };
  if (x.rows == 1) return start(std::integral_constant<int, 1>{});
  if (x.rows == 2) return start(std::integral_constant<int, 2>{});
  return start(std::integral_constant<int, 4>{});
}

}  // namespace

int multiply_dense(const RowsOperand& x,
                   const void* dictionary,
                   int64_t dictionary_stride,
                   int n,
                   const OutputOperand& y,
                   Stream stream) {
  if (x.rows == 0 || n == 0) return cudaSuccess;
  if (x.rows > kMaxFewRows) return cudaErrorInvalidValue;
  int device = 0;
  int n_multiprocessors = 1;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const DenseShape shape{x.n_first, n, dictionary_stride, 1};
  switch (x.dtype) {
    case DType::kFloat32:
      return launch_type<float>(x, dictionary, shape, y, n_multiprocessors, stream);
    case DType::kBFloat16:
      return launch_type<__nv_bfloat16>(x, dictionary, shape, y, n_multiprocessors, stream);
    case DType::kFloat16:
      return launch_type<__half>(x, dictionary, shape, y, n_multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cospadi::cuda
