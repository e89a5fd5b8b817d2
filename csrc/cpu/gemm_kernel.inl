// Register-tiled dense GEMM (see cpu/kernel_table.hpp for the packed layout).
//
// Included inside the per-ISA namespace of a target_*.cpp. The register tile is kTileRows rows by
// two vectors of columns: with 32 registers 14 x 2 accumulators leave four for the vectors of b and
// the broadcast of a, with 16 registers 6 x 2 leave four. More accumulators than latency times
// issue width need (at most 10) keeps the FMA units busy.

#if defined(COSPADI_TARGET_AVX512)
constexpr int kTileRows = 14;
#elif defined(COSPADI_TARGET_AVX2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;  // no fused multiply-add: one more register per product
#endif

/// What the packed panels hold and how one step of k is accumulated. Sums and c are `Sum`.
template <class T>
struct TileMath {
  using Sum = T;
  using Columns = Vec<T>;
  static Columns load_columns(const T* b) { return load(b); }
  static Vec<T> multiply_add(Vec<T> sum, const T* a, Columns b) { return sum + splat(*a) * b; }
};

template <class T>
inline constexpr int kTileCols = 2 * kWidth<typename TileMath<T>::Sum>;

/// c = alpha a b + beta c for one full register tile.
template <class T, class Sum = typename TileMath<T>::Sum>
inline void gemm_register_tile(int64_t k_size,
                               Sum alpha,
                               const T* a_panel,
                               const T* b_panel,
                               Sum beta,
                               Sum* c,
                               int64_t c_stride) noexcept {
  using Math = TileMath<T>;
  constexpr int kW = kWidth<Sum>;
  Vec<Sum> sum[kTileRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) sum[i][0] = sum[i][1] = Vec<Sum>{};
  for (int64_t p = 0; p < k_size; ++p) {
    const typename Math::Columns b0 = Math::load_columns(b_panel);
    const typename Math::Columns b1 = Math::load_columns(b_panel + kW);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      sum[i][0] = Math::multiply_add(sum[i][0], a_panel + i, b0);
      sum[i][1] = Math::multiply_add(sum[i][1], a_panel + i, b1);
    }
    a_panel += kTileRows;
    b_panel += 2 * kW;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      Sum* out = c + i * c_stride + h * kW;
      const Vec<Sum> product = splat(alpha) * sum[i][h];
      // beta = 0 must not read c: it may hold NaN
      store(out, beta == Sum(0) ? product : product + splat(beta) * load(out));
    }
  }
}

template <class T, class Sum = typename TileMath<T>::Sum>
void gemm_tile(int64_t rows,
               int64_t cols,
               int64_t k_size,
               Sum alpha,
               const T* a_block,
               const T* b_block,
               Sum beta,
               Sum* c,
               int64_t c_stride) noexcept {
  constexpr int kCols = kTileCols<T>;
  for (int64_t j = 0; j < cols; j += kCols) {
    const T* b_panel = b_block + j * k_size;
    const int64_t n_cols = std::min<int64_t>(kCols, cols - j);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const T* a_panel = a_block + i * k_size;
      const int64_t n_rows = std::min<int64_t>(kTileRows, rows - i);
      Sum* out = c + i * c_stride + j;
      if (n_rows == kTileRows && n_cols == kCols) {
        gemm_register_tile(k_size, alpha, a_panel, b_panel, beta, out, c_stride);
        continue;
      }
      // An edge goes through a full tile of its own, so that its bits are those of a full one.
      Sum edge[kTileRows * kCols] = {};
      if (beta != Sum(0)) {
        for (int64_t r = 0; r < n_rows; ++r) {
          std::copy_n(out + r * c_stride, n_cols, edge + r * kCols);
        }
      }
      gemm_register_tile(k_size, alpha, a_panel, b_panel, beta, edge, int64_t{kCols});
      for (int64_t r = 0; r < n_rows; ++r)
        std::copy_n(edge + r * kCols, n_cols, out + r * c_stride);
    }
  }
}

template <int kPanel, class T>
void gemm_pack_panel_of(int64_t n_valid,
                        int64_t k_size,
                        const T* source,
                        int64_t across,
                        int64_t along,
                        T* panel) noexcept {
  if (n_valid == kPanel && across == 1) {
    for (int64_t p = 0; p < k_size; ++p) {
      std::memcpy(panel + p * kPanel, source + p * along, sizeof(T) * kPanel);
    }
    return;
  }
  // Steps of one cache line along k: every source line is read once even when `across` is a power
  // of two and the lines of all rows fall into one cache set.
  constexpr int64_t kStep = 64 / sizeof(T);
  for (int64_t p0 = 0; p0 < k_size; p0 += kStep) {
    const int64_t p1 = std::min(k_size, p0 + kStep);
    for (int64_t i = 0; i < n_valid; ++i) {
      const T* row = source + i * across;
      for (int64_t p = p0; p < p1; ++p) panel[p * kPanel + i] = row[p * along];
    }
    for (int64_t p = p0; p < p1; ++p) {
      for (int64_t i = n_valid; i < kPanel; ++i) panel[p * kPanel + i] = T(0);
    }
  }
}

template <class T>
void gemm_pack_panel(int64_t width,
                     int64_t n_valid,
                     int64_t k_size,
                     const T* source,
                     int64_t across,
                     int64_t along,
                     T* panel) noexcept {
  if (width == kTileRows) {
    gemm_pack_panel_of<kTileRows>(n_valid, k_size, source, across, along, panel);
  } else {
    gemm_pack_panel_of<kTileCols<T>>(n_valid, k_size, source, across, along, panel);
  }
}

template <class T>
constexpr GemmKernels<T> make_gemm_kernels() {
  return {.panel_rows = kTileRows,
          .panel_cols = kTileCols<T>,
          .pack_panel = gemm_pack_panel<T>,
          .tile = gemm_tile<T>};
}
