// What every target asks of a reader: it reads, or refuses with one line.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "core/json.hpp"
#include "cospadi/status.hpp"

namespace cospadi::fuzz {

/// Ends the process, which the fuzzer reports with the input, unless `holds`.
inline void ensure(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

inline void ensure_message(std::string_view message) {
  ensure(!message.empty() && message.size() < 2000, "a message has 1 to 1999 characters");
  ensure(message.find('\n') == std::string_view::npos, "a message is one line");
}

/// Runs `read`. Errors of ours must have a message; anything else escapes.
template <class Read>
void read_or_refuse(const Read& read) {
  try {
    read();
  } catch (const Error& error) {
    ensure_message(error.what());
  } catch (const detail::JsonError& error) {
    ensure_message(error.what());
  }
}

}  // namespace cospadi::fuzz
