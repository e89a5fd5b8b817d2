// Rounding with full support: one factor for all rows, several rows side by side in the lanes.
//
// The factor is streamed once per kRowsTogether rows. A panel of coefficients is fixed one after
// the other; its errors then go into all coefficients before it as one product in registers.

namespace round_code {

/// Vectors of rows and coefficients of a register tile.
#if defined(COSPADI_TARGET_AVX512)
inline constexpr int kRowVectors = 4;
#elif defined(COSPADI_TARGET_AVX2)
inline constexpr int kRowVectors = 3;
#else
inline constexpr int kRowVectors = 2;
#endif
inline constexpr int64_t kTileTargets = 4;
inline constexpr int64_t kRowsTogether = int64_t{kRowVectors} * kWidth<float>;
static_assert(kPanelRows % kTileTargets == 0);

/// Buffers of the rows of one task; `first` and `second` change their meaning on the way.
struct LaneBuffers {
  float* first;  // [s][rows] coefficients, then their errors; then correlations of the errors
  float*
      second;    // [s][rows] sums over what is fixed, then integers; then errors in the row's order
  float* steps;  // [n_steps][rows]
  RowBuffers row;

  int64_t place(const RoundProblem& p, std::byte* arena) {
    ArenaCursor cursor{arena};
    first = cursor.take<float>(p.sparsity * kRowsTogether);
    second = cursor.take<float>(p.sparsity * kRowsTogether);
    steps = cursor.take<float>(p.n_steps * kRowsTogether);
    const int64_t row_bytes = row.place(p, nullptr);
    auto* row_arena = cursor.take<std::byte>(row_bytes);
    if (row_arena != nullptr) row.place(p, row_arena);
    return cursor.used;
  }
};

/// targets[i] += sum over k of weights[i][k] sources[k] for N targets; targets and sources are
/// [kRowsTogether], weights [N][depth] with any stride.
template <int N>
inline void add_products(const float* weights,
                         int64_t weights_stride,
                         const float* sources,
                         int64_t depth,
                         float* targets) {
  constexpr int64_t kW = kWidth<float>;
  Vec<float> sum[N][kRowVectors];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kRowVectors; ++v) sum[i][v] = load(targets + i * kRowsTogether + v * kW);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<float> rows[kRowVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kRowVectors; ++v) rows[v] = load(sources + k * kRowsTogether + v * kW);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const Vec<float> weight = splat(weights[i * weights_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kRowVectors; ++v) sum[i][v] += weight * rows[v];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kRowVectors; ++v) store(targets + i * kRowsTogether + v * kW, sum[i][v]);
  }
}

/// Fixes the coefficients of one panel, whose sums are complete but for the panel itself.
inline void fix_panel(const RoundProblem& p,
                      const Factor& factor,
                      int64_t panel,
                      const LaneBuffers& buffers) {
  constexpr int64_t kW = kWidth<float>;
  const Panels& l = factor.panels;
  const int64_t before = panel * kPanelRows;
  for (int64_t c = l.n_cols(panel) - 1; c >= 0; --c) {
    const int64_t j = before + c;
    const float* steps = buffers.steps + factor.places[j] / p.group * kRowsTogether;
    Vec<float> errors[kRowVectors];
    for (int v = 0; v < kRowVectors; ++v) {
      float* first = buffers.first + j * kRowsTogether + v * kW;
      float* second = buffers.second + j * kRowsTogether + v * kW;
      const Vec<float> x = load(first);
      const Vec<float> step = load(steps + v * kW);
      const Vec<float> pull = splat(factor.inverse_diagonal[j]) * load(second);
      const Vec<float> field = nearest_field((x + pull) / step, p.limit);
      errors[v] = x - step * field;
      store(first, errors[v]);
      store(second, field);
    }
    for (int64_t i = 0; i < c; ++i) {
      const Vec<float> weight = splat(l.column(panel, before + i)[c]);
      float* sums = buffers.second + (before + i) * kRowsTogether;
#pragma GCC unroll 4
      for (int v = 0; v < kRowVectors; ++v) {
        store(sums + v * kW, load(sums + v * kW) + weight * errors[v]);
      }
    }
  }
}

inline void load_rows(const RoundProblem& p,
                      const Factor& factor,
                      const RoundRow* rows,
                      int64_t n_rows,
                      const LaneBuffers& buffers) {
  std::fill_n(buffers.second, p.sparsity * kRowsTogether, 0.0F);
  for (int64_t lane = 0; lane < kRowsTogether; ++lane) {
    // Lanes without a row repeat the last one; their results are not used.
    const RoundRow& row = rows[std::min(lane, n_rows - 1)];
    for (int64_t j = 0; j < p.sparsity; ++j) {
      buffers.first[j * kRowsTogether + lane] = row.coeffs[factor.places[j]];
    }
    for (int64_t g = 0; g < p.n_steps; ++g) buffers.steps[g * kRowsTogether + lane] = row.steps[g];
  }
}

/// first = G second.
inline void correlate_rows(const RoundProblem& p, const LaneBuffers& buffers) {
  std::fill_n(buffers.first, p.sparsity * kRowsTogether, 0.0F);
  int64_t i = 0;
  for (; i + kTileTargets <= p.sparsity; i += kTileTargets) {
    add_products<kTileTargets>(p.gram + i * p.gram_stride,
                               p.gram_stride,
                               buffers.second,
                               p.sparsity,
                               buffers.first + i * kRowsTogether);
  }
  for (; i < p.sparsity; ++i) {
    add_products<1>(p.gram + i * p.gram_stride,
                    p.gram_stride,
                    buffers.second,
                    p.sparsity,
                    buffers.first + i * kRowsTogether);
  }
}

inline void round_rows(const RoundProblem& p,
                       RoundRow* rows,
                       int64_t n_rows,
                       std::byte* factor_arena,
                       std::byte* arena) noexcept {
  Factor factor;
  factor.place(p, factor_arena);
  const Panels& l = factor.panels;
  LaneBuffers buffers;
  buffers.place(p, arena);
  load_rows(p, factor, rows, n_rows, buffers);
  for (int64_t panel = l.n_panels() - 1; panel >= 0; --panel) {
    fix_panel(p, factor, panel, buffers);
    const int64_t before = panel * kPanelRows;
    for (int64_t j = 0; j < before; j += kTileTargets) {
      // The panel's rows of column j are contiguous, as are columns one panel apart.
      add_products<kTileTargets>(l.column(panel, j),
                                 kPanelRows,
                                 buffers.first + before * kRowsTogether,
                                 l.n_cols(panel),
                                 buffers.second + j * kRowsTogether);
    }
  }
  for (int64_t lane = 0; lane < n_rows; ++lane) {
    for (int64_t j = 0; j < p.sparsity; ++j) {
      rows[lane].fields[factor.places[j]] =
          static_cast<int32_t>(buffers.second[j * kRowsTogether + lane]);
    }
  }
  for (int64_t lane = 0; lane < n_rows; ++lane) rows[lane].n_moves = 0;
  if (p.sweeps == 0 && rows[0].error == nullptr) return;
  for (int64_t j = 0; j < p.sparsity; ++j) {
    std::copy_n(buffers.first + j * kRowsTogether,
                kRowsTogether,
                buffers.second + factor.places[j] * kRowsTogether);
  }
  correlate_rows(p, buffers);
  for (int64_t lane = 0; lane < n_rows; ++lane) {
    expand_steps(p, rows[lane].steps, buffers.row.place_steps);
    for (int64_t i = 0; i < p.sparsity; ++i) {
      buffers.row.place_errors[i] = buffers.second[i * kRowsTogether + lane];
      buffers.row.correlations[i] = buffers.first[i * kRowsTogether + lane];
    }
    finish_row(p, rows[lane], buffers.row);
  }
}

inline FactorOutcome factor_all(const RoundProblem& p, std::byte* arena) noexcept {
  Factor factor;
  factor.place(p, arena);
  return factor_support(p, nullptr, factor);
}

inline RoundCodeEntry make_entry() {
  RoundCodeEntry entry{};
  entry.factor_bytes = [](const RoundProblem& p) {
    Factor factor;
    return factor.place(p, nullptr);
  };
  entry.row_bytes = [](const RoundProblem& p) {
    RowBuffers buffers;
    return buffers.place(p, nullptr);
  };
  entry.round_row = round_row;
  entry.rows_together = kRowsTogether;
  entry.rows_bytes = [](const RoundProblem& p) {
    LaneBuffers buffers;
    return buffers.place(p, nullptr);
  };
  entry.factor_all = factor_all;
  entry.round_rows = round_rows;
  return entry;
}

}  // namespace round_code
