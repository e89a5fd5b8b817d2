// Expansion of one mask word without special instructions (see sparse_gemm_format.inl).

/// Columns in flight: the expansion is the work here, more columns would not hide anything.
template <int kRows>
inline constexpr int kColumnsInFlight = 1;

/// Columns expanded together for more than one tile of rows; 0: every tile expands its own.
constexpr int kStagedColumns = 0;
constexpr int64_t kStagedWords = 1;

constexpr int64_t kFewRows = 8;          // measured: from here on panels are faster
constexpr int64_t kByteRows = kFewRows;  // the product is in float either way

/// Rows of x that the dictionary is multiplied by as it is stored, at most; not measured.
constexpr int64_t kFewDictionaryRows = 16;

/// Bytes of z that all columns are multiplied by before the next: no bound, the expansion is the
/// work here.
constexpr int64_t kDepthBytes = int64_t{1} << 40;

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

template <class C>
struct ExpandedFloats {
  Vec<float> parts[kMaskWord / kWidth<float>];

  // Without branches: which positions are used is random, and a missed branch costs more than the
  // unused half of the work.
  ExpandedFloats(uint32_t bits, const C* p) {
    float values[kMaskWord];
#pragma GCC unroll 32
    for (int i = 0; i < kMaskWord; ++i) {
      const uint32_t used = (bits >> i) & 1U;
      values[i] = bits_float(float_bits(to_float(*p)) & (0U - used));
      p += used;
    }
    std::memcpy(parts, values, sizeof(parts));
  }
  Vec<float> part(int i) const { return parts[i]; }
};

inline float sum_lanes(Vec<float> v) { return (v[0] + v[1]) + (v[2] + v[3]); }

/// out[i] = sum_lanes(v[i]) for four vectors.
inline void sum_lanes_of_four(const Vec<float>* v, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes(v[i]);
}
