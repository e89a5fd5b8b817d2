// The CUDA symbols of a build without CUDA.
#include "cuda/device.hpp"
#include "cuda/operands.hpp"

namespace cospadi::cuda {

bool is_built() noexcept { return false; }

int device_count() noexcept { return 0; }

const char* unavailable_reason() noexcept {
  return "built without CUDA: build where nvcc is on PATH, or with -C cmake.define.COSPADI_CUDA=ON";
}

namespace {
constexpr int kNoDevice = 100;  // cudaErrorNoDevice
}  // namespace

int current_device(int*) noexcept { return kNoDevice; }

int set_device(int) noexcept { return kNoDevice; }

// Never reached: csrc/core/cuda_gemm.cpp asks is_built() first.
int expand_code(const CodeOperand&, DType, void*, int64_t, Stream) { return kNoDevice; }

int decode_values(const CodeOperand&, float*, Stream) { return kNoDevice; }

int pack_bits(const uint8_t*, int64_t, int64_t, uint8_t*, Stream) { return kNoDevice; }

int unpack_bits(const uint8_t*, int64_t, int64_t, uint8_t*, Stream) { return kNoDevice; }

int multiply_few(const RowsOperand&, const CodeOperand&, const OutputOperand&, Stream) {
  return kNoDevice;
}

bool tensor_cores_take(const RowsOperand&, const CodeOperand&) { return false; }

int multiply_tensor(const RowsOperand&, const CodeOperand&, const OutputOperand&, Stream) {
  return kNoDevice;
}

int multiply_dense(const RowsOperand&, const void*, int64_t, int, const OutputOperand&, Stream) {
  return kNoDevice;
}

const char* status_text(int) { return unavailable_reason(); }

}  // namespace cospadi::cuda
