// Thousands of damaged checkpoints: each ends in an Error of one line, or opens and computes.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "checkpoint_folder.hpp"
#include "core/checkpoint_config.hpp"
#include "core/json.hpp"
#include "core/safetensors.hpp"
#include "cospadi/checkpoint.hpp"
#include "cospadi/status.hpp"
#include "mutate.hpp"

namespace cospadi {
namespace {

/// How often reading succeeded and failed; anything but an Error of ours escapes and fails the
/// test.
struct Outcomes {
  int read = 0;
  int refused = 0;

  template <class Body>
  void count(const Body& body) {
    try {
      body();
      ++read;
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_FALSE(message.empty());
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
      EXPECT_LT(message.size(), 2000U);
      ++refused;
    } catch (const detail::JsonError& error) {
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
      ++refused;
    }
  }
};

void read_everything(const TempFolder& folder) {
  const Checkpoint checkpoint = Checkpoint::open(folder.text());
  for (const std::string& name : checkpoint.tensor_names()) {
    const TensorView tensor = checkpoint.tensor(name);
    // every byte is there
    const auto* const bytes = static_cast<const volatile char*>(tensor.data);
    if (tensor.bytes > 0) (void)(bytes[0] + bytes[tensor.bytes - 1]);
  }
  for (const std::string& name : checkpoint.modules()) {
    const Layer layer = checkpoint.layer(name, 1);
    const LayerInfo& info = layer.info();
    const std::vector<float> x(static_cast<size_t>(2 * info.d_in), 1.0F);
    std::vector<float> y(static_cast<size_t>(2 * info.d_out));
    layer.forward({x.data(), DType::kFloat32, 2, info.d_in, info.d_in},
                  {y.data(), DType::kFloat32, 2, info.d_out, info.d_out},
                  1);
  }
}

TEST(CheckpointFuzz, Json) {
  const std::string texts[] = {
      make_checkpoint().config,
      R"({"a":[1,2.5e-3,true,null,"\u00e4\ud83d\ude00\n"],"b":{"c":{"d":[[],{}]}},"e":-0})"};
  Mutator mutate(1);
  Outcomes outcomes;
  for (int i = 0; i < 20000; ++i) {
    const std::string text = mutate(texts[i % 2]);
    outcomes.count([&] { (void)detail::parse_json(text); });
  }
  EXPECT_GT(outcomes.read, 500);
  EXPECT_GT(outcomes.refused, 500);
}

TEST(CheckpointFuzz, Headers) {
  const std::string file = safetensors_bytes(make_checkpoint().tensors);
  const size_t header = file.find("}}") + 10;
  Mutator mutate(2);
  Outcomes outcomes;
  for (int i = 0; i < 10000; ++i) {
    const std::string damaged = mutate(file, i % 3 == 0 ? 8 : header);
    outcomes.count([&] {
      for (const detail::StoredTensor& tensor : detail::read_header(damaged, "file")) {
        ASSERT_GE(tensor.offset, 8);
        ASSERT_GE(tensor.bytes, 0);
        ASSERT_LE(tensor.offset + tensor.bytes, static_cast<int64_t>(damaged.size()));
      }
    });
  }
  EXPECT_GT(outcomes.read, 20);
  EXPECT_GT(outcomes.refused, 500);
}

TEST(CheckpointFuzz, Configs) {
  const TestCheckpoint made = make_checkpoint();
  const TempFolder folder;
  made.write(folder);
  Mutator mutate(3);
  Outcomes outcomes;
  for (int i = 0; i < 5000; ++i) {
    folder.write("config.json", mutate(made.config));
    outcomes.count([&] { read_everything(folder); });
  }
  EXPECT_GT(outcomes.read, 100);
  EXPECT_GT(outcomes.refused, 500);
}

TEST(CheckpointFuzz, Values) {
  const TestCheckpoint made = make_checkpoint();
  const TempFolder folder;
  made.write(folder);
  const std::string file = safetensors_bytes(made.tensors);
  const size_t data = file.rfind("}}") + 2;
  Mutator mutate(4);
  Outcomes outcomes;
  for (int i = 0; i < 3000; ++i) {
    std::string damaged = file;
    for (size_t n = mutate.below(3) + 1; n > 0; --n) {
      const char values[] = {'\x00', '\x7f', '\x80', '\xff', '\x01'};
      damaged[data + mutate.below(file.size() - data)] = values[mutate.below(5)];
    }
    if (i % 10 == 0) damaged.resize(mutate.below(damaged.size()));
    folder.write("model.safetensors", damaged);
    outcomes.count([&] { read_everything(folder); });
  }
  EXPECT_GT(outcomes.read, 100);
  EXPECT_GT(outcomes.refused, 100);
}

TEST(CheckpointFuzz, Indexes) {
  const TestCheckpoint made = make_checkpoint();
  const TempFolder folder;
  folder.write("config.json", made.config);
  folder.write("a.safetensors", safetensors_bytes(made.tensors));
  std::string map;
  for (const StoredBytes& tensor : made.tensors) {
    map += (map.empty() ? "" : ",") + quoted(tensor.name) + ":\"a.safetensors\"";
  }
  const std::string index = "{\"metadata\":{\"total_size\":1},\"weight_map\":{" + map + "}}";
  Mutator mutate(5);
  Outcomes outcomes;
  for (int i = 0; i < 2000; ++i) {
    folder.write("model.safetensors.index.json", mutate(index));
    outcomes.count([&] { read_everything(folder); });
  }
  EXPECT_GT(outcomes.refused, 500);
}

}  // namespace
}  // namespace cospadi
