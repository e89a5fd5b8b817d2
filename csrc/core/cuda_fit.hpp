// The kernels of the fits on CUDA devices, as the bindings reach them: statuses become Errors.
#pragma once

#include <string>

#include "cospadi/status.hpp"
#include "cuda/fit_kernels.hpp"

namespace cospadi::detail {

/// Throws Error(kCuda) naming `kernel` unless `status` is a success.
inline void require_launched(int status, const char* kernel) {
  if (status == 0) return;
  throw Error(ErrorCode::kCuda, std::string(kernel) + ": " + cuda::error_text(status));
}

}  // namespace cospadi::detail
