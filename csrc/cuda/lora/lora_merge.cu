// lora_merge on CUDA: weight + sum_t s_t B_t A_t, summed in float32 (float64 for float64), always in the same order,
// rounded once. A block owns a 64 x 64 tile of the weight. 16-bit dtypes multiply on the tensor cores, one adapter
// after the other; the others as one product over the concatenated ranks.

#include <algorithm>

#include "../device/launch.cuh"
#include "../device/mma_smem.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kTile = 64, kRanks = 16, kThreads = 256, kEach = 4;

// A thread has 4 x 4 of the tile.
template <typename scalar, typename acc>
__global__ void __launch_bounds__(kThreads)
    lora_merge_kernel(const scalar* __restrict__ weight, const scalar* __restrict__ A, const scalar* __restrict__ B,
                      const acc* __restrict__ scaling, const int64_t* __restrict__ ranks, scalar* __restrict__ merged,
                      int64_t out, int64_t in, int T, int r) {
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
      tile_B[i % kRanks][i / kRanks] = real ? scaling[t] * static_cast<acc>(B[(t * out + o) * r + j]) : acc(0);
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

// 16 ranks of an adapter: a slice. A stage of the pipeline holds two; in a slice, half of the threads copy a vector of
// B, the others one of A. A warp has 16 x 32 of the tile. The scale multiplies the finished product of an adapter, so
// that neither it nor a factor is rounded.
constexpr int kStages = 4, kSlices = 2, kLdB = kRanks + smem::kPad, kLdA = kTile + smem::kPad;

template <typename scalar>
struct Slice {
  scalar B[kTile * kLdB], A[kRanks * kLdA];
};

template <typename scalar>
__global__ void __launch_bounds__(kThreads)
    lora_merge_mma_kernel(const scalar* __restrict__ weight, const scalar* __restrict__ A, const scalar* __restrict__ B,
                          const float* __restrict__ scaling, const int64_t* __restrict__ ranks,
                          scalar* __restrict__ merged, int64_t out, int64_t in, int T, int r, bool fast) {
  using Step = smem::Step<scalar>;
  __shared__ __align__(16) Slice<scalar> stages[kStages][kSlices];
  const int64_t columns = (in + kTile - 1) / kTile;
  const int64_t row = blockIdx.x / columns * kTile, column = blockIdx.x % columns * kTile;
  const int per_adapter = (r + kRanks - 1) / kRanks, slices = T * per_adapter;

  // the vector that this thread copies: where it is in a slice, and which row of B or column of A it is of
  const bool of_B = threadIdx.x < kThreads / 2;
  const int mine = threadIdx.x % (kThreads / 2);
  const int j_mine = of_B ? mine % 2 * 8 : mine / 8;
  const int64_t at_mine = of_B ? row + mine / 2 : column + mine % 8 * 8;
  const int64_t room = of_B ? (at_mine < out ? r : 0) : std::max<int64_t>(in - at_mine, 0);
  const auto load = [&](int stage) {
    for (int s = 0; s < kSlices; ++s) {
      const int slice = stage * kSlices + s;
      if (slice >= slices) break;
      Slice<scalar>& to = stages[stage % kStages][s];
      scalar* const cell = of_B ? to.B + mine / 2 * kLdB + j_mine : to.A + j_mine * kLdA + mine % 8 * 8;
      const int t = slice / per_adapter, j = slice % per_adapter * kRanks + j_mine;
      const int rank = ranks ? static_cast<int>(std::min<int64_t>(ranks[t], r)) : r;
      const int64_t left = of_B ? std::min<int64_t>(rank, room) - j : j < rank ? room : 0;
      const int valid = static_cast<int>(std::clamp<int64_t>(left, 0, 8));
      const scalar* const from = valid == 0 ? A
                                 : of_B     ? B + (t * out + at_mine) * r + j
                                            : A + (static_cast<int64_t>(t) * r + j) * in + at_mine;
      if (fast) {
        smem::copy16(cell, from, valid * 2);
      } else {
        for (int i = 0; i < 8; ++i) cell[i] = i < valid ? from[i] : from_float<scalar>(0);
      }
    }
    smem::commit();
  };
  for (int i = 0; i < kStages - 1; ++i) load(i);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 32;
  const auto each = [&](const auto& f) {  // f(n, i, place in the weight), of this thread's elements
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t o = row + warp_row + lane / 4 + i / 2 * 8,
                      k = column + warp_column + n * 8 + lane % 4 * 2 + i % 2;
        if (o < out && k < in) f(n, i, o * in + k);
      }
  };
  scalar frozen[4][4];  // read early: it comes while the products run
  each([&](int n, int i, int64_t at) { frozen[n][i] = weight[at]; });

  float sum[4][4] = {}, product[4][4] = {};
  for (int stage = 0; stage * kSlices < slices; ++stage) {
    smem::wait<kStages - 2>();
    __syncthreads();
    load(stage + kStages - 1);
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const int slice = stage * kSlices + s;
      if (slice >= slices) break;
      const Slice<scalar>& from = stages[stage % kStages][s];
      typename Step::Left left;
      typename Step::Right right[2];
      left.load(from.B + warp_row * kLdB, kLdB);
      for (int n = 0; n < 2; ++n) right[n].load_transposed(from.A + warp_column + n * 16, kLdA);
      for (int n = 0; n < 4; ++n) Step::add(product[n], left, right[n / 2], n % 2);
      if ((slice + 1) % per_adapter > 0) continue;
      const float scale = scaling[slice / per_adapter];
      for (int n = 0; n < 4; ++n)
        for (int i = 0; i < 4; ++i) {
          sum[n][i] += scale * product[n][i];
          product[n][i] = 0;
        }
    }
  }
  each([&](int n, int i, int64_t at) { merged[at] = from_float<scalar>(to_float(frozen[n][i]) + sum[n][i]); });
}

}  // namespace

void lora_merge(const LoraMerge& p, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(ceil_div(p.out, kTile) * ceil_div(p.in, kTile));
  dispatch_with_float64(p.dtype, [&](auto tag) {
    using scalar = decltype(tag);
    const auto typed = [](const void* t) { return static_cast<const scalar*>(t); };
    const auto T = static_cast<int>(p.T), r = static_cast<int>(p.r);
    if constexpr (sizeof(scalar) == 2)
      lora_merge_mma_kernel<<<grid, kThreads, 0, stream>>>(
          typed(p.weight), typed(p.A), typed(p.B), static_cast<const float*>(p.scaling), p.ranks,
          static_cast<scalar*>(p.merged), p.out, p.in, T, r,
          p.in % 8 == 0 && p.r % 8 == 0 && aligned(p.A) && aligned(p.B));
    else
      lora_merge_kernel<<<grid, kThreads, 0, stream>>>(typed(p.weight), typed(p.A), typed(p.B),
                                                       static_cast<const acc_type<scalar>*>(p.scaling), p.ranks,
                                                       static_cast<scalar*>(p.merged), p.out, p.in, T, r);
  });
  check_launch("lora_merge");
}

}  // namespace plora::cuda
