// What all ways of rounding a row share: buffers, steps, rounding.

namespace round_code {

/// Buffers of one row. Those of `place` in the support have room for whole vectors.
struct RowBuffers {
  float* coeffs;        // [s] in the factor's order
  float* steps;         // [s] in the factor's order
  float* errors;        // [panels] x - step q in the factor's order; zeros for what is not fixed
  float* place_steps;   // [s] one step per coefficient
  float* place_errors;  // [vectors of s] x - step q
  float* correlations;  // [vectors of s] G (x - step q)
  float* bounds;        // [vectors of s] for the sweeps
  float* line;          // [vectors of s] one row of the support's Gram

  int64_t place(const RoundProblem& p, std::byte* arena) {
    const int64_t s = p.sparsity;
    const int64_t padded = round_up(s, kPanelRows);
    ArenaCursor cursor{arena};
    coeffs = cursor.take<float>(s);
    steps = cursor.take<float>(s);
    errors = cursor.take<float>(padded);
    place_steps = cursor.take<float>(s);
    place_errors = cursor.take<float>(padded);
    correlations = cursor.take<float>(padded);
    bounds = cursor.take<float>(padded);
    line = cursor.take<float>(padded);
    return cursor.used;
  }
};

inline int64_t atom_at(const RoundRow& row, int64_t place) {
  return row.indices == nullptr ? place : row.indices[place];
}

/// One step per coefficient.
inline void expand_steps(const RoundProblem& p, const float* steps, float* out) {
  for (int64_t g = 0; g < p.n_steps; ++g) {
    const int64_t first = g * p.group;
    std::fill(out + first, out + std::min(p.sparsity, first + p.group), steps[g]);
  }
}

/// The sum of all lanes, in the same order everywhere.
inline float horizontal_sum(Vec<float> v) {
#pragma GCC unroll 4
  for (int half = kWidth<float> / 2; half > 0; half /= 2) {
#if defined(__GNUC__) && !defined(__clang__)
    using Lanes = decltype(v > v);
    Lanes lanes{};
    for (int i = 0; i < kWidth<float>; ++i) lanes[i] = i ^ half;
    v += __builtin_shuffle(v, lanes);
#else
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
#endif
  }
  return v[0];
}

/// Nearest integer, ties to even, in -limit .. limit, with limit at most 2^22; of a number or of
/// every lane.
template <class F>
inline F nearest_field(F value, float limit) {
  // Near 1.5 * 2^23 the last bit of a float is worth 1, so the addition rounds. Clamped before, it
  // is exact; the first comparison also catches NaN.
  constexpr float kShift = 12582912.0F;
  const F high = F{} + limit;
  value = value > -high ? value : -high;
  value = value < high ? value : high;
  return (value + kShift) - kShift;
}

}  // namespace round_code
