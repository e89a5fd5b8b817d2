// Layout of one thread's workspace.
//
// Included like vec.hpp, inside the namespace of a target.

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// Hands out pieces of the arena; with a null base it only counts.
struct ArenaCursor {
  std::byte* base;
  int64_t used = 0;

  template <class E>
  E* take(int64_t count) {
    constexpr int64_t kLine = 64;
    E* piece = base == nullptr ? nullptr : reinterpret_cast<E*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(E)), kLine);
    return piece;
  }
};
