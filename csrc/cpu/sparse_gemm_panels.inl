// Column-sparse GEMM for many rows: columns of S expanded into packed panels of the dense GEMM.
//
// Both operands use the order of the Format inside a mask word, so only the order of a sum changes.

/// Lanes kOffset, kOffset + 1, ... of a and b in turn, half a vector of each.
template <int kOffset>
inline Vec<float> interleave(Vec<float> a, Vec<float> b) {
  constexpr int kW = kWidth<float>;
#if defined(__GNUC__) && !defined(__clang__)
  typedef int32_t Order __attribute__((vector_size(COSPADI_VECTOR_BYTES)));
  Order order;
  for (int i = 0; i < kW; ++i) order[i] = kOffset + i / 2 + (i % 2) * kW;
  return __builtin_shuffle(a, b, order);
#else
  Vec<float> result;
  for (int i = 0; i < kW; ++i) result[i] = i % 2 == 0 ? a[kOffset + i / 2] : b[kOffset + i / 2];
  return result;
#endif
}

/// Transposes the kW x kW block whose rows are `rows[i]`; calls `put(i, row i of the transpose)`.
///
/// log2(kW) rounds; each interleaves the first half of the vectors with the second.
template <class Put>
inline void transpose(Vec<float>* rows, const Put& put) {
  constexpr int kW = kWidth<float>;
#pragma GCC unroll 4
  for (int round = 1; round < kW; round *= 2) {
    Vec<float> next[kW];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kW / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + kW / 2]);
      next[2 * i + 1] = interleave<kW / 2>(rows[i], rows[i + kW / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kW; ++i) put(i, rows[i]);
}

/// One expanded word of kW columns, column c from `bits[c]` and `p[c]`, as rows of a packed panel:
/// element i of all columns at `panel + i * stride`.
template <class Format>
struct WordBlock {
  static void expand(const uint32_t* bits,
                     const typename Format::Coeff* const* p,
                     float* panel,
                     int64_t stride) {
    constexpr int kW = kWidth<float>;
    constexpr int kParts = Format::kWordElements / kW;
    Vec<float> words[kParts][kW];
#pragma GCC unroll 16
    for (int c = 0; c < kW; ++c) {
      const typename Format::Expanded expanded(bits[c], p[c]);
#pragma GCC unroll 8
      for (int i = 0; i < kParts; ++i) words[i][c] = expanded.part(i);
    }
    for (int i = 0; i < kParts; ++i) {
      transpose(words[i],
                [&](int e, Vec<float> row) { store(panel + (i * kW + e) * stride, row); });
    }
  }
};

#if defined(COSPADI_TARGET_AVX512)

/// bfloat16 to floats: the pairs are transposed as they are and split afterwards, half the work.
template <>
struct WordBlock<FloatFormat<BFloat16>> {
  static void expand(const uint32_t* bits, const BFloat16* const* p, float* panel, int64_t stride) {
    Vec<float> pairs[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c)
      pairs[c] = reinterpret_cast<Vec<float>>(expand_words(bits[c], p[c]));
    transpose(pairs, [&](int i, Vec<float> row) {
      const ExpandedFloats<BFloat16> split(reinterpret_cast<__m512i>(row));
      store(panel + i * stride, split.part(0));
      store(panel + (16 + i) * stride, split.part(1));
    });
  }
};

#endif

/// Words word .. word + n_words of kW columns (n_columns of them exist). `kChecked`: the columns
/// may lie near the end of the tensor, and the last word may be partial.
template <class Format, bool kChecked, bool kAllAtoms>
void expand_columns_to(const SparseColumns& s,
                       int64_t column,
                       int64_t n_columns,
                       int64_t word,
                       int64_t n_words,
                       int64_t* offsets,
                       float* panel,
                       int64_t stride) {
  using C = typename Format::Coeff;
  constexpr int kW = kWidth<float>;
  const C* p[kW] = {};
  for (int64_t c = 0; c < n_columns; ++c) p[c] = column_coeffs<C>(s, column + c) + offsets[c];
  const uint8_t* mask = mask_row(s, column);
  for (int64_t w = word; w < word + n_words; ++w, panel += stride * Format::kWordElements) {
    uint32_t bits[kW];
    if constexpr (kChecked) {
      C local[kW][kMaskWord];
      const C* source[kW];
      for (int64_t c = 0; c < kW; ++c) {
        bits[c] = 0;
        source[c] = local[c];
        if (c >= n_columns) {
          std::fill_n(local[c], kMaskWord, C{});
          continue;
        }
        const uint8_t* row = mask + c * s.mask_stride;
        const bool is_full = w < s.n_atoms / kMaskWord;
        bits[c] = is_full ? full_word<kAllAtoms>(row, w) : tail_word<kAllAtoms>(row, s.n_atoms);
        source[c] = readable(p[c], static_cast<const C*>(s.coeffs_end), local[c]);
      }
      WordBlock<Format>::expand(bits, source, panel, stride);
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < kW; ++c) bits[c] = full_word<kAllAtoms>(mask + c * s.mask_stride, w);
      WordBlock<Format>::expand(bits, p, panel, stride);
    }
#pragma GCC unroll 16
    for (int c = 0; c < kW; ++c) p[c] += __builtin_popcount(bits[c]);
  }
  for (int64_t c = 0; c < n_columns; ++c) offsets[c] = p[c] - column_coeffs<C>(s, column + c);
}

template <class Format, bool kAllAtoms>
void expand_to_panel(const SparseColumns& s,
                     int64_t first,
                     int64_t n_columns,
                     int64_t word,
                     int64_t n_words,
                     int64_t* offsets,
                     float* panel) {
  constexpr int64_t kW = kWidth<float>;
  constexpr int64_t kPanel = kTileCols<typename Format::Element>;
  const int64_t n_full = std::clamp<int64_t>(s.n_atoms / kMaskWord - word, 0, n_words);
  for (int64_t c = 0; c < kPanel; c += kW) {
    const int64_t count = std::clamp<int64_t>(n_columns - c, 0, kW);
    const bool is_inner = count == kW && is_inside<typename Format::Coeff>(s, first + c + kW - 1);
    const int64_t n_inner = is_inner ? n_full : 0;
    float* out = panel + c;
    if (n_inner > 0) {
      expand_columns_to<Format, false, kAllAtoms>(
          s, first + c, kW, word, n_inner, offsets + c, out, kPanel);
    }
    if (n_inner < n_words) {
      expand_columns_to<Format, true, kAllAtoms>(s,
                                                 first + c,
                                                 count,
                                                 word + n_inner,
                                                 n_words - n_inner,
                                                 offsets + c,
                                                 out + n_inner * kPanel * Format::kWordElements,
                                                 kPanel);
    }
  }
}

template <class Format>
void pack_row_panel(const StoredRows& z,
                    int64_t n_atoms,
                    int64_t word,
                    int64_t n_words,
                    typename Format::Element* panel) {
  for (int64_t w = word; w < word + n_words; ++w, panel += kTileRows * Format::kWordElements) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      typename Format::Element elements[Format::kWordElements] = {};
      if (r < z.rows) {
        Format::load_word(
            z.dtype, word_positions(n_atoms, w), stored_element(z, r, w * kMaskWord), elements);
      }
      for (int64_t i = 0; i < Format::kWordElements; ++i) panel[i * kTileRows + r] = elements[i];
    }
  }
}
