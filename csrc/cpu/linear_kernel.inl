// x D for a few rows of x, with the dictionary as it is stored: one row per input.
//
// The sums of all atoms stay in the L1 cache while the inputs pass by, some at a time: so the
// dictionary is read once, from its first byte to its last, and needs no second copy in another
// order. (Sums in registers ask for narrow strips of it: half of the memory's rate, measured.)

/// Inputs whose rows are added to the sums together: a sum is loaded and stored once for all.
constexpr int kInputsTogether = 8;

/// Atoms whose sums, with all rows of x, stay in the L1 cache.
constexpr int64_t kLinearBlock = 1024;

/// Vectors of a word whose sums are in registers together, with kRows rows of x: half of the
/// registers.
template <int kRows>
inline constexpr int kPartsTogether = kWidth<float> == 16 || kRows > 2 ? 2 : 4;

/// Bytes of the dictionary fetched ahead, into the L2 cache.
constexpr int64_t kDictionaryAhead = 16384;

/// sums(r, j) += x(r, i) row_i(j) for kInputs inputs i in order, whose rows begin at `row`, kRows
/// rows of x and n_words mask words of atoms, the lanes of each word in the order of its expansion.
/// `kChecked`: the words may reach beyond the dictionary.
template <class C, int kRows, int kInputs, bool kChecked>
inline void add_inputs(const StoredDictionary& dictionary,
                       const C* row,
                       int64_t n_words,
                       const float* x,
                       int64_t x_stride,
                       float* sums,
                       int64_t sums_stride) {
  constexpr int kParts = static_cast<int>(kMaskWord) / kWidth<float>;
  constexpr int kTogether = kPartsTogether<kRows>;
  const C* const end = static_cast<const C*>(dictionary.end);
  const int64_t row_bytes = dictionary.stride * static_cast<int64_t>(sizeof(C));
  const int64_t ahead =
      dictionary.stride * (kInputs + kDictionaryAhead / std::max<int64_t>(row_bytes, 1));
  C local[kChecked ? kMaskWord : 1];
  for (int64_t word = 0; word < n_words; ++word) {
#pragma GCC unroll 8
    for (int first = 0; first < kParts; first += kTogether) {
      float* const part_sums = sums + word * kMaskWord + first * kWidth<float>;
      Vec<float> sum[kRows][kTogether];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; ++i) {
          sum[r][i] = load(part_sums + r * sums_stride + i * kWidth<float>);
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < kInputs; ++k) {
        const C* p = row + k * dictionary.stride + word * kMaskWord;
        if constexpr (kChecked) {
          p = readable(p, end, local);
        } else if (first == 0) {
          __builtin_prefetch(p + ahead, 0, 2);
        }
        const ExpandedFloats<C> atoms(~uint32_t{0}, p);
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; ++i) {
          const Vec<float> part = atoms.part(first + i);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) sum[r][i] += splat(x[r * x_stride + k]) * part;
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; ++i) {
          store(part_sums + r * sums_stride + i * kWidth<float>, sum[r][i]);
        }
      }
    }
  }
}

/// All inputs, kRows rows of x, n_atoms atoms from `first` on.
template <class C, int kRows>
inline void multiply_rows_of_x(const StoredDictionary& dictionary,
                               int64_t first,
                               int64_t n_atoms,
                               const float* x,
                               int64_t x_stride,
                               float* out,
                               int64_t out_stride) {
  const int64_t n_words = word_count(n_atoms);
  for (int r = 0; r < kRows; ++r) std::fill_n(out + r * out_stride, n_words * kMaskWord, 0.0F);
  const auto add = [&](auto inputs, int64_t input) {
    constexpr int kInputs = decltype(inputs)::value;
    const C* const row = static_cast<const C*>(dictionary.data) + input * dictionary.stride + first;
    // Words of all rows but the last few lie before the dictionary's end: beyond a row comes the
    // next one, whose values reach only sums that nobody reads.
    const C* const last_row = row + (kInputs - 1) * dictionary.stride;
    const bool is_inside = static_cast<const C*>(dictionary.end) - last_row >= n_words * kMaskWord;
    const int64_t n_free = is_inside ? n_words : n_atoms / kMaskWord;
    add_inputs<C, kRows, kInputs, false>(
        dictionary, row, n_free, x + input, x_stride, out, out_stride);
    add_inputs<C, kRows, kInputs, true>(dictionary,
                                        row + n_free * kMaskWord,
                                        n_words - n_free,
                                        x + input,
                                        x_stride,
                                        out + n_free * kMaskWord,
                                        out_stride);
  };
  int64_t input = 0;
  for (; input + kInputsTogether <= dictionary.d_in; input += kInputsTogether) {
    add(std::integral_constant<int, kInputsTogether>{}, input);
  }
  for (; input < dictionary.d_in; ++input) add(std::integral_constant<int, 1>{}, input);
  for (int r = 0; r < kRows; ++r) {
    for (int64_t word = 0; word < n_words; ++word) {
      float* const word_out = out + r * out_stride + word * kMaskWord;
      float lanes[kMaskWord];
      std::memcpy(lanes, word_out, sizeof(lanes));
      for (int64_t i = 0; i < kMaskWord; ++i) word_out[position_of<C>(i)] = lanes[i];
    }
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
      multiply_rows_of_x<C, kRows>(
          dictionary, first, n_atoms, x + r * x_stride, x_stride, out + r * out_stride, out_stride);
    }
  };
  if constexpr (kWidth<float> == 16) run(std::integral_constant<int, 8>{});  // 16 sums
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
  return {.max_rows = kFewDictionaryRows,
          .block = kLinearBlock,
          .multiply_dictionary = multiply_dictionary};
}
