// The frozen layer and its adapters in one product, for Hopper: y = x W^T + bias + y0 + s h B^T, and transposed for the
// gradient, dx = dy W + s g A.
//
// A persistent block makes tiles of 128 x 192. Tiles of a last wave that would leave two thirds of the blocks idle are
// made by three blocks each, 64 columns by one, and so is what 192 leave of the columns, if it is no more. One
// warpgroup feeds a ring of stages; two multiply, a tile each in turn, so that one's way out is hidden behind the
// other's products. Low-rank work rides along in slots of 16 ranks of one adapter:
// - in the loop, one slot: rows of A beside those of W, so that h costs no pass over x. Masked to the rows of its
//   adapter and scaled, it is multiplied with B as one more k step. Transposed, B is beside W.
// - in the loops of a pair, two slots: the blocks of a cluster make two tiles of the same rows, one slot each, and
//   write their h to the other's shared memory as well.
// - given, any number: s h, zero where a row belongs to another adapter (low_rank_sm90.cu), is fed like x.
// A tile's adapters are found from the ids of its rows, so rows come in any order, and no id can be out of range.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/overlap.cuh"
#include "../device/sm90.cuh"
#include "../device/tensor_map.cuh"
#include "adapters.cuh"
#include "given.cuh"
#include "kernels.h"
#include "tile_ring.h"

namespace plora::cuda {
namespace {

constexpr int kRows = 128, kColumns = 192, kNarrow = 64, kDepth = 64;
// Ranks of a slot; given slots of a stage; of the feeding warps two are at work.
constexpr int kSlot = 16, kMaxGiven = 4, kThreads = 384;

// Bytes. A stage: x [128, 64], W [192, 64], A [16, 64], each row 128 bytes, swizzled; transposed, W is [64, 192] in
// three boxes of 64 columns, and B [64, 16] follows as the first columns of a fourth, of which no more is fetched, or,
// where there is no space for that, with rows of 32 bytes. At a tile's end the same memory holds given slots of h [128,
// 16] and B [192, 16]. A warp's way out: 16 rows of 32 columns of y, padded against bank conflicts; h of a warpgroup
// passes through the same place.
constexpr uint32_t kBytesX = kRows * kDepth * 2, kBytesW = kColumns * kDepth * 2, kBox = kNarrow * kDepth * 2;
constexpr uint32_t kSlotH = kRows * kSlot * 2, kSlotB = kColumns * kSlot * 2;
constexpr int kOutColumns = 32;
constexpr uint32_t kPitch = kOutColumns * 2 + 16, kOutWarp = 16 * kPitch;
static_assert(4 * kOutWarp >= kSlotH, "h of a warpgroup");

struct Place {
  int row, column, columns;
};

// What the feeding warpgroup tells the others about a tile.
struct Tile {
  Place place;
  uint32_t step;          // its first stage, counted from the block's first
  int slots;              // made in the loop, or in those of a pair, of
  int adapter[2];         // these adapters, ranks
  int block[2];           // 16 block and on
  int given;              // slots of h that were computed before
  int16_t all[kRows];     // the adapters of its rows, ascending
  int16_t of_row[kRows];  // -1: none
  alignas(16) uint16_t bias[kColumns];
};
constexpr int kTiles = tile_ring::kTiles, kMaxStages = 7;

// kSlots: how many of a tile may be made in the loop (2: by a pair; 0: they are given). kThirds: all tiles have 64
// columns, which leaves space for more stages.
template <bool kTransposed, int kSlots, bool kThirds>
struct Shape {
  static constexpr bool kInLoop = kSlots > 0, kPair = kSlots == 2;
  // Whether h, or g, comes of the same product as y, of 16 more columns.
  static constexpr bool kJoined = kInLoop && (!kTransposed || (kSlots == 1 && !kThirds));
  static constexpr uint32_t kBytesDown = kInLoop ? kSlot * kDepth * 2 : 0, kBytesUp = kThirds ? kSlotB / 3 : kSlotB;
  static constexpr uint32_t kStage =
      kBytesX + (kThirds ? kBox : kBytesW) + (kTransposed && kJoined ? kBox : kBytesDown);
  static constexpr int kStages = kThirds ? kMaxStages : kInLoop ? tile_ring::kStagesInLoop : tile_ring::kStagesGiven;
  // Of each warpgroup: B of the slots made in the loop; the h that the pair's other block makes.
  static constexpr uint32_t kUp = kSlots * kBytesUp, kOther = kPair ? kSlotH : 0;
};

// A stage is full when its bytes have come: those of the frozen layer, and the rest. `passed` tells that a tile's
// multipliers have seen all its stages full: only then may those of the next tile look at the same barriers, which tell
// only odd from even uses. In a pair a block may write the other's h once `other_free` tells that it was read there.
struct Barriers {
  uint32_t first;
  static constexpr int kCount = 2 * kMaxStages + kTiles + 10;
  __device__ uint32_t at(int i) const { return first + 8 * i; }
  __device__ uint32_t full(uint32_t stage) const { return at(stage); }
  __device__ uint32_t empty(uint32_t stage) const { return at(kMaxStages + stage); }
  __device__ uint32_t described(int tile) const { return at(2 * kMaxStages + tile % kTiles); }
  __device__ uint32_t other(int i) const { return at(2 * kMaxStages + kTiles + i); }
  __device__ uint32_t up_full(int group) const { return other(group); }
  __device__ uint32_t up_empty(int group) const { return other(2 + group); }
  __device__ uint32_t other_full(int group) const { return other(4 + group); }
  __device__ uint32_t other_free(int group) const { return other(6 + group); }
  __device__ uint32_t passed() const { return other(8); }
  __device__ uint32_t started() const { return other(9); }
};

// All shared memory: the stages, B of the slots made in the loop, the other block's h, the ways out, barriers, tiles.
template <typename S>
struct Layout {
  static constexpr uint32_t kUp = S::kStages * S::kStage, kOther = kUp + 2 * S::kUp, kOut = kOther + 2 * S::kOther,
                            kBarriers = kOut + 8 * kOutWarp, kTile = (kBarriers + 8 * Barriers::kCount + 15) / 16 * 16,
                            kBytes = kTile + kTiles * sizeof(Tile);
  static_assert(kBytes <= 232448, "more shared memory than a block can have");
};

struct Maps {
  CUtensorMap x, weight, narrow, down, up, h;
};

constexpr int kMaxSlices = lora_plan::kMaxSlices;

struct Arguments {
  int M, N, K, T, r, R;
  const int64_t* ids;
  int rows_per_id;
  const float* scaling;
  const void *bias, *bias_down, *gate;
  void *y, *kept;
  int64_t ldy;
  int column_tiles, whole, thirds, tiles;  // as in FusedTiles (lora_plan.h); of all kinds together
  int slots;                               // of a tile that are made in the loop, at most
  bool relu;
  int slices, slice_start[kMaxSlices], slice_stop[kMaxSlices];
};

__device__ inline int blocks_of(const Arguments& p) { return (p.r + kSlot - 1) / kSlot; }

// The adapter of a row, or -1.
__device__ int adapter_of(const Arguments& p, int row) { return adapter_of_row(p.ids, p.rows_per_id, p.M, p.T, row); }

// Where the tile of an index lies. Without branches, or the compiler divides again for every stage of the first tile.
__device__ inline Place place_of(const Arguments& p, int index) {
  const int beyond = index - p.whole, third = max(beyond, 0);
  const bool whole = beyond < 0, strip = beyond >= p.thirds;
  const int tile = min(index, p.whole) + third / 3, row = tile / p.column_tiles;
  const int column = (tile - row * p.column_tiles) * kColumns + third % 3 * kNarrow;
  return {(strip ? beyond - p.thirds : row) * kRows, strip ? p.column_tiles * kColumns : column,
          whole ? kColumns : kNarrow};
}

// Whether ranks [16 block, 16 block + 16) of an adapter can be other than zero in `up` for these columns.
__device__ bool meets(const Arguments& p, int block, int column, int columns) {
  if (p.slices == 0) return true;
  const int width = p.r / p.slices;
  for (int s = block * kSlot / width; s < p.slices && s * width < (block + 1) * kSlot; ++s)
    if (p.slice_start[s] < column + columns && p.slice_stop[s] > column) return true;
  return false;
}

// The first tile of its rows that makes this block of ranks is the one to keep h. In a pair, either makes one of two.
__device__ bool keeps(const Arguments& p, const Tile& tile, int block, int column) {
  const int width = tile.slots == 2 ? 2 * kColumns : kNarrow;
  for (int c = 0; c + width <= column; c += width)
    if (meets(p, block, c, width)) return false;
  return true;
}

// By one warp: the distinct adapters of a tile's rows in ascending order, and how their slots are made.
__device__ void describe(const Arguments& p, const Place& place, Tile& tile) {
  const int lane = threadIdx.x % 32, blocks = blocks_of(p), column = place.column;
  if (lane == 0) tile.place = place;
  if (lane < kColumns / 8) {
    uint4 bias{0, 0, 0, 0};
    if (p.bias != nullptr && column + 8 * lane < p.N)
      bias = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.bias) + column) + lane);
    reinterpret_cast<uint4*>(tile.bias)[lane] = bias;
  }
  int count = p.T;
  if (p.ids != nullptr) {
    int adapter[kRows / 32];
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) {
      adapter[i] = adapter_of(p, place.row + lane + 32 * i);
      tile.of_row[lane + 32 * i] = static_cast<int16_t>(adapter[i]);
    }
    count = list_adapters(adapter, tile.all);
  }
  __syncwarp();
  if (lane != 0) return;
  tile.slots = tile.given = 0;
  if (p.slots == 0) tile.given = count * blocks;
  for (int i = 0; i < count * blocks && tile.slots < p.slots; ++i) {
    const int at = i / blocks, block = i % blocks;
    if (!meets(p, block, column, place.columns)) continue;  // with slices, these columns need one of several blocks
    tile.adapter[tile.slots] = p.ids != nullptr ? tile.all[at] : at;
    tile.block[tile.slots++] = block;
  }
}

// Which of a tile's slots this block makes.
template <bool kPair>
__device__ int own_slot(const Tile& tile) {
  return kPair && tile.slots == 2 ? static_cast<int>(sm90::cluster_rank()) : 0;
}

// 16 x 16 blocks of h in shared memory are core matrices of 8 rows x 16 bytes: two columns side by side, rows below.
__device__ uint32_t place_in_h(int row, int column) {
  return row / 8 * 256 + column / 8 * 128 + row % 8 * 16 + column % 8 * 2;
}
constexpr uint64_t kLayoutH = sm90::operand_layout(sm90::Swizzle::none, 128, 256);
constexpr uint64_t kLayoutX = sm90::operand_layout(sm90::Swizzle::b128, 16, 1024);
constexpr uint64_t kLayoutDown = sm90::operand_layout(sm90::Swizzle::b32, 16, 256);  // transposed

// --- feeding --------------------------------------------------------------------------------------------------------

template <bool kTransposed, uint32_t kBytes>
__device__ void load_up(const Maps& maps, uint32_t barrier, uint32_t to, int t, int block, int column, bool chosen) {
  if constexpr (kTransposed) {
#pragma unroll
    for (uint32_t i = 0; i < kBytes / (kSlotB / 3); ++i)
      sm90::load_3d(&maps.up, barrier, to + i * (kSlotB / 3), column + kNarrow * i, block * kSlot, t, chosen);
  } else {
    sm90::load_3d(&maps.up, barrier, to, block * kSlot, column, t, chosen);
  }
}

// One warp: descriptions, a tile ahead of the copies, which then need not wait for the ids.
__device__ void describe_all(const Arguments& p, Tile* all, const Barriers& barriers) {
  const int k_steps = (p.K + kDepth - 1) / kDepth;
  uint32_t step = 0;
  for (int index = blockIdx.x, n = 0; index < p.tiles; index += gridDim.x, ++n) {
    if (n > 0) sm90::barrier_wait(barriers.started(), (n - 1) & 1);
    Tile& tile = all[n % kTiles];
    describe(p, place_of(p, index), tile);
    if (threadIdx.x % 32 == 0) tile.step = step;
    __syncwarp();
    step += k_steps + (tile.given + kMaxGiven - 1) / kMaxGiven;
    sm90::barrier_arrive(barriers.described(n));
  }
}

// One warp: copies. All of its lanes go through the loops, and one asks (sm90::elect).
template <bool kTransposed, int kSlots, bool kThirds>
__device__ void feed(const Maps& maps, const Arguments& p, const Tile* all, uint32_t stages, const Barriers& barriers) {
  using S = Shape<kTransposed, kSlots, kThirds>;
  constexpr bool kInLoop = S::kInLoop;
  const bool chosen = sm90::elect();
  const int k_steps = (p.K + kDepth - 1) / kDepth;
  uint32_t step = 0;
  const auto load_frozen = [&](int k, const Place& place) {
    const uint32_t s = (step + k) % S::kStages, at = stages + s * S::kStage, full = barriers.full(s);
    const bool third = kThirds || place.columns == kNarrow;
    sm90::barrier_arrive_expect(full, kBytesX + (third ? kBox : kBytesW), chosen);
    sm90::load_2d(&maps.x, full, at, k * kDepth, place.row, chosen);
    if constexpr (kTransposed) {
      sm90::load_2d(&maps.weight, full, at + kBytesX, place.column, k * kDepth, chosen);
      if (!third)
#pragma unroll
        for (int i = 1; i < kColumns / kNarrow; ++i)
          sm90::load_2d(&maps.weight, full, at + kBytesX + i * kBox, place.column + i * kNarrow, k * kDepth, chosen);
    } else {
      sm90::load_2d(third ? &maps.narrow : &maps.weight, full, at + kBytesX, k * kDepth, place.column, chosen);
    }
  };
  const Place first = place_of(p, blockIdx.x);
#pragma unroll 1
  for (int k = 0; k < min(k_steps, S::kStages); ++k) load_frozen(k, first);  // before its adapters are known
  for (int index = blockIdx.x, n = 0; index < p.tiles; index += gridDim.x, ++n) {
    const Tile& tile = all[n % kTiles];
    sm90::barrier_wait(barriers.described(n), n / kTiles & 1);
    const Place place = tile.place;
    const int slots = kInLoop ? tile.slots : 0, given = kInLoop ? 0 : tile.given;
    const int own = own_slot<S::kPair>(tile), adapter = tile.adapter[own];
    const int rank = tile.block[own] * kSlot;
    if (chosen) sm90::barrier_arrive(barriers.started());
#pragma unroll 1
    for (int k = 0; k < k_steps; ++k) {
      const uint32_t s = (step + k) % S::kStages, at = stages + s * S::kStage, full = barriers.full(s);
      if (n > 0 || k >= S::kStages) {
        sm90::barrier_wait(barriers.empty(s), ((step + k) / S::kStages & 1) ^ 1);
        load_frozen(k, place);
      }
      sm90::barrier_arrive_expect(full, slots ? kSlot * kDepth * 2 : 0, chosen);
      if (slots)
        sm90::load_3d(&maps.down, full, at + kBytesX + (place.columns == kNarrow ? kBox : kBytesW),
                      kTransposed ? rank : k * kDepth, kTransposed ? k * kDepth : rank, adapter, chosen);
    }
    if (kInLoop) {
      sm90::barrier_wait(barriers.up_empty(n % 2), (n / 2 & 1) ^ 1);
      sm90::barrier_arrive_expect(barriers.up_full(n % 2), slots * S::kBytesUp, chosen);
#pragma unroll 1
      for (int i = 0; i < slots; ++i)
        load_up<kTransposed, S::kBytesUp>(maps, barriers.up_full(n % 2),
                                          stages + Layout<S>::kUp + n % 2 * S::kUp + i * S::kBytesUp, tile.adapter[i],
                                          tile.block[i], place.column, chosen);
    }
#pragma unroll 1
    for (int entry = 0, k = k_steps; entry < given; entry += kMaxGiven, ++k) {
      const uint32_t s = (step + k) % S::kStages, to = stages + s * S::kStage;
      const uint32_t full = barriers.full(s);
      const int count = min(given - entry, kMaxGiven);
      wait_for_predecessor();  // it makes h
      sm90::barrier_wait(barriers.empty(s), ((step + k) / S::kStages & 1) ^ 1);
      if (chosen) sm90::barrier_arrive(full);
      sm90::barrier_arrive_expect(full, count * (kSlotH + S::kBytesUp), chosen);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const int at = (entry + i) / blocks_of(p), block = (entry + i) % blocks_of(p);
        sm90::load_3d(&maps.h, full, to + i * kSlotH, block * kSlot, at, place.row, chosen);
        load_up<kTransposed, S::kBytesUp>(maps, full, to + kBytesX + i * S::kBytesUp,
                                          p.ids != nullptr ? tile.all[at] : at, block, place.column, chosen);
      }
    }
    step += k_steps + (given + kMaxGiven - 1) / kMaxGiven;
  }
  wait_for_predecessor();  // what follows this kernel follows both
}

// --- multiplying ---------------------------------------------------------------------------------------------------

template <typename scalar, bool kTransposed, int kSlots, bool kThirds>
struct Multiplier {
  using S = Shape<kTransposed, kSlots, kThirds>;
  static constexpr bool kInLoop = S::kInLoop, kPair = S::kPair;
  // Accumulators of 64 rows: kWide columns of y, then 16 of h.
  template <int kWide>
  using Half = float[kWide / 2 + 8 * kInLoop];

  const Arguments& p;
  const Tile* all;
  const uint32_t stages, out;   // `out`: this warpgroup's part
  const int group, warp, lane;  // warpgroup 0 or 1, warp 0 to 3 in it
  const Barriers barriers;
  uint32_t step = 0, exchanges = 0;

  // In K-major order a k step of 16 is 32 bytes along a row; in N-major order it is 16 rows.
  static constexpr uint64_t kLayoutW = kTransposed ? sm90::operand_layout(sm90::Swizzle::b128, kBox, 1024)
                                                   : sm90::operand_layout(sm90::Swizzle::b128, 16, 1024);
  static constexpr uint64_t kStepW = (kTransposed ? 16 * 128 : 32) >> 4;
  static constexpr uint64_t kLayoutUp = kTransposed ? sm90::operand_layout(sm90::Swizzle::b128, kSlotB / 3, 1024)
                                                    : sm90::operand_layout(sm90::Swizzle::b32, 16, 256);

  // Tells the compiler that a value is the same in all lanes.
  __device__ static int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

  __device__ uint32_t stage() const { return stages + step % S::kStages * S::kStage; }

  __device__ void wait() { sm90::barrier_wait(barriers.full(step % S::kStages), step / S::kStages & 1); }

  __device__ void pass() { sm90::release(barriers.passed()); }

  // This warp is done with the stage that belongs to `which`.
  __device__ void release(uint32_t which) { sm90::release(barriers.empty(which % S::kStages)); }

  // The accumulators of h.
  template <int kCount>
  __device__ static float (&ranks(float (&d)[kCount]))[8] {
    return *reinterpret_cast<float (*)[8]>(&d[kCount - 8]);
  }

  template <int kWide>
  __device__ void main_loop(Half<kWide>& upper, Half<kWide>& lower, int k_steps) {
#pragma unroll
    for (float& value : upper) value = 0;
#pragma unroll
    for (float& value : lower) value = 0;
#pragma unroll 1
    for (int k = 0; k < k_steps; ++k, ++step) {
      // Wait for the copies
      wait();
      // Start the products
      const uint64_t a = sm90::operand(kLayoutX, stage()), b = sm90::operand(kLayoutW, stage() + kBytesX);
      sm90::hold(upper), sm90::hold(lower);
      sm90::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i) {
        const uint64_t above = a + i * 2, below = above + (kBytesX / 2 >> 4);
        constexpr int kColumnsAtOnce = kWide + kSlot * S::kJoined;
        sm90::wgmma<kColumnsAtOnce, scalar, kTransposed>(upper, above, b + i * kStepW);
        sm90::wgmma<kColumnsAtOnce, scalar, kTransposed>(lower, below, b + i * kStepW);
        if constexpr (kInLoop && !S::kJoined) {
          const uint64_t down = sm90::operand(kLayoutDown, stage() + kBytesX + kWide / kNarrow * kBox) + i * 32;
          sm90::wgmma<kSlot, scalar, 1>(ranks(upper), above, down);
          sm90::wgmma<kSlot, scalar, 1>(ranks(lower), below, down);
        }
      }
      sm90::wgmma_commit();
      sm90::hold(upper), sm90::hold(lower);
      // Give back the stage of those before, which have ended
      sm90::wgmma_wait<1>();
      if (k > 0) release(step - 1);
    }
    sm90::wgmma_wait<0>();
    sm90::hold(upper), sm90::hold(lower);
    release(step - 1);
  }

  // Adds `count` slots, whose h lies at `h` and whose B lies at `up`.
  template <int kWide>
  __device__ void add_slots(Half<kWide>& upper, Half<kWide>& lower, uint64_t layout, uint32_t h, uint32_t up,
                            int count) {
    sm90::hold(upper), sm90::hold(lower);
    sm90::wgmma_fence();
    for (int i = 0; i < count; ++i) {
      const uint64_t a = sm90::operand(layout, h + i * kSlotH);
      const uint64_t b = sm90::operand(kLayoutUp, up + i * S::kBytesUp);
      sm90::wgmma<kWide, scalar, kTransposed>(upper, a, b);
      sm90::wgmma<kWide, scalar, kTransposed>(lower, a + (kSlotH / 2 >> 4), b);
    }
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    sm90::hold(upper), sm90::hold(lower);
  }

  // h of this warp's rows: activation, mask, and its two destinations. The rows take turns in h[0]: a tile's straight
  // code should fit the instruction cache.
  template <int kWide>
  __device__ void finish_h(const Half<kWide>& upper, const Half<kWide>& lower, const Tile& tile, int own, float s,
                           int first_row, bool keep) {
    const int t = tile.adapter[own], first = tile.block[own] * kSlot;
    uint32_t other = 0, other_full = 0;
    if (kPair && tile.slots == 2) {
      other = sm90::place_in_block(stages + Layout<S>::kOther + group * kSlotH, own ^ 1);
      other_full = sm90::place_in_block(barriers.other_full(group), own ^ 1);
      sm90::barrier_wait(barriers.other_free(group), (exchanges & 1) ^ 1);
    }
    constexpr int kH = kWide / 2;
    float h[4][4];  // above and below in the upper half, then in the lower
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      h[0][i] = upper[kH + i + i / 2 * 2], h[1][i] = upper[kH + 2 + i + i / 2 * 2];
      h[2][i] = lower[kH + i + i / 2 * 2], h[3][i] = lower[kH + 2 + i + i / 2 * 2];
    }
#pragma unroll 1
    for (int q = 0; q < 4; ++q) {
      const int row = warp * 16 + lane / 4 + 8 * (q % 2) + 64 * (q / 2), m = first_row + row;
      const bool mine = m < p.M && (p.ids == nullptr || tile.of_row[row] == t);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 8 * half + lane % 4 * 2, j = first + column;
        float x = h[0][2 * half], y = h[0][2 * half + 1];
        if (mine && j < p.r) {
          if (p.bias_down != nullptr) {
            const float2 a = two<scalar>(p.bias_down, t * p.r + j);
            x += a.x, y += a.y;
          }
          if (p.relu) x = x < 0.f ? 0.f : x, y = y < 0.f ? 0.f : y;  // fmaxf would lose a NaN
          const int64_t at = static_cast<int64_t>(m) * p.R + (kPair && p.ids == nullptr ? t * p.r : 0) + j;
          if (p.gate != nullptr) {
            const float2 g = two<scalar>(p.gate, at);
            x = g.x <= 0.f ? 0.f : x, y = g.y <= 0.f ? 0.f : y;
          }
          if (keep) *reinterpret_cast<uint32_t*>(static_cast<scalar*>(p.kept) + at) = pair<scalar>(x, y);
        } else {
          x = y = 0;
        }
        const uint32_t scaled = pair<scalar>(s * x, s * y);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(out + place_in_h(row, column)), "r"(scaled) : "memory");
        if (kPair && other != 0) sm90::store_to_block(other + place_in_h(row, column), scaled, other_full);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) h[0][i] = h[1][i], h[1][i] = h[2][i], h[2][i] = h[3][i];
    }
  }

  // The powers of two in s (given.cuh) of this lane's rows of either half; meanwhile the sum is divided by them.
  struct Powers {
    float upper[2] = {1.f, 1.f}, lower[2] = {1.f, 1.f};
  };
  static constexpr bool kSplits = std::is_same_v<scalar, __half>;

  __device__ Powers powers(const Tile& tile, int slots, int given) const {
    Powers f;
    if constexpr (kSplits) {
      const auto of = [&](int adapter) { return adapter < 0 ? 1.f : split<scalar>(p.scaling[adapter]).power; };
      const int row = warp * 16 + lane / 4;
      if (slots == 1) {
        f.upper[0] = f.upper[1] = f.lower[0] = f.lower[1] = of(tile.adapter[0]);
      } else if ((slots != 0 || given != 0) && p.ids != nullptr) {
        f.upper[0] = of(tile.of_row[row]), f.upper[1] = of(tile.of_row[row + 8]);
        f.lower[0] = of(tile.of_row[row + 64]), f.lower[1] = of(tile.of_row[row + 72]);
      }
    }
    return f;
  }

  // By powers of two, which is exact.
  template <int kWide>
  __device__ static void divide(Half<kWide>& d, const float (&power)[2]) {
    if constexpr (kSplits) {
      if (power[0] == 1.f && power[1] == 1.f) return;
      const float above = __frcp_rn(power[0]), below = __frcp_rn(power[1]);
#pragma unroll
      for (int i = 0; i < kWide / 2; ++i) d[i] *= i % 4 < 2 ? above : below;
    }
  }

  // y of this warp's 16 rows, by way of shared memory so that whole sectors are written.
  template <int kWide>
  __device__ void write(const Half<kWide>& d, const Tile& tile, int row, int column, const float (&power)[2]) const {
    const auto sum = [&](float v, float bias, int below) { return kSplits ? fmaf(v, power[below], bias) : v + bias; };
    const uint32_t own = out + warp * kOutWarp;
    const uint32_t to = own + (lane / 8 % 2 * 8 + lane % 8) * kPitch + lane / 16 * 16;
    const uint32_t from = own + lane / 4 * kPitch + lane % 4 * 16;
    const int m = row + lane / 4, n = column + lane % 4 * 8;
    scalar* y = static_cast<scalar*>(p.y) + m * p.ldy + n;
#pragma unroll
    for (int part = 0; part < kWide / kOutColumns; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* v = &d[16 * part + 8 * i];  // 16 columns: left above, left below, right above, right below
        const uint32_t* bias = reinterpret_cast<const uint32_t*>(tile.bias) + 16 * part + 8 * i + lane % 4;
        const float2 b = unpair<scalar>(bias[0]), c = unpair<scalar>(bias[4]);
        sm90::store_matrices(to + i * 32, pair<scalar>(sum(v[0], b.x, 0), sum(v[1], b.y, 0)),
                             pair<scalar>(sum(v[2], b.x, 1), sum(v[3], b.y, 1)),
                             pair<scalar>(sum(v[4], c.x, 0), sum(v[5], c.y, 0)),
                             pair<scalar>(sum(v[6], c.x, 1), sum(v[7], c.y, 1)));
      }
      __syncwarp();
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        uint4 v;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(from + below * 8 * kPitch)
                     : "memory");
        if (m + 8 * below < p.M && n + part * kOutColumns < p.N)
          *reinterpret_cast<uint4*>(y + below * 8 * p.ldy + part * kOutColumns) = v;
      }
      __syncwarp();
    }
  }

  __device__ void run() {
    for (int n = group, index; index = blockIdx.x + n * gridDim.x, index < p.tiles; n += 2) {
      sm90::barrier_wait(barriers.described(n), n / kTiles & 1);
      const Place place = all[n % kTiles].place;
      if constexpr (kThirds)
        make<kNarrow>(n, place.row, place.column);
      else if (kPair || place.columns == kColumns)
        make<kColumns>(n, place.row, place.column);
      else
        make<kNarrow>(n, place.row, place.column);
    }
  }

  template <int kWide>
  __device__ void make(int n, int row, int column) {
    const int k_steps = (p.K + kDepth - 1) / kDepth, barrier = 2 + group;
    const Tile& tile = all[n % kTiles];
    Half<kWide> upper, lower;
    step = uniform(tile.step);
    const int slots = kInLoop ? uniform(tile.slots) : 0, given = kInLoop ? 0 : uniform(tile.given);
    const int own = uniform(own_slot<kPair>(tile));
    float s = slots != 0 ? p.scaling[tile.adapter[own]] : 0.f;
    if (slots == 1 || p.ids != nullptr) s = split<scalar>(s).factor;
    Powers power = powers(tile, slots, given);
    if (n > 0) sm90::barrier_wait(barriers.passed(), (n - 1) & 1);
    main_loop<kWide>(upper, lower, k_steps);
    if (given == 0) pass();
    divide<kWide>(upper, power.upper), divide<kWide>(lower, power.lower);
    if constexpr (kInLoop) {  // every tile waits, to keep count of the uses
      if (slots != 0) {
        const uint32_t up = stages + Layout<S>::kUp + group * S::kUp;
        const bool keep = p.kept != nullptr && keeps(p, tile, tile.block[own], column);
        finish_h<kWide>(upper, lower, tile, own, s, row, keep);
        sm90::fence_async();
        sm90::named_barrier(barrier, 128);
        sm90::barrier_wait(barriers.up_full(group), n / 2 & 1);
        add_slots<kWide>(upper, lower, kLayoutH, out, up + own * S::kBytesUp, 1);
        if (kPair && slots == 2) {
          if (warp == 0 && lane == 0) sm90::barrier_arrive_expect(barriers.other_full(group), kSlotH);
          sm90::barrier_wait(barriers.other_full(group), exchanges++ & 1);
          sm90::fence_async();
          sm90::named_barrier(barrier, 128);
          add_slots<kWide>(upper, lower, kLayoutH, stages + Layout<S>::kOther + group * kSlotH,
                           up + (own ^ 1) * S::kBytesUp, 1);
          if (lane == 0) sm90::barrier_arrive_in_block(sm90::place_in_block(barriers.other_free(group), own ^ 1));
        }
      } else {
        sm90::barrier_wait(barriers.up_full(group), n / 2 & 1);
      }
      sm90::release(barriers.up_empty(group));
    }
#pragma unroll 1
    for (int entry = 0; entry < given; entry += kMaxGiven) {
      wait();
      if (entry + kMaxGiven >= given) pass();
      add_slots<kWide>(upper, lower, kLayoutGiven, stage(), stage() + kBytesX, min(given - entry, kMaxGiven));
      release(step++);
    }
    sm90::named_barrier(barrier, 128);  // h is read
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      write<kWide>(upper, tile, row + warp * 16 + half * 64, column, power.upper);
#pragma unroll
      for (int i = 0; i < kWide / 2; ++i) upper[i] = lower[i];
      power.upper[0] = power.lower[0], power.upper[1] = power.lower[1];
    }
    sm90::named_barrier(barrier, 128);  // y is read: h of the next tile may come
  }
};

template <typename scalar, bool kTransposed, int kSlots, bool kThirds>
__global__ void __launch_bounds__(kThreads, 1)
    fused_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kTransposed, kSlots, kThirds>;
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const uint32_t stages = sm90::smem_address(dynamic);
  Tile* const tiles = reinterpret_cast<Tile*>(dynamic + Layout<S>::kTile);
  const Barriers barriers{stages + Layout<S>::kBarriers};
  launch_successor();  // lora_grads_sm90, which sends for x and dy as soon as a block here ends
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      sm90::barrier_init(barriers.full(i), 2);
      sm90::barrier_init(barriers.empty(i), 4);
    }
    for (int i = 0; i < kTiles; ++i) sm90::barrier_init(barriers.described(i), 32);
    for (int i = 0; i < 2; ++i) {
      sm90::barrier_init(barriers.up_full(i), 1), sm90::barrier_init(barriers.up_empty(i), 4);
      sm90::barrier_init(barriers.other_full(i), 1), sm90::barrier_init(barriers.other_free(i), 4);
    }
    sm90::barrier_init(barriers.passed(), 4), sm90::barrier_init(barriers.started(), 1);
    sm90::fence_barrier_init();
    sm90::prefetch_map(&maps.x), sm90::prefetch_map(&maps.weight);
    sm90::prefetch_map(&maps.down), sm90::prefetch_map(&maps.up), sm90::prefetch_map(&maps.h);
  }
  if constexpr (S::kPair)
    sm90::cluster_sync();  // neither block writes to one that has not begun,
  else
    __syncthreads();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;
  if (group < 0) {
    sm90::shrink_registers<S::kInLoop && !kThirds ? 24 : 40>();
    if (threadIdx.x < 32)
      feed<kTransposed, kSlots, kThirds>(maps, p, tiles, stages, barriers);
    else if (threadIdx.x < 64)
      describe_all(p, tiles, barriers);
  } else {
    sm90::grow_registers<S::kInLoop && !kThirds ? 240 : 232>();  // of 240, 208 are accumulators
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const uint32_t out = stages + Layout<S>::kOut + group * 4 * kOutWarp;
    Multiplier<scalar, kTransposed, kSlots, kThirds>{p, tiles, stages, out, group, warp, lane, barriers}.run();
  }
  if constexpr (S::kPair) {  // or has ended
    __syncwarp();
    sm90::cluster_sync();
  }
#endif
}

// What else is added to y; rare, so it is a pass of its own. 8 columns a thread.
template <typename scalar>
__global__ void __launch_bounds__(256)
    add_rest_kernel(const Arguments p, const scalar* base, int64_t ld_base, const scalar* bias_up) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int chunks = p.N / 8, m = static_cast<int>(index / chunks), n = static_cast<int>(index % chunks) * 8;
  if (m >= p.M) return;
  scalar* y = static_cast<scalar*>(p.y) + m * p.ldy + n;
  float sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = static_cast<float>(y[i]);
  if (base != nullptr)
    for (int i = 0; i < 8; ++i) sum[i] += static_cast<float>(base[m * ld_base + n + i]);
  if (bias_up != nullptr) {
    const int own = p.ids != nullptr ? adapter_of(p, m) : 0, last = p.ids != nullptr ? own + 1 : p.T;
    for (int t = own < 0 ? last : own; t < last; ++t)
      for (int i = 0; i < 8; ++i)
        sum[i] += p.scaling[t] * static_cast<float>(bias_up[static_cast<int64_t>(t) * p.N + n + i]);
  }
  for (int i = 0; i < 8; ++i) y[i] = static_cast<scalar>(sum[i]);
}

// --- host -----------------------------------------------------------------------------------------------------------

Maps describe(const Fused& p, bool some_narrow, bool all_narrow) {
  const int64_t T = p.rows.T, r = p.rows.r;
  Maps maps;
  describe_tensor<2>(maps.x, p.dtype, p.x, {p.K, p.rows.M}, {p.ldx}, {kDepth, kRows}, k128);
  if (p.up_transposed)
    describe_tensor<2>(maps.weight, p.dtype, p.weight, {p.N, p.K}, {p.N}, {kNarrow, kDepth}, k128);
  else
    describe_tensor<2>(maps.weight, p.dtype, p.weight, {p.K, p.N}, {p.K}, {kDepth, kColumns}, k128);
  maps.narrow = maps.weight;
  if (some_narrow && !p.up_transposed)
    describe_tensor<2>(maps.narrow, p.dtype, p.weight, {p.K, p.N}, {p.K}, {kDepth, kNarrow}, k128);
  maps.h = maps.x;  // where no h is given, never read
  if (p.scaled_h != nullptr && T * r != 0)
    describe_tensor<3>(maps.h, p.dtype, p.scaled_h, {r, p.places, p.rows.M}, {r, p.places * r}, {kSlot, 1, kRows}, k32);
  if (T * r == 0) {
    maps.down = maps.up = maps.x;  // never read
  } else if (p.up_transposed) {
    maps.down = maps.x;                               // where h is given, never read
    const bool joined = p.slots == 1 && !all_narrow;  // rows of 128 bytes in shared memory, whatever is fetched of them
    if (p.slots)
      describe_tensor<3>(maps.down, p.dtype, p.down, {r, p.K, T}, {r, r * p.K}, {kSlot, kDepth, 1},
                         joined ? k128 : k32);
    describe_tensor<3>(maps.up, p.dtype, p.up, {p.N, r, T}, {p.N, r * p.N}, {64, kSlot, 1}, k128);
  } else {
    describe_tensor<3>(maps.down, p.dtype, p.down, {p.K, r, T}, {p.K, r * p.K}, {kDepth, kSlot, 1}, k128);
    describe_tensor<3>(maps.up, p.dtype, p.up, {r, p.N, T}, {r, p.N * r}, {kSlot, all_narrow ? kNarrow : kColumns, 1},
                       k32);
  }
  return maps;
}

template <typename scalar, bool kTransposed, int kSlots, bool kThirds>
void launch(const Maps& maps, const Arguments& p, int blocks, bool overlap, cudaStream_t stream) {
  launch_clusters("the fused LoRA product", &fused_kernel<scalar, kTransposed, kSlots, kThirds>, kSlots == 2 ? 2 : 1,
                  blocks, kThreads, Layout<Shape<kTransposed, kSlots, kThirds>>::kBytes, stream, overlap, maps, p);
}

}  // namespace

void fused(const Fused& p, cudaStream_t stream) {
  if (p.rows.M == 0 || p.N == 0) return;
  const bool one = p.rows.r <= kSlot || !p.slices.empty();
  const bool two = ceil_div(p.N, kColumns) % 2 == 0 && p.slices.empty() && multiprocessors() > 1;
  PLORA_CHECK(p.slots == 0 || (p.slots == 1 ? one : two), "the fused LoRA product: not what it was planned for");
  Arguments a{};
  a.M = narrow(p.rows.M), a.N = narrow(p.N), a.K = narrow(p.K);
  a.T = p.rows.r == 0 ? 0 : narrow(p.rows.T), a.r = narrow(p.rows.r), a.R = narrow(p.rows.R());
  a.ids = p.rows.ids, a.rows_per_id = narrow(p.rows.rows_per_id);
  a.scaling = p.scaling, a.bias = p.bias, a.bias_down = p.bias_down, a.gate = p.gate;
  a.y = p.y, a.kept = p.h, a.ldy = p.ldy, a.slots = p.slots, a.relu = p.relu;
  if (p.slices.size() <= 2 * kMaxSlices && !p.slices.empty() && p.rows.r % (p.slices.size() / 2) == 0) {
    a.slices = narrow(p.slices.size() / 2);
    for (int s = 0; s < a.slices; ++s)
      a.slice_start[s] = narrow(p.slices[2 * s]), a.slice_stop[s] = narrow(p.slices[2 * s + 1]);
  }
  const int most = multiprocessors();
  const auto tiles = lora_plan::fused_tiles(a.M, a.N, most, p.slots == 2);
  a.column_tiles = narrow(tiles.columns), a.whole = narrow(tiles.whole);
  a.thirds = narrow(tiles.thirds), a.tiles = narrow(tiles.count());
  const Maps maps = describe(p, a.tiles > a.whole, a.whole == 0);
  const int at_once = std::min(a.tiles, most), blocks = p.slots == 2 ? at_once / 2 * 2 : at_once;
  dispatch<2>("the fused LoRA product", p.dtype, [&](auto tag) {
    using scalar = decltype(tag);
    with_flags(
        [&](auto transposed, auto loop, auto pair, auto thirds) {
          if constexpr (pair ? loop && !thirds : true)
            launch<scalar, transposed, loop + pair, thirds>(maps, a, blocks, p.overlap, stream);
        },
        p.up_transposed, p.slots > 0, p.slots == 2, a.whole == 0);
    if (p.y0 == nullptr && p.bias_up == nullptr) return;
    const int64_t threads = p.rows.M * (p.N / 8);
    launch_kernel("the fused LoRA product", &add_rest_kernel<scalar>, ceil_div(threads, 256), 256, 0, stream, a,
                  static_cast<const scalar*>(p.y0), p.ldy0, static_cast<const scalar*>(p.bias_up));
  });
}

}  // namespace plora::cuda
