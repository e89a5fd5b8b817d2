// What comes after the rounding of a row: coordinate descent and the error.
//
// Positions are those of the row; the Gram is the undamped one.

namespace round_code {

/// A move has to gain more than rounding errors of the correlations could pretend.
inline constexpr float kMoveMargin = 1e-4F;

/// place_errors = x - step q, zeros as padding.
inline void find_errors(const RoundProblem& p, const RoundRow& row, const RowBuffers& buffers) {
  for (int64_t i = 0; i < p.sparsity; ++i) {
    const float value = buffers.place_steps[i] * static_cast<float>(row.fields[i]);
    buffers.place_errors[i] = row.coeffs[i] - value;
  }
}

/// The first `n` elements of row `place` of the support's Gram.
inline const float* gram_line(
    const RoundProblem& p, const RoundRow& row, int64_t place, int64_t n, float* line) {
  const float* source = p.gram + atom_at(row, place) * p.gram_stride;
  if (row.indices == nullptr) return source;
  gather(source, row.indices, n, line);
  return line;
}

/// correlations = G place_errors. Every element below the diagonal is fetched once.
inline void correlate_errors(const RoundProblem& p,
                             const RoundRow& row,
                             const RowBuffers& buffers) {
  constexpr int64_t kW = kWidth<float>;
  const float* errors = buffers.place_errors;
  float* correlations = buffers.correlations;
  for (int64_t i = 0; i < p.sparsity; ++i) {
    const float* line = gram_line(p, row, i, i + 1, buffers.line);
    const float error = errors[i];
    Vec<float> product{};
    int64_t j = 0;
    for (; j + kW <= i; j += kW) {
      const Vec<float> g = load(line + j);
      product += g * load(errors + j);
      store(correlations + j, load(correlations + j) + g * splat(error));
    }
    float sum = line[i] * error;
    for (; j < i; ++j) {
      sum += line[j] * errors[j];
      correlations[j] += line[j] * error;
    }
    correlations[i] = sum + horizontal_sum(product);
  }
}

/// Brings one coefficient to its best integer given all others; whether it changed.
inline bool move_field(const RoundProblem& p,
                       const RoundRow& row,
                       const RowBuffers& buffers,
                       int64_t place) {
  const int64_t atom = atom_at(row, place);
  const float step = buffers.place_steps[place];
  const float ratio = buffers.correlations[place] / (step * p.gram[atom * (p.gram_stride + 1)]);
  const auto old = static_cast<float>(row.fields[place]);
  const float field = nearest_field(old + nearest_field(ratio, 2.0F * p.limit), p.limit);
  if (field == old) return false;
  row.fields[place] = static_cast<int32_t>(field);
  const float change = step * (field - old);
  buffers.place_errors[place] -= change;
  const float* line = gram_line(p, row, place, p.sparsity, buffers.line);
  for (int64_t i = 0; i < p.sparsity; ++i) buffers.correlations[i] -= change * line[i];
  return true;
}

/// One pass over all coefficients, ascending; returns how many changed.
inline int64_t sweep_fields(const RoundProblem& p, const RoundRow& row, const RowBuffers& buffers) {
  int64_t n_moves = 0;
  for (int64_t first = 0; first < p.sparsity; first += kWidth<float>) {
    uint32_t unvisited = ~0U;
    for (;;) {
      const Vec<float> correlation = load(buffers.correlations + first);
      const Vec<float> size = correlation > Vec<float>{} ? correlation : -correlation;
      const uint32_t mask = lane_mask(size > load(buffers.bounds + first)) & unvisited;
      if (mask == 0) break;
      const int lane = __builtin_ctz(mask);
      unvisited = ~0U << lane << 1;
      n_moves += move_field(p, row, buffers, first + lane) ? 1 : 0;
    }
  }
  return n_moves;
}

/// Sweeps, and the error of the row, from its errors and their correlations.
inline void finish_row(const RoundProblem& p, RoundRow& row, const RowBuffers& buffers) {
  if (p.sweeps > 0) {
    const int64_t padded = round_up(p.sparsity, kWidth<float>);
    for (int64_t i = 0; i < padded; ++i) {
      float cost = 0.0F;
      if (i < p.sparsity) {
        cost = buffers.place_steps[i] * p.gram[atom_at(row, i) * (p.gram_stride + 1)];
      } else {
        buffers.correlations[i] = 0.0F;
      }
      // An atom of length zero has nothing to gain.
      buffers.bounds[i] =
          cost > 0.0F ? (0.5F + kMoveMargin) * cost : std::numeric_limits<float>::infinity();
    }
  }
  for (int sweep = 0; sweep < p.sweeps; ++sweep) {
    const int64_t n_moves = sweep_fields(p, row, buffers);
    row.n_moves += n_moves;
    if (n_moves == 0) break;
  }
  if (row.error == nullptr) return;
  double error = 0.0;
  for (int64_t i = 0; i < p.sparsity; ++i) {
    error +=
        static_cast<double>(buffers.place_errors[i]) * static_cast<double>(buffers.correlations[i]);
  }
  *row.error = static_cast<float>(std::max(error, 0.0));
}

}  // namespace round_code
