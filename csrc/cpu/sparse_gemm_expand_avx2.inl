// Expansion of one mask word by table look-up (see sparse_gemm_format.inl).

/// Columns in flight with kRows rows each; measured: spilling some of 8 x 2 sums costs less than
/// expanding for one column at a time.
template <int kRows>
inline constexpr int kColumnsInFlight = kRows <= 4 ? 4 : 2;

constexpr int64_t kFewRows = 8;          // measured: from here on panels are faster
constexpr int64_t kByteRows = kFewRows;  // the product is in float either way

/// Position, within its mask word, of element i of the expanded word.
template <class C>
constexpr int64_t position_of(int64_t i) {
  return i;
}

/// For each byte of a mask: where each of its 8 positions finds its coefficient.
struct ExpandTables {
  alignas(64) uint8_t words[256][16];  // pshufb control for 16-bit coefficients; 0x80 gives zero
  alignas(64) uint8_t lanes[256][8];   // vpermps index for floats, pshufb control for bytes; 0xff
                                       // in unused positions
};

constexpr ExpandTables make_expand_tables() {
  ExpandTables tables{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int64_t i = 0; i < 8; ++i) {
      const bool used = ((bits >> i) & 1) != 0;
      tables.words[bits][2 * i] = static_cast<uint8_t>(used ? 2 * next : 0x80);
      tables.words[bits][2 * i + 1] = static_cast<uint8_t>(used ? 2 * next + 1 : 0x80);
      tables.lanes[bits][i] = static_cast<uint8_t>(used ? next : 0xff);
      next += used ? 1 : 0;
    }
  }
  return tables;
}

constexpr ExpandTables kExpandTables = make_expand_tables();

inline __m128i expand_words(uint32_t byte, const void* p) {
  const __m128i control =
      _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandTables.words[byte]));
  return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(p)), control);
}

inline __m256 expand_byte(uint32_t byte, const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(expand_words(byte, p)), 16));
}

inline __m256 expand_byte(uint32_t byte, const Float16* p) {
  return _mm256_cvtph_ps(expand_words(byte, p));
}

inline __m256 expand_byte(uint32_t byte, const float* p) {
  const __m256i index = _mm256_cvtepi8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTables.lanes[byte])));
  const __m256 values = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), values);
}

inline __m256 expand_byte(uint32_t byte, const Int8* p) {
  const __m128i control =
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTables.lanes[byte]));
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(bytes, control)));
}

template <class C>
struct ExpandedFloats {
  uint32_t bits;
  const C* p;

  ExpandedFloats(uint32_t bits_, const C* p_) : bits(bits_), p(p_) {}
  Vec<float> part(int i) const {
    // at most 8 i bits are set below byte i, so that 8 more stay within the 32 readable from p
    const uint32_t below = bits & ((uint32_t{1} << (8 * i)) - 1);
    const uint32_t byte = (bits >> (8 * i)) & 0xffU;
    return reinterpret_cast<Vec<float>>(expand_byte(byte, p + __builtin_popcount(below)));
  }
};

inline float sum_lanes(Vec<float> v) {
  const auto all = reinterpret_cast<__m256>(v);
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
