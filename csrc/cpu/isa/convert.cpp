// Between float32 and the 16-bit types, which are handed over as their bits; rounded to nearest, ties to even.

#include "../convert.h"

#include "vector.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace plora::cpu::PLORA_ISA {
namespace {

constexpr int kLanes = kBytes / 4;
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef uint16_t Short __attribute__((vector_size(kBytes / 2)));

// Calls f with kLanes elements at a time, the last ones by way of a buffer.
template <typename From, typename To, typename F>
void in_vectors(int64_t n, const From* from, To* to, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(from + i, to + i);
  if (i == n) return;
  From last[kLanes] = {};
  To result[kLanes];
  std::memcpy(last, from + i, (n - i) * sizeof(From));
  f(last, result);
  std::memcpy(to + i, result, (n - i) * sizeof(To));
}

void widen_bfloat16(int64_t n, const uint16_t* from, float* to) {
  in_vectors(n, from, to, [](const uint16_t* p, float* q) {
    Short s;
    std::memcpy(&s, p, sizeof(s));
    const Bits b = __builtin_convertvector(s, Bits) << 16;
    std::memcpy(q, &b, sizeof(b));
  });
}

void narrow_bfloat16(int64_t n, const float* from, uint16_t* to) {
  in_vectors(n, from, to, [](const float* p, uint16_t* q) {
    Bits b;
    std::memcpy(&b, p, sizeof(b));
    const Bits rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16, nan = (Bits)((b & 0x7fffffff) > 0x7f800000);
    const Short s = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Short);
    std::memcpy(q, &s, sizeof(s));
  });
}

#if defined(__AVX512F__)
void widen_float16(int64_t n, const uint16_t* from, float* to) {
  in_vectors(n, from, to, [](const uint16_t* p, float* q) {
    _mm512_storeu_ps(q, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  });
}

void narrow_float16(int64_t n, const float* from, uint16_t* to) {
  in_vectors(n, from, to, [](const float* p, uint16_t* q) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q),
                        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(p), _MM_FROUND_TO_NEAREST_INT));
  });
}
#elif defined(__AVX2__)
void widen_float16(int64_t n, const uint16_t* from, float* to) {
  in_vectors(n, from, to, [](const uint16_t* p, float* q) {
    _mm256_storeu_ps(q, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  });
}

void narrow_float16(int64_t n, const float* from, uint16_t* to) {
  in_vectors(n, from, to, [](const float* p, uint16_t* q) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm256_cvtps_ph(_mm256_loadu_ps(p), _MM_FROUND_TO_NEAREST_INT));
  });
}
#else  // by torch's own conversion
constexpr decltype(&widen_bfloat16) widen_float16 = nullptr;
constexpr decltype(&narrow_bfloat16) narrow_float16 = nullptr;
#endif

}  // namespace

const Conversions conversions = {widen_bfloat16, narrow_bfloat16, widen_float16, narrow_float16};

}  // namespace plora::cpu::PLORA_ISA
