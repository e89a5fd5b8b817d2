#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "cospadi/linear.hpp"
#include "cospadi/status.hpp"
#include "sparse_problem.hpp"

namespace cospadi {
namespace {

/// A projection of small integers: x D is exact in every storage type.
struct Projection {
  int64_t rows;
  int64_t d_in;
  int64_t n_learned;
  bool has_identity;
  Problem code;  // its z is not used
  Guarded x;
  Guarded dictionary;
  std::vector<int> z;  // [rows x total atoms]

  Projection(int64_t rows_,
             int64_t d_in_,
             int64_t n_learned_,
             bool has_identity_,
             int64_t d_out,
             DType x_dtype,
             DType stored)
      : rows(rows_),
        d_in(d_in_),
        n_learned(n_learned_),
        has_identity(has_identity_),
        code(rows_,
             n_learned_ + (has_identity_ ? d_in_ : 0),
             d_out,
             (n_learned_ + (has_identity_ ? d_in_ : 0) + 1) / 2,
             x_dtype,
             stored),
        x(static_cast<size_t>(rows_ * d_in_ * dtype_bytes(x_dtype))),
        dictionary(static_cast<size_t>(d_in_ * n_learned_ * dtype_bytes(stored))) {
    std::mt19937 generator(static_cast<unsigned>(rows * 7919 + d_in * 31 + n_learned));
    std::uniform_int_distribution<int> value(-1, 1);
    std::vector<int> inputs(static_cast<size_t>(rows * d_in));
    std::vector<int> atoms(static_cast<size_t>(d_in * n_learned));
    for (size_t i = 0; i < inputs.size(); ++i) {
      inputs[i] = value(generator);
      write_value(
          x_dtype, inputs[i], x.as<char>() + static_cast<int64_t>(i) * dtype_bytes(x_dtype));
    }
    for (size_t i = 0; i < atoms.size(); ++i) {
      atoms[i] = value(generator);
      write_value(
          stored, atoms[i], dictionary.as<char>() + static_cast<int64_t>(i) * dtype_bytes(stored));
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; has_identity && i < d_in; ++i) {
        z.push_back(inputs[static_cast<size_t>(r * d_in + i)]);
      }
      for (int64_t k = 0; k < n_learned; ++k) {
        int sum = 0;
        for (int64_t i = 0; i < d_in; ++i) {
          sum += inputs[static_cast<size_t>(r * d_in + i)] *
                 atoms[static_cast<size_t>(i * n_learned + k)];
        }
        z.push_back(sum);
      }
    }
  }

  LinearMatrix matrix() const {
    LinearMatrix m;
    m.d_in = d_in;
    m.has_identity = has_identity;
    if (n_learned > 0) {
      m.dictionary =
          ConstTypedMatrix{dictionary.as<void>(), code.coeffs_dtype, d_in, n_learned, n_learned};
    }
    m.code = code.sparse();
    return m;
  }
  ConstTypedMatrix inputs() const { return {x.as<void>(), code.z_dtype, rows, d_in, d_in}; }
  int expected(int64_t row, int64_t col) const {
    int sum = 0;
    for (int64_t a = 0; a < code.n_atoms; ++a) {
      sum += z[static_cast<size_t>(row * code.n_atoms + a)] *
             code.dense[static_cast<size_t>(a * code.d_out + col)];
    }
    return sum;
  }
};

TEST(Linear, ExactOnIntegersAtTheEdgeOfMemory) {
  for (const int64_t rows : {1, 2, 3, 7, 8, 9, 40}) {
    for (const int64_t d_in : {1, 33, 100}) {
      for (const int64_t n_learned : {0, 1, 31, 32, 70, 300}) {
        for (const bool has_identity : {false, true}) {
          for (const DType x_dtype : kDTypes) {
            const DType stored = n_learned % 2 == 0 ? DType::kBFloat16 : x_dtype;
            const Projection p(rows, d_in, n_learned, has_identity, 19, x_dtype, stored);
            std::vector<float> y(static_cast<size_t>(rows * 19), -1.0F);
            linear(p.inputs(), p.matrix(), {y.data(), DType::kFloat32, rows, 19, 19}, 1);
            for (int64_t r = 0; r < rows; ++r) {
              for (int64_t j = 0; j < 19; ++j) {
                ASSERT_EQ(y[static_cast<size_t>(r * 19 + j)], static_cast<float>(p.expected(r, j)))
                    << rows << " rows, " << d_in << " inputs, " << n_learned << " atoms, identity "
                    << has_identity << ", at " << r << ", " << j;
              }
            }
          }
        }
      }
    }
  }
}

TEST(Linear, ThreadsChangeNothing) {
  // large enough for several threads in both products
  const Projection p(3, 700, 1500, true, 900, DType::kBFloat16, DType::kBFloat16);
  std::vector<float> first(3 * 900);
  linear(p.inputs(), p.matrix(), {first.data(), DType::kFloat32, 3, 900, 900}, 1);
  for (const int threads : {0, 2, 3, 7}) {
    std::vector<float> y(3 * 900, -1.0F);
    linear(p.inputs(), p.matrix(), {y.data(), DType::kFloat32, 3, 900, 900}, threads);
    EXPECT_EQ(y, first) << threads << " threads";
  }
}

TEST(Linear, ManyRowsInPieces) {
  const Projection p(2500, 20, 12, true, 5, DType::kFloat32, DType::kFloat32);
  std::vector<float> y(2500 * 5, -1.0F);
  linear(p.inputs(), p.matrix(), {y.data(), DType::kFloat32, 2500, 5, 5}, 2);
  for (int64_t r = 0; r < 2500; r += 111) {
    for (int64_t j = 0; j < 5; ++j) {
      ASSERT_EQ(y[static_cast<size_t>(r * 5 + j)], static_cast<float>(p.expected(r, j)));
    }
  }
}

/// The message of the error that `call` ends in.
template <class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Linear, SaysWhatIsWrong) {
  const Projection p(2, 33, 10, true, 19, DType::kFloat32, DType::kFloat32);
  std::vector<float> y(2 * 19, -1.0F);
  const TypedMatrix out{y.data(), DType::kFloat32, 2, 19, 19};
  LinearMatrix m = p.matrix();
  m.has_identity = false;
  EXPECT_EQ(message_of([&] { linear(p.inputs(), m, out, 1); }), "code: expected 10 atoms, got 43");
  m = p.matrix();
  std::get<ConstTypedMatrix>(m.dictionary).rows = 32;
  EXPECT_EQ(message_of([&] { linear(p.inputs(), m, out, 1); }),
            "dictionary: expected shape [33, 10], got [32, 10]");
  std::get<ConstTypedMatrix>(m.dictionary) = {nullptr, DType::kFloat32, 33, 10, 10};
  EXPECT_EQ(message_of([&] { linear(p.inputs(), m, out, 1); }), "dictionary: null pointer");
  m.dictionary = PackedCoeffs{32,
                              {CodeKind::kInteger, 8},
                              {p.dictionary.as<uint8_t>(), 10, 32},
                              {y.data(), DType::kFloat32, 10, 1, 1},
                              0};
  EXPECT_EQ(message_of([&] { linear(p.inputs(), m, out, 1); }),
            "dictionary: expected 33 values per atom, got 32");
  m = p.matrix();
  EXPECT_EQ(message_of([&] { linear(p.inputs(), m, {y.data(), DType::kFloat32, 2, 18, 18}, 1); }),
            "y: expected shape [2, 19], got [2, 18]");
  m.bias = {y.data(), DType::kFloat32, 18};
  EXPECT_EQ(message_of([&] { linear(p.inputs(), m, out, 1); }),
            "bias: expected 19 elements, got 18");
  EXPECT_EQ(y, std::vector<float>(2 * 19, -1.0F));
}

}  // namespace
}  // namespace cospadi
