// lora_merge on CUDA: weight + sum_t s_t B_t A_t, summed in float32 (float64 for float64), always in the same order,
// rounded once. A block owns a 64 x 64 tile of the weight. 16-bit dtypes multiply on the tensor cores, one adapter
// after the other, on Hopper in merge_sm90.cu; the others as one product over the concatenated ranks.

#include <algorithm>

#include "../../common/cuda_path.h"
#include "../../common/lora_plan.h"
#include "../device/launch.cuh"
#include "../device/mma_smem.cuh"
#include "../device/pair.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kTile = 64, kRanks = 16, kThreads = 256, kEach = 4;

template <typename acc>
__device__ acc scale_of(const acc* scaling, const acc* times, int t) {
  return times ? scaling[t] * times[t] : scaling[t];
}

// A thread has 4 x 4 of the tile.
template <typename scalar, typename acc>
__global__ void __launch_bounds__(kThreads)
    lora_merge_kernel(const scalar* __restrict__ weight, const scalar* __restrict__ A, const scalar* __restrict__ B,
                      const acc* __restrict__ scaling, const acc* __restrict__ times, const int64_t* __restrict__ ranks,
                      scalar* __restrict__ merged, int64_t out, int64_t in, int T, int r) {
  __shared__ acc tile_B[kRanks][kTile + 1], tile_A[kRanks][kTile];
  const int64_t columns = (in + kTile - 1) / kTile;
  const int64_t row = blockIdx.x / columns * kTile, column = blockIdx.x % columns * kTile;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  acc sum[kEach][kEach];
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int64_t o = row + ty + 16 * i, k = column + tx + 16 * j;
      sum[i][j] = o < out && k < in ? static_cast<acc>(weight[o * in + k]) : acc(0);
    }
  for (int first = 0; first < T * r; first += kRanks) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRanks * kTile; i += kThreads) {  // B: neighbouring threads read neighbouring ranks
      const int rank = first + i % kRanks, t = rank / r, j = rank % r;
      const int64_t o = row + i / kRanks;
      const bool real = rank < T * r && o < out && (!ranks || j < ranks[t]);
      tile_B[i % kRanks][i / kRanks] =
          real ? scale_of(scaling, times, t) * static_cast<acc>(B[(t * out + o) * r + j]) : acc(0);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < kRanks * kTile; i += kThreads) {
      const int rank = first + i / kTile, t = rank / r, j = rank % r;
      const int64_t k = column + i % kTile;
      const bool real = rank < T * r && k < in && (!ranks || j < ranks[t]);
      tile_A[i / kTile][i % kTile] = real ? static_cast<acc>(A[rank * in + k]) : acc(0);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kRanks; ++n) {
      acc b[kEach], a[kEach];
      for (int i = 0; i < kEach; ++i) b[i] = tile_B[n][ty + 16 * i];
      for (int j = 0; j < kEach; ++j) a[j] = tile_A[n][tx + 16 * j];
      for (int i = 0; i < kEach; ++i)
        for (int j = 0; j < kEach; ++j) sum[i][j] += b[i] * a[j];
    }
    __syncthreads();
  }
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int64_t o = row + ty + 16 * i, k = column + tx + 16 * j;
      if (o < out && k < in) merged[o * in + k] = static_cast<scalar>(sum[i][j]);
    }
}

// 16 ranks of an adapter are a slice, of which half of the threads copy a vector of B, the others one of A. A stage
// holds six, as with few ranks the time is that of one load after another. Loops stay loops: what a block runs through
// once had better be short. The scale multiplies an adapter's finished product, so that no factor is rounded.
constexpr int kStages = 3, kSlices = 6, kLdB = kRanks + smem::kPad, kLdA = kTile + smem::kPad;

template <typename scalar>
struct Slice {
  scalar B[kTile * kLdB], A[kRanks * kLdA];
};
static_assert(kStages * kSlices * sizeof(Slice<__half>) <= 101376, "what a block has on GPUs of the smaller kind");

template <typename scalar>
__global__ void __launch_bounds__(kThreads)
    lora_merge_mma_kernel(const scalar* __restrict__ weight, const scalar* __restrict__ A, const scalar* __restrict__ B,
                          const float* __restrict__ scaling, const float* __restrict__ times,
                          const int64_t* __restrict__ ranks, scalar* __restrict__ merged, int64_t out, int64_t in,
                          int T, int r, bool fast) {
  using Step = smem::Step<scalar>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const stages = reinterpret_cast<Slice<scalar>(*)[kSlices]>(memory);
  const auto columns = static_cast<unsigned>((in + kTile - 1) / kTile);
  const int64_t row = static_cast<int64_t>(blockIdx.x / columns) * kTile;
  const int64_t column = static_cast<int64_t>(blockIdx.x % columns) * kTile;
  const int per_adapter = (r + kRanks - 1) / kRanks, slices = T * per_adapter;

  // the vector that this thread copies: its place in a slice, its row of B or column of A
  const bool of_B = threadIdx.x < kThreads / 2;
  const int mine = threadIdx.x % (kThreads / 2);
  const int j_mine = of_B ? mine % 2 * 8 : mine / 8;
  const int64_t at_mine = of_B ? row + mine / 2 : column + mine % 8 * 8;
  // its ranks of the next slice: adapter t, from `first` on
  int t = 0, first = 0;
  const int room = static_cast<int>(std::clamp<int64_t>((of_B ? out : in) - at_mine, 0, 8));
  const int64_t adapter = r * (of_B ? out : in), step = of_B ? 1 : in;
  const scalar* from = of_B ? B + at_mine * r + j_mine : A + j_mine * in + at_mine;
  const auto load = [&](int stage) {
#pragma unroll 1
    for (int s = 0; s < kSlices; ++s) {
      if (t >= T) break;
      Slice<scalar>& to = stages[stage % kStages][s];
      scalar* const cell = of_B ? to.B + mine / 2 * kLdB + j_mine : to.A + j_mine * kLdA + mine % 8 * 8;
      const int left = (ranks ? static_cast<int>(std::clamp<int64_t>(ranks[t], 0, r)) : r) - first - j_mine;
      const int valid = of_B ? (room > 0 ? std::clamp(left, 0, 8) : 0) : left > 0 ? room : 0;
      const scalar* const some = valid > 0 ? from + first * step : A;
      if (fast) {
        smem::copy16(cell, some, valid * 2);
      } else {
#pragma unroll 1
        for (int i = 0; i < 8; ++i) cell[i] = i < valid ? some[i] : from_float<scalar>(0);
      }
      first += kRanks;
      if (first >= r) first = 0, ++t, from += adapter;
    }
    smem::commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) load(i);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 32;
  const auto each = [&](const auto& f) {  // f(n, i, place in the weight, elements), of this thread's pairs
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int64_t o = row + warp_row + lane / 4 + i / 2 * 8, k = column + warp_column + n * 8 + lane % 4 * 2;
        if (o < out && k < in) f(n, i, o * in + k, k + 1 < in ? 2 : 1);
      }
  };
  // of the weight; read early: it comes while the products run
  uint32_t frozen[4][2];
  each([&](int n, int i, int64_t at, int count) {
    if (fast)
      frozen[n][i / 2] = *reinterpret_cast<const uint32_t*>(weight + at);
    else
      frozen[n][i / 2] = pair<scalar>(to_float(weight[at]), count > 1 ? to_float(weight[at + 1]) : 0.f);
  });

  float sum[4][4] = {}, product[4][4] = {};
  for (int stage = 0; stage * kSlices < slices; ++stage) {
    smem::wait<kStages - 2>();
    __syncthreads();
    load(stage + kStages - 1);
#pragma unroll 1
    for (int s = 0; s < kSlices; ++s) {
      const int slice = stage * kSlices + s;
      if (slice >= slices) break;
      const Slice<scalar>& from = stages[stage % kStages][s];
      const float scale = scale_of(scaling, times, slice / per_adapter);
      typename Step::Left left;
      typename Step::Right right[2];
      left.load(from.B + warp_row * kLdB, kLdB);
      for (int n = 0; n < 2; ++n) right[n].load_transposed(from.A + warp_column + n * 16, kLdA);
      for (int n = 0; n < 4; ++n) Step::add(product[n], left, right[n / 2], n % 2);
      if ((slice + 1) % per_adapter > 0) continue;
      for (int n = 0; n < 4; ++n)
        for (int i = 0; i < 4; ++i) {
          sum[n][i] += scale * product[n][i];
          product[n][i] = 0;
        }
    }
  }
  each([&](int n, int i, int64_t at, int count) {
    const float2 w = unpair<scalar>(frozen[n][i / 2]);
    const uint32_t v = pair<scalar>(w.x + sum[n][i], w.y + sum[n][i + 1]);
    if (fast) {
      *reinterpret_cast<uint32_t*>(merged + at) = v;
    } else {
      const float2 rounded = unpair<scalar>(v);
      merged[at] = from_float<scalar>(rounded.x);
      if (count > 1) merged[at + 1] = from_float<scalar>(rounded.y);
    }
  });
}

}  // namespace

void lora_merge(const LoraMerge& p, cudaStream_t stream) {
  const int64_t grid = ceil_div(p.out, kTile) * ceil_div(p.in, kTile);
  dispatch<8>("lora_merge", p.dtype, [&](auto tag) {
    using scalar = decltype(tag);
    const auto typed = [](const void* t) { return static_cast<const scalar*>(t); };
    const auto T = narrow(p.r ? p.T : 0), r = narrow(p.r);
    if constexpr (sizeof(scalar) == 2) {
      const bool vectors = p.in % 8 == 0 && p.r % 8 == 0 && aligned(p.A, p.B, p.weight, p.merged);
#ifndef PLORA_NO_SM90
      if (vectors && T > 0 && merges_on_hopper(p.in, p.r, p.ranks != nullptr) && on_hopper() && !mma_only())
        return merge_sm90(p, stream);
#endif
      const int64_t slices = T * ceil_div(r, kRanks), stages = std::min<int64_t>(ceil_div(slices, kSlices), kStages);
      const size_t shared = stages * kSlices * sizeof(Slice<scalar>);
      launch_kernel("lora_merge", &lora_merge_mma_kernel<scalar>, grid, kThreads, shared, stream, typed(p.weight),
                    typed(p.A), typed(p.B), static_cast<const float*>(p.scaling), static_cast<const float*>(p.times),
                    p.ranks, static_cast<scalar*>(p.merged), p.out, p.in, T, r, vectors);
    } else {
      using acc = acc_type<scalar>;
      launch_kernel("lora_merge", &lora_merge_kernel<scalar, acc>, grid, kThreads, 0, stream, typed(p.weight),
                    typed(p.A), typed(p.B), static_cast<const acc*>(p.scaling), static_cast<const acc*>(p.times),
                    p.ranks, static_cast<scalar*>(p.merged), p.out, p.in, T, r);
    }
  });
}

}  // namespace plora::cuda
