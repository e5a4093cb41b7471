// The outputs of all adapters and their frozen layer in one product, for Hopper and 16-bit dtypes:
// y_t = x W^T + bias + y0 + s_t (h_t up_t^T + bias_up_t), from h (low_rank_sm90.cu, or torch's own product).
//
// Floor: y is written, 2 T M N bytes, 45 us for ten of [12608, 768] at 4.3 TB/s. A persistent block makes tiles of
// 128 x 192, half of the rows a warpgroup, where the frozen tile stays in the registers while the adapters pass:
// h_t up_t^T comes to accumulators of its own, so that no adapter's infinity or NaN reaches another's output. A third
// warpgroup feeds both from two rings: x and W, which fills again while the tile is written, and slots of h_t and up_t.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/overlap.cuh"
#include "../device/ring.cuh"
#include "../device/tensor_map.cuh"
#include "given.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kRows = lora_plan::kTileRows, kColumns = lora_plan::kTileColumns, kSlot = lora_plan::kSlot;
constexpr int kDepth = 64, kPart = 64;             // columns of y that leave at a time
constexpr int kStages = 4, kSlots = 3, kOuts = 2;  // of the rings; ways out of a warp, in turn
constexpr int kWarps = kRows / 16, kThreads = 32 * kWarps + 128;

// Bytes. A stage: x [128, 64] and W [192, 64], each row 128 bytes, swizzled; likewise a warp's way out, [16, 64] of y.
// A slot: h [128, 16] and up [192, 16].
constexpr uint32_t kBytesX = kRows * kDepth * 2, kStage = kBytesX + kColumns * kDepth * 2;
constexpr uint32_t kSlotH = kRows * kSlot * 2, kBytesSlot = kSlotH + kColumns * kSlot * 2;
constexpr uint32_t kOut = 16 * kPart * 2;
constexpr uint64_t kLayout = sm90::operand_layout(sm90::Swizzle::b128, 16, 1024);

// All shared memory: stages, slots, ways out, barriers.
constexpr uint32_t kFirstSlot = kStages * kStage, kFirstOut = kFirstSlot + kSlots * kBytesSlot,
                   kBarriers = kFirstOut + kWarps * kOuts * kOut, kBytes = kBarriers + 16 * (kStages + kSlots);
static_assert(kFirstOut % 1024 == 0 && kBytes <= 232448, "more shared memory than a block can have");

struct Maps {
  CUtensorMap x, weight, h, up, y;
};

struct Arguments {
  int M, N, K, T, r;
  const float* scaling;
  const void *bias, *bias_up, *y0;
  int64_t ldy0;
};

// f(row, column) of each tile of this block; tiles beside each other are made at once.
template <typename F>
__device__ void for_tiles(const Arguments& a, const F& f) {
  const int columns = (a.N + kColumns - 1) / kColumns, tiles = (a.M + kRows - 1) / kRows * columns;
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x); i < tiles; i += static_cast<int>(gridDim.x))
    f(i / columns * kRows, i % columns * kColumns);
}

// --- feeding, by a warp each -----------------------------------------------------------------------------------------

__device__ void feed_stages(const Maps& maps, const Arguments& a, sm90::Ring ring) {
  const bool chosen = sm90::elect();
  for_tiles(a, [&](int row, int column) {
#pragma unroll 1
    for (int k = 0; k < a.K; k += kDepth, ring.next()) {
      const uint32_t full = ring.fill(kStage, chosen);
      sm90::load_2d(&maps.x, full, ring.at(), k, row, chosen);
      sm90::load_2d(&maps.weight, full, ring.at() + kBytesX, k, column, chosen);
    }
  });
}

__device__ void feed_slots(const Maps& maps, const Arguments& a, sm90::Ring ring) {
  const bool chosen = sm90::elect();
  wait_for_predecessor();  // it makes h; and what follows this kernel follows both
  for_tiles(a, [&](int row, int column) {
#pragma unroll 1
    for (int t = 0; t < a.T; ++t)
#pragma unroll 1
      for (int rank = 0; rank < a.r; rank += kSlot, ring.next()) {
        const uint32_t full = ring.fill(kBytesSlot, chosen);
        sm90::load_3d(&maps.h, full, ring.at(), rank, t, row, chosen);
        sm90::load_3d(&maps.up, full, ring.at() + kSlotH, rank, column, t, chosen);
      }
  });
}

// --- multiplying and writing ----------------------------------------------------------------------------------------

using Sums = float[96];  // of 64 x 192

template <typename scalar>
struct Multiplier {
  const Maps& maps;
  const Arguments& a;
  const uint32_t memory;
  const int warp, lane;  // of 8
  sm90::Ring stages, slots;
  uint32_t way = 0;  // out

  // What the frozen product is added to: bias + y0.
  __device__ void start(Sums& d, int row, int column) const {
    const int m = row + 16 * warp + lane / 4;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const int n = column + 8 * j + lane % 4 * 2;
      const float2 bias = a.bias && n < a.N ? two<scalar>(a.bias, n) : float2{};
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        float2 y0{};
        if (a.y0 && n < a.N && m + 8 * below < a.M) y0 = two<scalar>(a.y0, (m + 8 * below) * a.ldy0 + n);
        d[4 * j + 2 * below] = bias.x + y0.x, d[4 * j + 2 * below + 1] = bias.y + y0.y;
      }
    }
  }

  // d += x W^T.
  __device__ void multiply_frozen(Sums& d) {
    sm90::multiply(d, stages, (a.K + kDepth - 1) / kDepth, [&](uint32_t at) {
      const uint64_t x = sm90::operand(kLayout, at + warp / 4 * (kBytesX / 2));
      const uint64_t w = sm90::operand(kLayout, at + kBytesX);
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i) sm90::wgmma<kColumns, scalar, 0>(d, x + 2 * i, w + 2 * i);
    });
  }

  // d = h_t up_t^T + bias_up_t.
  __device__ void multiply_adapter(Sums& d, int t, int column) {
    bool add = a.bias_up != nullptr;
    if (add) {
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const int n = column + 8 * j + lane % 4 * 2;
        const float2 bias = n < a.N ? two<scalar>(a.bias_up, static_cast<int64_t>(t) * a.N + n) : float2{};
        d[4 * j] = d[4 * j + 2] = bias.x, d[4 * j + 1] = d[4 * j + 3] = bias.y;
      }
    }
#pragma unroll 1
    for (int rank = 0; rank < a.r; rank += kSlot, slots.next(), add = true) {
      slots.wait();
      sm90::hold(d);
      sm90::wgmma_fence();
      sm90::wgmma<kColumns, scalar, 0>(d, sm90::operand(kLayoutGiven, slots.at() + warp / 4 * (kSlotH / 2)),
                                       sm90::operand(kLayoutGiven, slots.at() + kSlotH), add);
      sm90::wgmma_commit();
      sm90::wgmma_wait<0>();
      sm90::hold(d);
      sm90::release(slots.empty());
    }
  }

  // y_t = frozen + s d of this warp's 16 rows.
  __device__ void write(const Sums& frozen, const Sums& d, float s, int t, int row, int column) {
    const bool leader = lane == 0 && row + 16 * warp < a.M;
#pragma unroll
    for (int part = 0; part < kColumns / kPart; ++part) {
      const uint32_t out = memory + kFirstOut + warp * kOuts * kOut + way;
      if (leader) sm90::store_wait<kOuts - 1>();
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPart / 16; ++i) {
        uint32_t v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int from = part * (kPart / 2) + 8 * i + 2 * e;
          v[e] = pair<scalar>(fmaf(s, d[from], frozen[from]), fmaf(s, d[from + 1], frozen[from + 1]));
        }
        sm90::store_matrices(out + lane % 16 * (kPart * 2) + ((2 * i + lane / 16) ^ lane % 8) * 16, v[0], v[1], v[2],
                             v[3]);
      }
      sm90::fence_async();
      __syncwarp();
      if (leader) {
        if (column + part * kPart < a.N) sm90::store_3d_once(&maps.y, out, column + part * kPart, row + 16 * warp, t);
        sm90::store_commit();
      }
      way ^= kOut;
    }
  }

  __device__ void run() {
    for_tiles(a, [&](int row, int column) {
      Sums frozen;
      start(frozen, row, column);
      multiply_frozen(frozen);
      Sums d{};
      float s = __ldg(a.scaling);
#pragma unroll 1
      for (int t = 0; t < a.T; ++t) {
        const float next = __ldg(a.scaling + min(t + 1, a.T - 1));
        multiply_adapter(d, t, column);
        write(frozen, d, s, t, row, column);
        s = next;
      }
    });
    if (lane == 0) sm90::store_wait();
  }
};

template <typename scalar>
__global__ void __launch_bounds__(kThreads, 1)
    all_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const uint32_t memory = sm90::smem_address(dynamic);
  const sm90::Ring stages{memory, memory + kBarriers, kStage, kStages};
  const sm90::Ring slots{memory + kFirstSlot, memory + kBarriers + 16 * kStages, kBytesSlot, kSlots};
  if (threadIdx.x == 0) {
    stages.init(kWarps), slots.init(kWarps);
    sm90::fence_barrier_init();
    for (const CUtensorMap* map : {&maps.x, &maps.weight, &maps.h, &maps.up, &maps.y}) sm90::prefetch_map(map);
  }
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  if (warp >= kWarps) {
    sm90::shrink_registers<40>();
    if (warp == kWarps) feed_stages(maps, a, stages);
    if (warp == kWarps + 1) feed_slots(maps, a, slots);
  } else {
    sm90::grow_registers<232>();
    Multiplier<scalar>{maps, a, memory, warp, lane, stages, slots}.run();
  }
#endif
}

}  // namespace

void all_sm90(const LowRank& p, const void* weight, const void* bias, bool overlap, cudaStream_t stream) {
  const int64_t M = p.rows.M, T = p.rows.T, r = p.rows.r, N = p.N, tiles = ceil_div(M, kRows) * ceil_div(N, kColumns);
  if (M == 0 || N == 0 || T == 0) return;
  const bool serves = !p.rows.ids && p.x && p.h && p.dtype != Dtype::float32 && tiles <= INT32_MAX / 2 && p.K > 0 &&
                      p.K % 8 == 0 && N % 8 == 0 && r > 0 && r % 8 == 0 && p.ldx % 8 == 0 && p.ldy % 8 == 0 &&
                      p.ldy0 % 8 == 0 && p.y_slab % 8 == 0 && p.y0_slab == 0 &&
                      aligned(p.x, weight, bias, p.up, p.bias_up, p.y0, p.h, p.y);
  PLORA_CHECK(serves, "all_sm90: not what it was planned for (all_on_hopper)");

  const Arguments a{narrow(M), narrow(N), narrow(p.K), narrow(T), narrow(r), p.scaling, bias, p.bias_up, p.y0, p.ldy0};
  Maps maps;
  describe_tensor<2>(maps.x, p.dtype, p.x, {p.K, M}, {p.ldx}, {kDepth, kRows}, k128);
  describe_tensor<2>(maps.weight, p.dtype, weight, {p.K, N}, {p.K}, {kDepth, kColumns}, k128);
  describe_tensor<3>(maps.h, p.dtype, p.h, {r, T, M}, {r, T * r}, {kSlot, 1, kRows}, k32);
  describe_tensor<3>(maps.up, p.dtype, p.up, {r, N, T}, {r, N * r}, {kSlot, kColumns, 1}, k32);
  describe_tensor<3>(maps.y, p.dtype, p.y, {N, M, T}, {p.ldy, p.y_slab}, {kPart, 16, 1}, k128);
  dispatch<2>("all", p.dtype, [&](auto like) {
    using scalar = decltype(like);
    launch_overlapped("all", &all_kernel<scalar>, std::min<int64_t>(tiles, multiprocessors()), kThreads, kBytes, stream,
                      overlap, maps, a);
  });
}

}  // namespace plora::cuda
