// CUDA device queries; implemented by device.cu, or by unavailable.cpp in a build without CUDA.
#pragma once

namespace cospadi::cuda {

bool is_built() noexcept;
int device_count() noexcept;
/// Why no device can be used, in static storage; "" if one can.
const char* unavailable_reason() noexcept;
/// cudaGetDevice and cudaSetDevice; a cudaError_t.
int current_device(int* device) noexcept;
int set_device(int device) noexcept;

}  // namespace cospadi::cuda
