// Picks the instruction set at run time; PLORA_CPU_ISA=default|avx2|avx512 lowers the choice, for tests.
#include "gemm.h"

#include <cstdlib>
#include <cstring>

namespace plora::cpu {

#define PLORA_DECLARE(isa)            \
  namespace isa {                     \
  extern const Gemm<float> gemm_f32;  \
  extern const Gemm<double> gemm_f64; \
  }
PLORA_DECLARE(isa_default)
#if defined(__x86_64__)
PLORA_DECLARE(isa_avx2)
PLORA_DECLARE(isa_avx512)
#endif

namespace {

struct Choice {
  const Gemm<float>* f32;
  const Gemm<double>* f64;
};

Choice choose() {
#if defined(__x86_64__)
  const char* wish = std::getenv("PLORA_CPU_ISA");
  const auto allowed = [&](const char* name) {  // a wish forbids whatever is wider than it
    if (!wish) return true;
    if (!std::strcmp(wish, "default")) return false;
    return std::strcmp(wish, "avx2") != 0 || !std::strcmp(name, "avx2");
  };
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return {&isa_avx512::gemm_f32, &isa_avx512::gemm_f64};
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {&isa_avx2::gemm_f32, &isa_avx2::gemm_f64};
#endif
  return {&isa_default::gemm_f32, &isa_default::gemm_f64};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

template <>
const Gemm<float>& gemm<float>() {
  return *choice().f32;
}

template <>
const Gemm<double>& gemm<double>() {
  return *choice().f64;
}

}  // namespace plora::cpu
