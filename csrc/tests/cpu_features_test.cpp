// The instruction set chosen is one that the processor has, and PLORA_CPU_ISA can only lower it.
#include "common/cpu_features.h"

#include <cstdio>

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

}  // namespace

int main() {
  using plora::choose_isa;
  using plora::Isa;
  plora::CpuFeatures avx2;
  avx2.avx2 = avx2.fma = avx2.f16c = true;
  plora::CpuFeatures avx512 = avx2;
  avx512.avx512f = avx512.avx512bw = avx512.avx512vl = avx512.avx512dq = true;
  plora::CpuFeatures amx = avx512;
  amx.avx512_bf16 = amx.amx_tile = amx.amx_bf16 = true;
  plora::CpuFeatures partial = avx2;  // the first AVX-512 processors: no bw, vl, dq
  partial.avx512f = true;

  expect(choose_isa({}, nullptr) == Isa::kDefault, "a processor without AVX2 takes the default");
  expect(choose_isa({}, "avx512") == Isa::kDefault, "a wish never raises the choice");
  expect(choose_isa(avx2, nullptr) == Isa::kAvx2, "AVX2 is taken");
  expect(choose_isa(avx512, nullptr) == Isa::kAvx512, "AVX-512 is taken");
  expect(choose_isa(amx, nullptr) == Isa::kAmx, "AMX is taken");
  expect(choose_isa(amx, "avx512") == Isa::kAvx512, "a wish lowers the choice from AMX");
  expect(choose_isa(avx512, "amx") == Isa::kAvx512, "a wish never raises the choice to AMX");
  expect(choose_isa(partial, nullptr) == Isa::kAvx2, "an incomplete AVX-512 is not");
  expect(choose_isa(avx512, "avx2") == Isa::kAvx2, "a wish lowers the choice");
  expect(choose_isa(avx512, "default") == Isa::kDefault, "a wish lowers the choice to the default");

#if defined(__x86_64__)
  const plora::CpuFeatures here = plora::detect_cpu_features();
  expect(here.avx2 == static_cast<bool>(__builtin_cpu_supports("avx2")), "avx2 agrees with the compiler's detection");
  expect(here.fma == static_cast<bool>(__builtin_cpu_supports("fma")), "fma agrees with the compiler's detection");
  expect(here.avx512f == static_cast<bool>(__builtin_cpu_supports("avx512f")), "avx512f agrees");
  expect(here.avx512vl == static_cast<bool>(__builtin_cpu_supports("avx512vl")), "avx512vl agrees");
#endif

  if (failures == 0) std::puts("cpu_features: all passed");
  return failures == 0 ? 0 : 1;
}
