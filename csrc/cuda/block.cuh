// What the threads of a block do together: sums, maxima, prefix sums. All threads call them; the
// block has whole warps, at most 32. `shared` is memory for 32 values that nothing else uses; it is
// free again when the function returns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cospadi::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int n_warps() { return static_cast<int>(blockDim.x) / kWarp; }

/// Threads for a block that works on `n` elements.
inline unsigned threads_for(int64_t n, int most) {
  const int64_t warps = (n + kWarp - 1) / kWarp;
  return static_cast<unsigned>(warps * kWarp < most ? warps * kWarp : most);
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

/// Sum over the block, in every thread; the order of the sum is fixed.
template <class T>
__device__ T block_sum(T value, T* shared) {
  value = warp_sum(value);
  if (lane_id() == 0) shared[warp_id()] = value;
  __syncthreads();
  value = lane_id() < n_warps() ? shared[lane_id()] : T(0);
  value = warp_sum(value);
  __syncthreads();
  return value;
}

/// Three counts at once.
struct Counts {
  int a, b, c;
};

__device__ inline Counts block_counts(Counts counts, Counts* shared) {
  counts = {warp_sum(counts.a), warp_sum(counts.b), warp_sum(counts.c)};
  if (lane_id() == 0) shared[warp_id()] = counts;
  __syncthreads();
  counts = lane_id() < n_warps() ? shared[lane_id()] : Counts{0, 0, 0};
  counts = {warp_sum(counts.a), warp_sum(counts.b), warp_sum(counts.c)};
  __syncthreads();
  return counts;
}

/// How much the threads before this one have of two things.
struct Before {
  int a, b;
};

__device__ inline Before block_before(int a, int b, Before* shared) {
  int sum_a = a;
  int sum_b = b;
  for (int step = 1; step < kWarp; step *= 2) {
    const int below_a = __shfl_up_sync(kAllLanes, sum_a, static_cast<unsigned>(step));
    const int below_b = __shfl_up_sync(kAllLanes, sum_b, static_cast<unsigned>(step));
    if (lane_id() >= step) {
      sum_a += below_a;
      sum_b += below_b;
    }
  }
  if (lane_id() == kWarp - 1) shared[warp_id()] = {sum_a, sum_b};
  __syncthreads();
  Before before{sum_a - a, sum_b - b};
  for (int warp = 0; warp < warp_id(); ++warp) {
    before.a += shared[warp].a;
    before.b += shared[warp].b;
  }
  __syncthreads();
  return before;
}

/// A score and where it is; the better of two has the higher score, of equal ones the lower index.
template <class T>
struct Best {
  T score;
  int index;

  __device__ void take(T other_score, int other_index) {
    const bool is_better = other_score > score || (other_score == score && other_index < index);
    score = is_better ? other_score : score;
    index = is_better ? other_index : index;
  }
};

template <class T>
__device__ Best<T> warp_best(Best<T> best) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T score = __shfl_xor_sync(kAllLanes, best.score, step);
    const int index = __shfl_xor_sync(kAllLanes, best.index, step);
    best.take(score, index);
  }
  return best;
}

/// The best of the block, in every thread.
template <class T>
__device__ Best<T> block_best(Best<T> best, Best<T>* shared) {
  best = warp_best(best);
  if (lane_id() == 0) shared[warp_id()] = best;
  __syncthreads();
  best = shared[lane_id() < n_warps() ? lane_id() : 0];
  best = warp_best(best);
  __syncthreads();
  return best;
}

/// The part of 0 .. n - 1 that belongs to this thread when every thread gets a run of neighbours;
/// odd lengths, so that a warp's accesses to shared memory spread over the banks.
struct Run {
  int first, last;
};

__device__ inline Run thread_run(int n) {
  const int n_threads = static_cast<int>(blockDim.x);
  const int length = ((n + n_threads - 1) / n_threads) | 1;
  const int first = min(n, static_cast<int>(threadIdx.x) * length);
  return {first, min(n, first + length)};
}

}  // namespace cospadi::cuda
