// lora_merge for Hopper and 16-bit dtypes: weight + sum_t s_t B_t A_t, summed in float32, always in the same order,
// rounded once.
//
// Floor: the weight passes twice, the factors once: 2.9 MB, 0.7 us, for 768 x 768 and ten adapters of 16 ranks. What it
// takes is one thing waiting for another: the launch, memory, the products, the way out; and instructions, which a
// block that runs through them once has to fetch as well. So a block has one tile, of 64 x 64 for each of its
// warpgroups, the copy engine brings all of it at once, and no thread computes an address. 16 ranks of an adapter are a
// slice. Adapters of a stage that have the same scale are one product, which the scale then multiplies, so that no
// factor is rounded.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/overlap.cuh"
#include "../device/pair.cuh"
#include "../device/sm90.cuh"
#include "../device/tensor_map.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kTile = 64, kGroups = 2, kThreads = kGroups * 128, kRanks = 16, kMaxSlices = 8, kMaxStages = 2;
constexpr uint32_t kBytesTile = kTile * 128,
                   kBytesSlice = kRanks * 128;  // of a group's A, or of B, in rows of 32 bytes

// A stage has so many adapters, and so many of each one's slices: all, or in `parts` stages a part of them.
struct Arguments {
  CUtensorMap weight, A, B, merged;
  const float *scaling, *times;
  int T, columns;  // of tiles
  int adapters, slices, parts;
  int steps, stages;  // in all, and in shared memory
};

// IN_FLIGHT: products on their way at a time; with two, there are registers for two blocks of a multiprocessor.
template <typename scalar, int IN_FLIGHT>
__global__ void __launch_bounds__(kThreads) merge_sm90_kernel(const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic[];  // the weight's tile, stages of B and A, barriers
  const uint32_t weight = sm90::smem_address(dynamic), memory = weight + kGroups * kBytesTile;
  const uint32_t factor = a.adapters * a.slices * kBytesSlice, bytes = (1 + kGroups) * factor;  // of a stage
  const uint32_t barriers = memory + a.stages * bytes, frozen = barriers + 8 * kMaxStages;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int row = static_cast<int>(blockIdx.x) / a.columns * kTile;
  const int column = static_cast<int>(blockIdx.x) % a.columns * (kGroups * kTile);

  const auto send = [&](int i) {
    const int t = i / a.parts * a.adapters, slice = i % a.parts * a.slices;
    const uint32_t full = barriers + 8 * (i % a.stages), to = memory + i % a.stages * bytes;
    sm90::barrier_arrive_expect(full, bytes);
    sm90::load_4d(&a.B, full, to, 0, row, slice, t);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) sm90::load_4d(&a.A, full, to + (1 + g) * factor, column + g * kTile, 0, slice, t);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) sm90::barrier_init(barriers + 8 * i, 1);
    sm90::barrier_init(frozen, 1);
    sm90::fence_barrier_init();
    wait_for_predecessor();
    for (int i = 0; i < a.stages; ++i) send(i);
    sm90::barrier_arrive_expect(frozen, kGroups * kBytesTile);
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
      sm90::load_2d(&a.weight, frozen, weight + g * kBytesTile, column + g * kTile, row, true);
  }
  __syncthreads();
  wait_for_predecessor();

  constexpr uint64_t kLayoutA = sm90::operand_layout(sm90::Swizzle::b128, 0, 1024);
  constexpr uint64_t kLayoutB = sm90::operand_layout(sm90::Swizzle::b32, 0, 256);
  float sum[kTile / 2] = {}, product[IN_FLIGHT][kTile / 2];
#pragma unroll 1
  for (int i = 0; i < a.steps; ++i) {
    const int t = i / a.parts * a.adapters, count = min(a.adapters, a.T - t);
    float scale = lane < count ? a.scaling[t + lane] : 0.f;
    if (a.times && lane < count) scale *= a.times[t + lane];
    const float next = __shfl_down_sync(~0u, scale, 1);
    uint32_t lasts = __ballot_sync(~0u, lane < count && (lane == count - 1 || scale != next));  // with one scale
    sm90::barrier_wait(barriers + 8 * (i % a.stages), i / a.stages % 2);
    const uint32_t at = memory + i % a.stages * bytes;
    const uint64_t A = sm90::operand(kLayoutA, at + (1 + group) * factor), B = sm90::operand(kLayoutB, at);
    int slice = 0;
    const auto start = [&](float (&to)[kTile / 2]) {  // the product of the next that have one scale, which comes back
      const int last = __ffs(lasts) - 1, end = (last + 1) * a.slices;
      sm90::hold(to);
      sm90::wgmma_fence();
#pragma unroll 1
      for (bool add = false; slice < end; ++slice, add = true)
        sm90::wgmma<kTile, scalar, 1>(to, B + slice * (kBytesSlice >> 4), A + slice * (kBytesSlice >> 4), add);
      sm90::wgmma_commit();
      sm90::hold(to);
      lasts &= lasts - 1;
      return __shfl_sync(~0u, scale, last);
    };
    const auto add = [&](float s, float (&from)[kTile / 2]) {
      sm90::hold(from);
#pragma unroll
      for (int n = 0; n < kTile / 2; ++n) sum[n] += s * from[n];
    };
    if constexpr (IN_FLIGHT == 2) {
#pragma unroll 1
      while ((lasts & (lasts - 1)) != 0) {
        const float first = start(product[0]), second = start(product[1]);
        sm90::wgmma_wait<1>();
        add(first, product[0]);
        sm90::wgmma_wait<0>();
        add(second, product[1]);
      }
    }
#pragma unroll 1
    while (lasts != 0) {
      const float s = start(product[0]);
      sm90::wgmma_wait<0>();
      add(s, product[0]);
    }
    if (i + a.stages < a.steps) {
      __syncthreads();
      if (threadIdx.x == 0) send(i + a.stages);
    }
  }

  sm90::barrier_wait(frozen, 0);
#pragma unroll
  for (int n = 0; n < kTile / 4; ++n) {
    const int m = 16 * warp + lane / 4 + n % 2 * 8;
    auto* const two =
        reinterpret_cast<uint32_t*>(dynamic + group * kBytesTile + m * 128 + (n / 2 ^ m % 8) * 16 + lane % 4 * 4);
    const float2 w = unpair<scalar>(*two);
    *two = pair<scalar>(w.x + sum[2 * n], w.y + sum[2 * n + 1]);
  }
  sm90::fence_async();
  __syncwarp();
  if (lane == 0) {
    sm90::store_2d(&a.merged, weight + group * kBytesTile + warp * 16 * 128, column + group * kTile, row + 16 * warp);
    sm90::store_commit();
    sm90::store_wait();
  }
#endif
}

}  // namespace

void merge_sm90(const LoraMerge& p, cudaStream_t stream) {
  PLORA_CHECK(p.T > 0 && merges_on_hopper(p.in, p.r, p.ranks != nullptr) && p.dtype != Dtype::float32 &&
                  aligned(p.weight, p.A, p.B, p.merged),
              "lora_merge: not what merge_sm90 takes");
  const int64_t slices = ceil_div(p.r, kRanks), ranks = std::min<int64_t>(p.r, kRanks);
  Arguments a{};
  a.scaling = static_cast<const float*>(p.scaling), a.times = static_cast<const float*>(p.times);
  a.T = narrow(p.T), a.columns = narrow(ceil_div(p.in, kGroups * kTile));
  a.parts = narrow(ceil_div(slices, kMaxSlices)), a.slices = narrow(ceil_div(slices, a.parts));
  a.adapters = narrow(ceil_div(p.T, ceil_div(p.T, kMaxSlices / a.slices)));
  a.steps = narrow(ceil_div(p.T, a.adapters) * a.parts);
  const int64_t blocks = ceil_div(p.out, kTile) * a.columns;
  // With one stage three blocks share a multiprocessor, so that fewer begin after the others.
  a.stages = std::min(a.steps, blocks > 2 * multiprocessors() ? 1 : kMaxStages);
  // Of eight ranks, and where a part has slices that the adapter has not, what lies outside is zero.
  describe_tensor<2>(a.weight, p.dtype, p.weight, {p.in, p.out}, {p.in}, {64, kTile}, k128);
  describe_tensor<2>(a.merged, p.dtype, p.merged, {p.in, p.out}, {p.in}, {64, kTile / 4}, k128);
  describe_tensor<4>(a.A, p.dtype, p.A, {p.in, ranks, slices, p.T}, {p.in, ranks * p.in, p.r * p.in},
                     {64, kRanks, a.slices, a.adapters}, k128);
  describe_tensor<4>(a.B, p.dtype, p.B, {ranks, p.out, slices, p.T}, {p.r, ranks, p.r * p.out},
                     {kRanks, kTile, a.slices, a.adapters}, k32);
  const size_t shared =
      kGroups * kBytesTile + (1 + kGroups) * a.stages * a.adapters * a.slices * kBytesSlice + 8 * (kMaxStages + 1);
  dispatch<2>("lora_merge", p.dtype, [&](auto tag) {
    using scalar = decltype(tag);
    const auto kernel = a.stages > 1 ? &merge_sm90_kernel<scalar, 2> : &merge_sm90_kernel<scalar, 1>;
    launch_overlapped("lora_merge", kernel, blocks, kThreads, shared, stream, true, a);
  });
}

}  // namespace plora::cuda
