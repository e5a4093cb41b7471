// The adapters of bfloat16 inputs as the matrix registers take them (tiles.h). The bias of the up projection is one
// more rank whose h is the constant 1, as in Factors, whose ranks these are.
#pragma once

#include <cstring>

#include "lora_rows.h"
#include "tiles.h"

namespace plora::cpu {

using torch::headeronly::BFloat16;

inline const uint16_t* bits(const BFloat16* p) { return reinterpret_cast<const uint16_t*>(p); }
inline uint16_t* bits(BFloat16* p) { return reinterpret_cast<uint16_t*>(p); }

// The right-hand sides of one adapter's products, or of several whose ranks are concatenated.
struct TiledAdapter {
  Scratch<uint16_t> AT, B, BT, A;  // of x A^T, dy B, h B^T, dh A
};

class TiledFactors {
 public:
  TiledFactors() = default;

  // Of every adapter; of a sum, only unit 0: all of them. So it is with A, too, of the family `all`, whose dx is one
  // sum. `orders` are those of kAT, kB, kBT and kA that are needed.
  TiledFactors(const Inputs& p, const Factors<float>& factors, int orders) : units_(p.family == Family::sum ? 1 : p.T) {
    torch::stable::parallel_for(0, static_cast<int64_t>(units_.size()), 1, [&](int64_t first, int64_t last) {
      std::vector<Vector> A, B;
      for (int64_t u = first; u < last; ++u) {
        A.clear(), B.clear();
        const bool sum = p.family == Family::sum, slabs = p.family == Family::all;
        const int64_t begin = sum ? 0 : factors.start[u], end = sum ? factors.rank() : factors.start[u + 1];
        for (int64_t i = begin; i < end; ++i) {
          const auto [t, j] = factors.rows[i];
          A.push_back(vector_of_A(p, t, j));
          B.push_back(j < 0 ? Vector{data<uint16_t>(*p.bias_B) + t * p.out, 1}
                            : Vector{data<uint16_t>(p.lora_B) + t * p.out * p.r + j, p.r});
        }
        TiledAdapter& to = units_[u];
        if (orders & kAT) to.AT = columns(A, p.in);
        if (orders & kB) to.B = columns(B, p.out);
        if (orders & kBT) to.BT = rows(B, p.out);
        if ((orders & kA) && !slabs) to.A = rows(A, p.in);
      }
    });
    if ((orders & kA) && p.family == Family::all && p.T > 0) {
      std::vector<Vector> all;
      for (const auto& [t, j] : factors.rows) all.push_back(vector_of_A(p, t, j));
      units_[0].A = rows(all, p.in);
    }
  }

  const TiledAdapter& operator[](int64_t unit) const { return units_[unit]; }

 private:
  std::vector<TiledAdapter> units_;

  struct Vector {  // of a rank; null: zeros
    const uint16_t* data;
    int64_t stride;
    uint32_t operator[](int64_t i) const { return data[i * stride]; }
  };

  static Vector vector_of_A(const Inputs& p, int64_t t, int64_t j) {
    return j < 0 ? Vector{nullptr, 0} : Vector{data<uint16_t>(p.lora_A) + (t * p.r + j) * p.in, 1};
  }

  // [length, ranks]: pairs along the length
  static Scratch<uint16_t> columns(const std::vector<Vector>& ranks, int64_t length) {
    const int64_t R = static_cast<int64_t>(ranks.size()), depth = tile_count(length, kTileDepth);
    Scratch<uint16_t> tiles = zeros(tile_count(R, kTileRows) * depth);
    for (int64_t i = 0; i < R; ++i) {
      const Vector v = ranks[i];
      if (!v.data) continue;
      uint16_t* to = tiles.data() + i / kTileRows * depth * kTileSize + i % kTileRows * 2;
      for (int64_t k = 0; k + 1 < length; k += 2) put(to + k / 2 * kTileDepth, v[k] | v[k + 1] << 16);
      if (length % 2) put(to + length / 2 * kTileDepth, v[length - 1]);
    }
    return tiles;
  }

  // [ranks, length]: pairs along the ranks
  static Scratch<uint16_t> rows(const std::vector<Vector>& ranks, int64_t length) {
    static constexpr uint16_t kZero = 0;
    const int64_t R = static_cast<int64_t>(ranks.size()), depth = tile_count(R, kTileDepth);
    Scratch<uint16_t> tiles = zeros(tile_count(length, kTileRows) * depth);
    const auto rank = [&](int64_t i) { return i < R && ranks[i].data ? ranks[i] : Vector{&kZero, 0}; };
    for (int64_t i = 0; i < R; i += 2) {
      const Vector even = rank(i), odd = rank(i + 1);
      uint16_t* to = tiles.data() + i / kTileDepth * kTileSize + i % kTileDepth * kTileRows;
      for (int64_t k = 0; k < length; ++k)
        put(to + k / kTileRows * depth * kTileSize + k % kTileRows * 2, even[k] | odd[k] << 16);
    }
    return tiles;
  }

  static Scratch<uint16_t> zeros(int64_t tiles) {
    Scratch<uint16_t> to(tiles * kTileSize);
    std::fill_n(to.data(), tiles * kTileSize, uint16_t{0});
    return to;
  }

  static void put(uint16_t* to, uint32_t pair) { std::memcpy(to, &pair, sizeof(pair)); }
};

// h[n, R], times scale where given, as the left-hand side of add_product
inline const uint16_t* left_tiles(int64_t n, int64_t R, const float* h, int64_t ld, const float* scale,
                                  Scratch<uint16_t>& buffer) {
  const int64_t padded = tile_count(R, kTileDepth) * kTileDepth;
  uint16_t* to = buffer.grown(n * padded);
  std::vector<float> scaled(R);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < R; ++j) scaled[j] = h[i * ld + j] * (scale ? scale[j] : 1.0f);
    conversions().narrow_bfloat16(R, scaled.data(), to + i * padded);
    std::fill_n(to + i * padded + R, padded - R, uint16_t{0});
  }
  return to;
}

// h[n, R] = act(x A^T + a), rows ld apart
inline void tiled_shrink(const Inputs& p, const Adapter<float>& a, const TiledAdapter& tiled, const Block<BFloat16>& x,
                         int64_t n, float* h, int64_t ld) {
  tiles()->product(n, a.R, p.in, bits(x.data), x.ld, tiled.AT.data(), h, ld);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < a.R; ++j) {
      float& value = h[i * ld + j];
      if (p.bias_A || p.bias_B) value += a.bias[j];
      if (p.relu) value = value < 0 ? 0.0f : value;
    }
}

}  // namespace plora::cpu
