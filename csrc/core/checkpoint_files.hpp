// The files of a checkpoint folder: which may be read, and which tensors they hold.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.hpp"
#include "core/safetensors.hpp"

namespace cospadi::detail {

/// One tensor in its place.
struct PlacedTensor {
  std::string file;  // path, for messages
  TensorType type = TensorType::kU8;
  std::vector<int64_t> shape;
  const char* data = nullptr;  // not null; aligned for the type
  int64_t bytes = 0;
};

/// All tensors of a folder, and what holds their bytes.
struct TensorFiles {
  std::map<std::string, PlacedTensor, std::less<>> tensors;
  std::vector<std::unique_ptr<MappedFile>> files;
  /// Copies of tensors that lie unaligned in their file, which writers avoid.
  std::vector<std::unique_ptr<char[]>> copies;
};

/// The place that `folder / name` leads to: a regular file inside the folder, or in the `blobs`
/// beside `snapshots/<revision>` of a hub cache. Throws Error(kCheckpoint) for everything else.
std::filesystem::path checked_file(const std::filesystem::path& folder, const std::string& name);

/// A file that holds one JSON object; `path` comes from checked_file, `shown` is for messages.
Json read_json_object(const std::filesystem::path& path, const std::string& shown);

/// Maps model.safetensors, or the shards that model.safetensors.index.json names, and reads their
/// headers. Throws Error(kCheckpoint) if a file is missing or damaged, leads out of the folder, or
/// disagrees with the index.
TensorFiles open_tensor_files(const std::filesystem::path& folder);

}  // namespace cospadi::detail
