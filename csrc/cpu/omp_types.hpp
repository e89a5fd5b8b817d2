// What csrc/core hands to the OMP kernels; plain data only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cospadi::cpu {

/// One dictionary with its atoms scaled to unit norm, shared by all signals of a call.
template <class T>
struct OmpProblem {
  const T* gram;  // [n_atoms x gram_stride] unit diagonal (0 for a zero atom), padding zero
  int64_t gram_stride;
  const T* scales;  // [n_atoms] 1 / |d_j|, 0 for a zero atom
  int64_t n_atoms;
  int64_t sparsity;
  int64_t block_size;  // candidate rows per pass over the history
  T tolerance;         // an atom with |q_j|^2 <= tolerance is dependent
  bool is_ormp;
};

template <class T>
struct OmpSignal {
  const T* correlations;  // [n_atoms] D^T y
  int32_t* indices;       // [sparsity] out
  T* coeffs;              // [sparsity] out
  double explained;       // out: |D x|^2
  int64_t n_padded;       // out
  int64_t n_passes;       // out
  int64_t n_rows;         // out
};

template <class T>
struct OmpEntry {
  /// Row length that `gram` must be padded to.
  int64_t (*gram_stride)(int64_t n_atoms);
  /// Bytes of the arena of one thread.
  int64_t (*arena_bytes)(int64_t n_atoms, int64_t sparsity, int64_t block_size);
  int64_t default_block_size;
  void (*encode)(const OmpProblem<T>& problem, OmpSignal<T>& signal, std::byte* arena);
};

}  // namespace cospadi::cpu
