#include "cospadi/c_api.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "cospadi/checkpoint.hpp"
#include "cospadi/mask.hpp"
#include "cospadi/packed.hpp"
#include "cospadi/runtime.hpp"
#include "cospadi/sparse_gemm.hpp"
#include "cospadi/status.hpp"

struct cospadi_checkpoint {
  cospadi::Checkpoint value;
};

struct cospadi_layer {
  cospadi::Layer value;
};

namespace {

using cospadi::ErrorCode;
using cospadi::detail::require;

// Not a std::string: what reports that memory has run out must not need any.
constexpr size_t kMaxMessage = 1024;
thread_local char last_error[kMaxMessage] = "";

cospadi_status failed(cospadi_status status, const char* message) noexcept {
  std::snprintf(last_error, kMaxMessage, "%s", message);
  return status;
}

/// Runs `body` and turns whatever it throws into a status.
template <class Body>
cospadi_status guarded(const Body& body) noexcept {
  try {
    body();
    return COSPADI_OK;
  } catch (const cospadi::Error& error) {
    // the codes of C++ and C have the same numbers
    return failed(static_cast<cospadi_status>(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return failed(COSPADI_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(COSPADI_INTERNAL, error.what());
  } catch (...) {
    return failed(COSPADI_INTERNAL, "unknown exception");
  }
}

static_assert(COSPADI_INVALID_ARGUMENT == static_cast<int>(ErrorCode::kInvalidArgument));
static_assert(COSPADI_OUT_OF_MEMORY == static_cast<int>(ErrorCode::kOutOfMemory));
static_assert(COSPADI_NO_CUDA == static_cast<int>(ErrorCode::kNoCuda));
static_assert(COSPADI_CUDA == static_cast<int>(ErrorCode::kCuda));
static_assert(COSPADI_CHECKPOINT == static_cast<int>(ErrorCode::kCheckpoint));
static_assert(COSPADI_NEWER_FORMAT == static_cast<int>(ErrorCode::kNewerFormat));
static_assert(COSPADI_NOT_COMPRESSED == static_cast<int>(ErrorCode::kNotCompressed));
static_assert(COSPADI_FLOAT32 == static_cast<int>(cospadi::DType::kFloat32));
static_assert(COSPADI_BFLOAT16 == static_cast<int>(cospadi::DType::kBFloat16));
static_assert(COSPADI_FLOAT16 == static_cast<int>(cospadi::DType::kFloat16));
static_assert(COSPADI_DICTIONARY_INT8 == static_cast<int>(cospadi::DictionaryType::kInt8));
static_assert(COSPADI_COEFFS_BFLOAT14 == static_cast<int>(cospadi::CoeffsType::kBFloat14));
static_assert(COSPADI_COEFFS_INT3 == static_cast<int>(cospadi::CoeffsType::kInt3));
static_assert(COSPADI_TENSOR_BF16 == static_cast<int>(cospadi::TensorType::kBF16));
static_assert(COSPADI_TENSOR_F8_E5M2 == static_cast<int>(cospadi::TensorType::kF8E5M2));
static_assert(COSPADI_CODE_INTEGER == static_cast<int>(cospadi::CodeKind::kInteger));

template <class T>
T& pointed(T* pointer, const char* name) {
  require(pointer != nullptr, std::string(name) + ": null pointer");
  return *pointer;
}

cospadi::DType dtype_of(cospadi_dtype dtype, const char* name) {
  require(dtype >= COSPADI_FLOAT32 && dtype <= COSPADI_FLOAT16,
          std::string(name) + ": unknown dtype " + std::to_string(dtype));
  return static_cast<cospadi::DType>(dtype);
}

cospadi::ConstTypedMatrix matrix_of(const cospadi_const_matrix& m, const char* name) {
  return {m.data, dtype_of(m.dtype, name), m.rows, m.cols, m.stride};
}

cospadi::TypedMatrix matrix_of(const cospadi_matrix& m, const char* name) {
  return {m.data, dtype_of(m.dtype, name), m.rows, m.cols, m.stride};
}

cospadi::ConstTypedVector bias_of(const void* bias, cospadi_dtype dtype, int64_t size) {
  if (bias == nullptr) return {};
  return {bias, dtype_of(dtype, "bias"), size};
}

cospadi::MatrixView<const uint8_t> mask_of(const uint8_t* mask,
                                           int64_t d_out,
                                           int64_t n_atoms,
                                           int64_t stride) {
  if (mask == nullptr) return {};
  require(n_atoms >= 0, "n_atoms: negative");
  return {mask, d_out, cospadi::mask_row_bytes(n_atoms), stride};
}

cospadi_layer_info info_of(const cospadi::LayerInfo& info) {
  return {info.d_in,
          info.d_out,
          info.n_atoms,
          info.n_identity,
          info.sparsity,
          info.coeffs_group,
          static_cast<int32_t>(info.dictionary_type),
          static_cast<int32_t>(info.coeffs_type),
          info.has_mask ? 1 : 0,
          info.has_bias ? 1 : 0,
          info.is_conv1d ? 1 : 0,
          info.leader.empty() ? 0 : 1};
}

/// `name` outlives the checkpoint's tensor: it is the checkpoint's own copy.
cospadi_tensor tensor_of(const cospadi::Checkpoint& checkpoint, const std::string& name) {
  const cospadi::TensorView view = checkpoint.tensor(name);
  return {name.c_str(),
          view.data,
          view.bytes,
          view.shape.data(),
          static_cast<int32_t>(view.shape.size()),
          static_cast<int32_t>(view.type)};
}

const std::string& at(const std::vector<std::string>& names, int64_t index) {
  require(index >= 0 && std::cmp_less(index, names.size()),
          "index: expected 0 .. " + std::to_string(static_cast<int64_t>(names.size()) - 1) +
              ", got " + std::to_string(index));
  return names[static_cast<size_t>(index)];
}

}  // namespace

const char* cospadi_last_error(void) { return last_error; }

const char* cospadi_status_name(cospadi_status status) {
  static constexpr const char* kNames[] = {"COSPADI_OK",
                                           "COSPADI_INVALID_ARGUMENT",
                                           "COSPADI_OUT_OF_MEMORY",
                                           "COSPADI_NO_CUDA",
                                           "COSPADI_CUDA",
                                           "COSPADI_CHECKPOINT",
                                           "COSPADI_NEWER_FORMAT",
                                           "COSPADI_NOT_COMPRESSED",
                                           "COSPADI_INTERNAL"};
  return status >= COSPADI_OK && status <= COSPADI_INTERNAL ? kNames[status] : "unknown";
}

const char* cospadi_version(void) { return cospadi::version(); }

int32_t cospadi_version_number(void) {
  int32_t number = 0;
  int32_t part = 0;
  for (const char* c = cospadi::version();; ++c) {
    if (*c >= '0' && *c <= '9') {
      part = 10 * part + (*c - '0');
      continue;
    }
    number = 100 * number + part;
    part = 0;
    if (*c == '\0') return number;
  }
}

cospadi_status cospadi_isa_name(const char** name) {
  return guarded([&] { pointed(name, "name") = cospadi::isa_name(); });
}

int32_t cospadi_default_thread_count(void) { return cospadi::default_thread_count(); }

cospadi_status cospadi_checkpoint_open(const char* folder, cospadi_checkpoint** checkpoint) {
  return guarded([&] {
    pointed(checkpoint, "checkpoint");
    cospadi::Checkpoint opened = cospadi::Checkpoint::open(&pointed(folder, "folder"));
    *checkpoint = new cospadi_checkpoint{std::move(opened)};
  });
}

void cospadi_checkpoint_close(cospadi_checkpoint* checkpoint) { delete checkpoint; }

cospadi_status cospadi_checkpoint_module_count(const cospadi_checkpoint* checkpoint,
                                               int64_t* count) {
  return guarded([&] {
    const auto& names = pointed(checkpoint, "checkpoint").value.modules();
    pointed(count, "count") = static_cast<int64_t>(names.size());
  });
}

cospadi_status cospadi_checkpoint_module_name(const cospadi_checkpoint* checkpoint,
                                              int64_t index,
                                              const char** name) {
  return guarded([&] {
    const auto& names = pointed(checkpoint, "checkpoint").value.modules();
    pointed(name, "name") = at(names, index).c_str();
  });
}

cospadi_status cospadi_checkpoint_module_info(const cospadi_checkpoint* checkpoint,
                                              const char* name,
                                              cospadi_layer_info* info) {
  return guarded([&] {
    const auto& opened = pointed(checkpoint, "checkpoint").value;
    pointed(info, "info") = info_of(opened.info(&pointed(name, "name")));
  });
}

cospadi_status cospadi_checkpoint_tensor_count(const cospadi_checkpoint* checkpoint,
                                               int64_t* count) {
  return guarded([&] {
    const auto& names = pointed(checkpoint, "checkpoint").value.tensor_names();
    pointed(count, "count") = static_cast<int64_t>(names.size());
  });
}

cospadi_status cospadi_checkpoint_tensor_at(const cospadi_checkpoint* checkpoint,
                                            int64_t index,
                                            cospadi_tensor* tensor) {
  return guarded([&] {
    const auto& opened = pointed(checkpoint, "checkpoint").value;
    pointed(tensor, "tensor") = tensor_of(opened, at(opened.tensor_names(), index));
  });
}

cospadi_status cospadi_checkpoint_tensor(const cospadi_checkpoint* checkpoint,
                                         const char* name,
                                         cospadi_tensor* tensor) {
  return guarded([&] {
    const auto& opened = pointed(checkpoint, "checkpoint").value;
    const std::vector<std::string>& names = opened.tensor_names();
    const std::string wanted(&pointed(name, "name"));
    const auto found = std::ranges::lower_bound(names, wanted);
    require(found != names.end() && *found == wanted, "name: no such tensor");
    pointed(tensor, "tensor") = tensor_of(opened, *found);
  });
}

cospadi_status cospadi_checkpoint_config_number(const cospadi_checkpoint* checkpoint,
                                                const char* path,
                                                double* number) {
  return guarded([&] {
    const auto& opened = pointed(checkpoint, "checkpoint").value;
    const auto found = opened.config_number(&pointed(path, "path"));
    require(found.has_value(), std::string("path: config.json has no number ") + path);
    pointed(number, "number") = *found;
  });
}

cospadi_status cospadi_layer_load(const cospadi_checkpoint* checkpoint,
                                  const char* name,
                                  int32_t n_threads,
                                  cospadi_layer** layer) {
  return guarded([&] {
    pointed(layer, "layer");
    const auto& opened = pointed(checkpoint, "checkpoint").value;
    *layer = new cospadi_layer{opened.layer(&pointed(name, "name"), n_threads)};
  });
}

void cospadi_layer_close(cospadi_layer* layer) { delete layer; }

cospadi_status cospadi_layer_get_info(const cospadi_layer* layer, cospadi_layer_info* info) {
  return guarded([&] { pointed(info, "info") = info_of(pointed(layer, "layer").value.info()); });
}

cospadi_status cospadi_layer_forward(const cospadi_layer* layer,
                                     const cospadi_const_matrix* x,
                                     const cospadi_matrix* y,
                                     int32_t n_threads) {
  return guarded([&] {
    pointed(layer, "layer")
        .value.forward(matrix_of(pointed(x, "x"), "x"), matrix_of(pointed(y, "y"), "y"), n_threads);
  });
}

cospadi_status cospadi_validate_mask(
    const uint8_t* mask, int64_t d_out, int64_t stride, int64_t n_atoms, int64_t sparsity) {
  return guarded([&] {
    require(d_out >= 0 && n_atoms >= 0, "d_out, n_atoms: negative");
    cospadi::validate_mask(
        {mask, d_out, cospadi::mask_row_bytes(n_atoms), stride}, n_atoms, sparsity);
  });
}

cospadi_status cospadi_sparse_gemm(const cospadi_const_matrix* z,
                                   const cospadi_sparse_code* code,
                                   const void* bias,
                                   cospadi_dtype bias_dtype,
                                   const cospadi_matrix* y,
                                   int32_t n_threads) {
  return guarded([&] {
    const cospadi_sparse_code& c = pointed(code, "code");
    const cospadi::SparseMatrix s{c.n_atoms,
                                  mask_of(c.mask, c.coeffs.rows, c.n_atoms, c.mask_stride),
                                  matrix_of(c.coeffs, "coeffs")};
    cospadi::sparse_gemm(matrix_of(pointed(z, "z"), "z"),
                         s,
                         bias_of(bias, bias_dtype, c.coeffs.rows),
                         matrix_of(pointed(y, "y"), "y"),
                         n_threads);
  });
}

cospadi_status cospadi_packed_gemm(const cospadi_const_matrix* z,
                                   const cospadi_packed_code* code,
                                   const void* bias,
                                   cospadi_dtype bias_dtype,
                                   const cospadi_matrix* y,
                                   int32_t n_threads) {
  return guarded([&] {
    const cospadi_packed_code& c = pointed(code, "code");
    require(c.kind == COSPADI_CODE_BFLOAT || c.kind == COSPADI_CODE_INTEGER, "kind: unknown");
    require(c.bits >= cospadi::kMinFieldBits && c.bits <= cospadi::kMaxFieldBits,
            "bits: expected 2 .. 16, got " + std::to_string(c.bits));
    cospadi::detail::checked_product(c.sparsity, cospadi::kMaxFieldBits, "sparsity");
    const cospadi::PackedCoeffs coeffs{
        c.sparsity,
        {static_cast<cospadi::CodeKind>(c.kind), c.bits},
        {c.codes, c.d_out, cospadi::packed_row_bytes(c.sparsity, c.bits), c.codes_stride},
        c.scale.data == nullptr ? cospadi::ConstTypedMatrix{} : matrix_of(c.scale, "scale"),
        c.group};
    cospadi::packed_gemm(matrix_of(pointed(z, "z"), "z"),
                         {c.n_atoms, mask_of(c.mask, c.d_out, c.n_atoms, c.mask_stride), coeffs},
                         bias_of(bias, bias_dtype, c.d_out),
                         matrix_of(pointed(y, "y"), "y"),
                         n_threads);
  });
}
