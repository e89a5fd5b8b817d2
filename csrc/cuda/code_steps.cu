// What sparse coders do between two matrix products, one block per row: the projection of the
// splitting, and a step of masked conjugate gradients. Fused, because as single operations they
// read and write the codes several times as often as they have to.
#include "cuda/fit_kernels.hpp"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/select.cuh"

namespace cospadi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kRowBytes = 96 * 1024;  // as in select.cu

struct ProjectShared {
  SelectShared select;
  int is_moved;
};

template <bool kInShared>
__global__ void __launch_bounds__(kThreads) project_kernel(const float* solution,
                                                           float* sparse,
                                                           float* dual,
                                                           const int32_t* last,
                                                           int n,
                                                           int count,
                                                           float a,
                                                           float b,
                                                           int32_t* indices,
                                                           int32_t* moved) {
  __shared__ ProjectShared shared;
  const int64_t row = blockIdx.x;
  const int first = static_cast<int>(threadIdx.x);
  const int step = static_cast<int>(blockDim.x);
  const float* own_solution = solution + row * n;
  float* own_sparse = sparse + row * n;
  float* own_dual = dual + row * n;
  int32_t* out = indices + row * count;
  const int32_t* before = last == nullptr ? nullptr : last + row * count;
  float* values = own_dual;
  if constexpr (kInShared) values = dynamic_shared<float>();
  if (threadIdx.x == 0) {
    shared.is_moved = 0;
    shared.select.last_tie = -1;
  }
  for (int i = first; i < n; i += step) {
    // rounded after every operation, as torch does on the CPU
    const float sum = __fadd_rn(__fmul_rn(a, own_solution[i]), __fmul_rn(b, own_sparse[i]));
    values[i] = __fadd_rn(own_dual[i], sum);
  }
  __syncthreads();
  const auto key_at = [&](int i) { return magnitude_key(values[i]); };
  // where all of a row is kept, every key is above 0 or a tie with it
  Threshold<uint32_t> threshold{0, n};
  if (count < n) threshold = find_threshold<uint32_t>(key_at, n, count, &shared.select);
  bool is_other = false;
  for_each_kept(key_at, n, threshold, &shared.select, [&](int i, int rank) {
    is_other |= before != nullptr && before[rank] != i;
    out[rank] = i;
  });
  if (is_other) shared.is_moved = 1;
  __syncthreads();
  const int last_tie = count < n ? shared.select.last_tie : n;
  for (int i = first; i < n; i += step) {
    const float value = values[i];
    const uint32_t key = magnitude_key(value);
    const bool is_kept = key > threshold.key || (key == threshold.key && i <= last_tie);
    own_sparse[i] = is_kept ? value : 0.0F;
    // value - value is a zero, or NaN for what is not finite
    own_dual[i] = is_kept ? __fsub_rn(value, value) : value;
  }
  if (threadIdx.x == 0 && shared.is_moved != 0) *moved = 1;
}

__global__ void __launch_bounds__(kThreads) gradient_kernel(const float* product,
                                                            const float* mask,
                                                            const float* inverse_diagonal,
                                                            const float* enough,
                                                            float* x,
                                                            float* residual,
                                                            float* direction,
                                                            float* energy,
                                                            int n) {
  __shared__ float sums[kWarp];
  const int64_t row = blockIdx.x;
  const float old_energy = energy[row];
  if (!(old_energy > enough[row])) return;
  const int64_t start = row * n;
  const int first = static_cast<int>(threadIdx.x);
  const int step = static_cast<int>(blockDim.x);
  float curvature = 0.0F;
  for (int i = first; i < n; i += step) {
    const int64_t at = start + i;
    curvature += direction[at] * product[at] * mask[at];
  }
  curvature = block_sum(curvature, sums);
  const float length = curvature > 0.0F ? old_energy / curvature : 0.0F;
  float new_energy = 0.0F;
  for (int i = first; i < n; i += step) {
    const int64_t at = start + i;
    x[at] += length * direction[at];
    const float rest = residual[at] - length * product[at] * mask[at];
    residual[at] = rest;
    new_energy += rest * rest * inverse_diagonal[at];
  }
  new_energy = block_sum(new_energy, sums);
  const float beta = old_energy > 0.0F ? new_energy / old_energy : 0.0F;
  for (int i = first; i < n; i += step) {
    const int64_t at = start + i;
    direction[at] = residual[at] * inverse_diagonal[at] + beta * direction[at];
  }
  if (threadIdx.x == 0) energy[row] = new_energy;
}

bool is_launchable(int64_t n_rows, int64_t n_columns) {
  return n_columns >= 1 && n_columns < int64_t{1} << 31 && n_rows < int64_t{1} << 31;
}

}  // namespace

int project_rows(const float* solution,
                 float* sparse,
                 float* dual,
                 const int32_t* last,
                 int64_t n_rows,
                 int64_t n_columns,
                 int64_t count,
                 float a,
                 float b,
                 int32_t* indices,
                 int32_t* moved,
                 void* stream) noexcept {
  if (n_rows == 0) return 0;
  if (!is_launchable(n_rows, n_columns) || count < 1 || count > n_columns) {
    return cudaErrorInvalidValue;
  }
  const int64_t row_bytes = n_columns * static_cast<int64_t>(sizeof(float));
  const bool in_shared = row_bytes <= kRowBytes;
  return launch(in_shared ? project_kernel<true> : project_kernel<false>,
                dim3(static_cast<unsigned>(n_rows)),
                dim3(threads_for(n_columns, kThreads)),
                in_shared ? static_cast<size_t>(row_bytes) : 0,
                static_cast<cudaStream_t>(stream),
                solution,
                sparse,
                dual,
                last,
                static_cast<int>(n_columns),
                static_cast<int>(count),
                a,
                b,
                indices,
                moved);
}

int gradient_step(const float* product,
                  const float* mask,
                  const float* inverse_diagonal,
                  const float* enough,
                  float* x,
                  float* residual,
                  float* direction,
                  float* energy,
                  int64_t n_rows,
                  int64_t n_columns,
                  void* stream) noexcept {
  if (n_rows == 0 || n_columns == 0) return 0;
  if (!is_launchable(n_rows, n_columns)) return cudaErrorInvalidValue;
  return launch(gradient_kernel,
                dim3(static_cast<unsigned>(n_rows)),
                dim3(threads_for(n_columns, kThreads)),
                0,
                static_cast<cudaStream_t>(stream),
                product,
                mask,
                inverse_diagonal,
                enough,
                x,
                residual,
                direction,
                energy,
                static_cast<int>(n_columns));
}

}  // namespace cospadi::cuda
