// The CUDA symbols of a build without CUDA.
#include "cuda/device.hpp"

namespace cospadi::cuda {

bool is_built() noexcept { return false; }

int device_count() noexcept { return 0; }

const char* unavailable_reason() noexcept {
  return "built without CUDA: build where nvcc is on PATH, or with -C cmake.define.COSPADI_CUDA=ON";
}

}  // namespace cospadi::cuda
