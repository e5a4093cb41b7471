// What this processor can run, and which of the instruction sets compiled from csrc/cpu/isa the kernels take.
//
// Plain C++ for code compiled for the baseline processor: do not include it from csrc/cpu/isa.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace plora {

struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false, avx512_bf16 = false, avx512_fp16 = false;
  bool amx_tile = false, amx_bf16 = false, amx_int8 = false;
  bool neon = false;
};

// A feature counts only when the operating system saves its registers too (XCR0), or using it would trap.
inline CpuFeatures detect_cpu_features() {
  CpuFeatures f;
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const auto bit = [](unsigned word, int n) { return ((word >> n) & 1u) != 0; };
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !bit(ecx, 27)) return f;  // OSXSAVE
  const unsigned leaf1 = ecx;
  unsigned xcr0 = 0, xcr0_high = 0;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = ymm && (xcr0 & 0xe0) == 0xe0, tiles = (xcr0 & 0x60000) == 0x60000;
  f.fma = ymm && bit(leaf1, 12);
  f.f16c = ymm && bit(leaf1, 29);
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return f;
  const unsigned subleaves = eax;
  f.avx2 = ymm && bit(ebx, 5);
  f.avx512f = zmm && bit(ebx, 16);
  f.avx512dq = zmm && bit(ebx, 17);
  f.avx512bw = zmm && bit(ebx, 30);
  f.avx512vl = zmm && bit(ebx, 31);
  f.avx512_fp16 = zmm && bit(edx, 23);
  f.amx_bf16 = tiles && bit(edx, 22);
  f.amx_tile = tiles && bit(edx, 24);
  f.amx_int8 = tiles && bit(edx, 25);
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) f.avx512_bf16 = zmm && bit(eax, 5);
#elif defined(__aarch64__)
  f.neon = true;  // part of the architecture
#endif
  return f;
}

enum class Isa { kDefault, kAvx2, kAvx512, kAmx };

inline const char* isa_name(Isa isa) {
  static const char* const names[] = {"default", "avx2", "avx512", "amx"};
  return names[static_cast<int>(isa)];
}

// The widest instruction set that `f` has; PLORA_CPU_ISA=default|avx2|avx512|amx lowers the choice (for tests), never
// raises it. AMX is AVX-512 with matrix registers for bfloat16.
inline Isa choose_isa(const CpuFeatures& f, const char* wish) {
  Isa limit = Isa::kAmx;
  if (wish != nullptr && std::strcmp(wish, "default") == 0) limit = Isa::kDefault;
  if (wish != nullptr && std::strcmp(wish, "avx2") == 0) limit = Isa::kAvx2;
  if (wish != nullptr && std::strcmp(wish, "avx512") == 0) limit = Isa::kAvx512;
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512 = avx2 && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq;
  const bool amx = avx512 && f.avx512_bf16 && f.amx_tile && f.amx_bf16;
  if (amx && limit >= Isa::kAmx) return Isa::kAmx;
  if (avx512 && limit >= Isa::kAvx512) return Isa::kAvx512;
  if (avx2 && limit >= Isa::kAvx2) return Isa::kAvx2;
  return Isa::kDefault;
}

// Linux hands out the matrix registers on request, for all threads of the process.
inline bool amx_is_permitted() {
#if defined(__x86_64__) && defined(SYS_arch_prctl) && defined(PLORA_AMX)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

inline Isa chosen_isa() {
  static const Isa isa = [] {
    const Isa widest = choose_isa(detect_cpu_features(), std::getenv("PLORA_CPU_ISA"));
    return widest == Isa::kAmx && !amx_is_permitted() ? Isa::kAvx512 : widest;
  }();
  return isa;
}

// Whether the CPU kernels make the frozen layer's float32 product of M rows themselves: where they take about as long
// as torch or less (on an EPYC with AVX-512, 1 and 2 threads: 0.8 to 1.1 of its time). A rule, not a measurement, and
// blind to the number of threads: a run repeats from one process to the next, and the kernels' bits are the same for
// any number.
inline bool makes_frozen_product(Isa isa, int64_t M, int64_t in, int64_t out) {
  constexpr int64_t kRows = 64;          // fewer do not repay packing the weight
  constexpr int64_t kWeights = 1 << 15;  // so many a row: a large weight leaves the caches
  return isa != Isa::kDefault && M >= kRows && M >= in * out / kWeights;
}

}  // namespace plora
