// The first half of the low-rank families alone, for Hopper and 16-bit dtypes: h = act(x down^T + bias) and s h.
//
// Floor: x passes once, 2 M K bytes, 4.6 us for [12608, 768] at 4.2 TB/s. Besides, each block reads from L2 the factors
// that its rows chose, 2 K bytes a rank, and multiplies, 0.9 us a multiprocessor for 64 columns, 2.6 us for 192.
//
// A block owns 64 or 128 rows, a warpgroup for each 64; one more warp feeds a ring of stages. Its columns are the ranks
// of the adapters that the aligned 128 rows around them chose (without ids: of all), side by side, ascending, 192 at a
// time, or 64 where that is enough. What a row gets from adapters of its neighbours is thrown away: h has the row's own
// ranks alone, s h those of all these adapters, zero but for the own, as the fused product takes them.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/mma.cuh"
#include "../device/overlap.cuh"
#include "../device/ring.cuh"
#include "../device/tensor_map.cuh"
#include "adapters.cuh"
#include "given.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kDepth = 64, kNarrow = 64, kWide = 192;
constexpr int kFusedRows = lora_plan::kTileRows;
constexpr int kMaxAdapters = 1 << 15;
constexpr int kMaxBoxes = kWide / 8;  // copies that fetch a stage's factors
constexpr int64_t kAhead = 24 << 20;  // bytes of y0 that L2 keeps for the second half

// A stage: x [64 or 128, 64], then factors [64 or 192, 64], swizzled. A warp's way out: 16 rows of 32 floats, padded.
constexpr uint32_t kBytesRow = kDepth * 2;
constexpr uint64_t kLayout = sm90::operand_layout(sm90::Swizzle::b128, 16, 1024);
// Where `down` is [T, K, r], a row of a stage is kRow ranks at one k; then come the next ranks.
constexpr int kRow = lora_plan::kFactorRow;
constexpr uint32_t kBytesRanks = kRow * 2;
constexpr uint64_t kLayoutTransposed = sm90::operand_layout(sm90::Swizzle::b32, kDepth* kBytesRanks, 8 * kBytesRanks);
static_assert(kBytesRanks == 32, "the swizzle of a row");
constexpr int kPart = 32, kPitch = kPart + 4;

// How the aligned block of 128 rows chose.
struct Choices {
  int adapter[kFusedRows];             // of each row
  int place[kFusedRows];               // of it among `adapters`
  int adapters[kFusedRows];            // each once, ascending
  uint32_t met[kMaxAdapters / 32];     // a bit for each adapter
  int rank[kMaxBoxes], of[kMaxBoxes];  // where the copies of a stage begin: a rank, of an adapter
};

// The columns that an adapter takes: its ranks, or whole rows of them where `down` is [T, K, r].
template <bool kTransposed>
__host__ __device__ constexpr int padded(int r) {
  return kTransposed ? (r + kRow - 1) / kRow * kRow : r;
}

template <int kGroups>
struct Shape {
  static constexpr int kRows = 64 * kGroups, kWarps = 4 * kGroups, kThreads = 32 * kWarps + 32;
  static constexpr uint32_t kBytesX = kRows * kBytesRow;
  static constexpr uint32_t kRing = 200 * 1024;  // as many stages as it has space for
  static constexpr int kMaxStages = kRing / (kBytesX + kNarrow * kBytesRow);
  static constexpr uint32_t kOut = kRing, kOutWarp = 16 * kPitch * sizeof(float), kBarriers = kOut + kWarps * kOutWarp,
                            kChoices = kBarriers + 16 * kMaxStages, kBytes = kChoices + sizeof(Choices);
  static_assert(kBytes <= 232448, "more shared memory than a block can have");
};

struct Maps {
  CUtensorMap x, down, run;
};

struct Arguments {
  LowRank p;
  int box;  // ranks that a copy of `down` fetches; of `run`, which has the ranks of adapters that follow each other, 64
  int ahead;  // rows of y0 from here on are set on their way to L2: the second half begins with the last
};

// How many adapters the rows chose. By all threads.
__device__ inline int choose(const LowRank& p, int row0, Choices& choices) {
  const int i = threadIdx.x, words = static_cast<int>(p.rows.T + 31) / 32;
  const int mine = i < kFusedRows ? choice(p.rows, row0 / kFusedRows * kFusedRows + i) : kNone;
  for (int w = i; w < words; w += blockDim.x) choices.met[w] = 0;
  __syncthreads();
  if (mine >= 0) atomicOr(&choices.met[mine / 32], 1u << mine % 32);
  __syncthreads();
  const int word = max(mine, 0) / 32;
  const uint32_t below = (1u << max(mine, 0) % 32) - 1;
  int place = 0, count = 0;
  for (int w = 0; w < words; ++w) {
    const uint32_t met = choices.met[w];
    place += w > word ? 0 : __popc(w == word ? met & below : met);
    count += __popc(met);
  }
  if (i < kFusedRows) choices.adapter[i] = mine, choices.place[i] = place;
  if (mine >= 0) choices.adapters[place] = mine;
  __syncthreads();
  return count;
}

// A row of h, among the adapters of its block.
struct Own {
  int row, place = 0, adapter = kOutside;
};

// d += the rows of this warpgroup times kN columns.
template <typename scalar, bool kTransposed, int kN>
__device__ inline void multiply(float (&d)[kN / 2], sm90::Ring& ring, uint32_t x, uint32_t down, int k_steps) {
  constexpr uint64_t kStep = (kTransposed ? 16 * kBytesRanks : 32) >> 4;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) d[i] = 0.f;
  sm90::multiply(d, ring, k_steps, [&](uint32_t at) {
    const uint64_t a = sm90::operand(kLayout, at + x);
    const uint64_t b = sm90::operand(kTransposed ? kLayoutTransposed : kLayout, at + down);
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) sm90::wgmma<kN, scalar, kTransposed>(d, a + 2 * i, b + i * kStep);
  });
}

// h of this warp's rows, `width` columns from `first` on, `each` an adapter. They pass through shared memory, 32 at a
// time, to where a lane has eight in a row of row lane % 16.
template <typename scalar, int kN>
__device__ inline void write(const LowRank& p, float (&d)[kN / 2], float* out, const Own& own, int first, int width,
                             int each) {
  const int lane = threadIdx.x % 32, r = static_cast<int>(p.rows.r);
  float* const to = out + lane / 4 * kPitch + lane % 4 * 2;
#pragma unroll 1
  for (int part = 0; part < width; part += kPart) {
#pragma unroll
    for (int j = 0; j < kPart / 8; ++j) {
      *reinterpret_cast<float2*>(to + 8 * j) = make_float2(d[4 * j], d[4 * j + 1]);
      *reinterpret_cast<float2*>(to + 8 * j + 8 * kPitch) = make_float2(d[4 * j + 2], d[4 * j + 3]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPart / 16; ++i) {
      const int from = 8 * (lane / 16 + 2 * i), place = (first + part + from) / each;
      const int rank = first + part + from - place * each;
      if (part + from >= width || rank >= r || own.adapter == kOutside) continue;
      const bool mine = !p.rows.ids || (own.adapter >= 0 && place == own.place);
      const int factor = (p.rows.ids ? own.adapter : place) * r + rank;
      const int64_t at = own.row * (p.rows.ids ? p.rows.r : p.rows.T * p.rows.r) + (p.rows.ids ? rank : factor);
      Vector<scalar> h{}, scaled{};
      if (mine) {
        const auto eight = [&](const void* values, int64_t at) {
          return Vector<scalar>{__ldg(reinterpret_cast<const uint4*>(static_cast<const scalar*>(values) + at))};
        };
        Vector<scalar> bias{}, gate{};
        if (p.bias_down) bias = eight(p.bias_down, factor);
        if (p.gate) gate = eight(p.gate, at);
        const float4 low = *reinterpret_cast<const float4*>(out + lane % 16 * kPitch + from);
        const float4 high = *reinterpret_cast<const float4*>(out + lane % 16 * kPitch + from + 4);
        const float sums[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        const float s = p.scaled_h ? __ldg(p.scaling + factor / r) : 0.f;
        const float scale = p.rows.ids ? split<scalar>(s).factor : s;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float sum = sums[e] + to_float(bias[e]);
          const bool open = (!p.gate | !(to_float(gate[e]) <= 0)) & !(p.relu & (sum < 0));
          const float x = open ? sum : 0.f;
          h[e] = from_float<scalar>(x), scaled[e] = from_float<scalar>(scale * x);
        }
        if (p.h) store_vector(static_cast<scalar*>(p.h) + at, h.raw);
      }
      if (p.scaled_h)
        store_vector(static_cast<scalar*>(p.scaled_h) + (own.row * p.places + place) * r + rank, scaled.raw);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kN / 2 - kPart / 2; ++i) d[i] = d[i + kPart / 2];
  }
}

// gridDim.y shares out the columns of a block, 192 at a time.
template <typename scalar, int kGroups, bool kTransposed>
__global__ void __launch_bounds__(Shape<kGroups>::kThreads, 1)
    down_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kGroups>;
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const LowRank& p = a.p;
  const uint32_t memory = sm90::smem_address(dynamic);
  Choices& choices = *reinterpret_cast<Choices*>(dynamic + S::kChoices);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int row0 = static_cast<int>(blockIdx.x) * S::kRows;
  const int r = static_cast<int>(p.rows.r), K = static_cast<int>(p.K), k_steps = (K + kDepth - 1) / kDepth;

  launch_successor();
  if (warp == S::kWarps) {
    if (lane == 0) {
      sm90::Ring{memory, memory + S::kBarriers, 0, S::kMaxStages}.init(S::kWarps);
      sm90::fence_barrier_init();
      sm90::prefetch_map(&maps.x), sm90::prefetch_map(&maps.down), sm90::prefetch_map(&maps.run);
      if (p.rows.ids)  // while the ids come
        for (int k = 0; k < min(k_steps, S::kMaxStages); ++k) sm90::prefetch_2d(&maps.x, k * kDepth, row0);
    }
  }
  int count = static_cast<int>(p.rows.T);
  if (p.rows.ids)
    count = choose(p, row0, choices);
  else
    __syncthreads();
  const int each = padded<kTransposed>(r), columns = count * each, first = static_cast<int>(blockIdx.y) * kWide;
  const int stride = static_cast<int>(gridDim.y) * kWide;
  const uint32_t bytes = S::kBytesX + (columns <= kNarrow ? kNarrow : kWide) * kBytesRow;
  sm90::Ring ring{memory, memory + S::kBarriers, bytes, static_cast<int>(S::kRing / bytes)};

  if (warp == S::kWarps) {
    const bool chosen = sm90::elect();
    for (int column = first; column < columns; column += stride) {
      const auto adapter = [&](int place) { return p.rows.ids ? choices.adapters[place] : place; };
      const int width = min(columns - column, kWide), begin = column / each, end = (column + width - 1) / each;
      const bool run = !kTransposed && width > 2 * a.box && adapter(end) - adapter(begin) == end - begin;
      const int box = run ? kNarrow : a.box, boxes = (width + box - 1) / box;
      if (lane < boxes) {
        const int at = column + lane * box, place = at / each;
        choices.rank[lane] = at % each, choices.of[lane] = adapter(place);
      }
      __syncwarp();
#pragma unroll 1
      for (int k = 0; k < k_steps; ++k, ring.next()) {
        const uint32_t full = ring.fill(S::kBytesX + boxes * box * kBytesRow, chosen);
        uint32_t to = ring.at();
        sm90::load_2d(&maps.x, full, to, k * kDepth, row0, chosen);
        to += S::kBytesX;
#pragma unroll 1
        for (int i = 0; i < boxes; ++i, to += box * kBytesRow)
          if (kTransposed)
            sm90::load_3d(&maps.down, full, to, choices.rank[i], k * kDepth, choices.of[i], chosen);
          else if (run)
            sm90::load_2d(&maps.run, full, to, k * kDepth, choices.of[i] * r + choices.rank[i], chosen);
          else
            sm90::load_3d(&maps.down, full, to, k * kDepth, choices.rank[i], choices.of[i], chosen);
      }
      __syncwarp();
    }
    if (blockIdx.y == 0)
      for (int i = row0 + lane; i < min(row0 + S::kRows, static_cast<int>(p.rows.M)); i += 32)
        if (i >= a.ahead)
          prefetch_to_l2(static_cast<const scalar*>(p.y0) + i * p.ldy0, static_cast<uint32_t>(p.N * sizeof(scalar)));
    return;
  }

  const int group = warp / 4, mine = 16 * warp + lane % 16, row = row0 + mine;  // the row that this lane writes
  float* const out = reinterpret_cast<float*>(dynamic + S::kOut + warp * S::kOutWarp);
  Own own{row};
  if (!p.rows.ids) {
    if (row < p.rows.M) own.adapter = kNone;
  } else {
    own.place = choices.place[row % kFusedRows], own.adapter = choices.adapter[row % kFusedRows];
    if (own.adapter == kNone && p.h && blockIdx.y == 0)
      for (int c = lane / 16 * 8; c < r; c += 16)
        store_vector(static_cast<scalar*>(p.h) + static_cast<int64_t>(row) * r + c, uint4{});
  }
  for (int column = first; column < columns; column += stride) {
    const int width = min(columns - column, kWide);
    if (width <= kNarrow) {
      float d[kNarrow / 2];
      multiply<scalar, kTransposed, kNarrow>(d, ring, group * 64 * kBytesRow, S::kBytesX, k_steps);
      write<scalar, kNarrow>(p, d, out, own, column, width, each);
    } else {
      float d[kWide / 2];
      multiply<scalar, kTransposed, kWide>(d, ring, group * 64 * kBytesRow, S::kBytesX, k_steps);
      write<scalar, kWide>(p, d, out, own, column, width, each);
    }
  }
#endif
}

template <typename scalar, int kGroups, bool kTransposed>
void launch(const LowRank& p, cudaStream_t stream) {
  using S = Shape<kGroups>;
  const int64_t T = p.rows.T, r = p.rows.r, each = padded<kTransposed>(narrow(r));
  Arguments a{p, kTransposed ? kRow : 64, narrow(p.rows.M)};
  if (p.y0 && aligned(p.y0) && p.N > 0 && p.N % 8 == 0 && p.ldy0 % 8 == 0)
    a.ahead = narrow(std::max<int64_t>(0, p.rows.M - kAhead / (p.N * 2)));
  while (each % a.box != 0) a.box /= 2;
  Maps maps;
  describe_tensor<2>(maps.x, p.dtype, p.x, {p.K, p.rows.M}, {p.ldx}, {kDepth, S::kRows}, k128);
  if constexpr (kTransposed)
    describe_tensor<3>(maps.down, p.dtype, p.down, {r, p.K, T}, {r, p.K * r}, {kRow, kDepth, 1}, k32);
  else
    describe_tensor<3>(maps.down, p.dtype, p.down, {p.K, r, T}, {p.K, r * p.K}, {kDepth, a.box, 1}, k128);
  maps.run = maps.down;
  if constexpr (!kTransposed)
    describe_tensor<2>(maps.run, p.dtype, p.down, {p.K, T * r}, {p.K}, {kDepth, kNarrow}, k128);
  const int64_t blocks = ceil_div(p.rows.M, S::kRows), spare = multiprocessors() - p.followed;
  const int64_t most = ceil_div((p.rows.ids ? std::min<int64_t>(T, kFusedRows) : T) * each, kWide);
  const dim3 grid(blocks, std::max<int64_t>(1, std::min(spare / blocks, most)));
  launch_kernel("low_rank", &down_kernel<scalar, kGroups, kTransposed>, grid, S::kThreads, S::kBytes, stream, maps, a);
}

}  // namespace

void low_rank_sm90(const LowRank& p, cudaStream_t stream) {
  bool serves = p.x && !p.x_slab && p.dtype != Dtype::float32 && p.K > 0 && p.K % 8 == 0 && p.ldx % 8 == 0 &&
                p.rows.r > 0 && p.rows.r % 8 == 0 && p.rows.M <= INT32_MAX - 128 && p.rows.T * p.rows.r < 1 << 25 &&
                (!p.rows.ids || p.rows.T <= kMaxAdapters);
  // the ranks of a sum must follow each other without a gap
  serves = serves && (!p.down_transposed || p.rows.ids || p.rows.T <= 1 || p.rows.r % kRow == 0);
  serves = serves && aligned(p.x, p.down, p.bias_down, p.gate, p.h, p.scaled_h);
  PLORA_CHECK(serves, "low_rank_sm90: not what it was planned for (rows_on_hopper)");
  dispatch<2>("low_rank", p.dtype, [&](auto like) {
    using scalar = decltype(like);
    // Blocks of 64 rows while each gets a multiprocessor of its own; those of 128 read the factors half as often, and
    // may be so few that the kernel that follows starts beside all of them.
    const int64_t all = multiprocessors(), blocks = ceil_div(p.rows.M, 64), tall = ceil_div(p.rows.M, 128);
    const bool small = blocks <= all && (blocks + p.followed <= all || tall + p.followed > all);
    with_flags([&](auto tall, auto transposed) { launch<scalar, 1 + tall, transposed>(p, stream); }, !small,
               p.down_transposed);
  });
}

}  // namespace plora::cuda
