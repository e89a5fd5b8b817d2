// A product with a column-sparse matrix of small integers, in memory that notices reads beyond it.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "cospadi/mask.hpp"
#include "cospadi/sparse_gemm.hpp"
#include "guarded.hpp"

namespace cospadi {

/// Small integers are exact in every storage type: bits of `value` as `dtype`.
inline void write_value(DType dtype, int value, void* out) {
  const float x = static_cast<float>(value);
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  uint16_t half = static_cast<uint16_t>(bits >> 16);  // bfloat16
  if (dtype == DType::kFloat32) {
    std::memcpy(out, &x, sizeof(x));
    return;
  }
  if (dtype == DType::kFloat16) {
    // exponent rebiased from 127 to 15
    half = x == 0.0F ? uint16_t{0}
                     : static_cast<uint16_t>(((bits >> 16) & 0x8000U) |
                                             (((bits & 0x7fffffffU) - (112U << 23)) >> 13));
  }
  std::memcpy(out, &half, sizeof(half));
}

struct Problem {
  int64_t rows;
  int64_t n_atoms;
  int64_t d_out;
  int64_t sparsity;
  DType z_dtype;
  DType coeffs_dtype;

  Guarded z;
  Guarded mask;
  Guarded coeffs;
  std::vector<int> z_values;
  std::vector<int> dense;  // [n_atoms x d_out]

  Problem(int64_t rows_, int64_t n_atoms_, int64_t d_out_, int64_t sparsity_, DType zt, DType ct)
      : rows(rows_),
        n_atoms(n_atoms_),
        d_out(d_out_),
        sparsity(sparsity_),
        z_dtype(zt),
        coeffs_dtype(ct),
        z(static_cast<size_t>(rows_ * n_atoms_ * dtype_bytes(zt))),
        mask(static_cast<size_t>(d_out_ * mask_row_bytes(n_atoms_))),
        coeffs(static_cast<size_t>(d_out_ * sparsity_ * dtype_bytes(ct))),
        z_values(static_cast<size_t>(rows_ * n_atoms_)),
        dense(static_cast<size_t>(n_atoms_ * d_out_)) {
    std::mt19937 generator(static_cast<unsigned>(rows * 1000003 + n_atoms * 1009 + sparsity));
    std::uniform_int_distribution<int> value(-3, 3);
    for (int64_t i = 0; i < rows * n_atoms; ++i) {
      z_values[static_cast<size_t>(i)] = value(generator);
      write_value(z_dtype, z_values[static_cast<size_t>(i)], z.as<char>() + i * dtype_bytes(zt));
    }
    std::vector<int32_t> indices(static_cast<size_t>(d_out * sparsity));
    std::vector<int32_t> atoms(static_cast<size_t>(n_atoms));
    std::iota(atoms.begin(), atoms.end(), 0);
    for (int64_t j = 0; j < d_out; ++j) {
      std::shuffle(atoms.begin(), atoms.end(), generator);
      std::sort(atoms.begin(), atoms.begin() + sparsity);
      for (int64_t t = 0; t < sparsity; ++t) {
        const int64_t at = j * sparsity + t;
        const int32_t atom = atoms[static_cast<size_t>(t)];
        const int coefficient = value(generator);
        indices[static_cast<size_t>(at)] = atom;
        dense[static_cast<size_t>(atom * d_out + j)] = coefficient;
        write_value(ct, coefficient, coeffs.as<char>() + at * dtype_bytes(ct));
      }
    }
    pack_mask({indices.data(), d_out, sparsity}, n_atoms, mask_view());
  }

  MatrixView<uint8_t> mask_view() const {
    return {mask.as<uint8_t>(), d_out, mask_row_bytes(n_atoms)};
  }
  SparseMatrix sparse() const {
    return {n_atoms, mask_view(), {coeffs.as<void>(), coeffs_dtype, d_out, sparsity, sparsity}};
  }
  ConstTypedMatrix z_matrix() const { return {z.as<void>(), z_dtype, rows, n_atoms, n_atoms}; }
  int expected(int64_t row, int64_t col) const {
    int sum = 0;
    for (int64_t a = 0; a < n_atoms; ++a) {
      sum += z_values[static_cast<size_t>(row * n_atoms + a)] *
             dense[static_cast<size_t>(a * d_out + col)];
    }
    return sum;
  }
};

inline constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

}  // namespace cospadi
