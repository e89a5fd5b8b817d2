// Conversions between float and the 16-bit storage types, in plain code that compilers vectorise.

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float to_float(float x) { return x; }

inline float to_float(Int8 x) { return static_cast<float>(x.value); }

inline float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Float16 x) {
  // The ten fraction bits and the exponent moved to their place give the value times 2^-112, also
  // for subnormals: a float holds them all.
  const uint32_t magnitude = (x.bits & 0x7fffU) << 13;
  const uint32_t scaled = float_bits(bits_float(magnitude) * 0x1p112F);
  const uint32_t special = magnitude | 0x7f800000U;  // infinity and NaN: exponent of all ones
  const uint32_t bits = (x.bits & 0x7c00U) == 0x7c00U ? special : scaled;
  return bits_float(bits | (static_cast<uint32_t>(x.bits & 0x8000U) << 16));
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;  // to nearest even
  const uint32_t quiet_nan = (bits >> 16) | 0x40U;
  const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
  return {static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffU;
  // Normal: rebias the exponent (127 to 15) and round to nearest even at bit 13; a carry out of the
  // fraction is the right next exponent, up to infinity.
  const uint32_t normal = (magnitude + 0xfffU + ((magnitude >> 13) & 1U) - (112U << 23)) >> 13;
  // Subnormal: next to 0.5 a float's last bit is 2^-24, so the addition rounds for us.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5F) - float_bits(0.5F);
  const uint32_t special = magnitude > 0x7f800000U ? 0x7e00U : 0x7c00U;
  uint32_t half = magnitude < 0x38800000U ? subnormal : normal;
  half = magnitude >= 0x47800000U ? special : half;
  return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000U))};
}

template <class T>
void convert_to_float(int64_t n, const void* source, float* out) {
  const T* in = static_cast<const T*>(source);
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}

/// out[i] = float(source[i]), i < n.
inline void load_floats(DType dtype, int64_t n, const void* source, float* out) noexcept {
  switch (dtype) {
    case DType::kFloat32:
      return convert_to_float<float>(n, source, out);
    case DType::kBFloat16:
      return convert_to_float<BFloat16>(n, source, out);
    case DType::kFloat16:
      return convert_to_float<Float16>(n, source, out);
  }
}

template <class T, bool kScaled, bool kBiased>
void finish_values(int64_t n, const float* values, const float* scale, const float* bias, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = kScaled ? values[i] * scale[i] : values[i];
    out[i] = from_float<T>(kBiased ? value + bias[i] : value);
  }
}

template <class T>
void scale_add_and_store(
    int64_t n, const float* values, const float* scale, const float* bias, void* out) {
  T* y = static_cast<T*>(out);
  if (scale == nullptr) {
    if (bias == nullptr) return finish_values<T, false, false>(n, values, scale, bias, y);
    return finish_values<T, false, true>(n, values, scale, bias, y);
  }
  if (bias == nullptr) return finish_values<T, true, false>(n, values, scale, bias, y);
  return finish_values<T, true, true>(n, values, scale, bias, y);
}

/// out[i] = values[i] * scale[i] + bias[i], i < n, rounded once to `dtype`; `scale` and `bias` may
/// be null.
inline void store_floats(DType dtype,
                         int64_t n,
                         const float* values,
                         const float* scale,
                         const float* bias,
                         void* out) noexcept {
  switch (dtype) {
    case DType::kFloat32:
      return scale_add_and_store<float>(n, values, scale, bias, out);
    case DType::kBFloat16:
      return scale_add_and_store<BFloat16>(n, values, scale, bias, out);
    case DType::kFloat16:
      return scale_add_and_store<Float16>(n, values, scale, bias, out);
  }
}
