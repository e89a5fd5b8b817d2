// Decoding of packed coefficients by VBMI byte permutes (see decode_fields.inl).

/// For fields of each width: four fields fit into every quadword, whatever their width.
struct FieldTables {
  struct Width {
    alignas(64) uint8_t bytes[64];    // vpermb: the 8 bytes from the first of each four fields on
    alignas(64) uint8_t shifts[64];   // vpmultishiftqb: the 16 bits from the start of each field on
    alignas(64) uint16_t values[64];  // of integers up to 6 bits: bfloat16 by the lower 6 bits
  };
  Width widths[kMaxFieldBits + 1];
};

/// Bits of the bfloat16 of an integer, |value| <= 256.
constexpr uint16_t bfloat16_of(int value) {
  return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, static_cast<float>(value)) >> 16);
}

constexpr FieldTables make_field_tables() {
  FieldTables tables{};
  for (int bits = kMinFieldBits; bits <= kMaxFieldBits; ++bits) {
    FieldTables::Width& width = tables.widths[bits];
    for (int i = 0; i < 32; ++i) {
      const int quad_byte = bits * (i / 4) / 2;
      const int start = bits * i - 8 * quad_byte;
      for (int k = 0; k < 2; ++k) {
        width.bytes[2 * i + k] = static_cast<uint8_t>(quad_byte + 2 * (i % 4) + k);
        width.shifts[2 * i + k] = static_cast<uint8_t>((start + 8 * k) % 64);
      }
    }
    const int sign = 1 << (bits - 1);
    for (int i = 0; i < 64; ++i)
      width.values[i] = bfloat16_of(((i & (2 * sign - 1)) ^ sign) - sign);
  }
  return tables;
}

constexpr FieldTables kFieldTables = make_field_tables();

/// Fields as the lower bits of words, whatever above them.
struct FieldWords {
  __m512i bytes;
  __m512i shifts;

  explicit FieldWords(int bits)
      : bytes(_mm512_load_si512(kFieldTables.widths[bits].bytes)),
        shifts(_mm512_load_si512(kFieldTables.widths[bits].shifts)) {}

  __m512i operator()(const uint8_t* source) const {
    return _mm512_multishift_epi64_epi8(shifts,
                                        _mm512_permutexvar_epi8(bytes, _mm512_loadu_si512(source)));
  }
};

struct BFloatDecoder {
  FieldWords words;
  __m128i unused;

  explicit BFloatDecoder(int bits) : words(bits), unused(_mm_cvtsi32_si128(16 - bits)) {}

  void operator()(const uint8_t* source, BFloat16* out) const {
    _mm512_storeu_si512(out, _mm512_sll_epi16(words(source), unused));
  }
};

/// Integers of at most 6 bits, by table.
struct NarrowDecoder {
  static constexpr int kMaxBits = 6;

  FieldWords words;
  __m512i low_values;
  __m512i high_values;

  explicit NarrowDecoder(int bits)
      : words(bits),
        low_values(_mm512_load_si512(kFieldTables.widths[bits].values)),
        high_values(_mm512_load_si512(kFieldTables.widths[bits].values + 32)) {}

  void operator()(const uint8_t* source, BFloat16* out) const {
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(low_values, words(source), high_values));
  }
};

/// What `integers_to_bfloat16` looks up; its constants are in memory, because compilers otherwise
/// build them anew in the loop.
struct IntegerTable {
  alignas(64) uint16_t values[64];  // bfloat16 of 0 .. 63
  alignas(64) uint16_t largest[32];
  alignas(64) uint16_t offset[32];
  alignas(64) uint16_t sign[32];
};

constexpr IntegerTable make_integer_table() {
  IntegerTable table{};
  for (int i = 0; i < 64; ++i) table.values[i] = bfloat16_of(i);
  for (int i = 0; i < 32; ++i) {
    table.largest[i] = 63;
    table.offset[i] = 0x4200;
    table.sign[i] = 0x8000;
  }
  return table;
}

constexpr IntegerTable kIntegerTable = make_integer_table();

/// 16-bit integers up to 128 in magnitude m to bfloat16: by table below 64, and from 64 on, where
/// one unit of m is two of the fraction, as 0x4200 + 2 m.
inline __m512i integers_to_bfloat16(__m512i integers) {
  const __m512i magnitude = _mm512_abs_epi16(integers);
  const __m512i by_table = _mm512_permutex2var_epi16(_mm512_load_si512(kIntegerTable.values),
                                                     magnitude,
                                                     _mm512_load_si512(kIntegerTable.values + 32));
  const __mmask32 is_large =
      _mm512_cmpgt_epi16_mask(magnitude, _mm512_load_si512(kIntegerTable.largest));
  const __m512i value = _mm512_mask_add_epi16(by_table,
                                              is_large,
                                              _mm512_add_epi16(magnitude, magnitude),
                                              _mm512_load_si512(kIntegerTable.offset));
  constexpr int kAndOr = 0xea;  // (a & b) | c
  return _mm512_ternarylogic_epi64(integers, _mm512_load_si512(kIntegerTable.sign), value, kAndOr);
}

/// Integers of 7 or 8 bits.
struct WideDecoder {
  FieldWords words;
  __m128i unused;

  explicit WideDecoder(int bits) : words(bits), unused(_mm_cvtsi32_si128(16 - bits)) {}

  void operator()(const uint8_t* source, BFloat16* out) const {
    const __m512i integers = _mm512_sra_epi16(_mm512_sll_epi16(words(source), unused), unused);
    _mm512_storeu_si512(out, integers_to_bfloat16(integers));
  }
};

/// Calls `body` with the decoder of a format.
template <class Body>
inline void with_decoder(const CodeFormat& format, const Body& body) {
  if (format.kind == CodeKind::kBFloat) return body(BFloatDecoder(format.bits));
  if (format.bits <= NarrowDecoder::kMaxBits) return body(NarrowDecoder(format.bits));
  body(WideDecoder(format.bits));
}
