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

constexpr int64_t kColumnTask = 64;  // columns of one task: a few microseconds at batch 1

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

cpu::SparseColumns columns_of(const SparseMatrix& s) {
  const ConstTypedMatrix& coeffs = s.coeffs;
  const void* end = coeffs.rows == 0 || coeffs.cols == 0
                        ? coeffs.data
                        : element(coeffs, coeffs.rows - 1, coeffs.cols);
  return {.n_atoms = s.n_atoms,
          .mask = s.mask.data,
          .mask_stride = s.mask.stride,
          .dtype = coeffs.dtype,
          .coeffs = coeffs.data,
          .coeffs_stride = coeffs.stride,
          .coeffs_end = end};
}

/// y = z S + bias for at most max_few_rows rows.
void multiply_few(const ConstTypedMatrix& z,
                  const SparseMatrix& s,
                  const float* bias,
                  const TypedMatrix& y,
                  int n_threads) {
  const cpu::SparseGemmKernels& kernels = cpu::kernels().sparse_gemm;
  const AlignedBuffer<char> prepared(kernels.prepared_bytes(z.rows, s.n_atoms));
  kernels.prepare(z.dtype, s.coeffs.dtype, z.rows, s.n_atoms, z.data, z.stride, prepared.data());
  const cpu::PreparedRows rows{z.rows, z.dtype, prepared.data()};
  const cpu::SparseColumns columns = columns_of(s);
  const int64_t d_out = s.coeffs.rows;
  const int64_t n_tasks = (d_out + kColumnTask - 1) / kColumnTask;
  detail::parallel_for(
      n_tasks, detail::resolve_threads(n_threads, n_tasks), [&](int64_t task, int) {
        const int64_t first = task * kColumnTask;
        const int64_t count = std::min(kColumnTask, d_out - first);
        alignas(64) float sums[(cpu::kMaxFewRows + 8) * kColumnTask];
        kernels.multiply_few(columns, first, count, rows, sums, kColumnTask);
        for (int64_t r = 0; r < z.rows; ++r) {
          kernels.store_floats(y.dtype,
                               count,
                               sums + r * kColumnTask,
                               bias == nullptr ? nullptr : bias + first,
                               element(y, r, first));
        }
      });
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
  for (int64_t r = 0; r < z.rows; r += kernels.max_few_rows) {
    const int64_t count = std::min(kernels.max_few_rows, z.rows - r);
    const ConstTypedMatrix z_part{element(z, r, 0), z.dtype, count, z.cols, z.stride};
    const TypedMatrix y_part{element(y, r, 0), y.dtype, count, y.cols, y.stride};
    multiply_few(z_part, s, bias_floats.data(), y_part, n_threads);
  }
}

}  // namespace cospadi
