#include "cospadi/linear.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>

#include "core/buffer.hpp"
#include "core/check.hpp"
#include "core/check_typed.hpp"
#include "core/packed.hpp"
#include "core/parallel.hpp"
#include "cpu/kernel_table.hpp"

namespace cospadi {
namespace {

using detail::AlignedBuffer;
using detail::element;
using detail::require;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Number of learned atoms; checks the dictionary.
int64_t checked_atoms(const LinearMatrix& matrix) {
  if (const auto* const atoms = std::get_if<ConstTypedMatrix>(&matrix.dictionary)) {
    detail::require_typed(*atoms, matrix.d_in, atoms->cols, "dictionary");
    return atoms->cols;
  }
  if (const auto* const rows = std::get_if<PackedCoeffs>(&matrix.dictionary)) {
    detail::require_packed(*rows);
    require(rows->sparsity == matrix.d_in,
            "dictionary: expected " + std::to_string(matrix.d_in) + " values per atom, got " +
                std::to_string(rows->sparsity));
    return rows->codes.rows;
  }
  return 0;
}

int64_t code_atoms(const LinearMatrix& matrix) {
  return std::visit([](const auto& code) { return code.n_atoms; }, matrix.code);
}

int64_t code_outputs(const LinearMatrix& matrix) {
  if (const auto* const sparse = std::get_if<SparseMatrix>(&matrix.code))
    return sparse->coeffs.rows;
  return std::get<PackedSparseMatrix>(matrix.code).coeffs.codes.rows;
}

/// out [cols x rows] = in [rows x cols], `out` contiguous.
template <class T>
void transpose(const ConstTypedMatrix& in, T* out, int n_threads) {
  constexpr int64_t kBlock = 32;  // both sides of a block stay in the L1 cache
  const int64_t n_tasks = ceil_div(in.cols, kBlock);
  const int team = detail::resolve_threads(n_threads, n_tasks);
  detail::parallel_for(n_tasks, team, [&](int64_t task, int) {
    const int64_t first = task * kBlock;
    const int64_t last = std::min(first + kBlock, in.cols);
    for (int64_t i0 = 0; i0 < in.rows; i0 += kBlock) {
      const int64_t i1 = std::min(i0 + kBlock, in.rows);
      for (int64_t j = first; j < last; ++j) {
        for (int64_t i = i0; i < i1; ++i) {
          out[j * in.rows + i] = static_cast<const T*>(in.data)[i * in.stride + j];
        }
      }
    }
  });
}

/// products [rows x K] = x D for a few rows, D read as it is stored.
void multiply_few(const ConstTypedMatrix& x,
                  const ConstTypedMatrix& atoms,
                  const TypedMatrix& products,
                  int n_threads) {
  const cpu::LinearKernels& kernels = cpu::kernels().linear;
  const cpu::SparseGemmKernels& conversions = cpu::kernels().sparse_gemm;
  const AlignedBuffer<float> inputs(x.rows * x.cols);
  for (int64_t r = 0; r < x.rows; ++r) {
    conversions.load_floats(x.dtype, x.cols, element(x, r, 0), inputs.data() + r * x.cols);
  }
  const cpu::StoredDictionary dictionary{.dtype = atoms.dtype,
                                         .d_in = atoms.rows,
                                         .n_atoms = atoms.cols,
                                         .data = atoms.data,
                                         .stride = atoms.stride,
                                         .end = element(atoms, atoms.rows - 1, atoms.cols)};
  // One element from memory costs about as much as the arithmetic of four rows on it.
  constexpr double kWorkPerThread = 1e6;  // some 20 us from memory
  const double work = static_cast<double>(atoms.rows) * static_cast<double>(atoms.cols) *
                      static_cast<double>(x.rows + 4);
  const int64_t n_words = ceil_div(atoms.cols, cpu::kMaskWord);
  const int team =
      detail::worthwhile_threads(detail::resolve_threads(n_threads, n_words), work, kWorkPerThread);
  const int64_t run = std::min(kernels.block, ceil_div(n_words, team) * cpu::kMaskWord);
  const AlignedBuffer<float> sums(team * x.rows * kernels.block);
  detail::parallel_for(ceil_div(atoms.cols, run), team, [&](int64_t task, int thread) {
    float* const out = sums.data() + thread * x.rows * kernels.block;
    const int64_t first = task * run;
    const int64_t count = std::min(run, atoms.cols - first);
    kernels.multiply_dictionary(
        dictionary, first, count, x.dtype, inputs.data(), x.cols, x.rows, out, kernels.block);
    for (int64_t r = 0; r < x.rows; ++r) {
      conversions.store_floats(products.dtype,
                               count,
                               out + r * kernels.block,
                               nullptr,
                               nullptr,
                               element(products, r, first));
    }
  });
}

/// The dictionary as the product x D takes it for many rows: one row of d_in values per atom, each
/// of which is an output that uses every input.
class AtomRows {
 public:
  AtomRows(const ConstTypedMatrix& atoms, int n_threads)
      : memory_(
            detail::checked_product(detail::checked_product(atoms.rows, atoms.cols, "dictionary"),
                                    dtype_bytes(atoms.dtype),
                                    "dictionary")),
        rows_{atoms.rows, {}, {memory_.data(), atoms.dtype, atoms.cols, atoms.rows, atoms.rows}} {
    if (atoms.dtype == DType::kFloat32) {
      transpose(atoms, reinterpret_cast<uint32_t*>(memory_.data()), n_threads);
    } else {
      transpose(atoms, reinterpret_cast<uint16_t*>(memory_.data()), n_threads);
    }
  }
  [[nodiscard]] const SparseMatrix& rows() const { return rows_; }

 private:
  AlignedBuffer<char> memory_;
  SparseMatrix rows_;
};

/// products = x D. `by_atom`: the dictionary laid out for many rows, or null for few.
void multiply_dictionary(const ConstTypedMatrix& x,
                         const LinearMatrix& matrix,
                         const AtomRows* by_atom,
                         const TypedMatrix& products,
                         int n_threads) {
  if (const auto* const packed = std::get_if<PackedCoeffs>(&matrix.dictionary)) {
    return packed_gemm(x, {matrix.d_in, {}, *packed}, {}, products, n_threads);
  }
  if (by_atom != nullptr) return sparse_gemm(x, by_atom->rows(), {}, products, n_threads);
  multiply_few(x, std::get<ConstTypedMatrix>(matrix.dictionary), products, n_threads);
}

/// y = z S + bias.
void multiply_code(const ConstTypedMatrix& z,
                   const LinearMatrix& matrix,
                   const TypedMatrix& y,
                   int n_threads) {
  if (const auto* const sparse = std::get_if<SparseMatrix>(&matrix.code)) {
    return sparse_gemm(z, *sparse, matrix.bias, y, n_threads);
  }
  packed_gemm(z, std::get<PackedSparseMatrix>(matrix.code), matrix.bias, y, n_threads);
}

/// Copies x to the first columns of z, which has the same type.
void copy_inputs(const ConstTypedMatrix& x, const TypedMatrix& z) {
  const auto bytes = static_cast<size_t>(x.cols * dtype_bytes(x.dtype));
  for (int64_t i = 0; i < x.rows; ++i) std::memcpy(element(z, i, 0), element(x, i, 0), bytes);
}

}  // namespace

void linear(ConstTypedMatrix x, const LinearMatrix& matrix, TypedMatrix y, int n_threads) {
  require(x.rows >= 0 && matrix.d_in >= 0, "x: negative size");
  detail::require_typed(x, x.rows, matrix.d_in, "x");
  const int64_t n_learned = checked_atoms(matrix);
  const int64_t n_identity = matrix.has_identity ? matrix.d_in : 0;
  const int64_t width = n_identity + n_learned;
  require(code_atoms(matrix) == width,
          "code: expected " + std::to_string(width) + " atoms, got " +
              std::to_string(code_atoms(matrix)));
  detail::require_typed(y, x.rows, code_outputs(matrix), "y");
  if (n_learned == 0 && n_identity > 0) return multiply_code(x, matrix, y, n_threads);
  // Pieces of equal size: how sums are ordered depends on whether there are many rows.
  constexpr int64_t kMaxRows = 1024;
  const int64_t n_pieces = std::max<int64_t>(ceil_div(x.rows, kMaxRows), 1);
  const int64_t piece = ceil_div(x.rows, n_pieces);
  const AlignedBuffer<char> memory(detail::checked_product(
      detail::checked_product(piece, width, "z"), dtype_bytes(x.dtype), "z"));
  std::optional<AtomRows> by_atom;
  const auto* const atoms = std::get_if<ConstTypedMatrix>(&matrix.dictionary);
  if (atoms != nullptr && (piece > cpu::kernels().linear.max_rows || matrix.d_in == 0)) {
    by_atom.emplace(*atoms, n_threads);
  }
  for (int64_t first = 0; first < x.rows; first += piece) {
    const int64_t rows = std::min(piece, x.rows - first);
    const ConstTypedMatrix inputs{element(x, first, 0), x.dtype, rows, x.cols, x.stride};
    const TypedMatrix z{memory.data(), x.dtype, rows, width, width};
    if (n_identity > 0) copy_inputs(inputs, z);
    if (n_learned > 0) {
      const TypedMatrix products{element(z, 0, n_identity), z.dtype, rows, n_learned, z.stride};
      multiply_dictionary(inputs, matrix, by_atom ? &*by_atom : nullptr, products, n_threads);
    }
    multiply_code({z.data, z.dtype, z.rows, z.cols, z.stride},
                  matrix,
                  {element(y, first, 0), y.dtype, rows, y.cols, y.stride},
                  n_threads);
  }
}

}  // namespace cospadi
