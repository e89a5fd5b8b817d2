// Packed coefficients to bfloat16, column by column.
//
// Included after decode_fields_<isa>.inl, which gives `FieldDecoder<kind>(bits)`: a call decodes
// one block of kFieldBlock fields, with kReadableBytes readable from its source on. Both kinds are
// exact in bfloat16: its 8 significant bits hold every integer up to 256.

/// What any decoder may read from the start of a block on: a block has at most 64 bytes, and the
/// last fields are loaded with up to 16 bytes more than they need.
constexpr int64_t kReadableBytes = 80;

inline void decode_columns(const PackedColumns& s,
                           int64_t first,
                           int64_t n_columns,
                           BFloat16* out,
                           int64_t out_stride) noexcept {
  const int64_t step = kFieldBlock / 8 * s.format.bits;
  const int64_t sparsity = s.sparsity;
  const uint8_t* const end = s.end;
  with_decoder(s.format, [&](const auto decoder) {
    for (int64_t c = 0; c < n_columns; ++c) {
      const uint8_t* source = s.codes + (first + c) * s.stride;
      BFloat16* column = out + c * out_stride;
      int64_t j = 0;
      for (; j < sparsity && end - source >= kReadableBytes; j += kFieldBlock, source += step) {
        __builtin_prefetch(source + kPrefetchBytes, 0, 2);
        decoder(source, column + j);
      }
      for (; j < sparsity; j += kFieldBlock, source += step) {
        uint8_t local[kReadableBytes] = {};
        std::memcpy(
            local, source, static_cast<size_t>(std::min<int64_t>(end - source, kReadableBytes)));
        decoder(local, column + j);
      }
    }
  });
}

inline void scale_values(
    int64_t n, const BFloat16* values, const float* scales, int64_t group, float* out) noexcept {
  for (int64_t i = 0; i < n; i += group, ++scales) {
    const float scale = *scales;
    const int64_t end = std::min(n, i + group);
    for (int64_t j = i; j < end; ++j) out[j] = to_float(values[j]) * scale;
  }
}
