#include "cospadi/checkpoint.hpp"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <system_error>
#include <unordered_set>
#include <utility>

#include "core/check.hpp"
#include "core/checkpoint_config.hpp"
#include "core/checkpoint_files.hpp"
#include "core/layer.hpp"
#include "cospadi/status.hpp"
#include "cpu/kernel_table.hpp"

namespace cospadi {

struct COSPADI_LOCAL Checkpoint::Impl {
  detail::Json config;
  detail::CompressedModules modules;
  std::shared_ptr<const detail::TensorFiles> files;
  std::vector<std::string> tensor_names;

  /// Dictionaries in use, by owner, so that members share one copy.
  mutable std::mutex mutex;
  mutable std::map<std::string, std::weak_ptr<const detail::Dictionary>> dictionaries;

  std::shared_ptr<const detail::Dictionary> dictionary(const std::string& owner,
                                                       const LayerInfo& info) const {
    const std::scoped_lock guard(mutex);
    std::weak_ptr<const detail::Dictionary>& place = dictionaries[owner];
    std::shared_ptr<const detail::Dictionary> result = place.lock();
    if (result == nullptr) place = result = detail::load_dictionary(owner, info, files);
    return result;
  }
};

namespace {

namespace fs = std::filesystem;

constexpr const char* kConfigFile = "config.json";
constexpr const char* kConfigKey = "quantization_config";

[[noreturn]] void fail(ErrorCode code, const std::string& message) { throw Error(code, message); }

/// The value of quantization_config, if it is one of ours or damaged.
const detail::Json& compressed_section(const detail::Json& config, const std::string& shown) {
  const detail::Json* const section = config.find(kConfigKey);
  if (section == nullptr || section->is_null()) {
    fail(ErrorCode::kNotCompressed,
         shown + ": no " + kConfigKey + ": this model is not compressed");
  }
  const detail::Json* const method = section->find("quant_method");
  const std::string* const name = method == nullptr ? nullptr : method->as<std::string>();
  if (name != nullptr && *name != "cospadi") {
    fail(ErrorCode::kNotCompressed,
         shown + ": " + kConfigKey + ".quant_method: expected 'cospadi', got " +
             detail::brief(method));
  }
  return *section;
}

/// Checks that the files hold exactly the tensors that the config describes.
void check_tensors(const detail::CompressedModules& modules,
                   const detail::TensorFiles& files,
                   const std::string& folder) {
  std::unordered_set<std::string> expected;
  for (size_t i = 0; i < modules.names.size(); ++i) {
    for (const auto& tensor : detail::expected_tensors(modules.names[i], modules.infos[i])) {
      expected.insert(tensor.name);
      const auto found = files.tensors.find(tensor.name);
      if (found == files.tensors.end()) {
        fail(ErrorCode::kCheckpoint,
             folder + ": " + tensor.name + ": missing from the checkpoint's safetensors files");
      }
      const detail::PlacedTensor& placed = found->second;
      const bool has_type = std::ranges::find(tensor.types, placed.type) != tensor.types.end();
      if (!has_type || placed.shape != tensor.shape) {
        fail(ErrorCode::kCheckpoint,
             placed.file + ": " + tensor.name + ": expected " +
                 detail::tensor_text(tensor.types[0], tensor.shape) + ", got " +
                 detail::tensor_text(placed.type, placed.shape));
      }
    }
  }
  for (const auto& [name, placed] : files.tensors) {
    if (expected.contains(name)) continue;
    for (size_t dot = name.rfind('.'); dot != std::string::npos && dot > 0;
         dot = name.rfind('.', dot - 1)) {
      if (modules.find(name.substr(0, dot)) == nullptr) continue;
      fail(ErrorCode::kCheckpoint,
           placed.file + ": " + detail::brief_text(name) + ": not part of the compressed module " +
               name.substr(0, dot) + " as " + kConfigKey + " describes it");
    }
  }
}

const detail::Json* find_path(const detail::Json& config, std::string_view path) {
  const detail::Json* value = &config;
  while (value != nullptr) {
    const size_t dot = path.find('.');
    value = value->find(path.substr(0, dot));
    if (dot == std::string_view::npos) break;
    path.remove_prefix(dot + 1);
  }
  return value;
}

}  // namespace

Checkpoint Checkpoint::open(const std::string& folder) {
  const fs::path root(folder);
  std::error_code error;
  if (!fs::is_directory(root, error)) {
    fail(ErrorCode::kNotCompressed, folder + ": no such folder");
  }
  if (!fs::exists(root / kConfigFile, error)) {
    fail(ErrorCode::kNotCompressed,
         folder + ": " + kConfigFile + " is missing: not a model folder, or one left unfinished");
  }
  const std::string shown = (root / kConfigFile).string();
  auto impl = std::make_shared<Impl>();
  impl->config = detail::read_json_object(detail::checked_file(root, kConfigFile), shown);
  impl->modules = detail::parse_quantization_config(compressed_section(impl->config, shown), shown);
  auto files = std::make_shared<detail::TensorFiles>(detail::open_tensor_files(root));
  check_tensors(impl->modules, *files, folder);
  for (const auto& [name, placed] : files->tensors) impl->tensor_names.push_back(name);
  impl->files = std::move(files);
  return Checkpoint(std::move(impl));
}

const std::vector<std::string>& Checkpoint::modules() const noexcept {
  return impl_->modules.names;
}

const LayerInfo& Checkpoint::info(std::string_view module) const {
  const LayerInfo* const found = impl_->modules.find(std::string(module));
  detail::require(found != nullptr,
                  "module: '" + detail::brief_text(module) + "' is not a compressed module");
  return *found;
}

Layer Checkpoint::layer(std::string_view module, int n_threads) const {
  const LayerInfo& layer_info = info(module);
  const std::string name(module);
  std::shared_ptr<const detail::Dictionary> dictionary;
  if (layer_info.n_atoms > 0) {
    dictionary =
        impl_->dictionary(layer_info.leader.empty() ? name : layer_info.leader, layer_info);
  }
  return Layer(std::make_shared<Layer::Impl>(
      name, layer_info, impl_->files, std::move(dictionary), n_threads));
}

const std::vector<std::string>& Checkpoint::tensor_names() const noexcept {
  return impl_->tensor_names;
}

TensorView Checkpoint::tensor(std::string_view name) const {
  const auto found = impl_->files->tensors.find(name);
  detail::require(found != impl_->files->tensors.end(),
                  "name: no tensor '" + detail::brief_text(name) + "'");
  const detail::PlacedTensor& placed = found->second;
  return {placed.data, placed.type, placed.shape, placed.bytes};
}

std::optional<double> Checkpoint::config_number(std::string_view path) const {
  const detail::Json* const value = find_path(impl_->config, path);
  if (value == nullptr) return std::nullopt;
  if (const auto* const integer = value->as<int64_t>()) return static_cast<double>(*integer);
  const auto* const number = value->as<double>();
  return number == nullptr ? std::nullopt : std::optional<double>(*number);
}

std::optional<std::string_view> Checkpoint::config_text(std::string_view path) const {
  const detail::Json* const value = find_path(impl_->config, path);
  const std::string* const text = value == nullptr ? nullptr : value->as<std::string>();
  return text == nullptr ? std::nullopt : std::optional<std::string_view>(*text);
}

void copy_floats(const TensorView& tensor, std::span<float> out) {
  DType dtype = DType::kFloat32;
  switch (tensor.type) {
    case TensorType::kF32:
      break;
    case TensorType::kBF16:
      dtype = DType::kBFloat16;
      break;
    case TensorType::kF16:
      dtype = DType::kFloat16;
      break;
    default:
      fail(ErrorCode::kInvalidArgument,
           std::string("tensor: expected F32, BF16 or F16, got ") + detail::type_name(tensor.type));
  }
  const auto n = static_cast<int64_t>(out.size());
  detail::require(n == tensor.bytes / dtype_bytes(dtype),
                  "out: expected " + std::to_string(tensor.bytes / dtype_bytes(dtype)) +
                      " elements, got " + std::to_string(n));
  cpu::kernels().sparse_gemm.load_floats(dtype, n, tensor.data, out.data());
}

}  // namespace cospadi
