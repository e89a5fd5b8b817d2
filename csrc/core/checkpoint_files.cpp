#include "core/checkpoint_files.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "cospadi/status.hpp"

namespace cospadi::detail {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
/// What empty tensors point to, since their file may end there.
constexpr int64_t kNothing = 0;

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::kCheckpoint, message); }

bool is_below(const fs::path& path, const fs::path& folder) {
  const auto [in_folder, in_path] = std::ranges::mismatch(folder, path);
  return in_folder == folder.end();
}

/// A plain file name that ends in .safetensors.
bool is_shard_name(std::string_view name) {
  constexpr std::string_view kSuffix = ".safetensors";
  constexpr size_t kMaxStem = 201;
  if (!name.ends_with(kSuffix)) return false;
  const std::string_view stem = name.substr(0, name.size() - kSuffix.size());
  const auto is_word = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  };
  return !stem.empty() && stem.size() <= kMaxStem && is_word(stem.front()) &&
         std::ranges::all_of(stem, [&](char c) { return is_word(c) || c == '.' || c == '-'; });
}

/// Adds the tensors of one file.
void add_file(const fs::path& folder, const std::string& name, TensorFiles& out) {
  const std::string shown = (folder / name).string();
  out.files.push_back(std::make_unique<MappedFile>(checked_file(folder, name).string()));
  const std::string_view bytes = out.files.back()->bytes();
  for (StoredTensor& stored : read_header(bytes, shown)) {
    const char* data = bytes.data() + stored.offset;
    if (stored.bytes == 0) {
      data = reinterpret_cast<const char*>(&kNothing);
    } else if (reinterpret_cast<uintptr_t>(data) % static_cast<size_t>(type_bytes(stored.type))) {
      const auto size = static_cast<size_t>(stored.bytes);
      out.copies.push_back(std::make_unique<char[]>(size));
      std::memcpy(out.copies.back().get(), data, size);
      data = out.copies.back().get();
    }
    PlacedTensor placed{shown, stored.type, std::move(stored.shape), data, stored.bytes};
    const auto [place, is_new] = out.tensors.emplace(stored.name, std::move(placed));
    if (!is_new) {
      fail(shown + ": " + brief_text(stored.name) + ": also in " + place->second.file);
    }
  }
}

/// The file of every tensor, from the index.
std::unordered_map<std::string, std::string> read_index(const fs::path& folder) {
  const std::string shown = (folder / kIndexFile).string();
  const Json index = read_json_object(checked_file(folder, kIndexFile), shown);
  const Json* const value = index.find("weight_map");
  const JsonObject* const members = value == nullptr ? nullptr : value->as<JsonObject>();
  if (members == nullptr || members->empty()) fail(shown + ": weight_map is missing or empty");
  std::unordered_map<std::string, std::string> places;
  for (const auto& [name, file] : *members) {
    const auto* const text = file.as<std::string>();
    if (text == nullptr || !is_shard_name(*text)) {
      fail(shown + ": " + brief_text(name) + " lies in " + brief(&file) +
           ", which is not a plain safetensors file name");
    }
    places.emplace(name, *text);
  }
  return places;
}

}  // namespace

fs::path checked_file(const fs::path& folder, const std::string& name) {
  const std::string shown = (folder / name).string();
  std::error_code root_error;
  std::error_code error;
  const fs::path root = fs::canonical(folder, root_error);
  const fs::path target = fs::canonical(folder / name, error);
  if (root_error || error) fail(shown + ": missing, or a link that leads nowhere");
  const bool is_cached = root.parent_path().filename() == "snapshots" &&
                         target.parent_path() == root.parent_path().parent_path() / "blobs";
  if (!is_cached && !is_below(target, root)) {
    fail(shown + ": a link that leads out of the checkpoint folder");
  }
  if (!fs::is_regular_file(target, error)) fail(shown + ": not a regular file");
  return target;
}

Json read_json_object(const fs::path& path, const std::string& shown) {
  const MappedFile file(path.string());
  if (static_cast<int64_t>(file.bytes().size()) > kMaxJsonBytes) {
    fail(shown + ": " + std::to_string(file.bytes().size()) + " bytes exceed the limit of " +
         std::to_string(kMaxJsonBytes));
  }
  Json value;
  try {
    value = parse_json(file.bytes());
  } catch (const JsonError& error) {
    fail(shown + ": not valid JSON (" + error.what() + ")");
  }
  if (value.as<JsonObject>() == nullptr) {
    fail(shown + ": expected a JSON object, got " + brief(&value));
  }
  return value;
}

TensorFiles open_tensor_files(const fs::path& folder) {
  std::error_code error;
  const bool has_index = fs::exists(folder / kIndexFile, error);
  TensorFiles result;
  if (fs::exists(folder / kSingleFile, error) || !has_index) {
    // Loaders disagree on which of the two they take.
    if (has_index) {
      fail(folder.string() + ": both " + kSingleFile + " and " + kIndexFile + ": ambiguous");
    }
    add_file(folder, kSingleFile, result);
    return result;
  }
  const auto places = read_index(folder);
  std::vector<std::string> shards;
  shards.reserve(places.size());
  for (const auto& place : places) shards.push_back(place.second);
  std::ranges::sort(shards);
  // not std::ranges::unique: clang 14 cannot compile what gcc 12's library returns from it
  shards.erase(std::unique(shards.begin(), shards.end()), shards.end());
  for (const std::string& shard : shards) add_file(folder, shard, result);
  for (const auto& [name, tensor] : result.tensors) {
    const auto place = places.find(name);
    if (place == places.end() || tensor.file != (folder / place->second).string()) {
      fail(tensor.file + ": " + brief_text(name) + ": the index places it elsewhere");
    }
  }
  for (const auto& [name, file] : places) {
    if (!result.tensors.contains(name)) {
      fail((folder / file).string() + ": " + brief_text(name) + ": missing, the index names it");
    }
  }
  return result;
}

}  // namespace cospadi::detail
