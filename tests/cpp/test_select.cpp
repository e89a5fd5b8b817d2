#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cospadi/select.hpp"
#include "cospadi/status.hpp"
#include "guarded.hpp"

namespace cospadi {
namespace {

/// A stable sort by falling score.
template <class T>
std::vector<int32_t> sorted_reference(const T* scores, int64_t n, int64_t count) {
  std::vector<int32_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(
      order.begin(), order.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

template <class T>
std::vector<int32_t> select_row(const std::vector<T>& scores, int64_t count) {
  const auto n = static_cast<int64_t>(scores.size());
  // exactly as long as promised: one index too many stops the program
  const Guarded memory(static_cast<size_t>(count) * sizeof(int32_t));
  select_largest<T>({scores.data(), 1, n}, count, 1, {memory.as<int32_t>(), 1, count});
  return {memory.as<int32_t>(), memory.as<int32_t>() + count};
}

std::string message_of(const auto& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

template <class T>
class Select : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Select, Types);

TYPED_TEST(Select, EqualsStableSort) {
  std::mt19937 generator(1);
  std::normal_distribution<double> normal;
  for (const int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 300, 2048}) {
    // scores end at a page without access, and are not aligned
    const Guarded memory(static_cast<size_t>(n) * sizeof(TypeParam));
    auto* scores = memory.as<TypeParam>();
    for (const double levels : {0.0, 2.0, 40.0}) {  // 0: hardly a tie; else multiples of 1 / levels
      for (int64_t i = 0; i < n; ++i) {
        const double score = std::abs(normal(generator));
        scores[i] =
            static_cast<TypeParam>(levels > 0 ? std::floor(score * levels) / levels : score);
      }
      for (const int64_t count : {int64_t{1}, n / 3, n / 2, n - 1, n}) {
        if (count < 1) continue;
        std::vector<int32_t> found(static_cast<size_t>(count));
        select_largest<TypeParam>({scores, 1, n}, count, 1, {found.data(), 1, count});
        ASSERT_EQ(found, sorted_reference(scores, n, count)) << n << " " << count << " " << levels;
      }
    }
  }
}

TYPED_TEST(Select, SpecialValues) {
  using Limits = std::numeric_limits<TypeParam>;
  const TypeParam inf = Limits::infinity();
  const TypeParam tiny = Limits::denorm_min();
  for (const int64_t n : {6, 23, 40}) {
    std::vector<TypeParam> scores(static_cast<size_t>(n), TypeParam(0));
    EXPECT_EQ(select_row(scores, 3), (std::vector<int32_t>{0, 1, 2}));
    scores[0] = TypeParam(-0.0);  // as good as 0
    EXPECT_EQ(select_row(scores, 2), (std::vector<int32_t>{0, 1}));
    scores[4] = tiny;
    EXPECT_EQ(select_row(scores, 3), (std::vector<int32_t>{0, 1, 4}));
    scores[5] = 2 * tiny;
    EXPECT_EQ(select_row(scores, 1), (std::vector<int32_t>{5}));
    scores[1] = Limits::max();
    scores[3] = inf;
    EXPECT_EQ(select_row(scores, 1), (std::vector<int32_t>{3}));
    EXPECT_EQ(select_row(scores, 2), (std::vector<int32_t>{1, 3}));
    EXPECT_EQ(select_row(scores, 5), (std::vector<int32_t>{0, 1, 3, 4, 5}));
    std::fill(scores.begin(), scores.end(), inf);
    EXPECT_EQ(select_row(scores, 2), (std::vector<int32_t>{0, 1}));
    std::fill(scores.begin(), scores.end(), TypeParam(-0.0));
    EXPECT_EQ(select_row(scores, 2), (std::vector<int32_t>{0, 1}));
  }
}

TYPED_TEST(Select, ThreadsAndStrideChangeNothing) {
  constexpr int64_t kRows = 700, kCols = 301, kStride = 310, kCount = 90;
  std::mt19937 generator(2);
  std::uniform_real_distribution<double> uniform;
  const TypeParam nan = std::numeric_limits<TypeParam>::quiet_NaN();
  std::vector<TypeParam> wide(kRows * kStride, nan);  // padding is not looked at
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < kCols; ++j) {
      wide[static_cast<size_t>(i * kStride + j)] = static_cast<TypeParam>(uniform(generator));
    }
  }
  std::vector<int32_t> first;
  for (const int threads : {1, 2, 3, 0}) {
    std::vector<int32_t> indices(kRows * (kCount + 1), -7);  // one column of padding
    select_largest<TypeParam>({wide.data(), kRows, kCols, kStride},
                              kCount,
                              threads,
                              {indices.data(), kRows, kCount, kCount + 1});
    if (first.empty()) first = indices;
    ASSERT_EQ(indices, first) << threads;
  }
  for (int64_t i = 0; i < kRows; ++i) {
    const int32_t* row = first.data() + i * (kCount + 1);
    ASSERT_EQ(std::vector<int32_t>(row, row + kCount),
              sorted_reference(wide.data() + i * kStride, kCols, kCount));
    ASSERT_EQ(row[kCount], -7);
  }
}

TYPED_TEST(Select, RejectsWrongArguments) {
  const TypeParam nan = std::numeric_limits<TypeParam>::quiet_NaN();
  std::vector<TypeParam> scores(4 * 20, TypeParam(1));
  std::vector<int32_t> indices(4 * 2, -7);
  const auto call = [&](int64_t count) {
    return message_of([&] {
      select_largest<TypeParam>(
          {scores.data(), 4, 20}, count, 1, {indices.data(), 4, std::min<int64_t>(count, 2)});
    });
  };
  EXPECT_EQ(call(0), "count: expected 1 to 20, got 0");
  EXPECT_EQ(call(21), "count: expected 1 to 20, got 21");
  EXPECT_EQ(call(3), "indices: expected shape [4, 3], got [4, 2]");
  for (const TypeParam bad : {nan, -nan, TypeParam(-1), -std::numeric_limits<TypeParam>::min()}) {
    for (const int column : {0, 7, 16, 19}) {
      scores[static_cast<size_t>(40 + column)] = bad;
      scores[60] = nan;  // the first row in error is named
      const std::string expected =
          "scores: element [2, " + std::to_string(column) + "] is negative";
      EXPECT_EQ(call(2).substr(0, expected.size()), expected);
      scores[static_cast<size_t>(40 + column)] = TypeParam(1);
    }
  }
  scores[60] = -std::numeric_limits<TypeParam>::infinity();
  EXPECT_NE(call(2), "");
  EXPECT_EQ(indices, std::vector<int32_t>(8, -7));
  select_largest<TypeParam>({nullptr, 0, 5}, 2, 1, {nullptr, 0, 2});
}

}  // namespace
}  // namespace cospadi
