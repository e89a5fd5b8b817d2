#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cospadi/packed.hpp"
#include "cospadi/round_code.hpp"
#include "cospadi/status.hpp"
#include "guarded.hpp"

namespace cospadi {
namespace {

/// Random correlated atoms, random supports, coefficients of size 1 and steps of about 0.3. The
/// Gram ends at a page without access.
struct Problem {
  int64_t n_atoms, sparsity, n_rows, n_steps;
  Guarded memory;
  std::vector<float> coeffs, steps, errors;
  std::vector<int32_t> indices, fields;
  RoundCodeOptions options;

  Problem(int64_t k, int64_t s, int64_t n, int64_t group = 0, int64_t rank = 0)
      : n_atoms(k),
        sparsity(s),
        n_rows(n),
        n_steps(scale_group_count(s, group)),
        memory(static_cast<size_t>(k * k) * sizeof(float)),
        coeffs(static_cast<size_t>(n * s)),
        steps(static_cast<size_t>(n * n_steps)),
        errors(static_cast<size_t>(n)),
        indices(static_cast<size_t>(n * s)),
        fields(static_cast<size_t>(n * s)) {
    std::mt19937 generator(static_cast<unsigned>(k * 1000 + s));
    std::normal_distribution<double> normal;
    const int64_t dim = rank == 0 ? k + 3 : rank;
    std::vector<double> atoms(static_cast<size_t>(k * dim));
    for (double& x : atoms) x = normal(generator) / std::sqrt(static_cast<double>(dim));
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const double* a = atoms.data() + i * dim;
        gram()[i * k + j] =
            static_cast<float>(std::inner_product(a, a + dim, atoms.data() + j * dim, 0.0));
      }
    }
    for (float& x : coeffs) x = static_cast<float>(normal(generator));
    for (float& x : steps) x = 0.2F + 0.01F * static_cast<float>(generator() % 20);
    std::vector<int32_t> all(static_cast<size_t>(k));
    std::iota(all.begin(), all.end(), 0);
    for (int64_t i = 0; i < n; ++i) {
      std::shuffle(all.begin(), all.end(), generator);
      std::copy_n(all.begin(), s, indices.begin() + i * s);
      std::sort(indices.begin() + i * s, indices.begin() + (i + 1) * s);
    }
    options.group = group;
    options.num_threads = 1;
  }

  float* gram() const { return memory.as<float>(); }

  RoundCodeStats run(bool is_full = false) {
    return round_code({gram(), n_atoms, n_atoms},
                      {is_full ? nullptr : indices.data(), n_rows, sparsity},
                      {coeffs.data(), n_rows, sparsity},
                      {steps.data(), n_rows, n_steps},
                      options,
                      {fields.data(), n_rows, sparsity},
                      errors.data());
  }

  float step(int64_t i, int64_t j) const {
    const int64_t group = options.group == 0 ? sparsity : options.group;
    return steps[static_cast<size_t>(i * n_steps + j / group)];
  }

  double objective(int64_t i, const int32_t* q) const {
    std::vector<double> e(static_cast<size_t>(n_atoms));
    for (int64_t j = 0; j < sparsity; ++j) {
      const size_t at = static_cast<size_t>(i * sparsity + j);
      e[static_cast<size_t>(indices[at])] =
          static_cast<double>(coeffs[at]) - static_cast<double>(step(i, j)) * q[j];
    }
    double sum = 0;
    for (int64_t a = 0; a < n_atoms; ++a) {
      for (int64_t b = 0; b < n_atoms; ++b) {
        sum += e[static_cast<size_t>(a)] * e[static_cast<size_t>(b)] *
               static_cast<double>(gram()[a * n_atoms + b]);
      }
    }
    return sum;
  }

  std::vector<int32_t> plain(int64_t i) const {
    std::vector<int32_t> q;
    for (int64_t j = 0; j < sparsity; ++j) {
      const float x = coeffs[static_cast<size_t>(i * sparsity + j)];
      const float limit = static_cast<float>(options.limit);
      q.push_back(static_cast<int32_t>(std::clamp(std::nearbyint(x / step(i, j)), -limit, limit)));
    }
    return q;
  }
};

std::string message_of(const auto& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

/// The formula of the header in double precision, fixed from the last coefficient of `order`.
std::vector<int32_t> nearest_plane(const Problem& p, int64_t i, const std::vector<int64_t>& order) {
  const auto s = static_cast<size_t>(p.sparsity);
  const int32_t* atoms = p.indices.data() + i * p.sparsity;
  double mean = 0;
  for (size_t j = 0; j < s; ++j) {
    mean += static_cast<double>(p.gram()[atoms[j] * (p.n_atoms + 1)]) / static_cast<double>(s);
  }
  std::vector<double> l(s * s);
  for (size_t a = 0; a < s; ++a) {
    for (size_t b = 0; b <= a; ++b) {
      double value = static_cast<double>(p.gram()[atoms[order[a]] * p.n_atoms + atoms[order[b]]]);
      if (a == b) value += static_cast<double>(p.options.damping) * mean;
      for (size_t k = 0; k < b; ++k) value -= l[a * s + k] * l[b * s + k];
      l[a * s + b] = a == b ? std::sqrt(value) : value / l[b * s + b];
    }
  }
  std::vector<double> e(s);
  std::vector<int32_t> q(s);
  for (size_t j = s; j-- > 0;) {
    const auto place = static_cast<size_t>(order[j]);
    const double x = static_cast<double>(p.coeffs[static_cast<size_t>(i) * s + place]);
    const double step = static_cast<double>(p.step(i, order[j]));
    double target = x;
    for (size_t k = j + 1; k < s; ++k) target += l[k * s + j] * e[k] / l[j * s + j];
    const double limit = p.options.limit;
    const double field = std::clamp(std::nearbyint(target / step), -limit, limit);
    e[j] = x - step * field;
    q[place] = static_cast<int32_t>(field);
  }
  return q;
}

TEST(RoundCode, FollowsTheFormula) {
  for (const auto& [k, s, group] : {std::tuple{1, 1, 0},
                                    {5, 1, 0},
                                    {9, 7, 3},
                                    {16, 16, 0},
                                    {17, 8, 100},
                                    {33, 31, 8},
                                    {40, 33, 0},
                                    {70, 65, 16},
                                    {100, 97, 0},
                                    {130, 130, 32}}) {
    for (const RoundOrder kind : {RoundOrder::kIndex, RoundOrder::kEnergy}) {
      Problem p(k, s, 70, group);
      p.options.order = kind;
      p.options.sweeps = 0;
      const RoundCodeStats stats = p.run();
      EXPECT_EQ(stats.n_raised + stats.n_plain + stats.n_moves, 0);
      int64_t n_equal = 0;
      for (int64_t i = 0; i < p.n_rows; ++i) {
        std::vector<int64_t> order(static_cast<size_t>(s));
        std::iota(order.begin(), order.end(), int64_t{0});
        const int32_t* atoms = p.indices.data() + i * s;
        if (kind == RoundOrder::kEnergy) {
          std::sort(order.begin(), order.end(), [&, k = k](int64_t a, int64_t b) {
            const float energy_a = p.gram()[atoms[a] * (k + 1)];
            const float energy_b = p.gram()[atoms[b] * (k + 1)];
            return energy_a != energy_b ? energy_a < energy_b : a > b;
          });
        }
        const int32_t* row = p.fields.data() + i * s;
        const std::vector<int32_t> expected = nearest_plane(p, i, order);
        n_equal += std::equal(expected.begin(), expected.end(), row) ? 1 : 0;
        const double objective = p.objective(i, row);
        ASSERT_NEAR(static_cast<double>(p.errors[static_cast<size_t>(i)]),
                    objective,
                    1e-4 * objective + 1e-7);
      }
      // A rounding error can push a coefficient over a half; what follows then differs.
      EXPECT_GE(n_equal, 65) << k << " " << s;
    }
  }
}

TEST(RoundCode, TiesGoToTheEvenInteger) {
  Problem p(4, 4, 1);
  std::fill_n(p.gram(), 16, 0.0F);
  for (int i = 0; i < 4; ++i) p.gram()[5 * i] = 1.0F;
  p.steps = {0.5F};
  p.coeffs = {0.25F, 0.75F, -0.25F, -1.25F};
  for (const bool is_full : {false, true}) {
    p.run(is_full);
    EXPECT_EQ(p.fields, (std::vector<int32_t>{0, 2, 0, -2}));
  }
}

TEST(RoundCode, ThreadsChangeNothingAndWorkspaceIsAsStated) {
  for (const int64_t s : {int64_t{20}, int64_t{50}}) {
    Problem p(50, s, 333, 7);
    p.run();
    const std::vector<int32_t> fields = p.fields;
    const std::vector<float> errors = p.errors;
    for (const int threads : {2, 3, 5}) {
      p.options.num_threads = threads;
      const RoundCodeStats stats = p.run();
      EXPECT_EQ(p.fields, fields);
      EXPECT_EQ(p.errors, errors);
      EXPECT_EQ(stats.workspace_bytes, round_code_workspace_bytes(50, 333, s, s == 50, p.options));
    }
  }
}

TEST(RoundCode, BeatsPlainRoundingAndSweepsOnlyHelp) {
  for (const int64_t s : {int64_t{30}, int64_t{60}}) {
    Problem p(60, s, 64);
    double plain = 0;
    for (int64_t i = 0; i < p.n_rows; ++i) plain += p.objective(i, p.plain(i).data());
    std::vector<float> before(p.errors.size(), std::numeric_limits<float>::infinity());
    for (const int sweeps : {0, 1, 2, 100}) {
      p.options.sweeps = sweeps;
      const RoundCodeStats stats = p.run();
      EXPECT_EQ(stats.n_moves > 0, sweeps > 0);
      EXPECT_LT(std::accumulate(p.errors.begin(), p.errors.end(), 0.0), 0.9 * plain);
      for (size_t i = 0; i < before.size(); ++i) EXPECT_LE(p.errors[i], before[i] * 1.00001F);
      before = p.errors;
    }
  }
}

TEST(RoundCode, DependentAtomsAreCounted) {
  for (const bool is_full : {false, true}) {
    Problem p(40, is_full ? 40 : 30, 20, 0, 12);  // 12 dimensions
    p.options.damping = 0.0F;
    EXPECT_EQ(p.run(is_full).n_raised, 20);
    p.options.damping = 0.01F;
    EXPECT_EQ(p.run(is_full).n_raised, 0);
    std::fill_n(p.gram(), 1600, 0.0F);
    const RoundCodeStats stats = p.run(is_full);
    EXPECT_EQ(stats.n_raised, 0);
    EXPECT_EQ(stats.n_plain, 20);
    for (int64_t i = 0; i < 20; ++i) {
      const std::vector<int32_t> plain = p.plain(i);
      EXPECT_TRUE(std::equal(plain.begin(), plain.end(), p.fields.begin() + i * p.sparsity));
    }
  }
}

TEST(RoundCode, NumbersAtTheEndOfTheRange) {
  Problem p(40, 30, 10);
  for (const float scale : {1e-38F, 1e-20F, 1e36F}) {
    Problem scaled(40, 30, 10);
    for (int64_t i = 0; i < 1600; ++i) scaled.gram()[i] = p.gram()[i] * scale;
    scaled.run();
    for (const int32_t field : scaled.fields) EXPECT_LE(std::abs(field), 7);
  }
  for (float& x : p.coeffs) x *= 1e37F;
  p.run();
  for (const int32_t field : p.fields) EXPECT_LE(std::abs(field), 7);
}

TEST(RoundCode, RejectsWrongArguments) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto message_after = [](const auto& change, bool is_full = false) {
    Problem p(6, 3, 2);
    change(p);
    std::fill(p.fields.begin(), p.fields.end(), -99);
    const std::string message = message_of([&] { p.run(is_full); });
    EXPECT_EQ(std::count(p.fields.begin(), p.fields.end(), -99), 6);
    return message;
  };
  EXPECT_EQ(message_after([&](Problem& p) { p.gram()[8] = nan; }),
            "gram: element [1, 2] is not finite");
  EXPECT_EQ(message_after([](Problem& p) { p.gram()[7] = -1.0F; }).substr(0, 34),
            "gram: diagonal element 1 is negati");
  EXPECT_EQ(message_after([&](Problem& p) { p.coeffs[4] = nan; }),
            "coeffs: element [1, 1] is not finite");
  EXPECT_EQ(message_after([](Problem& p) { p.steps[1] = 0.0F; }).substr(0, 36),
            "steps: element [1, 0] is not positiv");
  EXPECT_EQ(message_after([](Problem& p) { p.indices[4] = 6; }).substr(0, 30),
            "indices: element [1, 1] is 6; ");
  EXPECT_EQ(message_after([](Problem& p) { p.indices[3] = -1; }).substr(0, 31),
            "indices: element [1, 0] is -1; ");
  EXPECT_EQ(message_after([](Problem& p) { p.indices[5] = p.indices[4]; }).substr(0, 23),
            "indices: element [1, 2]");
  EXPECT_EQ(message_after([](Problem& p) { p.options.limit = 0; }),
            "limit: expected 1 to 1048576, got 0");
  EXPECT_NE(message_after([](Problem& p) { p.options.group = -1; }).find("group: "),
            std::string::npos);
  EXPECT_NE(message_after([](Problem& p) { p.options.sweeps = -1; }).find("sweeps: "),
            std::string::npos);
  EXPECT_NE(message_after([&](Problem& p) { p.options.damping = nan; }).find("damping: "),
            std::string::npos);
  EXPECT_EQ(message_after([](Problem& p) { p.options.group = 2; }),
            "steps: expected shape [2, 2], got [2, 1]");
  EXPECT_EQ(message_after([](Problem&) {}, true),
            "coeffs: without indices expected n_atoms = 6 columns, got 3");
}

}  // namespace
}  // namespace cospadi
