// SIMD vectors by the compiler's vector extension: one source for every instruction set.
//
// Included inside the per-ISA namespace of a target_*.cpp, which sets COSPADI_VECTOR_BYTES. No
// include guard and no system headers on purpose: each target gets its own copy in its own
// namespace.

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(COSPADI_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int kLanes = COSPADI_VECTOR_BYTES / static_cast<int>(sizeof(T));
};

/// Vector of T; loads and stores through it need only the alignment of T.
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
inline constexpr int kWidth = VecOf<T>::kLanes;

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
