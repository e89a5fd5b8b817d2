// Deterministic damage to bytes: the same inputs in every run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>

namespace cospadi {

class Mutator {
 public:
  explicit Mutator(unsigned seed) : random_(seed) {}

  /// 0 .. n - 1.
  size_t below(size_t n) { return random_() % n; }

  /// `text` with one to four places changed, among its first `limit` bytes.
  std::string operator()(std::string text, size_t limit = std::string::npos) {
    for (size_t n = 1 + below(4); n > 0; --n) change(text, std::min(limit, text.size()));
    return text;
  }

 private:
  void change(std::string& text, size_t limit) {
    static const char* const kPieces[] = {
        "0",       "-1",   "1",       "2147483648", "9223372036854775807",
        "1e9",     "true", "null",    "\"\"",       "[]",
        "{}",      "[[[[", "{\"a\":", "\"",         "\\u0000",
        "\\ud800", "../",  ",",       ":",          "}",
        "]",       "\xff"};
    if (limit == 0) {
      text += kPieces[below(std::size(kPieces))];
      return;
    }
    const size_t at = below(limit);
    const size_t length = std::min(below(16) + 1, text.size() - at);
    switch (below(7)) {
      case 0:
        text[at] = static_cast<char>(below(256));
        break;
      case 1:
        text[at] = static_cast<char>(static_cast<uint8_t>(text[at]) ^ (1U << below(8)));
        break;
      case 2:
        text.erase(at, length);
        break;
      case 3:
        text.insert(at, text.substr(below(limit), length));
        break;
      case 4:
        text.insert(at, kPieces[below(std::size(kPieces))]);
        break;
      case 5:
        change_number(text, at, limit);
        break;
      default:
        if (below(8) == 0) text.resize(at);  // the rest is gone
    }
  }

  /// Replaces the next number at or after `at`, which syntax alone does not notice.
  void change_number(std::string& text, size_t at, size_t limit) {
    const auto is_digit = [&](size_t i) { return text[i] >= '0' && text[i] <= '9'; };
    while (at < limit && !is_digit(at)) ++at;
    size_t end = at;
    while (end < limit && is_digit(end)) ++end;
    if (at == end) return;
    static const char* const kNumbers[] = {"0",
                                           "1",
                                           "2",
                                           "5",
                                           "8",
                                           "11",
                                           "21",
                                           "22",
                                           "37",
                                           "40",
                                           "65535",
                                           "2147483647",
                                           "4294967296",
                                           "281474976710656",
                                           "9223372036854775807",
                                           "18446744073709551616"};
    text.replace(at, end - at, kNumbers[below(std::size(kNumbers))]);
  }

  std::mt19937 random_;
};

}  // namespace cospadi
