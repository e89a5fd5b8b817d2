// Workspace that lives as long as one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "core/check.hpp"
#include "cospadi/status.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cospadi::detail {

/// Whether a workspace asks for huge pages. They spare kernels that walk a large workspace with
/// long strides the TLB misses (10 % of the OMP kernel at 2016 atoms), but cost more to hand out,
/// so they suit what is allocated once per call and used for long. They are a hint: a refusal does
/// not matter.
enum class Pages { kNormal, kHuge };

/// Uninitialised, cache-line aligned array of a trivial type; throws `Error(kOutOfMemory)`.
template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t count, Pages pages = Pages::kNormal) {
    if (count == 0) return;
    const int64_t bytes = checked_product(count, static_cast<int64_t>(sizeof(T)), "workspace");
    const bool is_large = pages == Pages::kHuge && bytes >= kHugePage / 2;
    const auto alignment = static_cast<size_t>(is_large ? kHugePage : kCacheLine);
    const size_t rounded = (static_cast<size_t>(bytes) + alignment - 1) / alignment * alignment;
    memory_.reset(static_cast<T*>(std::aligned_alloc(alignment, rounded)));
    if (memory_ == nullptr) {
      throw Error(ErrorCode::kOutOfMemory,
                  "cannot allocate a workspace of " + std::to_string(bytes) + " bytes");
    }
#if defined(__linux__)
    if (is_large) (void)madvise(memory_.get(), rounded, MADV_HUGEPAGE);
#endif
  }

  T* data() const { return memory_.get(); }

 private:
  static constexpr int64_t kCacheLine = 64;
  static constexpr int64_t kHugePage = int64_t{2} << 20;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
};

}  // namespace cospadi::detail
