// y = z S + bias for a few rows on the CUDA cores: every column is read once, as it is stored.
//
// A block walks over tiles of columns, several of which are on their way into shared memory while
// one is multiplied. A warp takes a segment of one column: 128 positions at a time, four neighbours
// per lane, whose coefficients lie side by side from the population of the mask below them on. So
// 32 lanes read some 64 neighbouring coefficients, nearly free of bank conflicts, and z is in
// registers (the segment of a warp never changes) or in rows of floats. One population count serves
// 128 positions: it has a quarter of an addition's rate, and a count per 32 positions would take
// longer than the memory.
#include <algorithm>
#include <type_traits>

#include "cuda/columns.cuh"
#include "cuda/launch.cuh"

namespace cospadi::cuda {
namespace {

constexpr int kStepPositions = 4 * kWarpSize;
constexpr int kMaxSteps = 8;     // a segment: as many words as a warp has lanes
constexpr int kStepsAtOnce = 2;  // their loads overlap
constexpr int kMaxWarps = 16;
constexpr int kMaxStages = 4;

enum class ZPlace { kRegisters, kShared };

struct FewPlan {
  TileLayout tile;
  int n_segments = 1;  ///< of a column
  int n_steps = 1;     ///< of a segment
  int n_warps = 1;
  int n_stages = 2;
  int z_stride = 0;  ///< floats between rows in shared memory
  int z_bytes = 0;
  int decoded_slot =
      0;  ///< values of a decoded column; 0: values are multiplied as they are stored
  int decoded_bytes = 0;
  bool is_z_aligned = false;  ///< four neighbours of z can be loaded at once

  __host__ __device__ int n_items() const { return tile.columns * n_segments; }
};

/// Memory of one load of four neighbours.
template <class Z>
struct alignas(4 * sizeof(Z)) Four {
  Z value[4];
};

/// Four neighbours of a row of z, zeros beyond its end.
template <class Z>
__device__ __forceinline__ void load_four(
    const RowsOperand& z, bool is_aligned, int row, int atom, float (&out)[4]) {
  const int n = z.n_first + z.n_second;
  if (is_aligned) {
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = 0.0F;
    if (row >= z.rows || atom >= n) return;
    const Z* source =
        atom < z.n_first
            ? static_cast<const Z*>(z.first) + row * z.first_stride + atom
            : static_cast<const Z*>(z.second) + row * z.second_stride + (atom - z.n_first);
    const Four<Z> four = *reinterpret_cast<const Four<Z>*>(source);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = to_float(four.value[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    out[k] = row < z.rows && atom + k < n ? load_row_element(z, row, atom + k) : 0.0F;
  }
}

/// z of a warp's segment in registers.
template <int kRows>
using SegmentRows = float[kRows][kMaxSteps][4];

template <class Z, int kRows>
__device__ __forceinline__ void load_segment(
    const RowsOperand& z, bool is_aligned, int first_atom, int n_steps, SegmentRows<kRows>& out) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kMaxSteps; ++t) {
      if (t < n_steps) {
        load_four<Z>(z, is_aligned, r, first_atom + kStepPositions * t, out[r][t]);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) out[r][t][k] = 0.0F;
      }
    }
  }
}

template <class Z>
__device__ __forceinline__ void load_shared_rows(const RowsOperand& z,
                                                 bool is_aligned,
                                                 int n_rows,
                                                 int stride) {
  for (int r = 0; r < n_rows; ++r) {
    for (int i = 4 * static_cast<int>(threadIdx.x); i < stride;
         i += 4 * static_cast<int>(blockDim.x)) {
      float four[4];
      load_four<Z>(z, is_aligned, r, i, four);
      *reinterpret_cast<float4*>(shared_at<float>(0) + r * stride + i) =
          make_float4(four[0], four[1], four[2], four[3]);
    }
  }
}

/// The next value at an address in shared memory if `condition`, else 0.
template <class V>
__device__ __forceinline__ float take_value(uint32_t& address, uint32_t condition) {
  if constexpr (std::is_same_v<V, float>) {
    return __uint_as_float(take_shared_32(address, condition));
  } else if constexpr (std::is_same_v<V, int8_t>) {
    return small_int_to_float(take_shared_s8(address, condition));
  } else {
    const uint32_t bits = take_shared_16(address, condition);
    if constexpr (std::is_same_v<V, __half>) {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    } else {
      return __uint_as_float(bits << 16);
    }
  }
}

/// Partial sums of one segment of one column, in every lane.
template <class V, int kRows, ZPlace kPlace, class Registers>
__device__ __forceinline__ void multiply_segment(const StagedColumn& column,
                                                 int values,
                                                 int n_atoms,
                                                 int sparsity,
                                                 int segment,
                                                 int n_steps,
                                                 int lane,
                                                 const Registers& z_registers,
                                                 int z_stride,
                                                 float (&sum)[kRows]) {
  const int first_word = 4 * n_steps * segment;
  const uint32_t own =
      lane < 4 * n_steps ? staged_mask_word(column, n_atoms, first_word + lane) : 0;
  const int own_start =
      staged_population(column, n_atoms, first_word, lane) + sum_of_lower_lanes(__popc(own), lane);
  const int shift = 4 * (lane % 8);
  const uint32_t values_address = shared_address(shared_at<uint8_t>(values));
#pragma unroll
  for (int r = 0; r < kRows; ++r) sum[r] = 0.0F;
#pragma unroll
  for (int t = 0; t < kMaxSteps; t += kStepsAtOnce) {
    if (t >= n_steps) break;
#pragma unroll
    for (int i = t; i < t + kStepsAtOnce; ++i) {
      // in a step beyond the last one no bit is set
      const uint32_t word = __shfl_sync(kAllLanes, own, 4 * i + lane / 8);
      const int start = __shfl_sync(kAllLanes, own_start, 4 * i + lane / 8);
      // a mask that lies never reads beyond the slot
      const int first = min(start + __popc(word & ((1U << shift) - 1)), sparsity);
      const uint32_t bits = word >> shift;
      uint32_t at = values_address + static_cast<uint32_t>(sizeof(V)) * first;
      float value[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        value[k] = take_value<V>(at, bits & 1U << k);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float4 z;
        if constexpr (kPlace == ZPlace::kRegisters) {
          z = make_float4(z_registers[r][i][0],
                          z_registers[r][i][1],
                          z_registers[r][i][2],
                          z_registers[r][i][3]);
        } else {
          const int atom = min(kStepPositions * (n_steps * segment + i) + 4 * lane, z_stride - 4);
          z = *reinterpret_cast<const float4*>(shared_at<float>(0) + r * z_stride + atom);
        }
        sum[r] = __fmaf_rn(value[0], z.x, sum[r]);
        sum[r] = __fmaf_rn(value[1], z.y, sum[r]);
        sum[r] = __fmaf_rn(value[2], z.z, sum[r]);
        sum[r] = __fmaf_rn(value[3], z.w, sum[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sum[r] = sum_of_lanes(sum[r]);
}

/// Adds the segments of each column of a tile and writes y; one thread per column and row.
__device__ __forceinline__ void write_tile(const CodeOperand& s,
                                           const OutputOperand& y,
                                           const FewPlan& plan,
                                           int64_t first,
                                           int n_rows,
                                           int row_step,
                                           int partials) {
  const int column = static_cast<int>(threadIdx.x) % plan.tile.columns;
  const int row = static_cast<int>(threadIdx.x) / plan.tile.columns;
  const int64_t output = first + column;
  if (row >= n_rows || output >= s.d_out) return;
  float sum = 0.0F;
  for (int segment = 0; segment < plan.n_segments; ++segment) {
    sum += shared_at<float>(partials)[(column * plan.n_segments + segment) * row_step + row];
  }
  if (s.type == ValueType::kIntegerField && s.group == 0) sum *= scale_of(s, output, 0);
  if (y.bias != nullptr) sum += load_element(y.bias, y.bias_dtype, output);
  store_element(sum, y.data, y.dtype, row * y.stride + output);
}

template <class V, int kRows, ZPlace kPlace>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 1)
    few_kernel(RowsOperand z, CodeOperand s, OutputOperand y, FewPlan plan) {
  // byte offsets: the rows of z, the tiles, a decoded tile, and two turns of sums of segments
  const int tiles = plan.z_bytes;
  const int decoded = tiles + plan.n_stages * plan.tile.bytes();
  const int partials = decoded + plan.decoded_bytes;
  const int n_partials = plan.n_items() * kRows;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t step = static_cast<int64_t>(gridDim.x) * plan.tile.columns;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * plan.tile.columns;

  for (int i = 0; i < plan.n_stages - 1; ++i) {
    const int64_t first = begin + i * step;
    if (first < s.d_out) fetch_tile(s, plan.tile, first, tiles + i * plan.tile.bytes());
    cp_async_commit();
  }
  SegmentRows<kPlace == ZPlace::kRegisters ? kRows : 1> z_registers;
  if constexpr (kPlace == ZPlace::kRegisters) {
    const int atom = kStepPositions * plan.n_steps * (warp % plan.n_segments) + 4 * lane;
    switch (z.dtype) {  // outside of the loops, so that the loads of a segment overlap
      case DType::kBFloat16:
        load_segment<__nv_bfloat16, kRows>(z, plan.is_z_aligned, atom, plan.n_steps, z_registers);
        break;
      case DType::kFloat16:
        load_segment<__half, kRows>(z, plan.is_z_aligned, atom, plan.n_steps, z_registers);
        break;
      default:
        load_segment<float, kRows>(z, plan.is_z_aligned, atom, plan.n_steps, z_registers);
        break;
    }
  } else {
    switch (z.dtype) {
      case DType::kBFloat16:
        load_shared_rows<__nv_bfloat16>(z, plan.is_z_aligned, kRows, plan.z_stride);
        break;
      case DType::kFloat16:
        load_shared_rows<__half>(z, plan.is_z_aligned, kRows, plan.z_stride);
        break;
      default:
        load_shared_rows<float>(z, plan.is_z_aligned, kRows, plan.z_stride);
        break;
    }
  }

  int turn = 0;
  for (int64_t first = begin; first < s.d_out; first += step, ++turn) {
    cp_async_wait_runtime(plan.n_stages - 2);
    __syncthreads();  // this tile is there, and nobody is still in the one before
    if (turn > 0) {
      write_tile(
          s, y, plan, first - step, z.rows, kRows, partials + 4 * ((turn - 1) % 2 * n_partials));
    }
    const int64_t ahead = first + (plan.n_stages - 1) * step;
    if (ahead < s.d_out) {
      fetch_tile(s,
                 plan.tile,
                 ahead,
                 tiles + (turn + plan.n_stages - 1) % plan.n_stages * plan.tile.bytes());
    }
    cp_async_commit();
    const int tile = tiles + turn % plan.n_stages * plan.tile.bytes();
    if constexpr (std::is_same_v<V, float> || std::is_same_v<V, __nv_bfloat16>) {
      if (plan.decoded_slot != 0) {
        decode_tile<V, std::is_same_v<V, float>>(
            s, plan.tile, first, tile, decoded, plan.decoded_slot);
        __syncthreads();
      }
    }
    for (int item = warp; item < plan.n_items(); item += plan.n_warps) {
      const int column = item / plan.n_segments;
      const int segment = item - column * plan.n_segments;
      float sum[kRows] = {};
      if (first + column < s.d_out) {
        const StagedColumn staged = staged_column(s, plan.tile, first, column, tile);
        const int values = plan.decoded_slot != 0
                               ? decoded + column * plan.decoded_slot * static_cast<int>(sizeof(V))
                               : staged.value_slot + staged.value_offset;
        multiply_segment<V, kRows, kPlace>(staged,
                                           values,
                                           s.n_atoms,
                                           s.sparsity,
                                           segment,
                                           plan.n_steps,
                                           lane,
                                           z_registers,
                                           plan.z_stride,
                                           sum);
      }
      if (lane == 0) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          shared_at<float>(partials)[turn % 2 * n_partials + item * kRows + r] = sum[r];
        }
      }
    }
  }
  __syncthreads();
  if (turn > 0) {
    write_tile(s,
               y,
               plan,
               begin + (turn - 1) * step,
               z.rows,
               kRows,
               partials + 4 * ((turn - 1) % 2 * n_partials));
  }
}

/// For columns that fit into no shared memory: a warp per column and row, from global memory.
constexpr int kPlainThreads = 256;
__global__ void __launch_bounds__(kPlainThreads)
    plain_kernel(RowsOperand z, CodeOperand s, OutputOperand y) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int n_words = (s.n_atoms + kWarpSize - 1) / kWarpSize;
  const int64_t output =
      (static_cast<int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x) / kWarpSize;
  if (output >= s.d_out) return;  // whole warps
  for (int row = static_cast<int>(blockIdx.y); row < z.rows; row += static_cast<int>(gridDim.y)) {
    float sum = 0.0F;
    int before = 0;
    for (int word = 0; word < n_words; ++word) {
      const uint32_t bits = load_mask_word(s, output, word);
      const int t = before + __popc(bits & low_bits(lane));
      before += __popc(bits);
      if ((bits >> lane & 1) == 0 || t >= s.sparsity) continue;
      sum = __fmaf_rn(
          load_value(s, output, t), load_row_element(z, row, kWarpSize * word + lane), sum);
    }
    sum = sum_of_lanes(sum);
    if (lane != 0) continue;
    if (y.bias != nullptr) sum += load_element(y.bias, y.bias_dtype, output);
    store_element(sum, y.data, y.dtype, row * y.stride + output);
  }
}

// ---- host ----

struct DeviceSizes {
  int n_multiprocessors = 1;
  int max_shared_bytes = 48 * 1024;
};

cudaError_t device_sizes(DeviceSizes& out) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&out.n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(
      &out.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

int element_bytes(DType dtype) { return static_cast<int>(dtype_bytes(dtype)); }

bool are_fours_aligned(const RowsOperand& z) {
  const auto fits = [&](const void* data, int64_t stride, int n) {
    if (n == 0) return true;
    const uintptr_t bytes = 4 * static_cast<uintptr_t>(element_bytes(z.dtype));
    return n % 4 == 0 && stride % 4 == 0 && reinterpret_cast<uintptr_t>(data) % bytes == 0;
  };
  return fits(z.first, z.first_stride, z.n_first) && fits(z.second, z.second_stride, z.n_second);
}

/// Bytes of a value in shared memory, where the kernel reads it.
int read_bytes(const CodeOperand& s) {
  switch (s.type) {
    case ValueType::kFloat32:
      return 4;
    case ValueType::kIntegerField:
      if (s.group != 0) return 4;  // with its scale no longer exact in fewer bits
      return s.bits == 8 ? 1 : 2;
    default:
      return 2;
  }
}

bool is_decoded_first(const CodeOperand& s) {
  if (s.type == ValueType::kIntegerField) return s.bits != 8 || s.group != 0;
  return s.type == ValueType::kBFloatField;
}

/// Fills `plan` and returns the shared memory of a block; 0 if nothing fits.
size_t make_plan(const RowsOperand& z,
                 const CodeOperand& s,
                 int tile_rows,
                 ZPlace place,
                 const DeviceSizes& device,
                 FewPlan& plan) {
  const int n_chunks = static_cast<int>(ceil_div(std::max(s.n_atoms, 1), kStepPositions));
  plan.n_segments = static_cast<int>(ceil_div(n_chunks, kMaxSteps));
  plan.n_steps = static_cast<int>(ceil_div(n_chunks, plan.n_segments));
  if (place == ZPlace::kRegisters && plan.n_segments > kMaxWarps) return 0;
  plan.is_z_aligned = are_fours_aligned(z);
  if (place == ZPlace::kShared) {
    plan.z_stride = kStepPositions * plan.n_steps * plan.n_segments;
    const int64_t z_bytes = int64_t{4} * tile_rows * plan.z_stride;
    if (z_bytes > device.max_shared_bytes) return 0;
    plan.z_bytes = static_cast<int>(z_bytes);
  }
  if (value_row_bytes(s) > device.max_shared_bytes) return 0;
  for (int columns = std::max(1, kMaxWarps / 2 / plan.n_segments); columns > 0; columns /= 2) {
    plan.tile = tile_layout(s, columns);
    plan.n_warps = std::min(plan.n_items(), kMaxWarps);
    plan.decoded_slot = is_decoded_first(s) ? static_cast<int>(ceil_div(s.sparsity + 4, 8) * 8) : 0;
    const int64_t decoded_bytes = int64_t{plan.decoded_slot} * columns * read_bytes(s);
    const int64_t partial_bytes = int64_t{8} * plan.n_items() * tile_rows;
    for (plan.n_stages = kMaxStages; plan.n_stages >= 2; --plan.n_stages) {
      const int64_t total =
          plan.z_bytes + int64_t{plan.n_stages} * plan.tile.bytes() + decoded_bytes + partial_bytes;
      if (total > device.max_shared_bytes) continue;
      plan.decoded_bytes = static_cast<int>(decoded_bytes);
      return static_cast<size_t>(total);
    }
  }
  return 0;
}

template <class V, int kRows, ZPlace kPlace>
int launch_few(const RowsOperand& z,
               const CodeOperand& s,
               const OutputOperand& y,
               const FewPlan& plan,
               size_t shared_bytes,
               const DeviceSizes& device,
               Stream stream) {
  // at least a warp per column: write_tile has a thread for every column and row of a tile
  const int threads = kWarpSize * plan.n_warps;
  const int64_t n_tiles = ceil_div(s.d_out, plan.tile.columns);
  const int per_processor = threads <= 256 ? 2 : 1;
  const auto grid = static_cast<unsigned>(
      std::min<int64_t>(n_tiles, int64_t{per_processor} * device.n_multiprocessors));
  return launch(&few_kernel<V, kRows, kPlace>, grid, threads, shared_bytes, stream, z, s, y, plan);
}

template <class V>
int launch_rows(const RowsOperand& z,
                const CodeOperand& s,
                const OutputOperand& y,
                int tile_rows,
                ZPlace place,
                const FewPlan& plan,
                size_t shared_bytes,
                const DeviceSizes& device,
                Stream stream) {
  if (place == ZPlace::kRegisters) {
    return tile_rows == 1
               ? launch_few<V, 1, ZPlace::kRegisters>(z, s, y, plan, shared_bytes, device, stream)
               : launch_few<V, 2, ZPlace::kRegisters>(z, s, y, plan, shared_bytes, device, stream);
  }
  return tile_rows == 1
             ? launch_few<V, 1, ZPlace::kShared>(z, s, y, plan, shared_bytes, device, stream)
             : launch_few<V, 4, ZPlace::kShared>(z, s, y, plan, shared_bytes, device, stream);
}

/// At most kMaxFewRows rows; fewer per pass over S where the shared memory is short.
int multiply_some(const RowsOperand& z,
                  const CodeOperand& s,
                  const OutputOperand& y,
                  const DeviceSizes& device,
                  Stream stream,
                  int& n_done) {
  constexpr struct {
    int rows;
    ZPlace place;
  } kWays[] = {
      {4, ZPlace::kShared}, {2, ZPlace::kRegisters}, {1, ZPlace::kRegisters}, {1, ZPlace::kShared}};
  for (const auto& way : kWays) {
    if (way.rows / 2 >= z.rows) continue;  // the next one takes them all
    FewPlan plan;
    const size_t shared_bytes = make_plan(z, s, way.rows, way.place, device, plan);
    if (shared_bytes == 0) continue;
    RowsOperand part = z;
    part.rows = std::min(z.rows, way.rows);
    n_done = part.rows;
    switch (read_bytes(s)) {
      case 1:
        return launch_rows<int8_t>(
            part, s, y, way.rows, way.place, plan, shared_bytes, device, stream);
      case 4:
        return launch_rows<float>(
            part, s, y, way.rows, way.place, plan, shared_bytes, device, stream);
      default:
        if (s.type == ValueType::kFloat16) {
          return launch_rows<__half>(
              part, s, y, way.rows, way.place, plan, shared_bytes, device, stream);
        }
        return launch_rows<__nv_bfloat16>(
            part, s, y, way.rows, way.place, plan, shared_bytes, device, stream);
    }
  }
  n_done = z.rows;
  const dim3 grid(static_cast<unsigned>(ceil_div(s.d_out, kPlainThreads / kWarpSize)),
                  static_cast<unsigned>(z.rows));
  return launch(&plain_kernel, grid, kPlainThreads, 0, stream, z, s, y);
}

}  // namespace

int multiply_few(const RowsOperand& z,
                 const CodeOperand& s,
                 const OutputOperand& y,
                 Stream stream) {
  if (z.rows == 0 || s.d_out == 0) return cudaSuccess;
  DeviceSizes device;
  const cudaError_t known = device_sizes(device);
  if (known != cudaSuccess) return known;
  const int z_bytes = element_bytes(z.dtype);
  const int y_bytes = element_bytes(y.dtype);
  for (int row = 0; row < z.rows;) {
    RowsOperand rows = z;
    OutputOperand out = y;
    rows.rows = std::min(z.rows - row, kMaxFewRows);
    rows.first = static_cast<const char*>(z.first) + row * z.first_stride * z_bytes;
    rows.second = static_cast<const char*>(z.second) + row * z.second_stride * z_bytes;
    out.data = static_cast<char*>(y.data) + row * y.stride * y_bytes;
    int n_done = 0;
    const int status = multiply_some(rows, s, out, device, stream, n_done);
    if (status != cudaSuccess) return status;
    row += n_done;
  }
  return cudaSuccess;
}

}  // namespace cospadi::cuda
