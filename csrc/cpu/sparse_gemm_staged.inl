// Column-sparse GEMM for several row tiles: a few columns are expanded into the L1 cache, some
// words at a time, and every row tile is multiplied by them there.
//
// An expansion takes the units that also multiply, as much as four products of a word (measured on
// Zen 4), so it is done once and not once per tile. Lanes are positions, as in sparse_gemm_few.inl:
// the same z, no transposition, and sums of the same order.

/// Words first_word .. first_word + n_words of kColumns columns as elements: column c of word w at
/// `staged + (w * kColumns + c) * kWordElements`. `p`: their coefficients, and
/// afterwards those of the next words.
template <class Format, int kColumns, bool kAllAtoms>
inline void stage_columns(const SparseColumns& s,
                          int64_t column,
                          const FetchAhead& ahead,
                          int64_t first_word,
                          int64_t n_words,
                          const typename Format::Coeff** p,
                          float* staged) {
  using C = typename Format::Coeff;
  constexpr int kW = kWidth<float>;
  constexpr int kParts = Format::kWordElements / kW;
  constexpr int64_t kStride = kColumns * Format::kWordElements;
  const int64_t n_full = std::clamp<int64_t>(s.n_atoms / kMaskWord - first_word, 0, n_words);
  const auto put = [&](uint32_t bits, const C* coeffs, float* out) __attribute__((always_inline)) {
    const typename Format::Expanded expanded(bits, coeffs);
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) store(out + i * kW, expanded.part(i));
  };
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    const uint8_t* row = mask_row(s, column + c);
    const C* at = p[c];
    float* out = staged + c * Format::kWordElements;
    int64_t w = 0;
    for (; w + 1 < n_full; w += 2, out += 2 * kStride) {
      const uint64_t bits = full_word_pair<kAllAtoms>(row, first_word + w);
      const WordPair<C, kAllAtoms> pair(bits);
      put(pair.lower(), at, out);
      prefetch_pair(at + ahead.coeffs);
      if (!kAllAtoms && w % (kCacheLine / 4) == 0) {
        __builtin_prefetch(row + 4 * (first_word + w) + ahead.mask_bytes, 0, 2);
      }
      const C* const next = at + __builtin_popcount(static_cast<uint32_t>(bits));
      at += __builtin_popcountll(bits);
      put(pair.upper(), next, out + kStride);
    }
    for (; w < n_words; ++w, out += kStride) {
      const uint32_t bits = w < n_full ? full_word<kAllAtoms>(row, first_word + w)
                                       : tail_word<kAllAtoms>(row, s.n_atoms);
      put(bits, at, out);
      at += __builtin_popcount(bits);
    }
    p[c] = at;
  }
}

/// sums(c, r) += z(r) times the staged words of column c, kRows rows.
template <class Format, int kRows, int kColumns>
inline void multiply_staged(const float* staged,
                            int64_t n_words,
                            const typename Format::Element* z,
                            Vec<float>* sums) {
  constexpr int kW = kWidth<float>;
  constexpr int kParts = Format::kWordElements / kW;
  Vec<float> sum[kColumns][kRows];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[c][r] = sums[c * kRows + r];
  }
  for (int64_t w = 0; w < n_words; ++w) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      Vec<float> part[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c)
        part[c] = load(staged + c * Format::kWordElements + i * kW);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          sum[c][r] = Format::multiply_add(sum[c][r], z + (i * kRows + r) * kW, part[c]);
        }
      }
    }
    staged += kColumns * Format::kWordElements;
    z += kRows * Format::kWordElements;
  }
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sums[c * kRows + r] = sum[c][r];
  }
}

/// All rows of z times kColumns columns that lie inside the tensor.
template <class Format, int kColumns, bool kAllAtoms>
void multiply_columns_staged(const SparseColumns& s,
                             int64_t column,
                             const FetchAhead& ahead,
                             int64_t rows,
                             const typename Format::Element* z,
                             float* out,
                             int64_t out_stride) {
  constexpr int64_t kRowElements = Format::kWordElements;
  const int64_t n_words = word_count(s.n_atoms);
  alignas(64) float staged[kStagedWords * kColumns * Format::kWordElements];
  Vec<float> sums[kMaxFewRows * kColumns];
  std::fill_n(sums, padded_rows(rows) * kColumns, Vec<float>{});
  const typename Format::Coeff* p[kColumns];
  for (int c = 0; c < kColumns; ++c) p[c] = column_coeffs<typename Format::Coeff>(s, column + c);
  for (int64_t word = 0; word < n_words; word += kStagedWords) {
    const int64_t count = std::min(kStagedWords, n_words - word);
    stage_columns<Format, kColumns, kAllAtoms>(s, column, ahead, word, count, p, staged);
    for_each_row_tile(rows, [&](auto tile, int64_t first_row) {
      constexpr int kRows = decltype(tile)::value;
      const typename Format::Element* z_tile =
          z + (first_row * n_words + word * kRows) * kRowElements;
      multiply_staged<Format, kRows, kColumns>(staged, count, z_tile, sums + first_row * kColumns);
    });
  }
  for_each_row_tile(rows, [&](auto tile, int64_t first_row) {
    constexpr int kRows = decltype(tile)::value;
    float totals[kColumns * kRows];
    sum_vectors<kColumns * kRows>(sums + first_row * kColumns, totals);
    for (int c = 0; c < kColumns; ++c) {
      for (int r = 0; r < kRows; ++r) {
        out[(first_row + r) * out_stride + c] = totals[c * kRows + r];
      }
    }
  });
}

/// All rows of z, which are more than one register tile.
template <class Format, bool kAllAtoms>
void multiply_row_tiles(const SparseColumns& s,
                        int64_t first,
                        int64_t n_columns,
                        int64_t rows,
                        const typename Format::Element* z,
                        float* out,
                        int64_t out_stride) {
  using C = typename Format::Coeff;
  const FetchAhead ahead = fetch_ahead<C>(s, kStagedColumns);
  int64_t j = 0;
  const auto run = [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    // columns are stored one after another: if the last of the group is inside, all are
    while (j + kColumns <= n_columns && is_inside<C>(s, first + j + kColumns - 1)) {
      multiply_columns_staged<Format, kColumns, kAllAtoms>(
          s, first + j, ahead, rows, z, out + j, out_stride);
      j += kColumns;
    }
  };
  run(std::integral_constant<int, kStagedColumns>{});
  if constexpr (kStagedColumns > 1) run(std::integral_constant<int, 1>{});
  if (j < n_columns) {
    multiply_tile_by_tile<Format, kAllAtoms>(
        s, first + j, n_columns - j, rows, z, out + j, out_stride);
  }
}

template <class Format, bool kAllAtoms>
void multiply_few_rows(const SparseColumns& s,
                       int64_t first,
                       int64_t n_columns,
                       int64_t rows,
                       const typename Format::Element* z,
                       float* out,
                       int64_t out_stride) {
  if constexpr (kStagedColumns > 0) {
    if (rows > row_tile(rows)) {
      return multiply_row_tiles<Format, kAllAtoms>(s, first, n_columns, rows, z, out, out_stride);
    }
  }
  multiply_tile_by_tile<Format, kAllAtoms>(s, first, n_columns, rows, z, out, out_stride);
}
