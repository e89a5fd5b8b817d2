// Column-sparse GEMM for a few rows: every column is read once, as it is stored.
//
// Where a word's coefficients start depends on the population of all words before it. Several
// columns in flight hide that chain, and share the loads of z. Every column reads all of z: where
// its rows do not fit the L1 cache, all columns are taken through one depth block of z after
// another.

/// Bytes of coefficients fetched ahead: more than the memory's latency times its bandwidth, little
/// enough to stay in the L2 cache. Fetched into L2, because the L1's few miss buffers halve the
/// bandwidth of one core (14 against 26 GB/s measured on Zen 4).
constexpr int64_t kPrefetchBytes = 16384;
constexpr int64_t kCacheLine = 64;

/// Cache lines that two mask words of one column advance by at most.
template <class C>
inline constexpr int64_t kPairLines = 2 * kMaskWord * static_cast<int64_t>(sizeof(C)) / kCacheLine;

/// Rows of the register tile used when `left` rows remain.
constexpr int64_t row_tile(int64_t left) { return left > 4 ? 8 : (left > 2 ? 4 : left); }

constexpr int64_t padded_rows(int64_t rows) {
  int64_t padded = 0;
  while (padded < rows) padded += row_tile(rows - padded);
  return padded;
}

static_assert(padded_rows(kFewRows) <= kMaxFewRows);

/// Calls `body(rows of the tile as a constant, its first row)` for the register tiles of `rows`
/// rows.
template <class Body>
inline void for_each_row_tile(int64_t rows, const Body& body) {
  for (int64_t r = 0; r < rows;) {
    const int64_t tile = row_tile(rows - r);
    switch (tile) {
      case 1:
        body(std::integral_constant<int, 1>{}, r);
        break;
      case 2:
        body(std::integral_constant<int, 2>{}, r);
        break;
      case 4:
        body(std::integral_constant<int, 4>{}, r);
        break;
      default:
        body(std::integral_constant<int, 8>{}, r);
        break;
    }
    r += tile;
  }
}

/// Elements of one prepared row. The rows of a register tile lie vector by vector beside each
/// other, so that one pointer finds them all.
template <class Format>
inline int64_t prepared_row(int64_t n_atoms) {
  return word_count(n_atoms) * Format::kWordElements;
}

/// Some mask words of the columns, and how far the columns have come.
struct DepthBlock {
  int64_t first_word;
  int64_t last_word;  ///< exclusive
  int64_t* offsets;   ///< coefficients of each column consumed so far; null: all words at once
};

/// Words of z whose kRows rows stay in the L1 cache.
template <class Format, int kRows>
inline int64_t depth_words(int64_t n_atoms) {
  const int64_t n_words = word_count(n_atoms);
  const int64_t word_bytes = kRows * Format::kWordElements * kElementBytes;
  const int64_t fitting = std::max<int64_t>(kDepthBytes / word_bytes, 1);
  const int64_t n_blocks = (n_words + fitting - 1) / fitting;
  return n_blocks <= 1 ? n_words : (n_words + n_blocks - 1) / n_blocks;  // of equal size
}

/// What is fetched ahead while a column is read: distances from what is being read.
struct FetchAhead {
  int64_t coeffs;  ///< elements
  int64_t mask_bytes;
};

/// Fetches as much as two mask words from `p` on may take.
template <class C>
inline __attribute__((always_inline)) void prefetch_pair(const C* p) {
  constexpr int64_t kLineCoeffs = kCacheLine / static_cast<int64_t>(sizeof(C));
#pragma GCC unroll 4
  for (int64_t line = 0; line < kPairLines<C>; ++line) {
    __builtin_prefetch(p + line * kLineCoeffs, 0, 2);
  }
}

/// The columns to fetch while `kColumns` of them are read together.
template <class C>
inline FetchAhead fetch_ahead(const SparseColumns& s, int64_t columns_together) {
  const int64_t column_bytes = s.coeffs_stride * static_cast<int64_t>(sizeof(C));
  const int64_t group_bytes = columns_together * std::max<int64_t>(column_bytes, kCacheLine);
  const int64_t columns = columns_together * (1 + kPrefetchBytes / group_bytes);
  return {.coeffs = s.is_decoded ? 0 : columns * s.coeffs_stride,
          .mask_bytes = columns * s.mask_stride};
}

/// totals[i] = the lanes of sums[i] added up, kCount vectors.
template <int kCount>
inline void sum_vectors(const Vec<float>* sums, float* totals) {
  if constexpr (kCount % 4 == 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i += 4) sum_lanes_of_four(sums + i, totals + i);
  } else {
    for (int i = 0; i < kCount; ++i) totals[i] = sum_lanes(sums[i]);
  }
}

/// sum(r) += z(r) S for one word of a column, expanded from `bits` and the coefficients at `p`.
template <class Format, int kRows>
inline __attribute__((always_inline)) void multiply_word(uint32_t bits,
                                                         const typename Format::Coeff* p,
                                                         const typename Format::Element* z_word,
                                                         Vec<float>* sum) {
  constexpr int kParts = Format::kWordElements / kWidth<float>;
  const typename Format::Expanded expanded(bits, p);
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) {
    const Vec<float> part = expanded.part(i);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sum[r] = Format::multiply_add(sum[r], z_word + (i * kRows + r) * kWidth<float>, part);
    }
  }
}

/// sums(c, r) += z(r, word) S(word, c) for words first_word .. last_word of kColumns columns, an
/// even number of words that all columns have in full. `p`: the coefficients of every column from
/// first_word on, and afterwards from last_word on.
///
/// Two words at a time: the chain from one address of coefficients to the next is half as long.
template <class Format, int kRows, int kColumns, bool kAllAtoms>
inline void multiply_word_pairs(const uint8_t* mask,
                                int64_t mask_stride,
                                const FetchAhead& ahead,
                                int64_t first_word,
                                int64_t last_word,
                                const typename Format::Element* z,
                                const typename Format::Coeff** p,
                                Vec<float> (*sums)[kRows]) {
  using C = typename Format::Coeff;
  constexpr int64_t kWordStride = kRows * Format::kWordElements;
  // copies of their own, that nothing but registers needs to hold
  const C* at[kColumns];
  Vec<float> sum[kColumns][kRows];
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c) {
    at[c] = p[c];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[c][r] = sums[c][r];
  }
  const typename Format::Element* z_word = z + first_word * kWordStride;
  for (int64_t word = first_word; word < last_word; word += 2, z_word += 2 * kWordStride) {
    if (!kAllAtoms && static_cast<uint64_t>(word) % (kCacheLine / 4) < 2) {
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) {
        __builtin_prefetch(mask + c * mask_stride + 4 * word + ahead.mask_bytes, 0, 2);
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      const uint64_t bits = full_word_pair<kAllAtoms>(mask + c * mask_stride, word);
      const WordPair<C, kAllAtoms> pair(bits);
      multiply_word<Format, kRows>(pair.lower(), at[c], z_word, sum[c]);
      prefetch_pair(at[c] + ahead.coeffs);
      const C* const next = at[c] + __builtin_popcount(static_cast<uint32_t>(bits));
      at[c] += __builtin_popcountll(bits);
      multiply_word<Format, kRows>(pair.upper(), next, z_word + kWordStride, sum[c]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c) {
    p[c] = at[c];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sums[c][r] = sum[c][r];
  }
}

/// A depth block of kColumns columns from `column` on, times kRows rows; sums are added to `out`
/// from the second block on. `kChecked`: the columns lie near the end of the tensor,
/// where nothing is fetched ahead.
template <class Format, int kRows, int kColumns, bool kChecked, bool kAllAtoms>
inline void multiply_columns(const SparseColumns& s,
                             int64_t column,
                             const FetchAhead& ahead,
                             const DepthBlock& block,
                             const typename Format::Element* z,
                             float* out,
                             int64_t out_stride) {
  using C = typename Format::Coeff;
  const int64_t n_full = s.n_atoms / kMaskWord;
  const C* end = static_cast<const C*>(s.coeffs_end);
  C local[kChecked ? kMaskWord : 1];
  const uint8_t* mask = mask_row(s, column);
  const C* p[kColumns];
  Vec<float> sum[kColumns][kRows];
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c) {
    p[c] = column_coeffs<C>(s, column + c);
    if (block.offsets != nullptr) p[c] += block.offsets[c];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[c][r] = Vec<float>{};
  }
  const auto step = [&](int c, uint32_t bits, int64_t word) __attribute__((always_inline)) {
    multiply_word<Format, kRows>(bits,
                                 kChecked ? readable(p[c], end, local) : p[c],
                                 z + word * kRows * Format::kWordElements,
                                 sum[c]);
    p[c] += __builtin_popcount(bits);
  };
  const int64_t last_full = std::min(n_full, block.last_word);
  int64_t word = block.first_word;
  if constexpr (!kChecked) {
    const int64_t n_pairs = std::max<int64_t>(last_full - word, 0) / 2;
    multiply_word_pairs<Format, kRows, kColumns, kAllAtoms>(
        mask, s.mask_stride, ahead, word, word + 2 * n_pairs, z, p, sum);
    word += 2 * n_pairs;
  }
  for (; word < last_full; ++word) {
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      step(c, full_word<kAllAtoms>(mask + c * s.mask_stride, word), word);
    }
  }
  if (n_full < block.last_word) {
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      step(c, tail_word<kAllAtoms>(mask + c * s.mask_stride, s.n_atoms), n_full);
    }
  }
  float totals[kColumns * kRows];
  sum_vectors<kColumns * kRows>(&sum[0][0], totals);
  const bool is_first = block.first_word == 0;
  for (int c = 0; c < kColumns; ++c) {
    if (block.offsets != nullptr) block.offsets[c] = p[c] - column_coeffs<C>(s, column + c);
    for (int r = 0; r < kRows; ++r) {
      float& result = out[r * out_stride + c];
      result = is_first ? totals[c * kRows + r] : result + totals[c * kRows + r];
    }
  }
}

/// One depth block of all columns, or everything at once.
template <class Format, int kRows, bool kAllAtoms>
void multiply_rows(const SparseColumns& s,
                   int64_t first,
                   int64_t n_columns,
                   DepthBlock block,
                   const typename Format::Element* z,
                   float* out,
                   int64_t out_stride) {
  using C = typename Format::Coeff;
  constexpr int kColumns = kColumnsInFlight<kRows>;
  const FetchAhead ahead = fetch_ahead<C>(s, kColumns);
  int64_t* const offsets = block.offsets;
  int64_t j = 0;
  while (j < n_columns) {
    block.offsets = offsets == nullptr ? nullptr : offsets + j;
    // columns are stored one after another: if the last of the group is inside, all are
    if (j + kColumns <= n_columns && is_inside<C>(s, first + j + kColumns - 1)) {
      multiply_columns<Format, kRows, kColumns, false, kAllAtoms>(
          s, first + j, ahead, block, z, out + j, out_stride);
      j += kColumns;
    } else {
      multiply_columns<Format, kRows, 1, true, kAllAtoms>(
          s, first + j, {}, block, z, out + j, out_stride);
      j += 1;
    }
  }
}

/// kRows rows and all columns, depth block by depth block.
template <class Format, int kRows, bool kAllAtoms>
void multiply_row_tile(const SparseColumns& s,
                       int64_t first,
                       int64_t n_columns,
                       const typename Format::Element* z,
                       float* out,
                       int64_t out_stride) {
  const int64_t n_words = word_count(s.n_atoms);
  const int64_t depth = depth_words<Format, kRows>(s.n_atoms);
  if (depth == n_words) {
    return multiply_rows<Format, kRows, kAllAtoms>(
        s, first, n_columns, {0, n_words, nullptr}, z, out, out_stride);
  }
  constexpr int64_t kColumnsTogether = 64;
  int64_t offsets[kColumnsTogether];
  for (int64_t j = 0; j < n_columns; j += kColumnsTogether) {
    const int64_t count = std::min(kColumnsTogether, n_columns - j);
    std::fill_n(offsets, count, int64_t{0});
    for (int64_t word = 0; word < n_words; word += depth) {
      const DepthBlock block{word, std::min(word + depth, n_words), offsets};
      multiply_rows<Format, kRows, kAllAtoms>(s, first + j, count, block, z, out + j, out_stride);
    }
  }
}

inline int64_t prepared_size(int64_t rows, int64_t n_atoms) noexcept {
  return padded_rows(rows) * prepared_row<FloatFormat<float>>(n_atoms);
}

template <class Format>
void prepare_rows(const StoredRows& z, int64_t n_atoms, typename Format::Element* out) {
  using Element = typename Format::Element;
  constexpr int64_t kW = kWidth<float>;
  for (int64_t first = 0; first < z.rows;) {
    const int64_t tile = row_tile(z.rows - first);
    for (int64_t word = 0; word < word_count(n_atoms); ++word) {
      for (int64_t r = 0; r < tile; ++r) {
        Element elements[Format::kWordElements] = {};
        if (first + r < z.rows) {
          const void* source = stored_element(z, first + r, word * kMaskWord);
          Format::load_word(z.dtype, word_positions(n_atoms, word), source, elements);
        }
        for (int64_t i = 0; i < Format::kWordElements; i += kW) {
          std::copy_n(elements + i, kW, out + i * tile + r * kW);
        }
      }
      out += tile * Format::kWordElements;
    }
    first += tile;
  }
}

/// Register tile after register tile, each of which reads all columns.
template <class Format, bool kAllAtoms>
void multiply_tile_by_tile(const SparseColumns& s,
                           int64_t first,
                           int64_t n_columns,
                           int64_t rows,
                           const typename Format::Element* z,
                           float* out,
                           int64_t out_stride) {
  for_each_row_tile(rows, [&](auto tile, int64_t row) {
    multiply_row_tile<Format, decltype(tile)::value, kAllAtoms>(
        s,
        first,
        n_columns,
        z + row * prepared_row<Format>(s.n_atoms),
        out + row * out_stride,
        out_stride);
  });
}
