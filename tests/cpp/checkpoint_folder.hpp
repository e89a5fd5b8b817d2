// Small checkpoints made in the test, whose layers are known exactly.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace cospadi {

struct StoredBytes {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

/// A folder of its own, removed at the end; in memory where that is possible, since some tests
/// write thousands of files.
class TempFolder {
 public:
  TempFolder() {
    std::error_code error;
    const std::filesystem::path memory = "/dev/shm";
    const std::filesystem::path root = std::filesystem::is_directory(memory, error)
                                           ? memory
                                           : std::filesystem::temp_directory_path();
    std::string name = (root / "cospadi-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path_ = name;
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() { std::filesystem::remove_all(path_); }

  const std::filesystem::path& path() const { return path_; }
  std::string text() const { return path_.string(); }
  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ / name, std::ios::binary) << bytes;
  }

 private:
  std::filesystem::path path_;
};

inline std::string quoted(const std::string& text) { return "\"" + text + "\""; }

inline std::string with_header(const std::string& header, const std::string& data) {
  std::string length(8, '\0');
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i));
  return length + header + data;
}

inline std::string safetensors_bytes(const std::vector<StoredBytes>& tensors) {
  std::string header = "{\"__metadata__\":{\"format\":\"pt\"}";
  std::string data;
  for (const StoredBytes& tensor : tensors) {
    std::string shape;
    for (const int64_t size : tensor.shape) {
      shape += (shape.empty() ? "" : ",") + std::to_string(size);
    }
    header += "," + quoted(tensor.name) + ":{\"dtype\":" + quoted(tensor.dtype) + ",\"shape\":[" +
              shape + "],\"data_offsets\":[" + std::to_string(data.size()) + "," +
              std::to_string(data.size() + tensor.bytes.size()) + "]}";
    data += tensor.bytes;
  }
  return with_header(header + "}", data);
}

/// The bits of `values`, which are multiples of 1/16 below 16, in a storage type.
inline std::string float_bytes(const std::vector<float>& values, const std::string& dtype) {
  std::string out;
  for (const float value : values) {
    uint32_t bits = std::bit_cast<uint32_t>(value);
    size_t size = 2;
    if (dtype == "F32") {
      size = 4;
    } else if (dtype == "F16") {
      const uint32_t magnitude = bits & 0x7fffffffU;
      bits = ((bits >> 16U) & 0x8000U) | (magnitude == 0 ? 0 : (magnitude - (112U << 23U)) >> 13U);
    } else {
      bits >>= 16U;
    }
    for (size_t i = 0; i < size; ++i) out += static_cast<char>(bits >> (8 * i));
  }
  return out;
}

/// Fields of one row, least significant bit first.
inline std::string field_bytes(const std::vector<uint32_t>& fields, int bits) {
  std::string out((fields.size() * static_cast<size_t>(bits) + 7) / 8, '\0');
  size_t at = 0;
  for (const uint32_t field : fields) {
    for (int i = 0; i < bits; ++i, ++at) {
      if ((field >> static_cast<unsigned>(i)) & 1U) {
        out[at / 8] = static_cast<char>(static_cast<uint8_t>(out[at / 8]) | (1U << (at % 8)));
      }
    }
  }
  return out;
}

/// One way to store a layer.
struct Kind {
  std::string name;
  int64_t n_atoms = 11;
  bool identity = false;
  bool full = false;
  std::string dictionary = "bfloat16";
  std::string coeffs = "bfloat16";
  int64_t group = 0;
  bool bias = false;
  std::string leader{};  // a kind before this one
};

inline const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = {
      {.name = "m.plain", .bias = true},
      {.name = "m.low_rank", .full = true, .dictionary = "float16", .coeffs = "float16"},
      {.name = "m.wide", .dictionary = "float32", .coeffs = "float32", .bias = true},
      {.name = "m.pruned", .n_atoms = 0, .identity = true, .coeffs = "int8"},
      {.name = "m.dense", .n_atoms = 0, .identity = true, .full = true, .coeffs = "int3"},
      {.name = "m.augmented", .n_atoms = 5, .identity = true, .coeffs = "bfloat14"},
      {.name = "m.grouped", .dictionary = "int8", .coeffs = "int4", .group = 3, .bias = true},
      {.name = "m.member", .dictionary = "int8", .coeffs = "int5", .leader = "m.grouped"},
      {.name = "m.other-member", .coeffs = "int6", .leader = "m.plain"},
  };
  return all;
}

inline constexpr int64_t kDIn = 21;
inline constexpr int64_t kDOut = 37;

struct TestCheckpoint {
  std::string config;
  std::vector<StoredBytes> tensors;
  std::map<std::string, std::vector<float>> weights;  // [d_out x d_in]
  std::map<std::string, std::vector<float>> biases;   // [d_out]

  void write(const TempFolder& folder) const {
    folder.write("config.json", config);
    folder.write("model.safetensors", safetensors_bytes(tensors));
  }
};

namespace making {

inline int pick(std::mt19937& random, int least, int most) {
  return least + static_cast<int>(random() % static_cast<unsigned>(most - least + 1));
}

inline std::vector<float> sixteenths(std::mt19937& random, int64_t n, int most) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = static_cast<float>(pick(random, -most, most)) / 16.0F;
  return values;
}

inline std::string float_name(const std::string& dtype) {
  return dtype == "float32" ? "F32" : (dtype == "float16" ? "F16" : "BF16");
}

}  // namespace making

/// One module of every kind, an embedding beside them, and a config. Values are so coarse that
/// float arithmetic on small integers is exact.
inline TestCheckpoint make_checkpoint(unsigned seed = 1) {
  using making::pick;
  std::mt19937 random(seed);
  TestCheckpoint out;
  std::map<std::string, std::vector<float>> dictionaries;  // [d_in x n_atoms]
  std::string modules;
  std::map<std::string, std::string> groups;
  for (const Kind& kind : kinds()) {
    const auto add =
        [&](const char* part, std::string dtype, std::vector<int64_t> shape, std::string bytes) {
          out.tensors.push_back(
              {kind.name + "." + part, std::move(dtype), std::move(shape), std::move(bytes)});
        };
    const int64_t total = kind.n_atoms + (kind.identity ? kDIn : 0);
    const int64_t sparsity = kind.full ? total : 5;
    if (!kind.leader.empty()) {
      dictionaries[kind.name] = dictionaries.at(kind.leader);
      std::string& members = groups[kind.leader];
      members += (members.empty() ? "" : ",") + quoted(kind.name);
    } else if (kind.dictionary == "int8") {
      std::string bytes;
      std::vector<float> values(static_cast<size_t>(kDIn * kind.n_atoms));
      for (int64_t a = 0; a < kind.n_atoms; ++a) {
        for (int64_t i = 0; i < kDIn; ++i) {
          const int value = pick(random, -127, 127);
          bytes += static_cast<char>(value);
          values[static_cast<size_t>(i * kind.n_atoms + a)] = static_cast<float>(value) / 16.0F;
        }
      }
      add("dictionary", "I8", {kind.n_atoms, kDIn}, bytes);
      const std::vector<float> scale(static_cast<size_t>(kind.n_atoms), 1.0F / 16.0F);
      add("dictionary_scale", "BF16", {kind.n_atoms}, float_bytes(scale, "BF16"));
      dictionaries[kind.name] = values;
    } else if (kind.n_atoms > 0) {
      const std::string dtype = making::float_name(kind.dictionary);
      dictionaries[kind.name] = making::sixteenths(random, kDIn * kind.n_atoms, 64);
      add("dictionary", dtype, {kDIn, kind.n_atoms}, float_bytes(dictionaries[kind.name], dtype));
    }
    // supports
    std::vector<std::vector<int64_t>> atoms(static_cast<size_t>(kDOut));
    std::string mask;
    for (auto& row : atoms) {
      row.resize(static_cast<size_t>(total));
      std::iota(row.begin(), row.end(), 0);
      if (kind.full) continue;
      std::shuffle(row.begin(), row.end(), random);
      row.resize(static_cast<size_t>(sparsity));
      std::sort(row.begin(), row.end());
      std::vector<uint32_t> bits(static_cast<size_t>(total), 0);
      for (const int64_t atom : row) bits[static_cast<size_t>(atom)] = 1;
      mask += field_bytes(bits, 1);
    }
    if (!kind.full) add("mask", "U8", {kDOut, (total + 7) / 8}, mask);
    // coefficients
    const bool is_integer = kind.coeffs.starts_with("int");
    const int bits = is_integer ? kind.coeffs.back() - '0' : (kind.coeffs == "bfloat14" ? 14 : 0);
    std::string bytes;
    std::vector<std::vector<float>> values(static_cast<size_t>(kDOut));
    for (auto& row : values) {
      row = making::sixteenths(random, sparsity, 16);
      std::vector<uint32_t> fields;
      const int most = bits == 0 ? 0 : (1 << (bits - 1)) - 1;
      for (float& value : row) {
        if (is_integer) {
          const int field = pick(random, -most, most);
          fields.push_back(static_cast<uint32_t>(field) & ((1U << bits) - 1));
          value = static_cast<float>(field) / 16.0F;
        } else {
          fields.push_back(std::bit_cast<uint32_t>(value) >> 18U);
        }
      }
      bytes +=
          bits == 0 ? float_bytes(row, making::float_name(kind.coeffs)) : field_bytes(fields, bits);
    }
    if (bits == 0) {
      add("coeffs", making::float_name(kind.coeffs), {kDOut, sparsity}, bytes);
    } else {
      add("coeffs", "U8", {kDOut, (sparsity * bits + 7) / 8}, bytes);
    }
    if (is_integer) {
      const int64_t n = kind.group == 0 ? 1 : (sparsity + kind.group - 1) / kind.group;
      const std::vector<float> scale(static_cast<size_t>(kDOut * n), 1.0F / 16.0F);
      add("coeffs_scale", "BF16", {kDOut, n}, float_bytes(scale, "BF16"));
    }
    if (kind.bias) {
      out.biases[kind.name] = making::sixteenths(random, kDOut, 64);
      add("bias", "F16", {kDOut}, float_bytes(out.biases[kind.name], "F16"));
    }
    add("weight", "BF16", {0}, "");
    // the dense weight
    std::vector<float>& weight = out.weights[kind.name];
    weight.assign(static_cast<size_t>(kDOut * kDIn), 0.0F);
    const int64_t n_identity = total - kind.n_atoms;
    for (int64_t n = 0; n < kDOut; ++n) {
      for (int64_t j = 0; j < sparsity; ++j) {
        const int64_t atom = atoms[static_cast<size_t>(n)][static_cast<size_t>(j)];
        const float value = values[static_cast<size_t>(n)][static_cast<size_t>(j)];
        float* const row = weight.data() + n * kDIn;
        if (atom < n_identity) {
          row[atom] += value;
          continue;
        }
        for (int64_t i = 0; i < kDIn; ++i) {
          const int64_t at = i * kind.n_atoms + atom - n_identity;
          row[i] += value * dictionaries[kind.name][static_cast<size_t>(at)];
        }
      }
    }
    modules += (modules.empty() ? "" : ",") + quoted(kind.name) +
               ":{\"d_in\":" + std::to_string(kDIn) + ",\"d_out\":" + std::to_string(kDOut) +
               ",\"n_atoms\":" + std::to_string(kind.n_atoms) +
               ",\"n_identity\":" + std::to_string(n_identity) +
               ",\"sparsity\":" + std::to_string(sparsity) +
               ",\"support\":" + (kind.full ? "\"full\"" : "\"mask\"") +
               ",\"bias\":" + (kind.bias ? "true" : "false") +
               ",\"dictionary_dtype\":" + quoted(kind.dictionary) +
               ",\"coeffs_dtype\":" + quoted(kind.coeffs) +
               ",\"coeffs_group\":" + std::to_string(kind.group) +
               (kind.leader.empty() ? "" : ",\"dictionary\":" + quoted(kind.leader)) + "}";
  }
  std::string group_text;
  for (const auto& [leader, members] : groups) {
    group_text += (group_text.empty() ? "" : ",") + quoted(leader) + ":[" + members + "]";
  }
  out.config =
      "{\"model_type\":\"llama\",\"hidden_size\":21,\"rope\":{\"theta\":1e4},"
      "\"quantization_config\":{\"quant_method\":\"cospadi\",\"format_version\":2,\"modules\":{" +
      modules + "},\"groups\":{" + group_text + "},\"note\":\"text\"}}";
  // an odd number of bytes, so that what follows lies unaligned
  out.tensors.insert(out.tensors.begin(), {"odd", "U8", {3}, "abc"});
  out.tensors.push_back({"embedding", "F32", {2, 3}, float_bytes({1, 2, 3, 4, 5, 6}, "F32")});
  return out;
}

}  // namespace cospadi
