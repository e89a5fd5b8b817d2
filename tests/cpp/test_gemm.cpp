#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/gemm.hpp"
#include "cospadi/status.hpp"

namespace cospadi::detail {
namespace {

template <class T>
std::vector<T> small_integers(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> distribution(-4, 4);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(distribution(generator));
  return values;
}

template <class T>
struct Gemm : testing::Test {};

using ElementTypes = testing::Types<float, double>;
TYPED_TEST_SUITE(Gemm, ElementTypes);

/// Sums of small integers are exact, so every shape must give equality.
template <class T>
void expect_exact(
    int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed, int threads) {
  const auto a = small_integers<T>(m * k, 1);
  const auto b = small_integers<T>(k * n, 2);
  const int64_t c_stride = n + 3;
  const auto c_before = small_integers<T>(m * c_stride, 3);
  std::vector<T> c = c_before;
  const StridedView<const T> a_view(a.data(), m, k, a_transposed ? 1 : k, a_transposed ? m : 1);
  const StridedView<const T> b_view(b.data(), k, n, b_transposed ? 1 : n, b_transposed ? k : 1);
  gemm<T>(T(2), a_view, b_view, T(-1), MatrixView<T>(c.data(), m, n, c_stride), threads);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < c_stride; ++j) {
      T expected = c_before[static_cast<size_t>(i * c_stride + j)];
      if (j < n) {
        expected = -expected;
        for (int64_t p = 0; p < k; ++p) {
          expected += T(2) * a_view.data[i * a_view.row_stride + p * a_view.col_stride] *
                      b_view.data[p * b_view.row_stride + j * b_view.col_stride];
        }
      }
      ASSERT_EQ(c[static_cast<size_t>(i * c_stride + j)], expected)
          << "m " << m << " n " << n << " k " << k << " at " << i << ", " << j;
    }
  }
}

TYPED_TEST(Gemm, EdgeSizes) {
  for (const int64_t m : {1, 3, 14, 15, 29}) {
    for (const int64_t n : {1, 8, 31, 33, 64}) {
      for (const int64_t k : {1, 2, 17}) expect_exact<TypeParam>(m, n, k, false, false, 1);
    }
  }
}

TYPED_TEST(Gemm, SeveralBlocksAndTransposes) {
  for (const bool a_transposed : {false, true}) {
    for (const bool b_transposed : {false, true}) {
      expect_exact<TypeParam>(175, 70, 300, a_transposed, b_transposed, 1);
      expect_exact<TypeParam>(175, 70, 300, a_transposed, b_transposed, 2);
    }
  }
  expect_exact<TypeParam>(5, 4200, 9, false, false, 2);  // more columns than one block
  expect_exact<TypeParam>(4200, 5, 9, true, false, 2);   // more rows than one block
  expect_exact<TypeParam>(3, 4, 3000, false, true, 1);   // many depth steps
}

TYPED_TEST(Gemm, SameBitsForAnyThreadCount) {
  const int64_t m = 150;
  const int64_t n = 130;
  const int64_t k = 700;
  std::mt19937 generator(5);
  std::normal_distribution<TypeParam> normal;
  std::vector<TypeParam> a(static_cast<size_t>(m * k));
  std::vector<TypeParam> b(static_cast<size_t>(k * n));
  for (auto& value : a) value = normal(generator);
  for (auto& value : b) value = normal(generator);
  std::vector<TypeParam> first(static_cast<size_t>(m * n));
  for (const int threads : {1, 2, 3, 7}) {
    std::vector<TypeParam> c(first.size());
    gemm<TypeParam>(TypeParam(1),
                    MatrixView<const TypeParam>(a.data(), m, k),
                    MatrixView<const TypeParam>(b.data(), k, n),
                    TypeParam(0),
                    MatrixView<TypeParam>(c.data(), m, n),
                    threads);
    if (threads == 1) first = c;
    ASSERT_EQ(c, first) << threads;
  }
}

TYPED_TEST(Gemm, EmptyDimensions) {
  const std::vector<TypeParam> one(1, TypeParam(3));
  std::vector<TypeParam> c = {TypeParam(5), TypeParam(7)};
  // no rows, no columns: nothing happens
  gemm<TypeParam>(1, {one.data(), 0, 1, 1, 1}, {one.data(), 1, 2, 2, 1}, 0, {c.data(), 0, 2}, 1);
  gemm<TypeParam>(1, {one.data(), 1, 1, 1, 1}, {one.data(), 1, 0, 0, 1}, 0, {c.data(), 1, 0}, 1);
  EXPECT_EQ(c[0], TypeParam(5));
  // no depth: c = beta c, and a and b may be null
  gemm<TypeParam>(1, {nullptr, 1, 0, 0, 1}, {nullptr, 0, 2, 2, 1}, 2, {c.data(), 1, 2}, 1);
  EXPECT_EQ(c[0], TypeParam(10));
  EXPECT_EQ(c[1], TypeParam(14));
}

TYPED_TEST(Gemm, ZeroBetaDoesNotReadC) {
  const TypeParam nan = std::numeric_limits<TypeParam>::quiet_NaN();
  const std::vector<TypeParam> a(20 * 40, TypeParam(1));
  const std::vector<TypeParam> b(40 * 40, TypeParam(1));
  std::vector<TypeParam> c(20 * 40, nan);
  gemm<TypeParam>(
      1, {a.data(), 20, 40, 40, 1}, {b.data(), 40, 40, 40, 1}, 0, {c.data(), 20, 40}, 1);
  for (const TypeParam value : c) ASSERT_EQ(value, TypeParam(40));
  std::fill(c.begin(), c.end(), nan);
  gemm<TypeParam>(
      0, {a.data(), 20, 40, 40, 1}, {b.data(), 40, 40, 40, 1}, 0, {c.data(), 20, 40}, 1);
  for (const TypeParam value : c) ASSERT_EQ(value, TypeParam(0));
}

TYPED_TEST(Gemm, RejectsWrongArguments) {
  std::vector<TypeParam> x(16);
  const auto call = [&](StridedView<const TypeParam> a,
                        StridedView<const TypeParam> b,
                        MatrixView<TypeParam> c) { gemm<TypeParam>(1, a, b, 0, c, 1); };
  EXPECT_THROW(call({x.data(), 2, 3, 3, 1}, {x.data(), 2, 2, 2, 1}, {x.data(), 2, 2}), Error);
  EXPECT_THROW(call({x.data(), 2, 2, 2, 1}, {x.data(), 2, 2, 2, 1}, {x.data(), 2, 3}), Error);
  EXPECT_THROW(call({x.data(), 2, 2, 2, 1}, {x.data(), 2, 2, 2, 1}, {x.data(), 2, 2, 1}), Error);
  EXPECT_THROW(call({nullptr, 2, 2, 2, 1}, {x.data(), 2, 2, 2, 1}, {x.data(), 2, 2}), Error);
}

}  // namespace
}  // namespace cospadi::detail
