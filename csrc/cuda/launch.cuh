// Starting kernels: by a function call, so that the same sources run in the emulator of the tests.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace cospadi::cuda {

/// Starts `kernel` on `stream` of the current device. Nothing is waited for or allocated; returns
/// cudaErrorInvalidConfiguration or cudaErrorInvalidValue where the sizes are not possible.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...),
                   dim3 grid,
                   dim3 block,
                   size_t shared_bytes,
                   cudaStream_t stream,
                   Args... args) {
  constexpr size_t kPlainSharedBytes = 48 * 1024;  // more must be asked for, per device
  if (shared_bytes > kPlainSharedBytes) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace cospadi::cuda
