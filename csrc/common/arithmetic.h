// Small sums that host code everywhere does.
#pragma once

#include <cstdint>

namespace plora {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// To the 16 bytes of a vector.
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace plora
