// Products in the matrix registers; compiled for AMX alone, so nothing here may be shared with other files. Every
// element is summed in one fixed order, whatever tile its row falls into.

#include "../tiles.h"

#include <immintrin.h>

#include <cstring>

namespace plora::cpu::PLORA_ISA {
namespace {

// Instructions are spelled out: the compiler's own names for them do not say what memory they read.

// All eight registers are 16 rows of 64 bytes: with rows of x, 32 bfloat16; with packed pairs, 16 x 2; with sums, 16
// floats. What others of this thread configured (oneDNN does, and remembers it) comes back at the end.
class Registers {
 public:
  Registers() {
    asm volatile("sttilecfg %0" : "=m"(before_)::"memory");
    alignas(64) uint8_t ours[64] = {};
    ours[0] = 1;  // palette
    for (int i = 0; i < 8; ++i) ours[16 + 2 * i] = 64, ours[48 + i] = 16;
    asm volatile("ldtilecfg %0" ::"m"(ours) : "memory");
  }
  ~Registers() {
    asm volatile("ldtilecfg %0" ::"m"(before_) : "memory");  // all zeros, if there was none, releases the registers
  }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

template <int tile>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile) : "memory");
}
template <int sum, int left, int right>
inline void multiply() {  // sum += left right
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right) : "memory");
}

inline int64_t up_to(int64_t most, int64_t n) { return n < most ? n : most; }
inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

struct alignas(64) Left {  // a tile of rows
  uint16_t at[kTileRows][kTileDepth];
};
struct alignas(64) Sums {
  float at[kTileRows][kTileRows];
};

// Rows [n - 16, n), which may overlap the tile before, or [0, n) with zeros below.
inline int64_t tile_start(int64_t i, int64_t n) { return n >= kTileRows && i + kTileRows > n ? n - kTileRows : i; }

void product(int64_t n, int64_t N, int64_t K, const uint16_t* X, int64_t ldx, const uint16_t* right, float* C,
             int64_t ldc) {
  const Registers registers;
  const int64_t whole = K / kTileDepth, depth = (K + kTileDepth - 1) / kTileDepth;
  Left padded;
  Sums sums[2];
  for (int64_t i = 0; i < n; i += kTileRows) {
    const int64_t begin = tile_start(i, n), rows = up_to(kTileRows, n - begin);
    const uint16_t* x = X + begin * ldx;
    const auto left = [&](int64_t k) {
      if (rows == kTileRows && k < whole) return load<0>(x + k * kTileDepth, 2 * ldx);
      std::memset(&padded, 0, sizeof(padded));
      for (int64_t m = 0; m < rows; ++m)
        std::memcpy(padded.at[m], x + m * ldx + k * kTileDepth, 2 * up_to(kTileDepth, K - k * kTileDepth));
      load<0>(&padded, 64);
    };
    for (int64_t j = 0; j < N; j += 2 * kTileRows) {  // two tiles of columns at a time
      const bool two = j + kTileRows < N;
      const uint16_t* b = right + j / kTileRows * depth * kTileSize;
      zero<2>(), zero<3>();
      for (int64_t k = 0; k < depth; ++k) {
        left(k);
        load<1>(b + k * kTileSize, 64);
        multiply<2, 0, 1>();
        if (!two) continue;
        load<4>(b + (depth + k) * kTileSize, 64);
        multiply<3, 0, 4>();
      }
      store<2>(&sums[0], 64);
      if (two) store<3>(&sums[1], 64);
      for (int64_t t = 0; t <= two; ++t)
        for (int64_t m = i - begin; m < rows; ++m)
          _mm512_mask_storeu_ps(C + (begin + m) * ldc + j + t * kTileRows,
                                first16(up_to(kTileRows, N - j - t * kTileRows)), _mm512_load_ps(sums[t].at[m]));
    }
  }
}

// The loop over depth is product's; as one function for both this one was 4 % slower.
void add_product(int64_t n, int64_t N, int64_t K, const uint16_t* H, const uint16_t* right, const uint16_t* const* from,
                 uint16_t* const* to) {
  const Registers registers;
  const int64_t depth = (K + kTileDepth - 1) / kTileDepth, ldh = depth * kTileDepth;
  Left padded;
  Sums sums[2];
  for (int64_t i = 0; i < n; i += kTileRows) {
    const int64_t begin = tile_start(i, n), rows = up_to(kTileRows, n - begin);
    const auto left = [&](int64_t k) {
      if (rows == kTileRows) return load<0>(H + begin * ldh + k * kTileDepth, 2 * ldh);
      std::memset(&padded, 0, sizeof(padded));
      for (int64_t m = 0; m < rows; ++m)
        std::memcpy(padded.at[m], H + (begin + m) * ldh + k * kTileDepth, sizeof(padded.at[m]));
      load<0>(&padded, 64);
    };
    if (depth == 1) left(0);
    for (int64_t j = 0; j < N; j += 2 * kTileRows) {
      const bool two = j + kTileRows < N;
      const uint16_t* b = right + j / kTileRows * depth * kTileSize;
      zero<2>(), zero<3>();
      for (int64_t k = 0; k < depth; ++k) {
        if (depth > 1) left(k);
        load<1>(b + k * kTileSize, 64);
        multiply<2, 0, 1>();
        if (!two) continue;
        load<4>(b + (depth + k) * kTileSize, 64);
        multiply<3, 0, 4>();
      }
      store<2>(&sums[0], 64);
      store<3>(&sums[1], 64);
      const int64_t width = up_to(2 * kTileRows, N - j);
      const __mmask32 mask = width == 32 ? ~__mmask32{0} : (__mmask32{1} << width) - 1;
      for (int64_t m = i - begin; m < rows; ++m) {
        __m512 low = _mm512_load_ps(sums[0].at[m]);
        __m512 high = _mm512_load_ps(sums[1].at[m]);
        if (from) {
          const __m512i y = _mm512_maskz_loadu_epi16(mask, from[begin + m] + j);
          low = _mm512_add_ps(low, widen(_mm512_castsi512_si256(y)));
          high = _mm512_add_ps(high, widen(_mm512_extracti64x4_epi64(y, 1)));
        }
        const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
        _mm512_mask_storeu_epi16(to[begin + m] + j, mask, reinterpret_cast<const __m512i&>(rounded));
      }
    }
  }
}

void accumulate(int64_t n, int64_t R, int64_t N, const float* L, int64_t ldl, const uint16_t* X, int64_t ldx, float* S,
                bool fresh) {
  constexpr int64_t kDepth = 2;  // 64 rows
  const Registers registers;
  const int64_t depth = (n + kTileDepth - 1) / kTileDepth;
  Left left[kDepth] = {}, right[kDepth] = {};  // of ranks by rows; of pairs of rows by columns
  Sums sums;
  for (int64_t r = 0; r < R; r += kTileRows) {
    const int64_t ranks = up_to(kTileRows, R - r);
    for (int64_t m = 0; m < n; ++m) {
      alignas(32) uint16_t narrow[16];
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first16(ranks), L + m * ldl + r));
      _mm256_store_si256(reinterpret_cast<__m256i*>(narrow), reinterpret_cast<const __m256i&>(rounded));
      for (int64_t j = 0; j < kTileRows; ++j) left[m / kTileDepth].at[j][m % kTileDepth] = narrow[j];
    }
    load<0>(&left[0], 64), load<1>(&left[1], 64);
    for (int64_t j = 0; j < N; j += kTileRows) {
      const int64_t width = up_to(kTileRows, N - j);
      const __mmask16 mask = first16(width);
      for (int64_t m = 0; m < n; m += 2) {
        const uint16_t* x = X + m * ldx + j;
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
        const __m512i odd = m + 1 < n ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + ldx)) : __m512i{};
        _mm512_store_si512(right[m / kTileDepth].at[m % kTileDepth / 2],
                           _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
      const bool direct = ranks == kTileRows && width == kTileRows;
      float* s = S + r * N + j;
      if (fresh) {
        zero<2>();
      } else if (direct) {
        load<2>(s, 4 * N);
      } else {
        for (int64_t m = 0; m < ranks; ++m) _mm512_store_ps(sums.at[m], _mm512_maskz_loadu_ps(mask, s + m * N));
        for (int64_t m = ranks; m < kTileRows; ++m) _mm512_store_ps(sums.at[m], _mm512_setzero_ps());
        load<2>(&sums, 64);
      }
      load<3>(&right[0], 64);
      multiply<2, 0, 3>();
      if (depth > 1) {
        load<4>(&right[1], 64);
        multiply<2, 1, 4>();
      }
      if (direct) {
        store<2>(s, 4 * N);
        continue;
      }
      store<2>(&sums, 64);
      for (int64_t m = 0; m < ranks; ++m) _mm512_mask_storeu_ps(s + m * N, mask, _mm512_load_ps(sums.at[m]));
    }
  }
}

}  // namespace

const Tiles tiles = {product, add_product, accumulate};

}  // namespace plora::cpu::PLORA_ISA
