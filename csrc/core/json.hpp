// JSON from files that nobody vouched for: strict, bounded, read-only values.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace cospadi::detail {

/// Text beyond this is refused: the limit that safetensors sets for its header, generous for a
/// config.
inline constexpr int64_t kMaxJsonBytes = 100'000'000;

/// Lists and objects inside each other; real configs need five.
inline constexpr int kMaxJsonDepth = 32;

/// Values of one text. It bounds memory where the text is one long list of nothing: the tree costs
/// some 70 bytes a value. A header spends 8 values on a tensor.
inline constexpr int64_t kMaxJsonValues = int64_t{1} << 23;

/// What is wrong and at which byte; the caller knows the file.
class JsonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Json;

/// An integer that does not fit in 64 bits.
struct BigInteger {};

using JsonList = std::vector<Json>;
/// In the order of the text; keys are unique.
using JsonObject = std::vector<std::pair<std::string, Json>>;

/// One value. Integers and numbers with a fraction or an exponent are kept apart, as they are in
/// Python.
class Json {
 public:
  using Value = std::
      variant<std::monostate, bool, int64_t, BigInteger, double, std::string, JsonList, JsonObject>;

  Json() = default;
  explicit Json(Value value) : value_(std::move(value)) {}

  /// The value as a T, or null if it is something else.
  template <class T>
  const T* as() const noexcept {
    return std::get_if<T>(&value_);
  }
  [[nodiscard]] bool is_null() const noexcept { return as<std::monostate>() != nullptr; }
  /// The value of `key`, or null if this is no object or has no such key. Takes time linear in the
  /// number of keys.
  [[nodiscard]] const Json* find(std::string_view key) const noexcept;

 private:
  Value value_;
};

/// Parses one value and nothing else. Refuses, by JsonError: what is not JSON (RFC 8259) or not
/// UTF-8, keys that occur twice, halves of surrogate pairs, numbers beyond the range of a double,
/// and whatever exceeds the limits above.
Json parse_json(std::string_view text);

/// An untrusted value on one short line of ASCII.
std::string brief(const Json* value);

/// Untrusted text on one short line of ASCII, without quotes.
std::string brief_text(std::string_view text);

}  // namespace cospadi::detail
