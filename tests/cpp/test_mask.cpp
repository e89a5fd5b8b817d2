#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cospadi/mask.hpp"
#include "cospadi/status.hpp"

namespace cospadi {
namespace {

std::string message_of(const auto& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Mask, PackAndUnpack) {
  // word boundaries and the last atom
  const std::vector<int32_t> indices = {0, 7, 8, 31, 1, 32, 63, 64, 33, 34, 65, 66};
  const int64_t n_atoms = 67;
  ASSERT_EQ(mask_row_bytes(n_atoms), 9);
  std::vector<uint8_t> mask(3 * 10, 0xee);  // row stride 10: one byte of padding is kept
  pack_mask({indices.data(), 3, 4}, n_atoms, {mask.data(), 3, 9, 10});
  EXPECT_EQ(mask[0], 0x81);
  EXPECT_EQ(mask[1], 0x01);
  EXPECT_EQ(mask[3], 0x80);
  EXPECT_EQ(mask[9], 0xee);
  EXPECT_EQ(mask[20 + 8], 0x06);
  std::vector<int32_t> unpacked(12);
  unpack_mask({mask.data(), 3, 9, 10}, n_atoms, {unpacked.data(), 3, 4});
  EXPECT_EQ(unpacked, indices);
}

TEST(Mask, NamesTheWrongRow) {
  std::vector<uint8_t> mask(2);
  const std::vector<int32_t> repeated = {0, 1, 3, 3};
  EXPECT_NE(message_of([&] {
              pack_mask({repeated.data(), 2, 2}, 5, {mask.data(), 2, 1});
            }).find("indices row 1: expected strictly ascending atoms, got 3 after 3"),
            std::string::npos);
  const std::vector<int32_t> too_large = {0, 5};
  EXPECT_NE(message_of([&] {
              pack_mask({too_large.data(), 1, 2}, 5, {mask.data(), 1, 1});
            }).find("expected atoms in 0 .. 4, got 5"),
            std::string::npos);
  const std::vector<uint8_t> padding = {0x03, 0x21};
  EXPECT_NE(message_of([&] {
              validate_mask({padding.data(), 2, 1}, 5, 2);
            }).find("mask row 1: bits above the last atom 4 must be zero"),
            std::string::npos);
  const std::vector<uint8_t> population = {0x03, 0x07};
  EXPECT_NE(message_of([&] {
              validate_mask({population.data(), 2, 1}, 5, 2);
            }).find("mask row 1: expected exactly s = 2 set bits, got 3"),
            std::string::npos);
}

TEST(Mask, Empty) {
  validate_mask({nullptr, 0, 1}, 5, 2);
  validate_mask({nullptr, 3, 0}, 0, 0);
  std::vector<uint8_t> mask = {0xff};
  pack_mask({nullptr, 1, 0}, 5, {mask.data(), 1, 1});
  EXPECT_EQ(mask[0], 0);
  EXPECT_THROW(validate_mask({mask.data(), 1, 1}, 9, 0), Error);
  EXPECT_THROW(validate_mask({mask.data(), 1, 1}, 5, 6), Error);
  EXPECT_THROW(validate_mask({nullptr, 1, 1}, 5, 0), Error);
}

}  // namespace
}  // namespace cospadi
