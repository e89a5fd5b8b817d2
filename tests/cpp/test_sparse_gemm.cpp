#include <gtest/gtest.h>

#include <vector>

#include "cospadi/sparse_gemm.hpp"
#include "cospadi/status.hpp"
#include "sparse_problem.hpp"

namespace cospadi {
namespace {

TEST(SparseGemm, ExactOnIntegersAtTheEdgeOfMemory) {
  for (const int64_t rows : {1, 2, 5, 8, 33, 70}) {
    for (const int64_t n_atoms : {1, 7, 32, 33, 100, 488}) {
      for (const int64_t sparsity : {int64_t{1}, (n_atoms + 1) / 2, n_atoms}) {
        for (const DType z_dtype : kDTypes) {
          for (const DType coeffs_dtype : kDTypes) {
            const Problem problem(rows, n_atoms, 37, sparsity, z_dtype, coeffs_dtype);
            std::vector<float> y(static_cast<size_t>(rows * 37), -1.0F);
            sparse_gemm(problem.z_matrix(),
                        problem.sparse(),
                        {},
                        {y.data(), DType::kFloat32, rows, 37, 37},
                        1);
            for (int64_t r = 0; r < rows; ++r) {
              for (int64_t j = 0; j < 37; ++j) {
                ASSERT_EQ(y[static_cast<size_t>(r * 37 + j)],
                          static_cast<float>(problem.expected(r, j)))
                    << rows << " rows, " << n_atoms << " atoms, s = " << sparsity << ", at " << r
                    << ", " << j;
              }
            }
          }
        }
      }
    }
  }
}

TEST(SparseGemm, NoMaskMeansEveryAtom) {
  for (const int64_t rows : {1, 5, 70}) {
    for (const int64_t n_atoms : {1, 33, 100}) {
      for (const DType z_dtype : kDTypes) {
        for (const DType coeffs_dtype : kDTypes) {
          const Problem problem(rows, n_atoms, 37, n_atoms, z_dtype, coeffs_dtype);
          SparseMatrix s = problem.sparse();
          s.mask = {};
          std::vector<float> y(static_cast<size_t>(rows * 37), -1.0F);
          sparse_gemm(problem.z_matrix(), s, {}, {y.data(), DType::kFloat32, rows, 37, 37}, 1);
          for (int64_t i = 0; i < rows * 37; ++i) {
            ASSERT_EQ(y[static_cast<size_t>(i)],
                      static_cast<float>(problem.expected(i / 37, i % 37)));
          }
          --s.coeffs.cols;
          EXPECT_THROW(
              sparse_gemm(problem.z_matrix(), s, {}, {y.data(), DType::kFloat32, rows, 37, 37}, 1),
              Error);
        }
      }
    }
  }
}

TEST(SparseGemm, NeverReadsOutsideWhenTheMaskLies) {
  for (const int64_t rows : {1, 3, 40}) {
    for (const int64_t n_atoms : {9, 64, 200}) {
      for (const DType dtype : kDTypes) {
        const Problem problem(rows, n_atoms, 33, 2, dtype, dtype);
        std::memset(problem.mask.as<char>(), 0xff, problem.mask.bytes());
        std::vector<float> y(static_cast<size_t>(rows * 33));
        sparse_gemm(
            problem.z_matrix(), problem.sparse(), {}, {y.data(), DType::kFloat32, rows, 33, 33}, 2);
      }
    }
  }
}

TEST(SparseGemm, StridesAndBias) {
  for (const int64_t rows : {1, 6, 50}) {
    const Problem problem(rows, 65, 150, 30, DType::kFloat32, DType::kBFloat16);
    const int64_t z_stride = 71;
    std::vector<float> z(static_cast<size_t>(rows * z_stride), 1e30F);
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(problem.z.as<float>() + r * 65, 65, z.data() + r * z_stride);
    }
    std::vector<float> bias(150);
    std::iota(bias.begin(), bias.end(), 0.0F);
    std::vector<float> y(static_cast<size_t>(rows * 160), -7.0F);
    sparse_gemm({z.data(), DType::kFloat32, rows, 65, z_stride},
                problem.sparse(),
                {bias.data(), DType::kFloat32, 150},
                {y.data(), DType::kFloat32, rows, 150, 160},
                1);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < 160; ++j) {
        const float expected =
            j < 150 ? static_cast<float>(problem.expected(r, j)) + bias[static_cast<size_t>(j)]
                    : -7.0F;
        ASSERT_EQ(y[static_cast<size_t>(r * 160 + j)], expected);
      }
    }
  }
}

TEST(SparseGemm, SameBitsForAnyThreadCount) {
  constexpr int64_t kOut = 8000;  // enough work for several threads at one row
  for (const int64_t rows : {1, 6, 50}) {
    const Problem problem(rows, 300, kOut, 150, DType::kBFloat16, DType::kBFloat16);
    std::vector<float> first;
    for (const int threads : {1, 2, 5}) {
      std::vector<float> y(static_cast<size_t>(rows * kOut), -7.0F);
      sparse_gemm(problem.z_matrix(),
                  problem.sparse(),
                  {},
                  {y.data(), DType::kFloat32, rows, kOut, kOut},
                  threads);
      if (threads == 1) first = y;
      ASSERT_EQ(y, first) << rows << " rows, " << threads << " threads";
    }
  }
}

TEST(SparseGemm, EmptyOperands) {
  const Problem problem(2, 10, 3, 4, DType::kFloat32, DType::kFloat32);
  std::vector<float> y(6, 5.0F);
  SparseMatrix s = problem.sparse();
  sparse_gemm({nullptr, DType::kFloat32, 0, 10, 10}, s, {}, {nullptr, DType::kFloat32, 0, 3, 3}, 1);
  // no coefficients and no atoms: only the bias is left
  const std::vector<float> bias = {1.0F, 2.0F, 3.0F};
  s.n_atoms = 0;
  s.mask = {nullptr, 3, 0};
  s.coeffs = {nullptr, DType::kFloat32, 3, 0, 0};
  sparse_gemm({nullptr, DType::kFloat32, 2, 0, 0},
              s,
              {bias.data(), DType::kFloat32, 3},
              {y.data(), DType::kFloat32, 2, 3, 3},
              1);
  EXPECT_EQ(y, (std::vector<float>{1, 2, 3, 1, 2, 3}));
}

TEST(SparseGemm, RejectsWrongArguments) {
  const Problem problem(2, 10, 3, 4, DType::kFloat32, DType::kFloat32);
  std::vector<float> y(6);
  const TypedMatrix good_y{y.data(), DType::kFloat32, 2, 3, 3};
  const SparseMatrix good = problem.sparse();
  const auto call = [&](ConstTypedMatrix z, const SparseMatrix& s, TypedMatrix out) {
    sparse_gemm(z, s, {}, out, 1);
  };
  ConstTypedMatrix z = problem.z_matrix();
  z.cols = 9;
  EXPECT_THROW(call(z, good, good_y), Error);
  z = problem.z_matrix();
  z.stride = 5;
  EXPECT_THROW(call(z, good, good_y), Error);
  z = problem.z_matrix();
  z.data = nullptr;
  EXPECT_THROW(call(z, good, good_y), Error);
  z = problem.z_matrix();
  z.rows = -1;
  EXPECT_THROW(call(z, good, good_y), Error);
  z = problem.z_matrix();
  SparseMatrix s = good;
  s.mask.cols = 3;
  EXPECT_THROW(call(z, s, good_y), Error);
  s = good;
  s.coeffs.cols = 11;
  s.coeffs.stride = 11;
  EXPECT_THROW(call(z, s, good_y), Error);
  s = good;
  s.coeffs.stride = int64_t{1} << 62;
  EXPECT_THROW(call(z, s, good_y), Error);
  EXPECT_THROW(call(z, good, {y.data(), DType::kFloat32, 2, 4, 4}), Error);
  const float bias[2] = {0, 0};
  EXPECT_THROW(sparse_gemm(z, good, {bias, DType::kFloat32, 2}, good_y, 1), Error);
}

}  // namespace
}  // namespace cospadi
