// Checks and conversions of packed coefficients shared by packed.cpp and sparse_gemm.cpp.
#pragma once

#include <cstdint>

#include "cospadi/packed.hpp"
#include "cpu/sparse_gemm_types.hpp"

namespace cospadi::detail {

/// Throws Error(kInvalidArgument) unless format, sizes, strides and pointers fit together.
void require_packed(const PackedCoeffs& coeffs);

/// The coefficients as the kernels take them.
cpu::PackedColumns packed_columns(const PackedCoeffs& coeffs);

/// Fields that share a scale; all of a column without groups. At least 1.
int64_t scale_group(const PackedCoeffs& coeffs);

/// Values of one decoded column: whole blocks.
int64_t decoded_size(int64_t sparsity);

}  // namespace cospadi::detail
