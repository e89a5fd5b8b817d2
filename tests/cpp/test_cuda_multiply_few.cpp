// y = z S + bias for a few rows, by the emulated kernels.
#include <gtest/gtest.h>

#include "cuda/multiply_few.cu"
#include "cuda_problem.hpp"

namespace cospadi::cuda {
namespace {

using cuda_on_cpu::Schedule;

/// Multiplies into memory full of -77 with padded rows and compares every element.
void check(const CudaProblem& problem, DType y_dtype, bool with_bias) {
  const int stride = problem.d_out + 1;
  Guarded y(static_cast<size_t>(problem.rows * stride) * dtype_bytes(y_dtype));
  for (int i = 0; i < problem.rows * stride; ++i) store_element(-77, y.as<char>(), y_dtype, i);
  OutputOperand out{y_dtype, y.as<char>(), stride, nullptr, DType::kFloat32};
  if (with_bias) out.bias = problem.bias.as<float>();
  ASSERT_EQ(multiply_few(problem.z(), problem.code(), out, nullptr), 0);
  for (int r = 0; r < problem.rows; ++r) {
    for (int j = 0; j < stride; ++j) {
      float expected = -77.0F;
      if (j < problem.d_out) {
        float rounded[1];
        store_element(problem.expected(r, j, with_bias), rounded, y_dtype, 0);
        expected = load_element(rounded, y_dtype, 0);
      }
      ASSERT_EQ(load_element(y.as<char>(), y_dtype, r * stride + j), expected)
          << problem.rows << " rows, " << problem.n_atoms << " atoms, s = " << problem.sparsity
          << ", " << problem.form.bits << " bits, group " << problem.form.group << ", type "
          << static_cast<int>(problem.form.type) << ", at " << r << ", " << j;
    }
  }
}

class MultiplyFew : public testing::TestWithParam<int> {
 protected:
  void TearDown() override {
    cuda_on_cpu::set_schedule(Schedule::kForward);
    cuda_on_cpu::set_multiprocessors(4);
  }
};

TEST_P(MultiplyFew, ExactOnIntegersAtTheEdgeOfMemory) {
  const Form form = kForms[GetParam()];
  for (const int rows : {1, 2, 3, 5}) {
    for (const auto& [n_atoms, sparsity, d_out] :
         {std::tuple{1, 1, 1}, {33, 0, 5}, {130, 61, 9}, {1024, 500, 7}, {1100, 1100, 3}}) {
      for (const bool has_mask : {true, false}) {
        const DType z_dtype = kDTypes[(rows + n_atoms) % 3];
        check(CudaProblem(rows, n_atoms, d_out, sparsity, form, z_dtype, -1, 0, has_mask),
              kDTypes[rows % 3],
              has_mask);
      }
    }
  }
}

TEST_P(MultiplyFew, EveryScheduleAndManyTilesPerBlock) {
  const Form form = kForms[GetParam()];
  cuda_on_cpu::set_multiprocessors(1);
  for (const Schedule schedule : {Schedule::kReverse, Schedule::kShuffled}) {
    cuda_on_cpu::set_schedule(schedule);
    for (const int rows : {1, 4}) {
      check(CudaProblem(rows, 260, 101, 130, form, DType::kBFloat16), DType::kFloat32, true);
    }
  }
}

TEST_P(MultiplyFew, RowsOfTwoPartsAndAtOddAddresses) {
  const Form form = kForms[GetParam()];
  for (const int rows : {1, 2, 9}) {
    for (const int n_first : {0, 64, 65}) {
      for (const int misaligned : {0, 3}) {
        check(CudaProblem(rows, 200, 13, 77, form, DType::kBFloat16, n_first, misaligned),
              DType::kBFloat16,
              true);
      }
    }
  }
}

TEST_P(MultiplyFew, ReadsNothingOutsideWhenTheMaskLies) {
  for (const int rows : {1, 4}) {
    const CudaProblem problem(rows, 1200, 19, 2, kForms[GetParam()], DType::kFloat32);
    std::memset(problem.mask.as<char>(), 0xff, problem.mask.bytes());
    std::vector<float> y(static_cast<size_t>(rows * 19));
    const OutputOperand out{DType::kFloat32, y.data(), 19, nullptr, DType::kFloat32};
    ASSERT_EQ(multiply_few(problem.z(), problem.code(), out, nullptr), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Forms,
                         MultiplyFew,
                         testing::Range(0, static_cast<int>(std::size(kForms))));

TEST(MultiplyFewSizes, ManyAtoms) {
  // several segments per column; too many for registers; too many for any shared memory
  for (const auto& [n_atoms, rows] : {std::pair{5000, 2}, {17000, 1}, {17000, 3}, {60000, 2}}) {
    const CudaProblem problem(
        rows, n_atoms, 3, n_atoms / 2, {ValueType::kBFloat16}, DType::kBFloat16, n_atoms - 500);
    check(problem, DType::kFloat32, true);
  }
}

TEST(MultiplyFewSizes, NothingToDoStartsNothing) {
  const int64_t before = cuda_on_cpu::launch_count();
  EXPECT_EQ(multiply_few({}, {}, {}, nullptr), 0);
  EXPECT_EQ(cuda_on_cpu::launch_count(), before);
}

TEST(MultiplyFewSizes, OneLaunchForUpToFourRows) {
  for (const auto& [rows, launches] : {std::pair{1, 1}, {4, 1}, {5, 2}, {9, 3}}) {
    const CudaProblem problem(rows, 64, 8, 30, {ValueType::kBFloat16}, DType::kBFloat16);
    const int64_t before = cuda_on_cpu::launch_count();
    check(problem, DType::kBFloat16, false);
    EXPECT_EQ(cuda_on_cpu::launch_count() - before, launches);
  }
}

}  // namespace
}  // namespace cospadi::cuda
