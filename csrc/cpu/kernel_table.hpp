// The whole CPU surface: one table of functions per instruction set, chosen once at run time.
//
// Entries work on one task (one signal, one tile) with workspace passed in; they neither allocate
// nor throw nor start threads. Checks and threading live in csrc/core.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dictionary_types.hpp"
#include "cpu/linear_types.hpp"
#include "cpu/omp_types.hpp"
#include "cpu/round_code_types.hpp"
#include "cpu/select_types.hpp"
#include "cpu/sparse_gemm_types.hpp"

namespace cospadi::cpu {

/// Register tile and packed tile product of the dense GEMM for one element type.
///
/// Packed panels: `width` rows (of a) or columns (of b) side by side, one step of k after another;
/// panel i of a packed block starts at `i * width * k_size`. Missing rows are stored as zeros.
template <class T>
struct GemmKernels {
  int64_t panel_rows;  ///< width of a packed panel of a
  int64_t panel_cols;  ///< width of a packed panel of b
  /// One panel of `width` (panel_rows or panel_cols): element (i, p) of the source is
  /// `source[i * across + p * along]`, for i < n_valid <= width and p < k_size.
  void (*pack_panel)(int64_t width,
                     int64_t n_valid,
                     int64_t k_size,
                     const T* source,
                     int64_t across,
                     int64_t along,
                     T* panel) noexcept;
  /// c [rows x cols] = alpha a b + beta c for packed blocks a and b of the same k_size.
  void (*tile)(int64_t rows,
               int64_t cols,
               int64_t k_size,
               T alpha,
               const T* a_block,
               const T* b_block,
               T beta,
               T* c,
               int64_t c_stride) noexcept;
};

struct KernelTable {
  const char* name;
  GemmKernels<float> gemm_f32;
  GemmKernels<double> gemm_f64;
  SparseGemmKernels sparse_gemm;
  LinearKernels linear;
  OmpEntry<float> omp_f32;
  OmpEntry<double> omp_f64;
  DictionaryEntry<float> dictionary_f32;
  DictionaryEntry<double> dictionary_f64;
  SelectEntry<float> select_f32;
  SelectEntry<double> select_f64;
  RoundCodeEntry round_code;
  // entries are added here by each kernel family
};

const KernelTable& generic_table();
#ifdef COSPADI_X86
const KernelTable& avx2_table();
const KernelTable& avx512_table();
#endif

/// The table in use (see cospadi::isa_name()).
const KernelTable& kernels();

}  // namespace cospadi::cpu
