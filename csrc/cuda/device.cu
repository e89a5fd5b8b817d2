// Device queries through the statically linked CUDA runtime: they answer 0 devices where no driver
// is.
#include <cuda_runtime.h>

#include "cuda/device.hpp"
#include "cuda/operands.hpp"

namespace cospadi::cuda {

bool is_built() noexcept { return true; }

int device_count() noexcept {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const char* unavailable_reason() noexcept {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return count > 0 ? "" : "no CUDA device is visible";
}

int current_device(int* device) noexcept { return cudaGetDevice(device); }

int set_device(int device) noexcept { return cudaSetDevice(device); }

const char* status_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace cospadi::cuda
