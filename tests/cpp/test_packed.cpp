#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cospadi/mask.hpp"
#include "cospadi/packed.hpp"
#include "cospadi/status.hpp"
#include "guarded.hpp"

namespace cospadi {
namespace {

constexpr CodeFormat kFormats[] = {{CodeKind::kBFloat, 14},
                                   {CodeKind::kBFloat, 9},
                                   {CodeKind::kBFloat, 16},
                                   {CodeKind::kInteger, 8},
                                   {CodeKind::kInteger, 7},
                                   {CodeKind::kInteger, 6},
                                   {CodeKind::kInteger, 5},
                                   {CodeKind::kInteger, 4},
                                   {CodeKind::kInteger, 3},
                                   {CodeKind::kInteger, 2}};

/// Upper bits of the bfloat16 of 0, 1 or -1 times a power of two, all of which 9 bits hold.
int32_t bfloat_field(int value, int bits) {
  const int32_t word = value == 0 ? 0 : (value < 0 ? 0xbf80 : 0x3f80);
  return word >> (16 - bits);
}

/// Integers -1, 0, 1 in every format; scales are powers of two, so that all sums are exact.
struct Problem {
  int64_t rows;
  int64_t n_atoms;
  int64_t d_out;
  int64_t sparsity;
  CodeFormat format;
  int64_t group;
  bool all_atoms;

  Guarded mask;
  Guarded codes;
  Guarded scale;
  std::vector<float> z;
  std::vector<float> dense;  // [n_atoms x d_out]

  Problem(int64_t rows_,
          int64_t n_atoms_,
          int64_t d_out_,
          int64_t sparsity_,
          CodeFormat format_,
          int64_t group_,
          bool all_atoms_)
      : rows(rows_),
        n_atoms(n_atoms_),
        d_out(d_out_),
        sparsity(all_atoms_ ? n_atoms_ : sparsity_),
        format(format_),
        group(format_.kind == CodeKind::kInteger ? group_ : 0),
        all_atoms(all_atoms_),
        mask(static_cast<size_t>(d_out_ * mask_row_bytes(n_atoms_))),
        codes(static_cast<size_t>(d_out_ * packed_row_bytes(sparsity, format_.bits))),
        scale(static_cast<size_t>(d_out_ * scale_group_count(sparsity, group) * 4)),
        z(static_cast<size_t>(rows_ * n_atoms_)),
        dense(static_cast<size_t>(n_atoms_ * d_out_)) {
    std::mt19937 generator(static_cast<unsigned>(rows * 7919 + n_atoms * 31 + format.bits));
    std::uniform_int_distribution<int> value(-1, 1);
    for (float& x : z) x = static_cast<float>(value(generator));
    const int64_t n_groups = scale_group_count(sparsity, group);
    for (int64_t i = 0; i < d_out * n_groups; ++i) {
      scale.as<float>()[i] = value(generator) > 0 ? 2.0F : 0.5F;
    }
    std::vector<int32_t> fields(static_cast<size_t>(d_out * sparsity));
    std::vector<int32_t> indices(fields.size());
    std::vector<int32_t> atoms(static_cast<size_t>(n_atoms));
    std::iota(atoms.begin(), atoms.end(), 0);
    for (int64_t j = 0; j < d_out; ++j) {
      std::shuffle(atoms.begin(), atoms.end(), generator);
      std::sort(atoms.begin(), atoms.begin() + sparsity);
      for (int64_t t = 0; t < sparsity; ++t) {
        const auto at = static_cast<size_t>(j * sparsity + t);
        const int number = value(generator);
        const bool is_integer = format.kind == CodeKind::kInteger;
        indices[at] = atoms[static_cast<size_t>(t)];
        fields[at] = is_integer ? number : bfloat_field(number, format.bits);
        const int64_t of_group = group == 0 ? 0 : t / group;
        const float factor = is_integer ? scale.as<float>()[j * n_groups + of_group] : 1.0F;
        dense[static_cast<size_t>(indices[at] * d_out + j)] = static_cast<float>(number) * factor;
      }
    }
    pack_fields({fields.data(), d_out, sparsity},
                format.bits,
                {codes.as<uint8_t>(), d_out, packed_row_bytes(sparsity, format.bits)},
                1);
    pack_mask({indices.data(), d_out, sparsity},
              n_atoms,
              {mask.as<uint8_t>(), d_out, mask_row_bytes(n_atoms)});
  }

  PackedSparseMatrix matrix() const {
    const int64_t n_groups = scale_group_count(sparsity, group);
    PackedSparseMatrix s;
    s.n_atoms = n_atoms;
    if (!all_atoms) s.mask = {mask.as<uint8_t>(), d_out, mask_row_bytes(n_atoms)};
    s.coeffs.sparsity = sparsity;
    s.coeffs.format = format;
    s.coeffs.codes = {codes.as<uint8_t>(), d_out, packed_row_bytes(sparsity, format.bits)};
    if (format.kind == CodeKind::kInteger) {
      s.coeffs.scale = {scale.as<void>(), DType::kFloat32, d_out, n_groups, n_groups};
    }
    s.coeffs.group = group;
    return s;
  }
  ConstTypedMatrix z_matrix() const { return {z.data(), DType::kFloat32, rows, n_atoms, n_atoms}; }
  std::vector<float> product(int n_threads) const {
    std::vector<float> y(static_cast<size_t>(rows * d_out), -7.0F);
    packed_gemm(
        z_matrix(), matrix(), {}, {y.data(), DType::kFloat32, rows, d_out, d_out}, n_threads);
    return y;
  }
  float expected(int64_t row, int64_t col) const {
    float sum = 0.0F;
    for (int64_t a = 0; a < n_atoms; ++a) {
      sum +=
          z[static_cast<size_t>(row * n_atoms + a)] * dense[static_cast<size_t>(a * d_out + col)];
    }
    return sum;
  }
};

TEST(Packed, ExactOnIntegersAtTheEdgeOfMemory) {
  for (const CodeFormat format : kFormats) {
    for (const int64_t rows : {1, 5, 40}) {
      for (const int64_t n_atoms : {1, 7, 33, 100, 300}) {
        for (const int64_t group : {0, 3, 64}) {
          for (const bool all_atoms : {false, true}) {
            const Problem problem(rows, n_atoms, 21, (n_atoms + 1) / 2, format, group, all_atoms);
            const std::vector<float> y = problem.product(1);
            for (int64_t r = 0; r < rows; ++r) {
              for (int64_t j = 0; j < 21; ++j) {
                ASSERT_EQ(y[static_cast<size_t>(r * 21 + j)], problem.expected(r, j))
                    << rows << " rows, " << n_atoms << " atoms, " << format.bits
                    << " bits, groups of " << group << ", at " << r << ", " << j;
              }
            }
          }
        }
      }
    }
  }
}

TEST(Packed, NeverReadsOutsideWhenTheMaskLies) {
  for (const CodeFormat format : kFormats) {
    for (const int64_t rows : {1, 40}) {
      for (const int64_t group : {0, 4}) {
        const Problem problem(rows, 200, 33, 2, format, group, false);
        std::fill_n(problem.mask.as<uint8_t>(), problem.mask.bytes(), uint8_t{0xff});
        EXPECT_EQ(problem.product(2).size(), static_cast<size_t>(rows * 33));
      }
    }
  }
}

TEST(Packed, SameBitsForAnyThreadCount) {
  for (const int64_t rows : {1, 50}) {
    const Problem problem(rows, 300, 8000, 150, {CodeKind::kInteger, 5}, 64, false);
    const std::vector<float> first = problem.product(1);
    for (const int threads : {2, 5}) ASSERT_EQ(problem.product(threads), first) << threads;
  }
}

TEST(Packed, FieldsComeBack) {
  for (int bits = kMinFieldBits; bits <= kMaxFieldBits; ++bits) {
    for (const int64_t n : {1, 7, 8, 9, 33}) {
      const int64_t row_bytes = packed_row_bytes(n, bits);
      const int64_t stride = row_bytes + 3;
      std::vector<int32_t> values(static_cast<size_t>(3 * n));
      for (size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<int32_t>(i * 40503 % (size_t{1} << bits)) - (1 << (bits - 1));
      }
      std::vector<uint8_t> packed(static_cast<size_t>(3 * stride), uint8_t{0xaa});
      pack_fields({values.data(), 3, n}, bits, {packed.data(), 3, row_bytes, stride}, 1);
      EXPECT_EQ(packed[static_cast<size_t>(row_bytes)], 0xaa) << "between rows";
      std::vector<int32_t> out(values.size());
      unpack_fields({packed.data(), 3, row_bytes, stride}, bits, true, {out.data(), 3, n}, 1);
      EXPECT_EQ(out, values) << bits << " bits, " << n << " fields";
    }
  }
}

TEST(Packed, DecodesWithStrides) {
  const Problem problem(1, 40, 6, 40, {CodeKind::kInteger, 3}, 16, true);
  std::vector<float> out(6 * 50, -7.0F);
  decode_coeffs(problem.matrix().coeffs, {out.data(), 6, 40, 50}, 1);
  for (int64_t j = 0; j < 6; ++j) {
    for (int64_t t = 0; t < 50; ++t) {
      const float expected = t < 40 ? problem.dense[static_cast<size_t>(t * 6 + j)] : -7.0F;
      ASSERT_EQ(out[static_cast<size_t>(j * 50 + t)], expected);
    }
  }
}

TEST(Packed, RejectsWrongArguments) {
  const Problem problem(2, 40, 6, 20, {CodeKind::kInteger, 4}, 8, false);
  std::vector<float> y(12);
  const auto rejects = [&](const PackedSparseMatrix& s) {
    try {
      packed_gemm(problem.z_matrix(), s, {}, {y.data(), DType::kFloat32, 2, 6, 6}, 1);
    } catch (const Error& error) {
      return error.code() == ErrorCode::kInvalidArgument;
    }
    return false;
  };
  const PackedSparseMatrix good = problem.matrix();
  EXPECT_FALSE(rejects(good));
  const auto change = [&](auto edit) {
    PackedSparseMatrix s = good;
    edit(s);
    return rejects(s);
  };
  EXPECT_TRUE(change([](auto& s) { s.coeffs.format.bits = 9; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.format.bits = 1; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.format = {CodeKind::kBFloat, 8}; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.format.kind = static_cast<CodeKind>(7); }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.sparsity = 22; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.sparsity = -2; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.sparsity = int64_t{1} << 61; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.group = -1; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.group = 0; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.scale.data = nullptr; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.scale.rows = 5; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.scale.stride = 2; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.codes.data = nullptr; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.codes.cols = 9; }));
  EXPECT_TRUE(change([](auto& s) { s.coeffs.codes.stride = int64_t{1} << 62; }));
  EXPECT_TRUE(change([](auto& s) { s.mask.cols = 4; }));
  EXPECT_TRUE(change([](auto& s) { s.mask = {}; }));  // s = 20 of 40 atoms
  EXPECT_TRUE(change([](auto& s) { s.n_atoms = 39; }));
  const int32_t value = 9;
  uint8_t byte = 0x55;
  EXPECT_THROW(pack_fields({&value, 1, 1}, 3, {&byte, 1, 1}, 1), Error);
  EXPECT_EQ(byte, 0x55);
  EXPECT_THROW(pack_fields({&value, 1, 1}, 17, {&byte, 1, 3}, 1), Error);
}

}  // namespace
}  // namespace cospadi
