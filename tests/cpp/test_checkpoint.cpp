#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint_folder.hpp"
#include "cospadi/checkpoint.hpp"
#include "cospadi/runtime.hpp"
#include "cospadi/status.hpp"

namespace cospadi {
namespace {

namespace fs = std::filesystem;

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

/// Error of opening the folder and loading every layer of it; nothing if there is none.
std::optional<Error> failure(const TempFolder& folder) {
  try {
    const Checkpoint checkpoint = Checkpoint::open(folder.text());
    for (const std::string& name : checkpoint.modules()) (void)checkpoint.layer(name);
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error;
  }
  return std::nullopt;
}

void expect_failure(const TempFolder& folder, ErrorCode code, const std::string& words) {
  const std::optional<Error> error = failure(folder);
  ASSERT_TRUE(error.has_value()) << words;
  EXPECT_EQ(error->code(), code) << error->what();
  EXPECT_NE(std::string(error->what()).find(words), std::string::npos) << error->what();
}

StoredBytes& tensor_named(TestCheckpoint& made, const std::string& name) {
  for (StoredBytes& tensor : made.tensors) {
    if (tensor.name == name) return tensor;
  }
  throw std::runtime_error(name);
}

std::vector<float> integers(int64_t n, int most) {
  std::vector<float> values(static_cast<size_t>(n));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] =
        static_cast<float>(static_cast<int>(i * 7919 % (2 * static_cast<size_t>(most) + 1)) - most);
  }
  return values;
}

/// x W^T + bias of a module.
std::vector<float> expected_outputs(const TestCheckpoint& made,
                                    const std::string& name,
                                    const std::vector<float>& x) {
  const std::vector<float>& weight = made.weights.at(name);
  const auto bias = made.biases.find(name);
  const auto rows = static_cast<int64_t>(x.size()) / kDIn;
  std::vector<float> y;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < kDOut; ++n) {
      float sum = bias == made.biases.end() ? 0.0F : bias->second[static_cast<size_t>(n)];
      for (int64_t i = 0; i < kDIn; ++i) {
        sum += x[static_cast<size_t>(r * kDIn + i)] * weight[static_cast<size_t>(n * kDIn + i)];
      }
      y.push_back(sum);
    }
  }
  return y;
}

TEST(Checkpoint, EveryKindComputesExactly) {
  const TestCheckpoint made = make_checkpoint();
  const TempFolder folder;
  made.write(folder);
  const Checkpoint checkpoint = Checkpoint::open(folder.text());
  ASSERT_EQ(checkpoint.modules().size(), kinds().size());
  for (const Kind& kind : kinds()) {
    const Layer layer = checkpoint.layer(kind.name);
    EXPECT_EQ(layer.name(), kind.name);
    EXPECT_EQ(layer.info().n_atoms, kind.n_atoms);
    EXPECT_EQ(layer.info().leader, kind.leader);
    for (const int64_t rows : {0, 1, 3, 40, 1500}) {
      for (const int n_threads : {1, 3}) {
        const std::vector<float> x = integers(rows * kDIn, 3);
        // y has padding, which is kept
        const int64_t stride = kDOut + 3;
        std::vector<float> y(static_cast<size_t>(rows * stride), -7.0F);
        layer.forward({x.data(), DType::kFloat32, rows, kDIn, kDIn},
                      {y.data(), DType::kFloat32, rows, kDOut, stride},
                      n_threads);
        const std::vector<float> expected = expected_outputs(made, kind.name, x);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t n = 0; n < stride; ++n) {
            const float wanted = n < kDOut ? expected[static_cast<size_t>(r * kDOut + n)] : -7.0F;
            ASSERT_EQ(y[static_cast<size_t>(r * stride + n)], wanted)
                << kind.name << " " << rows << " " << r << " " << n;
          }
        }
      }
    }
  }
}

TEST(Checkpoint, BFloat16Activations) {
  const TestCheckpoint made = make_checkpoint();
  const TempFolder folder;
  made.write(folder);
  const Checkpoint checkpoint = Checkpoint::open(folder.text());
  for (const Kind& kind : kinds()) {
    for (const int64_t rows : {1, 5, 50}) {
      const std::vector<float> x = integers(rows * kDIn, 2);
      const std::string stored = float_bytes(x, "BF16");
      std::vector<uint16_t> inputs(x.size());
      std::memcpy(inputs.data(), stored.data(), stored.size());
      std::vector<uint16_t> y(static_cast<size_t>(rows * kDOut));
      checkpoint.layer(kind.name).forward({inputs.data(), DType::kBFloat16, rows, kDIn, kDIn},
                                          {y.data(), DType::kBFloat16, rows, kDOut, kDOut},
                                          2);
      const std::vector<float> expected = expected_outputs(made, kind.name, x);
      float largest = 0.0F;
      for (const float value : expected) largest = std::max(largest, std::abs(value));
      for (size_t i = 0; i < y.size(); ++i) {
        const float value = std::bit_cast<float>(uint32_t{y[i]} << 16U);
        // two roundings to 8 bits
        EXPECT_NEAR(value, expected[i], largest / 64.0F) << kind.name << " " << i;
      }
    }
  }
}

TEST(Checkpoint, LayersOutliveTheCheckpoint) {
  const TestCheckpoint made = make_checkpoint();
  const TempFolder folder;
  made.write(folder);
  std::vector<Layer> layers;
  {
    const Checkpoint checkpoint = Checkpoint::open(folder.text());
    for (const Kind& kind : kinds()) layers.push_back(checkpoint.layer(kind.name));
  }
  fs::remove(folder.path() / "model.safetensors");
  const std::vector<float> x = integers(kDIn, 3);
  for (const Layer& layer : layers) {
    std::vector<float> y(static_cast<size_t>(kDOut));
    layer.forward({x.data(), DType::kFloat32, 1, kDIn, kDIn},
                  {y.data(), DType::kFloat32, 1, kDOut, kDOut});
    EXPECT_EQ(y, expected_outputs(made, layer.name(), x));
  }
}

TEST(Checkpoint, PlainTensorsAndConfig) {
  const TempFolder folder;
  make_checkpoint().write(folder);
  const Checkpoint checkpoint = Checkpoint::open(folder.text());
  const TensorView embedding = checkpoint.tensor("embedding");
  EXPECT_EQ(embedding.type, TensorType::kF32);
  EXPECT_EQ(std::vector<int64_t>(embedding.shape.begin(), embedding.shape.end()),
            (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(embedding.data) % 4, 0U);
  std::vector<float> values(6);
  copy_floats(embedding, values);
  EXPECT_EQ(values, (std::vector<float>{1, 2, 3, 4, 5, 6}));
  EXPECT_THROW(copy_floats(embedding, std::span(values).first(5)), Error);
  EXPECT_THROW(copy_floats(checkpoint.tensor("odd"), std::span(values).first(3)), Error);
  EXPECT_NE(checkpoint.tensor("m.plain.weight").data, nullptr);
  EXPECT_THROW((void)checkpoint.tensor("absent"), Error);
  EXPECT_THROW((void)checkpoint.info("absent"), Error);
  EXPECT_THROW((void)checkpoint.layer("m"), Error);
  EXPECT_EQ(checkpoint.config_number("hidden_size"), 21.0);
  EXPECT_EQ(checkpoint.config_number("rope.theta"), 1e4);
  EXPECT_EQ(checkpoint.config_text("model_type"), "llama");
  EXPECT_EQ(checkpoint.config_number("model_type"), std::nullopt);
  EXPECT_EQ(checkpoint.config_number("rope.absent.deeper"), std::nullopt);
  EXPECT_EQ(checkpoint.config_text(""), std::nullopt);
}

TEST(Checkpoint, ForwardChecksItsArguments) {
  const TempFolder folder;
  make_checkpoint().write(folder);
  const Layer layer = Checkpoint::open(folder.text()).layer("m.augmented");
  std::vector<float> x(static_cast<size_t>(2 * kDIn));
  std::vector<float> y(static_cast<size_t>(2 * kDOut));
  const ConstTypedMatrix in{x.data(), DType::kFloat32, 2, kDIn, kDIn};
  const TypedMatrix out{y.data(), DType::kFloat32, 2, kDOut, kDOut};
  const auto rejects = [&](ConstTypedMatrix wrong_in, TypedMatrix wrong_out) {
    EXPECT_THROW(layer.forward(wrong_in, wrong_out), Error);
  };
  rejects({x.data(), DType::kFloat32, 2, kDIn - 1, kDIn}, out);
  rejects({x.data(), DType::kFloat32, 2, kDIn, kDIn - 1}, out);
  rejects({x.data(), DType::kFloat32, -1, kDIn, kDIn}, out);
  rejects({nullptr, DType::kFloat32, 2, kDIn, kDIn}, out);
  rejects(in, {y.data(), DType::kFloat32, 1, kDOut, kDOut});
  rejects(in, {nullptr, DType::kFloat32, 2, kDOut, kDOut});
  rejects({x.data(), DType::kFloat32, INT64_MAX / 2, kDIn, kDIn},
          {y.data(), DType::kFloat32, INT64_MAX / 2, kDOut, kDOut});
}

TEST(Checkpoint, RefusesConfigs) {
  const TestCheckpoint made = make_checkpoint();
  const TempFolder folder;
  made.write(folder);
  using Edit = std::function<std::string(const std::string&)>;
  const auto swap = [](const char* from, const char* to) -> Edit {
    return [=](const std::string& text) { return replaced(text, from, to); };
  };
  const struct {
    Edit edit;
    ErrorCode code;
    const char* words;
  } cases[] = {
      {swap("quantization_config", "other"), ErrorCode::kNotCompressed, "not compressed"},
      {swap("\"cospadi\"", "\"gptq\""), ErrorCode::kNotCompressed, "got 'gptq'"},
      {swap("\"cospadi\"", "7"), ErrorCode::kCheckpoint, "quant_method"},
      {swap("_version\":2", "_version\":3"), ErrorCode::kNewerFormat, "format_version 3"},
      {swap("_version\":2", "_version\":true"), ErrorCode::kCheckpoint, "format_version"},
      {swap("_version\":2", "_version\":1"), ErrorCode::kCheckpoint, "needs format_version 2"},
      {swap("\"note\"", "\"modules\""), ErrorCode::kCheckpoint, "key modules occurs twice"},
      {swap("\"bias\":true", "\"bias\":1"), ErrorCode::kCheckpoint, "true or false"},
      {swap("\"bias\":true", "\"new\":true"), ErrorCode::kNewerFormat, "unknown key 'new'"},
      {swap("\"bias\":true,", ""), ErrorCode::kCheckpoint, "bias: missing"},
      {swap("\"d_in\":21", "\"d_in\":0"), ErrorCode::kCheckpoint, "d_in: expected an integer"},
      {swap("\"d_in\":21", "\"d_in\":21.0"), ErrorCode::kCheckpoint, "d_in: expected an integer"},
      {swap("\"d_in\":21", "\"d_in\":2147483648"), ErrorCode::kCheckpoint, "d_in: expected"},
      {swap("\"d_out\":37", "\"d_out\":2147483647"), ErrorCode::kCheckpoint, "expected U8"},
      {swap("\"n_identity\":0", "\"n_identity\":5"), ErrorCode::kCheckpoint, "0 or d_in"},
      {swap("\"n_atoms\":11", "\"n_atoms\":0"), ErrorCode::kCheckpoint, "n_atoms"},
      {swap("\"n_atoms\":11", "\"n_atoms\":2147483647"), ErrorCode::kCheckpoint, "m.plain"},
      {swap("\"sparsity\":5", "\"sparsity\":12"), ErrorCode::kCheckpoint, "exceeds the 11 atoms"},
      {swap("\"sparsity\":11", "\"sparsity\":10"), ErrorCode::kCheckpoint, "full support"},
      {swap("\"mask\"", "\"list\""), ErrorCode::kNewerFormat, "none of mask, full"},
      {swap("\"coeffs_group\":0", "\"coeffs_group\":2"), ErrorCode::kCheckpoint, "no scale"},
      {swap("\"int4\"", "\"int2\""), ErrorCode::kNewerFormat, "'int2' is none of"},
      {swap("\"m.plain\":{", "\"m..plain\":{"), ErrorCode::kCheckpoint, "no module name"},
      {swap("\"m.plain\":{", "\"m./plain\":{"), ErrorCode::kCheckpoint, "no module name"},
      {swap("\"m.plain\":{", "\"m\":{"), ErrorCode::kCheckpoint, "lies inside m"},
      {swap("\"dictionary\":\"m.plain\"", "\"dictionary\":\"m.absent\""),
       ErrorCode::kCheckpoint,
       "no compressed module"},
      {swap("\"dictionary\":\"m.plain\"", "\"dictionary\":\"m.member\""),
       ErrorCode::kCheckpoint,
       "no dictionary of its own"},
      {swap("\"dictionary\":\"m.plain\"", "\"dictionary\":\"m.wide\""),
       ErrorCode::kCheckpoint,
       "must be those of m.wide"},
      {swap("[\"m.member\"]", "[\"m.member\",\"m.plain\"]"), ErrorCode::kCheckpoint, "groups"},
      {swap("[\"m.member\"]", "[]"), ErrorCode::kCheckpoint, "groups"},
      {swap("[\"m.member\"]", "{}"), ErrorCode::kCheckpoint, "groups"},
      {[](const std::string& text) { return text.substr(0, text.size() / 2); },
       ErrorCode::kCheckpoint,
       "not valid JSON"},
      {[](const std::string&) { return "[]"; }, ErrorCode::kCheckpoint, "expected a JSON object"},
  };
  for (const auto& [edit, code, words] : cases) {
    folder.write("config.json", edit(made.config));
    expect_failure(folder, code, words);
  }
  fs::remove(folder.path() / "config.json");
  expect_failure(folder, ErrorCode::kNotCompressed, "config.json is missing");
  EXPECT_THROW((void)Checkpoint::open(folder.text() + "/absent"), Error);
}

TEST(Checkpoint, RefusesTensors) {
  const TempFolder folder;
  folder.write("config.json", make_checkpoint().config);
  const auto expect = [&](const std::string& words,
                          const std::function<void(TestCheckpoint&)>& edit) {
    TestCheckpoint made = make_checkpoint();
    edit(made);
    folder.write("model.safetensors", safetensors_bytes(made.tensors));
    expect_failure(folder, ErrorCode::kCheckpoint, words);
  };
  const auto patch = [&](const char* name, size_t at, const std::string& bytes) {
    return [=](TestCheckpoint& made) {
      std::string& data = tensor_named(made, name).bytes;
      data.replace(at, bytes.size(), bytes);
    };
  };
  expect("m.plain.coeffs: missing",
         [](TestCheckpoint& made) { tensor_named(made, "m.plain.coeffs").name = "other"; });
  expect("not part of the compressed module m.plain",
         [](TestCheckpoint& made) { tensor_named(made, "odd").name = "m.plain.odd"; });
  expect("expected BF16 [37, 5], got F16 [37, 5]",
         [](TestCheckpoint& made) { tensor_named(made, "m.plain.coeffs").dtype = "F16"; });
  expect("expected BF16 [37, 5], got BF16 [5, 37]",
         [](TestCheckpoint& made) { tensor_named(made, "m.plain.coeffs").shape = {5, 37}; });
  expect("m.plain.weight: expected",
         [](TestCheckpoint& made) { tensor_named(made, "m.plain.weight").dtype = "U8"; });
  expect("key odd occurs twice",
         [](TestCheckpoint& made) { tensor_named(made, "embedding").name = "odd"; });
  expect("is no tensor name",
         [](TestCheckpoint& made) { tensor_named(made, "odd").name = "../odd"; });
  const std::string infinity("\x80\x7f", 2);  // bfloat16
  const std::string negative("\x00\xbf", 2);
  expect("m.plain.dictionary: holds a value that is not", patch("m.plain.dictionary", 6, infinity));
  expect("m.plain.coeffs: holds a value that is not", patch("m.plain.coeffs", 6, infinity));
  expect("m.wide.coeffs: holds a value", patch("m.wide.coeffs", 5 * 4 + 2, infinity));
  expect("m.plain.bias: holds a value", patch("m.plain.bias", 2, std::string("\x00\x7c", 2)));
  expect("m.grouped.coeffs_scale: holds a scale", patch("m.grouped.coeffs_scale", 2, negative));
  expect("m.grouped.dictionary_scale: holds a scale",
         patch("m.grouped.dictionary_scale", 4, std::string(2, '\0')));
  expect("m.grouped.dictionary: row 2 holds -128", patch("m.grouped.dictionary", 2 * kDIn, "\x80"));
  expect("m.grouped.dictionary: holds a value",
         patch("m.grouped.dictionary_scale", 4, std::string("\x7f\x7f", 2)));
  expect("m.pruned.coeffs: row 1 holds -128", patch("m.pruned.coeffs", 5, "\x80"));
  expect("m.grouped.coeffs: row 0 has a padding bit", patch("m.grouped.coeffs", 2, "\x10"));
  expect("m.augmented.coeffs: holds a value", patch("m.augmented.coeffs", 0, "\xff\xff"));
  expect("m.plain.mask: mask row 0: bits above", patch("m.plain.mask", 1, "\xff"));
  expect("m.plain.mask: mask row 1: expected exactly s = 5",
         patch("m.plain.mask", 2, std::string(2, '\0')));
}

TEST(Checkpoint, RefusesHeaders) {
  const TempFolder folder;
  folder.write("config.json", make_checkpoint().config);
  const struct {
    const char* entry;
    size_t bytes;
    const char* words;
  } cases[] = {
      {R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]})", 3, "truncated"},
      {R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]})", 5, "followed by unknown data"},
      {R"("a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]})", 5, "a starts at byte 1"},
      {R"("a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]})", 4, "ascending"},
      {R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,4,4]})", 4, "two ascending"},
      {R"("a":{"dtype":"U8","shape":[4],"data_offsets":[-1,3]})", 4, "expected sizes"},
      {R"("a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]})", 4, "expected sizes"},
      {R"("a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]})", 1, "expected sizes"},
      {R"("a":{"dtype":"U8","shape":4,"data_offsets":[0,4]})", 4, "expected a list"},
      {R"("a":{"dtype":"U9","shape":[4],"data_offsets":[0,4]})", 4, "unknown dtype 'U9'"},
      {R"("a":{"shape":[4],"data_offsets":[0,4]})", 4, "unknown dtype nothing"},
      {R"("a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]})", 1, "dimensions"},
      {R"("a":{"dtype":"F64","shape":[1099511627776,1099511627776],"data_offsets":[0,0]})",
       0,
       "does not fill"},
      {R"("a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})",
       0,
       "does not fill"},
      {R"("a":{"dtype":"U8","shape":[0],"data_offsets":[9223372036854775807,9223372036854775807]})",
       0,
       "a starts at byte"},
      {R"("a":7)", 0, "a: expected an object"},
      {R"("":{})", 0, "is no tensor name"},
  };
  for (const auto& [entry, bytes, words] : cases) {
    folder.write("model.safetensors",
                 with_header("{" + std::string(entry) + "}", std::string(bytes, 'x')));
    expect_failure(folder, ErrorCode::kCheckpoint, words);
  }
  for (const uint64_t length : {uint64_t{3}, uint64_t{1} << 20, uint64_t{1} << 63, ~uint64_t{0}}) {
    std::string file = with_header("{}", "");
    std::memcpy(file.data(), &length, sizeof(length));
    folder.write("model.safetensors", file);
    EXPECT_TRUE(failure(folder).has_value());
  }
  for (size_t size = 0; size < 8; ++size) {
    folder.write("model.safetensors", std::string(size, '\0'));
    expect_failure(folder, ErrorCode::kCheckpoint, "cannot hold a header");
  }
}

/// Writes the tensors in two shards; the index says `second` of the second one.
void write_shards(const TestCheckpoint& made, const TempFolder& folder, const std::string& second) {
  const auto middle = made.tensors.begin() + static_cast<int64_t>(made.tensors.size()) / 2;
  const std::vector<StoredBytes> parts[] = {{made.tensors.begin(), middle},
                                            {middle, made.tensors.end()}};
  std::string map;
  for (const int part : {0, 1}) {
    for (const StoredBytes& tensor : parts[part]) {
      map += (map.empty() ? "" : ",") + quoted(tensor.name) + ":" +
             quoted(part == 0 ? "a.safetensors" : second);
    }
  }
  folder.write("config.json", made.config);
  folder.write("a.safetensors", safetensors_bytes(parts[0]));
  folder.write("b.safetensors", safetensors_bytes(parts[1]));
  folder.write("model.safetensors.index.json", "{\"metadata\":{},\"weight_map\":{" + map + "}}");
}

TEST(Checkpoint, Shards) {
  const TestCheckpoint made = make_checkpoint();
  const TempFolder folder;
  write_shards(made, folder, "b.safetensors");
  EXPECT_FALSE(failure(folder).has_value());
  folder.write("model.safetensors", safetensors_bytes(made.tensors));
  expect_failure(folder, ErrorCode::kCheckpoint, "ambiguous");
  fs::remove(folder.path() / "model.safetensors");
  for (const char* name : {"../b.safetensors",
                           "/b.safetensors",
                           ".b.safetensors",
                           "b.bin",
                           "x/b.safetensors",
                           ".safetensors",
                           ""}) {
    write_shards(made, folder, name);
    expect_failure(folder, ErrorCode::kCheckpoint, "not a plain safetensors file name");
  }
  write_shards(made, folder, "a.safetensors");
  EXPECT_TRUE(failure(folder).has_value());
  write_shards(made, folder, "absent.safetensors");
  expect_failure(folder, ErrorCode::kCheckpoint, "missing");
  folder.write("model.safetensors.index.json", "{\"weight_map\":{}}");
  expect_failure(folder, ErrorCode::kCheckpoint, "weight_map is missing or empty");
}

TEST(Checkpoint, LinksStayInside) {
  const TestCheckpoint made = make_checkpoint();
  const TempFolder outside;
  made.write(outside);
  const TempFolder folder;
  folder.write("config.json", made.config);
  const fs::path link = folder.path() / "model.safetensors";
  fs::create_symlink(outside.path() / "model.safetensors", link);
  expect_failure(folder, ErrorCode::kCheckpoint, "leads out of the checkpoint folder");
  fs::remove(link);
  fs::create_symlink("absent", link);
  expect_failure(folder, ErrorCode::kCheckpoint, "missing");
  fs::remove(link);
  fs::create_directory(link);
  expect_failure(folder, ErrorCode::kCheckpoint, "not a regular file");
  fs::remove(link);
  folder.write("data", safetensors_bytes(made.tensors));
  fs::create_symlink("data", link);
  EXPECT_FALSE(failure(folder).has_value());
  // the layout of a hub cache
  const TempFolder cache;
  const fs::path snapshot = cache.path() / "snapshots" / "0123";
  fs::create_directories(snapshot);
  fs::create_directory(cache.path() / "blobs");
  fs::copy(outside.path() / "config.json", cache.path() / "blobs" / "c");
  fs::copy(outside.path() / "model.safetensors", cache.path() / "blobs" / "m");
  fs::create_symlink("../../blobs/c", snapshot / "config.json");
  fs::create_symlink("../../blobs/m", snapshot / "model.safetensors");
  EXPECT_EQ(Checkpoint::open(snapshot.string()).modules().size(), kinds().size());
}

}  // namespace
}  // namespace cospadi
