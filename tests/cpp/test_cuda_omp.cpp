// The pursuit kernel against greedy selection with dense solves in double precision, on the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cospadi/omp.hpp"
#include "cuda/omp.cu"
#include "guarded.hpp"

namespace cospadi::cuda {
namespace {

using Doubles = std::vector<double>;

static_assert(dependence_tolerance<float>() == omp_dependence_tolerance<float>());
static_assert(dependence_tolerance<double>() == omp_dependence_tolerance<double>());

/// Random atoms of random lengths and signals, in Gram form.
struct Case {
  int n_atoms, n_signals, sparsity;
  Doubles gram, correlations;

  Case(int k, int dim, int n, int s, unsigned seed, int n_equal = 0)
      : n_atoms(k), n_signals(n), sparsity(s) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    Doubles atoms(static_cast<size_t>(k * dim));
    Doubles signals(static_cast<size_t>(n * dim));
    for (double& x : atoms) x = normal(generator);
    for (double& x : signals) x = 1e3 * normal(generator);
    for (int j = 0; j < k; ++j) {
      const double length = std::exp(normal(generator));
      for (int i = 0; i < dim; ++i) atoms[static_cast<size_t>(j * dim + i)] *= length;
    }
    for (int j = 1; j <= n_equal; ++j) {
      std::copy_n(atoms.begin(), dim, atoms.begin() + j * dim);
    }
    const auto dot = [dim](const Doubles& a, int i, const Doubles& b, int j) {
      double sum = 0;
      for (int t = 0; t < dim; ++t) {
        sum += a[static_cast<size_t>(i * dim + t)] * b[static_cast<size_t>(j * dim + t)];
      }
      return sum;
    };
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j < k; ++j) gram.push_back(dot(atoms, i, atoms, j));
    }
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < k; ++j) correlations.push_back(dot(signals, i, atoms, j));
    }
  }

  double g(int i, int j) const { return gram[static_cast<size_t>(i * n_atoms + j)]; }
};

/// x with A x = b for a positive definite A, and the smallest pivot over its diagonal.
Doubles solve(Doubles a, Doubles b, double* smallest = nullptr) {
  const size_t n = b.size();
  for (size_t i = 0; i < n; ++i) {
    if (smallest) *smallest = std::min(*smallest, a[i * n + i]);
    for (size_t r = i + 1; r < n; ++r) {
      const double factor = a[r * n + i] / a[i * n + i];
      for (size_t c = i; c < n; ++c) a[r * n + c] -= factor * a[i * n + c];
      b[r] -= factor * b[i];
    }
  }
  for (size_t i = n; i-- > 0;) {
    for (size_t c = i + 1; c < n; ++c) b[i] -= a[i * n + c] * b[c];
    b[i] /= a[i * n + i];
  }
  return b;
}

struct Code {
  std::vector<int32_t> indices;
  Doubles coeffs;
};

/// Greedy selection from its definition: OMP by the residual's correlation with unit atoms, ORMP by
/// the error that is left.
Code greedy(const Case& c, int signal, bool is_ormp) {
  const auto p = [&](int j) { return c.correlations[static_cast<size_t>(signal * c.n_atoms + j)]; };
  std::vector<int> support;
  const auto fit = [&](const std::vector<int>& atoms) {
    Doubles a;
    Doubles b;
    for (const int i : atoms) {
      for (const int j : atoms) a.push_back(c.g(i, j));
      b.push_back(p(i));
    }
    return solve(a, b);
  };
  while (static_cast<int>(support.size()) < c.sparsity) {
    const Doubles x = fit(support);
    int best = -1;
    double best_score = -1;
    for (int j = 0; j < c.n_atoms; ++j) {
      if (std::find(support.begin(), support.end(), j) != support.end()) continue;
      double rest = p(j);
      for (size_t i = 0; i < support.size(); ++i) rest -= x[i] * c.g(j, support[i]);
      double energy = c.g(j, j);
      if (!support.empty() && is_ormp) {
        Doubles a;
        Doubles b;
        for (const int i : support) {
          for (const int l : support) a.push_back(c.g(i, l));
          b.push_back(c.g(i, j));
        }
        const Doubles projected = solve(a, b);
        for (size_t i = 0; i < support.size(); ++i) energy -= projected[i] * b[i];
      }
      const double score = rest * rest / energy;
      if (score > best_score) {
        best = j;
        best_score = score;
      }
    }
    support.push_back(best);
  }
  std::sort(support.begin(), support.end());
  return {{support.begin(), support.end()}, fit(support)};
}

struct Result {
  std::vector<int32_t> indices;
  Doubles coeffs;
  unsigned long long n_padded = 0;
};

/// The kernel with memory for `n_blocks` signals at a time; every operand is guarded.
template <class T>
Result run(const Case& c, bool is_ormp, int n_blocks) {
  const auto size = [&](size_t n) { return n * sizeof(T); };
  const auto k = static_cast<size_t>(c.n_atoms);
  const Guarded gram(size(k * k));
  const Guarded scales(size(k));
  const Guarded correlations(size(c.correlations.size()));
  const auto n_out = static_cast<size_t>(c.n_signals * c.sparsity);
  const Guarded indices(n_out * sizeof(int32_t));
  const Guarded coeffs(size(n_out));
  const int64_t bytes =
      n_blocks * omp_signal_bytes(c.n_atoms, c.sparsity, static_cast<int>(sizeof(T)));
  const Guarded workspace(static_cast<size_t>(bytes));
  std::fill_n(workspace.as<char>(), bytes, static_cast<char>(0xff));
  for (size_t j = 0; j < k; ++j) {
    const double energy = c.gram[j * k + j];
    scales.as<T>()[j] = energy > 0 ? static_cast<T>(1 / std::sqrt(energy)) : T(0);
  }
  for (size_t i = 0; i < k * k; ++i) {
    gram.as<T>()[i] = static_cast<T>(c.gram[i]) * scales.as<T>()[i / k] * scales.as<T>()[i % k];
  }
  for (size_t i = 0; i < c.correlations.size(); ++i) {
    correlations.as<T>()[i] = static_cast<T>(c.correlations[i]);
  }
  Result result;
  EXPECT_EQ(omp_encode(gram.as<T>(),
                       scales.as<T>(),
                       correlations.as<T>(),
                       c.n_signals,
                       c.n_atoms,
                       c.sparsity,
                       is_ormp,
                       workspace.as<void>(),
                       bytes,
                       indices.as<int32_t>(),
                       coeffs.as<T>(),
                       &result.n_padded,
                       nullptr),
            0);
  result.indices.assign(indices.as<int32_t>(), indices.as<int32_t>() + n_out);
  result.coeffs.assign(coeffs.as<T>(), coeffs.as<T>() + n_out);
  return result;
}

class CudaOmp : public testing::TestWithParam<bool> {
 protected:
  void TearDown() override { cuda_on_cpu::set_schedule(cuda_on_cpu::Schedule::kForward); }
};

template <class T>
void expect_greedy(const Case& c, const Result& found, bool is_ormp) {
  const double tolerance = sizeof(T) == 4 ? 2e-3 : 1e-8;
  for (int n = 0; n < c.n_signals; ++n) {
    const Code expected = greedy(c, n, is_ormp);
    const auto first = static_cast<std::ptrdiff_t>(n * c.sparsity);
    const std::vector<int32_t> indices(found.indices.begin() + first,
                                       found.indices.begin() + first + c.sparsity);
    ASSERT_EQ(indices, expected.indices) << "signal " << n;
    double largest = 0;
    for (const double x : expected.coeffs) largest = std::max(largest, std::abs(x));
    for (int i = 0; i < c.sparsity; ++i) {
      EXPECT_NEAR(found.coeffs[static_cast<size_t>(first + i)],
                  expected.coeffs[static_cast<size_t>(i)],
                  tolerance * largest);
    }
  }
  EXPECT_EQ(found.n_padded, 0U);
}

TEST_P(CudaOmp, SelectsGreedily) {
  for (const auto schedule : {cuda_on_cpu::Schedule::kForward,
                              cuda_on_cpu::Schedule::kReverse,
                              cuda_on_cpu::Schedule::kShuffled}) {
    cuda_on_cpu::set_schedule(schedule);
    const Case c(40, 60, 5, 14, 1);
    expect_greedy<float>(c, run<float>(c, GetParam(), 2), GetParam());
    expect_greedy<double>(c, run<double>(c, GetParam(), 2), GetParam());
  }
}

TEST_P(CudaOmp, EdgeSizes) {
  const Case cases[] = {Case(1, 3, 2, 1, 2),
                        Case(5, 8, 3, 5, 3),
                        Case(32, 50, 1, 32, 4),
                        Case(33, 40, 2, 1, 5),
                        Case(33, 40, 2, 2, 6),
                        Case(65, 90, 2, 40, 7)};
  for (const Case& c : cases) {
    expect_greedy<double>(c, run<double>(c, GetParam(), 7), GetParam());
  }
}

TEST_P(CudaOmp, PoolAndChunksOverflow) {
  // more steps than a chunk of history rows, and more candidates over time than the pool holds
  const Case c(170, 240, 1, 140, 8);
  expect_greedy<double>(c, run<double>(c, GetParam(), 1), GetParam());
}

TEST_P(CudaOmp, TheWorkspaceDecidesNothing) {
  const Case c(40, 50, 6, 12, 9);
  const Result one = run<float>(c, GetParam(), 1);
  const Result many = run<float>(c, GetParam(), 6);
  EXPECT_EQ(one.indices, many.indices);
  EXPECT_EQ(one.coeffs, many.coeffs);
}

TEST_P(CudaOmp, DependentAtomsAreNotChosenTwiceAndSupportsAreFilledUp) {
  // atoms 0 to 4 are one direction, so 10 atoms span 6; the zero atom spans nothing
  Case c(11, 12, 3, 9, 10, 4);
  for (int j = 0; j < 11; ++j) {
    c.gram[static_cast<size_t>(10 * 11 + j)] = c.gram[static_cast<size_t>(j * 11 + 10)] = 0;
  }
  for (int n = 0; n < 3; ++n) c.correlations[static_cast<size_t>(n * 11 + 10)] = 0;
  const Result found = run<double>(c, GetParam(), 3);
  EXPECT_EQ(found.n_padded, 9U);
  for (size_t n = 0; n < 3; ++n) {
    const auto first = static_cast<std::ptrdiff_t>(n * 9);
    EXPECT_TRUE(std::is_sorted(found.indices.begin() + first, found.indices.begin() + first + 9));
    int n_zero = 0;
    for (size_t i = n * 9; i < n * 9 + 9; ++i) n_zero += found.coeffs[i] == 0;
    EXPECT_EQ(n_zero, 3);
  }
}

TEST_P(CudaOmp, ASignalWithoutCorrelationsGetsAFullSupport) {
  Case c(8, 9, 1, 4, 11);
  std::fill(c.correlations.begin(), c.correlations.end(), 0.0);
  const Result found = run<float>(c, GetParam(), 1);
  EXPECT_EQ(found.indices.size(), 4U);
  EXPECT_EQ(found.coeffs, Doubles(4, 0.0));
}

INSTANTIATE_TEST_SUITE_P(Selections, CudaOmp, testing::Bool());

TEST(CudaOmpArguments, AreChecked) {
  float value = 1;
  int32_t index = 0;
  unsigned long long n_padded = 0;
  const auto call = [&](int64_t k, int64_t s, int64_t bytes) {
    return omp_encode(
        &value, &value, &value, 1, k, s, false, &value, bytes, &index, &value, &n_padded, nullptr);
  };
  EXPECT_NE(call(1, 0, 1 << 20), 0);
  EXPECT_NE(call(1, 2, 1 << 20), 0);
  EXPECT_NE(call(0, 0, 1 << 20), 0);
  EXPECT_NE(call(1, 1, 16), 0);
}

}  // namespace
}  // namespace cospadi::cuda
