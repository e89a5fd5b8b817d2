// Read-only access to one safetensors file that nobody vouched for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cospadi/checkpoint.hpp"

namespace cospadi::detail {

/// A tensor has fewer elements than this, so that byte counts never overflow 64 bits.
inline constexpr int64_t kMaxElements = int64_t{1} << 48;

/// Bytes of one element.
int64_t type_bytes(TensorType type) noexcept;

/// The name that safetensors uses, for messages: "BF16".
const char* type_name(TensorType type) noexcept;

/// "BF16 [3, 4]", for messages.
std::string tensor_text(TensorType type, const std::vector<int64_t>& shape);

/// A regular file, mapped read-only.
class MappedFile {
 public:
  /// Opens `path`, which must lead through no link. Throws Error(kCheckpoint) if it cannot be read
  /// or is no regular file.
  explicit MappedFile(const std::string& path);
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  [[nodiscard]] std::string_view bytes() const noexcept { return {data_, size_}; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
};

/// What a header says of one tensor; `bytes` lies at `offset` in the file.
struct StoredTensor {
  std::string name;
  TensorType type = TensorType::kU8;
  std::vector<int64_t> shape;
  int64_t offset = 0;
  int64_t bytes = 0;
};

/// Reads and checks the header of a whole file: its tensors, in the order of the header, cover the
/// data exactly. `where` names the file in messages. Throws Error(kCheckpoint).
std::vector<StoredTensor> read_header(std::string_view file, const std::string& where);

}  // namespace cospadi::detail
