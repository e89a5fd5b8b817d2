// Block Jacobi sweep: all atoms of a block are updated against the same residual, so the whole work
// is dense products. The zeros of X are multiplied: at half density dense is faster than gathers.
//
// Atoms of a block that overlap strongly correct the same residual several times over. On whitened
// weights this never raised the objective; on unstructured signals with few atoms it does. A block
// that raises it is therefore undone and tried again at half the size, down to a single atom, which
// is the sequential method: the objective does not increase in any case.
#include <algorithm>
#include <cstdint>

#include "core/atom_update.hpp"
#include "core/gemm.hpp"
#include "core/parallel.hpp"

namespace cospadi::detail {
namespace {

// After a halving the size grows again once this many blocks in a row were accepted.
constexpr int kAcceptedToGrow = 4;

// Relative rise of the objective that counts as rounding.
template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 1e-6 : 1e-13;

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

}  // namespace

template <class T>
BlockedSweep<T>::BlockedSweep(int64_t n_signals, int64_t dim, int64_t block_size)
    : block_size_(block_size),
      codes_(n_signals * 2 * block_size),
      directions_(2 * block_size * dim),
      previous_(block_size * dim),
      projections_(n_signals * block_size),
      changes_(block_size),
      is_updated_(block_size),
      energies_(n_signals),
      bytes_((3 * n_signals + 3 * dim) * block_size * static_cast<int64_t>(sizeof(T)) + block_size +
             (n_signals + block_size) * static_cast<int64_t>(sizeof(double))) {}

template <class T>
int64_t BlockedSweep<T>::run(const AtomUpdate<T>& update, double energy) const {
  const int64_t n = update.residual.rows;
  const int64_t dim = update.residual.cols;
  int64_t n_halved = 0;
  int64_t limit = block_size_;
  int n_accepted = 0;
  for (int64_t first = 0; first < update.atoms.rows;) {
    const int64_t size = std::min(limit, update.atoms.rows - first);
    load_block(update, first, size);
    improve_block(update, first, size);
    // R += X_old D_old - X_new D_new in one product; the new coefficients carry the minus sign.
    gemm(T(1), codes(n, size), directions(size, dim), T(1), update.residual, update.n_threads);
    const double new_energy = residual_energies(update, energies_.data());
    if (size > 1 && !(new_energy <= energy * (1.0 + kRounding<T>))) {
      gemm(T(-1), codes(n, size), directions(size, dim), T(1), update.residual, update.n_threads);
      limit = size / 2;
      n_accepted = 0;
      ++n_halved;
      continue;
    }
    store_block(update, first, size);
    energy = new_energy;
    first += size;
    if (++n_accepted >= kAcceptedToGrow && limit < block_size_) {
      limit = std::min(2 * limit, block_size_);
      n_accepted = 0;
    }
  }
  return n_halved;
}

/// Old atoms, and the block's coefficients as dense columns, once as the old and once as the new
/// ones.
template <class T>
void BlockedSweep<T>::load_block(const AtomUpdate<T>& update, int64_t first, int64_t size) const {
  const int64_t n = update.residual.rows;
  const int64_t dim = update.residual.cols;
  const MatrixView<T> old_x = old_codes(n, size);
  const MatrixView<T> new_x = new_codes(n, size);
  std::fill_n(codes_.data(), n * 2 * size, T(0));
  parallel_for(size, update.n_threads, [&](int64_t j, int) {
    std::copy_n(update.atoms.row(first + j), dim, old_atoms(size, dim).row(j));
    const int32_t* rows = update.support->rows(first + j);
    const int32_t* positions = update.support->positions(first + j);
    for (int64_t i = 0; i < update.support->count(first + j); ++i) {
      old_x(rows[i], j) = new_x(rows[i], j) = update.coeffs(rows[i], positions[i]);
    }
  });
}

/// Whether the alternation whose atoms have just been computed is the last one: atoms of a block go
/// on together until all of them have converged.
template <class T>
bool BlockedSweep<T>::is_last(const AtomUpdate<T>& update, int64_t size, int iteration) const {
  if (iteration + 1 == update.max_iterations) return true;
  // The first alternation starts from the coefficients as they were, which need not be E d.
  if (update.tolerance == 0.0 || iteration == 0) return false;
  return *std::max_element(changes_.data(), changes_.data() + size) < update.tolerance;
}

/// The power iterations; leaves minus the new coefficients in `new_codes`.
template <class T>
void BlockedSweep<T>::improve_block(const AtomUpdate<T>& update,
                                    int64_t first,
                                    int64_t size) const {
  const int64_t n = update.residual.rows;
  const int64_t dim = update.residual.cols;
  const int n_threads = update.n_threads;
  const MatrixView<T> old_x = old_codes(n, size);
  const MatrixView<T> new_x = new_codes(n, size);
  const MatrixView<T> old_d = old_atoms(size, dim);
  const MatrixView<T> new_d = new_atoms(size, dim);
  const MatrixView<T> projections(projections_.data(), n, size);
  uint8_t* is_updated = is_updated_.data();
  bool is_done = false;
  for (int iteration = 0; !is_done; ++iteration) {
    // E_j^T x_j = R^T x_j + <x_old, x_j> d_old for every atom of the block.
    gemm(T(1), StridedView<const T>(new_x).transposed(), update.residual, T(0), new_d, n_threads);
    parallel_for(size, n_threads, [&](int64_t j, int) {
      double weight = 0.0;
      const int32_t* rows = update.support->rows(first + j);
      for (int64_t i = 0; i < update.support->count(first + j); ++i) {
        weight += static_cast<double>(old_x(rows[i], j)) * static_cast<double>(new_x(rows[i], j));
      }
      T* direction = new_d.row(j);
      for (int64_t c = 0; c < dim; ++c) direction[c] += static_cast<T>(weight) * old_d(j, c);
      is_updated[j] = normalise(direction, dim) ? 1 : 0;
      if (is_updated[j] == 0) std::copy_n(old_d.row(j), dim, direction);
      T* previous = previous_.data() + j * dim;
      if (iteration > 0) changes_.data()[j] = distance(direction, previous, dim);
      std::copy_n(direction, dim, previous);
    });
    is_done = is_last(update, size, iteration);
    gemm(T(1),
         update.residual,
         StridedView<const T>(new_d).transposed(),
         T(0),
         projections,
         n_threads);
    const T sign = is_done ? T(-1) : T(1);
    parallel_for(size, n_threads, [&](int64_t j, int) {
      const T offset = static_cast<T>(dot(old_d.row(j), new_d.row(j), dim));
      const int32_t* rows = update.support->rows(first + j);
      for (int64_t i = 0; i < update.support->count(first + j); ++i) {
        const T old_value = old_x(rows[i], j);
        const T value =
            is_updated[j] != 0 ? projections(rows[i], j) + offset * old_value : old_value;
        new_x(rows[i], j) = sign * value;
      }
    });
  }
}

template <class T>
void BlockedSweep<T>::store_block(const AtomUpdate<T>& update, int64_t first, int64_t size) const {
  const MatrixView<T> new_x = new_codes(update.residual.rows, size);
  const MatrixView<T> new_d = new_atoms(size, update.residual.cols);
  parallel_for(size, update.n_threads, [&](int64_t j, int) {
    std::copy_n(new_d.row(j), new_d.cols, update.atoms.row(first + j));
    const int32_t* rows = update.support->rows(first + j);
    const int32_t* positions = update.support->positions(first + j);
    for (int64_t i = 0; i < update.support->count(first + j); ++i) {
      update.coeffs(rows[i], positions[i]) = -new_x(rows[i], j);
    }
  });
}

template class BlockedSweep<float>;
template class BlockedSweep<double>;

}  // namespace cospadi::detail
