#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cospadi/dictionary.hpp"
#include "cospadi/status.hpp"

namespace cospadi {
namespace {

/// Random signals, unit-norm atoms, and a support of every second, third, ... atom per signal.
template <class T>
struct Problem {
  int64_t n_signals, dim, n_atoms, sparsity;
  std::vector<T> signals, atoms, coeffs;
  std::vector<int32_t> indices;

  Problem(int64_t n, int64_t d, int64_t k, int64_t s, unsigned seed = 0)
      : n_signals(n), dim(d), n_atoms(k), sparsity(s) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    const auto random = [&](int64_t count) {
      std::vector<T> values(static_cast<size_t>(count));
      for (T& x : values) x = static_cast<T>(normal(generator));
      return values;
    };
    signals = random(n * d);
    atoms = random(k * d);
    coeffs = random(n * s);
    for (int64_t i = 0; i < n; ++i) {
      int64_t left = s;
      for (int64_t atom = 0; atom < k; ++atom) {
        const auto draw = static_cast<int64_t>(generator() % static_cast<unsigned>(k - atom));
        if (draw >= left) continue;
        indices.push_back(static_cast<int32_t>(atom));
        --left;
      }
    }
    for (int64_t a = 0; a < k; ++a) {
      const double scale = 1 / norm(a);
      for (int64_t j = 0; j < d; ++j) atom(a)[j] *= static_cast<T>(scale);
    }
  }

  T* atom(int64_t i) { return atoms.data() + i * dim; }

  double norm(int64_t i) {
    double energy = 0;
    for (int64_t j = 0; j < dim; ++j) energy += std::pow(static_cast<double>(atom(i)[j]), 2);
    return std::sqrt(energy);
  }

  double objective() {
    double sum = 0;
    for (int64_t n = 0; n < n_signals; ++n) {
      for (int64_t j = 0; j < dim; ++j) {
        double rest = static_cast<double>(signals[static_cast<size_t>(n * dim + j)]);
        for (int64_t i = 0; i < sparsity; ++i) {
          const size_t at = static_cast<size_t>(n * sparsity + i);
          rest -= static_cast<double>(coeffs[at]) * static_cast<double>(atom(indices[at])[j]);
        }
        sum += rest * rest;
      }
    }
    return sum;
  }

  AtomUpdateStats update(const AtomUpdateOptions& options) {
    return update_atoms<T>({signals.data(), n_signals, dim},
                           {indices.data(), n_signals, sparsity},
                           options,
                           {atoms.data(), n_atoms, dim},
                           {coeffs.data(), n_signals, sparsity});
  }
};

template <class T>
class DictionaryTest : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(DictionaryTest, Types);

template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-5 : 1e-13;

TYPED_TEST(DictionaryTest, ObjectiveFallsAndIsReported) {
  for (const int64_t block_size : {1, 2, 5, 64}) {
    for (const int power_iterations : {0, 1, 3}) {
      Problem<TypeParam> problem(60, 33, 20, 7);
      AtomUpdateOptions options;
      options.block_size = block_size;
      options.power_iterations = power_iterations;
      const double before = problem.objective();
      const AtomUpdateStats stats = problem.update(options);
      const double after = problem.objective();
      EXPECT_LT(after, before);
      EXPECT_NEAR(stats.objective_before, before, kTolerance<TypeParam> * before);
      EXPECT_NEAR(stats.objective_after, after, kTolerance<TypeParam> * before);
      for (int64_t a = 0; a < 20; ++a) EXPECT_NEAR(problem.norm(a), 1.0, kTolerance<TypeParam>);
      EXPECT_GE(stats.workspace_bytes, 60 * 33 * static_cast<int64_t>(sizeof(TypeParam)));
    }
  }
}

TYPED_TEST(DictionaryTest, BlockOfOneAtomIsTheSequentialUpdate) {
  // A dictionary of one atom makes both variants the same problem.
  Problem<TypeParam> sequential(40, 24, 1, 1);
  Problem<TypeParam> blocked(40, 24, 1, 1);
  AtomUpdateOptions options;
  options.block_size = 1;
  sequential.update(options);
  options.block_size = 8;
  blocked.update(options);
  for (size_t i = 0; i < blocked.atoms.size(); ++i) {
    EXPECT_NEAR(sequential.atoms[i], blocked.atoms[i], kTolerance<TypeParam>);
  }
  for (size_t i = 0; i < blocked.coeffs.size(); ++i) {
    EXPECT_NEAR(sequential.coeffs[i], blocked.coeffs[i], 10 * kTolerance<TypeParam>);
  }
}

TYPED_TEST(DictionaryTest, ThreadsDoNotChangeABit) {
  for (const int64_t block_size : {1, 16}) {
    // The sequential update uses threads only for many rows per atom.
    const int64_t n = block_size == 1 ? 4400 : 400;
    const int64_t dim = block_size == 1 ? 512 : 260;
    const int64_t k = block_size == 1 ? 4 : 48;
    const int64_t s = block_size == 1 ? 2 : 20;
    Problem<TypeParam> one(n, dim, k, s);
    Problem<TypeParam> two(n, dim, k, s);
    AtomUpdateOptions options;
    options.block_size = block_size;
    options.num_threads = 1;
    one.update(options);
    options.num_threads = 2;
    two.update(options);
    EXPECT_EQ(one.atoms, two.atoms);
    EXPECT_EQ(one.coeffs, two.coeffs);
  }
}

TYPED_TEST(DictionaryTest, UnusedAtoms) {
  for (const UnusedAtoms policy : {UnusedAtoms::kSkip, UnusedAtoms::kReseed}) {
    for (const int64_t block_size : {1, 4}) {
      Problem<TypeParam> problem(10, 8, 6, 1);
      for (int32_t& index : problem.indices) index = 2;
      const std::vector<TypeParam> old = problem.atoms;
      AtomUpdateOptions options;
      options.block_size = block_size;
      options.unused = policy;
      const AtomUpdateStats stats = problem.update(options);
      EXPECT_EQ(stats.n_unused, 5);
      EXPECT_EQ(stats.n_reseeded, policy == UnusedAtoms::kReseed ? 5 : 0);
      for (int64_t a = 0; a < 6; ++a) {
        EXPECT_NEAR(problem.norm(a), 1.0, kTolerance<TypeParam>);
        const bool is_kept = std::equal(problem.atom(a), problem.atom(a) + 8, old.data() + 8 * a);
        EXPECT_EQ(is_kept, a != 2 && policy == UnusedAtoms::kSkip);
      }
    }
  }
}

TYPED_TEST(DictionaryTest, EmptyProblems) {
  for (const int64_t block_size : {1, 64}) {
    AtomUpdateOptions options;
    options.block_size = block_size;
    Problem<TypeParam> no_signals(0, 4, 3, 2);
    EXPECT_EQ(no_signals.update(options).n_unused, 3);
    Problem<TypeParam> no_coefficients(4, 4, 3, 0);
    EXPECT_EQ(no_coefficients.update(options).n_unused, 3);
  }
}

template <class T>
void expect_error(Problem<T>& problem, const AtomUpdateOptions& options, const std::string& part) {
  const std::vector<T> atoms = problem.atoms;
  try {
    problem.update(options);
    FAIL() << "expected an error about " << part;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TYPED_TEST(DictionaryTest, ErrorsNameTheArgument) {
  Problem<TypeParam> problem(4, 3, 5, 2);
  const auto good = problem.indices;
  problem.indices[3] = 5;
  expect_error(problem, {}, "indices: element [1, 1] is 5");
  problem.indices[3] = problem.indices[2];
  expect_error(problem, {}, "indices: element [1, 1]");
  problem.indices = good;
  problem.signals[4] = std::numeric_limits<TypeParam>::infinity();
  expect_error(problem, {}, "signals: element [1, 1] is not finite");
  problem.signals[4] = 0;
  AtomUpdateOptions options;
  options.sweeps = 0;
  expect_error(problem, options, "sweeps: expected at least 1, got 0");
  options.sweeps = 1;
  options.block_size = 0;
  expect_error(problem, options, "block_size: expected at least 1, got 0");
  options.block_size = 1;
  options.power_iterations = -1;
  expect_error(problem,
               options,
               "power_iterations: expected at least 1, or 0 for iterating to convergence, got -1");
}

}  // namespace
}  // namespace cospadi
