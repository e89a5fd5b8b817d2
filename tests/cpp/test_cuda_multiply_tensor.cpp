// y = z S + bias on the tensor cores, by the emulated kernels.
#include <gtest/gtest.h>

#include <tuple>

#include "cuda/multiply_tensor.cu"
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
  ASSERT_TRUE(tensor_cores_take(problem.z(), problem.code()));
  ASSERT_EQ(multiply_tensor(problem.z(), problem.code(), out, nullptr), 0);
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
          << ", " << problem.form.bits << " bits, type " << static_cast<int>(problem.form.type)
          << ", at " << r << ", " << j;
    }
  }
}

/// The types of z whose products with coefficients of this form are exact.
std::vector<DType> types_of(Form form) {
  std::vector<DType> types;
  for (const DType dtype : kDTypes) {
    CodeOperand s;
    s.type = form.type;
    s.group = form.group;
    RowsOperand z;
    z.dtype = dtype;
    if (tensor_cores_take(z, s)) types.push_back(dtype);
  }
  return types;
}

class MultiplyTensor : public testing::TestWithParam<int> {
 protected:
  void TearDown() override {
    cuda_on_cpu::set_schedule(Schedule::kForward);
    cuda_on_cpu::set_multiprocessors(4);
  }
};

TEST_P(MultiplyTensor, ExactOnIntegersAtTheEdgeOfMemory) {
  const Form form = kForms[GetParam()];
  for (const DType z_dtype : types_of(form)) {
    for (const int rows : {1, 8, 9, 16, 17}) {
      for (const auto& [n_atoms, sparsity, d_out] :
           {std::tuple{1, 1, 1}, {33, 0, 5}, {130, 61, 9}, {520, 250, 17}, {300, 300, 3}}) {
        for (const bool has_mask : {true, false}) {
          check(CudaProblem(rows, n_atoms, d_out, sparsity, form, z_dtype, -1, 0, has_mask),
                z_dtype,
                has_mask);
        }
      }
    }
  }
}

TEST_P(MultiplyTensor, EveryScheduleAndManyTilesPerBlock) {
  const Form form = kForms[GetParam()];
  cuda_on_cpu::set_multiprocessors(1);
  for (const DType z_dtype : types_of(form)) {
    for (const Schedule schedule : {Schedule::kReverse, Schedule::kShuffled}) {
      cuda_on_cpu::set_schedule(schedule);
      check(CudaProblem(11, 260, 101, 130, form, z_dtype), DType::kFloat32, true);
    }
  }
}

TEST_P(MultiplyTensor, RowsOfTwoPartsAndAtOddAddresses) {
  const Form form = kForms[GetParam()];
  for (const DType z_dtype : types_of(form)) {
    for (const int n_first : {0, 64, 65}) {
      for (const int misaligned : {0, 3}) {
        check(CudaProblem(9, 200, 13, 77, form, z_dtype, n_first, misaligned), z_dtype, true);
      }
    }
  }
}

TEST_P(MultiplyTensor, ReadsNothingOutsideWhenTheMaskLies) {
  const Form form = kForms[GetParam()];
  for (const DType z_dtype : types_of(form)) {
    const CudaProblem problem(4, 700, 19, 2, form, z_dtype);
    std::memset(problem.mask.as<char>(), 0xff, problem.mask.bytes());
    std::vector<float> y(4 * 19);
    const OutputOperand out{DType::kFloat32, y.data(), 19, nullptr, DType::kFloat32};
    ASSERT_EQ(multiply_tensor(problem.z(), problem.code(), out, nullptr), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Forms,
                         MultiplyTensor,
                         testing::Range(0, static_cast<int>(std::size(kForms))));

TEST(MultiplyTensorSizes, ManyAtoms) {
  // two chunks per warp; sixteen warps; rows that do not fit into registers
  for (const auto& [n_atoms, rows] : {std::pair{2100, 5}, {3900, 16}, {4300, 9}}) {
    const CudaProblem problem(
        rows, n_atoms, 10, n_atoms / 6, {ValueType::kBFloat16}, DType::kBFloat16, n_atoms - 500);
    check(problem, DType::kFloat32, true);
  }
}

TEST(MultiplyTensorSizes, ColumnsThatDoNotFitAreRefusedBeforeAnythingStarts) {
  const CudaProblem problem(1, 9000, 8, 4500, {ValueType::kBFloat16}, DType::kBFloat16);
  const int64_t before = cuda_on_cpu::launch_count();
  std::vector<float> y(8, -77.0F);
  const OutputOperand out{DType::kFloat32, y.data(), 8, nullptr, DType::kFloat32};
  EXPECT_EQ(multiply_tensor(problem.z(), problem.code(), out, nullptr), cudaErrorNotSupported);
  EXPECT_EQ(cuda_on_cpu::launch_count(), before);
  EXPECT_EQ(multiply_tensor({}, {}, {}, nullptr), 0);
}

TEST(MultiplyTensorSizes, TakesWhatIsExactInTheTypeOfZ) {
  const auto takes = [](DType z_dtype, ValueType type, int group) {
    RowsOperand z;
    z.dtype = z_dtype;
    CodeOperand s;
    s.type = type;
    s.group = group;
    return tensor_cores_take(z, s);
  };
  EXPECT_TRUE(takes(DType::kBFloat16, ValueType::kBFloat16, 0));
  EXPECT_TRUE(takes(DType::kFloat16, ValueType::kIntegerField, 0));
  EXPECT_FALSE(takes(DType::kFloat16, ValueType::kBFloat16, 0));
  EXPECT_FALSE(takes(DType::kBFloat16, ValueType::kFloat32, 0));
  EXPECT_FALSE(takes(DType::kFloat32, ValueType::kBFloat16, 0));
  EXPECT_FALSE(takes(DType::kBFloat16, ValueType::kIntegerField, 16));
}

}  // namespace
}  // namespace cospadi::cuda
