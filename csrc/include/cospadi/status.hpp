/// Errors of the C++ API.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "cospadi/export.h"

namespace cospadi {

enum class ErrorCode {
  kInvalidArgument = 1,  ///< a shape, size, value or pointer that the caller can fix
  kOutOfMemory = 2,      ///< the workspace could not be allocated
  kNoCuda = 3,           ///< CUDA was asked for, but the build or the machine has none
  kCuda = 4,             ///< a CUDA call failed; the message names it
  kCheckpoint = 5,       ///< a checkpoint that is damaged, inconsistent or cannot be read
  kNewerFormat = 6,  ///< a checkpoint that a newer version made: not damaged, but not ours to read
  kNotCompressed = 7,  ///< no folder, no config, or a config without our compression
};

/// The only exception the library throws on purpose, from the entry checks of a call or while a
/// checkpoint is read: when it is thrown no output has been written. The message is one line.
class COSPADI_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace cospadi
