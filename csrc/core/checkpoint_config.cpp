#include "core/checkpoint_config.hpp"

#include <algorithm>
#include <span>
#include <string_view>
#include <utility>

#include "core/safetensors.hpp"
#include "cospadi/mask.hpp"
#include "cospadi/status.hpp"

namespace cospadi::detail {
namespace {

constexpr int64_t kFormatVersion = 2;
constexpr size_t kMaxModules = size_t{1} << 20;
constexpr size_t kMaxNameLength = 512;
constexpr int64_t kMaxSize = int64_t{1} << 31;  // sizes are below

template <class T>
struct Named {
  std::string_view name;
  T value;
};

constexpr Named<DictionaryType> kDictionaryTypes[] = {
    {"bfloat16", DictionaryType::kBFloat16},
    {"float16", DictionaryType::kFloat16},
    {"float32", DictionaryType::kFloat32},
    {"int8", DictionaryType::kInt8},
};
constexpr Named<CoeffsType> kCoeffsTypes[] = {
    {"bfloat16", CoeffsType::kBFloat16},
    {"float16", CoeffsType::kFloat16},
    {"float32", CoeffsType::kFloat32},
    {"bfloat14", CoeffsType::kBFloat14},
    {"int8", CoeffsType::kInt8},
    {"int6", CoeffsType::kInt6},
    {"int5", CoeffsType::kInt5},
    {"int4", CoeffsType::kInt4},
    {"int3", CoeffsType::kInt3},
};
constexpr Named<bool> kSupports[] = {{"mask", true}, {"full", false}};
constexpr Named<bool> kLayerTypes[] = {{"linear", false}, {"conv1d", true}};

constexpr std::string_view kRequired[] = {
    "d_in", "d_out", "n_atoms", "sparsity", "support", "bias"};
constexpr std::string_view kOptional[] = {
    "dictionary_dtype", "coeffs_dtype", "n_identity", "coeffs_group", "layer_type", "dictionary"};

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::kCheckpoint, message); }

[[noreturn]] void fail_newer(const std::string& message) {
  throw Error(ErrorCode::kNewerFormat,
              message + ": made by a newer version, this one reads format " +
                  std::to_string(kFormatVersion) + "; upgrade cospadi");
}

bool contains(std::span<const std::string_view> words, std::string_view word) {
  return std::ranges::find(words, word) != words.end();
}

bool is_name_character(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

/// Letters, digits, _ and - between dots; no part is empty or begins with -.
bool is_module_name(std::string_view name) {
  if (name.empty() || name.size() > kMaxNameLength) return false;
  bool is_start = true;
  for (const char c : name) {
    if (c == '.' ? is_start : !(is_name_character(c) || (c == '-' && !is_start))) return false;
    is_start = c == '.';
  }
  return !is_start;
}

/// One value of `modules`.
class Entry {
 public:
  Entry(const Json& json, std::string where) : where_(std::move(where)) {
    const auto* const members = json.as<JsonObject>();
    if (members == nullptr) fail(where_ + ": expected an object, got " + brief(&json));
    for (const auto& [key, value] : *members) {
      if (!contains(kRequired, key) && !contains(kOptional, key)) {
        fail_newer(where_ + ": unknown key '" + brief_text(key) + "'");
      }
    }
    for (const std::string_view key : kRequired) {
      if (json.find(key) == nullptr) fail(field(key) + ": missing");
    }
    json_ = &json;
  }

  [[nodiscard]] std::string field(std::string_view key) const {
    return where_ + "." + std::string(key);
  }

  [[nodiscard]] int64_t integer(std::string_view key, int64_t least, int64_t missing = 0) const {
    const Json* const value = json_->find(key);
    if (value == nullptr) return missing;
    const auto* const number = value->as<int64_t>();
    if (number == nullptr || *number < least || *number >= kMaxSize) {
      fail(field(key) + ": expected an integer from " + std::to_string(least) + " to " +
           std::to_string(kMaxSize - 1) + ", got " + brief(value));
    }
    return *number;
  }

  [[nodiscard]] bool flag(std::string_view key) const {
    const Json* const value = json_->find(key);
    const bool* const result = value->as<bool>();
    if (result == nullptr) fail(field(key) + ": expected true or false, got " + brief(value));
    return *result;
  }

  template <class T, size_t n>
  T choice(std::string_view key, const Named<T> (&known)[n], T missing) const {
    const std::string* const name = text(key);
    if (name == nullptr) return missing;
    std::string names;
    for (const Named<T>& candidate : known) {
      if (candidate.name == *name) return candidate.value;
      names += (names.empty() ? "" : ", ") + std::string(candidate.name);
    }
    fail_newer(field(key) + ": '" + brief_text(*name) + "' is none of " + names);
  }

  /// Null if there is no such key.
  [[nodiscard]] const std::string* text(std::string_view key) const {
    const Json* const value = json_->find(key);
    if (value == nullptr) return nullptr;
    const auto* const result = value->as<std::string>();
    if (result == nullptr) fail(field(key) + ": expected text, got " + brief(value));
    return result;
  }

 private:
  std::string where_;
  const Json* json_ = nullptr;
};

/// Checks what concerns the numbers of atoms together.
void check_atoms(const LayerInfo& info, const Entry& entry) {
  const auto text = [](int64_t value) { return std::to_string(value); };
  const int64_t total = info.total_atoms();
  if (info.n_identity != 0 && info.n_identity != info.d_in) {
    fail(entry.field("n_identity") + ": expected 0 or d_in = " + text(info.d_in) + ", got " +
         text(info.n_identity));
  }
  if (total == 0) fail(entry.field("n_atoms") + ": expected at least 1 without identity atoms");
  if (info.n_atoms == 0 &&
      (info.dictionary_type != DictionaryType::kBFloat16 || !info.leader.empty())) {
    fail(entry.field("n_atoms") +
         ": without a dictionary (0 atoms) there is nothing to share, and dictionary_dtype must "
         "be bfloat16");
  }
  if (info.sparsity > total) {
    fail(entry.field("sparsity") + ": " + text(info.sparsity) + " exceeds the " + text(total) +
         " atoms");
  }
  if (!info.has_mask && info.sparsity != total) {
    fail(entry.field("sparsity") + ": full support uses all " + text(total) + " atoms, got " +
         text(info.sparsity));
  }
  if (total >= kMaxSize) fail(entry.field("n_atoms") + ": too many atoms in all: " + text(total));
  // Sizes are below 2^31, so the products fit. The code's bound also covers coeffs and their
  // scales (s <= A) and the mask.
  for (const auto& [rows, cols] : {std::pair(info.d_in, info.n_atoms),
                                   std::pair(total, info.d_out),
                                   std::pair(info.d_in, info.d_out)}) {
    if (rows * cols >= kMaxElements) {
      fail(entry.field("d_in") + ": " + text(rows) + " x " + text(cols) +
           " elements exceed the limit of 2^48");
    }
  }
}

/// The first format version that can express a module.
int64_t version_of(const LayerInfo& info) {
  const bool is_first = info.leader.empty() && info.n_identity == 0 &&
                        !coeffs_form(info.coeffs_type).is_packed &&
                        info.dictionary_type != DictionaryType::kInt8;
  return is_first ? 1 : 2;
}

/// Checks that the leader of every member is there, leads itself and has what members expect.
void check_sharing(const CompressedModules& modules, const std::string& where) {
  for (size_t i = 0; i < modules.names.size(); ++i) {
    const LayerInfo& info = modules.infos[i];
    if (info.leader.empty()) continue;
    const std::string field = where + "." + modules.names[i] + ".dictionary: ";
    const LayerInfo* const leader = modules.find(info.leader);
    if (leader == nullptr) fail(field + "'" + info.leader + "' is no compressed module");
    if (!leader->leader.empty()) {
      fail(field + info.leader + " has no dictionary of its own, it uses that of " +
           leader->leader);
    }
    if (leader->d_in != info.d_in || leader->n_atoms != info.n_atoms ||
        leader->n_identity != info.n_identity || leader->dictionary_type != info.dictionary_type) {
      fail(field + "d_in, n_atoms, n_identity and dictionary_dtype must be those of " +
           info.leader);
    }
  }
}

/// Checks that `groups` says the same as the modules.
void check_groups(const Json* groups, const CompressedModules& modules, const std::string& where) {
  using Pair = std::pair<std::string, std::string>;  // leader, member
  std::vector<Pair> stated;
  std::vector<Pair> found;
  for (size_t i = 0; i < modules.names.size(); ++i) {
    const std::string& leader = modules.infos[i].leader;
    if (!leader.empty()) found.emplace_back(leader, modules.names[i]);
  }
  bool is_same = true;
  if (groups != nullptr) {
    const auto* const leaders = groups->as<JsonObject>();
    if (leaders == nullptr) fail(where + ": expected an object, got " + brief(groups));
    for (const auto& [leader, members] : *leaders) {
      const auto* const names = members.as<JsonList>();
      if (names == nullptr) fail(where + "." + brief_text(leader) + ": expected a list of names");
      is_same = is_same && !names->empty();
      for (const Json& name : *names) {
        const auto* const text = name.as<std::string>();
        if (text == nullptr) fail(where + "." + brief_text(leader) + ": expected a list of names");
        stated.emplace_back(leader, *text);
      }
    }
  }
  std::ranges::sort(stated);
  std::ranges::sort(found);
  if (!is_same || stated != found) fail(where + ": contradicts the modules");
}

/// No module lies inside another.
void check_nesting(const CompressedModules& modules, const std::string& where) {
  const auto refuse = [&](const std::string& name, const std::string& parent) {
    fail(where + ": " + name + " lies inside " + parent);
  };
  for (const std::string& name : modules.names) {
    for (size_t dot = name.rfind('.'); dot != std::string::npos && dot > 0;
         dot = name.rfind('.', dot - 1)) {
      const std::string parent = name.substr(0, dot);
      if (modules.find(parent) != nullptr) refuse(name, parent);
    }
  }
}

int64_t parse_version(const Json& section, const std::string& where) {
  const Json* const value = section.find("format_version");
  const int64_t* const version = value == nullptr ? nullptr : value->as<int64_t>();
  if (version == nullptr || *version < 1) {
    fail(where + ".format_version: expected a positive integer, got " + brief(value));
  }
  if (*version > kFormatVersion) {
    fail_newer(where + ": format_version " + std::to_string(*version));
  }
  return *version;
}

}  // namespace

CoeffsForm coeffs_form(CoeffsType type) noexcept {
  const auto integer = [](int bits) {
    return CoeffsForm{true, {CodeKind::kInteger, bits}, DType::kFloat32};
  };
  switch (type) {
    case CoeffsType::kFloat32:
      return {false, {}, DType::kFloat32};
    case CoeffsType::kBFloat16:
      return {false, {}, DType::kBFloat16};
    case CoeffsType::kFloat16:
      return {false, {}, DType::kFloat16};
    case CoeffsType::kBFloat14:
      return {true, {CodeKind::kBFloat, 14}, DType::kFloat32};
    case CoeffsType::kInt8:
      return integer(8);
    case CoeffsType::kInt6:
      return integer(6);
    case CoeffsType::kInt5:
      return integer(5);
    case CoeffsType::kInt4:
      return integer(4);
    case CoeffsType::kInt3:
      break;
  }
  return integer(3);
}

const LayerInfo* CompressedModules::find(const std::string& name) const {
  const auto found = index.find(name);
  return found == index.end() ? nullptr : &infos[found->second];
}

LayerInfo parse_module(const std::string& name, const Json& json, const std::string& where) {
  const Entry entry(json, where + "." + name);
  LayerInfo info;
  info.d_in = entry.integer("d_in", 1);
  info.d_out = entry.integer("d_out", 1);
  info.n_atoms = entry.integer("n_atoms", 0);
  info.n_identity = entry.integer("n_identity", 0);
  info.sparsity = entry.integer("sparsity", 1);
  info.coeffs_group = entry.integer("coeffs_group", 0);
  info.has_mask = entry.choice("support", kSupports, true);
  info.has_bias = entry.flag("bias");
  info.is_conv1d = entry.choice("layer_type", kLayerTypes, false);
  info.dictionary_type =
      entry.choice("dictionary_dtype", kDictionaryTypes, DictionaryType::kBFloat16);
  info.coeffs_type = entry.choice("coeffs_dtype", kCoeffsTypes, CoeffsType::kBFloat16);
  const std::string* const dictionary = entry.text("dictionary");
  if (dictionary != nullptr && *dictionary != name) {
    if (!is_module_name(*dictionary)) {
      fail(entry.field("dictionary") + ": '" + brief_text(*dictionary) + "' is no module name");
    }
    info.leader = *dictionary;
  }
  check_atoms(info, entry);
  if (info.coeffs_group != 0 && !coeffs_form(info.coeffs_type).has_scale()) {
    fail(entry.field("coeffs_group") + ": these coefficients have no scale, expected 0, got " +
         std::to_string(info.coeffs_group));
  }
  return info;
}

CompressedModules parse_quantization_config(const Json& section, const std::string& file) {
  const std::string where = file + ": quantization_config";
  if (section.as<JsonObject>() == nullptr) {
    fail(where + ": expected an object, got " + brief(&section));
  }
  const Json* const method = section.find("quant_method");
  const std::string* const method_name = method == nullptr ? nullptr : method->as<std::string>();
  if (method_name == nullptr || *method_name != "cospadi") {
    fail(where + ".quant_method: expected 'cospadi', got " + brief(method));
  }
  const int64_t version = parse_version(section, where);
  for (const std::string_view key : {"ratio", "producer"}) {
    const Json* const value = section.find(key);
    if (value != nullptr && value->as<JsonObject>() == nullptr) {
      fail(where + "." + std::string(key) + ": expected an object, got " + brief(value));
    }
  }
  const std::string inside = where + ".modules";
  const Json* const entries = section.find("modules");
  const JsonObject* const members = entries == nullptr ? nullptr : entries->as<JsonObject>();
  if (members == nullptr) fail(inside + ": expected an object, got " + brief(entries));
  if (members->empty() || members->size() > kMaxModules) {
    fail(inside + ": expected 1 to " + std::to_string(kMaxModules) + " modules, got " +
         std::to_string(members->size()));
  }
  CompressedModules modules;
  for (const auto& [name, entry] : *members) {
    if (!is_module_name(name)) {
      fail(inside + ": '" + brief_text(name) +
           "' is no module name (letters, digits, _ and - between dots)");
    }
    modules.index.emplace(name, modules.names.size());
    modules.names.push_back(name);
    modules.infos.push_back(parse_module(name, entry, inside));
  }
  check_nesting(modules, inside);
  check_sharing(modules, inside);
  check_groups(section.find("groups"), modules, where + ".groups");
  for (size_t i = 0; i < modules.names.size(); ++i) {
    const int64_t needed = version_of(modules.infos[i]);
    if (needed > version) {
      fail(inside + "." + modules.names[i] + ": needs format_version " + std::to_string(needed) +
           ", got " + std::to_string(version));
    }
  }
  return modules;
}

std::vector<ExpectedTensor> expected_tensors(const std::string& name, const LayerInfo& info) {
  const std::vector<TensorType> floats = {TensorType::kBF16, TensorType::kF16, TensorType::kF32};
  const auto float_type = [](DType dtype) {
    return dtype == DType::kFloat32
               ? TensorType::kF32
               : (dtype == DType::kBFloat16 ? TensorType::kBF16 : TensorType::kF16);
  };
  std::vector<ExpectedTensor> result;
  const auto add =
      [&](const char* part, std::vector<TensorType> types, std::vector<int64_t> shape) {
        result.push_back({name + "." + part, std::move(types), std::move(shape)});
      };
  add("weight", floats, {0});
  if (info.n_atoms > 0 && info.leader.empty()) {
    if (info.dictionary_type == DictionaryType::kInt8) {
      add("dictionary", {TensorType::kI8}, {info.n_atoms, info.d_in});
      add("dictionary_scale", {TensorType::kBF16}, {info.n_atoms});
    } else {
      // the floating-point types have the numbers of DType
      const TensorType type = float_type(static_cast<DType>(info.dictionary_type));
      add("dictionary", {type}, {info.d_in, info.n_atoms});
    }
  }
  if (info.has_mask) {
    add("mask", {TensorType::kU8}, {info.d_out, mask_row_bytes(info.total_atoms())});
  }
  const CoeffsForm form = coeffs_form(info.coeffs_type);
  if (form.is_packed) {
    add("coeffs",
        {TensorType::kU8},
        {info.d_out, packed_row_bytes(info.sparsity, form.format.bits)});
  } else {
    add("coeffs", {float_type(form.dtype)}, {info.d_out, info.sparsity});
  }
  if (form.has_scale()) {
    add("coeffs_scale",
        {TensorType::kBF16},
        {info.d_out, scale_group_count(info.sparsity, info.coeffs_group)});
  }
  if (info.has_bias) add("bias", floats, {info.d_out});
  return result;
}

}  // namespace cospadi::detail
