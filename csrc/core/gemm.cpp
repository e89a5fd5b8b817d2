#include "core/gemm.hpp"

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "core/buffer.hpp"
#include "core/check.hpp"
#include "core/parallel.hpp"
#include "cpu/kernel_table.hpp"

namespace cospadi::detail {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
const cpu::GemmKernels<T>& gemm_kernels() {
  if constexpr (std::is_same_v<T, float>) return cpu::kernels().gemm_f32;
  if constexpr (std::is_same_v<T, double>) return cpu::kernels().gemm_f64;
}

/// How the three dimensions are cut. Only k_step decides the order of a sum, and it depends on k
/// alone.
struct Blocking {
  int64_t k_step;     ///< depth of one tile product: a packed panel of b stays in the L1 cache
  int64_t k_group;    ///< depth packed at once, several k_steps: each group costs two barriers
  int64_t row_block;  ///< rows of a packed at once (shared by the threads)
  int64_t col_block;  ///< columns of b packed at once
  int64_t row_tile;   ///< one task: its block of a stays in the L2 cache
  int64_t col_tile;
};

constexpr int64_t kMaxDepth = 256;
constexpr int64_t kMaxBlock = 4096;
constexpr int64_t kMaxPacked = int64_t{2} * 1024 * 1024;  // elements of a and b packed at once
constexpr int64_t kRowTile = 168;
constexpr int64_t kColTile = 512;

/// `size` cut into equal pieces of at most `limit`, rounded up to whole units.
int64_t even_piece(int64_t size, int64_t limit, int64_t unit) {
  return ceil_div(ceil_div(size, ceil_div(size, limit)), unit) * unit;
}

Blocking choose_blocking(
    int64_t m, int64_t n, int64_t k, int64_t panel_rows, int64_t panel_cols, int n_threads) {
  Blocking blocking{};
  blocking.k_step = even_piece(k, kMaxDepth, 1);
  blocking.row_block = even_piece(m, kMaxBlock, panel_rows);
  blocking.col_block = even_piece(n, kMaxBlock, panel_cols);
  const int64_t affordable = kMaxPacked / (blocking.row_block + blocking.col_block);
  blocking.k_group = std::max<int64_t>(1, affordable / blocking.k_step) * blocking.k_step;
  blocking.k_group = std::min(blocking.k_group, ceil_div(k, blocking.k_step) * blocking.k_step);
  blocking.row_tile = even_piece(blocking.row_block, kRowTile, panel_rows);
  blocking.col_tile = even_piece(blocking.col_block, kColTile, panel_cols);
  // Smaller tiles until every thread has a few: the last one to finish then costs little.
  const auto n_tasks = [&] {
    return ceil_div(blocking.row_block, blocking.row_tile) *
           ceil_div(blocking.col_block, blocking.col_tile);
  };
  while (n_threads > 1 && n_tasks() < int64_t{4} * n_threads) {
    if (blocking.col_tile > 2 * panel_cols) {
      blocking.col_tile = even_piece(blocking.col_tile, ceil_div(blocking.col_tile, 2), panel_cols);
    } else if (blocking.row_tile > 4 * panel_rows) {
      blocking.row_tile = even_piece(blocking.row_tile, ceil_div(blocking.row_tile, 2), panel_rows);
    } else {
      break;
    }
  }
  return blocking;
}

template <class T>
void scale(T beta, MatrixView<T> c) {
  for (int64_t i = 0; i < c.rows; ++i) {
    T* row = c.row(i);
    if (beta == T(0)) {
      std::fill_n(row, c.cols, T(0));
    } else {
      for (int64_t j = 0; j < c.cols; ++j) row[j] *= beta;
    }
  }
}

template <class T>
void check(const StridedView<const T>& a, const StridedView<const T>& b, const MatrixView<T>& c) {
  require(a.rows >= 0 && a.cols >= 0 && b.cols >= 0, "gemm: negative size");
  require(b.rows == a.cols,
          "gemm: b: expected " + std::to_string(a.cols) + " rows, got " + std::to_string(b.rows));
  require_shape(c, a.rows, b.cols, "gemm: c");
  require(a.data != nullptr || a.rows == 0 || a.cols == 0, "gemm: a: null pointer");
  require(b.data != nullptr || b.rows == 0 || b.cols == 0, "gemm: b: null pointer");
}

/// One call's operands, blocking and packed copies; every thread of the team runs `run`.
template <class T>
struct Product {
  const cpu::GemmKernels<T>& kernels;
  T alpha;
  StridedView<const T> a;
  StridedView<const T> b;
  T beta;
  MatrixView<T> c;
  Blocking blocking;
  T* a_packed;
  T* b_packed;

  /// Packs panel `index` of `source` (its rows are the panel's width): depths p0 .. p1, one packed
  /// block per k_step.
  void pack(const StridedView<const T>& source,
            int64_t width,
            int64_t index,
            int64_t block_start,
            int64_t block_size,
            int64_t p0,
            int64_t p1,
            T* packed) const noexcept {
    const int64_t first = index * width;
    const int64_t n_valid = std::min(width, source.rows - block_start - first);
    for (int64_t p = p0; p < p1; p += blocking.k_step) {
      const int64_t depth = std::min(blocking.k_step, p1 - p);
      kernels.pack_panel(
          width,
          n_valid,
          depth,
          source.data + (block_start + first) * source.row_stride + p * source.col_stride,
          source.row_stride,
          source.col_stride,
          packed + (p - p0) * block_size + first * depth);
    }
  }

  /// All depths p0 .. p1 of one tile of c.
  void multiply_tile(
      int64_t i0, int64_t j0, int64_t i, int64_t j, int64_t p0, int64_t p1) const noexcept {
    const int64_t rows = std::min({blocking.row_tile, blocking.row_block - i, c.rows - i0 - i});
    const int64_t cols = std::min({blocking.col_tile, blocking.col_block - j, c.cols - j0 - j});
    if (rows <= 0 || cols <= 0) return;
    for (int64_t p = p0; p < p1; p += blocking.k_step) {
      const int64_t depth = std::min(blocking.k_step, p1 - p);
      kernels.tile(rows,
                   cols,
                   depth,
                   alpha,
                   a_packed + (p - p0) * blocking.row_block + i * depth,
                   b_packed + (p - p0) * blocking.col_block + j * depth,
                   p == 0 ? beta : T(1),
                   c.row(i0 + i) + j0 + j,
                   c.stride);
    }
  }

  void run() const noexcept {
    const int64_t row_tiles = ceil_div(blocking.row_block, blocking.row_tile);
    const int64_t col_tiles = ceil_div(blocking.col_block, blocking.col_tile);
    for (int64_t j0 = 0; j0 < c.cols; j0 += blocking.col_block) {
      const int64_t b_panels =
          ceil_div(std::min(blocking.col_block, c.cols - j0), kernels.panel_cols);
      for (int64_t p0 = 0; p0 < a.cols; p0 += blocking.k_group) {
        const int64_t p1 = std::min(p0 + blocking.k_group, a.cols);
        for (int64_t i0 = 0; i0 < c.rows; i0 += blocking.row_block) {
          const int64_t a_panels =
              ceil_div(std::min(blocking.row_block, c.rows - i0), kernels.panel_rows);
          const int64_t new_b_panels = i0 == 0 ? b_panels : 0;  // b serves all row blocks
#pragma omp for schedule(dynamic, 1)
          for (int64_t q = 0; q < new_b_panels + a_panels; ++q) {
            if (q < new_b_panels) {
              pack(b.transposed(), kernels.panel_cols, q, j0, blocking.col_block, p0, p1, b_packed);
            } else {
              pack(a,
                   kernels.panel_rows,
                   q - new_b_panels,
                   i0,
                   blocking.row_block,
                   p0,
                   p1,
                   a_packed);
            }
          }
#pragma omp for schedule(dynamic, 1)
          for (int64_t task = 0; task < row_tiles * col_tiles; ++task) {
            multiply_tile(i0,
                          j0,
                          task / col_tiles * blocking.row_tile,
                          task % col_tiles * blocking.col_tile,
                          p0,
                          p1);
          }
        }
      }
    }
  }
};

}  // namespace

template <class T>
void gemm(T alpha,
          std::type_identity_t<StridedView<const T>> a,
          std::type_identity_t<StridedView<const T>> b,
          T beta,
          MatrixView<T> c,
          int n_threads) {
  check(a, b, c);
  const int64_t m = c.rows;
  const int64_t n = c.cols;
  const int64_t k = a.cols;
  if (m == 0 || n == 0) return;
  if (k == 0 || alpha == T(0)) return scale(beta, c);

  const cpu::GemmKernels<T>& kernels = gemm_kernels<T>();
  constexpr double kWorkPerThread = 1e6;  // multiply-adds: some 20 us
  const double work = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  const int64_t n_panels = ceil_div(m, kernels.panel_rows) * ceil_div(n, kernels.panel_cols);
  const int team = worthwhile_threads(resolve_threads(n_threads, n_panels), work, kWorkPerThread);
  const Blocking blocking = choose_blocking(m, n, k, kernels.panel_rows, kernels.panel_cols, team);
  const AlignedBuffer<T> a_packed(blocking.row_block * blocking.k_group);
  const AlignedBuffer<T> b_packed(blocking.col_block * blocking.k_group);
  const Product<T> product{
      kernels, alpha, a, b, beta, c, blocking, a_packed.data(), b_packed.data()};
#pragma omp parallel num_threads(team) if (team > 1)
  product.run();
}

template void gemm<float>(
    float, StridedView<const float>, StridedView<const float>, float, MatrixView<float>, int);
template void gemm<double>(
    double, StridedView<const double>, StridedView<const double>, double, MatrixView<double>, int);

}  // namespace cospadi::detail
