// Rounding of one row of coefficients with error feedback (see cospadi/round_code.hpp).
//
// Coefficients are kept in the order of the factor, from whose last column to its first they are
// fixed; "place" is a coefficient's position in the row.

namespace round_code {

/// The factor of one support, and the order it stands in.
struct Factor {
  Panels panels;
  float* inverse_diagonal;  // [s] of the factor; zeros if there is none
  float* diagonal;          // [s] of the support's Gram
  int32_t* atoms;           // [s]
  int32_t* places;          // [s]
  int32_t* place_of_atom;   // [n_atoms] -1: not in the support; only with an order

  int64_t place(const RoundProblem& p, std::byte* arena) {
    ArenaCursor cursor{arena};
    panels = {cursor.take<float>(Panels::elements(p.sparsity)), p.sparsity};
    inverse_diagonal = cursor.take<float>(p.sparsity);
    diagonal = cursor.take<float>(p.sparsity);
    atoms = cursor.take<int32_t>(p.sparsity);
    places = cursor.take<int32_t>(p.sparsity);
    place_of_atom = cursor.take<int32_t>(p.order == nullptr ? 0 : p.n_atoms);
    return cursor.used;
  }
};

/// Order in which the factor holds the support: fixed first comes last.
inline void order_support(const RoundProblem& p, const int32_t* indices, const Factor& factor) {
  const int64_t s = p.sparsity;
  const auto atom_at = [&](int64_t place) {
    return indices == nullptr ? static_cast<int32_t>(place) : indices[place];
  };
  if (p.order == nullptr) {
    for (int64_t j = 0; j < s; ++j) {
      factor.places[j] = static_cast<int32_t>(j);
      factor.atoms[j] = atom_at(j);
    }
  } else {
    std::fill_n(factor.place_of_atom, p.n_atoms, -1);
    for (int64_t j = 0; j < s; ++j) factor.place_of_atom[atom_at(j)] = static_cast<int32_t>(j);
    int64_t n_found = 0;
    for (int64_t i = 0; n_found < s; ++i) {
      // Written whether it belongs to the support or not: the branch would be a coin toss.
      factor.atoms[n_found] = p.order[i];
      factor.places[n_found] = factor.place_of_atom[p.order[i]];
      n_found += factor.places[n_found] >= 0 ? 1 : 0;
    }
  }
  for (int64_t j = 0; j < s; ++j) {
    factor.diagonal[j] = p.gram[factor.atoms[j] * (p.gram_stride + 1)];
  }
}

/// Factors the Gram of `indices` (null: of all atoms) with the asked ridge, or with a larger one
/// if it is not positive definite. After a failure the factor's feedback is zero.
inline FactorOutcome factor_support(const RoundProblem& p,
                                    const int32_t* indices,
                                    const Factor& factor) {
  constexpr int kMaxRaises = 8;
  constexpr float kFirstRaise = 1e-6F;
  order_support(p, indices, factor);
  double trace = 0.0;
  for (int64_t j = 0; j < p.sparsity; ++j) trace += static_cast<double>(factor.diagonal[j]);
  const auto mean = static_cast<float>(trace / static_cast<double>(p.sparsity));
  float damping = p.damping;
  for (int raises = 0; raises <= kMaxRaises; ++raises) {
    load_panels(p, factor.atoms, damping * mean, factor.panels);
    if (factor_panels(factor.panels, factor.diagonal, factor.inverse_diagonal)) {
      return raises == 0 ? FactorOutcome::kClean : FactorOutcome::kRaised;
    }
    damping = std::max(10.0F * damping, kFirstRaise);
  }
  std::fill_n(factor.panels.data, Panels::elements(p.sparsity), 0.0F);
  std::fill_n(factor.inverse_diagonal, p.sparsity, 0.0F);
  return FactorOutcome::kFailed;
}

/// sums[c] = products of column c of `panel` with the errors in the panels below it.
inline void sums_below(const Panels& l, int64_t panel, const float* errors, float* sums) {
  constexpr int64_t kW = kWidth<float>;
  for (int64_t first = 0; first < l.n_cols(panel); first += kTileCols) {
    Vec<float> sum[kTileCols] = {};
    for (int64_t below = panel + 1; below < l.n_panels(); ++below) {
      const float* columns = l.column(below, panel * kPanelRows + first);
      for (int v = 0; v < kPanelVectors; ++v) {
        const Vec<float> error = load(errors + below * kPanelRows + v * kW);
#pragma GCC unroll 8
        for (int c = 0; c < kTileCols; ++c) {
          sum[c] += load(columns + c * kPanelRows + v * kW) * error;
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kTileCols; ++c) sums[first + c] = horizontal_sum(sum[c]);
  }
}

/// Fixes one coefficient after the other; what is not fixed yet absorbs the errors.
inline void feed_back(const RoundProblem& p,
                      const Factor& factor,
                      const RowBuffers& buffers,
                      int32_t* fields) {
  constexpr int64_t kW = kWidth<float>;
  const Panels& l = factor.panels;
  using Lanes = decltype(Vec<float>{} > Vec<float>{});
  Lanes lanes{};
  for (int i = 0; i < kW; ++i) lanes[i] = i;
  float sums[kPanelRows];
  for (int64_t panel = l.n_panels() - 1; panel >= 0; --panel) {
    const int64_t before = panel * kPanelRows;
    sums_below(l, panel, buffers.errors, sums);
    // In registers: loading vectors whose lanes have just been stored one by one is slow.
    Vec<float> errors[kPanelVectors] = {};
    for (int64_t c = l.n_cols(panel) - 1; c >= 0; --c) {
      const int64_t j = before + c;
      const float* column = l.column(panel, j);
      Vec<float> product{};
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) product += load(column + v * kW) * errors[v];
      const float x = buffers.coeffs[j];
      const float step = buffers.steps[j];
      const float pull = factor.inverse_diagonal[j] * (sums[c] + horizontal_sum(product));
      const float field = nearest_field((x + pull) / step, p.limit);
      const float error = x - step * field;
      fields[factor.places[j]] = static_cast<int32_t>(field);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) {
        const auto lane = static_cast<int32_t>(c - v * kW);
        errors[v] = lanes == lane ? splat(error) : errors[v];
      }
    }
    for (int v = 0; v < kPanelVectors; ++v) store(buffers.errors + before + v * kW, errors[v]);
  }
}

inline FactorOutcome round_row(const RoundProblem& p,
                               RoundRow& row,
                               std::byte* factor_arena,
                               std::byte* arena) noexcept {
  Factor factor;
  factor.place(p, factor_arena);
  RowBuffers buffers;
  buffers.place(p, arena);
  const FactorOutcome outcome = factor_support(p, row.indices, factor);
  expand_steps(p, row.steps, buffers.place_steps);
  for (int64_t j = 0; j < p.sparsity; ++j) {
    buffers.coeffs[j] = row.coeffs[factor.places[j]];
    buffers.steps[j] = buffers.place_steps[factor.places[j]];
  }
  feed_back(p, factor, buffers, row.fields);
  row.n_moves = 0;
  if (p.sweeps == 0 && row.error == nullptr) return outcome;
  find_errors(p, row, buffers);
  correlate_errors(p, row, buffers);
  finish_row(p, row, buffers);
  return outcome;
}

}  // namespace round_code
