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

/// Inputs one by one, in float.
template <class C>
struct SingleInputs {
  using Coeff = C;
  using Value = float;
  static constexpr int kInputs = 1;

  struct Atoms {
    ExpandedFloats<C> floats;
    Atoms(const C* row, const C*) : floats(~uint32_t{0}, row) {}
    Vec<float> part(int i) const { return floats.part(i); }
  };

  static Value value(const float* x, bool) { return *x; }
  static Vec<float> multiply_add(Vec<float> sum, Value x, Vec<float> part) {
    return sum + splat(x) * part;
  }
  static constexpr int64_t position(int64_t i) { return position_of<C>(i); }
};

#if defined(COSPADI_TARGET_AVX512)

/// Inputs in pairs, when x and the dictionary are both bfloat16: one instruction multiplies a pair
/// by 16 atoms, and the products are exact in float.
struct PairedInputs {
  using Coeff = BFloat16;
  using Value = uint32_t;
  static constexpr int kInputs = 2;

  struct Atoms {
    __m512i lower;
    __m512i upper;
    /// `second` is null where the last input has no partner.
    Atoms(const BFloat16* first, const BFloat16* second) {
      const __m512i a = _mm512_loadu_si512(first);
      const __m512i b = second == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(second);
      lower = _mm512_unpacklo_epi16(a, b);
      upper = _mm512_unpackhi_epi16(a, b);
    }
    Vec<float> part(int i) const { return reinterpret_cast<Vec<float>>(i == 0 ? lower : upper); }
  };

  /// The pair at `x`, floats that are bfloat16.
  static Value value(const float* x, bool has_second) {
    const auto bits = [](float f) { return std::bit_cast<uint32_t>(f); };
    return bits(x[0]) >> 16 | (has_second ? bits(x[1]) & 0xffff0000U : 0);
  }
  static Vec<float> multiply_add(Vec<float> sum, Value x, Vec<float> part) {
    return reinterpret_cast<Vec<float>>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                         reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x))),
                         reinterpret_cast<__m512bh>(part)));
  }
  /// Interleaving works within quarters of a vector.
  static constexpr int64_t position(int64_t i) {
    return 8 * (i % 16 / 4) + i % 4 + (i < 16 ? 0 : 4);
  }
};

#endif

/// sums(r, j) += x(r, i) row_i(j) for kSteps x Inputs::kInputs inputs i in order, whose rows begin
/// at `row`, kRows rows of x and n_words mask words of atoms, the lanes of each word in the order
/// of `Inputs`. `is_whole`: false where the last step's second input does not exist. `kChecked`:
/// the words may reach beyond the dictionary.
template <class Inputs, int kRows, int kSteps, bool kChecked>
inline void add_inputs(const StoredDictionary& dictionary,
                       const typename Inputs::Coeff* row,
                       bool is_whole,
                       int64_t n_words,
                       const typename Inputs::Value (*x)[kSteps],
                       float* sums,
                       int64_t sums_stride) {
  using C = typename Inputs::Coeff;
  constexpr int kParts = static_cast<int>(kMaskWord) / kWidth<float>;
  constexpr int kTogether = kPartsTogether<kRows>;
  constexpr int kInputs = Inputs::kInputs;
  const C* const end = static_cast<const C*>(dictionary.end);
  const int64_t row_bytes = dictionary.stride * static_cast<int64_t>(sizeof(C));
  const int64_t ahead =
      dictionary.stride * (kSteps * kInputs + kDictionaryAhead / std::max<int64_t>(row_bytes, 1));
  C local[kChecked ? kInputs : 1][kMaskWord];
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
      for (int k = 0; k < kSteps; ++k) {
        const C* p[2] = {};
#pragma GCC unroll 2
        for (int n = 0; n < kInputs; ++n) {
          if (n > 0 && k == kSteps - 1 && !is_whole) continue;
          p[n] = row + (k * kInputs + n) * dictionary.stride + word * kMaskWord;
          if constexpr (kChecked) {
            p[n] = readable(p[n], end, local[n]);
          } else if (first == 0) {
            __builtin_prefetch(p[n] + ahead, 0, 2);
          }
        }
        const typename Inputs::Atoms atoms(p[0], p[1]);
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; ++i) {
          const Vec<float> part = atoms.part(first + i);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            sum[r][i] = Inputs::multiply_add(sum[r][i], x[r][k], part);
          }
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
template <class Inputs, int kRows>
inline void multiply_rows_of_x(const StoredDictionary& dictionary,
                               int64_t first,
                               int64_t n_atoms,
                               const float* x,
                               int64_t x_stride,
                               float* out,
                               int64_t out_stride) {
  using C = typename Inputs::Coeff;
  const int64_t n_words = word_count(n_atoms);
  for (int r = 0; r < kRows; ++r) std::fill_n(out + r * out_stride, n_words * kMaskWord, 0.0F);
  const auto add = [&](auto steps, int64_t input) {
    constexpr int kSteps = decltype(steps)::value;
    const C* const row = static_cast<const C*>(dictionary.data) + input * dictionary.stride + first;
    const int64_t n_inputs = std::min<int64_t>(kSteps * Inputs::kInputs, dictionary.d_in - input);
    const bool is_whole = n_inputs == kSteps * Inputs::kInputs;
    typename Inputs::Value values[kRows][kSteps];
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kSteps; ++k) {
        values[r][k] = Inputs::value(x + r * x_stride + input + k * Inputs::kInputs,
                                     is_whole || k + 1 < kSteps);
      }
    }
    // Words of all rows but the last few lie before the dictionary's end: beyond a row comes the
    // next one, whose values reach only sums that nobody reads.
    const C* const last_row = row + (n_inputs - 1) * dictionary.stride;
    const bool is_inside = static_cast<const C*>(dictionary.end) - last_row >= n_words * kMaskWord;
    const int64_t n_free = is_inside ? n_words : n_atoms / kMaskWord;
    add_inputs<Inputs, kRows, kSteps, false>(
        dictionary, row, is_whole, n_free, values, out, out_stride);
    add_inputs<Inputs, kRows, kSteps, true>(dictionary,
                                            row + n_free * kMaskWord,
                                            is_whole,
                                            n_words - n_free,
                                            values,
                                            out + n_free * kMaskWord,
                                            out_stride);
  };
  constexpr int kSteps = kInputsTogether / Inputs::kInputs;
  int64_t input = 0;
  for (; input + kInputsTogether <= dictionary.d_in; input += kInputsTogether) {
    add(std::integral_constant<int, kSteps>{}, input);
  }
  for (; input < dictionary.d_in; input += Inputs::kInputs) {
    add(std::integral_constant<int, 1>{}, input);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int64_t word = 0; word < n_words; ++word) {
      float* const word_out = out + r * out_stride + word * kMaskWord;
      float lanes[kMaskWord];
      std::memcpy(lanes, word_out, sizeof(lanes));
      for (int64_t i = 0; i < kMaskWord; ++i) word_out[Inputs::position(i)] = lanes[i];
    }
  }
}

template <class Inputs>
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
      multiply_rows_of_x<Inputs, kRows>(
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
                                DType x_dtype,
                                const float* x,
                                int64_t x_stride,
                                int64_t rows,
                                float* out,
                                int64_t out_stride) noexcept {
  const auto run = [&](auto inputs) {
    multiply_dictionary_rows<decltype(inputs)>(
        dictionary, first, n_atoms, x, x_stride, rows, out, out_stride);
  };
#if defined(COSPADI_TARGET_AVX512)
  if (x_dtype == DType::kBFloat16 && dictionary.dtype == DType::kBFloat16) {
    return run(PairedInputs{});
  }
#else
  static_cast<void>(x_dtype);
#endif
  switch (dictionary.dtype) {
    case DType::kFloat32:
      return run(SingleInputs<float>{});
    case DType::kBFloat16:
      return run(SingleInputs<BFloat16>{});
    case DType::kFloat16:
      return run(SingleInputs<Float16>{});
  }
}

constexpr LinearKernels make_linear_kernels() {
  return {.max_rows = kFewDictionaryRows,
          .block = kLinearBlock,
          .multiply_dictionary = multiply_dictionary};
}
