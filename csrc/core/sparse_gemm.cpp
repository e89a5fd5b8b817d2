#include "cospadi/sparse_gemm.hpp"

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/buffer.hpp"
#include "core/check.hpp"
#include "core/parallel.hpp"
#include "cospadi/mask.hpp"
#include "cpu/kernel_table.hpp"

namespace cospadi {
namespace {

using detail::AlignedBuffer;
using detail::require;

template <class Void>
void require_typed(const BasicTypedMatrix<Void>& m, int64_t rows, int64_t cols, const char* name) {
  detail::require_shape(
      MatrixView<const char>(static_cast<const char*>(m.data), m.rows, m.cols, m.stride),
      rows,
      cols,
      name);
  detail::checked_product(detail::checked_product(std::max<int64_t>(m.rows, 1), m.stride, name),
                          dtype_bytes(m.dtype),
                          name);
}

void check(const ConstTypedMatrix& z,
           const SparseMatrix& s,
           const ConstTypedVector& bias,
           const TypedMatrix& y) {
  const int64_t d_out = s.coeffs.rows;
  const int64_t sparsity = s.coeffs.cols;
  require(z.rows >= 0 && s.n_atoms >= 0 && d_out >= 0 && sparsity >= 0,
          "sparse_gemm: negative size");
  require_typed(z, z.rows, s.n_atoms, "z");
  detail::require_shape(s.mask, d_out, mask_row_bytes(s.n_atoms), "mask");
  require_typed(s.coeffs, d_out, sparsity, "coeffs");
  require(sparsity <= s.n_atoms,
          "coeffs: s = " + std::to_string(sparsity) + " is more than the " +
              std::to_string(s.n_atoms) + " atoms");
  require_typed(y, z.rows, d_out, "y");
  require(
      bias.data == nullptr || bias.size == d_out,
      "bias: expected " + std::to_string(d_out) + " elements, got " + std::to_string(bias.size));
}

const void* element(const ConstTypedMatrix& m, int64_t row, int64_t col) {
  return static_cast<const char*>(m.data) + (row * m.stride + col) * dtype_bytes(m.dtype);
}

void* element(const TypedMatrix& m, int64_t row, int64_t col) {
  return static_cast<char*>(m.data) + (row * m.stride + col) * dtype_bytes(m.dtype);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// One checked call.
struct Product {
  const cpu::SparseGemmKernels& kernels;
  ConstTypedMatrix z;
  cpu::SparseColumns s;
  int64_t d_out;
  const float* bias;
  TypedMatrix y;
  int n_threads;

  [[nodiscard]] cpu::StoredRows stored_rows(int64_t first, int64_t count) const {
    return {.dtype = z.dtype, .rows = count, .data = element(z, first, 0), .stride = z.stride};
  }

  /// y(row .. row + rows, col .. col + cols) = sums + bias.
  void store(int64_t row,
             int64_t col,
             int64_t rows,
             int64_t cols,
             const float* sums,
             int64_t stride) const noexcept {
    for (int64_t r = 0; r < rows; ++r) {
      kernels.store_floats(y.dtype,
                           cols,
                           sums + r * stride,
                           bias == nullptr ? nullptr : bias + col,
                           element(y, row + r, col));
    }
  }

  void multiply_few(int64_t first_row, int64_t rows) const;
  void multiply_many() const;
};

/// Rows first_row .. first_row + rows, at most max_few_rows of them.
void Product::multiply_few(int64_t first_row, int64_t rows) const {
  // Each thread walks a few long runs of columns: what it fetches ahead is then its own.
  constexpr int64_t kBlock = 64;
  constexpr int64_t kRunsPerThread = 4;
  // One word of one column costs about as much as four rows of arithmetic on it.
  constexpr double kWorkPerThread = 2e6;  // measured: 20 us
  const double work =
      static_cast<double>(d_out) * static_cast<double>(s.n_atoms) * static_cast<double>(rows + 4);
  const int wanted = detail::resolve_threads(n_threads, ceil_div(d_out, kBlock));
  const int team = detail::worthwhile_threads(wanted, work, kWorkPerThread);
  const int64_t run = ceil_div(ceil_div(d_out, kRunsPerThread * team), kBlock) * kBlock;

  const AlignedBuffer<float> prepared(kernels.prepared_size(rows, s.n_atoms));
  const cpu::StoredRows z_rows = stored_rows(first_row, rows);
  kernels.prepare(z_rows, s, prepared.data());
  detail::parallel_for(ceil_div(d_out, run), team, [&](int64_t task, int) {
    alignas(64) float sums[cpu::kMaxFewRows * kBlock];
    const int64_t end = std::min(d_out, (task + 1) * run);
    for (int64_t j = task * run; j < end; j += kBlock) {
      const int64_t cols = std::min(kBlock, end - j);
      kernels.multiply_few(s, j, cols, z_rows, prepared.data(), sums, kBlock);
      store(first_row, j, rows, cols, sums, kBlock);
    }
  });
}

/// S expanded to packed panels, block of columns by block of columns, and multiplied as dense.
void Product::multiply_many() const {
  constexpr int64_t kDepth = 256;                   // elements: a panel stays in the L1 cache
  constexpr int64_t kPackedElements = 1024 * 1024;  // of z at a time: 4 MiB
  constexpr int64_t kMaxRows = 512;
  const int64_t word_elements = kernels.word_elements(z.dtype, s.dtype);
  const int64_t n_words = ceil_div(s.n_atoms, cpu::kMaskWord);
  const int64_t word_step = kDepth / word_elements;
  const int64_t panel_rows = kernels.panel_rows;
  const int64_t panel_cols = kernels.panel_cols;

  const int64_t affordable = kPackedElements / (n_words * word_elements);
  const int64_t max_rows = std::clamp<int64_t>(affordable, 64, kMaxRows);
  const int64_t row_block =
      ceil_div(ceil_div(z.rows, ceil_div(z.rows, max_rows)), panel_rows) * panel_rows;
  constexpr double kWorkPerThread = 2e6;  // multiply-adds: some 20 us
  const double work =
      static_cast<double>(d_out) * static_cast<double>(s.n_atoms) * static_cast<double>(z.rows);
  const int wanted = detail::worthwhile_threads(
      detail::resolve_threads(n_threads, ceil_div(d_out, panel_cols)), work, kWorkPerThread);
  // Two panels share each packed row panel, unless that leaves threads without work.
  const int64_t col_block = d_out >= 8 * panel_cols * wanted ? 2 * panel_cols : panel_cols;
  const int64_t n_tasks = ceil_div(d_out, col_block);
  const int team = detail::resolve_threads(wanted, n_tasks);

  const AlignedBuffer<float> a_packed(row_block * n_words * word_elements);
  const int64_t b_size = col_block * word_step * word_elements;
  const int64_t c_size = row_block * col_block;
  const AlignedBuffer<float> workspaces((b_size + c_size) * team);

  for (int64_t i0 = 0; i0 < z.rows; i0 += row_block) {
    const int64_t rows = std::min(row_block, z.rows - i0);
    detail::parallel_for(ceil_div(rows, panel_rows), team, [&](int64_t panel, int) {
      const int64_t i = panel * panel_rows;
      const cpu::StoredRows z_rows = stored_rows(i0 + i, std::min(panel_rows, rows - i));
      for (int64_t word = 0; word < n_words; word += word_step) {
        const int64_t step = std::min(word_step, n_words - word);
        kernels.pack_rows(
            z_rows, s, word, step, a_packed.data() + (word * row_block + i * step) * word_elements);
      }
    });
    detail::parallel_for(n_tasks, team, [&](int64_t task, int thread) {
      // coefficients consumed so far of each column of the block
      int64_t offsets[2 * cpu::kMaxPanelCols] = {};
      float* b_packed = workspaces.data() + (b_size + c_size) * thread;
      float* sums = b_packed + b_size;
      const int64_t j0 = task * col_block;
      const int64_t cols = std::min(col_block, d_out - j0);
      for (int64_t word = 0; word < n_words; word += word_step) {
        const int64_t step = std::min(word_step, n_words - word);
        for (int64_t j = 0; j < cols; j += panel_cols) {
          kernels.expand_columns(s,
                                 z.dtype,
                                 j0 + j,
                                 std::min(panel_cols, cols - j),
                                 word,
                                 step,
                                 offsets + j,
                                 b_packed + j * step * word_elements);
        }
        kernels.multiply_panels(z.dtype,
                                s.dtype,
                                rows,
                                cols,
                                step,
                                a_packed.data() + word * row_block * word_elements,
                                b_packed,
                                word == 0 ? 0.0F : 1.0F,
                                sums,
                                col_block);
      }
      store(i0, j0, rows, cols, sums, col_block);
    });
  }
}

cpu::SparseColumns columns_of(const SparseMatrix& s) {
  const ConstTypedMatrix& coeffs = s.coeffs;
  const bool is_empty = coeffs.rows == 0 || coeffs.cols == 0;
  return {.n_atoms = s.n_atoms,
          .mask = s.mask.data,
          .mask_stride = s.mask.stride,
          .dtype = coeffs.dtype,
          .coeffs = coeffs.data,
          .coeffs_stride = is_empty ? 0 : coeffs.stride,
          .coeffs_end = is_empty ? coeffs.data : element(coeffs, coeffs.rows - 1, coeffs.cols)};
}

}  // namespace

void sparse_gemm(ConstTypedMatrix z,
                 const SparseMatrix& s,
                 ConstTypedVector bias,
                 TypedMatrix y,
                 int n_threads) {
  check(z, s, bias, y);
  const int64_t d_out = s.coeffs.rows;
  if (z.rows == 0 || d_out == 0) return;
  const cpu::SparseGemmKernels& kernels = cpu::kernels().sparse_gemm;
  const AlignedBuffer<float> bias_floats(bias.data == nullptr ? 0 : d_out);
  if (bias.data != nullptr) {
    kernels.load_floats(bias.dtype, d_out, bias.data, bias_floats.data());
  }
  const Product product{kernels, z, columns_of(s), d_out, bias_floats.data(), y, n_threads};
  if (z.rows > kernels.max_few_rows && s.n_atoms > 0) return product.multiply_many();
  for (int64_t r = 0; r < z.rows; r += kernels.max_few_rows) {
    product.multiply_few(r, std::min(kernels.max_few_rows, z.rows - r));
  }
}

}  // namespace cospadi
