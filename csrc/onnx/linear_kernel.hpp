// The kernel of one CospadiLinear node.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cospadi/checkpoint.hpp"
#include "onnx/ort_abi.hpp"

namespace cospadi::onnx {

/// The inputs of a node, in their order; those without `is_required` may be left out.
struct InputSlot {
  const char* name;
  bool is_required;
};

inline constexpr InputSlot kInputs[] = {
    {"x", true},
    {"coeffs", true},
    {"mask", false},
    {"coeffs_scale", false},
    {"dictionary", false},
    {"dictionary_scale", false},
    {"bias", false},
};

/// y = z S + bias with z = x D, or z = [x ; x D]: a Layer whose tensors are initialisers of the
/// graph. Sizes and types are attributes with the names and the meaning of FORMAT.md section 4,
/// tensors are those of section 5; both are taken for hostile.
class LinearKernel {
 public:
  /// Reads attributes and initialisers and checks them, every value included. Throws Error.
  LinearKernel(const OrtApi* api, const OrtKernelInfo* info, int n_threads);

  /// x float32 [..., d_in] to y float32 [..., d_out]. Throws Error; may run on several threads at
  /// once.
  void compute(OrtKernelContext* context) const;

  [[nodiscard]] const Api& api() const noexcept { return api_; }

 private:
  Api api_;
  std::string node_;
  int n_threads_;
  Layer layer_;
};

}  // namespace cospadi::onnx
