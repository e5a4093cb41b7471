// A check that throws with a message, without torch's headers: kernels and plans have it too.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

// Throws std::runtime_error, in Python RuntimeError; the parts side by side are its text. STD_TORCH_CHECK makes the
// text in a stream, which crashes where a second, statically linked C++ runtime is in the process.
#define PLORA_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::plora::fail(__VA_ARGS__); \
  } while (false)

namespace plora {

inline std::string text_of(const char* text) { return text; }
inline std::string text_of(const std::string& text) { return text; }

template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
std::string text_of(T number) {
  if constexpr (std::is_integral_v<T>) {
    return std::to_string(number);
  } else {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(number));
    return text;
  }
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error((std::string() + ... + text_of(parts)));
}

}  // namespace plora
