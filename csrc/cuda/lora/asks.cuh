// The adapters that ask for gradients, as kernels of gradients are told.
#pragma once

#include <cstdint>
#include <vector>

#include "../../common/check.h"

namespace plora::cuda {

struct Asks {
  static constexpr int kMask = 8192;  // adapters, where some are frozen

  int count;
  bool all;
  uint32_t bits[kMask / 32];

  __device__ bool has(int t) const { return all || (bits[t / 32] >> t % 32 & 1); }
  // Their number among those that ask, and back.
  __device__ int place(int t) const {
    if (all) return t;
    int before = __popc(bits[t / 32] & ((1u << t % 32) - 1));
    for (int w = 0; w < t / 32; ++w) before += __popc(bits[w]);
    return before;
  }
  __device__ int adapter(int place) const {
    if (all) return place;
    int w = 0;
    for (; place >= __popc(bits[w]); ++w) place -= __popc(bits[w]);
    uint32_t word = bits[w];
    for (; place > 0; --place) word &= word - 1;
    return w * 32 + __ffs(static_cast<int>(word)) - 1;
  }
};

// Of the adapters [0, T).
inline Asks asks_of(const char* op, const std::vector<int64_t>& adapters, int64_t T) {
  Asks asks{};
  asks.count = static_cast<int>(adapters.size());
  asks.all = asks.count == T;
  PLORA_CHECK(asks.all || T <= Asks::kMask, op, ": at most ", Asks::kMask, " adapters where some are frozen, got ", T);
  if (!asks.all)
    for (int64_t t : adapters) asks.bits[t / 32] |= 1u << t % 32;
  return asks;
}

}  // namespace plora::cuda
