// The only file with assembly: what CUDA C++ has no function for. The tests on machines without a
// GPU replace it (tests/cpp/cuda_on_cpu/cuda/ptx.cuh), so a wrapper added here is added there.
//
// Everything runs on sm_80 and newer. Pointers to shared memory are generic pointers into it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cospadi::cuda {

/// The dynamic shared memory of the block, as an array of T; aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- asynchronous copies ----

/// Starts copying `bytes` bytes from global memory, and zeros up to kSize (4, 8 or 16); both
/// addresses are divisible by kSize, `source` only if bytes > 0. Only kSize = 16 bypasses the L1
/// cache.
template <int kSize>
__device__ __forceinline__ void cp_async(void* shared, const void* source, int bytes = kSize) {
  static_assert(kSize == 4 || kSize == 8 || kSize == 16);
  if constexpr (kSize == 16) {
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
        "l"(source),
        "r"(bytes)
        : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)),
                 "l"(source),
                 "n"(kSize),
                 "r"(bytes)
                 : "memory");
  }
}

/// Ends a group of copies of this thread.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

/// Waits for all groups of this thread but the last kLeft; other threads see them after a barrier.
template <int kLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// ---- loads ----

/// 16 bytes that are read once: they do not displace others from the L1 cache.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// The next value at an address of 32 bits in shared memory (see shared_address) if `condition` is
// not 0, and the address moves on; else 0. Without a branch, and without the base of the shared
// memory made anew for every load, which is what compilers do to loads behind a condition.

/// 16 bits, zeros above.
__device__ __forceinline__ uint32_t take_shared_16(uint32_t& address, uint32_t condition) {
  uint32_t value;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.u32 %0, 0;\n"
      "@p ld.shared.u16 %0, [%1];\n@p add.u32 %1, %1, 2;\n}\n"
      : "=&r"(value), "+r"(address)
      : "r"(condition)
      : "memory");
  return value;
}

/// 8 bits, with their sign above.
__device__ __forceinline__ int take_shared_s8(uint32_t& address, uint32_t condition) {
  int value;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.u32 %0, 0;\n"
      "@p ld.shared.s8 %0, [%1];\n@p add.u32 %1, %1, 1;\n}\n"
      : "=&r"(value), "+r"(address)
      : "r"(condition)
      : "memory");
  return value;
}

/// 32 bits.
__device__ __forceinline__ uint32_t take_shared_32(uint32_t& address, uint32_t condition) {
  uint32_t value;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.u32 %0, 0;\n"
      "@p ld.shared.u32 %0, [%1];\n@p add.u32 %1, %1, 4;\n}\n"
      : "=&r"(value), "+r"(address)
      : "r"(condition)
      : "memory");
  return value;
}

// ---- tensor cores ----
//
// Fragments of m16n8k16 and m16n8k8, lane l = 4 g + t: c[0], c[1] are (row g, columns 2t, 2t + 1),
// c[2], c[3] the same of row g + 8. For 16-bit types a[0] holds (row g, columns 2t, 2t + 1) in its
// lower and upper half, a[1] row g + 8, a[2] row g columns 2t + 8, 2t + 9, a[3] row g + 8 of those;
// b[0] holds (rows 2t, 2t + 1, column g), b[1] rows 2t + 8, 2t + 9. For tf32 a[0] is (g, t), a[1]
// (g + 8, t), a[2] (g, t + 4), a[3] (g + 8, t + 4), b[0] (row t, column g), b[1] (row t + 4,
// column g).

/// c += a b, bfloat16 operands, m16n8k16.
__device__ __forceinline__ void mma_bf16(float (&c)[4],
                                         const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// c += a b, binary16 operands, m16n8k16.
__device__ __forceinline__ void mma_f16(float (&c)[4],
                                        const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// The float nearest to x with 10 bits of fraction, as mma_tf32 wants its operands.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
}

/// c += a b, tf32 operands (see to_tf32), m16n8k8.
__device__ __forceinline__ void mma_tf32(float (&c)[4],
                                         const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8
/// (16 bytes in shared memory, aligned), and gets elements 2 (l % 4), 2 (l % 4) + 1 of row l / 4 of
/// matrix i in r[i].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- barriers and dependent launches ----

/// Barrier `id` (1 .. 15) among `n_threads` threads, whole warps of the block.
__device__ __forceinline__ void named_barrier(int id, int n_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(n_threads) : "memory");
}

/// In a kernel launched as dependent (cuda/launch.cuh): waits until the kernel before it in the
/// stream has finished and its writes are visible. Before sm_90, and in a plain launch: nothing.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

/// Lets the dependent kernel after this one start, up to its wait_for_previous_kernel.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace cospadi::cuda
