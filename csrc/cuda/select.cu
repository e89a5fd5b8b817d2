// The largest scores of every row: one block per row.
#include "cuda/fit_kernels.hpp"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/select.cuh"

namespace cospadi::cuda {
namespace {

constexpr int kThreads = 256;
// A row up to this size waits in shared memory for its passes, a longer one in the L2 cache: every
// device from sm_80 on has this much.
constexpr int64_t kRowBytes = 96 * 1024;

template <class T, class Key, bool kInShared>
__global__ void __launch_bounds__(kThreads)
    select_kernel(const T* scores, int n, int count, int32_t* indices) {
  __shared__ SelectShared shared;
  const int64_t row = blockIdx.x;
  const T* own = scores + row * n;
  int32_t* out = indices + row * count;
  if (count == n) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
      out[i] = i;
    }
    return;
  }
  const Key* keys = nullptr;
  if constexpr (kInShared) {
    Key* copy = dynamic_shared<Key>();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
      copy[i] = score_key(own[i]);
    }
    __syncthreads();
    keys = copy;
  }
  const auto key_at = [&](int i) {
    return kInShared ? keys[i] : static_cast<Key>(score_key(own[i]));
  };
  const Threshold<Key> threshold = find_threshold<Key>(key_at, n, count, &shared);
  for_each_kept(key_at, n, threshold, &shared, [&](int i, int rank) { out[rank] = i; });
}

template <class T, class Key>
int select_rows(const T* scores,
                int64_t n_rows,
                int64_t n_scores,
                int64_t count,
                int32_t* indices,
                void* stream) {
  if (n_rows == 0) return 0;
  if (count < 1 || count > n_scores || n_scores >= int64_t{1} << 31 || n_rows >= int64_t{1} << 31) {
    return cudaErrorInvalidValue;
  }
  const auto row_bytes = n_scores * static_cast<int64_t>(sizeof(Key));
  const bool in_shared = count < n_scores && row_bytes <= kRowBytes;
  return launch(in_shared ? select_kernel<T, Key, true> : select_kernel<T, Key, false>,
                dim3(static_cast<unsigned>(n_rows)),
                dim3(threads_for(n_scores, kThreads)),
                in_shared ? static_cast<size_t>(row_bytes) : 0,
                static_cast<cudaStream_t>(stream),
                scores,
                static_cast<int>(n_scores),
                static_cast<int>(count),
                indices);
}

}  // namespace

const char* error_text(int status) noexcept {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

int select_largest(const float* scores,
                   int64_t n_rows,
                   int64_t n_scores,
                   int64_t count,
                   int32_t* indices,
                   void* stream) noexcept {
  return select_rows<float, uint32_t>(scores, n_rows, n_scores, count, indices, stream);
}

int select_largest(const double* scores,
                   int64_t n_rows,
                   int64_t n_scores,
                   int64_t count,
                   int32_t* indices,
                   void* stream) noexcept {
  return select_rows<double, uint64_t>(scores, n_rows, n_scores, count, indices, stream);
}

}  // namespace cospadi::cuda
