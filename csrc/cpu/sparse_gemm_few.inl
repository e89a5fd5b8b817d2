// Column-sparse GEMM for a few rows: every column is read once, as it is stored.
//
// Where a word's coefficients start depends on the population of all words before it. Several
// columns in flight hide that chain, and share the loads of z, which stays in the L1 or L2 cache.

/// Bytes of coefficients fetched ahead: more than the memory's latency times its bandwidth, little
/// enough to stay in the L2 cache. Fetched into L2, because the L1's few miss buffers halve the
/// bandwidth of one core (14 against 26 GB/s measured on Zen 4).
constexpr int64_t kPrefetchBytes = 16384;
constexpr int64_t kCacheLine = 64;

/// Elements between prepared rows. The odd cache line keeps rows apart in the cache sets.
template <class Format>
inline int64_t prepared_stride(int64_t n_atoms) {
  return word_count(n_atoms) * Format::kWordElements + 16;
}

/// kColumns columns from `column` on, times kRows rows. `kChecked`: the columns lie near the end of
/// the tensor. `ahead`: columns between this one and the one to prefetch.
template <class Format, int kRows, int kColumns, bool kChecked, bool kAllAtoms>
inline void multiply_columns(const SparseColumns& s,
                             int64_t column,
                             int64_t ahead,
                             const typename Format::Element* z,
                             float* out,
                             int64_t out_stride) {
  using C = typename Format::Coeff;
  constexpr int kParts = Format::kWordElements / kWidth<float>;
  const int64_t z_stride = prepared_stride<Format>(s.n_atoms);
  const int64_t n_full = s.n_atoms / kMaskWord;
  const C* end = static_cast<const C*>(s.coeffs_end);
  const int64_t coeffs_ahead = s.is_decoded ? 0 : ahead * s.coeffs_stride;
  const int64_t mask_ahead = ahead * s.mask_stride;
  C local[kChecked ? kMaskWord : 1];
  const uint8_t* mask = mask_row(s, column);
  const C* p[kColumns];
  Vec<float> sum[kColumns][kRows];
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c) {
    p[c] = column_coeffs<C>(s, column + c);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[c][r] = Vec<float>{};
  }
  const auto step = [&](int c, uint32_t bits, int64_t word) __attribute__((always_inline)) {
    const typename Format::Expanded expanded(bits, kChecked ? readable(p[c], end, local) : p[c]);
    const typename Format::Element* z_word = z + word * Format::kWordElements;
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      const Vec<float> part = expanded.part(i);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        sum[c][r] =
            Format::multiply_add(sum[c][r], z_word + r * z_stride + i * kWidth<float>, part);
      }
    }
    if constexpr (!kChecked) __builtin_prefetch(p[c] + coeffs_ahead, 0, 2);
    p[c] += __builtin_popcount(bits);
  };
  for (int64_t word = 0; word < n_full; ++word) {
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      const uint8_t* row = mask + c * s.mask_stride;
      step(c, full_word<kAllAtoms>(row, word), word);
      if (!kChecked && !kAllAtoms && word % (kCacheLine / 4) == 0) {
        __builtin_prefetch(row + 4 * word + mask_ahead, 0, 2);
      }
    }
  }
  if (s.n_atoms % kMaskWord != 0) {
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      step(c, tail_word<kAllAtoms>(mask + c * s.mask_stride, s.n_atoms), n_full);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) out[r * out_stride + c] = sum_lanes(sum[c][r]);
  }
}

template <class Format, int kRows, bool kAllAtoms>
void multiply_rows(const SparseColumns& s,
                   int64_t first,
                   int64_t n_columns,
                   const typename Format::Element* z,
                   float* out,
                   int64_t out_stride) {
  using C = typename Format::Coeff;
  constexpr int kColumns = kColumnsInFlight<kRows>;
  const int64_t column_bytes = s.coeffs_stride * static_cast<int64_t>(sizeof(C));
  const int64_t ahead =
      kColumns * (1 + kPrefetchBytes / (kColumns * std::max<int64_t>(column_bytes, kCacheLine)));
  int64_t j = 0;
  while (j < n_columns) {
    // columns are stored one after another: if the last of the group is inside, all are
    if (j + kColumns <= n_columns && is_inside<C>(s, first + j + kColumns - 1)) {
      multiply_columns<Format, kRows, kColumns, false, kAllAtoms>(
          s, first + j, ahead, z, out + j, out_stride);
      j += kColumns;
    } else {
      multiply_columns<Format, kRows, 1, true, kAllAtoms>(s, first + j, 0, z, out + j, out_stride);
      j += 1;
    }
  }
}

/// Rows of the register tile used when `left` rows remain.
constexpr int64_t row_tile(int64_t left) { return left > 4 ? 8 : (left > 2 ? 4 : left); }

constexpr int64_t padded_rows(int64_t rows) {
  int64_t padded = 0;
  while (padded < rows) padded += row_tile(rows - padded);
  return padded;
}

static_assert(padded_rows(kFewRows) <= kMaxFewRows);

inline int64_t prepared_size(int64_t rows, int64_t n_atoms) noexcept {
  return padded_rows(rows) * prepared_stride<FloatFormat<float>>(n_atoms);
}

template <class Format>
void prepare_rows(const StoredRows& z, int64_t n_atoms, typename Format::Element* out) {
  const int64_t stride = prepared_stride<Format>(n_atoms);
  for (int64_t r = 0; r < padded_rows(z.rows); ++r, out += stride) {
    if (r >= z.rows) {
      std::fill_n(out, stride, typename Format::Element{});
      continue;
    }
    for (int64_t word = 0; word < word_count(n_atoms); ++word) {
      Format::load_word(z.dtype,
                        word_positions(n_atoms, word),
                        stored_element(z, r, word * kMaskWord),
                        out + word * Format::kWordElements);
    }
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
  const int64_t stride = prepared_stride<Format>(s.n_atoms);
  for (int64_t r = 0; r < rows;) {
    const typename Format::Element* z_tile = z + r * stride;
    float* out_tile = out + r * out_stride;
    const int64_t tile = row_tile(rows - r);
    r += tile;
    switch (tile) {
      case 1:
        multiply_rows<Format, 1, kAllAtoms>(s, first, n_columns, z_tile, out_tile, out_stride);
        break;
      case 2:
        multiply_rows<Format, 2, kAllAtoms>(s, first, n_columns, z_tile, out_tile, out_stride);
        break;
      case 4:
        multiply_rows<Format, 4, kAllAtoms>(s, first, n_columns, z_tile, out_tile, out_stride);
        break;
      default:
        multiply_rows<Format, 8, kAllAtoms>(s, first, n_columns, z_tile, out_tile, out_stride);
        break;
    }
  }
}
