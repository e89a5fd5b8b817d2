// What csrc/core hands to the selection kernels; plain data only.
#pragma once

#include <cstdint>

namespace cospadi::cpu {

template <class T>
struct SelectEntry {
  /// Position of the first of `n` scores that is negative or NaN; n if there is none.
  int64_t (*first_invalid)(const T* scores, int64_t n) noexcept;
  /// Indices of the `count` largest of `n` valid scores, ascending; 1 <= count <= n.
  void (*select)(const T* scores, int64_t n, int64_t count, int32_t* indices) noexcept;
};

}  // namespace cospadi::cpu
