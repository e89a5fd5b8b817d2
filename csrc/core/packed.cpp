#include "core/packed.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "core/buffer.hpp"
#include "core/check.hpp"
#include "core/check_typed.hpp"
#include "core/parallel.hpp"
#include "cpu/kernel_table.hpp"

namespace cospadi {
namespace {

using detail::AlignedBuffer;
using detail::require;
using detail::require_shape;

constexpr double kWorkPerThread = 1e5;  // fields: some 100 us

void require_bits(int bits, int lowest, int highest, const char* name) {
  require(bits >= lowest && bits <= highest,
          std::string(name) + ": expected " + std::to_string(lowest) + " .. " +
              std::to_string(highest) + " bits, got " + std::to_string(bits));
}

int team_for(int64_t rows, int64_t cols, int n_threads) {
  return detail::worthwhile_threads(detail::resolve_threads(n_threads, rows),
                                    static_cast<double>(rows) * static_cast<double>(cols),
                                    kWorkPerThread);
}

/// Shapes of the two sides of a packing, and that no size or bit position overflows.
void require_fields(int64_t rows, int64_t n, int bits, int64_t packed_stride, const char* name) {
  require_bits(bits, kMinFieldBits, kMaxFieldBits, "bits");
  detail::checked_product(n, kMaxFieldBits, name);
  detail::checked_product(std::max<int64_t>(rows, 1), packed_stride, "packed");
}

/// First column of the row whose value has no field, or -1.
int64_t first_out_of_range(const int32_t* values, int64_t n, int bits) {
  const int32_t lowest = -(1 << (bits - 1));
  const int32_t highest = (1 << bits) - 1;
  for (int64_t j = 0; j < n; ++j) {
    if (values[j] < lowest || values[j] > highest) return j;
  }
  return -1;
}

void check_values(MatrixView<const int32_t> values, int bits, int team) {
  std::atomic<int64_t> first_row{values.rows};  // the lowest one, whichever thread comes first
  detail::parallel_for(values.rows, team, [&](int64_t i, int) {
    if (first_out_of_range(values.row(i), values.cols, bits) < 0) return;
    int64_t known = first_row.load();
    while (i < known && !first_row.compare_exchange_weak(known, i)) {
    }
  });
  const int64_t row = first_row.load();
  if (row == values.rows) return;
  const int64_t col = first_out_of_range(values.row(row), values.cols, bits);
  throw Error(ErrorCode::kInvalidArgument,
              "values row " + std::to_string(row) + ": expected " +
                  std::to_string(-(1 << (bits - 1))) + " .. " + std::to_string((1 << bits) - 1) +
                  " for " + std::to_string(bits) + " bits, got " +
                  std::to_string(values(row, col)) + " in column " + std::to_string(col));
}

void pack_row(const int32_t* values, int64_t n, int bits, uint8_t* out) {
  const uint32_t field_mask = (uint32_t{1} << bits) - 1;
  uint32_t pending = 0;  // the lowest n_pending bits are written next
  int n_pending = 0;
  for (int64_t j = 0; j < n; ++j) {
    pending |= (static_cast<uint32_t>(values[j]) & field_mask) << n_pending;
    n_pending += bits;
    for (; n_pending >= 8; n_pending -= 8, pending >>= 8) *out++ = static_cast<uint8_t>(pending);
  }
  if (n_pending > 0) *out = static_cast<uint8_t>(pending);
}

void unpack_row(const uint8_t* packed, int64_t n, int bits, bool is_signed, int32_t* out) {
  const uint32_t field_mask = (uint32_t{1} << bits) - 1;
  const uint32_t sign = is_signed ? uint32_t{1} << (bits - 1) : 0;
  uint32_t pending = 0;
  int n_pending = 0;
  for (int64_t j = 0; j < n; ++j) {
    for (; n_pending < bits; n_pending += 8) {
      pending |= static_cast<uint32_t>(*packed++) << n_pending;
    }
    out[j] = static_cast<int32_t>(((pending & field_mask) ^ sign) - sign);
    pending >>= bits;
    n_pending -= bits;
  }
}

}  // namespace

namespace detail {

void require_packed(const PackedCoeffs& coeffs) {
  const CodeFormat format = coeffs.format;
  const bool is_integer = format.kind == CodeKind::kInteger;
  require(is_integer || format.kind == CodeKind::kBFloat, "code_format: unknown kind");
  require_bits(format.bits, is_integer ? 2 : 9, is_integer ? 8 : 16, "code_format");
  require(coeffs.sparsity >= 0, "sparsity: negative");
  checked_product(coeffs.sparsity, kMaxFieldBits, "codes");
  const int64_t d_out = coeffs.codes.rows;
  require(d_out >= 0, "codes: negative size");
  require_shape(coeffs.codes, d_out, packed_row_bytes(coeffs.sparsity, format.bits), "codes");
  checked_product(std::max<int64_t>(d_out, 1), coeffs.codes.stride, "codes");
  require(coeffs.group >= 0,
          "group: expected 0 (one scale per output) or a number of coefficients, got " +
              std::to_string(coeffs.group));
  if (is_integer) {
    const int64_t n_groups = scale_group_count(coeffs.sparsity, coeffs.group);
    require_typed(coeffs.scale, d_out, n_groups, "scale");
  } else {
    require(coeffs.scale.data == nullptr && coeffs.group == 0,
            "scale, group: a floating-point code has neither");
  }
}

cpu::PackedColumns packed_columns(const PackedCoeffs& coeffs) {
  const MatrixView<const uint8_t>& codes = coeffs.codes;
  const bool is_empty = codes.rows == 0 || codes.cols == 0;
  return {.format = coeffs.format,
          .sparsity = coeffs.sparsity,
          .codes = codes.data,
          .stride = is_empty ? 0 : codes.stride,
          .end = is_empty ? codes.data : codes.row(codes.rows - 1) + codes.cols};
}

int64_t scale_group(const PackedCoeffs& coeffs) {
  const int64_t all = std::max<int64_t>(coeffs.sparsity, 1);
  return coeffs.group == 0 ? all : std::min(coeffs.group, all);
}

int64_t decoded_size(int64_t sparsity) {
  return (sparsity + cpu::kFieldBlock - 1) / cpu::kFieldBlock * cpu::kFieldBlock;
}

}  // namespace detail

void pack_fields(MatrixView<const int32_t> values,
                 int bits,
                 MatrixView<uint8_t> packed,
                 int n_threads) {
  require_shape(values, values.rows, values.cols, "values");
  require_fields(values.rows, values.cols, bits, packed.stride, "values");
  require_shape(packed, values.rows, packed_row_bytes(values.cols, bits), "packed");
  const int team = team_for(values.rows, values.cols, n_threads);
  check_values(values, bits, team);
  detail::parallel_for(values.rows, team, [&](int64_t i, int) {
    pack_row(values.row(i), values.cols, bits, packed.row(i));
  });
}

void unpack_fields(MatrixView<const uint8_t> packed,
                   int bits,
                   bool is_signed,
                   MatrixView<int32_t> values,
                   int n_threads) {
  require_shape(values, packed.rows, values.cols, "values");
  require_fields(packed.rows, values.cols, bits, packed.stride, "values");
  require_shape(packed, packed.rows, packed_row_bytes(values.cols, bits), "packed");
  const int team = team_for(values.rows, values.cols, n_threads);
  detail::parallel_for(values.rows, team, [&](int64_t i, int) {
    unpack_row(packed.row(i), values.cols, bits, is_signed, values.row(i));
  });
}

void decode_coeffs(const PackedCoeffs& coeffs, MatrixView<float> out, int n_threads) {
  detail::require_packed(coeffs);
  const int64_t d_out = coeffs.codes.rows;
  const int64_t sparsity = coeffs.sparsity;
  require_shape(out, d_out, sparsity, "out");
  const cpu::SparseGemmKernels& kernels = cpu::kernels().sparse_gemm;
  const cpu::PackedColumns columns = detail::packed_columns(coeffs);
  const int64_t group = detail::scale_group(coeffs);
  const bool is_scaled = coeffs.format.kind == CodeKind::kInteger;
  const int64_t size = detail::decoded_size(sparsity);
  const int64_t n_scales = is_scaled ? coeffs.scale.cols : 0;
  const int team = team_for(d_out, sparsity, n_threads);
  const AlignedBuffer<BFloat16> values(size * team);
  const AlignedBuffer<float> scales(n_scales * team);
  detail::parallel_for(d_out, team, [&](int64_t column, int thread) {
    BFloat16* decoded = values.data() + size * thread;
    kernels.decode_columns(columns, column, 1, decoded, size);
    if (!is_scaled) {
      kernels.load_floats(DType::kBFloat16, sparsity, decoded, out.row(column));
      return;
    }
    float* column_scales = scales.data() + n_scales * thread;
    kernels.load_floats(
        coeffs.scale.dtype, n_scales, detail::element(coeffs.scale, column, 0), column_scales);
    kernels.scale_values(sparsity, decoded, column_scales, group, out.row(column));
  });
}

}  // namespace cospadi
