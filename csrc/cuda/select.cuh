// The largest of a row, by one thread block.
//
// Non-negative IEEE numbers order like the integers with their bits ("keys"). The key of the last
// one to be kept is found two bits at a time, each by one count of the row; ties with it are kept
// from the front.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/block.cuh"

namespace cospadi::cuda {

__device__ __forceinline__ uint32_t magnitude_key(float x) {
  return __float_as_uint(x) & 0x7fffffffU;
}

/// A negative score counts as 0, as -0 does.
__device__ __forceinline__ uint32_t score_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? 0U : bits;
}
__device__ __forceinline__ uint64_t score_key(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits >> 63 ? uint64_t{0} : bits;
}

/// What is kept of a row: keys above `key`, and those equal to it at positions up to `last_tie`.
template <class Key>
struct Threshold {
  Key key;
  int n_ties;  // of those equal to it
};

struct SelectShared {
  Counts counts[kWarp];
  Before before[kWarp];
  int last_tie;
};

/// The threshold for the `count` largest of n > count >= 1 keys; `key_at(i)` gives key i and may be
/// called by any thread.
template <class Key, class KeyAt>
__device__ Threshold<Key> find_threshold(const KeyAt& key_at,
                                         int n,
                                         int count,
                                         SelectShared* shared) {
  Key key = 0;  // the bits found so far: at least `count` keys are not below it
  int n_above = 0;
  for (int bit = static_cast<int>(sizeof(Key)) * 8 - 2; bit >= 0; bit -= 2) {
    const Key one = key | Key{1} << bit;
    const Key two = key | Key{2} << bit;
    const Key three = key | Key{3} << bit;
    Counts counts{0, 0, 0};
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
      const Key found = key_at(i);
      counts.a += found >= one;
      counts.b += found >= two;
      counts.c += found >= three;
    }
    counts = block_counts(counts, shared->counts);
    // the next bits are the largest that leave `count` keys; what is above them is known then, too
    if (counts.c >= count) {
      key = three;
    } else if (counts.b >= count) {
      key = two;
      n_above = counts.c;
    } else if (counts.a >= count) {
      key = one;
      n_above = counts.b;
    } else {
      n_above = counts.a;
    }
  }
  return {key, count - n_above};
}

/// Calls emit(i, rank) for the kept keys in a run of each thread; rank counts from 0 in ascending
/// order of i. Sets shared->last_tie to the position of the last tie that is kept.
template <class Key, class KeyAt, class Emit>
__device__ void for_each_kept(
    const KeyAt& key_at, int n, Threshold<Key> threshold, SelectShared* shared, const Emit& emit) {
  const Run run = thread_run(n);
  int n_above = 0;
  int n_equal = 0;
  for (int i = run.first; i < run.last; ++i) {
    const Key key = key_at(i);
    n_above += key > threshold.key;
    n_equal += key == threshold.key;
  }
  Before before = block_before(n_above, n_equal, shared->before);
  for (int i = run.first; i < run.last; ++i) {
    const Key key = key_at(i);
    const bool is_tie = key == threshold.key;
    const bool is_kept = key > threshold.key || (is_tie && before.b < threshold.n_ties);
    if (is_kept) emit(i, before.a + min(before.b, threshold.n_ties));
    if (is_tie && before.b == threshold.n_ties - 1) shared->last_tie = i;
    before.a += key > threshold.key;
    before.b += is_tie;
  }
}

}  // namespace cospadi::cuda
