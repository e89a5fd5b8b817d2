// `quantization_config` of a checkpoint (FORMAT.md section 4), and the tensors that follow from it.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/json.hpp"
#include "cospadi/checkpoint.hpp"
#include "cospadi/packed.hpp"

namespace cospadi::detail {

/// How coefficients of a type lie in a file.
struct CoeffsForm {
  bool is_packed;
  CodeFormat format;  // packed ones
  DType dtype;        // the others

  [[nodiscard]] bool has_scale() const noexcept {
    return is_packed && format.kind == CodeKind::kInteger;
  }
};

CoeffsForm coeffs_form(CoeffsType type) noexcept;

/// The configuration of all compressed modules, in the order of the file.
struct CompressedModules {
  std::vector<std::string> names;
  std::vector<LayerInfo> infos;
  std::unordered_map<std::string, size_t> index;

  [[nodiscard]] const LayerInfo* find(const std::string& name) const;
};

/// Checks `entry`, what `modules` says of the module `name`. Throws Error(kCheckpoint) or
/// Error(kNewerFormat) naming the first field that is wrong; `where` is put before the name.
LayerInfo parse_module(const std::string& name, const Json& entry, const std::string& where);

/// Checks `section`, the value of quantization_config. Throws Error(kCheckpoint) or
/// Error(kNewerFormat) naming the first field that is wrong; `where` is the file.
CompressedModules parse_quantization_config(const Json& section, const std::string& where);

/// What must lie under a name.
struct ExpectedTensor {
  std::string name;
  std::vector<TensorType> types;  // one of them
  std::vector<int64_t> shape;
};

/// Everything that the files hold for a module, and nothing else may be there under its name.
std::vector<ExpectedTensor> expected_tensors(const std::string& name, const LayerInfo& info);

}  // namespace cospadi::detail
