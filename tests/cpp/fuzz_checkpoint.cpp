// libFuzzer entry for everything that reads bytes of strangers (-DCOSPADI_FUZZ=ON, clang). The
// first byte chooses the reader; the rest is its input.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/checkpoint_config.hpp"
#include "core/json.hpp"
#include "core/safetensors.hpp"
#include "cospadi/status.hpp"

namespace {

void read(uint8_t choice, std::string_view input) {
  using namespace cospadi::detail;
  if (choice % 3 == 0) {
    const Json value = parse_json(input);
    (void)brief(&value);
  } else if (choice % 3 == 1) {
    (void)read_header(input, "file");
  } else {
    const CompressedModules modules = parse_quantization_config(parse_json(input), "file");
    for (size_t i = 0; i < modules.names.size(); ++i) {
      (void)expected_tensors(modules.names[i], modules.infos[i]);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  try {
    read(data[0], {reinterpret_cast<const char*>(data) + 1, size - 1});
  } catch (const cospadi::Error&) {
  } catch (const cospadi::detail::JsonError&) {
  }
  return 0;
}
