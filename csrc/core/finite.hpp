// Check for NaN and infinity.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "core/check.hpp"
#include "cospadi/matrix.hpp"

namespace cospadi::detail {

/// Whether every element is finite. Works on the bits, which vectorises without fast-math.
template <class T>
bool all_finite(const T* data, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Bits kExponent =
      sizeof(T) == 4 ? Bits{0x7f800000} : static_cast<Bits>(0x7ff0000000000000);
  Bits bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, data + i, sizeof(T));
    bad |= static_cast<Bits>((bits & kExponent) == kExponent);
  }
  return bad == 0;
}

/// Throws an Error that names the argument and the position of its first non-finite element.
template <class T>
void require_finite(const MatrixView<const T>& m, const char* name) {
  for (int64_t i = 0; i < m.rows; ++i) {
    if (all_finite(m.row(i), m.cols)) continue;
    int64_t j = 0;
    while (all_finite(m.row(i) + j, 1)) ++j;
    const std::string position = m.rows == 1 ? "[" + std::to_string(j) + "]" : shape_text(i, j);
    throw Error(ErrorCode::kInvalidArgument,
                std::string(name) + ": element " + position + " is not finite");
  }
}

}  // namespace cospadi::detail
