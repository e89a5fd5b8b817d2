// Expansion of one mask word by table look-up (see sparse_gemm_format.inl).

/// Columns in flight with kRows rows each: their sums, kRows x columns, fill half of the registers.
template <int kRows>
inline constexpr int kColumnsInFlight = kRows <= 2 ? 4 : (kRows <= 4 ? 2 : 1);

/// Columns expanded together for more than one tile of rows; 0: every tile expands its own, which
/// is faster (measured), since with eight rows there are registers for one column alone.
constexpr int kStagedColumns = 0;
constexpr int64_t kStagedWords = 1;

constexpr int64_t kFewRows = 32;         // measured: from here on panels are faster
constexpr int64_t kByteRows = kFewRows;  // the product is in float either way

/// Rows of x that the dictionary is multiplied by as it is stored, at most; measured: laying it out
/// atom by atom costs more.
constexpr int64_t kFewDictionaryRows = 32;

/// Bytes of z that all columns are multiplied by before the next: half of the L1 cache.
constexpr int64_t kDepthBytes = 16384;

/// Two mask words of a column.
template <class C, bool kAllAtoms>
class WordPair {
 public:
  explicit WordPair(uint64_t bits) : bits_(bits) {}
  [[nodiscard]] uint32_t lower() const {
    return kAllAtoms ? ~uint32_t{0} : static_cast<uint32_t>(bits_);
  }
  [[nodiscard]] uint32_t upper() const {
    return kAllAtoms ? ~uint32_t{0} : static_cast<uint32_t>(bits_ >> 32);
  }

 private:
  uint64_t bits_;
};

/// Position, within its mask word, of element i of the expanded word.
template <class C>
constexpr int64_t position_of(int64_t i) {
  return i;
}

/// For each byte of a mask: where each of its 8 positions finds its coefficient.
struct ExpandTables {
  // pshufb controls for a vector whose halves hold the same coefficients; 0x80 gives zero
  alignas(64) uint8_t top_words[256][32];  // 16-bit coefficients as the upper halves of floats
  alignas(64) uint8_t top_bytes[256][32];  // bytes as the topmost ones of integers
  alignas(64) uint8_t words[256][16];      // 16-bit coefficients, side by side
  alignas(64) uint8_t lanes[256][8];       // vpermps index; 0xff in unused positions
};

constexpr ExpandTables make_expand_tables() {
  ExpandTables tables{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int64_t i = 0; i < 8; ++i) {
      const bool used = ((bits >> i) & 1) != 0;
      for (int64_t k = 0; k < 4; ++k) {
        tables.top_words[bits][4 * i + k] =
            static_cast<uint8_t>(used && k >= 2 ? 2 * next + k - 2 : 0x80);
        tables.top_bytes[bits][4 * i + k] = static_cast<uint8_t>(used && k == 3 ? next : 0x80);
      }
      tables.words[bits][2 * i] = static_cast<uint8_t>(used ? 2 * next : 0x80);
      tables.words[bits][2 * i + 1] = static_cast<uint8_t>(used ? 2 * next + 1 : 0x80);
      tables.lanes[bits][i] = static_cast<uint8_t>(used ? next : 0xff);
      next += used ? 1 : 0;
    }
  }
  return tables;
}

constexpr ExpandTables kExpandTables = make_expand_tables();

/// Both halves of `halves` shuffled alike or not, as the control says.
inline __m256i shuffle(__m256i halves, const uint8_t (&control)[32]) {
  return _mm256_shuffle_epi8(halves, _mm256_load_si256(reinterpret_cast<const __m256i*>(control)));
}

inline __m256 expand_byte(uint32_t byte, const BFloat16* p) {
  if (__builtin_constant_p(byte) && byte == 0xffU) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i twice = _mm256_broadcastsi128_si256(words);
  return _mm256_castsi256_ps(shuffle(twice, kExpandTables.top_words[byte]));
}

inline __m256 expand_byte(uint32_t byte, const Float16* p) {
  __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (!(__builtin_constant_p(byte) && byte == 0xffU)) {
    const auto* const control = reinterpret_cast<const __m128i*>(kExpandTables.words[byte]);
    words = _mm_shuffle_epi8(words, _mm_load_si128(control));
  }
  return _mm256_cvtph_ps(words);
}

inline __m256 expand_byte(uint32_t byte, const float* p) {
  if (__builtin_constant_p(byte) && byte == 0xffU) return _mm256_loadu_ps(p);
  const __m256i index = _mm256_cvtepi8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTables.lanes[byte])));
  const __m256 values = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), values);
}

inline __m256 expand_byte(uint32_t byte, const Int8* p) {
  if (__builtin_constant_p(byte) && byte == 0xffU) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  int64_t bytes;  // no more than the eight: what follows may not be readable
  std::memcpy(&bytes, p, sizeof(bytes));
  const __m256i top = shuffle(_mm256_set1_epi64x(bytes), kExpandTables.top_bytes[byte]);
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
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

/// out[i] = sum_lanes(v[i]) for four vectors.
inline void sum_lanes_of_four(const Vec<float>* v, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes(v[i]);
}
