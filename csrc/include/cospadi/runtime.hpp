/// What this build and this machine can do.
#pragma once

#include <string>
#include <vector>

#include "cospadi/export.h"

namespace cospadi {

/// Version of the library, "major.minor.patch".
COSPADI_API const char* version() noexcept;

/// Name of the instruction set in use: "generic", "avx2" or "avx512".
///
/// Chosen once: the widest one the processor has, or the one named by the environment variable
/// `COSPADI_ISA`. Throws `Error(kInvalidArgument)` if that variable names one that is unknown or
/// not available here; the message lists what is.
COSPADI_API const char* isa_name();

/// Instruction sets that this build contains and this processor can run, narrowest first.
COSPADI_API std::vector<std::string> available_isas();

/// Whether the CUDA sources were compiled in.
COSPADI_API bool cuda_built() noexcept;

/// Number of CUDA devices; 0 without CUDA in the build, without a driver, or without a device.
COSPADI_API int cuda_device_count() noexcept;

/// Why no CUDA device can be used; empty if one can.
COSPADI_API std::string cuda_unavailable_reason();

/// Threads used when a call passes 0: OpenMP's default for this process.
COSPADI_API int default_thread_count() noexcept;

}  // namespace cospadi
