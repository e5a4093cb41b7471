// Small sums that host code everywhere does.
#pragma once

#include <cstdint>

namespace plora {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a size that a check, or the plan, keeps below 2^31.
constexpr int narrow(int64_t size) { return static_cast<int>(size); }

// To the 16 bytes of a vector.
template <typename... Types>
bool aligned(const Types*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace plora
