// CUDA device queries; implemented by device.cu, or by unavailable.cpp in a build without CUDA.
#pragma once

namespace cospadi::cuda {

bool is_built() noexcept;
int device_count() noexcept;
/// Why no device can be used, in static storage; "" if one can.
const char* unavailable_reason() noexcept;

}  // namespace cospadi::cuda
