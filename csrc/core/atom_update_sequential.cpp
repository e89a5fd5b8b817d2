// Strictly sequential K-SVD sweep.
#include <algorithm>
#include <cmath>

#include "core/atom_update.hpp"
#include "core/parallel.hpp"

namespace cospadi::detail {
namespace {

// The sum over an atom's signals is always cut into the same parts, so that the thread count does
// not change the rounding.
constexpr int64_t kPartitions = 16;

// Below this many residual elements (about 100 us) a parallel region per step gains little on a
// quiet machine, and costs a scheduling slice on a busy one.
constexpr int64_t kParallelElements = int64_t{1} << 20;

template <class T>
T dot(const T* a, const T* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return static_cast<T>(sum);
}

}  // namespace

template <class T>
bool normalise(T* vector, int64_t n) {
  double energy = 0.0;
  for (int64_t j = 0; j < n; ++j) {
    energy += static_cast<double>(vector[j]) * static_cast<double>(vector[j]);
  }
  if (!(energy > 0.0) || !std::isfinite(energy)) return false;
  const double scale = 1.0 / std::sqrt(energy);
  for (int64_t j = 0; j < n; ++j) {
    vector[j] = static_cast<T>(static_cast<double>(vector[j]) * scale);
  }
  return true;
}

template <class T>
double distance(const T* a, const T* b, int64_t n) {
  double energy = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    energy += difference * difference;
  }
  return std::sqrt(energy);
}

template <class T>
SequentialSweep<T>::SequentialSweep(int64_t dim, const SupportIndex& support)
    : partial_(kPartitions * dim),
      direction_(dim),
      previous_(dim),
      old_coeffs_(support.largest_count()),
      new_coeffs_(support.largest_count()),
      bytes_(((kPartitions + 2) * dim + 2 * support.largest_count()) *
             static_cast<int64_t>(sizeof(T))) {}

template <class T>
void SequentialSweep<T>::run(const AtomUpdate<T>& update) const {
  for (int64_t atom = 0; atom < update.atoms.rows; ++atom) {
    if (update.support->count(atom) > 0) update_atom(update, atom);
  }
}

template <class T>
void SequentialSweep<T>::update_atom(const AtomUpdate<T>& update, int64_t atom) const {
  const int64_t dim = update.atoms.cols;
  const int64_t count = update.support->count(atom);
  const int64_t part = (count + kPartitions - 1) / kPartitions;
  const int n_threads = count * dim >= kParallelElements ? update.n_threads : 1;
  T* old_atom = update.atoms.row(atom);
  T* direction = direction_.data();
  T* previous = previous_.data();
  T* old_coeffs = old_coeffs_.data();
  T* new_coeffs = new_coeffs_.data();
  const auto rows_of = [&](int64_t partition) {
    const int64_t first = std::min(partition * part, count);
    return cpu::ResidualRows<T>{update.residual.data,
                                update.residual.stride,
                                dim,
                                update.support->rows(atom) + first,
                                std::min(part, count - first)};
  };
  update.gather_coeffs(atom, old_coeffs);
  std::copy_n(old_coeffs, count, new_coeffs);

  bool is_last = false;
  for (int iteration = 0; !is_last; ++iteration) {
    // E^T x = R^T x + <x_old, x> d_old, for the residual R that still holds the old pair.
    parallel_for(kPartitions, n_threads, [&](int64_t partition, int) {
      update.kernels->accumulate_rows(rows_of(partition),
                                      new_coeffs + std::min(partition * part, count),
                                      partial_.data() + partition * dim);
    });
    const T weight = dot(old_coeffs, new_coeffs, count);
    for (int64_t j = 0; j < dim; ++j) direction[j] = weight * old_atom[j];
    for (int64_t partition = 0; partition < kPartitions; ++partition) {
      const T* partial = partial_.data() + partition * dim;
      for (int64_t j = 0; j < dim; ++j) direction[j] += partial[j];
    }
    if (!normalise(direction, dim)) return;
    // The first alternation starts from the coefficients as they were, which need not be E d.
    is_last = iteration + 1 == update.max_iterations ||
              (update.tolerance > 0.0 && iteration > 0 &&
               distance(direction, previous, dim) < update.tolerance);
    std::copy_n(direction, dim, previous);
    const T offset = dot(old_atom, direction, dim);
    parallel_for(kPartitions, n_threads, [&](int64_t partition, int) {
      const int64_t first = std::min(partition * part, count);
      update.kernels->project_rows(rows_of(partition),
                                   direction,
                                   old_coeffs + first,
                                   offset,
                                   is_last ? old_atom : nullptr,
                                   new_coeffs + first);
    });
  }
  std::copy_n(direction, dim, old_atom);
  update.scatter_coeffs(atom, new_coeffs);
}

template bool normalise<float>(float*, int64_t);
template bool normalise<double>(double*, int64_t);
template double distance<float>(const float*, const float*, int64_t);
template double distance<double>(const double*, const double*, int64_t);
template class SequentialSweep<float>;
template class SequentialSweep<double>;

}  // namespace cospadi::detail
