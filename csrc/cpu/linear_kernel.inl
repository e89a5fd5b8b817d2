// x D for a few rows of x, with the dictionary as it is stored: one row per input.
//
// The sums of a block of atoms stay in registers while the inputs pass by, so that the dictionary
// is read once, in whole cache lines, and needs no second copy in another order.

/// Mask words of atoms whose sums, with kRows rows of x, fill half of the registers.
template <int kRows>
constexpr int block_words() {
#if defined(COSPADI_TARGET_AVX512)
  constexpr int kSums = 16;
#else
  constexpr int kSums = 8;
#endif
  constexpr int kParts = static_cast<int>(kMaskWord) / kWidth<float>;
  return std::max(1, kSums / (kRows * kParts));
}

constexpr int64_t kLinearBlock = block_words<1>() * kMaskWord;

/// kRows rows of x times kWords words of atoms from `column` on. `kChecked`: the last word may
/// reach beyond the dictionary.
template <class C, int kRows, int kWords, bool kChecked>
inline void multiply_words(const StoredDictionary& dictionary,
                           int64_t column,
                           const float* x,
                           int64_t x_stride,
                           float* out,
                           int64_t out_stride) {
  constexpr int kParts = static_cast<int>(kMaskWord) / kWidth<float>;
  // Rows ahead of the one in use: a row of few words is less than what memory delivers meanwhile.
  constexpr int64_t kRowsAhead = 16;
  const C* row = static_cast<const C*>(dictionary.data) + column;
  const C* const end = static_cast<const C*>(dictionary.end);
  C local[kChecked ? kMaskWord : 1];
  Vec<float> sum[kRows][kWords * kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kWords * kParts; ++i) sum[r][i] = Vec<float>{};
  }
  for (int64_t input = 0; input < dictionary.d_in; ++input, row += dictionary.stride) {
#pragma GCC unroll 8
    for (int w = 0; w < kWords; ++w) {
      const C* p = row + w * kMaskWord;
      if constexpr (kChecked) {
        if (w == kWords - 1) p = readable(p, end, local);
      } else {
        __builtin_prefetch(p + kRowsAhead * dictionary.stride, 0, 2);
      }
      const ExpandedFloats<C> atoms(~uint32_t{0}, p);
#pragma GCC unroll 8
      for (int i = 0; i < kParts; ++i) {
        const Vec<float> part = atoms.part(i);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sum[r][w * kParts + i] += splat(x[r * x_stride + input]) * part;
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWords; ++w) {
      float lanes[kMaskWord];
      std::memcpy(lanes, &sum[r][w * kParts], sizeof(lanes));
      float* const word = out + r * out_stride + w * kMaskWord;
      for (int64_t i = 0; i < kMaskWord; ++i) word[position_of<C>(i)] = lanes[i];
    }
  }
}

/// As many words at a time as the registers hold, then one by one; the last word is checked.
template <class C, int kRows>
inline void multiply_block(const StoredDictionary& dictionary,
                           int64_t first,
                           int64_t n_atoms,
                           const float* x,
                           int64_t x_stride,
                           float* out,
                           int64_t out_stride) {
  constexpr int kWords = block_words<kRows>();
  int64_t j = 0;
  for (; j + kWords * kMaskWord <= n_atoms; j += kWords * kMaskWord) {
    multiply_words<C, kRows, kWords, false>(
        dictionary, first + j, x, x_stride, out + j, out_stride);
  }
  for (; j + kMaskWord <= n_atoms; j += kMaskWord) {
    multiply_words<C, kRows, 1, false>(dictionary, first + j, x, x_stride, out + j, out_stride);
  }
  if (j < n_atoms) {
    multiply_words<C, kRows, 1, true>(dictionary, first + j, x, x_stride, out + j, out_stride);
  }
}

template <class C>
void multiply_dictionary_rows(const StoredDictionary& dictionary,
                              int64_t first,
                              int64_t n_atoms,
                              const float* x,
                              int64_t x_stride,
                              int64_t rows,
                              float* out,
                              int64_t out_stride) {
  int64_t r = 0;
  const auto run = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    for (; r + kRows <= rows; r += kRows) {
      multiply_block<C, kRows>(
          dictionary, first, n_atoms, x + r * x_stride, x_stride, out + r * out_stride, out_stride);
    }
  };
  run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

inline void multiply_dictionary(const StoredDictionary& dictionary,
                                int64_t first,
                                int64_t n_atoms,
                                const float* x,
                                int64_t x_stride,
                                int64_t rows,
                                float* out,
                                int64_t out_stride) noexcept {
  switch (dictionary.dtype) {
    case DType::kFloat32:
      return multiply_dictionary_rows<float>(
          dictionary, first, n_atoms, x, x_stride, rows, out, out_stride);
    case DType::kBFloat16:
      return multiply_dictionary_rows<BFloat16>(
          dictionary, first, n_atoms, x, x_stride, rows, out, out_stride);
    case DType::kFloat16:
      return multiply_dictionary_rows<Float16>(
          dictionary, first, n_atoms, x, x_stride, rows, out, out_stride);
  }
}

constexpr LinearKernels make_linear_kernels() {
  return {.max_rows = 8, .block = kLinearBlock, .multiply_dictionary = multiply_dictionary};
}
