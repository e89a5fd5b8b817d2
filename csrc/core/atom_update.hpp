// State shared by the sequential and the blocked atom update.
#pragma once

#include <cstdint>

#include "core/buffer.hpp"
#include "cospadi/dictionary.hpp"
#include "cospadi/matrix.hpp"
#include "cpu/dictionary_types.hpp"

namespace cospadi::detail {

/// Which signals use an atom, and where their coefficient is: the transpose of `indices`, built
/// once per call. Signals are ascending per atom.
class SupportIndex {
 public:
  SupportIndex(MatrixView<const int32_t> indices, int64_t n_atoms);

  int64_t count(int64_t atom) const { return starts_.data()[atom + 1] - starts_.data()[atom]; }
  const int32_t* rows(int64_t atom) const { return rows_.data() + starts_.data()[atom]; }
  const int32_t* positions(int64_t atom) const { return positions_.data() + starts_.data()[atom]; }
  int64_t largest_count() const { return largest_count_; }
  int64_t bytes() const { return bytes_; }

 private:
  AlignedBuffer<int64_t> starts_;     // [n_atoms + 1]
  AlignedBuffer<int32_t> rows_;       // [coefficients] signal
  AlignedBuffer<int32_t> positions_;  // [coefficients] position inside the signal's support
  int64_t largest_count_ = 0;
  int64_t bytes_ = 0;
};

/// Everything one call works on; the residual is `signals - X atoms`.
template <class T>
struct AtomUpdate {
  MatrixView<const T> signals;
  MatrixView<const int32_t> indices;
  MatrixView<T> atoms;
  MatrixView<T> coeffs;
  MatrixView<T> residual;
  const SupportIndex* support;
  const cpu::DictionaryEntry<T>* kernels;
  int max_iterations;
  /// An alternation that moves a unit atom by less is the last one; 0: all of them are done.
  double tolerance;
  int n_threads;

  void gather_coeffs(int64_t atom, T* out) const {
    const int32_t* rows = support->rows(atom);
    const int32_t* positions = support->positions(atom);
    for (int64_t i = 0; i < support->count(atom); ++i) out[i] = coeffs(rows[i], positions[i]);
  }
  void scatter_coeffs(int64_t atom, const T* values) const {
    const int32_t* rows = support->rows(atom);
    const int32_t* positions = support->positions(atom);
    for (int64_t i = 0; i < support->count(atom); ++i) coeffs(rows[i], positions[i]) = values[i];
  }
};

/// Squared norm of each row of the residual; returns their sum.
template <class T>
double residual_energies(const AtomUpdate<T>& update, double* energies);

/// Scales a vector to unit norm; false (and unchanged) if its norm is zero or not finite.
template <class T>
bool normalise(T* vector, int64_t n);

/// Distance |a - b|.
template <class T>
double distance(const T* a, const T* b, int64_t n);

/// Workspaces and one sweep of each variant.
template <class T>
class SequentialSweep {
 public:
  SequentialSweep(int64_t dim, const SupportIndex& support);
  void run(const AtomUpdate<T>& update) const;
  int64_t bytes() const { return bytes_; }

 private:
  void update_atom(const AtomUpdate<T>& update, int64_t atom) const;

  AlignedBuffer<T> partial_;     // [kPartitions x dim] sums of the partitions
  AlignedBuffer<T> direction_;   // [dim] new atom
  AlignedBuffer<T> previous_;    // [dim] that of the alternation before
  AlignedBuffer<T> old_coeffs_;  // [largest count]
  AlignedBuffer<T> new_coeffs_;  // [largest count]
  int64_t bytes_;
};

template <class T>
class BlockedSweep {
 public:
  BlockedSweep(int64_t n_signals, int64_t dim, int64_t block_size);
  /// `energy` is the objective of the residual; returns how many blocks had to be halved.
  int64_t run(const AtomUpdate<T>& update, double energy) const;
  int64_t bytes() const { return bytes_; }

 private:
  void load_block(const AtomUpdate<T>& update, int64_t first, int64_t size) const;
  void improve_block(const AtomUpdate<T>& update, int64_t first, int64_t size) const;
  bool is_last(const AtomUpdate<T>& update, int64_t size, int iteration) const;
  void store_block(const AtomUpdate<T>& update, int64_t first, int64_t size) const;

  MatrixView<T> codes(int64_t n, int64_t size) const { return {codes_.data(), n, 2 * size}; }
  MatrixView<T> old_codes(int64_t n, int64_t size) const {
    return {codes_.data(), n, size, 2 * size};
  }
  MatrixView<T> new_codes(int64_t n, int64_t size) const {
    return {codes_.data() + size, n, size, 2 * size};
  }
  MatrixView<T> directions(int64_t size, int64_t dim) const {
    return {directions_.data(), 2 * size, dim};
  }
  MatrixView<T> old_atoms(int64_t size, int64_t dim) const {
    return {directions_.data(), size, dim};
  }
  MatrixView<T> new_atoms(int64_t size, int64_t dim) const {
    return {directions_.data() + size * dim, size, dim};
  }

  int64_t block_size_;
  AlignedBuffer<T> codes_;             // [n_signals x 2 block] old coefficients, minus the new ones
  AlignedBuffer<T> directions_;        // [2 block x dim] old atoms, new atoms
  AlignedBuffer<T> previous_;          // [block x dim] new atoms of the alternation before
  AlignedBuffer<T> projections_;       // [n_signals x block]
  AlignedBuffer<double> changes_;      // [block] distance between the last two of them
  AlignedBuffer<uint8_t> is_updated_;  // [block]
  AlignedBuffer<double> energies_;     // [n_signals]
  int64_t bytes_;
};

}  // namespace cospadi::detail
