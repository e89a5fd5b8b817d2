// Column-sparse problems for the emulated CUDA kernels: small integers, exact in every storage
// type, and every operand at the end of its memory or at an odd address.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/operands.hpp"
#include "cuda/values.cuh"
#include "guarded.hpp"

namespace cospadi::cuda {

inline int value_bits(ValueType type, int bits) {
  if (type == ValueType::kFloat32) return 32;
  return type == ValueType::kBFloat16 || type == ValueType::kFloat16 ? 16 : bits;
}

/// A storage type of coefficients: with the bits and the group of fields.
struct Form {
  ValueType type;
  int bits = 0;
  int group = 0;
};

constexpr Form kForms[] = {{ValueType::kFloat32},
                           {ValueType::kBFloat16},
                           {ValueType::kFloat16},
                           {ValueType::kBFloatField, 14},
                           {ValueType::kIntegerField, 8},
                           {ValueType::kIntegerField, 6},
                           {ValueType::kIntegerField, 5},
                           {ValueType::kIntegerField, 4},
                           {ValueType::kIntegerField, 3},
                           {ValueType::kIntegerField, 8, 16},
                           {ValueType::kIntegerField, 4, 5}};

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

struct CudaProblem {
  int rows;
  int n_atoms;
  int d_out;
  int sparsity;
  Form form;
  DType z_dtype;
  int n_first;                   ///< columns of the first part of z
  std::vector<int> z_values;     // [rows x n_atoms]
  std::vector<float> dense;      // [n_atoms x d_out], scales included
  std::vector<int> bias_values;  // [d_out]
  std::vector<float> coeffs;     // [d_out x sparsity], scales included
  Guarded z_first, z_second, mask, values, scale, bias;
  int misaligned;  ///< elements of z and bytes of the mask in front of the operands

  static size_t row_bytes(int sparsity, Form form) {
    return static_cast<size_t>(sparsity * value_bits(form.type, form.bits) + 7) / 8;
  }
  int n_groups() const { return form.group == 0 ? 1 : (sparsity + form.group - 1) / form.group; }
  size_t mask_bytes() const { return static_cast<size_t>(n_atoms + 7) / 8; }
  int z_padding() const { return misaligned; }

  CudaProblem(int rows_,
              int n_atoms_,
              int d_out_,
              int sparsity_,
              Form form_,
              DType z_dtype_,
              int n_first_ = -1,
              int misaligned_ = 0,
              bool has_mask = true)
      : rows(rows_),
        n_atoms(n_atoms_),
        d_out(d_out_),
        sparsity(has_mask ? sparsity_ : n_atoms_),
        form(form_),
        z_dtype(z_dtype_),
        n_first(n_first_ < 0 ? n_atoms_ : n_first_),
        z_values(static_cast<size_t>(rows_ * n_atoms_)),
        dense(static_cast<size_t>(n_atoms_ * d_out_)),
        bias_values(static_cast<size_t>(d_out_)),
        coeffs(static_cast<size_t>(d_out_ * sparsity)),
        z_first(static_cast<size_t>(rows_ * (n_first + misaligned_) * dtype_bytes(z_dtype_))),
        z_second(static_cast<size_t>(rows_ * (n_atoms_ - n_first + misaligned_) *
                                     dtype_bytes(z_dtype_))),
        mask(has_mask ? static_cast<size_t>(d_out_) * ((n_atoms_ + 7) / 8) : 0),
        values(static_cast<size_t>(d_out_) * row_bytes(sparsity, form_)),
        scale(static_cast<size_t>(d_out_ * n_groups()) * 4),
        bias(static_cast<size_t>(d_out_) * 4),
        misaligned(misaligned_),
        has_mask_(has_mask) {
    std::mt19937 generator(static_cast<unsigned>(rows * 1000003 + n_atoms * 1009 + sparsity));
    std::uniform_int_distribution<int> small(-3, 3);
    for (int& x : z_values) x = small(generator);
    for (int r = 0; r < rows; ++r) {
      for (int a = 0; a < n_atoms; ++a)
        write_z(r, a, z_values[static_cast<size_t>(r * n_atoms + a)]);
    }
    for (int j = 0; j < d_out; ++j) {
      bias_values[static_cast<size_t>(j)] = small(generator);
      bias.as<float>()[j] = static_cast<float>(bias_values[static_cast<size_t>(j)]);
      for (int g = 0; g < n_groups(); ++g) {
        scale.as<float>()[j * n_groups() + g] = std::ldexp(1.0F, small(generator) / 2);
      }
    }
    fill_columns(generator);
  }

  CodeOperand code() const {
    CodeOperand s;
    s.n_atoms = n_atoms;
    s.d_out = d_out;
    s.sparsity = sparsity;
    s.mask = has_mask_ ? mask.as<uint8_t>() : nullptr;
    s.mask_stride = static_cast<int64_t>(mask_bytes());
    s.values = values.as<uint8_t>();
    s.value_stride = static_cast<int64_t>(row_bytes(sparsity, form));
    s.type = form.type;
    s.bits = value_bits(form.type, form.bits);
    if (form.type == ValueType::kIntegerField) {
      s.scale = scale.as<float>();
      s.scale_stride = n_groups();
    }
    s.group = form.group;
    return s;
  }
  RowsOperand z() const {
    RowsOperand out;
    out.dtype = z_dtype;
    out.rows = rows;
    out.n_first = n_first;
    out.first_stride = n_first + misaligned;
    out.first = z_first.as<char>() + misaligned * dtype_bytes(z_dtype);
    out.n_second = n_atoms - n_first;
    out.second_stride = n_atoms - n_first + misaligned;
    out.second = z_second.as<char>() + misaligned * dtype_bytes(z_dtype);
    return out;
  }
  float expected(int row, int col, bool with_bias) const {
    double sum = with_bias ? bias_values[static_cast<size_t>(col)] : 0;
    for (int a = 0; a < n_atoms; ++a) {
      sum += static_cast<double>(z_values[static_cast<size_t>(row * n_atoms + a)]) *
             static_cast<double>(dense[static_cast<size_t>(a * d_out + col)]);
    }
    return static_cast<float>(sum);
  }

 private:
  void write_z(int row, int atom, int value) {
    const bool is_first = atom < n_first;
    const RowsOperand operand = z();
    void* data = const_cast<void*>(is_first ? operand.first : operand.second);
    const int64_t stride = is_first ? operand.first_stride : operand.second_stride;
    store_element(static_cast<float>(value),
                  data,
                  z_dtype,
                  row * stride + (is_first ? atom : atom - n_first));
  }

  void fill_columns(std::mt19937& generator) {
    std::uniform_int_distribution<int> small(-3, 3);
    std::vector<int> atoms(static_cast<size_t>(n_atoms));
    std::iota(atoms.begin(), atoms.end(), 0);
    std::memset(values.as<char>(), 0, values.bytes());
    if (has_mask_) std::memset(mask.as<char>(), 0, mask.bytes());
    for (int j = 0; j < d_out; ++j) {
      std::shuffle(atoms.begin(), atoms.end(), generator);
      std::sort(atoms.begin(), atoms.begin() + sparsity);
      for (int t = 0; t < sparsity; ++t) {
        const int atom = atoms[static_cast<size_t>(t)];
        const int value = small(generator);
        if (has_mask_) {
          mask.as<uint8_t>()[static_cast<size_t>(j) * mask_bytes() + atom / 8] |=
              static_cast<uint8_t>(1 << (atom % 8));
        }
        write_value(j, t, value);
        float factor = 1.0F;
        if (form.type == ValueType::kIntegerField) {
          const int group = form.group == 0 ? 0 : t / form.group;
          factor = scale.as<float>()[j * n_groups() + group];
        }
        coeffs[static_cast<size_t>(j * sparsity + t)] = factor * static_cast<float>(value);
        dense[static_cast<size_t>(atom * d_out + j)] = factor * static_cast<float>(value);
      }
    }
  }

  void write_value(int column, int t, int value) {
    uint8_t* row = values.as<uint8_t>() + static_cast<size_t>(column) * row_bytes(sparsity, form);
    switch (form.type) {
      case ValueType::kFloat32:
        return store_element(static_cast<float>(value), row, DType::kFloat32, t);
      case ValueType::kBFloat16:
        return store_element(static_cast<float>(value), row, DType::kBFloat16, t);
      case ValueType::kFloat16:
        return store_element(static_cast<float>(value), row, DType::kFloat16, t);
      default: {
        uint32_t field = static_cast<uint32_t>(value);
        if (form.type == ValueType::kBFloatField) {
          field = std::bit_cast<uint32_t>(static_cast<float>(value)) >> (32 - form.bits);
        }
        for (int b = 0; b < form.bits; ++b) {
          const int at = t * form.bits + b;
          row[at / 8] |= static_cast<uint8_t>((field >> b & 1) << (at % 8));
        }
      }
    }
  }

  bool has_mask_;
};

}  // namespace cospadi::cuda
