// Expansion of one mask word without special instructions (see sparse_gemm_format.inl).

constexpr int kMaxColumnsInFlight = 1;
constexpr int kMaxRowsInFlight = 8;
constexpr int64_t kFewRows = 16;

/// Position, within its mask word, of element i of the expanded word.
template <class C>
constexpr int64_t position_of(int64_t i) {
  return i;
}

template <class C>
struct ExpandedFloats {
  float values[kMaskWord] = {};

  ExpandedFloats(uint32_t bits, const C* p) {
    for (; bits != 0; bits &= bits - 1) values[__builtin_ctz(bits)] = to_float(*p++);
  }
  Vec<float> part(int i) const { return load(values + i * kWidth<float>); }
};

inline float sum_lanes(Vec<float> v) { return (v[0] + v[1]) + (v[2] + v[3]); }
