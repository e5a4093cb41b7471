// Picks the products compiled for this machine's instruction set, once (see csrc/common/cpu_features.h).
#include "gemm.h"

#include "../common/cpu_features.h"
#include "convert.h"
#include "tiles.h"

namespace plora::cpu {

#if defined(__x86_64__)
#define PLORA_CHOOSE(table)      \
  switch (chosen_isa()) {        \
    case Isa::kAmx:              \
    case Isa::kAvx512:           \
      return isa_avx512::table;  \
    case Isa::kAvx2:             \
      return isa_avx2::table;    \
    default:                     \
      return isa_default::table; \
  }
#else
#define PLORA_CHOOSE(table) return isa_default::table;
#endif

template <>
const Gemm<float>& gemm<float>() {
  PLORA_CHOOSE(gemm_f32)
}

template <>
const Gemm<double>& gemm<double>() {
  PLORA_CHOOSE(gemm_f64)
}

const Conversions& conversions() { PLORA_CHOOSE(conversions) }

const Tiles* tiles() {
#if defined(PLORA_AMX)
  if (chosen_isa() == Isa::kAmx) return &isa_amx::tiles;
#endif
  return nullptr;
}

}  // namespace plora::cpu
