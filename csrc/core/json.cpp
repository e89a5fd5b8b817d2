#include "core/json.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <system_error>

namespace cospadi::detail {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// Bytes of the UTF-8 character that `text` begins with, or 0 if it begins with none.
size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return 1;
  const size_t length = first >= 0xf0 ? 4 : (first >= 0xe0 ? 3 : 2);
  if (first < 0xc2 || first > 0xf4 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  // longer than necessary, surrogates, beyond the last code point
  if (first == 0xe0 && byte(1) < 0xa0) return 0;
  if (first == 0xed && byte(1) > 0x9f) return 0;
  if (first == 0xf0 && byte(1) < 0x90) return 0;
  if (first == 0xf4 && byte(1) > 0x8f) return 0;
  return length;
}

void append_utf8(uint32_t code, std::string& out) {
  const auto tail = [&](int shift) {
    out += static_cast<char>(0x80U | ((code >> static_cast<unsigned>(shift)) & 0x3fU));
  };
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0U | (code >> 6U));
    tail(0);
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0U | (code >> 12U));
    tail(6);
    tail(0);
  } else {
    out += static_cast<char>(0xf0U | (code >> 18U));
    tail(12);
    tail(6);
    tail(0);
  }
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json run() {
    if (static_cast<int64_t>(text_.size()) > kMaxJsonBytes) fail("text is too long");
    Json value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("text goes on after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw JsonError(what + " at byte " + std::to_string(at_));
  }

  /// The next byte; 0, which is never part of valid JSON, at the end.
  [[nodiscard]] char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!take(c)) fail(std::string("expected ") + c);
  }

  void skip_space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
      ++at_;
    }
  }

  // The recursion is as deep as kMaxJsonDepth.
  Json parse_value(int depth) {
    if (++n_values_ > kMaxJsonValues) fail("too many values");
    skip_space();
    switch (peek()) {
      case '{':
        return Json(parse_object(depth + 1));
      case '[':
        return Json(parse_list(depth + 1));
      case '"':
        return Json(parse_text());
      case 't':
        return literal("true", Json::Value(true));
      case 'f':
        return literal("false", Json::Value(false));
      case 'n':
        return literal("null", Json::Value(std::monostate()));
      default:
        return parse_number();
    }
  }

  Json literal(std::string_view word, Json::Value value) {
    if (text_.substr(at_, word.size()) != word) fail("expected a value");
    at_ += word.size();
    return Json(std::move(value));
  }

  void enter(int depth) {
    if (depth > kMaxJsonDepth) fail("nested more than " + std::to_string(kMaxJsonDepth) + " deep");
    ++at_;
    skip_space();
  }

  JsonList parse_list(int depth) {
    enter(depth);
    JsonList items;
    if (take(']')) return items;
    do {
      items.push_back(parse_value(depth));
      skip_space();
    } while (take(','));
    expect(']');
    return items;
  }

  JsonObject parse_object(int depth) {
    enter(depth);
    JsonObject members;
    if (take('}')) return members;
    do {
      skip_space();
      if (peek() != '"') fail("expected a key");
      std::string key = parse_text();
      skip_space();
      expect(':');
      members.emplace_back(std::move(key), parse_value(depth));
      skip_space();
    } while (take(','));
    expect('}');
    refuse_repeated_keys(members);
    return members;
  }

  void refuse_repeated_keys(const JsonObject& members) const {
    std::vector<std::string_view> keys;
    keys.reserve(members.size());
    for (const auto& member : members) keys.emplace_back(member.first);
    std::ranges::sort(keys);
    const auto repeated = std::ranges::adjacent_find(keys);
    if (repeated != keys.end()) fail("key " + brief_text(*repeated) + " occurs twice");
  }

  std::string parse_text() {
    expect('"');
    std::string out;
    while (true) {
      if (at_ == text_.size()) fail("text without end");
      const char c = text_[at_];
      if (static_cast<uint8_t>(c) < 0x20) fail("control character in a text");
      if (c == '"') break;
      if (c == '\\') {
        ++at_;
        parse_escape(out);
        continue;
      }
      const size_t length = utf8_length(text_.substr(at_));
      if (length == 0) fail("not UTF-8");
      out.append(text_, at_, length);
      at_ += length;
    }
    ++at_;
    return out;
  }

  void parse_escape(std::string& out) {
    constexpr std::string_view kLetters = "\"\\/bfnrt";
    constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    const char letter = peek();
    if (letter == 'u') {
      ++at_;
      return append_utf8(parse_code_point(), out);
    }
    const size_t index = letter == '\0' ? std::string_view::npos : kLetters.find(letter);
    if (index == std::string_view::npos) fail("unknown escape");
    out += kMeanings[index];
    ++at_;
  }

  uint32_t parse_code_point() {
    const uint32_t high = parse_hex();
    if (high < 0xd800 || high > 0xdfff) return high;
    if (high > 0xdbff || !take('\\') || !take('u')) fail("half of a surrogate pair");
    const uint32_t low = parse_hex();
    if (low < 0xdc00 || low > 0xdfff) fail("half of a surrogate pair");
    return 0x10000 + ((high - 0xd800) << 10U) + (low - 0xdc00);
  }

  uint32_t parse_hex() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const bool is_letter = (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
      if (!is_digit(c) && !is_letter) fail("expected four hexadecimal digits");
      // the letters' lowest bits are 1 .. 6 in both cases
      const uint32_t digit = is_digit(c) ? static_cast<uint32_t>(c - '0') : (c & 7U) + 9U;
      code = code * 16 + digit;
    }
    return code;
  }

  void skip_digits() {
    if (!is_digit(peek())) fail("expected a digit");
    while (is_digit(peek())) ++at_;
  }

  Json parse_number() {
    const size_t begin = at_;
    if (peek() != '-' && !is_digit(peek())) fail("expected a value");
    take('-');
    if (!take('0')) skip_digits();
    bool is_integer = true;
    if (take('.')) {
      is_integer = false;
      skip_digits();
    }
    if (take('e') || take('E')) {
      is_integer = false;
      if (!take('+')) take('-');
      skip_digits();
    }
    const char* const first = text_.data() + begin;
    const char* const last = text_.data() + at_;
    if (is_integer) {
      int64_t integer = 0;
      const bool fits = std::from_chars(first, last, integer).ec == std::errc();
      return fits ? Json(integer) : Json(BigInteger());
    }
    double number = 0.0;
    // Either too large or too near to zero: nothing that a config means.
    const bool fits = std::from_chars(first, last, number).ec == std::errc();
    if (!fits || !std::isfinite(number)) fail("number out of range");
    return Json(number);
  }

  std::string_view text_;
  size_t at_ = 0;
  int64_t n_values_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view key) const noexcept {
  const auto* const members = as<JsonObject>();
  if (members == nullptr) return nullptr;
  for (const auto& [name, value] : *members) {
    if (name == key) return &value;
  }
  return nullptr;
}

Json parse_json(std::string_view text) { return Parser(text).run(); }

std::string brief_text(std::string_view text) {
  constexpr size_t kLongest = 100;
  std::string out;
  for (const char c : text.substr(0, kLongest)) {
    const bool is_plain = c >= ' ' && c <= '~' && c != '\\';
    out += is_plain ? c : '?';
  }
  return text.size() > kLongest ? out + "..." : out;
}

std::string brief(const Json* value) {
  if (value == nullptr || value->is_null()) return "nothing";
  if (const bool* const flag = value->as<bool>()) return *flag ? "true" : "false";
  if (const auto* const integer = value->as<int64_t>()) return std::to_string(*integer);
  if (value->as<BigInteger>() != nullptr) return "an integer of more than 64 bits";
  if (const auto* const number = value->as<double>()) {
    char buffer[32];
    std::snprintf(buffer, sizeof(buffer), "%.6g", *number);
    return buffer;
  }
  if (const auto* const text = value->as<std::string>()) return "'" + brief_text(*text) + "'";
  return value->as<JsonList>() != nullptr ? "a list" : "an object";
}

}  // namespace cospadi::detail
