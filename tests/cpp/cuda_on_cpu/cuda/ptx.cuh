// Stand-in for csrc/cuda/ptx.cuh, which says what each function does.
#pragma once

#include <cstdint>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace cospadi::cuda {

using CudaWhere = cuda_on_cpu::Where;

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(cuda_on_cpu::shared_base());
}

template <int kSize>
void cp_async(void* shared,
              const void* source,
              int bytes = kSize,
              CudaWhere where = CudaWhere::current()) {
  static_assert(kSize == 4 || kSize == 8 || kSize == 16);
  if (bytes < 0 || bytes > kSize) cuda_on_cpu::fail("cp.async: bytes out of range", where);
  cuda_on_cpu::copy_later(shared, source, static_cast<size_t>(bytes), kSize, where);
}
inline void cp_async_commit() { cuda_on_cpu::commit_copies(); }
template <int kLeft>
void cp_async_wait() {
  cuda_on_cpu::wait_for_copies(kLeft);
}

inline uint4 load_once(const uint4* p) { return *p; }

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) -
                               static_cast<const char*>(cuda_on_cpu::shared_base()));
}

namespace emulated {

/// The next T if `condition`; it must be aligned and inside, as on a device.
template <class T>
T take_shared(uint32_t& address, uint32_t condition, const CudaWhere& where) {
  if (condition == 0) return T{};
  if (address % sizeof(T) != 0 || address + sizeof(T) > cuda_on_cpu::shared_size()) {
    cuda_on_cpu::fail("take_shared: misaligned, or beyond the dynamic shared memory", where);
  }
  T value;
  std::memcpy(&value, static_cast<const char*>(cuda_on_cpu::shared_base()) + address, sizeof(T));
  address += sizeof(T);
  return value;
}

}  // namespace emulated

inline uint32_t take_shared_16(uint32_t& address,
                               uint32_t condition,
                               CudaWhere where = CudaWhere::current()) {
  return emulated::take_shared<uint16_t>(address, condition, where);
}
inline int take_shared_s8(uint32_t& address,
                          uint32_t condition,
                          CudaWhere where = CudaWhere::current()) {
  return emulated::take_shared<int8_t>(address, condition, where);
}
inline uint32_t take_shared_32(uint32_t& address,
                               uint32_t condition,
                               CudaWhere where = CudaWhere::current()) {
  return emulated::take_shared<uint32_t>(address, condition, where);
}

namespace emulated {

/// One lane's part of a product.
struct Fragments {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

inline float half_of(uint32_t word, int upper, bool is_bf16) {
  const auto bits = static_cast<unsigned short>(upper ? word >> 16 : word & 0xffff);
  return is_bf16 ? __bfloat162float(__ushort_as_bfloat16(bits))
                 : __half2float(__ushort_as_half(bits));
}

enum class MmaType { kBf16, kF16, kTf32 };

/// Gathers the matrices from the fragments of all lanes, multiplies, and hands the result out.
template <MmaType kType>
void multiply(void* const operands[32], const void*) {
  constexpr int kDepth = kType == MmaType::kTf32 ? 8 : 16;
  float a[16][kDepth];
  float b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<const Fragments*>(operands[lane]);
    const int g = lane / 4;
    const int t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i % 2);
      if constexpr (kType == MmaType::kTf32) {
        // the unit reads the upper 19 bits
        a[row][t + 4 * (i / 2)] = __uint_as_float(f.a[i] & 0xffffe000U);
      } else {
        for (int h = 0; h < 2; ++h) {
          a[row][2 * t + 8 * (i / 2) + h] = half_of(f.a[i], h, kType == MmaType::kBf16);
        }
      }
    }
    for (int i = 0; i < 2; ++i) {
      if constexpr (kType == MmaType::kTf32) {
        b[t + 4 * i][g] = __uint_as_float(f.b[i] & 0xffffe000U);
      } else {
        for (int h = 0; h < 2; ++h) {
          b[2 * t + 8 * i + h][g] = half_of(f.b[i], h, kType == MmaType::kBf16);
        }
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<const Fragments*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2);
      const int col = 2 * (lane % 4) + i % 2;
      float sum = f.c[i];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][col];
      f.c[i] = sum;
    }
  }
}

template <MmaType kType>
void mma(const char* name,
         float (&c)[4],
         const uint32_t (&a)[4],
         const uint32_t (&b)[2],
         const CudaWhere& where) {
  Fragments fragments{c, a, b};
  cuda_on_cpu::warp_collective(name, 0xffffffffU, &fragments, &multiply<kType>, nullptr, where);
}

/// A row as it was when its lane arrived: only a barrier before orders the writes of other lanes.
struct MatrixRow {
  uint16_t row[8];
  uint32_t* result;
};

template <bool kTransposed>
void load_matrices(void* const operands[32], const void*) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t word = 0;
      for (int h = 0; h < 2; ++h) {
        int row = lane / 4;
        int col = 2 * (lane % 4) + h;
        if (kTransposed) std::swap(row, col);
        const auto& source = *static_cast<const MatrixRow*>(operands[8 * matrix + row]);
        word |= uint32_t{source.row[col]} << (16 * h);
      }
      static_cast<const MatrixRow*>(operands[lane])->result[matrix] = word;
    }
  }
}

template <bool kTransposed>
void ldmatrix(const char* name, uint32_t (&r)[4], const void* row, const CudaWhere& where) {
  const auto* begin = static_cast<const char*>(cuda_on_cpu::shared_base());
  const auto* address = static_cast<const char*>(row);
  if (address < begin || address + 16 > begin + cuda_on_cpu::shared_size() ||
      reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    cuda_on_cpu::fail(std::string(name) + ": expected 16 aligned bytes of shared memory", where);
  }
  MatrixRow operand{{}, r};
  std::memcpy(operand.row, row, sizeof(operand.row));
  cuda_on_cpu::warp_collective(
      name, 0xffffffffU, &operand, &load_matrices<kTransposed>, nullptr, where);
}

}  // namespace emulated

inline void mma_bf16(float (&c)[4],
                     const uint32_t (&a)[4],
                     const uint32_t (&b)[2],
                     CudaWhere where = CudaWhere::current()) {
  emulated::mma<emulated::MmaType::kBf16>("mma_bf16", c, a, b, where);
}
inline void mma_f16(float (&c)[4],
                    const uint32_t (&a)[4],
                    const uint32_t (&b)[2],
                    CudaWhere where = CudaWhere::current()) {
  emulated::mma<emulated::MmaType::kF16>("mma_f16", c, a, b, where);
}
inline void mma_tf32(float (&c)[4],
                     const uint32_t (&a)[4],
                     const uint32_t (&b)[2],
                     CudaWhere where = CudaWhere::current()) {
  emulated::mma<emulated::MmaType::kTf32>("mma_tf32", c, a, b, where);
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7fffffffU) >= 0x7f800000U ? bits : (bits + 0x1000U) & 0xffffe000U;
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, CudaWhere where = CudaWhere::current()) {
  emulated::ldmatrix<false>("ldmatrix_x4", r, row, where);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4],
                                   const void* row,
                                   CudaWhere where = CudaWhere::current()) {
  emulated::ldmatrix<true>("ldmatrix_x4_transposed", r, row, where);
}

inline void named_barrier(int id, int n_threads, CudaWhere where = CudaWhere::current()) {
  cuda_on_cpu::block_barrier(id, n_threads, where);
}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace cospadi::cuda
