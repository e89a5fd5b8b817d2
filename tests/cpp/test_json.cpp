#include <gtest/gtest.h>

#include <string>

#include "core/json.hpp"

namespace cospadi::detail {
namespace {

std::string refusal(const std::string& text) {
  try {
    (void)parse_json(text);
  } catch (const JsonError& error) {
    return error.what();
  }
  return "";
}

TEST(Json, ReadsEveryKindOfValue) {
  const Json value = parse_json(
      " {\"a\" : [1, -0, 2.5, -1e2, true, false, null, 9223372036854775807],\n\t\"b\":{},"
      "\"c\":\"x\\n\\u00e4\\ud83d\\ude00\\/\",\"\":[]} ");
  const JsonList& list = *value.find("a")->as<JsonList>();
  EXPECT_EQ(*list[0].as<int64_t>(), 1);
  EXPECT_EQ(*list[1].as<int64_t>(), 0);
  EXPECT_EQ(*list[2].as<double>(), 2.5);
  EXPECT_EQ(*list[3].as<double>(), -100.0);
  EXPECT_TRUE(*list[4].as<bool>());
  EXPECT_FALSE(*list[5].as<bool>());
  EXPECT_TRUE(list[6].is_null());
  EXPECT_EQ(*list[7].as<int64_t>(), INT64_MAX);
  EXPECT_TRUE(value.find("b")->as<JsonObject>()->empty());
  EXPECT_EQ(*value.find("c")->as<std::string>(), "x\n\xc3\xa4\xf0\x9f\x98\x80/");
  EXPECT_TRUE(value.find("")->as<JsonList>()->empty());
  EXPECT_EQ(value.find("d"), nullptr);
  EXPECT_EQ(list[0].find("d"), nullptr);
  EXPECT_NE(parse_json("9223372036854775808").as<BigInteger>(), nullptr);
  EXPECT_NE(parse_json("-" + std::string(5000, '7')).as<BigInteger>(), nullptr);
  EXPECT_EQ(parse_json("1.0").as<int64_t>(), nullptr);
}

TEST(Json, RefusesWhatIsNotJson) {
  for (const char* text : {"",
                           " ",
                           "{",
                           "[1,]",
                           "[1 2]",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{a:1}",
                           "{\"a\":1,}",
                           "01",
                           "-",
                           "1.",
                           ".5",
                           "1e",
                           "+1",
                           "0x1",
                           "NaN",
                           "Infinity",
                           "-Infinity",
                           "tru",
                           "nul",
                           "'a'",
                           "\"a",
                           "\"\\x\"",
                           "\"\\u12\"",
                           "\"\\u12g4\"",
                           "\"\n\"",
                           "1 2",
                           "[1]]",
                           "/**/1",
                           "1e999",
                           "-1e999",
                           "1e-999",
                           "\"\\ud800\"",
                           "\"\\udc00\"",
                           "\"\\ud800\\u0041\"",
                           "\xef\xbb\xbf{}"}) {
    EXPECT_NE(refusal(text), "") << text;
  }
  EXPECT_NE(refusal(std::string("1\0", 2)), "");
  EXPECT_NE(refusal(std::string("\"\0\"", 3)), "");
}

TEST(Json, RefusesWhatIsNotUtf8) {
  for (const char* text : {"\x80",
                           "\xc0\xaf",
                           "\xc3",
                           "\xe0\x80\x80",
                           "\xed\xa0\x80",
                           "\xf0\x80\x80\x80",
                           "\xf4\x90\x80\x80",
                           "\xf5\x80\x80\x80",
                           "\xe2\x82",
                           "\xc3(",
                           "\xff"}) {
    EXPECT_NE(refusal("\"" + std::string(text) + "\""), "") << text;
  }
  for (const char* text :
       {"\xc2\x80", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_EQ(refusal("\"" + std::string(text) + "\""), "") << text;
  }
}

TEST(Json, NamesTheProblemAndItsPlace) {
  EXPECT_EQ(refusal("{\"a\":1,\"b\":2,\"a\":3}"), "key a occurs twice at byte 19");
  EXPECT_EQ(refusal("[1,,2]"), "expected a value at byte 3");
  EXPECT_EQ(refusal("{\"a\\n\":1,\"a\\n\":1}"), "key a? occurs twice at byte 17");
}

TEST(Json, NestingIsBounded) {
  const auto nested = [](int depth) {
    return std::string(static_cast<size_t>(depth), '[') +
           std::string(static_cast<size_t>(depth), ']');
  };
  EXPECT_EQ(refusal(nested(kMaxJsonDepth)), "");
  EXPECT_NE(refusal(nested(kMaxJsonDepth + 1)).find("nested more than"), std::string::npos);
  EXPECT_NE(refusal(std::string(1'000'000, '[')), "");
  std::string objects;
  for (int i = 0; i < 1'000'000; ++i) objects += "{\"\":";
  EXPECT_NE(refusal(objects), "");
}

TEST(Json, NumberOfValuesIsBounded) {
  std::string text = "[0";
  for (int64_t i = 0; i < kMaxJsonValues; ++i) text += ",0";
  EXPECT_NE(refusal(text + "]").find("too many values"), std::string::npos);
}

TEST(Json, BriefIsOneShortLine) {
  const Json value =
      parse_json("{\"a\":\"" + std::string(300, 'x') + "\\n\",\"b\":[],\"c\":1e300}");
  EXPECT_LT(brief(value.find("a")).size(), 110U);
  EXPECT_EQ(brief(value.find("b")), "a list");
  EXPECT_EQ(brief(value.find("c")), "1e+300");
  EXPECT_EQ(brief(nullptr), "nothing");
  EXPECT_EQ(brief_text("a\n\xc3\xa4"), "a???");
}

}  // namespace
}  // namespace cospadi::detail
