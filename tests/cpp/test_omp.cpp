#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "cospadi/omp.hpp"
#include "cospadi/status.hpp"

namespace cospadi {
namespace {

/// Random unit-norm atoms and signals in Gram form.
template <class T>
struct Problem {
  int64_t n_atoms, n_signals, sparsity;
  std::vector<T> atoms, signals, gram, correlations, energies;
  std::vector<int32_t> indices;
  std::vector<T> coeffs, residuals;
  int64_t dim;

  Problem(int64_t k, int64_t d, int64_t n, int64_t s, unsigned seed = 0)
      : n_atoms(k),
        n_signals(n),
        sparsity(s),
        atoms(static_cast<size_t>(k * d)),
        signals(static_cast<size_t>(n * d)),
        indices(static_cast<size_t>(n * s)),
        coeffs(static_cast<size_t>(n * s)),
        residuals(static_cast<size_t>(n)),
        dim(d) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    for (T& x : atoms) x = static_cast<T>(normal(generator));
    for (T& x : signals) x = static_cast<T>(normal(generator));
    for (int64_t i = 0; i < k; ++i) {
      double energy = 0;
      for (int64_t j = 0; j < d; ++j) energy += std::pow(static_cast<double>(atom(i)[j]), 2);
      for (int64_t j = 0; j < d; ++j) atom(i)[j] /= static_cast<T>(std::sqrt(energy));
    }
    make_gram();
  }

  T* atom(int64_t i) { return atoms.data() + i * dim; }
  T* signal(int64_t i) { return signals.data() + i * dim; }

  void make_gram() {
    gram.clear();
    correlations.clear();
    energies.clear();
    for (int64_t i = 0; i < n_atoms; ++i) {
      for (int64_t j = 0; j < n_atoms; ++j) gram.push_back(dot(atom(i), atom(j)));
    }
    for (int64_t n = 0; n < n_signals; ++n) {
      for (int64_t j = 0; j < n_atoms; ++j) correlations.push_back(dot(signal(n), atom(j)));
      energies.push_back(dot(signal(n), signal(n)));
    }
  }

  T dot(const T* a, const T* b) const {
    double sum = 0;
    for (int64_t j = 0; j < dim; ++j) sum += static_cast<double>(a[j]) * static_cast<double>(b[j]);
    return static_cast<T>(sum);
  }

  OmpStats encode(OmpOptions options) {
    options.sparsity = sparsity;
    return omp_encode<T>({gram.data(), n_atoms, n_atoms},
                         {correlations.data(), n_signals, n_atoms},
                         energies.data(),
                         options,
                         {indices.data(), n_signals, sparsity},
                         {coeffs.data(), n_signals, sparsity},
                         residuals.data());
  }

  double true_residual(int64_t n) {
    std::vector<double> rest(signal(n), signal(n) + dim);
    for (int64_t i = 0; i < sparsity; ++i) {
      const size_t at = static_cast<size_t>(n * sparsity + i);
      for (int64_t j = 0; j < dim; ++j) {
        rest[static_cast<size_t>(j)] -= static_cast<double>(coeffs[at] * atom(indices[at])[j]);
      }
    }
    double energy = 0;
    for (double x : rest) energy += x * x;
    return energy;
  }
};

template <class T>
class OmpTest : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(OmpTest, Types);

template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-3 : 1e-10;

TYPED_TEST(OmpTest, ResidualIsTrueAndSupportIsValid) {
  for (const auto& [k, d, s] : {std::tuple{1, 4, 1}, {17, 20, 5}, {48, 60, 48}, {97, 120, 40}}) {
    for (const Selection selection : {Selection::kOmp, Selection::kOrmp}) {
      Problem<TypeParam> problem(k, d, 5, s);
      OmpOptions options;
      options.selection = selection;
      const OmpStats stats = problem.encode(options);
      EXPECT_EQ(stats.n_padded, 0);
      for (int64_t n = 0; n < 5; ++n) {
        const int32_t* row = problem.indices.data() + n * s;
        EXPECT_TRUE(std::is_sorted(row, row + s));
        EXPECT_EQ(std::set<int32_t>(row, row + s).size(), static_cast<size_t>(s));
        EXPECT_GE(row[0], 0);
        EXPECT_LT(row[s - 1], k);
        EXPECT_NEAR(problem.true_residual(n),
                    static_cast<double>(problem.residuals[static_cast<size_t>(n)]),
                    kTolerance<TypeParam>);
      }
    }
  }
}

TYPED_TEST(OmpTest, BlockSizeAndThreadsDoNotChangeABit) {
  Problem<TypeParam> plain(150, 170, 7, 70);
  OmpOptions options;
  options.block_size = 1;
  options.num_threads = 1;
  const OmpStats one = plain.encode(options);
  EXPECT_EQ(one.n_passes, 7 * 69);
  EXPECT_EQ(one.n_rows, 7 * 69);
  for (const int block_size : {0, 3, 16, 256}) {
    for (const int n_threads : {1, 2}) {
      Problem<TypeParam> blocked(150, 170, 7, 70);
      options.block_size = block_size;
      options.num_threads = n_threads;
      const OmpStats stats = blocked.encode(options);
      EXPECT_EQ(plain.indices, blocked.indices);
      EXPECT_EQ(plain.coeffs, blocked.coeffs);
      EXPECT_EQ(plain.residuals, blocked.residuals);
      EXPECT_LT(stats.n_passes, one.n_passes);
    }
  }
}

TYPED_TEST(OmpTest, DependentAtomsAreNeverChosen) {
  Problem<TypeParam> problem(12, 16, 3, 8);
  for (int64_t i = 6; i < 12; ++i) {
    for (int64_t j = 0; j < 16; ++j) {
      problem.atom(i)[j] = i == 11 ? TypeParam(0) : -2 * problem.atom(i - 6)[j];
    }
  }
  problem.make_gram();
  const OmpStats stats = problem.encode({});
  EXPECT_EQ(stats.n_padded, 3 * 2);
  for (int64_t n = 0; n < 3; ++n) {
    std::set<int32_t> directions;
    for (int64_t i = 0; i < 8; ++i) {
      const size_t at = static_cast<size_t>(n * 8 + i);
      if (problem.coeffs[at] != TypeParam(0)) directions.insert(problem.indices[at] % 6);
    }
    EXPECT_EQ(directions.size(), 6U);
  }
}

TYPED_TEST(OmpTest, TiesTakeTheLowestIndex) {
  Problem<TypeParam> problem(40, 40, 1, 9);
  std::fill(problem.gram.begin(), problem.gram.end(), TypeParam(0));
  for (int64_t j = 0; j < 40; ++j) problem.gram[static_cast<size_t>(41 * j)] = 1;
  std::fill(problem.correlations.begin(), problem.correlations.end(), TypeParam(-3));
  problem.encode({});
  for (int32_t i = 0; i < 9; ++i) {
    EXPECT_EQ(problem.indices[static_cast<size_t>(i)], i);
    EXPECT_EQ(problem.coeffs[static_cast<size_t>(i)], TypeParam(-3));
  }
}

TYPED_TEST(OmpTest, WorkspaceIsAnnouncedAndBounded) {
  Problem<TypeParam> problem(60, 70, 9, 30);
  OmpOptions options;
  options.sparsity = 30;
  options.num_threads = 1;
  const int64_t announced = omp_workspace_bytes<TypeParam>(60, 9, options);
  EXPECT_EQ(problem.encode(options).workspace_bytes, announced);
  EXPECT_EQ(omp_workspace_bytes<TypeParam>(60, 1'000'000, options), announced);
}

template <class T>
void expect_error(Problem<T>& problem, const OmpOptions& options, const std::string& part) {
  const std::vector<T> coeffs = problem.coeffs;
  try {
    problem.encode(options);
    FAIL() << "expected an error about " << part;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
  EXPECT_EQ(problem.coeffs, coeffs);
}

TYPED_TEST(OmpTest, ErrorsNameTheArgument) {
  const TypeParam nan = std::numeric_limits<TypeParam>::quiet_NaN();
  Problem<TypeParam> problem(5, 6, 2, 2);
  problem.gram[7] = nan;
  expect_error(problem, {}, "gram: element [1, 2] is not finite");
  problem.make_gram();
  problem.correlations[9] = std::numeric_limits<TypeParam>::infinity();
  expect_error(problem, {}, "correlations: element [1, 4] is not finite");
  problem.make_gram();
  problem.energies[1] = nan;
  expect_error(problem, {}, "signal_energies: element [1] is not finite");
  problem.make_gram();
  problem.gram[0] = TypeParam(-1);
  expect_error(problem, {}, "gram: diagonal element 0 is negative");
  problem.make_gram();
  problem.sparsity = 6;
  expect_error(problem, {}, "sparsity: expected 1 to n_atoms = 5, got 6");
  problem.sparsity = 2;
  OmpOptions options;
  options.block_size = -1;
  expect_error(problem, options, "block_size");
}

TYPED_TEST(OmpTest, SizesThatDoNotFitAreAnError) {
  OmpOptions options;
  options.sparsity = int64_t{1} << 29;
  options.num_threads = 64;
  EXPECT_THROW(omp_workspace_bytes<TypeParam>(int64_t{1} << 30, 64, options), Error);
  EXPECT_THROW(omp_workspace_bytes<TypeParam>(int64_t{1} << 40, 64, options), Error);
  EXPECT_THROW(omp_workspace_bytes<TypeParam>(0, 64, options), Error);
}

}  // namespace
}  // namespace cospadi
