// The header of a safetensors file. The first byte says how: even, the rest is a whole file; odd,
// it is the text of a header, and the next byte the number of data bytes, so that mutations need
// not keep the length in front right.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "../cpp/checkpoint_folder.hpp"
#include "core/safetensors.hpp"
#include "outcome.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace cospadi;
  if (size < 2) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  const std::string file = data[0] % 2 == 0
                               ? std::string(rest)
                               : with_header(std::string(rest.substr(1)),
                                             std::string(static_cast<uint8_t>(rest[0]), '\0'));
  fuzz::read_or_refuse([&] {
    for (const detail::StoredTensor& tensor : detail::read_header(file, "file")) {
      fuzz::ensure(tensor.offset >= 8 && tensor.bytes >= 0, "a tensor lies behind the length");
      fuzz::ensure(tensor.bytes <= static_cast<int64_t>(file.size()) - tensor.offset,
                   "a tensor lies inside the file");
      int64_t elements = 1;
      for (const int64_t extent : tensor.shape) elements *= extent;
      fuzz::ensure(elements * detail::type_bytes(tensor.type) == tensor.bytes,
                   "a tensor has the bytes of its shape");
    }
  });
  return 0;
}
