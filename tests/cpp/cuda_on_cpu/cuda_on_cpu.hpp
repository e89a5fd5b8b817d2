// CUDA kernels run on the CPU, thread block by thread block, for tests on machines without a GPU.
//
// How to use it
//   1. A kernel file (.cu, .cuh) includes <cuda_runtime.h>, <cuda_fp16.h>, <cuda_bf16.h> and
//      "cuda/ptx.cuh" as usual. A test compiled with this folder in front of the include path gets
//      the stand-ins that lie here, and simply includes the kernel file: `#include "cuda/mask.cu"`.
//      In CMake: cospadi_cuda_on_cpu_test(test_cuda_mask).
//   2. Kernels start through cudaLaunchKernelEx (cuda/launch.cuh), not <<<>>>, which is no C++.
//   3. Dynamic shared memory comes from `dynamic_shared<T>()`, assembly from the wrappers of
//      cuda/ptx.cuh: those two are replaced here, everything else is the kernel as it is.
//   4. Operands in memory that ends at a page without access (guarded.hpp) catch reads beyond it.
// What is noticed (as a std::runtime_error out of the launch, naming block, thread and line)
//   - a barrier or warp operation that some threads never reach, reach elsewhere in the source, or
//     with another mask or width; a lane that reads a register of a lane outside of the mask;
//   - launches that no device accepts: too many threads, too much shared memory, or more than 48
//   KiB
//     of it without cudaFuncSetAttribute (these return an error status, as on a device);
//   - misaligned vector accesses and shifts beyond the width (the tests are built with UBSan);
//   - shared memory that nothing wrote: it starts as NaN in every type; that beyond its end faults.
//     Arrays declared __shared__ are neither poisoned nor guarded: prefer dynamic_shared;
//   - cp.async data used before its wait: copies happen at the wait, not before.
//   - missing barriers, by their effect: threads run one after another, in the order that
//     set_schedule chooses (forward, reverse, shuffled). Run a test under all three.
// What is not: speed, bank conflicts, coalescing, memory order, blocks that wait for each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

// Of the running thread; set whenever another one runs.
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

namespace cuda_on_cpu {

using Where = std::source_location;

enum class Schedule {
  kForward,   ///< threads and blocks in ascending order
  kReverse,   ///< in descending order
  kShuffled,  ///< in an order drawn anew for each turn, the same in every run of the program
};

/// The order of all launches from now on.
void set_schedule(Schedule schedule);

/// What cudaDeviceGetAttribute answers for the number of multiprocessors; 4 at first.
void set_multiprocessors(int count);

/// Launches so far: for tests of how many kernels a function starts.
int64_t launch_count();

/// Runs `body` once per thread of the grid; `shared_bytes` of dynamic shared memory per block.
/// Throws std::runtime_error if threads of a block can never go on together.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// ---- for the stand-ins of CUDA's headers ----

int multiprocessors();
void* shared_base();
size_t shared_size();

/// Ends the launch with an error that names the running thread.
[[noreturn]] void fail(const std::string& message, const Where& where);

/// Waits until `n_threads` threads of the block (0: all of them) are at barrier `id`.
void block_barrier(int id, int n_threads, const Where& where);

/// Waits until all lanes of `mask` are in the same operation, with an operand each; `complete`
/// then sees the operands of all lanes, null outside of the mask, and may write to them.
void warp_collective(const char* operation,
                     uint32_t mask,
                     void* operand,
                     void (*complete)(void* const operands[32], const void* context),
                     const void* context,
                     const Where& where);

/// A cp.async: `bytes` from `source` and zeros up to `size`, copied when its group is waited for.
void copy_later(void* shared, const void* source, size_t bytes, size_t size, const Where& where);
void commit_copies();
void wait_for_copies(int groups_left);

}  // namespace cuda_on_cpu
