#include "core/cuda_gemm.hpp"

#include <algorithm>
#include <string>

#include "core/check.hpp"
#include "cospadi/status.hpp"
#include "cuda/device.hpp"

namespace cospadi {
namespace {

using detail::require;

void require_cuda() {
  if (!cuda::is_built()) throw Error(ErrorCode::kNoCuda, cuda::unavailable_reason());
}

void check_status(int status, const char* what) {
  if (status == 0) return;
  throw Error(ErrorCode::kCuda, std::string(what) + ": " + cuda::status_text(status));
}

/// Makes a device current, and the one before it again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_status(cuda::current_device(&previous_), "cudaGetDevice");
    if (device == previous_) return;
    check_status(cuda::set_device(device), "cudaSetDevice");
    has_changed_ = true;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (has_changed_) cuda::set_device(previous_);
  }

 private:
  int previous_ = 0;
  bool has_changed_ = false;
};

void check_dtype(DType dtype, const char* name) {
  require(dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16,
          std::string(name) + ": unknown dtype");
}

void check_code(const cuda::CodeOperand& s) {
  require(s.n_atoms >= 0 && s.d_out >= 0 && s.sparsity >= 0, "S: negative size");
  require(s.sparsity <= s.n_atoms,
          "sparsity: s = " + std::to_string(s.sparsity) + " is more than the " +
              std::to_string(s.n_atoms) + " atoms");
  int lowest = 2;
  int highest = 8;
  switch (s.type) {
    case cuda::ValueType::kFloat32:
      lowest = highest = 32;
      break;
    case cuda::ValueType::kBFloat16:
    case cuda::ValueType::kFloat16:
      lowest = highest = 16;
      break;
    case cuda::ValueType::kBFloatField:
      lowest = 9;
      highest = 16;
      break;
    case cuda::ValueType::kIntegerField:
      break;
    default:
      require(false, "coeffs: unknown type");
  }
  require(s.bits >= lowest && s.bits <= highest,
          "coeffs: expected " + std::to_string(lowest) + " .. " + std::to_string(highest) +
              " bits, got " + std::to_string(s.bits));
  const bool is_scaled = s.type == cuda::ValueType::kIntegerField;
  const bool is_empty = s.d_out == 0 || s.sparsity == 0;
  require(is_scaled ? s.scale != nullptr || s.d_out == 0 : s.scale == nullptr && s.group == 0,
          is_scaled ? "scale: null pointer" : "scale, group: only integers have them");
  require(s.group >= 0, "group: negative");
  check_dtype(s.scale_dtype, "scale");
  require(s.values != nullptr || is_empty, "coeffs: null pointer");
  require(s.mask != nullptr || s.sparsity == s.n_atoms || s.d_out == 0,
          "sparsity: expected all " + std::to_string(s.n_atoms) + " atoms without a mask, got " +
              std::to_string(s.sparsity));
}

void check_rows(const cuda::RowsOperand& z, const char* name) {
  check_dtype(z.dtype, name);
  require(z.rows >= 0 && z.n_first >= 0 && z.n_second >= 0, std::string(name) + ": negative size");
  require(z.rows <= 1 || (z.first_stride >= z.n_first && z.second_stride >= z.n_second),
          std::string(name) + ": a row stride is smaller than the row length");
  require(z.rows == 0 ||
              ((z.first != nullptr || z.n_first == 0) && (z.second != nullptr || z.n_second == 0)),
          std::string(name) + ": null pointer");
}

void check_output(const cuda::OutputOperand& y, int64_t rows, int64_t cols) {
  check_dtype(y.dtype, "y");
  check_dtype(y.bias_dtype, "bias");
  require(rows <= 1 || y.stride >= cols, "y: the row stride is smaller than the row length");
  require(y.data != nullptr || rows == 0 || cols == 0, "y: null pointer");
}

}  // namespace

void cuda_code_gemm(const cuda::RowsOperand& z,
                    const cuda::CodeOperand& s,
                    const cuda::OutputOperand& y,
                    CudaWay way,
                    const CudaTarget& target) {
  require_cuda();
  check_code(s);
  check_rows(z, "z");
  require(int64_t{z.n_first} + z.n_second == s.n_atoms,
          "z: expected " + std::to_string(s.n_atoms) + " columns, got " +
              std::to_string(int64_t{z.n_first} + z.n_second));
  check_output(y, z.rows, s.d_out);
  const DeviceGuard guard(target.device);
  const bool can_use_tensors = cuda::tensor_cores_take(z, s);
  require(way != CudaWay::kTensor || can_use_tensors,
          "way: the tensor cores take z of 16 bits and coefficients that are exact in its type");
  // For one row the CUDA cores do less work per coefficient.
  if (way == CudaWay::kTensor || (way == CudaWay::kAuto && can_use_tensors && z.rows > 1)) {
    constexpr int kNotSupported = 801;
    const int status = cuda::multiply_tensor(z, s, y, target.stream);
    if (status != kNotSupported || way == CudaWay::kTensor) {
      return check_status(status, "multiply_tensor");
    }
  }
  check_status(cuda::multiply_few(z, s, y, target.stream), "multiply_few");
}

void cuda_dense_gemm(const cuda::RowsOperand& x,
                     const void* dictionary,
                     int64_t dictionary_stride,
                     int64_t n,
                     const cuda::OutputOperand& y,
                     const CudaTarget& target) {
  require_cuda();
  check_rows(x, "x");
  require(x.rows <= cuda::kMaxFewRows && x.n_second == 0,
          "x: expected one matrix of at most " + std::to_string(cuda::kMaxFewRows) + " rows, got " +
              std::to_string(x.rows));
  require(n >= 0 && n < (int64_t{1} << 31), "dictionary: too many atoms");
  require(x.n_first <= 1 || dictionary_stride >= n,
          "dictionary: the row stride is smaller than the row length");
  require(dictionary != nullptr || n == 0 || x.n_first == 0, "dictionary: null pointer");
  check_output(y, x.rows, n);
  const DeviceGuard guard(target.device);
  check_status(
      cuda::multiply_dense(x, dictionary, dictionary_stride, static_cast<int>(n), y, target.stream),
      "multiply_dense");
}

void cuda_expand(const cuda::CodeOperand& s,
                 DType dtype,
                 void* out,
                 int64_t out_stride,
                 const CudaTarget& target) {
  require_cuda();
  check_code(s);
  check_dtype(dtype, "out");
  require(s.d_out <= 1 || out_stride >= s.n_atoms,
          "out: the row stride is smaller than the row length");
  require(out != nullptr || s.d_out == 0 || s.n_atoms == 0, "out: null pointer");
  const DeviceGuard guard(target.device);
  check_status(cuda::expand_code(s, dtype, out, out_stride, target.stream), "expand_code");
}

void cuda_decode(const cuda::CodeOperand& s, float* out, const CudaTarget& target) {
  require_cuda();
  check_code(s);
  require(out != nullptr || s.d_out == 0 || s.sparsity == 0, "out: null pointer");
  const DeviceGuard guard(target.device);
  check_status(cuda::decode_values(s, out, target.stream), "decode_values");
}

}  // namespace cospadi
