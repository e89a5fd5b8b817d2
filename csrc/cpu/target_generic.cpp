// Kernels compiled for generic. Everything is inside one namespace: no code is shared with other
// targets.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/kernel_table.hpp"

#define COSPADI_VECTOR_BYTES 16
#define COSPADI_TARGET_GENERIC 1

namespace cospadi::cpu::generic {
namespace {
// clang-format off: later files use earlier ones
#include "cpu/vec.hpp"
#include "cpu/lanes.hpp"
#include "cpu/gemm_kernel.inl"
#include "cpu/convert.inl"
#include "cpu/sparse_gemm_expand_generic.inl"
#include "cpu/sparse_gemm_format.inl"
#include "cpu/sparse_gemm_few.inl"
#include "cpu/sparse_gemm_panels.inl"
#include "cpu/decode_fields_generic.inl"
#include "cpu/decode_fields.inl"
#include "cpu/sparse_gemm_entry.inl"
#include "cpu/omp_history.inl"
#include "cpu/omp_kernel.inl"
#include "cpu/dictionary_kernel.inl"
// clang-format on
}  // namespace
}  // namespace cospadi::cpu::generic

namespace cospadi::cpu {

const KernelTable& generic_table() {
  static const KernelTable table = {
      .name = "generic",
      .gemm_f32 = generic::make_gemm_kernels<float>(),
      .gemm_f64 = generic::make_gemm_kernels<double>(),
      .sparse_gemm = generic::make_sparse_gemm_kernels(),
      .omp_f32 = generic::omp::make_entry<float>(),
      .omp_f64 = generic::omp::make_entry<double>(),
      .dictionary_f32 = generic::dictionary::make_entry<float>(),
      .dictionary_f64 = generic::dictionary::make_entry<double>(),
  };
  return table;
}

}  // namespace cospadi::cpu
