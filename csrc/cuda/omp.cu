// Exact OMP and ORMP, one thread block per signal.
//
// The method and its arithmetic are those of cpu/omp_kernel.inl: for every chosen atom a row of the
// history, h = (g - sum_t w_t h_t) / pivot over all atoms, from which correlations and energies are
// updated. What bounds it is reading the history, some 2 K s^2 bytes per signal if it were read for
// every atom. So one pass over it makes the rows of the best kPass atoms, most of which are chosen
// soon; a row waits in a pool of kPool rows, and the few steps since its pass are subtracted when
// it is used. Which rows are made ahead changes no sum.
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/block.cuh"
#include "cuda/fit_kernels.hpp"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace cospadi::cuda {
namespace {

// Inlined, the parts of a step would share one allocation of registers and spill inside of loops.
#define COSPADI_OWN_REGISTERS __attribute__((noinline))

constexpr int kMaxThreads = 512;
constexpr int kPass = 8;          // rows per pass over the history
constexpr int kPool = 32;         // rows that wait: one per lane of a warp
constexpr int kChunk = 128;       // history rows whose weights lie in shared memory at a time
constexpr int kEnergyNoise = 64;  // epsilons of rounding error that every energy starts with

template <class T>
__device__ constexpr T epsilon() {
  return sizeof(T) == 4 ? T(FLT_EPSILON) : T(DBL_EPSILON);
}

// An atom whose squared distance from the span of the chosen ones is not above this is dependent;
// cospadi::omp_dependence_tolerance.
template <class T>
__device__ constexpr T dependence_tolerance() {
  return sizeof(T) == 4 ? T(1e-5) : T(1e-10);
}

__host__ __device__ constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// One signal's part of the workspace.
template <class T>
struct State {
  int64_t stride;     // of rows over atoms
  T* history;         // [sparsity x stride] h_t
  T* pool;            // [kPool x stride] rows made ahead, before the division by their pivot
  T* correlation;     // [stride] with the residual
  T* energy;          // [stride] squared distances from the span; 0: not to be chosen
  T* noise;           // [stride] how much of an energy is rounding error
  T* pivots;          // [sparsity]
  T* explained;       // [sparsity] z_t, then the coefficients
  int32_t* chosen;    // [sparsity] atoms by step
  int32_t* rank;      // [stride] step of an atom, or -1
  int32_t* pool_row;  // [stride] of an atom, or -1
};

template <class T>
__host__ __device__ int64_t state_bytes(int64_t n_atoms, int64_t sparsity) {
  const int64_t stride = round_up(n_atoms, 32);
  const int64_t elements = (sparsity + kPool + 3) * stride + 2 * sparsity;
  return round_up(elements * static_cast<int64_t>(sizeof(T)) + (sparsity + 2 * stride) * 4, 256);
}

template <class T>
__device__ State<T> place(char* memory, int64_t n_atoms, int64_t sparsity) {
  State<T> state{};
  state.stride = round_up(n_atoms, 32);
  T* next = reinterpret_cast<T*>(memory);
  const auto take = [&](int64_t n) {
    T* part = next;
    next += n;
    return part;
  };
  state.history = take(sparsity * state.stride);
  state.pool = take(kPool * state.stride);
  state.correlation = take(state.stride);
  state.energy = take(state.stride);
  state.noise = take(state.stride);
  state.pivots = take(sparsity);
  state.explained = take(sparsity);
  auto* integers = reinterpret_cast<int32_t*>(next);
  state.chosen = integers;
  state.rank = integers + sparsity;
  state.pool_row = state.rank + state.stride;
  return state;
}

template <class T>
struct Problem {
  const T* gram;
  const T* scales;
  int n_atoms;
  int sparsity;
  bool is_ormp;
};

template <class T>
struct Shared {
  Best<T> best[kWarp];
  T sums[kWarp];
  Before before[kWarp];
  T weights[kChunk * kPass];
  int32_t pool_atom[kPool];   // -1: free
  int32_t pool_steps[kPool];  // history rows that are subtracted already
  int32_t pass_rows[kPass];
};

template <class T>
__device__ __forceinline__ T score_of(T correlation, T energy, bool is_ormp) {
  if (!(energy > dependence_tolerance<T>())) return T(-1);
  const T square = correlation * correlation;
  return is_ormp ? square / energy : square;
}

/// The best atom; with `is_without_row` among those that have no row in the pool.
template <class T>
__device__ Best<T> best_atom(const Problem<T>& problem,
                             const State<T>& state,
                             bool is_without_row,
                             Shared<T>* shared) {
  Best<T> best{T(-1), problem.n_atoms};
  for (int j = static_cast<int>(threadIdx.x); j < problem.n_atoms;
       j += static_cast<int>(blockDim.x)) {
    if (is_without_row && state.pool_row[j] >= 0) continue;
    best.take(score_of(state.correlation[j], state.energy[j], problem.is_ormp), j);
  }
  return block_best(best, shared->best);
}

/// Nothing chosen; correlations scaled by `scale` and the atoms' own scales.
template <class T>
__device__ void reset(const Problem<T>& problem,
                      const State<T>& state,
                      const T* correlations,
                      T scale,
                      Shared<T>* shared) {
  for (int j = static_cast<int>(threadIdx.x); j < problem.n_atoms;
       j += static_cast<int>(blockDim.x)) {
    state.correlation[j] = correlations[j] * scale * problem.scales[j];
    state.energy[j] = problem.scales[j] > T(0) ? T(1) : T(0);
    state.noise[j] = kEnergyNoise * epsilon<T>();
    state.rank[j] = -1;
    state.pool_row[j] = -1;
  }
  for (int i = static_cast<int>(threadIdx.x); i < kPool; i += static_cast<int>(blockDim.x)) {
    shared->pool_atom[i] = -1;
  }
  __syncthreads();
}

/// Power of two that brings the largest correlation to about 1, as on the CPU.
template <class T>
__device__ int correlation_exponent(const T* correlations, int n, Shared<T>* shared) {
  Best<T> largest{T(0), 0};
  for (int j = static_cast<int>(threadIdx.x); j < n; j += static_cast<int>(blockDim.x)) {
    largest.take(correlations[j] < T(0) ? -correlations[j] : correlations[j], j);
  }
  largest = block_best(largest, shared->best);
  int exponent = 0;
  std::frexp(largest.score, &exponent);
  const int smallest = (sizeof(T) == 4 ? FLT_MIN_EXP : DBL_MIN_EXP) + 3;
  return max(exponent, smallest);
}

/// Frees pool rows until `n_wanted` are free, those whose atoms score lowest now, and lists that
/// many free rows in shared->pass_rows.
template <class T>
__device__ void free_pool_rows(const Problem<T>& problem,
                               const State<T>& state,
                               int n_wanted,
                               Shared<T>* shared) {
  if (warp_id() == 0) {
    const int lane = lane_id();
    const int atom = shared->pool_atom[lane];
    bool is_free = atom < 0;
    T score = T(0);
    if (!is_free) score = score_of(state.correlation[atom], state.energy[atom], problem.is_ormp);
    for (;;) {
      const unsigned free_lanes = __ballot_sync(kAllLanes, is_free ? 1 : 0);
      if (__popc(free_lanes) >= n_wanted) {
        const int order = __popc(free_lanes & ((1U << lane) - 1U));
        if (is_free && order < n_wanted) shared->pass_rows[order] = lane;
        break;
      }
      // the best of the negated scores is the worst; free rows are out of the question
      const Best<T> worst = warp_best(Best<T>{is_free ? T(-FLT_MAX) : -score, lane});
      if (lane == worst.index) {
        state.pool_row[atom] = -1;
        shared->pool_atom[lane] = -1;
        is_free = true;
      }
    }
  }
  __syncthreads();
}

/// One pass over the history: rows for `first` and the next best atoms without one.
template <class T>
COSPADI_OWN_REGISTERS __device__ void fill_pool(
    const Problem<T>& problem, const State<T>& state, int first, int step, Shared<T>* shared) {
  const int n_left = problem.sparsity - 1 - step;
  const int n_wanted = min(kPass, n_left);
  free_pool_rows(problem, state, n_wanted, shared);
  int n_rows = 0;
  int atom = first;
  for (;;) {
    if (threadIdx.x == 0) {
      const int row = shared->pass_rows[n_rows];
      shared->pool_atom[row] = atom;
      shared->pool_steps[row] = step;
      state.pool_row[atom] = row;
    }
    __syncthreads();
    if (++n_rows == n_wanted) break;
    const Best<T> next = best_atom(problem, state, true, shared);
    if (!(next.score >= T(0))) break;
    atom = next.index;
  }
  const int n_atoms = problem.n_atoms;
  const int stride = static_cast<int>(state.stride);
  for (int begin = 0; begin == 0 || begin < step; begin += kChunk) {
    const int n_here = min(kChunk, step - begin);
    for (int i = static_cast<int>(threadIdx.x); i < n_here * kPass;
         i += static_cast<int>(blockDim.x)) {
      const int t = i / kPass;
      const int r = i % kPass;
      T weight = T(0);
      if (r < n_rows) {
        const int64_t other = shared->pool_atom[shared->pass_rows[r]];
        weight = state.history[int64_t{begin + t} * stride + other];
      }
      shared->weights[i] = weight;
    }
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < n_atoms; j += static_cast<int>(blockDim.x)) {
      T sums[kPass];
#pragma unroll
      for (int r = 0; r < kPass; ++r) {
        sums[r] = T(0);
        if (r >= n_rows) continue;
        const int row = shared->pass_rows[r];
        sums[r] = begin == 0 ? problem.gram[int64_t{shared->pool_atom[row]} * n_atoms + j]
                             : state.pool[int64_t{row} * stride + j];
      }
      const T* column = state.history + int64_t{begin} * stride + j;
#pragma unroll 8
      for (int t = 0; t < n_here; ++t) {
        const T h = column[int64_t{t} * stride];
#pragma unroll
        for (int r = 0; r < kPass; ++r) sums[r] -= shared->weights[t * kPass + r] * h;
      }
#pragma unroll
      for (int r = 0; r < kPass; ++r) {
        if (r < n_rows) state.pool[int64_t{shared->pass_rows[r]} * stride + j] = sums[r];
      }
    }
    __syncthreads();
  }
}

/// Finishes the history row of the atom chosen at `step` from its pool row, and updates
/// correlations and energies; the best atom then.
template <class T>
COSPADI_OWN_REGISTERS __device__ Best<T> sweep(const Problem<T>& problem,
                                               const State<T>& state,
                                               int atom,
                                               int step,
                                               T pivot,
                                               T explained,
                                               T pivot_noise,
                                               Shared<T>* shared) {
  const int row = state.pool_row[atom];
  const int first_step = shared->pool_steps[row];
  const int stride = static_cast<int>(state.stride);
  const T inverse_pivot = T(1) / pivot;
  // The pivot's energy is known to a relative error, which goes into every h^2 and stays there.
  const T pivot_error = pivot_noise * inverse_pivot * inverse_pivot;
  Best<T> best{T(-1), problem.n_atoms};
  for (int j = static_cast<int>(threadIdx.x); j < problem.n_atoms;
       j += static_cast<int>(blockDim.x)) {
    T value = state.pool[int64_t{row} * stride + j];
    for (int t = first_step; t < step; ++t) {
      const T* past = state.history + int64_t{t} * stride;
      value -= past[atom] * past[j];
    }
    const T h = value * inverse_pivot;
    state.history[int64_t{step} * stride + j] = h;
    const T correlation = state.correlation[j] - h * explained;
    const T noise = state.noise[j] + h * h * pivot_error;
    T energy = j == atom ? T(0) : state.energy[j] - h * h;
    energy = energy > noise ? energy : T(0);
    state.correlation[j] = correlation;
    state.noise[j] = noise;
    state.energy[j] = energy;
    best.take(score_of(correlation, energy, problem.is_ormp), j);
  }
  return block_best(best, shared->best);
}

/// Coefficients by back-substitution, written in ascending order of atoms; what is missing is
/// filled up with the first other atoms at 0.
template <class T>
COSPADI_OWN_REGISTERS __device__ void write_code(const Problem<T>& problem,
                                                 const State<T>& state,
                                                 int n_chosen,
                                                 int exponent,
                                                 int32_t* indices,
                                                 T* coeffs,
                                                 Shared<T>* shared) {
  const int stride = static_cast<int>(state.stride);
  for (int t = n_chosen - 1; t >= 0; --t) {
    const T x = state.explained[t] / state.pivots[t];
    const int atom = state.chosen[t];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i <= t; i += static_cast<int>(blockDim.x)) {
      if (i == t) {
        state.explained[t] = x;
      } else {
        state.explained[i] -= x * state.history[int64_t{i} * stride + atom];
      }
    }
    __syncthreads();
  }
  const int n_missing = problem.sparsity - n_chosen;
  const Run run = thread_run(problem.n_atoms);
  int n_used = 0;
  for (int j = run.first; j < run.last; ++j) n_used += state.rank[j] >= 0;
  Before before = block_before(n_used, run.last - run.first - n_used, shared->before);
  for (int j = run.first; j < run.last; ++j) {
    const int rank = state.rank[j];
    if (rank >= 0 || before.b < n_missing) {
      const int at = before.a + min(before.b, n_missing);
      indices[at] = j;
      coeffs[at] =
          rank < 0 ? T(0) : std::ldexp(state.explained[rank] * problem.scales[j], exponent);
    }
    before.a += rank >= 0;
    before.b += rank < 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) omp_kernel(Problem<T> problem,
                                                             const T* correlations,
                                                             int64_t n_signals,
                                                             char* workspace,
                                                             int64_t signal_bytes,
                                                             int32_t* indices,
                                                             T* coeffs,
                                                             unsigned long long* n_padded) {
  __shared__ Shared<T> shared;
  const State<T> state =
      place<T>(workspace + blockIdx.x * signal_bytes, problem.n_atoms, problem.sparsity);
  unsigned long long n_filled = 0;
  for (int64_t signal = blockIdx.x; signal < n_signals; signal += gridDim.x) {
    const T* own = correlations + signal * problem.n_atoms;
    const int exponent = correlation_exponent(own, problem.n_atoms, &shared);
    reset(problem, state, own, std::ldexp(T(1), -exponent), &shared);
    int step = 0;
    Best<T> best = best_atom(problem, state, false, &shared);
    for (; step < problem.sparsity && best.score >= T(0); ++step) {
      const int atom = best.index;
      const bool is_last = step + 1 == problem.sparsity;
      if (!is_last && state.pool_row[atom] < 0) {
        fill_pool(problem, state, atom, step, &shared);
      }
      const T pivot = std::sqrt(state.energy[atom]);
      const T explained = state.correlation[atom] / pivot;
      const T pivot_noise = state.noise[atom];
      __syncthreads();  // everybody has read them
      if (threadIdx.x == 0) {
        state.pivots[step] = pivot;
        state.explained[step] = explained;
        state.chosen[step] = atom;
        state.rank[atom] = step;
      }
      if (is_last) {
        __syncthreads();
        continue;
      }
      best = sweep(problem, state, atom, step, pivot, explained, pivot_noise, &shared);
      if (threadIdx.x == 0) {
        shared.pool_atom[state.pool_row[atom]] = -1;
        state.pool_row[atom] = -1;
      }
      __syncthreads();
    }
    write_code(problem,
               state,
               step,
               exponent,
               indices + signal * problem.sparsity,
               coeffs + signal * problem.sparsity,
               &shared);
    n_filled += static_cast<unsigned long long>(problem.sparsity - step);
    __syncthreads();
  }
  if (threadIdx.x == 0 && n_filled != 0) atomicAdd(n_padded, n_filled);
}

template <class T>
int encode(const T* gram,
           const T* scales,
           const T* correlations,
           int64_t n_signals,
           int64_t n_atoms,
           int64_t sparsity,
           bool is_ormp,
           void* workspace,
           int64_t workspace_bytes,
           int32_t* indices,
           T* coeffs,
           unsigned long long* n_padded,
           void* stream) {
  if (n_signals == 0) return 0;
  constexpr int64_t kMostAtoms = int64_t{1} << 30;
  if (n_atoms < 1 || n_atoms > kMostAtoms || sparsity < 1 || sparsity > n_atoms) {
    return cudaErrorInvalidValue;
  }
  const int64_t signal_bytes = state_bytes<T>(n_atoms, sparsity);
  const int64_t n_blocks = std::min(n_signals, workspace_bytes / signal_bytes);
  if (n_blocks < 1) return cudaErrorMemoryAllocation;
  const Problem<T> problem{
      gram, scales, static_cast<int>(n_atoms), static_cast<int>(sparsity), is_ormp};
  return launch(omp_kernel<T>,
                dim3(static_cast<unsigned>(n_blocks)),
                dim3(threads_for(n_atoms, kMaxThreads)),
                0,
                static_cast<cudaStream_t>(stream),
                problem,
                correlations,
                n_signals,
                static_cast<char*>(workspace),
                signal_bytes,
                indices,
                coeffs,
                n_padded);
}

#undef COSPADI_OWN_REGISTERS

}  // namespace

int64_t omp_signal_bytes(int64_t n_atoms, int64_t sparsity, int element_bytes) noexcept {
  return element_bytes == 4 ? state_bytes<float>(n_atoms, sparsity)
                            : state_bytes<double>(n_atoms, sparsity);
}

int omp_encode(const float* gram,
               const float* scales,
               const float* correlations,
               int64_t n_signals,
               int64_t n_atoms,
               int64_t sparsity,
               bool is_ormp,
               void* workspace,
               int64_t workspace_bytes,
               int32_t* indices,
               float* coeffs,
               unsigned long long* n_padded,
               void* stream) noexcept {
  return encode(gram,
                scales,
                correlations,
                n_signals,
                n_atoms,
                sparsity,
                is_ormp,
                workspace,
                workspace_bytes,
                indices,
                coeffs,
                n_padded,
                stream);
}

int omp_encode(const double* gram,
               const double* scales,
               const double* correlations,
               int64_t n_signals,
               int64_t n_atoms,
               int64_t sparsity,
               bool is_ormp,
               void* workspace,
               int64_t workspace_bytes,
               int32_t* indices,
               double* coeffs,
               unsigned long long* n_padded,
               void* stream) noexcept {
  return encode(gram,
                scales,
                correlations,
                n_signals,
                n_atoms,
                sparsity,
                is_ormp,
                workspace,
                workspace_bytes,
                indices,
                coeffs,
                n_padded,
                stream);
}

}  // namespace cospadi::cuda
