#include "onnx/linear_kernel.hpp"

#include <cstring>
#include <iterator>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include "core/check.hpp"
#include "core/checkpoint_config.hpp"
#include "core/layer.hpp"
#include "core/safetensors.hpp"
#include "cospadi/status.hpp"

namespace cospadi::onnx {
namespace {

using detail::Json;
using detail::JsonObject;
using detail::require;

constexpr const char* kLayer = "layer";  // the prefix of the tensors' names inside

constexpr const char* kIntegers[] = {
    "d_in", "d_out", "n_atoms", "n_identity", "sparsity", "coeffs_group"};
constexpr const char* kTexts[] = {"support", "dictionary_dtype", "coeffs_dtype"};

/// A text that is asked for twice: once for its size, once for its characters. Nothing if it is
/// not there.
template <class Call>
std::optional<std::string> sized_text(const Api& api, const Call& call) {
  size_t size = 0;
  if (!api.succeeded(call(nullptr, &size)) || size == 0) return std::nullopt;
  std::string text(size, '\0');
  if (!api.succeeded(call(text.data(), &size))) return std::nullopt;
  text.resize(std::strlen(text.c_str()));  // the closing zero was among them
  return text;
}

std::string node_name(const Api& api, const OrtKernelInfo* info) {
  const auto name =
      sized_text(api, [&](char* out, size_t* size) { return api.node_name.call(info, out, size); });
  return "CospadiLinear " + (name ? detail::brief_text(*name) : std::string("without a name"));
}

LayerInfo read_attributes(const Api& api, const OrtKernelInfo* info, const std::string& node) {
  JsonObject entry;
  for (const char* const key : kIntegers) {
    int64_t value = 0;
    if (api.succeeded(api.int_attribute.call(info, key, &value))) {
      entry.emplace_back(key, Json(value));
    }
  }
  int64_t has_bias = 0;  // ONNX has no truth values
  if (api.succeeded(api.int_attribute.call(info, "bias", &has_bias))) {
    require(has_bias == 0 || has_bias == 1,
            node + ".bias: expected 0 or 1, got " + std::to_string(has_bias));
    entry.emplace_back("bias", Json(has_bias == 1));
  }
  for (const char* const key : kTexts) {
    auto text = sized_text(api, [&](char* out, size_t* size) {
      return api.text_attribute.call(info, key, out, size);
    });
    if (text) entry.emplace_back(key, Json(std::move(*text)));
  }
  return detail::parse_module(kLayer, Json(std::move(entry)), node);
}

std::optional<TensorType> tensor_type(int32_t type) {
  switch (static_cast<OrtType>(type)) {
    case OrtType::kFloat32:
      return TensorType::kF32;
    case OrtType::kFloat16:
      return TensorType::kF16;
    case OrtType::kBFloat16:
      return TensorType::kBF16;
    case OrtType::kInt8:
      return TensorType::kI8;
    case OrtType::kUInt8:
      return TensorType::kU8;
    default:
      return std::nullopt;
  }
}

struct TypeAndShape {
  int32_t type = 0;
  std::vector<int64_t> shape;
};

TypeAndShape describe(const Api& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  api.check(api.type_and_shape.call(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
      info, api.release_type_and_shape.call);
  TypeAndShape result;
  size_t n_dims = 0;
  api.check(api.element_type.call(info, &result.type));
  api.check(api.dimension_count.call(info, &n_dims));
  result.shape.resize(n_dims);
  api.check(api.dimensions.call(info, result.shape.data(), n_dims));
  return result;
}

void* data_of(const Api& api, const OrtValue* value) {
  void* data = nullptr;
  // the interface has one function for reading and writing
  api.check(api.tensor_data.call(const_cast<OrtValue*>(value), &data));  // NOLINT
  return data;
}

/// Input `slot` as a tensor of a layer. Nothing if it is left out.
std::optional<detail::PlacedTensor> initialiser(const Api& api,
                                                const OrtKernelInfo* info,
                                                size_t slot,
                                                const std::string& node) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  if (!api.succeeded(api.constant_input.call(info, slot, &is_constant, &value))) {
    return std::nullopt;
  }
  if (is_constant == 0 || value == nullptr) return std::nullopt;
  TypeAndShape found = describe(api, value);
  const std::optional<TensorType> type = tensor_type(found.type);
  require(type.has_value(),
          node + "." + kInputs[slot].name + ": element type " + std::to_string(found.type) +
              " of ONNX is none that a layer is stored in");
  int64_t n_elements = 1;
  for (const int64_t size : found.shape) {
    n_elements = detail::checked_product(n_elements, size, kInputs[slot].name);
  }
  detail::PlacedTensor tensor;
  tensor.file = node;
  tensor.type = *type;
  tensor.shape = std::move(found.shape);
  tensor.bytes = detail::checked_product(n_elements, detail::type_bytes(*type), kInputs[slot].name);
  tensor.data = static_cast<const char*>(data_of(api, value));
  return tensor;
}

/// Copies what lies unaligned, which files of external data may bring about.
void align(detail::TensorFiles& files, detail::PlacedTensor& tensor) {
  const auto alignment = static_cast<uintptr_t>(detail::type_bytes(tensor.type));
  if (reinterpret_cast<uintptr_t>(tensor.data) % alignment == 0) return;
  const auto size = static_cast<size_t>(tensor.bytes);
  files.copies.push_back(std::make_unique<char[]>(size));
  std::memcpy(files.copies.back().get(), tensor.data, size);
  tensor.data = files.copies.back().get();
}

/// The initialisers that `layer` needs, and no others.
std::shared_ptr<detail::TensorFiles> read_tensors(const Api& api,
                                                  const OrtKernelInfo* info,
                                                  const LayerInfo& layer,
                                                  const std::string& node) {
  auto files = std::make_shared<detail::TensorFiles>();
  const std::vector<detail::ExpectedTensor> expected = detail::expected_tensors(kLayer, layer);
  const auto expectation = [&](const std::string& name) {
    for (const detail::ExpectedTensor& tensor : expected) {
      if (tensor.name == name) return &tensor;
    }
    return static_cast<const detail::ExpectedTensor*>(nullptr);
  };
  size_t n_inputs = 0;
  api.check(api.input_count.call(info, &n_inputs));
  for (size_t slot = 1; slot < std::size(kInputs); ++slot) {
    const std::string shown = node + "." + kInputs[slot].name;
    std::string name = std::string(kLayer) + "." + kInputs[slot].name;
    const detail::ExpectedTensor* const wanted = expectation(name);
    std::optional<detail::PlacedTensor> tensor;
    if (slot < n_inputs) tensor = initialiser(api, info, slot, node);
    if (wanted == nullptr) {
      require(!tensor.has_value(), shown + ": unexpected, the attributes describe no such tensor");
      continue;
    }
    require(tensor.has_value(), shown + ": missing, expected an initialiser");
    bool is_right = tensor->shape == wanted->shape;
    std::string texts;
    bool has_type = false;
    for (const TensorType type : wanted->types) {
      has_type = has_type || type == tensor->type;
      texts += (texts.empty() ? "" : " or ") + detail::tensor_text(type, wanted->shape);
    }
    is_right = is_right && has_type;
    require(is_right,
            shown + ": expected " + texts + ", got " +
                detail::tensor_text(tensor->type, tensor->shape));
    align(*files, *tensor);
    files->tensors.emplace(std::move(name), std::move(*tensor));
  }
  return files;
}

Layer make_layer(const Api& api,
                 const OrtKernelInfo* info,
                 const std::string& node,
                 int n_threads) {
  LayerInfo layer = read_attributes(api, info, node);
  const std::shared_ptr<const detail::TensorFiles> files = read_tensors(api, info, layer, node);
  std::shared_ptr<const detail::Dictionary> dictionary;
  if (layer.n_atoms > 0) dictionary = detail::load_dictionary(kLayer, layer, files);
  return Layer(std::make_shared<const Layer::Impl>(
      kLayer, std::move(layer), files, std::move(dictionary), n_threads));
}

}  // namespace

LinearKernel::LinearKernel(const OrtApi* api, const OrtKernelInfo* info, int n_threads)
    : api_(api),
      node_(node_name(api_, info)),
      n_threads_(n_threads),
      layer_(make_layer(api_, info, node_, n_threads)) {}

void LinearKernel::compute(OrtKernelContext* context) const {
  const OrtValue* input = nullptr;
  api_.check(api_.input.call(context, 0, &input));
  TypeAndShape x = describe(api_, input);
  const LayerInfo& info = layer_.info();
  require(!x.shape.empty() && x.shape.back() == info.d_in,
          node_ + ".x: expected " + std::to_string(info.d_in) +
              " inputs in the last dimension, got " +
              (x.shape.empty() ? "a scalar" : std::to_string(x.shape.back())));
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.shape.size(); ++i) {
    rows = detail::checked_product(rows, x.shape[i], "x");
  }
  x.shape.back() = info.d_out;
  OrtValue* output = nullptr;
  api_.check(api_.output.call(context, 0, x.shape.data(), x.shape.size(), &output));
  if (rows == 0) return;
  layer_.forward({data_of(api_, input), DType::kFloat32, rows, info.d_in, info.d_in},
                 {data_of(api_, output), DType::kFloat32, rows, info.d_out, info.d_out},
                 n_threads_);
}

}  // namespace cospadi::onnx
