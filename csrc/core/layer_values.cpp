#include "core/layer_values.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/finite.hpp"
#include "cospadi/mask.hpp"
#include "cospadi/status.hpp"

namespace cospadi::detail {
namespace {

[[noreturn]] void fail(const std::string& file, const std::string& name, const std::string& what) {
  throw Error(ErrorCode::kCheckpoint, file + ": " + name + ": " + what);
}

/// Whether a 16-bit float with this exponent mask is finite, for all of them.
bool halves_finite(const uint16_t* values, int64_t n, uint16_t exponent) {
  uint16_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    bad = static_cast<uint16_t>(bad | ((values[i] & exponent) == exponent ? 1 : 0));
  }
  return bad == 0;
}

constexpr uint16_t kBFloat16Exponent = 0x7f80;
constexpr uint16_t kFloat16Exponent = 0x7c00;
constexpr const char* kNotFinite = "holds a value that is not finite";

float bfloat16_value(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value = 0.0F;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

void check_finite(const PlacedTensor& tensor, const std::string& name) {
  const int64_t n = tensor.bytes / type_bytes(tensor.type);
  bool is_finite = false;
  if (tensor.type == TensorType::kF32) {
    is_finite = all_finite(reinterpret_cast<const float*>(tensor.data), n);
  } else {
    const uint16_t exponent =
        tensor.type == TensorType::kBF16 ? kBFloat16Exponent : kFloat16Exponent;
    is_finite = halves_finite(reinterpret_cast<const uint16_t*>(tensor.data), n, exponent);
  }
  if (!is_finite) fail(tensor.file, name, kNotFinite);
}

void check_scales(const PlacedTensor& tensor, const std::string& name) {
  check_finite(tensor, name);
  const auto* const values = reinterpret_cast<const uint16_t*>(tensor.data);
  const auto is_positive = [](uint16_t bits) { return bits != 0 && bits < 0x8000; };
  if (!std::all_of(values, values + tensor.bytes / 2, is_positive)) {
    fail(tensor.file, name, "holds a scale that is not positive");
  }
}

void check_mask(const PlacedTensor& tensor,
                int64_t n_atoms,
                int64_t sparsity,
                const std::string& name) {
  try {
    validate_mask({reinterpret_cast<const uint8_t*>(tensor.data), tensor.shape[0], tensor.shape[1]},
                  n_atoms,
                  sparsity);
  } catch (const Error& error) {
    fail(tensor.file, name, error.what());
  }
}

void check_integers(const PlacedTensor& tensor,
                    const PlacedTensor& scale,
                    const std::string& name) {
  const int64_t cols = tensor.shape[1];
  for (int64_t row = 0; row < tensor.shape[0]; ++row) {
    const auto* const values = reinterpret_cast<const int8_t*>(tensor.data) + row * cols;
    int largest = 0;
    for (int64_t j = 0; j < cols; ++j) largest = std::max(largest, std::abs(int{values[j]}));
    if (largest > 127) {
      fail(tensor.file, name, "row " + std::to_string(row) + " holds -128, expected at least -127");
    }
    const float step = bfloat16_value(reinterpret_cast<const uint16_t*>(scale.data)[row]);
    if (!std::isfinite(static_cast<float>(largest) * step)) fail(tensor.file, name, kNotFinite);
  }
}

void check_packed(const PackedCoeffs& coeffs,
                  const std::string& file,
                  const std::string& name,
                  int n_threads) {
  constexpr int64_t kValues = int64_t{1} << 18;  // decoded at a time
  const int64_t n = coeffs.sparsity;
  const int bits = coeffs.format.bits;
  const auto used = static_cast<int>(n % 8 * bits % 8);  // bits in use in the last byte, 0: all
  const bool is_integer = coeffs.format.kind == CodeKind::kInteger;
  const int32_t least = -(1 << (bits - 1));
  const int64_t block = std::clamp<int64_t>(kValues / n, 1, coeffs.codes.rows);
  std::vector<float> values(static_cast<size_t>(block * n));
  std::vector<int32_t> fields(is_integer ? values.size() : 0);
  for (int64_t first = 0; first < coeffs.codes.rows; first += block) {
    const int64_t rows = std::min(block, coeffs.codes.rows - first);
    PackedCoeffs part = coeffs;
    part.codes = {coeffs.codes.row(first), rows, coeffs.codes.cols, coeffs.codes.stride};
    for (int64_t row = 0; row < rows && used != 0; ++row) {
      if (part.codes(row, part.codes.cols - 1) >> used != 0) {
        fail(file,
             name,
             "row " + std::to_string(first + row) + " has a padding bit set beyond its " +
                 std::to_string(n) + " fields");
      }
    }
    if (is_integer) {
      unpack_fields(part.codes, bits, true, {fields.data(), rows, n}, n_threads);
      const auto end = fields.begin() + rows * n;
      const auto found = std::find(fields.begin(), end, least);
      if (found != end) {
        fail(file,
             name,
             "row " + std::to_string(first + (found - fields.begin()) / n) + " holds " +
                 std::to_string(least) + ", expected at least " + std::to_string(least + 1));
      }
      part.scale.data =
          static_cast<const uint16_t*>(coeffs.scale.data) + first * coeffs.scale.stride;
      part.scale.rows = rows;
    }
    decode_coeffs(part, {values.data(), rows, n}, n_threads);
    if (!all_finite(values.data(), rows * n)) fail(file, name, kNotFinite);
  }
}

}  // namespace cospadi::detail
