// Dense and decoded forms of S, and masks as bytes, by the emulated kernels.
#include <gtest/gtest.h>

#include "cuda/expand.cu"
#include "cuda_problem.hpp"

namespace cospadi::cuda {
namespace {

using cuda_on_cpu::Schedule;

TEST(CudaExpand, EveryFormToEveryType) {
  for (const Schedule schedule : {Schedule::kForward, Schedule::kReverse, Schedule::kShuffled}) {
    cuda_on_cpu::set_schedule(schedule);
    for (const Form form : kForms) {
      for (const auto& [n_atoms, sparsity, d_out] : {std::tuple{1, 1, 1},
                                                     {7, 0, 3},
                                                     {31, 9, 9},
                                                     {64, 64, 2},
                                                     {100, 51, 11},
                                                     {1100, 530, 3}}) {
        for (const bool has_mask : {true, false}) {
          const CudaProblem problem(
              1, n_atoms, d_out, sparsity, form, DType::kFloat32, -1, 0, has_mask);
          for (const DType dtype : kDTypes) {
            const int stride = n_atoms + 3;
            Guarded out(static_cast<size_t>(d_out * stride) * dtype_bytes(dtype));
            for (int i = 0; i < d_out * stride; ++i) store_element(-77, out.as<char>(), dtype, i);
            ASSERT_EQ(expand_code(problem.code(), dtype, out.as<char>(), stride, nullptr), 0);
            for (int j = 0; j < d_out; ++j) {
              for (int a = 0; a < stride; ++a) {
                const float expected =
                    a < n_atoms ? problem.dense[static_cast<size_t>(a * d_out + j)] : -77.0F;
                ASSERT_EQ(load_element(out.as<char>(), dtype, j * stride + a), expected)
                    << n_atoms << " atoms, output " << j << ", atom " << a;
              }
            }
          }
          std::vector<float> decoded(problem.coeffs.size(), -77.0F);
          ASSERT_EQ(decode_values(problem.code(), decoded.data(), nullptr), 0);
          ASSERT_EQ(decoded, problem.coeffs);
        }
      }
    }
  }
  cuda_on_cpu::set_schedule(Schedule::kForward);
}

TEST(CudaExpand, ReadsNothingOutsideWhenTheMaskLies) {
  for (const Form form : kForms) {
    const CudaProblem problem(1, 200, 33, 2, form, DType::kFloat32);
    std::memset(problem.mask.as<char>(), 0xff, problem.mask.bytes());
    Guarded out(200 * 33 * 4);
    ASSERT_EQ(expand_code(problem.code(), DType::kFloat32, out.as<float>(), 200, nullptr), 0);
  }
}

TEST(CudaExpand, BitsThereAndBack) {
  for (const int n_atoms : {1, 8, 9, 63, 64, 65, 300}) {
    const CudaProblem problem(1, n_atoms, 5, n_atoms / 2, kForms[0], DType::kFloat32);
    const size_t n_flags = static_cast<size_t>(5 * n_atoms);
    Guarded flags(n_flags);
    ASSERT_EQ(unpack_bits(problem.mask.as<uint8_t>(), 5, n_atoms, flags.as<uint8_t>(), nullptr), 0);
    for (size_t i = 0; i < n_flags; ++i) {
      const uint8_t byte =
          problem.mask.as<uint8_t>()[i / static_cast<size_t>(n_atoms) * problem.mask_bytes() +
                                     i % static_cast<size_t>(n_atoms) / 8];
      ASSERT_EQ(flags.as<uint8_t>()[i], byte >> (i % static_cast<size_t>(n_atoms) % 8) & 1);
    }
    Guarded mask(problem.mask.bytes());
    std::memset(mask.as<char>(), 0xee, mask.bytes());
    ASSERT_EQ(pack_bits(flags.as<uint8_t>(), 5, n_atoms, mask.as<uint8_t>(), nullptr), 0);
    EXPECT_EQ(std::memcmp(mask.as<char>(), problem.mask.as<char>(), mask.bytes()), 0);
  }
}

TEST(CudaExpand, NothingToDoStartsNothing) {
  const int64_t before = cuda_on_cpu::launch_count();
  EXPECT_EQ(expand_code(CodeOperand{}, DType::kFloat32, nullptr, 0, nullptr), 0);
  EXPECT_EQ(decode_values(CodeOperand{}, nullptr, nullptr), 0);
  EXPECT_EQ(pack_bits(nullptr, 0, 9, nullptr, nullptr), 0);
  EXPECT_EQ(unpack_bits(nullptr, 3, 0, nullptr, nullptr), 0);
  EXPECT_EQ(cuda_on_cpu::launch_count(), before);
}

}  // namespace
}  // namespace cospadi::cuda
