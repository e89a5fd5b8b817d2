// Workspace that lives as long as one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "core/check.hpp"
#include "cospadi/status.hpp"

namespace cospadi::detail {

/// Uninitialised, cache-line aligned array of a trivial type; throws `Error(kOutOfMemory)`.
template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t count) {
    if (count == 0) return;
    const int64_t bytes = checked_product(count, static_cast<int64_t>(sizeof(T)), "workspace");
    const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    memory_.reset(static_cast<T*>(std::aligned_alloc(kAlignment, static_cast<size_t>(rounded))));
    if (memory_ == nullptr) {
      throw Error(ErrorCode::kOutOfMemory,
                  "cannot allocate a workspace of " + std::to_string(bytes) + " bytes");
    }
  }

  T* data() const { return memory_.get(); }

 private:
  static constexpr int64_t kAlignment = 64;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
};

}  // namespace cospadi::detail
