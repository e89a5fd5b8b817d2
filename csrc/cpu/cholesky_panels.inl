// Cholesky factorisation of the Gram of one support, gathered from the Gram of all atoms.
//
// The lower factor lies in panels of kPanelRows rows: panel p holds its columns 0 .. (p + 1) *
// kPanelRows - 1 one after another, kPanelRows contiguous elements each, so that both operands of
// every product are read along memory, rows in the lanes. Left-looking: a tile of columns gets all
// its products in registers before it is solved or factored.

namespace round_code {

/// Vectors of rows and columns of a register tile: their product in accumulators, the vectors of
/// rows and one broadcast fit in the registers (32 with AVX-512, 16 otherwise).
#if defined(COSPADI_TARGET_AVX512)
inline constexpr int kPanelVectors = 2;
inline constexpr int64_t kTileCols = 8;
#elif defined(COSPADI_TARGET_AVX2)
inline constexpr int kPanelVectors = 3;
inline constexpr int64_t kTileCols = 4;
#else
inline constexpr int kPanelVectors = 2;
inline constexpr int64_t kTileCols = 4;
#endif

inline constexpr int64_t kPanelRows = int64_t{kPanelVectors} * kWidth<float>;
static_assert(kPanelRows % kTileCols == 0);

/// Columns multiplied before the next panel of rows: this much of two panels and a tile stay in the
/// L1 cache.
inline constexpr int64_t kDepth = 96;

/// A pivot below this share of its diagonal element is rounding error.
inline constexpr float kSmallestPivot = 1e-6F;

/// Lower triangular matrix; what a panel holds above the diagonal is zero once it is factored.
struct Panels {
  float* data;
  int64_t n;

  static int64_t start(int64_t panel) { return panel * (panel + 1) / 2 * kPanelRows * kPanelRows; }
  static int64_t count(int64_t n) { return (n + kPanelRows - 1) / kPanelRows; }
  static int64_t elements(int64_t n) { return start(count(n)); }

  int64_t n_panels() const { return count(n); }
  float* column(int64_t panel, int64_t k) const { return data + start(panel) + k * kPanelRows; }
  /// Columns of the factor whose diagonal lies in a panel.
  int64_t n_cols(int64_t panel) const { return std::min(kPanelRows, n - panel * kPanelRows); }
};

/// out[i] = source[indices[i]]. Unrolled: there is so little to do that the loop itself would show.
inline void gather(const float* source, const int32_t* indices, int64_t n, float* out) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < n; ++i) out[i] = source[indices[i]];
}

/// The Gram of `atoms` plus `ridge` on the diagonal, and zeros as padding.
inline void load_panels(const RoundProblem& problem,
                        const int32_t* atoms,
                        float ridge,
                        const Panels& l) {
  for (int64_t j = 0; j < l.n; ++j) {
    // By symmetry a column of the support's Gram comes from one row of the whole.
    const float* source = problem.gram + atoms[j] * problem.gram_stride;
    for (int64_t panel = j / kPanelRows; panel < l.n_panels(); ++panel) {
      float* out = l.column(panel, j);
      const int64_t n_rows = l.n_cols(panel);
      gather(source, atoms + panel * kPanelRows, n_rows, out);
      std::fill(out + n_rows, out + kPanelRows, 0.0F);
    }
    l.column(j / kPanelRows, j)[j % kPanelRows] += ridge;
  }
  const int64_t last = l.n_panels() - 1;
  std::fill(l.column(last, l.n), l.column(last, (last + 1) * kPanelRows), 0.0F);
}

/// c -= a b^T: a [depth][kPanelRows] and c [kTileCols][kPanelRows] are columns of a panel, b
/// [depth][kTileCols] some rows of one (stride kPanelRows). Vectors of rows before kFirst are left
/// alone.
template <int kFirst>
inline void subtract_tile(const float* a, const float* b, int64_t depth, float* c) {
  constexpr int64_t kW = kWidth<float>;
  constexpr int kVectors = kPanelVectors - kFirst;
  a += kFirst * kW;
  c += kFirst * kW;
  Vec<float> sum[kTileCols][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileCols; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = load(c + i * kPanelRows + v * kW);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<float> rows[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) rows[v] = load(a + v * kW);
#pragma GCC unroll 8
    for (int i = 0; i < kTileCols; ++i) {
      const Vec<float> weight = splat(b[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] -= weight * rows[v];
    }
    a += kPanelRows;
    b += kPanelRows;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileCols; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + i * kPanelRows + v * kW, sum[i][v]);
  }
}

/// Solves c L^T = c for one tile: `factor` is the tile's first column in the panel of its diagonal,
/// from the tile's first row.
inline void solve_tile(const float* factor, const float* inverse_diagonal, float* c) {
  constexpr int64_t kW = kWidth<float>;
  Vec<float> x[kTileCols][kPanelVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileCols; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) x[i][v] = load(c + i * kPanelRows + v * kW);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileCols; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      x[i][v] *= splat(inverse_diagonal[i]);
      store(c + i * kPanelRows + v * kW, x[i][v]);
    }
#pragma GCC unroll 8
    for (int j = i + 1; j < kTileCols; ++j) {
      const Vec<float> weight = splat(factor[i * kPanelRows + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) x[j][v] -= weight * x[i][v];
    }
  }
}

/// Factors up to kTileCols columns that have all earlier products subtracted, from column `first`
/// of `panel`; false at a pivot that is not positive. `diagonal` holds the squared lengths that
/// pivots are compared with, [n] like `inverse_diagonal`.
inline bool factor_tile(
    const Panels& l, int64_t panel, int64_t first, const float* diagonal, float* inverse_diagonal) {
  constexpr int64_t kW = kWidth<float>;
  const int64_t before = panel * kPanelRows;
  const int64_t end = std::min(first + kTileCols, l.n_cols(panel));
  for (int64_t at = first; at < end; ++at) {
    float* column = l.column(panel, before + at);
    const float pivot = column[at];
    const float smallest = kSmallestPivot * diagonal[before + at];
    if (!(pivot > smallest && pivot <= std::numeric_limits<float>::max())) return false;
    const float inverse = 1.0F / std::sqrt(pivot);
    inverse_diagonal[before + at] = inverse;
    std::fill_n(column, at, 0.0F);
    for (int v = 0; v < kPanelVectors; ++v) {
      store(column + v * kW, load(column + v * kW) * splat(inverse));
    }
    for (int64_t next = at + 1; next < end; ++next) {
      float* target = l.column(panel, before + next);
      const Vec<float> weight = splat(column[next]);
      for (int v = 0; v < kPanelVectors; ++v) {
        store(target + v * kW, load(target + v * kW) - weight * load(column + v * kW));
      }
    }
  }
  return true;
}

/// Products with the columns k .. k + depth - 1 of the tile of columns at `first` of `panel`, in
/// the panel of rows `below`, which may be the same.
inline void subtract_products(
    const Panels& l, int64_t panel, int64_t below, int64_t first, int64_t k, int64_t depth) {
  const float* a = l.column(below, k);
  const float* b = l.column(panel, k) + first;
  float* c = l.column(below, panel * kPanelRows + first);
  // In the diagonal block nobody reads what lies above the diagonal.
  if (below == panel && first >= int64_t{2} * kWidth<float> && kPanelVectors > 2) {
    subtract_tile<(kPanelVectors > 2 ? 2 : 0)>(a, b, depth, c);
  } else if (below == panel && first >= kWidth<float>) {
    subtract_tile<1>(a, b, depth, c);
  } else {
    subtract_tile<0>(a, b, depth, c);
  }
}

/// Factors in place what load_panels has loaded; false if it is not positive definite.
inline bool factor_panels(const Panels& l, const float* diagonal, float* inverse_diagonal) {
  for (int64_t panel = 0; panel < l.n_panels(); ++panel) {
    const int64_t before = panel * kPanelRows;
    const int64_t n_cols = l.n_cols(panel);
    for (int64_t k = 0; k < before; k += kDepth) {
      const int64_t depth = std::min(kDepth, before - k);
      for (int64_t below = panel; below < l.n_panels(); ++below) {
        for (int64_t first = 0; first < n_cols; first += kTileCols) {
          subtract_products(l, panel, below, first, k, depth);
        }
      }
    }
    for (int64_t below = panel; below < l.n_panels(); ++below) {
      for (int64_t first = 0; first < n_cols; first += kTileCols) {
        subtract_products(l, panel, below, first, before, first);
        if (below == panel) {
          if (!factor_tile(l, panel, first, diagonal, inverse_diagonal)) return false;
        } else {
          solve_tile(l.column(panel, before + first) + first,
                     inverse_diagonal + before + first,
                     l.column(below, before + first));
        }
      }
    }
  }
  return true;
}

}  // namespace round_code
