// The selection kernel against a sort, on the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/select.cu"
#include "guarded.hpp"

namespace cospadi::cuda {
namespace {

template <class T>
std::vector<int32_t> by_sorting(const std::vector<T>& scores, int64_t n, int64_t count) {
  std::vector<int32_t> result;
  for (size_t row = 0; row < scores.size(); row += static_cast<size_t>(n)) {
    std::vector<int32_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return scores[row + static_cast<size_t>(a)] > scores[row + static_cast<size_t>(b)];
    });
    order.resize(static_cast<size_t>(count));
    std::sort(order.begin(), order.end());
    result.insert(result.end(), order.begin(), order.end());
  }
  return result;
}

/// Runs the kernel with operands that end at a page without access.
template <class T>
std::vector<int32_t> by_kernel(const std::vector<T>& scores, int64_t n, int64_t count) {
  const int64_t n_rows = static_cast<int64_t>(scores.size()) / n;
  const Guarded in(scores.size() * sizeof(T));
  const Guarded out(static_cast<size_t>(n_rows * count) * sizeof(int32_t));
  std::copy(scores.begin(), scores.end(), in.as<T>());
  std::fill_n(out.as<int32_t>(), n_rows * count, -1);
  EXPECT_EQ(select_largest(in.as<T>(), n_rows, n, count, out.as<int32_t>(), nullptr), 0);
  return {out.as<int32_t>(), out.as<int32_t>() + n_rows * count};
}

template <class T>
class CudaSelect : public testing::Test {
 protected:
  void TearDown() override { cuda_on_cpu::set_schedule(cuda_on_cpu::Schedule::kForward); }

  static std::vector<T> normal(int64_t size, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> draw;
    std::vector<T> values(static_cast<size_t>(size));
    for (T& x : values) x = static_cast<T>(std::abs(draw(generator)));
    return values;
  }
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(CudaSelect, Types);

TYPED_TEST(CudaSelect, IsASortAtEverySize) {
  for (const auto schedule : {cuda_on_cpu::Schedule::kForward,
                              cuda_on_cpu::Schedule::kReverse,
                              cuda_on_cpu::Schedule::kShuffled}) {
    cuda_on_cpu::set_schedule(schedule);
    for (const int64_t n : {1, 2, 31, 33, 257, 700}) {
      for (const int64_t count : {int64_t{1}, n / 2, n - 1, n}) {
        if (count < 1) continue;
        const auto scores = this->normal(2 * n, static_cast<unsigned>(n + count));
        EXPECT_EQ(by_kernel(scores, n, count), by_sorting(scores, n, count)) << n << " " << count;
      }
    }
  }
}

TYPED_TEST(CudaSelect, TiesGoToTheLowestIndex) {
  auto scores = this->normal(4 * 300, 5);
  for (TypeParam& x : scores) x = std::round(x * 3);
  std::fill_n(scores.begin(), 300, TypeParam(0));
  std::fill_n(scores.begin() + 300, 300, TypeParam(7));
  for (const int64_t count : {1, 150, 299}) {
    EXPECT_EQ(by_kernel(scores, 300, count), by_sorting(scores, 300, count)) << count;
  }
}

TYPED_TEST(CudaSelect, ExtremesOrderAsNumbers) {
  using Limits = std::numeric_limits<TypeParam>;
  std::vector<TypeParam> scores{TypeParam(-0.0),
                                Limits::denorm_min(),
                                0,
                                Limits::infinity(),
                                Limits::max(),
                                Limits::min(),
                                TypeParam(-0.0),
                                1,
                                std::nextafter(TypeParam(1), TypeParam(2)),
                                2 * Limits::denorm_min()};
  for (int64_t count = 1; count < 10; ++count) {
    EXPECT_EQ(by_kernel(scores, 10, count), by_sorting(scores, 10, count)) << count;
  }
}

TYPED_TEST(CudaSelect, WhatIsNoScoreStillGivesOneSupport) {
  const auto nan = std::numeric_limits<TypeParam>::quiet_NaN();
  const std::vector<TypeParam> scores{
      1, -5, nan, 3, -1, std::numeric_limits<TypeParam>::infinity()};
  EXPECT_EQ(by_kernel(scores, 6, 2), (std::vector<int32_t>{2, 5}));
  EXPECT_EQ(by_kernel(scores, 6, 5), (std::vector<int32_t>{0, 1, 2, 3, 5}));
}

TYPED_TEST(CudaSelect, LongRowsStayInGlobalMemory) {
  const int64_t n = 96 * 1024 / static_cast<int64_t>(sizeof(TypeParam)) + 3;
  const auto scores = this->normal(n, 9);
  EXPECT_EQ(by_kernel(scores, n, n / 2), by_sorting(scores, n, n / 2));
}

TYPED_TEST(CudaSelect, RefusesWhatIsNotPossible) {
  TypeParam score = 1;
  int32_t index = -1;
  for (const int64_t count : {0, 2}) {
    EXPECT_NE(select_largest(&score, 1, 1, count, &index, nullptr), 0);
  }
  EXPECT_EQ(select_largest(&score, 0, 1, 1, &index, nullptr), 0);
  EXPECT_EQ(index, -1);
  EXPECT_STRNE(error_text(1), "");
}

}  // namespace
}  // namespace cospadi::cuda
