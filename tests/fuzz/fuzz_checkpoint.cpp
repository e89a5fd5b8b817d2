// A whole checkpoint through the C interface: opened, every tensor and layer of it read, every
// layer run. The input is config.json, the header and the data of model.safetensors, between lines
// of four equals signs.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../cpp/checkpoint_folder.hpp"
#include "cospadi/c_api.h"
#include "outcome.hpp"

namespace {

using cospadi::fuzz::ensure;

constexpr std::string_view kBetween = "\n====\n";
constexpr int64_t kMostValues =
    1 << 20;  // a layer without learned atoms may claim more inputs than it stores
constexpr int kTokens = 2;

/// Whether a call succeeded; a refusal has a message.
bool succeeded(cospadi_status status) {
  if (status == COSPADI_OK) return true;
  ensure(status != COSPADI_INTERNAL, "no defect of the library");
  cospadi::fuzz::ensure_message(cospadi_last_error());
  return false;
}

void run_layer(const cospadi_checkpoint* checkpoint, const char* name) {
  cospadi_layer* layer = nullptr;
  if (!succeeded(cospadi_layer_load(checkpoint, name, 1, &layer))) return;
  cospadi_layer_info info{};
  ensure(succeeded(cospadi_layer_get_info(layer, &info)), "a layer has sizes");
  if (std::max(info.d_in, info.d_out) <= kMostValues) {
    const std::vector<float> x(static_cast<size_t>(kTokens * info.d_in), 1.0F);
    std::vector<float> y(static_cast<size_t>(kTokens * info.d_out));
    const cospadi_const_matrix from{x.data(), COSPADI_FLOAT32, kTokens, info.d_in, info.d_in};
    const cospadi_matrix to{y.data(), COSPADI_FLOAT32, kTokens, info.d_out, info.d_out};
    ensure(succeeded(cospadi_layer_forward(layer, &from, &to, 1)), "a loaded layer runs");
  }
  cospadi_layer_close(layer);
}

void read_everything(const cospadi_checkpoint* checkpoint) {
  int64_t count = 0;
  ensure(succeeded(cospadi_checkpoint_tensor_count(checkpoint, &count)), "tensors are counted");
  unsigned sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    cospadi_tensor tensor{};
    ensure(succeeded(cospadi_checkpoint_tensor_at(checkpoint, i, &tensor)), "a tensor is there");
    const auto* const bytes = static_cast<const uint8_t*>(tensor.data);
    for (int64_t at = 0; at < tensor.bytes; ++at) sum += bytes[at];
  }
  double number = static_cast<double>(sum);
  (void)succeeded(cospadi_checkpoint_config_number(checkpoint, "hidden_size", &number));
  ensure(succeeded(cospadi_checkpoint_module_count(checkpoint, &count)), "modules are counted");
  for (int64_t i = 0; i < count; ++i) {
    const char* name = nullptr;
    ensure(succeeded(cospadi_checkpoint_module_name(checkpoint, i, &name)), "a module has a name");
    run_layer(checkpoint, name);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const cospadi::TempFolder folder;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t first = input.find(kBetween);
  if (first == std::string_view::npos) return 0;
  const size_t second = input.find(kBetween, first + kBetween.size());
  if (second == std::string_view::npos) return 0;
  const size_t header = first + kBetween.size();
  folder.write("config.json", std::string(input.substr(0, first)));
  folder.write("model.safetensors",
               cospadi::with_header(std::string(input.substr(header, second - header)),
                                    std::string(input.substr(second + kBetween.size()))));
  cospadi_checkpoint* checkpoint = nullptr;
  if (succeeded(cospadi_checkpoint_open(folder.text().c_str(), &checkpoint))) {
    read_everything(checkpoint);
    cospadi_checkpoint_close(checkpoint);
  }
  return 0;
}
