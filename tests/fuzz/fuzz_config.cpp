// config.json: JSON, the section quantization_config, and the tensors that follow from it.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/checkpoint_config.hpp"
#include "core/json.hpp"
#include "core/safetensors.hpp"
#include "outcome.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace cospadi;
  fuzz::read_or_refuse([&] {
    const detail::Json config = detail::parse_json({reinterpret_cast<const char*>(data), size});
    fuzz::ensure(!detail::brief(&config).empty(), "a value has a short form");
    const detail::Json* const section = config.find("quantization_config");
    if (section == nullptr) return;
    const detail::CompressedModules modules =
        detail::parse_quantization_config(*section, "config.json");
    for (size_t i = 0; i < modules.names.size(); ++i) {
      const LayerInfo& info = modules.infos[i];
      fuzz::ensure(info.sparsity >= 1 && info.sparsity <= info.total_atoms(), "1 <= s <= atoms");
      for (const detail::ExpectedTensor& tensor :
           detail::expected_tensors(modules.names[i], info)) {
        int64_t elements = 1;
        for (const int64_t extent : tensor.shape) elements *= extent;
        fuzz::ensure(elements >= 0 && elements < detail::kMaxElements, "sizes are bounded");
      }
    }
  });
  return 0;
}
