// Checks of the values in a compressed module's tensors (FORMAT.md section 3). Each throws
// Error(kCheckpoint) that names the tensor.
#pragma once

#include <string>

#include "core/checkpoint_files.hpp"
#include "cospadi/checkpoint.hpp"
#include "cospadi/matrix.hpp"
#include "cospadi/packed.hpp"

namespace cospadi::detail {

/// Numbers of kF32, kBF16 or kF16 are finite.
void check_finite(const PlacedTensor& tensor, const std::string& name);

/// Scales of kBF16 are finite and positive.
void check_scales(const PlacedTensor& tensor, const std::string& name);

/// Every row of a mask has `sparsity` bits and no padding bit.
void check_mask(const PlacedTensor& tensor,
                int64_t n_atoms,
                int64_t sparsity,
                const std::string& name);

/// Integers [rows x cols] are not -128, and finite after the scale of their row.
void check_integers(const PlacedTensor& tensor, const PlacedTensor& scale, const std::string& name);

/// Packed fields have zero padding and are in range, and what they decode to is finite.
void check_packed(const PackedCoeffs& coeffs,
                  const std::string& file,
                  const std::string& name,
                  int n_threads);

}  // namespace cospadi::detail
