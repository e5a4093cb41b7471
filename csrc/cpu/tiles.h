// Products of bfloat16 rows in the processor's matrix registers (AMX), summed in float32. Where there are none,
// tiles() is null.
//
// The right-hand side [K, N] is packed in tiles [N / 16, K / 32] of [16 pairs of K, 16 of N, 2], padded with zeros.
// Elements are handed over as their bits.
#pragma once

#include <cstdint>

namespace plora::cpu {

struct Tiles {
  // C[n, N] = X[n, K] right
  void (*product)(int64_t n, int64_t N, int64_t K, const uint16_t* X, int64_t ldx, const uint16_t* right, float* C,
                  int64_t ldc);
  // to[i][0:N] = from[i][0:N] + H[n, K] right, in float32, rounded once. `from` has a pointer for each row, or is null
  // for zeros. The rows of H are padded with zeros to a multiple of 32.
  void (*add_product)(int64_t n, int64_t N, int64_t K, const uint16_t* H, const uint16_t* right,
                      const uint16_t* const* from, uint16_t* const* to);
  // S[R, N] += L[n, R]^T X[n, N], L rounded to bfloat16, n at most 64; `fresh` sums begin with this
  void (*accumulate)(int64_t n, int64_t R, int64_t N, const float* L, int64_t ldl, const uint16_t* X, int64_t ldx,
                     float* S, bool fresh);
};

const Tiles* tiles();

constexpr int64_t kTileRows = 16, kTileDepth = 32, kTileSize = kTileRows * kTileDepth;

inline int64_t tile_count(int64_t n, int64_t of) { return (n + of - 1) / of; }

#if defined(PLORA_AMX)
namespace isa_amx {
extern const Tiles tiles;
}
#endif

}  // namespace plora::cpu
