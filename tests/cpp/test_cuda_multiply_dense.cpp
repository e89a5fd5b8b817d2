// y = x D for a few rows, by the emulated kernels.
#include <gtest/gtest.h>

#include <random>
#include <tuple>

#include "cuda/multiply_dense.cu"
#include "guarded.hpp"

namespace cospadi::cuda {
namespace {

using cuda_on_cpu::Schedule;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

void check(int rows, int d_in, int n, DType dtype, int padding, int misaligned) {
  std::mt19937 generator(static_cast<unsigned>(rows * 1009 + d_in * 31 + n));
  std::uniform_int_distribution<int> small(-3, 3);
  const int x_stride = d_in + misaligned;
  const int d_stride = n + padding;
  const auto bytes = [&](int elements) {
    return static_cast<size_t>(elements) * dtype_bytes(dtype);
  };
  const Guarded x(bytes(rows * x_stride));
  const Guarded d(bytes(misaligned + (d_in - 1) * d_stride + n));
  const Guarded y(bytes(rows * (n + 2)));
  std::vector<int> x_values(static_cast<size_t>(rows * d_in));
  std::vector<int> d_values(static_cast<size_t>(d_in * n));
  char* x_data = x.as<char>() + bytes(misaligned);
  char* d_data = d.as<char>() + bytes(misaligned);
  for (int i = 0; i < rows * d_in; ++i) {
    x_values[static_cast<size_t>(i)] = small(generator);
    store_element(static_cast<float>(x_values[static_cast<size_t>(i)]),
                  x_data,
                  dtype,
                  i / d_in * x_stride + i % d_in);
  }
  for (int i = 0; i < d_in * n; ++i) {
    d_values[static_cast<size_t>(i)] = small(generator);
    store_element(static_cast<float>(d_values[static_cast<size_t>(i)]),
                  d_data,
                  dtype,
                  i / n * d_stride + i % n);
  }
  for (int i = 0; i < rows * (n + 2); ++i) store_element(-77, y.as<char>(), dtype, i);
  RowsOperand operand;
  operand.dtype = dtype;
  operand.rows = rows;
  operand.first = x_data;
  operand.first_stride = x_stride;
  operand.n_first = d_in;
  const OutputOperand out{dtype, y.as<char>(), n + 2, nullptr, DType::kFloat32};
  ASSERT_EQ(multiply_dense(operand, d_data, d_stride, n, out, nullptr), 0);
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < n + 2; ++j) {
      float expected = -77.0F;
      if (j < n) {
        int sum = 0;
        for (int k = 0; k < d_in; ++k) {
          sum += x_values[static_cast<size_t>(r * d_in + k)] *
                 d_values[static_cast<size_t>(k * n + j)];
        }
        float rounded[1];
        store_element(static_cast<float>(sum), rounded, dtype, 0);
        expected = load_element(rounded, dtype, 0);
      }
      ASSERT_EQ(load_element(y.as<char>(), dtype, r * (n + 2) + j), expected)
          << rows << " rows, " << d_in << " x " << n << ", at " << r << ", " << j;
    }
  }
}

class MultiplyDense : public testing::Test {
 protected:
  void TearDown() override {
    cuda_on_cpu::set_schedule(Schedule::kForward);
    cuda_on_cpu::set_multiprocessors(4);
  }
};

TEST_F(MultiplyDense, ExactOnIntegersAtTheEdgeOfMemory) {
  for (const int rows : {1, 2, 3, 4}) {
    for (const auto& [d_in, n] : {std::pair{1, 1}, {5, 16}, {700, 40}, {33, 129}, {2100, 8}}) {
      for (const DType dtype : kDTypes) {
        check(rows, d_in, n, dtype, 0, 0);
        check(rows, d_in, n, dtype, 8, 0);
        check(rows, d_in, n, dtype, 1, 1);
      }
    }
  }
}

TEST_F(MultiplyDense, EveryScheduleAndWidthOfStrip) {
  for (const Schedule schedule : {Schedule::kReverse, Schedule::kShuffled}) {
    cuda_on_cpu::set_schedule(schedule);
    for (const int processors : {1, 4, 132}) {
      cuda_on_cpu::set_multiprocessors(processors);
      check(1, 300, 256, DType::kBFloat16, 0, 0);
      check(4, 70, 256, DType::kFloat32, 0, 0);
    }
  }
}

TEST_F(MultiplyDense, MoreInputsThanSharedMemoryHolds) {
  check(1, 9000, 16, DType::kBFloat16, 0, 0);
  check(4, 4500, 16, DType::kFloat32, 0, 0);
}

TEST_F(MultiplyDense, NothingToDoStartsNothingAndTooManyRowsAreRefused) {
  const int64_t before = cuda_on_cpu::launch_count();
  EXPECT_EQ(multiply_dense({}, nullptr, 0, 4, {}, nullptr), 0);
  RowsOperand x;
  x.rows = kMaxFewRows + 1;
  EXPECT_NE(multiply_dense(x, nullptr, 0, 4, {}, nullptr), 0);
  EXPECT_EQ(cuda_on_cpu::launch_count(), before);
}

}  // namespace
}  // namespace cospadi::cuda
