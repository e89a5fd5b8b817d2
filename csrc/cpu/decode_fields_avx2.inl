// Decoding of packed coefficients by byte shuffles and variable shifts (see decode_fields.inl).

/// For fields of each width: where the four fields of each half of 8 fields lie.
struct FieldTables {
  struct Width {
    alignas(32) uint8_t bytes[32];  // pshufb: the 4 bytes from the first of each field on
    alignas(32) int32_t shifts[8];  // to the left, so that the field is on top
  };
  Width widths[kMaxFieldBits + 1];
};

constexpr FieldTables make_field_tables() {
  FieldTables tables{};
  for (int bits = kMinFieldBits; bits <= kMaxFieldBits; ++bits) {
    for (int i = 0; i < 8; ++i) {
      const int start = bits * i - (i < 4 ? 0 : bits / 2 * 8);  // from the first byte of its half
      for (int k = 0; k < 4; ++k) {
        tables.widths[bits].bytes[4 * i + k] = static_cast<uint8_t>(start / 8 + k);
      }
      tables.widths[bits].shifts[i] = 32 - bits - start % 8;
    }
  }
  return tables;
}

constexpr FieldTables kFieldTables = make_field_tables();

/// bfloat16 of the 16 integers of four bits, by halves.
struct NibbleTables {
  alignas(16) uint8_t low[16];
  alignas(16) uint8_t high[16];
};

constexpr NibbleTables make_nibble_tables() {
  NibbleTables tables{};
  for (uint32_t field = 0; field < 16; ++field) {
    const int value = static_cast<int>(field) - (field < 8 ? 0 : 16);
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
    tables.low[field] = static_cast<uint8_t>(bits >> 16);
    tables.high[field] = static_cast<uint8_t>(bits >> 24);
  }
  return tables;
}

constexpr NibbleTables kNibbleTables = make_nibble_tables();

/// A block of integers of four bits: too few different ones to compute each.
struct NibbleDecoder {
  __m256i low = _mm256_broadcastsi128_si256(
      _mm_load_si128(reinterpret_cast<const __m128i*>(kNibbleTables.low)));
  __m256i high = _mm256_broadcastsi128_si256(
      _mm_load_si128(reinterpret_cast<const __m128i*>(kNibbleTables.high)));

  void operator()(const uint8_t* source, BFloat16* out) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    const __m128i even = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    // fields 0-7 and 16-23 in the first half, so that joining halves of words leaves them in order
    const __m256i fields = _mm256_permute4x64_epi64(
        _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd)), 0xd8);
    const __m256i lows = _mm256_shuffle_epi8(low, fields);
    const __m256i highs = _mm256_shuffle_epi8(high, fields);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi8(lows, highs));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_unpackhi_epi8(lows, highs));
  }
};

template <CodeKind kKind>
struct FieldDecoder {
  int bits;
  __m256i bytes;
  __m256i shifts;
  __m128i unused;  // bits below a field that is on top

  explicit FieldDecoder(int bits_)
      : bits(bits_),
        bytes(
            _mm256_load_si256(reinterpret_cast<const __m256i*>(kFieldTables.widths[bits_].bytes))),
        shifts(
            _mm256_load_si256(reinterpret_cast<const __m256i*>(kFieldTables.widths[bits_].shifts))),
        unused(_mm_cvtsi32_si128(32 - bits_)) {}

  /// Eight fields from `source` on as the upper halves of floats, moved to the lower halves.
  __m256i decode_eight(const uint8_t* source) const {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + bits / 2));
    const __m256i windows = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), bytes);
    const __m256i fields = _mm256_sllv_epi32(windows, shifts);
    if constexpr (kKind == CodeKind::kBFloat) {
      const __m256i bare = _mm256_sll_epi32(_mm256_srl_epi32(fields, unused), unused);
      return _mm256_srli_epi32(bare, 16);
    } else {
      const __m256 values = _mm256_cvtepi32_ps(_mm256_sra_epi32(fields, unused));
      return _mm256_srli_epi32(_mm256_castps_si256(values), 16);
    }
  }

  void operator()(const uint8_t* source, BFloat16* out) const {
    for (int i = 0; i < kFieldBlock; i += 16) {
      const __m256i first = decode_eight(source + bits * i / 8);
      const __m256i second = decode_eight(source + bits * (i + 8) / 8);
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), words);
    }
  }
};

/// Calls `body` with the decoder of a format.
template <class Body>
inline void with_decoder(const CodeFormat& format, const Body& body) {
  if (format.kind == CodeKind::kBFloat) {
    body(FieldDecoder<CodeKind::kBFloat>(format.bits));
  } else if (format.bits == 4) {
    body(NibbleDecoder{});
  } else {
    body(FieldDecoder<CodeKind::kInteger>(format.bits));
  }
}
