// The 16-bit conversions of csrc/cpu/isa, over all 65,536 values: there and back without loss, ties to even, NaN stays
// NaN, nothing written past the end.
#include "cpu/convert.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/cpu_features.h"

namespace {

using plora::cpu::Conversions;

int failures = 0;

void expect(bool condition, const char* isa, const char* what, unsigned bits) {
  if (!condition && ++failures <= 10) std::fprintf(stderr, "FAILED: %s %s at 0x%04x\n", isa, what, bits);
}

uint32_t bits_of(float f) {
  uint32_t b;
  std::memcpy(&b, &f, sizeof(b));
  return b;
}

template <typename Widen, typename Narrow>
void round_trip(const char* isa, const char* type, Widen widen, Narrow narrow) {
  constexpr int n = 65536;
  std::vector<uint16_t> from(n), back(n + 1, 0xbeef);
  std::vector<float> wide(n + 1, 7.0f);
  for (int i = 0; i < n; ++i) from[i] = static_cast<uint16_t>(i);
  widen(n - 3, from.data(), wide.data());  // not a whole number of vectors
  expect(wide[n - 3] == 7.0f, isa, "one past the end", n);
  widen(3, from.data() + n - 3, wide.data() + n - 3);
  narrow(n, wide.data(), back.data());
  expect(back[n] == 0xbeef, isa, "one past the end", n);
  for (int i = 0; i < n; ++i) {
    if (std::isnan(wide[i])) {
      float again;
      widen(1, &back[i], &again);
      expect(std::isnan(again), isa, type, i);
    } else {
      expect(back[i] == from[i], isa, type, i);
    }
  }
  for (int i = 0; i + 1 < n; ++i) {  // halfway to the next value, and just beside
    if (!std::isfinite(wide[i]) || !std::isfinite(wide[i + 1])) continue;
    const float half = static_cast<float>((static_cast<double>(wide[i]) + wide[i + 1]) / 2);
    const float beside[3] = {std::nextafter(half, wide[i]), half, std::nextafter(half, wide[i + 1])};
    if (half == wide[i] || half == wide[i + 1] || beside[0] == wide[i]) continue;
    uint16_t rounded[3];
    narrow(3, beside, rounded);
    expect(rounded[0] == i && rounded[1] == (i % 2 ? i + 1 : i) && rounded[2] == i + 1, isa, "ties", i);
  }
}

void test(const char* isa, const Conversions& c) {
  round_trip(isa, "bfloat16", c.widen_bfloat16, c.narrow_bfloat16);
  if (c.widen_float16) round_trip(isa, "float16", c.widen_float16, c.narrow_float16);
  float one;
  const uint16_t bfloat16_one = 0x3f80;
  c.widen_bfloat16(1, &bfloat16_one, &one);
  expect(bits_of(one) == bits_of(1.0f), isa, "one", bfloat16_one);
}

}  // namespace

int main() {
  using namespace plora;
  test("default", cpu::isa_default::conversions);
#if defined(__x86_64__)
  const Isa widest = choose_isa(detect_cpu_features(), nullptr);
  if (widest >= Isa::kAvx2) test("avx2", cpu::isa_avx2::conversions);
  if (widest >= Isa::kAvx512) test("avx512", cpu::isa_avx512::conversions);
#endif
  if (failures == 0) std::puts("convert: all passed");
  return failures != 0;
}
