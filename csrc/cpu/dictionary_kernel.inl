// Row operations of the atom update. All are bound by loads from L1 or L2, so they work on several
// rows at a time to load the shared vector once.

namespace dictionary {

inline constexpr int kRowsTogether = 8;     // accumulate: one load and store of the sum per 8 rows
inline constexpr int kDotsTogether = 4;     // project: four sums hide the latency
inline constexpr int kResidualVectors = 8;  // subtract: vectors of the residual kept in registers

template <class T, int V>
inline void subtract_columns(const T* signal,
                             const T* atoms,
                             int64_t atoms_stride,
                             const int32_t* indices,
                             const T* coeffs,
                             int64_t sparsity,
                             T* residual) {
  Vec<T> sum[V];
  for (int v = 0; v < V; ++v) sum[v] = load(signal + v * kWidth<T>);
  for (int64_t i = 0; i < sparsity; ++i) {
    const T* atom = atoms + indices[i] * atoms_stride;
    const Vec<T> weight = splat(coeffs[i]);
    for (int v = 0; v < V; ++v) sum[v] -= weight * load(atom + v * kWidth<T>);
  }
  for (int v = 0; v < V; ++v) store(residual + v * kWidth<T>, sum[v]);
}

template <class T>
void subtract_atoms(const T* signal,
                    const T* atoms,
                    int64_t atoms_stride,
                    const int32_t* indices,
                    const T* coeffs,
                    int64_t sparsity,
                    int64_t dim,
                    T* residual) noexcept {
  constexpr int64_t kStep = kResidualVectors * kWidth<T>;
  int64_t j = 0;
  for (; j + kStep <= dim; j += kStep) {
    subtract_columns<T, kResidualVectors>(
        signal + j, atoms + j, atoms_stride, indices, coeffs, sparsity, residual + j);
  }
  for (; j + kWidth<T> <= dim; j += kWidth<T>) {
    subtract_columns<T, 1>(
        signal + j, atoms + j, atoms_stride, indices, coeffs, sparsity, residual + j);
  }
  for (; j < dim; ++j) {
    T sum = signal[j];
    for (int64_t i = 0; i < sparsity; ++i) sum -= coeffs[i] * atoms[indices[i] * atoms_stride + j];
    residual[j] = sum;
  }
}

template <class T, int R>
inline void accumulate_group(const ResidualRows<T>& rows, int64_t first, const T* weights, T* out) {
  const T* source[R];
  Vec<T> weight[R];
  for (int r = 0; r < R; ++r) {
    source[r] = rows.residual + rows.rows[first + r] * rows.stride;
    weight[r] = splat(weights[first + r]);
  }
  int64_t j = 0;
  for (; j + kWidth<T> <= rows.dim; j += kWidth<T>) {
    Vec<T> sum = load(out + j);
    for (int r = 0; r < R; ++r) sum += weight[r] * load(source[r] + j);
    store(out + j, sum);
  }
  for (; j < rows.dim; ++j) {
    for (int r = 0; r < R; ++r) out[j] += weights[first + r] * source[r][j];
  }
}

template <class T>
void accumulate_rows(const ResidualRows<T>& rows, const T* weights, T* out) noexcept {
  for (int64_t j = 0; j < rows.dim; ++j) out[j] = T(0);
  int64_t i = 0;
  for (; i + kRowsTogether <= rows.n_rows; i += kRowsTogether) {
    accumulate_group<T, kRowsTogether>(rows, i, weights, out);
  }
  for (; i < rows.n_rows; ++i) accumulate_group<T, 1>(rows, i, weights, out);
}

template <class T>
inline T lane_sum(Vec<T> v) {
  T sum = T(0);
  for (int i = 0; i < kWidth<T>; ++i) sum += v[i];
  return sum;
}

template <class T, int R>
inline void project_group(const ResidualRows<T>& rows,
                          int64_t first,
                          const T* direction,
                          const T* old_coeffs,
                          T offset,
                          const T* old_atom,
                          T* projections) {
  T* row[R];
  Vec<T> dot[R];
  for (int r = 0; r < R; ++r) {
    row[r] = rows.residual + rows.rows[first + r] * rows.stride;
    dot[r] = Vec<T>{};
  }
  int64_t j = 0;
  for (; j + kWidth<T> <= rows.dim; j += kWidth<T>) {
    const Vec<T> d = load(direction + j);
    for (int r = 0; r < R; ++r) dot[r] += d * load(row[r] + j);
  }
  T tail[R] = {};
  for (; j < rows.dim; ++j) {
    for (int r = 0; r < R; ++r) tail[r] += direction[j] * row[r][j];
  }
  Vec<T> minus_new[R];
  Vec<T> old[R];
  for (int r = 0; r < R; ++r) {
    const T value = lane_sum<T>(dot[r]) + tail[r] + offset * old_coeffs[first + r];
    projections[first + r] = value;
    minus_new[r] = splat(-value);
    old[r] = splat(old_coeffs[first + r]);
  }
  if (old_atom == nullptr) return;
  for (j = 0; j + kWidth<T> <= rows.dim; j += kWidth<T>) {
    const Vec<T> d = load(direction + j);
    const Vec<T> d_old = load(old_atom + j);
    for (int r = 0; r < R; ++r) {
      store(row[r] + j, load(row[r] + j) + old[r] * d_old + minus_new[r] * d);
    }
  }
  for (; j < rows.dim; ++j) {
    for (int r = 0; r < R; ++r) {
      row[r][j] += old_coeffs[first + r] * old_atom[j] - projections[first + r] * direction[j];
    }
  }
}

template <class T>
void project_rows(const ResidualRows<T>& rows,
                  const T* direction,
                  const T* old_coeffs,
                  T offset,
                  const T* old_atom,
                  T* projections) noexcept {
  int64_t i = 0;
  for (; i + kDotsTogether <= rows.n_rows; i += kDotsTogether) {
    project_group<T, kDotsTogether>(rows, i, direction, old_coeffs, offset, old_atom, projections);
  }
  for (; i < rows.n_rows; ++i) {
    project_group<T, 1>(rows, i, direction, old_coeffs, offset, old_atom, projections);
  }
}

/// As many elements as a vector of doubles has, so that float rows can be widened.
template <class T>
struct NarrowOf {
  typedef T type
      __attribute__((vector_size(kWidth<double> * sizeof(T)), aligned(alignof(T)), may_alias));
};

template <class T>
double row_energy(const T* row, int64_t dim) noexcept {
  using Narrow = typename NarrowOf<T>::type;
  constexpr int64_t kLanes = kWidth<double>;
  constexpr int kChains = 4;
  Vec<double> sum[kChains] = {};
  const auto add = [&](int chain, int64_t j) {
    const Vec<double> x =
        __builtin_convertvector(*reinterpret_cast<const Narrow*>(row + j), Vec<double>);
    sum[chain] += x * x;
  };
  int64_t j = 0;
  for (; j + kChains * kLanes <= dim; j += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) add(chain, j + chain * kLanes);
  }
  for (; j + kLanes <= dim; j += kLanes) add(0, j);
  auto energy = lane_sum<double>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; j < dim; ++j) energy += static_cast<double>(row[j]) * static_cast<double>(row[j]);
  return energy;
}

template <class T>
DictionaryEntry<T> make_entry() {
  return {subtract_atoms<T>, accumulate_rows<T>, project_rows<T>, row_energy<T>};
}

}  // namespace dictionary
