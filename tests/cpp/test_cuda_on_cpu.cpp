// The emulator itself: that it computes what a GPU computes, and notices what it promises to
// notice.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <bit>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace cospadi::cuda {
namespace {

using cuda_on_cpu::Schedule;

constexpr Schedule kSchedules[] = {Schedule::kForward, Schedule::kReverse, Schedule::kShuffled};

class CudaOnCpu : public testing::Test {
 protected:
  void TearDown() override { cuda_on_cpu::set_schedule(Schedule::kForward); }
};

template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

__global__ void reverse_block(const int* in, int* out, bool is_right) {
  int* shared = dynamic_shared<int>();
  const int i = static_cast<int>(threadIdx.x);
  const int n = static_cast<int>(blockDim.x);
  const int base = static_cast<int>(blockIdx.x) * n;
  shared[i] = in[base + i];
  if (is_right) __syncthreads();
  out[base + i] = shared[n - 1 - i];
}

TEST_F(CudaOnCpu, BarriersOrderSharedMemoryAndTheirAbsenceShows) {
  std::vector<int> in(3 * 96);
  std::iota(in.begin(), in.end(), 0);
  for (const Schedule schedule : kSchedules) {
    cuda_on_cpu::set_schedule(schedule);
    for (const bool is_right : {true, false}) {
      std::vector<int> out(in.size(), -7);
      ASSERT_EQ(launch(&reverse_block, 3, 96, 96 * 4, nullptr, in.data(), out.data(), is_right),
                cudaSuccess);
      int n_wrong = 0;
      for (int i = 0; i < 3 * 96; ++i) n_wrong += out[i] != in[i / 96 * 96 + 95 - i % 96];
      EXPECT_EQ(n_wrong == 0, is_right) << "schedule " << static_cast<int>(schedule);
    }
  }
}

__global__ void warp_sums(const float* in, float* out, unsigned* ballots) {
  float value = in[threadIdx.x];
  const unsigned positive = __ballot_sync(0xffffffffU, value > 0.0F);
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  const float first = __shfl_sync(0xffffffffU, in[threadIdx.x], 0);
  const float before = __shfl_up_sync(0xffffffffU, in[threadIdx.x], 1);
  if (threadIdx.x % 32 == 31) {
    float* row = out + 3 * (threadIdx.x / 32);
    row[0] = value;
    row[1] = first;
    row[2] = before;
    ballots[threadIdx.x / 32] = positive;
  }
}

TEST_F(CudaOnCpu, WarpOperations) {
  std::vector<float> in(64);
  for (int i = 0; i < 64; ++i) in[i] = static_cast<float>(i % 3 - 1);
  for (const Schedule schedule : kSchedules) {
    cuda_on_cpu::set_schedule(schedule);
    std::vector<float> out(6);
    std::vector<unsigned> ballots(2);
    ASSERT_EQ(launch(&warp_sums, 1, 64, 0, nullptr, in.data(), out.data(), ballots.data()),
              cudaSuccess);
    for (int warp = 0; warp < 2; ++warp) {
      const float* part = in.data() + 32 * warp;
      EXPECT_EQ(out[3 * warp], std::accumulate(part, part + 32, 0.0F));
      EXPECT_EQ(out[3 * warp + 1], part[0]);
      EXPECT_EQ(out[3 * warp + 2], part[30]);
      for (int i = 0; i < 32; ++i) EXPECT_EQ(ballots[warp] >> i & 1, part[i] > 0.0F);
    }
  }
}

__global__ void half_leaves() {
  if (threadIdx.x < 16) return;
  __syncwarp();
}
__global__ void barrier_missed() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_places() {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __syncwarp();
  }
}
__global__ void foreign_lane() { __shfl_sync(1U << threadIdx.x, 1, 5); }
__global__ void wide_copy() { cp_async<16>(dynamic_shared<char>() + 4, dynamic_shared<char>()); }

TEST_F(CudaOnCpu, DivergenceIsAnError) {
  for (const Schedule schedule : kSchedules) {
    cuda_on_cpu::set_schedule(schedule);
    EXPECT_NE(error_of([] { launch(&half_leaves, 1, 32, 0, nullptr); }), "");
    EXPECT_NE(error_of([] { launch(&barrier_missed, 1, 64, 0, nullptr); }), "");
    EXPECT_NE(error_of([] { launch(&two_places, 1, 32, 0, nullptr); }), "");
    const std::string error = error_of([] { launch(&foreign_lane, 1, 8, 0, nullptr); });
    EXPECT_NE(error.find("outside of its mask"), std::string::npos) << error;
    EXPECT_NE(error_of([] { launch(&wide_copy, 1, 1, 64, nullptr); }), "");
  }
}

__global__ void staged_copy(const float* in, float* out, bool is_right) {
  float* shared = dynamic_shared<float>();
  const int i = static_cast<int>(threadIdx.x);
  cp_async<16>(shared + 4 * i, in + 4 * i, i == 31 ? 8 : 16);  // the last two become zeros
  cp_async_commit();
  if (is_right) cp_async_wait<0>();
  __syncwarp();
  for (int k = i; k < 128; k += 32) out[k] = shared[127 - k];
}

TEST_F(CudaOnCpu, AsynchronousCopiesArriveAtTheirWait) {
  alignas(16) float in[128];
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i + 1);
  float out[128];
  launch(&staged_copy, 1, 32, 512, nullptr, static_cast<const float*>(in), &out[0], true);
  for (int k = 0; k < 128; ++k) EXPECT_EQ(out[k], k < 2 ? 0.0F : in[127 - k]);
  launch(&staged_copy, 1, 32, 512, nullptr, static_cast<const float*>(in), &out[0], false);
  for (const float value : out) EXPECT_TRUE(std::isnan(value));
}

enum class Type { kBf16, kF16, kTf32 };

__device__ uint32_t word(const float* p, size_t step, Type type) {
  if (type == Type::kTf32) return to_tf32(*p);
  const auto half = [&](float x) {
    return uint32_t{type == Type::kBf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                                        : __half_as_ushort(__float2half_rn(x))};
  };
  return half(p[0]) | half(p[step]) << 16;
}

/// c [16 x 8] = a [16 x depth] b [depth x 8], one instruction.
__global__ void one_mma(const float* a, const float* b, float* out, Type type) {
  const int g = static_cast<int>(threadIdx.x) / 4;
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int depth = type == Type::kTf32 ? 8 : 16;
  const int pair = depth / 8;
  uint32_t fa[4];
  uint32_t fb[2];
  for (int i = 0; i < 4; ++i) {
    fa[i] = word(a + (g + 8 * (i % 2)) * depth + pair * (t + 4 * (i / 2)), 1, type);
  }
  for (int i = 0; i < 2; ++i) fb[i] = word(b + pair * (t + 4 * i) * 8 + g, 8, type);
  float c[4] = {1, 1, 1, 1};
  if (type == Type::kBf16) {
    mma_bf16(c, fa, fb);
  } else if (type == Type::kF16) {
    mma_f16(c, fa, fb);
  } else {
    mma_tf32(c, fa, fb);
  }
  for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}

TEST_F(CudaOnCpu, TensorCores) {
  std::mt19937 generator(1);
  std::uniform_int_distribution<int> value(-9, 9);
  std::vector<float> a(256);
  std::vector<float> b(128);
  for (float& x : a) x = static_cast<float>(value(generator));
  for (float& x : b) x = static_cast<float>(value(generator));
  for (const Type type : {Type::kBf16, Type::kF16, Type::kTf32}) {
    const int depth = type == Type::kTf32 ? 8 : 16;
    std::vector<float> out(128, NAN);
    launch(&one_mma, 1, 32, 0, nullptr, a.data(), b.data(), out.data(), type);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        float sum = 1;
        for (int k = 0; k < depth; ++k) sum += a[i * depth + k] * b[k * 8 + j];
        EXPECT_EQ(out[i * 8 + j], sum) << i << ", " << j;
      }
    }
  }
}

__global__ void load_matrices(uint32_t* out, bool is_transposed, bool is_right) {
  auto* shared = dynamic_shared<uint16_t>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) shared[i] = static_cast<uint16_t>(i);
  if (is_right) __syncwarp();
  uint32_t r[4];
  if (is_transposed) {
    ldmatrix_x4_transposed(r, shared + 8 * lane);
  } else {
    ldmatrix_x4(r, shared + 8 * lane);
  }
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

TEST_F(CudaOnCpu, MatrixLoads) {
  for (const bool is_transposed : {false, true}) {
    std::vector<uint32_t> out(128);
    launch(&load_matrices, 1, 32, 512, nullptr, out.data(), is_transposed, true);
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint32_t g = lane / 4;
      const uint32_t t = 2 * (lane % 4);
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t low = is_transposed ? 64 * i + 8 * t + g : 64 * i + 8 * g + t;
        const uint32_t high = low + (is_transposed ? 8 : 1);
        EXPECT_EQ(out[4 * lane + i], low | high << 16);
      }
    }
  }
}

TEST_F(CudaOnCpu, MatrixLoadsWithoutABarrierBefore) {
  std::vector<uint32_t> right(128);
  std::vector<uint32_t> wrong(128);
  launch(&load_matrices, 1, 32, 512, nullptr, right.data(), false, true);
  launch(&load_matrices, 1, 32, 512, nullptr, wrong.data(), false, false);
  EXPECT_NE(right, wrong);
}

TEST_F(CudaOnCpu, ImpossibleLaunchesAreRefused) {
  int data = 0;
  EXPECT_EQ(launch(&reverse_block, 1, 1025, 0, nullptr, &data, &data, true),
            cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(&reverse_block, 0, 32, 0, nullptr, &data, &data, true),
            cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(&reverse_block, 1, 1, 200 * 1024, nullptr, &data, &data, true),
            cudaErrorInvalidValue);
  EXPECT_EQ(launch(&reverse_block, 1, 1, 90 * 1024, nullptr, &data, &data, true), cudaSuccess);
}

TEST_F(CudaOnCpu, HalvesRoundToNearestEven) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<unsigned short>(i);
    const float half = __half2float(__ushort_as_half(bits));
    const float brain = __bfloat162float(__ushort_as_bfloat16(bits));
    if (!std::isnan(half)) {
      EXPECT_EQ(__half_as_ushort(__float2half_rn(half)), bits);
    }
    if (!std::isnan(brain)) {
      EXPECT_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(brain)), bits);
    }
  }
  EXPECT_EQ(__half2float(__float2half_rn(1.0F + 0x1p-11F)), 1.0F);
  EXPECT_EQ(__half2float(__float2half_rn(1.0F + 0x3p-11F)), 1.0F + 0x1p-9F);
  EXPECT_EQ(__half2float(__float2half_rn(65519.0F)), 65504.0F);
  EXPECT_TRUE(std::isinf(__half2float(__float2half_rn(65520.0F))));
  EXPECT_EQ(__bfloat162float(__float2bfloat16_rn(1.0F + 0x1p-8F)), 1.0F);
  EXPECT_EQ(__bfloat162float(__float2bfloat16_rn(1.0F + 0x3p-8F)), 1.0F + 0x1p-6F);
}

__global__ void count_all(int* total, unsigned* votes) {
  atomicAdd(total, 1);
  const int n_odd = __syncthreads_count(threadIdx.x % 2);
  if (threadIdx.x == 0) votes[blockIdx.y * gridDim.x + blockIdx.x] = n_odd;
}

TEST_F(CudaOnCpu, GridsAtomicsAndVotes) {
  for (const Schedule schedule : kSchedules) {
    cuda_on_cpu::set_schedule(schedule);
    int total = 0;
    std::vector<unsigned> votes(6);
    launch(&count_all, dim3(3, 2), dim3(7, 3), 0, nullptr, &total, votes.data());
    EXPECT_EQ(total, 6 * 21);
    for (const unsigned vote : votes) EXPECT_EQ(vote, 9U);
  }
}

}  // namespace
}  // namespace cospadi::cuda
