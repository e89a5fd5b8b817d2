// The steps of sparse coders against plain loops, on the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/code_steps.cu"
#include "guarded.hpp"

namespace cospadi::cuda {
namespace {

using cuda_on_cpu::Schedule;
using Floats = std::vector<float>;
using Indices = std::vector<int32_t>;

constexpr Schedule kSchedules[] = {Schedule::kForward, Schedule::kReverse, Schedule::kShuffled};

class CodeSteps : public testing::Test {
 protected:
  void TearDown() override { cuda_on_cpu::set_schedule(Schedule::kForward); }

  Floats normal(int64_t size) {
    std::normal_distribution<float> draw;
    Floats values(static_cast<size_t>(size));
    for (float& x : values) x = draw(generator_);
    return values;
  }

 private:
  std::mt19937 generator_{3};
};

/// A copy that ends at a page without access.
template <class T>
class Operand {
 public:
  explicit Operand(const std::vector<T>& values)
      : memory_(values.size() * sizeof(T)), size_(values.size()) {
    std::copy(values.begin(), values.end(), get());
  }
  T* get() const { return memory_.as<T>(); }
  std::vector<T> values() const { return {get(), get() + size_}; }

 private:
  Guarded memory_;
  size_t size_;
};

struct Projection {
  Floats sparse, dual;
  Indices indices;
};

/// What project_rows stands for.
Projection project_plainly(
    const Floats& solution, Projection state, int64_t n, int64_t count, float a, float b) {
  state.indices.clear();
  for (size_t row = 0; row < solution.size(); row += static_cast<size_t>(n)) {
    std::vector<int32_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = row; i < row + static_cast<size_t>(n); ++i) {
      const float sum = a * solution[i] + b * state.sparse[i];
      state.dual[i] += sum;
      state.sparse[i] = 0.0F;
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) {
      return std::abs(state.dual[row + static_cast<size_t>(i)]) >
             std::abs(state.dual[row + static_cast<size_t>(j)]);
    });
    order.resize(static_cast<size_t>(count));
    std::sort(order.begin(), order.end());
    for (const int32_t i : order) {
      std::swap(state.sparse[row + static_cast<size_t>(i)],
                state.dual[row + static_cast<size_t>(i)]);
    }
    state.indices.insert(state.indices.end(), order.begin(), order.end());
  }
  return state;
}

/// One call on guarded copies; `last` may be empty.
Projection project(const Floats& solution,
                   const Projection& state,
                   const Indices& last,
                   int64_t n,
                   int64_t count,
                   int* is_moved) {
  const int64_t n_rows = static_cast<int64_t>(solution.size()) / n;
  const Operand<float> in(solution);
  const Operand<float> sparse(state.sparse);
  const Operand<float> dual(state.dual);
  const Operand<int32_t> before(last);
  const Operand<int32_t> indices(Indices(static_cast<size_t>(n_rows * count), -1));
  const Operand<int32_t> moved(Indices{0});
  EXPECT_EQ(project_rows(in.get(),
                         sparse.get(),
                         dual.get(),
                         last.empty() ? nullptr : before.get(),
                         n_rows,
                         n,
                         count,
                         1.3F,
                         -0.3F,
                         indices.get(),
                         moved.get(),
                         nullptr),
            0);
  *is_moved = moved.get()[0];
  return {sparse.values(), dual.values(), indices.values()};
}

TEST_F(CodeSteps, ProjectionIsThatOfPlainLoops) {
  for (const Schedule schedule : kSchedules) {
    cuda_on_cpu::set_schedule(schedule);
    for (const int64_t n : {1, 33, 256, 500}) {
      for (const int64_t count : {int64_t{1}, n / 2, n}) {
        if (count < 1) continue;
        Floats solution = normal(3 * n);
        Projection state{normal(3 * n), normal(3 * n), {}};
        // ties: equal magnitudes with both signs
        for (int64_t i = 1; i < n; i += 3) {
          const auto at = static_cast<size_t>(i);
          solution[at] = -solution[at - 1];
          state.sparse[at] = -state.sparse[at - 1];
          state.dual[at] = -state.dual[at - 1];
        }
        const Projection expected = project_plainly(solution, state, n, count, 1.3F, -0.3F);
        int is_moved = -1;
        const Projection found = project(solution, state, {}, n, count, &is_moved);
        EXPECT_EQ(found.sparse, expected.sparse) << n << " " << count;
        EXPECT_EQ(found.dual, expected.dual) << n << " " << count;
        EXPECT_EQ(found.indices, expected.indices) << n << " " << count;
        EXPECT_EQ(is_moved, 0);  // the caller knows that there was no support before
      }
    }
  }
}

TEST_F(CodeSteps, ProjectionTellsWhetherASupportMoved) {
  const Floats solution = normal(4 * 60);
  const Projection state{normal(4 * 60), normal(4 * 60), {}};
  Indices last = project_plainly(solution, state, 60, 20, 1.3F, -0.3F).indices;
  int is_moved = -1;
  project(solution, state, last, 60, 20, &is_moved);
  EXPECT_EQ(is_moved, 0);
  last[3 * 20 + 19] = last[3 * 20 + 19] == 59 ? 58 : 59;
  project(solution, state, last, 60, 20, &is_moved);
  EXPECT_EQ(is_moved, 1);
}

TEST_F(CodeSteps, LongRowsAreProjectedInGlobalMemory) {
  const int64_t n = 96 * 1024 / 4 + 5;
  const Floats solution = normal(n);
  const Projection state{normal(n), normal(n), {}};
  const Projection expected = project_plainly(solution, state, n, n / 2, 1.3F, -0.3F);
  int is_moved = -1;
  const Projection found = project(solution, state, {}, n, n / 2, &is_moved);
  EXPECT_EQ(found.sparse, expected.sparse);
  EXPECT_EQ(found.dual, expected.dual);
  EXPECT_EQ(found.indices, expected.indices);
}

TEST_F(CodeSteps, GradientStepIsThatOfPlainLoops) {
  for (const Schedule schedule : kSchedules) {
    cuda_on_cpu::set_schedule(schedule);
    for (const int64_t n : {1, 31, 257, 300}) {
      const int64_t n_rows = 3;
      const auto size = static_cast<size_t>(n_rows * n);
      Floats mask = normal(n_rows * n);
      for (float& x : mask) x = x > 0.0F ? 1.0F : 0.0F;
      Floats inverse = normal(n_rows * n);
      for (size_t i = 0; i < size; ++i) inverse[i] = std::abs(inverse[i]) * mask[i];
      const Floats product = normal(n_rows * n);
      Floats x = normal(n_rows * n);
      Floats residual = normal(n_rows * n);
      Floats direction = normal(n_rows * n);
      Floats energy{3.0F, 2.0F, 0.5F};
      const Floats enough{1.0F, 1.0F, 1.0F};  // the last row rests
      const Operand<float> operands[] = {Operand<float>(product),
                                         Operand<float>(mask),
                                         Operand<float>(inverse),
                                         Operand<float>(enough),
                                         Operand<float>(x),
                                         Operand<float>(residual),
                                         Operand<float>(direction),
                                         Operand<float>(energy)};
      ASSERT_EQ(gradient_step(operands[0].get(),
                              operands[1].get(),
                              operands[2].get(),
                              operands[3].get(),
                              operands[4].get(),
                              operands[5].get(),
                              operands[6].get(),
                              operands[7].get(),
                              n_rows,
                              n,
                              nullptr),
                0);
      for (size_t row = 0; row < 2; ++row) {
        const size_t first = row * static_cast<size_t>(n);
        const size_t last = first + static_cast<size_t>(n);
        double curvature = 0;
        for (size_t i = first; i < last; ++i) curvature += direction[i] * product[i] * mask[i];
        const double step = curvature > 0 ? energy[row] / curvature : 0;
        double new_energy = 0;
        for (size_t i = first; i < last; ++i) {
          x[i] += static_cast<float>(step * direction[i]);
          residual[i] -= static_cast<float>(step * product[i] * mask[i]);
          new_energy += residual[i] * residual[i] * inverse[i];
        }
        const double beta = new_energy / energy[row];
        for (size_t i = first; i < last; ++i) {
          direction[i] = static_cast<float>(residual[i] * inverse[i] + beta * direction[i]);
        }
        energy[row] = static_cast<float>(new_energy);
      }
      const Floats* expected[] = {&x, &residual, &direction, &energy};
      for (int part = 0; part < 4; ++part) {
        const Floats found = operands[4 + part].values();
        float largest = 1.0F;
        for (const float value : *expected[part]) largest = std::max(largest, std::abs(value));
        for (size_t i = 0; i < found.size(); ++i) {
          EXPECT_NEAR(found[i], (*expected[part])[i], 1e-4F * largest) << n << " " << part;
        }
      }
      EXPECT_EQ(operands[7].get()[2], 0.5F);
    }
  }
}

TEST_F(CodeSteps, NothingIsWrittenForNoRows) {
  float value = 5.0F;
  int32_t index = 5;
  EXPECT_EQ(project_rows(&value, &value, &value, nullptr, 0, 1, 1, 1, 0, &index, &index, nullptr),
            0);
  EXPECT_NE(project_rows(&value, &value, &value, nullptr, 1, 1, 2, 1, 0, &index, &index, nullptr),
            0);
  EXPECT_EQ(value, 5.0F);
  EXPECT_EQ(index, 5);
}

}  // namespace
}  // namespace cospadi::cuda
