#include "cospadi/sparse_gemm.hpp"

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/buffer.hpp"
#include "core/check.hpp"
#include "core/check_typed.hpp"
#include "core/packed.hpp"
#include "core/parallel.hpp"
#include "cospadi/mask.hpp"
#include "cospadi/packed.hpp"
#include "cpu/kernel_table.hpp"

namespace cospadi {
namespace {

using detail::AlignedBuffer;
using detail::element;
using detail::require;
using detail::require_typed;

/// Checks everything but S [n_atoms x d_out] itself.
void check(const ConstTypedMatrix& z,
           int64_t n_atoms,
           int64_t d_out,
           int64_t sparsity,
           const ConstTypedVector& bias,
           const TypedMatrix& y) {
  require(z.rows >= 0 && n_atoms >= 0 && d_out >= 0 && sparsity >= 0, "negative size");
  require_typed(z, z.rows, n_atoms, "z");
  require(sparsity <= n_atoms,
          "coeffs: s = " + std::to_string(sparsity) + " is more than the " +
              std::to_string(n_atoms) + " atoms");
  require_typed(y, z.rows, d_out, "y");
  require(
      bias.data == nullptr || bias.size == d_out,
      "bias: expected " + std::to_string(d_out) + " elements, got " + std::to_string(bias.size));
}

/// A mask of the right shape, or none where every output uses every atom.
void check_support(const MatrixView<const uint8_t>& mask,
                   int64_t n_atoms,
                   int64_t d_out,
                   int64_t sparsity) {
  if (mask.data != nullptr) {
    return detail::require_shape(mask, d_out, mask_row_bytes(n_atoms), "mask");
  }
  require(sparsity == n_atoms || d_out == 0,
          "sparsity: expected all " + std::to_string(n_atoms) + " atoms without a mask, got " +
              std::to_string(sparsity));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

cpu::CoeffType coeff_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return cpu::CoeffType::kBFloat16;
    case DType::kFloat16:
      return cpu::CoeffType::kFloat16;
    case DType::kFloat32:
      break;
  }
  return cpu::CoeffType::kFloat32;
}

/// The columns of S: as they are stored, or decoded a few at a time into a thread's scratch.
class Columns {
 public:
  explicit Columns(const SparseMatrix& s);
  /// `rows` of z are to be multiplied.
  Columns(const PackedSparseMatrix& s, int64_t rows, const cpu::SparseGemmKernels& kernels);

  /// Sizes and types, as the preparation of z takes them; the coefficients come from `view`.
  [[nodiscard]] const cpu::SparseColumns& form() const { return stored_; }
  [[nodiscard]] cpu::CoeffType type() const { return stored_.type; }
  [[nodiscard]] int64_t n_atoms() const { return stored_.n_atoms; }
  /// Bytes of the scratch that `view` needs for n_columns; 0 if nothing is decoded.
  [[nodiscard]] int64_t scratch_bytes(int64_t n_columns) const;
  /// Columns that stay in the L1 cache together with what is multiplied, at most `most`.
  [[nodiscard]] int64_t cached_columns(int64_t most) const;
  /// Columns first .. first + n_columns, as columns 0 .. n_columns of what is returned. The scratch
  /// is aligned to a cache line.
  cpu::SparseColumns view(int64_t first, int64_t n_columns, char* scratch) const noexcept;

 private:
  static constexpr int64_t kCacheLine = 64;

  [[nodiscard]] int64_t decoded_stride() const;
  [[nodiscard]] int64_t columns_bytes(int64_t n_columns) const;
  [[nodiscard]] int64_t padding_bytes() const;
  void decode_scaled(int64_t first, int64_t n_columns, char* scratch) const noexcept;

  cpu::SparseColumns stored_{};
  const PackedCoeffs* packed_ = nullptr;
  cpu::PackedColumns codes_{};
  bool is_grouped_ = false;
  const cpu::SparseGemmKernels* kernels_ = nullptr;
};

Columns::Columns(const SparseMatrix& s) {
  const ConstTypedMatrix& coeffs = s.coeffs;
  const bool is_empty = coeffs.rows == 0 || coeffs.cols == 0;
  stored_ = {.n_atoms = s.n_atoms,
             .mask = s.mask.data,
             .mask_stride = s.mask.data != nullptr ? s.mask.stride : 0,
             .type = coeff_type(coeffs.dtype),
             .coeffs = coeffs.data,
             .coeffs_stride = is_empty ? 0 : coeffs.stride,
             .coeffs_end = is_empty ? coeffs.data : element(coeffs, coeffs.rows - 1, coeffs.cols),
             .is_decoded = false};
}

Columns::Columns(const PackedSparseMatrix& s, int64_t rows, const cpu::SparseGemmKernels& kernels)
    : codes_(detail::packed_columns(s.coeffs)),
      is_grouped_(s.coeffs.group != 0),
      kernels_(&kernels) {
  const CodeFormat format = s.coeffs.format;
  // For few rows bytes are expanded as they are stored, which costs less than a scratch.
  const bool is_direct = format.kind == CodeKind::kInteger && format.bits == 8 && !is_grouped_ &&
                         rows <= kernels.max_byte_rows;
  if (!is_direct) packed_ = &s.coeffs;
  const cpu::CoeffType decoded = is_grouped_ ? cpu::CoeffType::kFloat32 : cpu::CoeffType::kBFloat16;
  stored_ = {.n_atoms = s.n_atoms,
             .mask = s.mask.data,
             .mask_stride = s.mask.data != nullptr ? s.mask.stride : 0,
             .type = is_direct ? cpu::CoeffType::kInt8 : decoded,
             .coeffs = codes_.codes,
             .coeffs_stride = codes_.stride,
             .coeffs_end = codes_.end,
             .is_decoded = !is_direct};
}

/// Elements from one decoded column to the next: whole blocks, and a cache line that keeps the
/// columns in flight apart in the cache sets.
int64_t Columns::decoded_stride() const {
  return detail::decoded_size(packed_->sparsity) + kCacheLine / coeff_bytes(type());
}

int64_t Columns::padding_bytes() const {
  return ceil_div(n_atoms(), cpu::kMaskWord) * cpu::kMaskWord * coeff_bytes(type());
}

int64_t Columns::columns_bytes(int64_t n_columns) const {
  return n_columns * decoded_stride() * coeff_bytes(type());
}

int64_t Columns::scratch_bytes(int64_t n_columns) const {
  if (packed_ == nullptr) return 0;
  int64_t bytes = columns_bytes(n_columns) + padding_bytes();
  if (is_grouped_) {
    bytes += detail::decoded_size(packed_->sparsity) * dtype_bytes(DType::kBFloat16) +
             packed_->scale.cols * dtype_bytes(DType::kFloat32);
  }
  return ceil_div(bytes, kCacheLine) * kCacheLine;
}

int64_t Columns::cached_columns(int64_t most) const {
  constexpr int64_t kCachedBytes = 16384;  // half of a small L1
  constexpr int64_t kTogether = 4;         // the kernels take up to four columns at a time
  if (packed_ == nullptr) return most;
  const int64_t fitting = kCachedBytes / columns_bytes(1) / kTogether * kTogether;
  return std::clamp(fitting, kTogether, most);
}

cpu::SparseColumns Columns::view(int64_t first, int64_t n_columns, char* scratch) const noexcept {
  cpu::SparseColumns columns = stored_;
  if (columns.mask != nullptr) columns.mask += first * columns.mask_stride;
  if (packed_ == nullptr) {
    columns.coeffs = static_cast<const char*>(columns.coeffs) +
                     first * columns.coeffs_stride * coeff_bytes(columns.type);
    return columns;
  }
  const int64_t stride = decoded_stride();
  if (is_grouped_) {
    decode_scaled(first, n_columns, scratch);
  } else {
    kernels_->decode_columns(
        codes_, first, n_columns, reinterpret_cast<BFloat16*>(scratch), stride);
  }
  columns.coeffs = scratch;
  columns.coeffs_stride = stride;
  columns.coeffs_end = scratch + columns_bytes(n_columns) + padding_bytes();
  return columns;
}

void Columns::decode_scaled(int64_t first, int64_t n_columns, char* scratch) const noexcept {
  const int64_t size = detail::decoded_size(packed_->sparsity);
  const int64_t n_groups = packed_->scale.cols;
  auto* const out = reinterpret_cast<float*>(scratch);
  auto* const scales =
      reinterpret_cast<float*>(scratch + columns_bytes(n_columns) + padding_bytes());
  auto* const values = reinterpret_cast<BFloat16*>(scales + n_groups);
  for (int64_t c = 0; c < n_columns; ++c) {
    kernels_->decode_columns(codes_, first + c, 1, values, size);
    kernels_->load_floats(
        packed_->scale.dtype, n_groups, element(packed_->scale, first + c, 0), scales);
    kernels_->scale_values(packed_->sparsity,
                           values,
                           scales,
                           detail::scale_group(*packed_),
                           out + c * decoded_stride());
  }
}

/// Each thread's scratch of decoded columns. Zero at first, so that a wrong mask, which reaches
/// beyond the columns, finds numbers.
class Scratch {
 public:
  Scratch(const Columns& s, int64_t n_columns, int n_threads)
      : size_(s.scratch_bytes(n_columns)), memory_(size_ * n_threads) {
    std::fill_n(memory_.data(), size_ * n_threads, char{0});
  }
  [[nodiscard]] char* of(int thread) const { return memory_.data() + size_ * thread; }

 private:
  int64_t size_;
  AlignedBuffer<char> memory_;
};

/// One checked call.
struct Product {
  const cpu::SparseGemmKernels& kernels;
  ConstTypedMatrix z;
  const Columns& s;
  int64_t d_out;
  const float* scale;  // [d_out] factors of the sums, or null
  const float* bias;   // [d_out] or null
  TypedMatrix y;
  int n_threads;

  [[nodiscard]] cpu::StoredRows stored_rows(int64_t first, int64_t count) const {
    return {.dtype = z.dtype, .rows = count, .data = element(z, first, 0), .stride = z.stride};
  }

  /// y(row .. row + rows, col .. col + cols) = sums * scale + bias.
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
                           scale == nullptr ? nullptr : scale + col,
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
      static_cast<double>(d_out) * static_cast<double>(s.n_atoms()) * static_cast<double>(rows + 4);
  const int wanted = detail::resolve_threads(n_threads, ceil_div(d_out, kBlock));
  const int team = detail::worthwhile_threads(wanted, work, kWorkPerThread);
  const int64_t run = ceil_div(ceil_div(d_out, kRunsPerThread * team), kBlock) * kBlock;

  const AlignedBuffer<float> prepared(kernels.prepared_size(rows, s.n_atoms()));
  const cpu::StoredRows z_rows = stored_rows(first_row, rows);
  kernels.prepare(z_rows, s.form(), prepared.data());
  const int64_t block = s.cached_columns(kBlock);
  const Scratch scratch(s, block, team);
  detail::parallel_for(ceil_div(d_out, run), team, [&](int64_t task, int thread) {
    alignas(64) float sums[cpu::kMaxFewRows * kBlock];
    const int64_t end = std::min(d_out, (task + 1) * run);
    for (int64_t j = task * run; j < end; j += block) {
      const int64_t cols = std::min(block, end - j);
      const cpu::SparseColumns columns = s.view(j, cols, scratch.of(thread));
      kernels.multiply_few(columns, 0, cols, z_rows, prepared.data(), sums, kBlock);
      store(first_row, j, rows, cols, sums, kBlock);
    }
  });
}

/// S expanded to packed panels, block of columns by block of columns, and multiplied as dense.
void Product::multiply_many() const {
  constexpr int64_t kDepth = 256;  // elements: a panel stays in the L1 cache
  constexpr int64_t kPackedElements = int64_t{1024} * 1024;  // of z at a time: 4 MiB
  constexpr int64_t kMaxRows = 512;
  const int64_t word_elements = kernels.word_elements(z.dtype, s.type());
  const int64_t n_words = ceil_div(s.n_atoms(), cpu::kMaskWord);
  const int64_t word_step = kDepth / word_elements;
  const int64_t panel_rows = kernels.panel_rows;
  const int64_t panel_cols = kernels.panel_cols;

  const int64_t affordable = kPackedElements / (n_words * word_elements);
  const int64_t max_rows = std::clamp<int64_t>(affordable, 64, kMaxRows);
  const int64_t row_block =
      ceil_div(ceil_div(z.rows, ceil_div(z.rows, max_rows)), panel_rows) * panel_rows;
  constexpr double kWorkPerThread = 2e6;  // multiply-adds: some 20 us
  const double work =
      static_cast<double>(d_out) * static_cast<double>(s.n_atoms()) * static_cast<double>(z.rows);
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
  const Scratch scratch(s, col_block, team);

  for (int64_t i0 = 0; i0 < z.rows; i0 += row_block) {
    const int64_t rows = std::min(row_block, z.rows - i0);
    detail::parallel_for(ceil_div(rows, panel_rows), team, [&](int64_t panel, int) {
      const int64_t i = panel * panel_rows;
      const cpu::StoredRows z_rows = stored_rows(i0 + i, std::min(panel_rows, rows - i));
      for (int64_t word = 0; word < n_words; word += word_step) {
        const int64_t step = std::min(word_step, n_words - word);
        kernels.pack_rows(z_rows,
                          s.form(),
                          word,
                          step,
                          a_packed.data() + (word * row_block + i * step) * word_elements);
      }
    });
    detail::parallel_for(n_tasks, team, [&](int64_t task, int thread) {
      // coefficients consumed so far of each column of the block
      int64_t offsets[2 * cpu::kMaxPanelCols] = {};
      float* b_packed = workspaces.data() + (b_size + c_size) * thread;
      float* sums = b_packed + b_size;
      const int64_t j0 = task * col_block;
      const int64_t cols = std::min(col_block, d_out - j0);
      const cpu::SparseColumns columns = s.view(j0, cols, scratch.of(thread));
      for (int64_t word = 0; word < n_words; word += word_step) {
        const int64_t step = std::min(word_step, n_words - word);
        for (int64_t j = 0; j < cols; j += panel_cols) {
          kernels.expand_columns(columns,
                                 z.dtype,
                                 j,
                                 std::min(panel_cols, cols - j),
                                 word,
                                 step,
                                 offsets + j,
                                 b_packed + j * step * word_elements);
        }
        kernels.multiply_panels(z.dtype,
                                s.type(),
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

/// y = z S * scale + bias for checked operands; `scale` [d_out] or null.
void multiply(const ConstTypedMatrix& z,
              const Columns& s,
              const ConstTypedMatrix& scale,
              const ConstTypedVector& bias,
              const TypedMatrix& y,
              int n_threads) {
  const int64_t d_out = y.cols;
  if (z.rows == 0 || d_out == 0) return;
  const cpu::SparseGemmKernels& kernels = cpu::kernels().sparse_gemm;
  const AlignedBuffer<float> bias_floats(bias.data == nullptr ? 0 : d_out);
  if (bias.data != nullptr) {
    kernels.load_floats(bias.dtype, d_out, bias.data, bias_floats.data());
  }
  const AlignedBuffer<float> scale_floats(scale.data == nullptr ? 0 : d_out);
  if (scale.data != nullptr) {
    const int64_t step = scale.stride == 1 ? d_out : 1;  // side by side, or one by one
    for (int64_t j = 0; j < d_out; j += step) {
      kernels.load_floats(scale.dtype, step, element(scale, j, 0), scale_floats.data() + j);
    }
  }
  const Product product{
      kernels, z, s, d_out, scale_floats.data(), bias_floats.data(), y, n_threads};
  if (z.rows > kernels.max_few_rows && s.n_atoms() > 0) return product.multiply_many();
  for (int64_t r = 0; r < z.rows; r += kernels.max_few_rows) {
    product.multiply_few(r, std::min(kernels.max_few_rows, z.rows - r));
  }
}

}  // namespace

void sparse_gemm(ConstTypedMatrix z,
                 const SparseMatrix& s,
                 ConstTypedVector bias,
                 TypedMatrix y,
                 int n_threads) {
  const int64_t d_out = s.coeffs.rows;
  check(z, s.n_atoms, d_out, s.coeffs.cols, bias, y);
  check_support(s.mask, s.n_atoms, d_out, s.coeffs.cols);
  require_typed(s.coeffs, d_out, s.coeffs.cols, "coeffs");
  multiply(z, Columns(s), {}, bias, y, n_threads);
}

void packed_gemm(ConstTypedMatrix z,
                 const PackedSparseMatrix& s,
                 ConstTypedVector bias,
                 TypedMatrix y,
                 int n_threads) {
  const PackedCoeffs& coeffs = s.coeffs;
  detail::require_packed(coeffs);
  const int64_t d_out = coeffs.codes.rows;
  check(z, s.n_atoms, d_out, coeffs.sparsity, bias, y);
  check_support(s.mask, s.n_atoms, d_out, coeffs.sparsity);
  const bool is_scaled_last = coeffs.scale.data != nullptr && coeffs.group == 0;
  multiply(z,
           Columns(s, z.rows, cpu::kernels().sparse_gemm),
           is_scaled_last ? coeffs.scale : ConstTypedMatrix{},
           bias,
           y,
           n_threads);
}

}  // namespace cospadi
