// Decoding of packed coefficients without special instructions (see decode_fields.inl).

template <CodeKind kKind>
struct FieldDecoder {
  int bits;

  explicit FieldDecoder(int bits_) : bits(bits_) {}

  void operator()(const uint8_t* source, BFloat16* out) const {
    for (int i = 0; i < kFieldBlock; ++i) {
      const int start = bits * i;
      uint32_t window;  // a field begins within its first byte, so 7 + 16 bits are enough
      std::memcpy(&window, source + start / 8, sizeof(window));
      const uint32_t field = window << (32 - bits - start % 8);  // the field is on top
      if constexpr (kKind == CodeKind::kBFloat) {
        out[i].bits = static_cast<uint16_t>((field >> (32 - bits)) << (16 - bits));
      } else {
        const auto value = static_cast<float>(static_cast<int32_t>(field) >> (32 - bits));
        out[i].bits = static_cast<uint16_t>(float_bits(value) >> 16);
      }
    }
  }
};

/// Calls `body` with the decoder of a format.
template <class Body>
inline void with_decoder(const CodeFormat& format, const Body& body) {
  if (format.kind == CodeKind::kBFloat) {
    body(FieldDecoder<CodeKind::kBFloat>(format.bits));
  } else {
    body(FieldDecoder<CodeKind::kInteger>(format.bits));
  }
}
