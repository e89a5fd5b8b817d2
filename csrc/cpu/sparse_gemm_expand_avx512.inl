// Expansion of one mask word by AVX-512 VBMI2 (see sparse_gemm_format.inl).

/// Columns in flight with kRows rows each: their sums, kRows x columns, fill half of the registers.
template <int kRows>
inline constexpr int kColumnsInFlight = kRows <= 4 ? 4 : 2;

/// Columns expanded together for more than one tile of rows (sparse_gemm_staged.inl): their sums
/// with eight rows leave a few registers free.
constexpr int kStagedColumns = 3;

/// Words of these columns expanded at a time, so that they and a tile's words of z stay in the
/// cache.
constexpr int64_t kStagedWords = 64;

constexpr int64_t kFewRows = 32;  // measured: from here on panels are faster
constexpr int64_t kByteRows =
    2;  // measured: with more, pairs of bfloat16 save more than a scratch costs

/// Rows of x that the dictionary is multiplied by as it is stored, at most: as many as have been
/// measured.
constexpr int64_t kFewDictionaryRows = 16;

/// Bytes of z that all columns are multiplied by before the next: no bound, smaller ones have not
/// been measured.
constexpr int64_t kDepthBytes = int64_t{1} << 40;

/// Two mask words of a column. Those that an expansion takes as masks are moved and shifted where
/// the masks are: a tenth less time than by way of the general registers (measured on Zen 4).
template <class C, bool kAllAtoms>
class WordPair {
 public:
  explicit WordPair(uint64_t bits) {
    if constexpr (kIsMask) {
      asm("kmovq %1, %0" : "=Yk"(bits_) : "r"(bits));
    } else {
      bits_ = bits;
    }
  }
  [[nodiscard]] uint32_t lower() const {
    return kAllAtoms ? ~uint32_t{0} : static_cast<uint32_t>(bits_);
  }
  [[nodiscard]] uint32_t upper() const {
    if constexpr (kAllAtoms) return ~uint32_t{0};
    if constexpr (!kIsMask) return static_cast<uint32_t>(bits_ >> 32);
    __mmask64 upper;
    asm("kshiftrq $32, %1, %0" : "=Yk"(upper) : "Yk"(bits_));
    return static_cast<uint32_t>(upper);
  }

 private:
  static constexpr bool kIsMask = !kAllAtoms && !std::is_same_v<C, float>;
  __mmask64 bits_;
};

/// Position, within its mask word, of element i of the expanded word. The two halves of a dword
/// hold neighbouring bfloat16: as floats they are one shift or one mask away, evens first.
template <class C>
constexpr int64_t position_of(int64_t i) {
  if constexpr (std::is_same_v<C, BFloat16>) {
    return i < 16 ? 2 * i : 2 * (i - 16) + 1;
  } else {
    return i;
  }
}

// The expansions are written out because of the register they write to: with a zeroing mask Zen
// 4 still waits for its old value, and compilers use few registers here (6.5 instead of 4.1 cycles
// per word measured). A register that the zero idiom has just cleared waits for nothing. A constant
// of ones (full support) is a plain load.

inline __m512i expand_words(uint32_t bits, const void* p) {
  if (__builtin_constant_p(bits) && bits == ~uint32_t{0}) return _mm512_loadu_si512(p);
  __m512i words = _mm512_setzero_si512();
  asm("vpexpandw %1, %0%{%2%}"
      : "+v"(words)
      : "v"(_mm512_loadu_si512(p)), "Yk"(static_cast<__mmask32>(bits)));
  return words;
}

inline Vec<float> expand_floats(uint32_t bits, const float* p) {
  if (__builtin_constant_p(bits) && bits == 0xffffU) return load(p);
  __m512 floats = _mm512_setzero_ps();
  asm("vexpandps %1, %0%{%2%}"
      : "+v"(floats)
      : "v"(_mm512_loadu_ps(p)), "Yk"(static_cast<__mmask16>(bits)));
  return reinterpret_cast<Vec<float>>(floats);
}

inline __m256i expand_bytes(uint32_t bits, const Int8* p) {
  if (__builtin_constant_p(bits) && bits == ~uint32_t{0}) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  __m256i bytes = _mm256_setzero_si256();
  asm("vpexpandb %1, %0%{%2%}"
      : "+v"(bytes)
      : "v"(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
        "Yk"(static_cast<__mmask32>(bits)));
  return bytes;
}

template <class C>
struct ExpandedFloats;

template <>
struct ExpandedFloats<BFloat16> {
  __m512i words;

  ExpandedFloats(uint32_t bits, const BFloat16* p) : words(expand_words(bits, p)) {}
  explicit ExpandedFloats(__m512i words_) : words(words_) {}
  Vec<float> part(int i) const {
    const __m512i odd_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return reinterpret_cast<Vec<float>>(i == 0 ? _mm512_slli_epi32(words, 16)
                                               : _mm512_and_si512(words, odd_half));
  }
};

template <>
struct ExpandedFloats<Float16> {
  __m512i words;

  ExpandedFloats(uint32_t bits, const Float16* p) : words(expand_words(bits, p)) {}
  Vec<float> part(int i) const {
    return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(
        i == 0 ? _mm512_castsi512_si256(words) : _mm512_extracti64x4_epi64(words, 1)));
  }
};

template <>
struct ExpandedFloats<Int8> {
  __m256i bytes;

  ExpandedFloats(uint32_t bits, const Int8* p) : bytes(expand_bytes(bits, p)) {}
  Vec<float> part(int i) const {
    const __m128i half =
        i == 0 ? _mm256_castsi256_si128(bytes) : _mm256_extracti128_si256(bytes, 1);
    return reinterpret_cast<Vec<float>>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(half)));
  }
};

template <>
struct ExpandedFloats<float> {
  uint32_t bits;
  const float* p;

  ExpandedFloats(uint32_t bits_, const float* p_) : bits(bits_), p(p_) {}
  Vec<float> part(int i) const {
    if (i == 0) return expand_floats(bits & 0xffffU, p);
    // at most 16 bits are set below, so that 16 more stay within the 32 readable from p
    return expand_floats(bits >> 16, p + __builtin_popcount(bits & 0xffffU));
  }
};

inline float sum_lanes(Vec<float> v) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v)); }

/// out[i] = sum_lanes(v[i]) for four vectors, each sum in the same order.
inline void sum_lanes_of_four(const Vec<float>* v, float* out) {
  __m128 quarter[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto whole = reinterpret_cast<__m512>(v[i]);
    const __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
    quarter[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  // lanes 0 + 2 and 1 + 3 of two vectors each
  const __m128 first =
      _mm_add_ps(_mm_movelh_ps(quarter[0], quarter[1]), _mm_movehl_ps(quarter[1], quarter[0]));
  const __m128 second =
      _mm_add_ps(_mm_movelh_ps(quarter[2], quarter[3]), _mm_movehl_ps(quarter[3], quarter[2]));
  _mm_storeu_ps(out,
                _mm_add_ps(_mm_shuffle_ps(first, second, _MM_SHUFFLE(2, 0, 2, 0)),
                           _mm_shuffle_ps(first, second, _MM_SHUFFLE(3, 1, 3, 1))));
}
