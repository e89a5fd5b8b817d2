// What a custom operator needs of ONNX Runtime's C interface.
//
// ONNX Runtime hands out one table of functions that only ever grows at its end: an entry keeps its
// place in all versions. Its own header is in no package that installs with it, so the places and
// signatures of the few functions used here are written down below; tests/integrations/test_onnx.py
// holds them against the installed library.
#pragma once

#include <cstddef>
#include <cstdint>

// Names of another project's interface, in its spelling: NOLINTBEGIN(readability-identifier-naming)

extern "C" {

struct OrtStatus;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtShapeInferContext;

/// The table of functions; see cospadi::onnx::entries.
struct OrtApi;

struct OrtApiBase {
  /// The table, or null if this library is older than `version`.
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();  ///< "1.22.0"
};

/// An operator: its signature and its kernels. ONNX Runtime reads the members up to those of
/// `version`.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int32_t (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int32_t (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int32_t (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int32_t (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int32_t (*GetInputMemoryType)(const OrtCustomOp*, size_t);  // from here on: version 13
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);        // 14
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*,
                               const OrtApi*,
                               const OrtKernelInfo*,
                               void**);  // 16
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
};

}  // extern "C"

namespace cospadi::onnx {

/// The version whose interface this library asks for: ONNX Runtime 1.16, the first whose kernels
/// can report errors.
inline constexpr uint32_t kOrtApiVersion = 16;

/// Codes of OrtStatus.
enum class OrtCode : int32_t { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6 };

/// Element types of tensors.
enum class OrtType : int32_t {
  kAny = 0,
  kFloat32 = 1,
  kUInt8 = 2,
  kInt8 = 3,
  kFloat16 = 10,
  kBFloat16 = 16,
};

enum : int32_t { kOrtRequired = 0, kOrtOptional = 1 };

/// A function and its place in the table.
template <class Function, size_t place>
struct Entry {
  static constexpr size_t kPlace = place;
  Function* call;

  explicit Entry(const OrtApi* api)
      : call(reinterpret_cast<Function* const*>(api)[place]) {}  // NOLINT: a table of pointers
};

/// The functions in use. A status is null for success and else belongs to the caller.
struct Api {
  Entry<OrtStatus*(int32_t code, const char* message), 0> create_status;
  Entry<const char*(const OrtStatus*), 2> status_message;
  Entry<void(OrtStatus*), 93> release_status;

  Entry<OrtStatus*(const char* domain, OrtCustomOpDomain**), 26> create_domain;
  Entry<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*), 27> add_op;
  Entry<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*), 28> add_domain;
  Entry<OrtStatus*(const OrtSessionOptions*, const char* key, int* out), 237> has_config;
  /// Writes `size` characters, the closing zero among them; with null `out` only the size.
  Entry<OrtStatus*(const OrtSessionOptions*, const char* key, char* out, size_t* size), 238>
      get_config;

  Entry<OrtStatus*(OrtValue*, void** data), 51> tensor_data;
  Entry<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**), 65> type_and_shape;
  Entry<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int32_t*), 60> element_type;
  Entry<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*), 61> dimension_count;
  Entry<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t), 62> dimensions;
  Entry<void(OrtTensorTypeAndShapeInfo*), 99> release_type_and_shape;

  Entry<OrtStatus*(const OrtKernelInfo*, const char* name, int64_t*), 86> int_attribute;
  Entry<OrtStatus*(const OrtKernelInfo*, const char* name, char* out, size_t* size), 87>
      text_attribute;
  Entry<OrtStatus*(const OrtKernelInfo*, size_t*), 230> input_count;
  Entry<OrtStatus*(const OrtKernelInfo*, char* out, size_t* size), 244> node_name;
  /// Whether an input is an initialiser, and its value; the session keeps it.
  Entry<OrtStatus*(const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue**), 249>
      constant_input;

  Entry<OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue**), 90> input;
  Entry<OrtStatus*(OrtKernelContext*, size_t index, const int64_t*, size_t, OrtValue**), 91> output;

  explicit Api(const OrtApi* api);

  /// Throws Error(kInvalidArgument) with the message of a status that is a failure, and frees it.
  void check(OrtStatus* status) const;
  /// Frees a status; whether it was a success.
  bool succeeded(OrtStatus* status) const noexcept;
};

}  // namespace cospadi::onnx

// NOLINTEND(readability-identifier-naming)
