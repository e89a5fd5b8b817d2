#include "cospadi/mask.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <string>

#include "core/check.hpp"

namespace cospadi {
namespace {

using detail::require;
using detail::require_shape;

void require_atoms(int64_t n_atoms) {
  require(n_atoms >= 0 && n_atoms <= std::numeric_limits<int32_t>::max(),
          "n_atoms: expected 0 .. 2^31 - 1, got " + std::to_string(n_atoms));
}

std::string row_text(const char* name, int64_t row) {
  return std::string(name) + " row " + std::to_string(row) + ": ";
}

int64_t population(const uint8_t* row, int64_t n_bytes) {
  int64_t count = 0;
  int64_t i = 0;
  for (; i + 8 <= n_bytes; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, row + i, sizeof(word));
    count += std::popcount(word);
  }
  for (; i < n_bytes; ++i) count += std::popcount(row[i]);
  return count;
}

void check_indices(MatrixView<const int32_t> indices, int64_t n_atoms) {
  for (int64_t i = 0; i < indices.rows; ++i) {
    int64_t previous = -1;
    for (int64_t t = 0; t < indices.cols; ++t) {
      const int64_t atom = indices(i, t);
      if (atom > previous && atom < n_atoms) {
        previous = atom;
        continue;
      }
      const bool in_range = atom >= 0 && atom < n_atoms;
      throw Error(ErrorCode::kInvalidArgument,
                  row_text("indices", i) +
                      (in_range ? "expected strictly ascending atoms, got " + std::to_string(atom) +
                                      " after " + std::to_string(previous)
                                : "expected atoms in 0 .. " + std::to_string(n_atoms - 1) +
                                      ", got " + std::to_string(atom)));
    }
  }
}

}  // namespace

void validate_mask(MatrixView<const uint8_t> mask, int64_t n_atoms, int64_t sparsity) {
  require_atoms(n_atoms);
  const int64_t row_bytes = mask_row_bytes(n_atoms);
  require_shape(mask, mask.rows, row_bytes, "mask");
  require(sparsity >= 0 && sparsity <= n_atoms,
          "sparsity: expected 0 .. n_atoms = " + std::to_string(n_atoms) + ", got " +
              std::to_string(sparsity));
  const int n_used = static_cast<int>(n_atoms % 8);  // bits in use in the last byte, 0 = all
  for (int64_t i = 0; i < mask.rows; ++i) {
    const uint8_t* row = mask.row(i);
    require(n_used == 0 || (row[row_bytes - 1] >> n_used) == 0,
            row_text("mask", i) + "bits above the last atom " + std::to_string(n_atoms - 1) +
                " must be zero");
    const int64_t count = population(row, row_bytes);
    if (count == sparsity) continue;
    throw Error(ErrorCode::kInvalidArgument,
                row_text("mask", i) + "expected exactly s = " + std::to_string(sparsity) +
                    " set bits, got " + std::to_string(count));
  }
}

void pack_mask(MatrixView<const int32_t> indices, int64_t n_atoms, MatrixView<uint8_t> mask) {
  require_atoms(n_atoms);
  require_shape(indices, indices.rows, indices.cols, "indices");
  require_shape(mask, indices.rows, mask_row_bytes(n_atoms), "mask");
  check_indices(indices, n_atoms);
  for (int64_t i = 0; i < indices.rows; ++i) {
    uint8_t* row = mask.row(i);
    std::fill_n(row, mask.cols, uint8_t{0});
    for (int64_t t = 0; t < indices.cols; ++t) {
      const int32_t atom = indices(i, t);
      row[atom >> 3] = static_cast<uint8_t>(row[atom >> 3] | (1U << (atom & 7)));
    }
  }
}

void unpack_mask(MatrixView<const uint8_t> mask, int64_t n_atoms, MatrixView<int32_t> indices) {
  require_shape(indices, mask.rows, indices.cols, "indices");
  validate_mask(mask, n_atoms, indices.cols);
  for (int64_t i = 0; i < mask.rows; ++i) {
    int32_t* out = indices.row(i);
    for (int64_t byte = 0; byte < mask.cols; ++byte) {
      for (uint32_t bits = mask(i, byte); bits != 0; bits &= bits - 1) {
        *out++ = static_cast<int32_t>(byte * 8 + std::countr_zero(bits));
      }
    }
  }
}

}  // namespace cospadi
