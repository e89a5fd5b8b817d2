// Kernels compiled for avx512. Everything is inside one namespace: no code is shared with other
// targets.
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/kernel_table.hpp"

#define COSPADI_VECTOR_BYTES 64
#define COSPADI_TARGET_AVX512 1

namespace cospadi::cpu::avx512 {
namespace {
// clang-format off: later files use earlier ones
#include "cpu/vec.hpp"
#include "cpu/lanes.hpp"
#include "cpu/arena.hpp"
#include "cpu/gemm_kernel.inl"
#include "cpu/convert.inl"
#include "cpu/sparse_gemm_expand_avx512.inl"
#include "cpu/sparse_gemm_format.inl"
#include "cpu/sparse_gemm_few.inl"
#include "cpu/sparse_gemm_staged.inl"
#include "cpu/sparse_gemm_panels.inl"
#include "cpu/decode_fields_avx512.inl"
#include "cpu/decode_fields.inl"
#include "cpu/sparse_gemm_entry.inl"
#include "cpu/linear_kernel.inl"
#include "cpu/omp_history.inl"
#include "cpu/omp_kernel.inl"
#include "cpu/dictionary_kernel.inl"
#include "cpu/select_kernel.inl"
#include "cpu/cholesky_panels.inl"
#include "cpu/round_code_common.inl"
#include "cpu/round_code_descent.inl"
#include "cpu/round_code_row.inl"
#include "cpu/round_code_full.inl"
// clang-format on
}  // namespace
}  // namespace cospadi::cpu::avx512

namespace cospadi::cpu {

const KernelTable& avx512_table() {
  static const KernelTable table = {
      .name = "avx512",
      .gemm_f32 = avx512::make_gemm_kernels<float>(),
      .gemm_f64 = avx512::make_gemm_kernels<double>(),
      .sparse_gemm = avx512::make_sparse_gemm_kernels(),
      .linear = avx512::make_linear_kernels(),
      .omp_f32 = avx512::omp::make_entry<float>(),
      .omp_f64 = avx512::omp::make_entry<double>(),
      .dictionary_f32 = avx512::dictionary::make_entry<float>(),
      .dictionary_f64 = avx512::dictionary::make_entry<double>(),
      .select_f32 = avx512::select::make_entry<float>(),
      .select_f64 = avx512::select::make_entry<double>(),
      .round_code = avx512::round_code::make_entry(),
  };
  return table;
}

}  // namespace cospadi::cpu
