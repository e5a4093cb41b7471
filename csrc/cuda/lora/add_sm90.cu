// The low-rank families added to a given y, for Hopper and 16-bit dtypes: y = y0 + s h up^T + s bias_up. The first half
// is low_rank_sm90.cu's, which leaves s h of the adapters that a tile of 128 rows met; here is the second, started
// while the first still runs.
//
// Floor: y passes once each way, 4 M N bytes, 9.2 us for [12608, 768] at 4.2 TB/s. So a block has one tile of 128 x 192
// of y, three blocks a multiprocessor: y comes to shared memory before s h is there, the sum is added where it lies,
// and it leaves from there, all by the copy engine. Two slots of ranks, what a tile of few segments meets, stay for the
// whole tile; more pass through a ring, once for each 64 columns.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/mma_smem.cuh"
#include "../device/overlap.cuh"
#include "../device/ring.cuh"
#include "../device/tensor_map.cuh"
#include "adapters.cuh"
#include "given.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kRows = lora_plan::kTileRows, kColumns = lora_plan::kTileColumns, kSlot = lora_plan::kSlot;
constexpr int kPart = 64, kParts = kColumns / kPart;  // columns that a warp has in registers
constexpr int kWarps = kRows / 16, kThreads = 32 * kWarps + 32, kBlocks = 3;
constexpr int kResident = 2, kStages = 4;  // slots that stay; of the ring

// Bytes. A part of y: [128, 64], swizzled. A slot: s h [128, 16] and, for each part, `up` [64, 16], or transposed.
constexpr uint32_t kBytesPart = kRows * kPart * 2, kSlotH = kRows * kSlot * 2, kSlotUp = kPart * kSlot * 2;
constexpr uint32_t kStage = kSlotH + kSlotUp;
constexpr uint32_t kBytesFactors = std::max(kResident * (kSlotH + kParts * kSlotUp), kStages* kStage);
static_assert(kParts <= kStages, "the parts' barriers are those of the ring");

struct Maps {
  CUtensorMap from, to, h, up;  // of y0, of y
};

struct Arguments {
  int M, N, T, r;
  const int64_t* ids;
  int rows_per_id;
  const float* scaling;
  const void* bias;
  bool reads, in_place;  // there is a y0; it is y
};

// What the feeding warp tells the others.
struct Tile {
  int slots;
  int16_t all[kRows];     // the adapters of its rows, ascending
  int16_t of_row[kRows];  // -1: none
};

// All shared memory: y, factors, barriers, Tile.
constexpr uint32_t kFactors = kParts * kBytesPart;
constexpr uint32_t kBarriers = kFactors + kBytesFactors, kTile = kBarriers + 8 * (kParts + 2 * kStages);
constexpr uint32_t kBytes = kTile + sizeof(Tile);
static_assert(kBlocks * (kBytes + 1024) <= 228 * 1024, "more shared memory than a multiprocessor has");

// Where things are in shared memory.
struct Memory {
  uint32_t first;
  __device__ uint32_t part(int part) const { return first + part * kBytesPart; }
  __device__ uint32_t y_full(int part) const { return first + kBarriers + 8 * part; }
  __device__ sm90::Ring ring() const { return {first + kFactors, first + kBarriers + 8 * kParts, kStage, kStages}; }
  // Of what stays: `up` follows the s h; a part's barrier is that of a stage.
  __device__ uint32_t h(int i) const { return first + kFactors + i * kSlotH; }
  __device__ uint32_t up(int part, int i) const { return h(kResident) + (part * kResident + i) * kSlotUp; }
};

// One warp: copies of s h and `up`.
template <bool kTransposed>
__device__ inline void feed(const Maps& maps, const Arguments& a, const Tile& tile, const Memory& memory, int slots,
                            int parts, int row, int column, bool chosen) {
  const int blocks = (a.r + kSlot - 1) / kSlot;
  const auto load_up = [&](uint32_t barrier, uint32_t to, int slot, int part) {
    const int place = slot / blocks, adapter = a.ids ? tile.all[place] : place;
    const int n = column + part * kPart, rank = slot % blocks * kSlot;
    sm90::load_3d(&maps.up, barrier, to, kTransposed ? n : rank, kTransposed ? rank : n, adapter, chosen);
  };
  const auto load_h = [&](uint32_t barrier, uint32_t to, int slot) {
    sm90::load_3d(&maps.h, barrier, to, slot % blocks * kSlot, slot / blocks, row, chosen);
  };
  sm90::Ring ring = memory.ring();
  if (slots <= kResident) {
    const uint32_t first = ring.full();
#pragma unroll 1
    for (int part = 0; part < parts; ++part, ring.next()) {
      sm90::barrier_arrive_expect(ring.full(), slots * (kSlotUp + (part == 0 ? kSlotH : 0)), chosen);
#pragma unroll 1
      for (int i = 0; i < slots; ++i) load_up(ring.full(), memory.up(part, i), i, part);
    }
    wait_for_predecessor();  // it makes s h
#pragma unroll 1
    for (int i = 0; i < slots; ++i) load_h(first, memory.h(i), i);
    return;
  }
#pragma unroll 1
  for (int part = 0; part < parts; ++part)
#pragma unroll 1
    for (int slot = 0; slot < slots; ++slot, ring.next()) {
      const uint32_t full = ring.fill(kStage, chosen);
      load_up(full, ring.at() + kSlotH, slot, part);
      wait_for_predecessor();
      load_h(full, ring.at(), slot);
    }
}

template <typename scalar, bool kTransposed>
struct Adder {
  const Arguments& a;
  const Tile& tile;
  const Memory& memory;
  const int warp, lane, slots;
  sm90::Ring ring = memory.ring();

  static constexpr uint64_t kLayoutUp =
      kTransposed ? sm90::operand_layout(sm90::Swizzle::b128, kSlotUp, 1024) : kLayoutGiven;

  __device__ void multiply_slot(float (&d)[kPart / 2], uint32_t h, uint32_t up) const {
    sm90::wgmma<kPart, scalar, kTransposed>(d, sm90::operand(kLayoutGiven, h + warp / 4 * (kSlotH / 2)),
                                            sm90::operand(kLayoutUp, up));
  }

  // d += s h up^T of this warpgroup's 64 rows.
  __device__ void multiply(float (&d)[kPart / 2], int part) {
    const auto finish = [&] {
      sm90::wgmma_commit();
      sm90::wgmma_wait<0>();
      sm90::hold(d);
    };
    if (slots == 0) return;
    if (slots <= kResident) {
      ring.wait(), ring.next();
      sm90::hold(d);
      sm90::wgmma_fence();
#pragma unroll 1
      for (int i = 0; i < slots; ++i) multiply_slot(d, memory.h(i), memory.up(part, i));
      return finish();
    }
#pragma unroll 1
    for (int slot = 0; slot < slots; ++slot, ring.next()) {
      ring.wait();
      sm90::hold(d);
      sm90::wgmma_fence();
      multiply_slot(d, ring.at(), ring.at() + kSlotH);
      finish();
      sm90::release(ring.empty());
    }
  }

  // The power of two in s (given.cuh) of a row of this warp.
  __device__ float power(int row) const {
    const int adapter = a.ids ? tile.of_row[16 * warp + row] : -1;
    return adapter < 0 ? 1.f : split<scalar>(__ldg(a.scaling + adapter)).power;
  }

  // s bias of columns n and n + 1 for the rows that chose `adapter`, or of all adapters.
  __device__ float2 bias(int adapter, int n) const {
    float2 sum{0.f, 0.f};
    if (n >= a.N) return sum;
    const int last = a.ids ? adapter + 1 : a.T;
#pragma unroll 1
    for (int t = a.ids ? max(adapter, 0) : 0; t < last; ++t) {
      const float2 b = two<scalar>(a.bias, static_cast<int64_t>(t) * a.N + n);
      const float s = __ldg(a.scaling + t);
      sum.x += s * b.x, sum.y += s * b.y;
    }
    return sum;
  }

  // y += d, in shared memory, for this warp's 16 rows. `above` and `below`: the powers of two in s (given.cuh).
  __device__ void add(float (&d)[kPart / 2], int part, int column, float above, float below) const {
    const uint32_t rows = memory.part(part) + (16 * warp + lane % 16) * (kPart * 2);
    if constexpr (std::is_same_v<scalar, __half>)
#pragma unroll
      for (int j = 0; j < kPart / 8; ++j)
        d[4 * j] *= above, d[4 * j + 1] *= above, d[4 * j + 2] *= below, d[4 * j + 3] *= below;
    if (a.bias) {
      const int first = a.ids ? tile.of_row[16 * warp + lane / 4] : 0;
      const int second = a.ids ? tile.of_row[16 * warp + lane / 4 + 8] : 0;
#pragma unroll
      for (int j = 0; j < kPart / 8; ++j) {
        const int n = column + part * kPart + 8 * j + lane % 4 * 2;
        const float2 b = bias(first, n), c = second == first ? b : bias(second, n);
        d[4 * j] += b.x, d[4 * j + 1] += b.y, d[4 * j + 2] += c.x, d[4 * j + 3] += c.y;
      }
    }
#pragma unroll
    for (int i = 0; i < kPart / 16; ++i) {
      const uint32_t at = rows + ((2 * i + lane / 16) ^ lane % 8) * 16;
      uint32_t v[4] = {0, 0, 0, 0};
      if (a.reads) smem::ldmatrix(v, at);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 y = unpair<scalar>(v[e]);
        v[e] = pair<scalar>(d[8 * i + 2 * e] + y.x, d[8 * i + 2 * e + 1] + y.y);
      }
      sm90::store_matrices(at, v[0], v[1], v[2], v[3]);
    }
  }

  __device__ void run(const Maps& maps, int parts, int row, int column, float above, float below) {
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      float d[kPart / 2];
#pragma unroll
      for (float& x : d) x = 0.f;
      multiply(d, part);
      if (a.reads) sm90::barrier_wait(memory.y_full(part), 0);
      add(d, part, column, above, below);
      sm90::fence_async();
      __syncwarp();
      if (lane == 0 && row + 16 * warp < a.M) {
        sm90::store_2d(&maps.to, memory.part(part) + 16 * warp * (kPart * 2), column + part * kPart, row + 16 * warp);
        sm90::store_commit();
      }
    }
    if (lane == 0) sm90::store_wait();
  }
};

template <typename scalar, bool kTransposed>
__global__ void __launch_bounds__(kThreads, kBlocks)
    add_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic[];
  Tile& tile = *reinterpret_cast<Tile*>(dynamic + kTile);
  const Memory memory{sm90::smem_address(dynamic)};
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  // the last rows first: the first half leaves them in L2
  const int column_tiles = (a.N + kColumns - 1) / kColumns;
  const int index = static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x);
  const int row = index / column_tiles * kRows, column = index % column_tiles * kColumns;
  const int parts = min(kParts, (a.N - column + kPart - 1) / kPart);

  const bool chosen = sm90::elect();
  if (warp == kWarps) {
    if (chosen) {
      for (int i = 0; i < kParts; ++i) sm90::barrier_init(memory.y_full(i), 1);
      memory.ring().init(kWarps);
      sm90::fence_barrier_init();
      sm90::fence_async();
    }
    for (int i = 0; a.reads && i < parts; ++i) {
      sm90::barrier_arrive_expect(memory.y_full(i), kBytesPart, chosen);
      sm90::load_2d(&maps.from, memory.y_full(i), memory.part(i), column + i * kPart, row, chosen);
    }
    if (chosen) sm90::prefetch_map(&maps.h), sm90::prefetch_map(&maps.up), sm90::prefetch_map(&maps.to);
    __syncwarp();
    int count = a.T;
    if (a.ids) {
      int adapter[kRows / 32];
#pragma unroll
      for (int i = 0; i < kRows / 32; ++i) {
        adapter[i] = adapter_of_row(a.ids, a.rows_per_id, a.M, a.T, row + lane + 32 * i);
        tile.of_row[lane + 32 * i] = static_cast<int16_t>(adapter[i]);
      }
      count = list_adapters(adapter, tile.all);
    }
    if (lane == 0) tile.slots = count * ((a.r + kSlot - 1) / kSlot);
  }
  __syncthreads();
  const int slots = __shfl_sync(0xffffffffu, tile.slots, 0);
  const bool unchanged = slots == 0 && a.in_place;

  if (warp == kWarps) {
    if (slots > 0) feed<kTransposed>(maps, a, tile, memory, slots, parts, row, column, chosen);
    for (int i = 0; unchanged && i < parts; ++i) sm90::barrier_wait(memory.y_full(i), 0);  // they come nevertheless
  } else if (!unchanged) {
    Adder<scalar, kTransposed> adder{a, tile, memory, warp, lane, slots};
    const float above = adder.power(lane / 4), below = adder.power(lane / 4 + 8);
    wait_for_predecessor();  // its x may be where y is
    adder.run(maps, parts, row, column, above, below);
  }
  wait_for_predecessor();  // what follows this kernel follows both
#endif
}

}  // namespace

void low_rank_add_sm90(const LowRank& p, cudaStream_t stream) {
  const int64_t M = p.rows.M, T = p.rows.T, r = p.rows.r, N = p.N;
  const int64_t tiles = ceil_div(M, kRows) * ceil_div(N, kColumns);
  const bool serves = p.y && p.scaled_h && !p.y_slab && !p.y0_slab && N > 0 && N % 8 == 0 && N < 1 << 25 &&
                      p.ldy % 8 == 0 && p.ldy0 % 8 == 0 && T > 0 && T <= INT16_MAX && p.places > 0 && M > 0 &&
                      tiles <= INT32_MAX && aligned(p.y, p.y0, p.up, p.bias_up);
  PLORA_CHECK(serves, "low_rank_add_sm90: not what it was planned for (adds_on_hopper)");
  low_rank_sm90(p, stream);

  const bool in_place = p.y0 == p.y && p.ldy0 == p.ldy;
  const Arguments a{narrow(M), narrow(N), narrow(T),       narrow(r), p.rows.ids, narrow(p.rows.rows_per_id),
                    p.scaling, p.bias_up, p.y0 != nullptr, in_place};
  Maps maps;
  describe_tensor<2>(maps.to, p.dtype, p.y, {N, M}, {p.ldy}, {kPart, 16}, k128);
  maps.from = maps.to;  // where there is no y0, never read
  if (p.y0) describe_tensor<2>(maps.from, p.dtype, p.y0, {N, M}, {p.ldy0}, {kPart, kRows}, k128);
  describe_tensor<3>(maps.h, p.dtype, p.scaled_h, {r, p.places, M}, {r, p.places * r}, {kSlot, 1, kRows}, k32);
  if (p.up_transposed)
    describe_tensor<3>(maps.up, p.dtype, p.up, {N, r, T}, {N, r * N}, {kPart, kSlot, 1}, k128);
  else
    describe_tensor<3>(maps.up, p.dtype, p.up, {r, N, T}, {r, N * r}, {kSlot, kPart, 1}, k32);
  dispatch<2>("low_rank", p.dtype, [&](auto like) {
    using scalar = decltype(like);
    const auto kernel = p.up_transposed ? &add_kernel<scalar, true> : &add_kernel<scalar, false>;
    launch_overlapped("low_rank", kernel, tiles, kThreads, kBytes, stream, true, maps, a);
  });
}

}  // namespace plora::cuda
