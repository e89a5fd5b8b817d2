// y = z S + bias for up to kTensorRows rows on the tensor cores: S is read once, as it is stored,
// and expanded tile by tile in shared memory.
//
// A block walks over tiles of eight columns, some of which are on their way while one is
// multiplied. Its warps divide the atoms among them, so that each keeps its part of z in registers
// as the left operand of m16n8k16; the right operand is the tile of S, eight columns wide. As in
// multiply_few.cu a lane takes four neighbouring positions of a column, but a coefficient costs a
// load, a selection and half of a store whatever the number of rows.
#include <algorithm>
#include <type_traits>

#include "cuda/columns.cuh"
#include "cuda/launch.cuh"

namespace cospadi::cuda {
namespace {

constexpr int kColumns = 8;               // of a tile: n of the product
constexpr int kChunk = 4 * kWarpSize;     // atoms expanded at once by a warp
constexpr int kSlices = kChunk / 16;      // products of a chunk
constexpr int kRowElements = kChunk + 8;  // of an expanded column: the padding spreads the banks
constexpr int kMaxWarps = 16;
constexpr int kMaxStages = 4;
constexpr int kRegisterChunks = 2;  // chunks of z that a warp can keep in registers

struct TensorPlan {
  TileLayout tile;
  int n_chunks = 1;
  int chunks_per_warp = 1;
  int n_warps = 1;
  int n_stages = 2;
  int decoded_slot = 0;  ///< elements of a decoded column; 0: used as they are stored
  int decoded_bytes = 0;
  bool are_pairs_aligned = false;

  __host__ __device__ int n_words() const { return 4 * n_chunks; }
  __host__ __device__ int table_bytes() const { return kColumns * n_words() * 8; }
};

/// One word of a column's mask, and how many coefficients come before it.
struct alignas(8) WordStart {
  uint32_t bits;
  int start;
};

/// Bits of z(row, atom) and z(row, atom + 1), the first in the lower half; zeros beyond the ends.
template <class Z>
__device__ __forceinline__ uint32_t
load_pair(const RowsOperand& z, bool is_aligned, int row, int atom) {
  const int n = z.n_first + z.n_second;
  if (row >= z.rows) return 0;
  if (is_aligned) {
    if (atom >= n) return 0;
    const Z* source =
        atom < z.n_first
            ? static_cast<const Z*>(z.first) + row * z.first_stride + atom
            : static_cast<const Z*>(z.second) + row * z.second_stride + (atom - z.n_first);
    return *reinterpret_cast<const uint32_t*>(source);
  }
  uint32_t pair = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int a = atom + h;
    if (a >= n) continue;
    const auto* bits =
        a < z.n_first
            ? static_cast<const uint16_t*>(z.first) + row * z.first_stride + a
            : static_cast<const uint16_t*>(z.second) + row * z.second_stride + (a - z.n_first);
    pair |= static_cast<uint32_t>(*bits) << (16 * h);
  }
  return pair;
}

/// The left operand for 16 atoms from `atom` on: rows g and g + 8 of lane 4 g + t.
template <class Z, bool kHasUpperRows>
__device__ __forceinline__ void load_slice(
    const RowsOperand& z, bool is_aligned, int atom, int lane, uint32_t (&a)[4]) {
  const int g = lane / 4;
  const int own = atom + 2 * (lane % 4);
  a[0] = load_pair<Z>(z, is_aligned, g, own);
  a[2] = load_pair<Z>(z, is_aligned, g, own + 8);
  a[1] = kHasUpperRows ? load_pair<Z>(z, is_aligned, g + 8, own) : 0;
  a[3] = kHasUpperRows ? load_pair<Z>(z, is_aligned, g + 8, own + 8) : 0;
}

template <class Z>
__device__ __forceinline__ void multiply_add(float (&c)[4],
                                             const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Z, __half>) {
    mma_f16(c, a, b);
  } else {
    mma_bf16(c, a, b);
  }
}

/// Writes the words of every column of a tile and the coefficients before each; a warp per column.
__device__ __forceinline__ void write_table(const CodeOperand& s,
                                            const TensorPlan& plan,
                                            int64_t first,
                                            int warp,
                                            int lane,
                                            int tile,
                                            int table) {
  for (int column = warp; column < kColumns; column += plan.n_warps) {
    const bool is_column = first + column < s.d_out;
    const StagedColumn staged = staged_column(s, plan.tile, first, is_column ? column : 0, tile);
    int before = 0;
    for (int i = 0; i < plan.n_words(); i += kWarpSize) {
      const int word = i + lane;
      const uint32_t bits = is_column ? staged_mask_word(staged, s.n_atoms, word) : 0;
      const int start = before + sum_of_lower_lanes(__popc(bits), lane);
      before = __shfl_sync(kAllLanes, start + __popc(bits), kWarpSize - 1);
      if (word < plan.n_words()) {
        shared_at<WordStart>(table)[column * plan.n_words() + word] = {bits, start};
      }
    }
  }
}

/// Expands a chunk of all columns of a tile to offset `out`, [kColumns x kRowElements] of 16 bits;
/// by one warp.
__device__ __forceinline__ void expand_chunk(const CodeOperand& s,
                                             const TensorPlan& plan,
                                             int64_t first,
                                             int chunk,
                                             int lane,
                                             int tile,
                                             int decoded,
                                             int table,
                                             int out) {
  const int shift = 4 * (lane % 8);
  const uint32_t shared = shared_address(shared_at<uint8_t>(0));
#pragma unroll 4
  for (int column = 0; column < kColumns; ++column) {
    const WordStart word =
        shared_at<const WordStart>(table)[column * plan.n_words() + 4 * chunk + lane / 8];
    // of a column beyond the last one only the address is computed: it has no bits
    const int values =
        plan.decoded_slot != 0
            ? decoded + 2 * column * plan.decoded_slot
            : tile + column * plan.tile.value_slot +
                  offset_in_granule(column_values(s, min(first + column, int64_t{s.d_out} - 1)));
    // a mask that lies never reads beyond the slot
    uint32_t at =
        shared + values + 2 * min(word.start + __popc(word.bits & ((1U << shift) - 1)), s.sparsity);
    const uint32_t bits = word.bits >> shift;
    uint32_t value[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      value[k] = take_shared_16(at, bits & 1U << k);
    }
    *shared_at<uint2>(out + 2 * (column * kRowElements + 4 * lane)) =
        make_uint2(value[0] | value[1] << 16, value[2] | value[3] << 16);
  }
}

/// Adds the warps' parts of a tile and writes y.
__device__ __forceinline__ void write_tile(const CodeOperand& s,
                                           const OutputOperand& y,
                                           int n_warps,
                                           int64_t first,
                                           int first_row,
                                           int n_rows,
                                           int expanded) {
  for (int i = static_cast<int>(threadIdx.x); i < kTensorRows * kColumns;
       i += static_cast<int>(blockDim.x)) {
    const int row = i / kColumns;
    const int64_t output = first + i % kColumns;
    if (row >= n_rows || output >= s.d_out) continue;
    float sum = 0.0F;
    for (int w = 0; w < n_warps; ++w) {
      sum += shared_at<const float>(expanded + w * kColumns * kRowElements * 2)[i];
    }
    if (s.type == ValueType::kIntegerField) sum *= scale_of(s, output, 0);
    if (y.bias != nullptr) sum += load_element(y.bias, y.bias_dtype, output);
    store_element(sum, y.data, y.dtype, (first_row + row) * y.stride + output);
  }
}

template <class Z, bool kHasUpperRows, bool kInRegisters>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 1)
    tensor_kernel(RowsOperand z, CodeOperand s, OutputOperand y, TensorPlan plan) {
  // byte offsets: the tiles, their words, a decoded tile, and an expanded chunk of every warp
  const int tiles = 0;
  const int table = tiles + plan.n_stages * plan.tile.bytes();
  const int decoded = table + plan.table_bytes();
  const int expanded = decoded + plan.decoded_bytes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int own_expanded = expanded + warp * kColumns * kRowElements * 2;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kColumns;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int first_row = static_cast<int>(blockIdx.y) * kTensorRows;
  RowsOperand own = z;
  own.rows = min(z.rows - first_row, kTensorRows);
  own.first = static_cast<const Z*>(z.first) + first_row * z.first_stride;
  own.second = static_cast<const Z*>(z.second) + first_row * z.second_stride;

  for (int i = 0; i < plan.n_stages - 1; ++i) {
    const int64_t first = begin + i * step;
    if (first < s.d_out) fetch_tile(s, plan.tile, first, tiles + i * plan.tile.bytes());
    cp_async_commit();
  }
  const int first_chunk = warp * plan.chunks_per_warp;
  const int end_chunk = min(first_chunk + plan.chunks_per_warp, plan.n_chunks);
  uint32_t rows[kInRegisters ? kRegisterChunks : 1][kSlices][4];
  if constexpr (kInRegisters) {
#pragma unroll
    for (int i = 0; i < kRegisterChunks; ++i) {
#pragma unroll
      for (int k = 0; k < kSlices; ++k) {
        // beyond the last chunk of a warp: zeros or another warp's, never multiplied
        load_slice<Z, kHasUpperRows>(
            own, plan.are_pairs_aligned, (first_chunk + i) * kChunk + 16 * k, lane, rows[i][k]);
      }
    }
  }

  int turn = 0;
  for (int64_t first = begin; first < s.d_out; first += step, ++turn) {
    cp_async_wait_runtime(plan.n_stages - 2);
    __syncthreads();  // this tile is there, and everyone has done with the one before
    const int64_t ahead = first + (plan.n_stages - 1) * step;
    if (ahead < s.d_out) {
      fetch_tile(s,
                 plan.tile,
                 ahead,
                 tiles + (turn + plan.n_stages - 1) % plan.n_stages * plan.tile.bytes());
    }
    cp_async_commit();
    const int tile = tiles + turn % plan.n_stages * plan.tile.bytes();
    write_table(s, plan, first, warp, lane, tile, table);
    if (plan.decoded_slot != 0) {
      decode_tile<Z, false>(s, plan.tile, first, tile, decoded, plan.decoded_slot);
    }
    __syncthreads();
    float sum[4] = {};
    for (int i = 0; i < (kInRegisters ? kRegisterChunks : plan.chunks_per_warp); ++i) {
      const int chunk = first_chunk + i;
      if (chunk >= end_chunk) break;
      expand_chunk(s, plan, first, chunk, lane, tile, decoded, table, own_expanded);
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kSlices; k += 2) {
        // matrix m of four: the eight columns at atoms 16 k + 8 m and on
        uint32_t b[4];
        ldmatrix_x4(
            b, shared_at<uint16_t>(own_expanded) + lane % 8 * kRowElements + 16 * k + lane / 8 * 8);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t pair[2] = {b[2 * h], b[2 * h + 1]};
          if constexpr (kInRegisters) {
            // constant indices, or the registers would move to memory
            if (i == 0) {
              multiply_add<Z>(sum, rows[0][k + h], pair);
            } else {
              multiply_add<Z>(sum, rows[kRegisterChunks - 1][k + h], pair);
            }
          } else {
            uint32_t a[4];
            load_slice<Z, kHasUpperRows>(
                own, plan.are_pairs_aligned, chunk * kChunk + 16 * (k + h), lane, a);
            multiply_add<Z>(sum, a, pair);
          }
        }
      }
      __syncwarp();  // before the next chunk, or the sums, take its place
    }
    float* part = shared_at<float>(own_expanded);  // [kTensorRows x kColumns]
    const int at = lane / 4 * kColumns + lane % 4 * 2;
    *reinterpret_cast<float2*>(part + at) = make_float2(sum[0], sum[1]);
    *reinterpret_cast<float2*>(part + at + 8 * kColumns) = make_float2(sum[2], sum[3]);
    __syncthreads();
    write_tile(s, y, plan.n_warps, first, first_row, own.rows, expanded);
  }
}

static_assert(kTensorRows == 16 && kRegisterChunks == 2);
static_assert(kTensorRows * kColumns * 4 <= kColumns * kRowElements * 2);

// ---- host ----

bool are_pairs_aligned(const RowsOperand& z) {
  const auto fits = [](const void* data, int64_t stride, int n) {
    return n == 0 || (n % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(data) % 4 == 0);
  };
  return fits(z.first, z.first_stride, z.n_first) && fits(z.second, z.second_stride, z.n_second);
}

/// Fills `plan` and returns the shared memory of a block; 0 if it does not fit.
size_t make_plan(const RowsOperand& z,
                 const CodeOperand& s,
                 int64_t max_shared_bytes,
                 TensorPlan& plan) {
  if (value_row_bytes(s) > max_shared_bytes) return 0;
  plan.n_chunks = static_cast<int>(ceil_div(std::max(s.n_atoms, 1), kChunk));
  // two blocks of eight warps hide each other's barriers, where the rows fit into registers so
  const int most_warps =
      plan.n_chunks > kRegisterChunks * kMaxWarps / 2 ? kMaxWarps : kMaxWarps / 2;
  plan.chunks_per_warp = static_cast<int>(ceil_div(plan.n_chunks, most_warps));
  plan.n_warps = std::max(4, static_cast<int>(ceil_div(plan.n_chunks, plan.chunks_per_warp)));
  plan.tile = tile_layout(s, kColumns);
  plan.are_pairs_aligned = are_pairs_aligned(z);
  const bool is_field = s.type == ValueType::kIntegerField || s.type == ValueType::kBFloatField;
  plan.decoded_slot = is_field ? static_cast<int>(ceil_div(s.sparsity + 4, 8) * 8) : 0;
  plan.decoded_bytes = 2 * kColumns * plan.decoded_slot;
  for (plan.n_stages = kMaxStages; plan.n_stages >= 2; --plan.n_stages) {
    const int64_t total = int64_t{plan.n_stages} * plan.tile.bytes() + plan.table_bytes() +
                          plan.decoded_bytes + int64_t{2} * plan.n_warps * kColumns * kRowElements;
    // more stages than two are worth it only where two blocks still fit
    const bool is_last = plan.n_stages == 2 || plan.n_warps > kMaxWarps / 2;
    if (total <= (is_last ? max_shared_bytes : max_shared_bytes / 2)) {
      return static_cast<size_t>(total);
    }
  }
  return 0;
}

template <class Z>
int launch_rows(const RowsOperand& z,
                const CodeOperand& s,
                const OutputOperand& y,
                const TensorPlan& plan,
                size_t shared_bytes,
                int n_multiprocessors,
                Stream stream) {
  const int threads = kWarpSize * plan.n_warps;
  const int per_processor = threads <= 256 ? 2 : 1;
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(ceil_div(s.d_out, kColumns), int64_t{per_processor} * n_multiprocessors));
  const dim3 grid(blocks, static_cast<unsigned>(ceil_div(z.rows, kTensorRows)));
  const auto start = [&](auto* kernel) {
    return launch(kernel, grid, threads, shared_bytes, stream, z, s, y, plan);
  };
  const bool has_upper_rows = z.rows > kTensorRows / 2;
  if (plan.chunks_per_warp <= kRegisterChunks) {
    return has_upper_rows ? start(&tensor_kernel<Z, true, true>)
                          : start(&tensor_kernel<Z, false, true>);
  }
  return has_upper_rows ? start(&tensor_kernel<Z, true, false>)
                        : start(&tensor_kernel<Z, false, false>);
}

}  // namespace

bool tensor_cores_take(const RowsOperand& z, const CodeOperand& s) {
  if (z.dtype == DType::kFloat32 || s.group != 0) return false;
  switch (s.type) {
    case ValueType::kBFloat16:
    case ValueType::kBFloatField:
      return z.dtype == DType::kBFloat16;
    case ValueType::kFloat16:
      return z.dtype == DType::kFloat16;
    case ValueType::kIntegerField:
      return true;
    default:
      return false;
  }
}

int multiply_tensor(const RowsOperand& z,
                    const CodeOperand& s,
                    const OutputOperand& y,
                    Stream stream) {
  if (z.rows == 0 || s.d_out == 0) return cudaSuccess;
  int device = 0;
  int n_multiprocessors = 1;
  int max_shared_bytes = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  status =
      cudaDeviceGetAttribute(&max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  TensorPlan plan;
  const size_t shared_bytes = make_plan(z, s, max_shared_bytes, plan);
  if (shared_bytes == 0) return cudaErrorNotSupported;
  if (z.dtype == DType::kFloat16) {
    return launch_rows<__half>(z, s, y, plan, shared_bytes, n_multiprocessors, stream);
  }
  return launch_rows<__nv_bfloat16>(z, s, y, plan, shared_bytes, n_multiprocessors, stream);
}

}  // namespace cospadi::cuda
