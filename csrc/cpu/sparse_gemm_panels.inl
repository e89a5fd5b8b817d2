// Column-sparse GEMM for many rows: columns of S expanded into packed panels of the dense GEMM.
//
// Both operands use the order of the Format inside a mask word, so only the order of a sum changes.

/// Writes the transpose of the kW x kW block whose rows are `rows[i]` to `out`, rows `stride` apart.
///
/// log2(kW) rounds; each interleaves the first half of the vectors with the second.
inline void store_transposed(Vec<float>* rows, float* out, int64_t stride) {
  constexpr int kW = kWidth<float>;
  typedef int32_t Order __attribute__((vector_size(COSPADI_VECTOR_BYTES)));
  Order low;
  Order high;
  for (int i = 0; i < kW; ++i) {
    low[i] = i / 2 + (i % 2) * kW;
    high[i] = low[i] + kW / 2;
  }
  for (int round = 1; round < kW; round *= 2) {
    Vec<float> next[kW];
#pragma GCC unroll 8
    for (int i = 0; i < kW / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kW / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kW / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kW; ++i) store(out + i * stride, rows[i]);
}

/// Coefficients consumed by one word of a column; expands the word to `out`.
template <class Format>
inline int64_t expand_word(const SparseColumns& s,
                           int64_t column,
                           int64_t word,
                           int64_t offset,
                           float* out) {
  using C = typename Format::Coeff;
  constexpr int kParts = Format::kWordElements / kWidth<float>;
  const uint8_t* mask_row = s.mask + column * s.mask_stride;
  const uint32_t bits =
      word < s.n_atoms / kMaskWord ? full_word(mask_row, word) : tail_word(mask_row, s.n_atoms);
  C local[kMaskWord];
  const C* p = column_coeffs<C>(s, column) + offset;
  const typename Format::Expanded expanded(
      bits, readable(p, static_cast<const C*>(s.coeffs_end), local));
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) store(out + i * kWidth<float>, expanded.part(i));
  return __builtin_popcount(bits);
}

template <class Format>
void expand_to_panel(const SparseColumns& s,
                     int64_t first,
                     int64_t n_columns,
                     int64_t word,
                     int64_t n_words,
                     int64_t* offsets,
                     float* panel) {
  constexpr int kW = kWidth<float>;
  constexpr int kParts = Format::kWordElements / kW;
  constexpr int64_t kPanel = kTileCols<typename Format::Element>;
  for (int64_t w = word; w < word + n_words; ++w, panel += kPanel * Format::kWordElements) {
    for (int64_t c0 = 0; c0 < kPanel; c0 += kW) {
      alignas(64) float words[kW][Format::kWordElements];
      for (int64_t c = 0; c < kW; ++c) {
        if (c0 + c < n_columns) {
          offsets[c0 + c] += expand_word<Format>(s, first + c0 + c, w, offsets[c0 + c], words[c]);
        } else {
          std::fill_n(words[c], Format::kWordElements, 0.0F);
        }
      }
      for (int64_t i = 0; i < kParts; ++i) {
        Vec<float> rows[kW];
#pragma GCC unroll 16
        for (int c = 0; c < kW; ++c) rows[c] = load(words[c] + i * kW);
        store_transposed(rows, panel + i * kW * kPanel + c0, kPanel);
      }
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
        Format::load_word(z.dtype,
                          word_positions(n_atoms, w),
                          stored_element(z, r, w * kMaskWord),
                          elements);
      }
      for (int64_t i = 0; i < Format::kWordElements; ++i) panel[i * kTileRows + r] = elements[i];
    }
  }
}
