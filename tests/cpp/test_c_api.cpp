#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "checkpoint_folder.hpp"
#include "cospadi/c_api.h"
#include "cospadi/runtime.hpp"

namespace cospadi {
namespace {

TEST(CApi, Versions) {
  EXPECT_STREQ(cospadi_version(), version());
  int major = 0;
  int minor = 0;
  int patch = 0;
  ASSERT_EQ(std::sscanf(cospadi_version(), "%d.%d.%d", &major, &minor, &patch), 3);
  EXPECT_EQ(cospadi_version_number(), 10000 * major + 100 * minor + patch);
  EXPECT_STREQ(cospadi_status_name(COSPADI_CHECKPOINT), "COSPADI_CHECKPOINT");
  EXPECT_STREQ(cospadi_status_name(COSPADI_INTERNAL), "COSPADI_INTERNAL");
  EXPECT_STREQ(cospadi_status_name(-1), "unknown");
  EXPECT_STREQ(cospadi_status_name(99), "unknown");
  const char* isa = nullptr;
  ASSERT_EQ(cospadi_isa_name(&isa), COSPADI_OK) << cospadi_last_error();
  EXPECT_STREQ(isa, isa_name());
  EXPECT_GE(cospadi_default_thread_count(), 1);
}

/// A checkpoint of every kind and its handle.
class CApiCheckpoint : public testing::Test {
 protected:
  void SetUp() override {
    made_.write(folder_);
    ASSERT_EQ(cospadi_checkpoint_open(folder_.text().c_str(), &checkpoint_), COSPADI_OK);
  }
  void TearDown() override { cospadi_checkpoint_close(checkpoint_); }

  TestCheckpoint made_ = make_checkpoint();
  TempFolder folder_;
  cospadi_checkpoint* checkpoint_ = nullptr;
};

TEST_F(CApiCheckpoint, ModulesAndLayers) {
  int64_t count = 0;
  ASSERT_EQ(cospadi_checkpoint_module_count(checkpoint_, &count), COSPADI_OK);
  ASSERT_EQ(count, static_cast<int64_t>(kinds().size()));
  std::vector<cospadi_layer*> layers;
  for (int64_t i = 0; i < count; ++i) {
    const Kind& kind = kinds()[static_cast<size_t>(i)];
    const char* name = nullptr;
    ASSERT_EQ(cospadi_checkpoint_module_name(checkpoint_, i, &name), COSPADI_OK);
    EXPECT_EQ(name, kind.name);
    cospadi_layer_info info{};
    ASSERT_EQ(cospadi_checkpoint_module_info(checkpoint_, name, &info), COSPADI_OK);
    EXPECT_EQ(info.d_in, kDIn);
    EXPECT_EQ(info.d_out, kDOut);
    EXPECT_EQ(info.n_atoms, kind.n_atoms);
    EXPECT_EQ(info.n_identity, kind.identity ? kDIn : 0);
    EXPECT_EQ(info.has_mask, kind.full ? 0 : 1);
    EXPECT_EQ(info.has_bias, kind.bias ? 1 : 0);
    EXPECT_EQ(info.is_member, kind.leader.empty() ? 0 : 1);
    EXPECT_EQ(info.dictionary_type == COSPADI_DICTIONARY_INT8, kind.dictionary == "int8");
    EXPECT_EQ(info.coeffs_type == COSPADI_COEFFS_INT3, kind.coeffs == "int3");
    EXPECT_EQ(info.coeffs_type == COSPADI_COEFFS_BFLOAT14, kind.coeffs == "bfloat14");
    EXPECT_EQ(info.coeffs_group, kind.group);
    cospadi_layer* layer = nullptr;
    ASSERT_EQ(cospadi_layer_load(checkpoint_, name, 1, &layer), COSPADI_OK) << cospadi_last_error();
    layers.push_back(layer);
  }
  const std::vector<float> x(static_cast<size_t>(2 * kDIn), 1.0F);
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string& name = kinds()[i].name;
    std::vector<float> y(static_cast<size_t>(2 * kDOut));
    const cospadi_const_matrix in{x.data(), COSPADI_FLOAT32, 2, kDIn, kDIn};
    const cospadi_matrix out{y.data(), COSPADI_FLOAT32, 2, kDOut, kDOut};
    ASSERT_EQ(cospadi_layer_forward(layers[i], &in, &out, 1), COSPADI_OK);
    for (size_t j = 0; j < y.size(); ++j) {
      const size_t n = j % static_cast<size_t>(kDOut);
      const float* row = made_.weights[name].data() + n * static_cast<size_t>(kDIn);
      const auto bias = made_.biases.find(name);
      const float start = bias == made_.biases.end() ? 0.0F : bias->second[n];
      EXPECT_EQ(y[j], std::accumulate(row, row + kDIn, start)) << name;
    }
    cospadi_layer_info info{};
    ASSERT_EQ(cospadi_layer_get_info(layers[i], &info), COSPADI_OK);
    EXPECT_EQ(info.n_atoms, kinds()[i].n_atoms);
    cospadi_layer_close(layers[i]);
  }
}

TEST_F(CApiCheckpoint, Tensors) {
  int64_t count = 0;
  ASSERT_EQ(cospadi_checkpoint_tensor_count(checkpoint_, &count), COSPADI_OK);
  ASSERT_EQ(count, static_cast<int64_t>(made_.tensors.size()));
  for (int64_t i = 0; i < count; ++i) {
    cospadi_tensor tensor{};
    cospadi_tensor same{};
    ASSERT_EQ(cospadi_checkpoint_tensor_at(checkpoint_, i, &tensor), COSPADI_OK);
    ASSERT_EQ(cospadi_checkpoint_tensor(checkpoint_, tensor.name, &same), COSPADI_OK);
    EXPECT_EQ(tensor.data, same.data);
    const auto stored = std::find_if(made_.tensors.begin(),
                                     made_.tensors.end(),
                                     [&](const StoredBytes& t) { return t.name == tensor.name; });
    ASSERT_NE(stored, made_.tensors.end());
    ASSERT_EQ(tensor.bytes, static_cast<int64_t>(stored->bytes.size()));
    EXPECT_EQ(std::memcmp(tensor.data, stored->bytes.data(), stored->bytes.size()), 0);
    EXPECT_EQ(std::vector<int64_t>(tensor.shape, tensor.shape + tensor.n_dims), stored->shape);
  }
  double number = 0.0;
  ASSERT_EQ(cospadi_checkpoint_config_number(checkpoint_, "rope.theta", &number), COSPADI_OK);
  EXPECT_EQ(number, 1e4);
}

TEST_F(CApiCheckpoint, Errors) {
  cospadi_checkpoint* other = nullptr;
  EXPECT_EQ(cospadi_checkpoint_open("/absent", &other), COSPADI_NOT_COMPRESSED);
  EXPECT_NE(std::string(cospadi_last_error()).find("/absent"), std::string::npos);
  EXPECT_EQ(other, nullptr);
  EXPECT_EQ(cospadi_checkpoint_open(nullptr, &other), COSPADI_INVALID_ARGUMENT);
  EXPECT_STREQ(cospadi_last_error(), "folder: null pointer");
  EXPECT_EQ(cospadi_checkpoint_open("/absent", nullptr), COSPADI_INVALID_ARGUMENT);
  const char* name = "unchanged";
  EXPECT_EQ(cospadi_checkpoint_module_name(checkpoint_, -1, &name), COSPADI_INVALID_ARGUMENT);
  EXPECT_EQ(cospadi_checkpoint_module_name(checkpoint_, 1000, &name), COSPADI_INVALID_ARGUMENT);
  EXPECT_STREQ(name, "unchanged");
  EXPECT_EQ(cospadi_checkpoint_module_name(nullptr, 0, &name), COSPADI_INVALID_ARGUMENT);
  cospadi_tensor tensor{};
  EXPECT_EQ(cospadi_checkpoint_tensor(checkpoint_, "absent", &tensor), COSPADI_INVALID_ARGUMENT);
  EXPECT_EQ(cospadi_checkpoint_tensor_at(checkpoint_, 1000, &tensor), COSPADI_INVALID_ARGUMENT);
  double number = 0.0;
  EXPECT_EQ(cospadi_checkpoint_config_number(checkpoint_, "model_type", &number),
            COSPADI_INVALID_ARGUMENT);
  cospadi_layer* layer = nullptr;
  EXPECT_EQ(cospadi_layer_load(checkpoint_, "absent", 1, &layer), COSPADI_INVALID_ARGUMENT);
  ASSERT_EQ(cospadi_layer_load(checkpoint_, "m.plain", 1, &layer), COSPADI_OK);
  std::vector<float> x(static_cast<size_t>(kDIn));
  std::vector<float> y(static_cast<size_t>(kDOut), 5.0F);
  cospadi_const_matrix in{x.data(), COSPADI_FLOAT32, 1, kDIn + 1, kDIn + 1};
  const cospadi_matrix out{y.data(), COSPADI_FLOAT32, 1, kDOut, kDOut};
  EXPECT_EQ(cospadi_layer_forward(layer, &in, &out, 1), COSPADI_INVALID_ARGUMENT);
  EXPECT_STREQ(cospadi_last_error(), "x: expected shape [1, 21], got [1, 22]");
  in = {x.data(), 9, 1, kDIn, kDIn};
  EXPECT_EQ(cospadi_layer_forward(layer, &in, &out, 1), COSPADI_INVALID_ARGUMENT);
  EXPECT_EQ(cospadi_layer_forward(layer, nullptr, &out, 1), COSPADI_INVALID_ARGUMENT);
  EXPECT_EQ(y, std::vector<float>(static_cast<size_t>(kDOut), 5.0F));
  cospadi_layer_close(layer);
  cospadi_layer_close(nullptr);
  cospadi_checkpoint_close(nullptr);
}

TEST(CApi, TheLastErrorIsTheThreads) {
  cospadi_checkpoint* checkpoint = nullptr;
  ASSERT_NE(cospadi_checkpoint_open("/first", &checkpoint), COSPADI_OK);
  std::thread([&] {
    EXPECT_STREQ(cospadi_last_error(), "");
    EXPECT_NE(cospadi_checkpoint_open("/second", &checkpoint), COSPADI_OK);
    EXPECT_NE(std::string(cospadi_last_error()).find("/second"), std::string::npos);
  }).join();
  EXPECT_NE(std::string(cospadi_last_error()).find("/first"), std::string::npos);
  // long messages are cut, not overrun
  ASSERT_NE(cospadi_checkpoint_open(std::string(5000, 'x').c_str(), &checkpoint), COSPADI_OK);
  EXPECT_EQ(std::strlen(cospadi_last_error()), 1023U);
}

TEST(CApi, SparseGemm) {
  // outputs use atoms 0 and 9, 1 and 2
  const uint8_t mask[] = {0x01, 0x02, 0x06, 0x00};
  const float coeffs[] = {2, 3, 4, 5};
  const float bias[] = {100, 200};
  const std::vector<float> z = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  std::vector<float> y(2);
  ASSERT_EQ(cospadi_validate_mask(mask, 2, 2, 10, 2), COSPADI_OK);
  EXPECT_EQ(cospadi_validate_mask(mask, 2, 2, 10, 3), COSPADI_INVALID_ARGUMENT);
  EXPECT_EQ(cospadi_validate_mask(mask, 2, 2, -10, 3), COSPADI_INVALID_ARGUMENT);
  const cospadi_const_matrix in{z.data(), COSPADI_FLOAT32, 1, 10, 10};
  const cospadi_matrix out{y.data(), COSPADI_FLOAT32, 1, 2, 2};
  cospadi_sparse_code code{10, mask, 2, {coeffs, COSPADI_FLOAT32, 2, 2, 2}};
  ASSERT_EQ(cospadi_sparse_gemm(&in, &code, bias, COSPADI_FLOAT32, &out, 1), COSPADI_OK);
  EXPECT_EQ(y, (std::vector<float>{132, 223}));
  ASSERT_EQ(cospadi_sparse_gemm(&in, &code, nullptr, 0, &out, 1), COSPADI_OK);
  EXPECT_EQ(y, (std::vector<float>{32, 23}));
  EXPECT_EQ(cospadi_sparse_gemm(&in, &code, bias, 7, &out, 1), COSPADI_INVALID_ARGUMENT);
  EXPECT_EQ(cospadi_sparse_gemm(&in, nullptr, bias, 0, &out, 1), COSPADI_INVALID_ARGUMENT);
  code.mask = nullptr;  // then there are as many coefficients as atoms
  EXPECT_EQ(cospadi_sparse_gemm(&in, &code, nullptr, 0, &out, 1), COSPADI_INVALID_ARGUMENT);
  code.coeffs.rows = -1;
  EXPECT_EQ(cospadi_sparse_gemm(&in, &code, nullptr, 0, &out, 1), COSPADI_INVALID_ARGUMENT);
}

TEST(CApi, PackedGemm) {
  const uint8_t mask[] = {0x07, 0x0e};               // atoms 0 to 2, 1 to 3
  const uint8_t codes[] = {0xe1, 0x07, 0xe1, 0x07};  // int4: 1, -2, 7
  const uint16_t scale[] = {0x3f00, 0x4000};         // bfloat16: 0.5, 2
  const std::vector<float> z = {1, 2, 3, 4};
  std::vector<float> y(2);
  const cospadi_const_matrix in{z.data(), COSPADI_FLOAT32, 1, 4, 4};
  const cospadi_matrix out{y.data(), COSPADI_FLOAT32, 1, 2, 2};
  cospadi_packed_code code{};
  code.n_atoms = 4;
  code.mask = mask;
  code.mask_stride = 1;
  code.d_out = 2;
  code.sparsity = 3;
  code.kind = COSPADI_CODE_INTEGER;
  code.bits = 4;
  code.codes = codes;
  code.codes_stride = 2;
  code.scale = {scale, COSPADI_BFLOAT16, 2, 1, 1};
  ASSERT_EQ(cospadi_packed_gemm(&in, &code, nullptr, 0, &out, 1), COSPADI_OK)
      << cospadi_last_error();
  EXPECT_EQ(y, (std::vector<float>{9, 48}));
  const auto rejects = [&](auto change) {
    cospadi_packed_code wrong = code;
    change(wrong);
    EXPECT_EQ(cospadi_packed_gemm(&in, &wrong, nullptr, 0, &out, 1), COSPADI_INVALID_ARGUMENT);
  };
  rejects([](cospadi_packed_code& c) { c.bits = 0; });
  rejects([](cospadi_packed_code& c) { c.bits = 1 << 30; });
  rejects([](cospadi_packed_code& c) { c.kind = 5; });
  rejects([](cospadi_packed_code& c) { c.sparsity = -1; });
  rejects([](cospadi_packed_code& c) { c.sparsity = INT64_MAX; });
  rejects([](cospadi_packed_code& c) { c.d_out = -2; });
  rejects([](cospadi_packed_code& c) { c.n_atoms = -1; });
  rejects([](cospadi_packed_code& c) { c.n_atoms = INT64_MAX; });
  rejects([](cospadi_packed_code& c) { c.codes = nullptr; });
  rejects([](cospadi_packed_code& c) { c.scale.data = nullptr; });
  rejects([](cospadi_packed_code& c) { c.codes_stride = 1; });
  rejects([](cospadi_packed_code& c) { c.group = -1; });
}

}  // namespace
}  // namespace cospadi
