// Rows from one element type to another; between float32 and the 16-bit types, with the machine's own instructions.
#pragma once

#include <cstdint>

namespace plora::cpu {

struct Conversions {
  void (*widen_bfloat16)(int64_t n, const uint16_t* from, float* to);
  void (*narrow_bfloat16)(int64_t n, const float* from, uint16_t* to);
  void (*widen_float16)(int64_t n, const uint16_t* from, float* to);  // both null where there is no such instruction
  void (*narrow_float16)(int64_t n, const float* from, uint16_t* to);
};

const Conversions& conversions();

namespace isa_default {
extern const Conversions conversions;
}
#if defined(__x86_64__)
namespace isa_avx2 {
extern const Conversions conversions;
}
namespace isa_avx512 {
extern const Conversions conversions;
}
#endif

}  // namespace plora::cpu
