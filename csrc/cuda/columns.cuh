// Tiles of stored columns on their way from global to shared memory.
//
// A column's coefficients and mask bits lie at any byte; each is copied as the 16-byte granules
// that hold it, into a slot of its own, where it keeps its offset within the granule. Granules
// begin at addresses divisible by 16, so those that hold a part of an operand lie within its
// allocation; what is beyond the end of a column is not read.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"
#include "cuda/values.cuh"

namespace cospadi::cuda {

constexpr int kGranule = 16;

/// Shared memory from a byte offset on.
template <class T>
__device__ __forceinline__ T* shared_at(int offset) {
  return reinterpret_cast<T*>(dynamic_shared<uint8_t>() + offset);
}

/// Bytes of a slot for `bytes` bytes at any offset, and one granule that readers may run into.
__host__ __device__ constexpr int slot_bytes(int64_t bytes) {
  return static_cast<int>((bytes + 2 * kGranule - 2) / kGranule * kGranule + kGranule);
}

__host__ __device__ constexpr int64_t value_row_bytes(const CodeOperand& s) {
  return ceil_div(static_cast<int64_t>(s.sparsity) * s.bits, 8);
}
__host__ __device__ constexpr int64_t mask_row_bytes_of(const CodeOperand& s) {
  return s.mask == nullptr ? 0 : ceil_div(s.n_atoms, 8);
}

/// Sizes of a tile in shared memory.
struct TileLayout {
  int columns = 1;
  int value_slot = 0;
  int mask_slot = 0;  ///< 0 without a mask
  __host__ __device__ int bytes() const { return columns * (value_slot + mask_slot); }
};

inline TileLayout tile_layout(const CodeOperand& s, int columns) {
  return {columns, slot_bytes(value_row_bytes(s)), s.mask ? slot_bytes(mask_row_bytes_of(s)) : 0};
}

__device__ __forceinline__ int offset_in_granule(const void* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kGranule);
}
__device__ __forceinline__ const uint8_t* column_values(const CodeOperand& s, int64_t column) {
  return s.values + column * s.value_stride;
}
__device__ __forceinline__ const uint8_t* column_mask(const CodeOperand& s, int64_t column) {
  return s.mask + column * s.mask_stride;
}

/// Starts the copy of granule i of `bytes` bytes at `source` to `slot`, if there is one.
__device__ __forceinline__ void copy_granule(int slot, const uint8_t* source, int bytes, int i) {
  const int offset = offset_in_granule(source);
  const int left = offset + bytes - kGranule * i;
  if (left <= 0) return;
  cp_async<kGranule>(
      shared_at<uint8_t>(slot + kGranule * i), source - offset + kGranule * i, min(left, kGranule));
}

/// Starts the copies of columns first .. min(first + tile.columns, d_out); by all threads.
__device__ __forceinline__ void fetch_tile(const CodeOperand& s,
                                           const TileLayout& tile,
                                           int64_t first,
                                           int shared) {
  const int n_columns = static_cast<int>(min(static_cast<int64_t>(tile.columns), s.d_out - first));
  const int value_bytes = static_cast<int>(value_row_bytes(s));
  const int mask_bytes = static_cast<int>(mask_row_bytes_of(s));
  const int per_value = tile.value_slot / kGranule;
  const int per_column = per_value + tile.mask_slot / kGranule;
  for (int i = static_cast<int>(threadIdx.x); i < n_columns * per_column;
       i += static_cast<int>(blockDim.x)) {
    const int column = i / per_column;
    const int granule = i - column * per_column;
    if (granule < per_value) {
      copy_granule(shared + column * tile.value_slot,
                   column_values(s, first + column),
                   value_bytes,
                   granule);
    } else {
      copy_granule(shared + tile.columns * tile.value_slot + column * tile.mask_slot,
                   column_mask(s, first + column),
                   mask_bytes,
                   granule - per_value);
    }
  }
}

/// Waits for all groups of this thread but the last `left`, 0 to 3.
__device__ __forceinline__ void cp_async_wait_runtime(int left) {
  switch (left) {
    case 0:
      cp_async_wait<0>();
      break;
    case 1:
      cp_async_wait<1>();
      break;
    case 2:
      cp_async_wait<2>();
      break;
    default:
      cp_async_wait<3>();
      break;
  }
}

/// One column of a tile in shared memory.
struct StagedColumn {
  int value_slot;
  int value_offset;  ///< of the first value in its slot
  int mask_slot;     ///< -1 without a mask
  int mask_offset;   ///< of the first byte in its slot
};

__device__ __forceinline__ StagedColumn
staged_column(const CodeOperand& s, const TileLayout& tile, int64_t first, int column, int shared) {
  const int value_slot = shared + column * tile.value_slot;
  const int value_offset = offset_in_granule(column_values(s, first + column));
  if (s.mask == nullptr) return {value_slot, value_offset, -1, 0};
  return {value_slot,
          value_offset,
          shared + tile.columns * tile.value_slot + column * tile.mask_slot,
          offset_in_granule(column_mask(s, first + column))};
}

/// Mask word `word` of a staged column; positions at and above n_atoms are 0.
__device__ __forceinline__ uint32_t staged_mask_word(const StagedColumn& column,
                                                     int n_atoms,
                                                     int word) {
  const int left = n_atoms - kWarpSize * word;
  if (left <= 0) return 0;
  if (column.mask_slot < 0) return low_bits(left);
  return word_at_byte(shared_at<const uint32_t>(column.mask_slot), column.mask_offset + 4 * word) &
         low_bits(left);
}

/// Set bits of a staged column below word `end`, in every lane; by a whole warp.
__device__ __forceinline__ int staged_population(const StagedColumn& column,
                                                 int n_atoms,
                                                 int end,
                                                 int lane) {
  if (column.mask_slot < 0) return min(kWarpSize * end, n_atoms);
  int n = 0;
  for (int word = lane; word < end; word += kWarpSize) {
    n += __popc(staged_mask_word(column, n_atoms, word));
  }
  return __reduce_add_sync(kAllLanes, n);
}

/// Decodes the fields of a staged tile to offset `out`, slots of out_slot elements per column, by
/// all threads; with `kIsScaled` times the scale of their group.
template <class Out, bool kIsScaled>
__device__ __forceinline__ void decode_tile(const CodeOperand& s,
                                            const TileLayout& tile,
                                            int64_t first,
                                            int shared,
                                            int out,
                                            int out_slot) {
  const int n_columns = static_cast<int>(min(static_cast<int64_t>(tile.columns), s.d_out - first));
  const bool is_integer = s.type == ValueType::kIntegerField;
  for (int column = 0; column < n_columns; ++column) {
    const StagedColumn staged = staged_column(s, tile, first, column, shared);
    const auto* words = shared_at<const uint32_t>(staged.value_slot);
    Out* values = shared_at<Out>(out) + column * out_slot;
    for (int t = static_cast<int>(threadIdx.x); t < s.sparsity; t += static_cast<int>(blockDim.x)) {
      const int64_t start = 8 * staged.value_offset + static_cast<int64_t>(t) * s.bits;
      float value = field_value(field_on_top(words, start, s.bits), s.bits, is_integer);
      if constexpr (kIsScaled) value *= scale_of(s, first + column, t);
      from_float(value, values[t]);
    }
  }
}

}  // namespace cospadi::cuda
