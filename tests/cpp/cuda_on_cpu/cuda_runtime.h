// Stand-in for CUDA's runtime and built-ins (see cuda_on_cpu.hpp).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_on_cpu.hpp"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

inline constexpr int warpSize = 32;

using std::max;
using std::min;
inline long long min(long long a, int b) { return std::min<long long>(a, b); }
inline long long max(long long a, int b) { return std::max<long long>(a, b); }

// ---- bits ----

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1U) << (31 - i);
  return result;
}
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long both = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned code = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(both >> (8 * (code & 7))) & 0xff;
    if (code & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign replicated
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(
      (static_cast<unsigned long long>(high) << 32 | low) << (shift & 31) >> 32);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<int8_t>(static_cast<unsigned>(a) >> (8 * i)) *
         static_cast<int8_t>(static_cast<unsigned>(b) >> (8 * i));
  }
  return c;
}

// ---- arithmetic ----

inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0F / a; }
inline float rsqrtf(float a) { return 1.0F / std::sqrt(a); }
inline float __frsqrt_rn(float a) { return 1.0F / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline int __mul24(int a, int b) { return a * b; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}

// ---- memory ----

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldca(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// Threads of the emulator are never interrupted.
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicSub(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = old - value;
  return old;
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = std::max(old, value);
  return old;
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = std::min(old, value);
  return old;
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = value;
  return old;
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = old | value;
  return old;
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = old & value;
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  const unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}

// ---- barriers and warp operations ----

using CudaWhere = cuda_on_cpu::Where;

inline void __syncthreads(CudaWhere where = CudaWhere::current()) {
  cuda_on_cpu::block_barrier(0, 0, where);
}

namespace cuda_on_cpu {

/// A warp operation over values of T with results of R: `combine(values, mask, lane)`.
template <class T, class R, class Combine>
R warp_operation(
    const char* name, uint32_t mask, T value, const Combine& combine, const Where& where) {
  struct Operand {
    T value;
    R result;
    const Combine* combine;
    uint32_t mask;
  } operand{value, R{}, &combine, mask};
  warp_collective(
      name,
      mask,
      &operand,
      [](void* const operands[32], const void*) {
        T values[32] = {};
        for (int i = 0; i < 32; ++i) {
          if (operands[i]) values[i] = static_cast<Operand*>(operands[i])->value;
        }
        for (int i = 0; i < 32; ++i) {
          if (auto* own = static_cast<Operand*>(operands[i])) {
            own->result = (*own->combine)(values, own->mask, i);
          }
        }
      },
      nullptr,
      where);
  return operand.result;
}

template <class T>
struct FromLane {
  T value;
  bool is_valid;
};

/// A shuffle: `source(lane)` is the lane to read.
template <class T, class Source>
T shuffle(const char* name, uint32_t mask, T value, const Source& source, const Where& where) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  const auto result = warp_operation<T, FromLane<T>>(
      name,
      mask,
      value,
      [&](const T* values, uint32_t lanes, int lane) {
        const int from = source(lane);
        return FromLane<T>{values[from], (lanes >> from & 1) != 0};
      },
      where);
  if (!result.is_valid) fail(std::string(name) + ": reads a lane outside of its mask", where);
  return result.value;
}

template <class T, class Fold>
T fold_lanes(const char* name, uint32_t mask, T value, const Fold& fold, const Where& where) {
  return warp_operation<T, T>(
      name,
      mask,
      value,
      [&](const T* values, uint32_t lanes, int) {
        T result{};
        bool has_one = false;
        for (int i = 0; i < 32; ++i) {
          if ((lanes >> i & 1) == 0) continue;
          result = has_one ? static_cast<T>(fold(result, values[i])) : values[i];
          has_one = true;
        }
        return result;
      },
      where);
}

}  // namespace cuda_on_cpu

inline void __syncwarp(unsigned mask = 0xffffffffU, CudaWhere where = CudaWhere::current()) {
  cuda_on_cpu::warp_collective(
      "__syncwarp", mask, nullptr, [](void* const*, const void*) {}, nullptr, where);
}
template <class T>
T __shfl_sync(
    unsigned mask, T value, int from, int width = 32, CudaWhere where = CudaWhere::current()) {
  return cuda_on_cpu::shuffle(
      "__shfl_sync",
      mask,
      value,
      [=](int lane) { return (lane & ~(width - 1)) | (from & (width - 1)); },
      where);
}
template <class T>
T __shfl_up_sync(
    unsigned mask, T value, unsigned by, int width = 32, CudaWhere where = CudaWhere::current()) {
  return cuda_on_cpu::shuffle(
      "__shfl_up_sync",
      mask,
      value,
      [=](int lane) {
        const int from = lane - static_cast<int>(by);
        return from < (lane & ~(width - 1)) ? lane : from;
      },
      where);
}
template <class T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned by, int width = 32, CudaWhere where = CudaWhere::current()) {
  return cuda_on_cpu::shuffle(
      "__shfl_down_sync",
      mask,
      value,
      [=](int lane) {
        const int from = lane + static_cast<int>(by);
        return from > (lane | (width - 1)) ? lane : from;
      },
      where);
}
template <class T>
T __shfl_xor_sync(
    unsigned mask, T value, int bits, int width = 32, CudaWhere where = CudaWhere::current()) {
  return cuda_on_cpu::shuffle(
      "__shfl_xor_sync",
      mask,
      value,
      [=](int lane) {
        const int from = lane ^ bits;
        return from > (lane | (width - 1)) ? lane : from;
      },
      where);
}
inline unsigned __ballot_sync(unsigned mask,
                              int predicate,
                              CudaWhere where = CudaWhere::current()) {
  return cuda_on_cpu::warp_operation<int, unsigned>(
      "__ballot_sync",
      mask,
      predicate,
      [](const int* values, uint32_t lanes, int) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= (lanes >> i & 1) && values[i] ? 1U << i : 0U;
        return bits;
      },
      where);
}
inline int __any_sync(unsigned mask, int predicate, CudaWhere where = CudaWhere::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CudaWhere where = CudaWhere::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CudaWhere where = CudaWhere::current()) {
  return cuda_on_cpu::warp_operation<T, unsigned>(
      "__match_any_sync",
      mask,
      value,
      [](const T* values, uint32_t lanes, int lane) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) {
          bits |= (lanes >> i & 1) && values[i] == values[lane] ? 1U << i : 0U;
        }
        return bits;
      },
      where);
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, CudaWhere where = CudaWhere::current()) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return cuda_on_cpu::fold_lanes(
      "__reduce_add_sync", mask, value, [](T a, T b) { return a + b; }, where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, CudaWhere where = CudaWhere::current()) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return cuda_on_cpu::fold_lanes(
      "__reduce_max_sync", mask, value, [](T a, T b) { return std::max(a, b); }, where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, CudaWhere where = CudaWhere::current()) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return cuda_on_cpu::fold_lanes(
      "__reduce_min_sync", mask, value, [](T a, T b) { return std::min(a, b); }, where);
}
inline unsigned __reduce_or_sync(unsigned mask,
                                 unsigned value,
                                 CudaWhere where = CudaWhere::current()) {
  return cuda_on_cpu::fold_lanes(
      "__reduce_or_sync", mask, value, [](unsigned a, unsigned b) { return a | b; }, where);
}

/// The barrier with a vote; blocks run one after another, so one word serves them all.
inline int __syncthreads_count(int predicate, CudaWhere where = CudaWhere::current()) {
  static int count;
  __syncthreads(where);
  count = 0;
  __syncthreads(where);
  count += predicate != 0;
  __syncthreads(where);
  return count;
}
inline int __syncthreads_or(int predicate, CudaWhere where = CudaWhere::current()) {
  return __syncthreads_count(predicate, where) != 0;
}
inline int __syncthreads_and(int predicate, CudaWhere where = CudaWhere::current()) {
  return __syncthreads_count(predicate == 0, where) == 0;
}

// ---- host ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotSupported = 801,
};
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "error of the emulator";
}
inline const char* cudaGetErrorName(cudaError_t status) { return cudaGetErrorString(status); }

using cudaStream_t = struct CUstream_st*;

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_cpu {

inline constexpr size_t kPlainSharedBytes = 48 * 1024;
inline constexpr size_t kMaxSharedBytes = 99 * 1024;  // what sm_86, 89 and 120 have

inline std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}
inline cudaError_t& last_error() {
  static cudaError_t error = cudaSuccess;
  return error;
}

inline cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t& config) {
  const dim3 block = config.blockDim;
  const dim3 grid = config.gridDim;
  const uint64_t n_threads = uint64_t{block.x} * block.y * block.z;
  if (n_threads == 0 || n_threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > 0x7fffffffU || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = shared_limits().find(kernel);
  const size_t allowed = limit == shared_limits().end() ? kPlainSharedBytes : limit->second;
  return config.dynamicSmemBytes > allowed ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_on_cpu::last_error(), cudaSuccess);
}
inline cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::last_error(); }

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...),
                                 cudaFuncAttribute attribute,
                                 int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > cuda_on_cpu::kMaxSharedBytes) {
    return cuda_on_cpu::last_error() = cudaErrorInvalidValue;
  }
  cuda_on_cpu::shared_limits()[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
  return cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                               void (*kernel)(Params...),
                               Args&&... args) {
  const cudaError_t status =
      cuda_on_cpu::check_launch(reinterpret_cast<const void*>(kernel), *config);
  if (status != cudaSuccess) return cuda_on_cpu::last_error() = status;
  const std::tuple<std::decay_t<Params>...> values(std::forward<Args>(args)...);
  cuda_on_cpu::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] {
    std::apply(kernel, values);
  });
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_on_cpu::multiprocessors();
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 32 << 20;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 6;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(cuda_on_cpu::kMaxSharedBytes);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
template <class... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count,
                                                          void (*)(Params...),
                                                          int,
                                                          size_t) {
  *count = 2;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDefault = 4, cudaMemcpyDeviceToDevice = 3 };
inline cudaError_t cudaMemcpyAsync(
    void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
