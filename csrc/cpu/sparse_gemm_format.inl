// The forms in which the column-sparse GEMM consumes one mask word of z and of S.
//
// Included inside the per-ISA namespace of a target_*.cpp, after sparse_gemm_expand_*.inl, which
// gives `ExpandedFloats<C>(bits, p)`: the 32 positions of one mask word as float vectors, zero
// where the bit is 0; `position_of<C>`: the position that each of their lanes holds; `sum_lanes`.
//
// A Format names the stored coefficient type, the element of prepared z and of packed panels, the
// expansion of a word and the multiply-add of a vector of elements.

inline int64_t word_count(int64_t n_atoms) { return (n_atoms + kMaskWord - 1) / kMaskWord; }

/// Everything as floats.
template <class C>
struct FloatFormat {
  using Coeff = C;
  using Element = float;
  using Expanded = ExpandedFloats<C>;
  static constexpr int kWordElements = kMaskWord;

  /// One word of one row of z: n_valid positions from `source` on, zeros after them.
  static void load_word(DType z_dtype, int64_t n_valid, const void* source, Element* out) {
    float positions[kMaskWord] = {};
    load_floats(z_dtype, n_valid, source, positions);
    for (int64_t i = 0; i < kMaskWord; ++i) out[i] = positions[position_of<C>(i)];
  }
  static Vec<float> multiply_add(Vec<float> sum, const Element* z, Vec<float> part) {
    return sum + load(z) * part;
  }
};

#if defined(COSPADI_TARGET_AVX512)

struct BFloat16Pair {
  uint32_t bits;
};

/// Pairs of bfloat16, when z and the coefficients are both bfloat16: one instruction multiplies a
/// whole word, and the products are exact in float.
struct PairFormat {
  using Coeff = BFloat16;
  using Element = BFloat16Pair;
  static constexpr int kWordElements = kMaskWord / 2;

  struct Expanded {
    __m512i words;
    Expanded(uint32_t bits, const BFloat16* p) : words(expand_words(bits, p)) {}
    Vec<float> part(int) const { return reinterpret_cast<Vec<float>>(words); }
  };

  static void load_word(DType, int64_t n_valid, const void* source, Element* out) {
    if (n_valid < kMaskWord) std::fill_n(out, kWordElements, Element{0});
    std::memcpy(out, source, static_cast<size_t>(n_valid) * sizeof(BFloat16));
  }
  static Vec<float> multiply_add(Vec<float> sum, const Element* z, Vec<float> part) {
    return reinterpret_cast<Vec<float>>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                         reinterpret_cast<__m512bh>(_mm512_loadu_si512(z)),
                         reinterpret_cast<__m512bh>(part)));
  }
};

template <>
struct TileMath<BFloat16Pair> {
  using Sum = float;
  using Columns = __m512bh;
  static Columns load_columns(const BFloat16Pair* b) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
  }
  static Vec<float> multiply_add(Vec<float> sum, const BFloat16Pair* a, Columns b) {
    return reinterpret_cast<Vec<float>>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                         reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a->bits))),
                         b));
  }
};

#endif

/// Calls `body` with the format of a product of these types.
template <class Body>
inline auto with_format([[maybe_unused]] DType z_dtype, CoeffType type, const Body& body) {
#if defined(COSPADI_TARGET_AVX512)
  if (z_dtype == DType::kBFloat16 && type == CoeffType::kBFloat16) return body(PairFormat{});
#endif
  switch (type) {
    case CoeffType::kBFloat16:
      return body(FloatFormat<BFloat16>{});
    case CoeffType::kFloat16:
      return body(FloatFormat<Float16>{});
    case CoeffType::kInt8:
      return body(FloatFormat<Int8>{});
    case CoeffType::kFloat32:
      break;
  }
  return body(FloatFormat<float>{});
}

/// Calls `body` with a constant: whether every column uses every atom.
template <class Body>
inline auto with_support(const SparseColumns& s, const Body& body) {
  return s.mask == nullptr ? body(std::true_type{}) : body(std::false_type{});
}

/// Mask row of a column; null where all atoms are used.
inline const uint8_t* mask_row(const SparseColumns& s, int64_t column) {
  return s.mask == nullptr ? nullptr : s.mask + column * s.mask_stride;
}

template <bool kAllAtoms>
inline uint32_t full_word(const uint8_t* row, int64_t word) {
  if constexpr (kAllAtoms) return ~uint32_t{0};
  uint32_t bits;
  std::memcpy(&bits, row + 4 * word, sizeof(bits));
  return bits;
}

/// Words `word` (in the lower half) and word + 1.
template <bool kAllAtoms>
inline uint64_t full_word_pair(const uint8_t* row, int64_t word) {
  if constexpr (kAllAtoms) return ~uint64_t{0};
  uint64_t bits;
  std::memcpy(&bits, row + 4 * word, sizeof(bits));
  return bits;
}

/// The last, partial word: only the row's own bytes are read, bits at and above n_atoms cleared.
template <bool kAllAtoms>
inline uint32_t tail_word(const uint8_t* row, int64_t n_atoms) {
  const int64_t first_byte = n_atoms / kMaskWord * 4;
  const int64_t n_bits = n_atoms % kMaskWord;
  const int64_t n_bytes = (n_bits + 7) / 8;
  uint32_t bits = kAllAtoms ? ~uint32_t{0} : 0;
  if (!kAllAtoms && first_byte >= 4) {  // the row's last four bytes
    std::memcpy(&bits, row + first_byte + n_bytes - 4, sizeof(bits));
    bits >>= 8 * (4 - n_bytes);
  } else {
    for (int64_t byte = 0; !kAllAtoms && byte < n_bytes; ++byte) {
      bits |= static_cast<uint32_t>(row[first_byte + byte]) << (8 * byte);
    }
  }
  return bits & ((uint32_t{1} << n_bits) - 1);
}

/// 32 readable coefficients from `p` on: `p` itself, or near the end of the tensor a copy in
/// `local`.
template <class C>
inline const C* readable(const C* p, const C* end, C* local) {
  const int64_t n_left = end - p;
  if (n_left >= kMaskWord) return p;
  for (int64_t i = 0; i < kMaskWord; ++i) local[i] = i < n_left ? p[i] : C{};
  return local;
}

template <class C>
inline const C* column_coeffs(const SparseColumns& s, int64_t column) {
  return static_cast<const C*>(s.coeffs) + column * s.coeffs_stride;
}

/// Whether every read of this column stays inside the tensor even if all its mask bits are set.
template <class C>
inline bool is_inside(const SparseColumns& s, int64_t column) {
  return static_cast<const C*>(s.coeffs_end) - column_coeffs<C>(s, column) >=
         word_count(s.n_atoms) * kMaskWord;
}

inline const void* stored_element(const StoredRows& z, int64_t row, int64_t col) {
  return static_cast<const char*>(z.data) + (row * z.stride + col) * dtype_bytes(z.dtype);
}

/// Positions of mask word `word` that exist: 32, fewer in the last one.
inline int64_t word_positions(int64_t n_atoms, int64_t word) {
  return std::min(kMaskWord, n_atoms - word * kMaskWord);
}
