// What the kernels of few rows share: chunks of ranks, and h, or backward g, from the sums that the first half leaves
// (few_rows.cu).
#pragma once

#include <cstdint>

#include "../device/mma.cuh"
#include "kernels.h"

namespace plora::cuda {

constexpr int kChunk = 16;  // ranks, of an adapter; the last chunk is filled up with zeros

// How many ranks of an adapter count: from there on its factors are not read.
__device__ inline int limit_of(const LowRank& p, int t) {
  return static_cast<int>(p.ranks ? min(max(p.ranks[t], int64_t{0}), p.rows.r) : p.rows.r);
}

// Ranks c to c + 3 of row m, whose first adapter is `adapter` (negative: none, then 0); scaled where the row meets
// several. `kept`, where it is not null, gets them unscaled.
template <typename scalar>
__device__ inline Four<scalar> finish_ranks(const LowRank& p, const FewSums& sums, int64_t m, int adapter, int c,
                                            scalar* kept) {
  const int per = sums.chunks * kChunk, place = sums.adapters > 1 ? c / per : 0, first = c - place * per;
  const int t = adapter + place;
  const int64_t own = (m * sums.adapters + place) * sums.columns + first;
  const int limit = adapter >= 0 ? limit_of(p, t) : 0;
  float sum[4] = {};
  if (first < limit) {
    constexpr int kAtOnce = 8;  // on their way
    const float* const from = sums.partial + m * sums.width + c;
#pragma unroll 1
    for (int part = 0; part < sums.parts; part += kAtOnce) {
      float4 some[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        some[k] = part + k < sums.parts
                      ? __ldcg(reinterpret_cast<const float4*>(from + (part + k) * p.rows.M * sums.width))
                      : float4{};
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        sum[0] += some[k].x, sum[1] += some[k].y, sum[2] += some[k].z, sum[3] += some[k].w;
    }
  }
  Four<scalar> h;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int rank = first + e;
    if (rank >= limit) sum[e] = 0;
    if (rank < limit && p.bias_down) sum[e] += to_float(static_cast<const scalar*>(p.bias_down)[t * p.rows.r + rank]);
    if (p.relu && sum[e] < 0) sum[e] = 0;
    if (rank < limit && p.gate && to_float(static_cast<const scalar*>(p.gate)[own + e]) <= 0) sum[e] = 0;
    if (kept && rank < sums.columns) kept[own + e] = from_float<scalar>(sum[e]);
    h[e] = from_float<scalar>(sums.adapters > 1 ? p.scaling[t] * sum[e] : sum[e]);
  }
  return h;
}

}  // namespace plora::cuda
