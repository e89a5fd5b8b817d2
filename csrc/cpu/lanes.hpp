// Lane masks and compression: the two things the vector extension cannot say.
//
// Included like vec.hpp, inside the namespace of a target.

/// Bit i is set iff lane i of a comparison result is true.
template <class M>
inline uint32_t lane_mask(M comparison) {
#if defined(COSPADI_TARGET_AVX512)
  if constexpr (sizeof(comparison[0]) == 4) {
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(comparison));
  } else {
    return _mm512_movepi64_mask(reinterpret_cast<__m512i>(comparison));
  }
#elif defined(COSPADI_TARGET_AVX2)
  if constexpr (sizeof(comparison[0]) == 4) {
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(comparison)));
  } else {
    return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(comparison)));
  }
#else
  uint32_t mask = 0;
  constexpr int kLanes = static_cast<int>(sizeof(M) / sizeof(comparison[0]));
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(comparison[i] & 1) << i;
  return mask;
#endif
}

/// Lane numbers for `pick`, as wide as T.
template <class T>
using LaneIndex = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

/// Lane i of the result is lane `from[i]` of a, or lane `from[i] - kWidth<T>` of b.
template <class T>
inline Vec<T> pick(Vec<T> a, Vec<T> b, const LaneIndex<T>* from) {
#if defined(COSPADI_TARGET_AVX512)
  const __m512i lanes = _mm512_loadu_si512(from);
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(
        _mm512_permutex2var_ps(reinterpret_cast<__m512>(a), lanes, reinterpret_cast<__m512>(b)));
  } else {
    return reinterpret_cast<Vec<T>>(
        _mm512_permutex2var_pd(reinterpret_cast<__m512d>(a), lanes, reinterpret_cast<__m512d>(b)));
  }
#else
  Vec<T> both[2] = {a, b};
  const T* lanes = reinterpret_cast<const T*>(both);
  Vec<T> result{};
  for (int i = 0; i < kWidth<T>; ++i) result[i] = lanes[from[i]];
  return result;
#endif
}

/// Writes the lanes of `v` named by `mask` contiguously at `out`; may write one whole vector.
template <class T>
inline void compress_store(T* out, Vec<T> v, uint32_t mask) {
#if defined(COSPADI_TARGET_AVX512)
  // The register form: compressing straight to memory is microcoded on Zen 4.
  if constexpr (sizeof(T) == 4) {
    const __m512 packed =
        _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), reinterpret_cast<__m512>(v));
    _mm512_storeu_ps(out, packed);
  } else {
    const __m512d packed =
        _mm512_maskz_compress_pd(static_cast<__mmask8>(mask), reinterpret_cast<__m512d>(v));
    _mm512_storeu_pd(out, packed);
  }
#elif defined(COSPADI_TARGET_AVX2)
  // pext of the identity permutation's bytes gives the source lanes, one byte each.
  uint64_t lanes = 0;
  if constexpr (sizeof(T) == 4) {
    const uint64_t bytes = _pdep_u64(mask, 0x0101010101010101U) * 0xFF;
    lanes = _pext_u64(0x0706050403020100U, bytes);
  } else {
    const uint64_t bytes = _pdep_u64(mask, 0x0001000100010001U) * 0xFFFF;
    lanes = _pext_u64(0x0706050403020100U, bytes);
  }
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes)));
  _mm256_storeu_ps(reinterpret_cast<float*>(out),
                   _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(v), order));
#else
  for (; mask != 0; mask &= mask - 1) *out++ = v[__builtin_ctz(mask)];
#endif
}
