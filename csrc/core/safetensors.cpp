#include "core/safetensors.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <utility>

#include "core/json.hpp"
#include "cospadi/status.hpp"

namespace cospadi::detail {
namespace {

constexpr size_t kMaxDims = 8;
constexpr int64_t kMaxTensorName = 1024;  // characters
constexpr int64_t kPrefixBytes = 8;       // the length of the header

struct TypeRow {
  const char* name;
  TensorType type;
  int64_t bytes;
};

constexpr TypeRow kTypes[] = {
    {"BOOL", TensorType::kBool, 1},
    {"U8", TensorType::kU8, 1},
    {"I8", TensorType::kI8, 1},
    {"I16", TensorType::kI16, 2},
    {"U16", TensorType::kU16, 2},
    {"I32", TensorType::kI32, 4},
    {"U32", TensorType::kU32, 4},
    {"I64", TensorType::kI64, 8},
    {"U64", TensorType::kU64, 8},
    {"F16", TensorType::kF16, 2},
    {"BF16", TensorType::kBF16, 2},
    {"F32", TensorType::kF32, 4},
    {"F64", TensorType::kF64, 8},
    {"F8_E4M3", TensorType::kF8E4M3, 1},
    {"F8_E5M2", TensorType::kF8E5M2, 1},
};

const TypeRow& row_of(TensorType type) noexcept {
  return *std::ranges::find_if(kTypes, [&](const TypeRow& row) { return row.type == type; });
}

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::kCheckpoint, message); }

std::string list_text(const std::vector<int64_t>& values) {
  std::string text;
  for (const int64_t value : values) {
    if (!text.empty()) text += ", ";
    text += std::to_string(value);
  }
  return "[" + text + "]";
}

/// Neither control characters nor anything that could pass for a path.
bool is_tensor_name(std::string_view name) {
  int64_t n_characters = 0;
  for (const char c : name) {
    const auto byte = static_cast<uint8_t>(c);
    if (byte < 0x20 || byte == 0x7f || c == '/' || c == '\\') return false;
    n_characters += (byte & 0xc0) != 0x80 ? 1 : 0;
  }
  return n_characters >= 1 && n_characters <= kMaxTensorName;
}

std::vector<int64_t> sizes(const Json* value, const std::string& where) {
  const JsonList* const items = value == nullptr ? nullptr : value->as<JsonList>();
  if (items == nullptr) fail(where + ": expected a list of integers, got " + brief(value));
  std::vector<int64_t> result;
  result.reserve(items->size());
  for (const Json& item : *items) {
    const auto* const size = item.as<int64_t>();
    if (size == nullptr || *size < 0) {
      fail(where + ": expected sizes from 0 to 2^63 - 1, got " + brief(&item));
    }
    result.push_back(*size);
  }
  return result;
}

/// Product of sizes, or kMaxElements if it is at least that.
int64_t element_count(const std::vector<int64_t>& shape) {
  if (std::ranges::find(shape, 0) != shape.end()) return 0;
  int64_t count = 1;
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(count, size, &count) || count >= kMaxElements) return kMaxElements;
  }
  return count;
}

/// Offsets are still relative to the data.
StoredTensor parse_entry(const std::string& name, const Json& entry, const std::string& file) {
  if (!is_tensor_name(name)) fail(file + ": '" + brief_text(name) + "' is no tensor name");
  const std::string where = file + ": " + brief_text(name);
  if (entry.as<JsonObject>() == nullptr) fail(where + ": expected an object, got " + brief(&entry));
  const Json* const dtype = entry.find("dtype");
  const std::string* const key = dtype == nullptr ? nullptr : dtype->as<std::string>();
  const TypeRow* const row = std::ranges::find_if(
      kTypes, [&](const TypeRow& candidate) { return key != nullptr && *key == candidate.name; });
  if (row == std::end(kTypes)) fail(where + ": unknown dtype " + brief(dtype));
  std::vector<int64_t> shape = sizes(entry.find("shape"), where + ": shape");
  if (shape.size() > kMaxDims) {
    fail(where + ": " + std::to_string(shape.size()) + " dimensions exceed " +
         std::to_string(kMaxDims));
  }
  const std::vector<int64_t> offsets = sizes(entry.find("data_offsets"), where + ": data_offsets");
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    fail(where + ": data_offsets must be two ascending numbers");
  }
  const int64_t count = element_count(shape);
  const int64_t bytes = offsets[1] - offsets[0];
  if (count >= kMaxElements || count * row->bytes != bytes) {
    fail(where + ": " + tensor_text(row->type, shape) + " does not fill data_offsets " +
         list_text(offsets));
  }
  return {name, row->type, std::move(shape), offsets[0], bytes};
}

/// Checks that the tensors lie side by side and fill `data_bytes`.
void check_coverage(const std::vector<StoredTensor>& tensors,
                    int64_t data_bytes,
                    const std::string& file) {
  std::vector<const StoredTensor*> ordered;
  ordered.reserve(tensors.size());
  for (const StoredTensor& tensor : tensors) ordered.push_back(&tensor);
  std::ranges::sort(ordered, [](const StoredTensor* a, const StoredTensor* b) {
    return std::pair(a->offset, a->bytes) < std::pair(b->offset, b->bytes);
  });
  const auto refuse = [&](const StoredTensor& tensor, const StoredTensor* before, int64_t end) {
    fail(file + ": " + brief_text(tensor.name) + " starts at byte " +
         std::to_string(tensor.offset) + " of the data, but " +
         (before == nullptr ? "the header" : brief_text(before->name)) + " ends at " +
         std::to_string(end));
  };
  int64_t position = 0;
  const StoredTensor* previous = nullptr;
  for (const StoredTensor* tensor : ordered) {
    if (tensor->offset != position) refuse(*tensor, previous, position);
    position += tensor->bytes;
    previous = tensor;
  }
  if (position != data_bytes) {
    fail(file + ": " + (position > data_bytes ? "truncated" : "followed by unknown data") +
         ", the header describes " + std::to_string(position) + " bytes of data, the file has " +
         std::to_string(data_bytes));
  }
}

}  // namespace

int64_t type_bytes(TensorType type) noexcept { return row_of(type).bytes; }

const char* type_name(TensorType type) noexcept { return row_of(type).name; }

std::string tensor_text(TensorType type, const std::vector<int64_t>& shape) {
  return std::string(type_name(type)) + " " + list_text(shape);
}

MappedFile::MappedFile(const std::string& path) {
  // Not blocking: what was a file when it was looked at may be a pipe by now.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (file < 0) fail(path + ": cannot be read (" + std::strerror(errno) + ")");
  struct stat status{};
  const bool is_regular = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
  int problem = 0;
  if (is_regular && status.st_size > 0) {
    size_ = static_cast<size_t>(status.st_size);
    void* const mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    if (mapped == MAP_FAILED) {
      problem = errno;
    } else {
      data_ = static_cast<const char*>(mapped);
    }
  }
  ::close(file);
  if (!is_regular) fail(path + ": not a regular file");
  if (problem != 0) fail(path + ": cannot be mapped (" + std::strerror(problem) + ")");
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<char*>(data_), size_);
}

std::vector<StoredTensor> read_header(std::string_view file, const std::string& where) {
  const auto size = static_cast<int64_t>(file.size());
  if (size < kPrefixBytes) {
    fail(where + ": truncated, " + std::to_string(size) + " bytes cannot hold a header");
  }
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kPrefixBytes; ++i) {
    header_bytes |= uint64_t{static_cast<uint8_t>(file[i])} << (8 * i);
  }
  if (header_bytes > static_cast<uint64_t>(kMaxJsonBytes)) {
    fail(where + ": header of " + std::to_string(header_bytes) + " bytes exceeds " +
         std::to_string(kMaxJsonBytes));
  }
  const int64_t data_start = kPrefixBytes + static_cast<int64_t>(header_bytes);
  if (data_start > size) {
    fail(where + ": truncated, the header ends at byte " + std::to_string(data_start) + " of " +
         std::to_string(size));
  }
  Json header;
  try {
    header = parse_json(file.substr(kPrefixBytes, static_cast<size_t>(header_bytes)));
  } catch (const JsonError& error) {
    fail(where + ": not valid JSON (" + error.what() + ")");
  }
  const auto* const members = header.as<JsonObject>();
  if (members == nullptr) fail(where + ": expected a JSON object, got " + brief(&header));
  std::vector<StoredTensor> tensors;
  tensors.reserve(members->size());
  for (const auto& [name, entry] : *members) {
    if (name == "__metadata__") continue;
    tensors.push_back(parse_entry(name, entry, where));
  }
  check_coverage(tensors, size - data_start, where);
  for (StoredTensor& tensor : tensors) tensor.offset += data_start;
  return tensors;
}

}  // namespace cospadi::detail
