// y = y0 + s h up^T + s bias_up with h = act(x down^T + bias) for up to 512 rows in any order, as in serving: the rows
// of an adapter are gathered, so that each factor met is read once and one that no row chose never. Backward is the
// same with the factors swapped and transposed: dy for x, dx for y, g for h.
//
// Floor: the factors met pass once. 64 rows of 40 adapters of rank 16, 4096 -> 4096: 10 MB, 2.5 us at 4.2 TB/s, beside
// 8 for the frozen layer's own 34 MB. At that rate 3 MB must be on their way at any time, so every byte is asked for at
// once, and little else waits for its turn:
// - shrink: a block has a tile (up to 32 rows of an adapter), 16 ranks and a part of K, of which each warp loads 128
//   elements a row in one go; the sums go to memory in float32, a slab for each part of K. Then L2 fetches `up`.
// - expand: a block has a tile and 256 columns, or 8 or 16 rows of the tile where there are few blocks. It is launched
//   while shrink runs, loads its first factors, waits, adds up the parts in their order, and multiplies.
// Both find their tiles from the ids: no host waits, and no launch is spent on it. Where shrink runs beside the frozen
// layer's product, it leaves its tiles to expand, which then follows both.
//
// Ranks lie in chunks of 16 (the last of an adapter is filled up in registers), rows are the narrow side of a product
// (mma.cuh), so that 8 rows or fewer cost no more than one.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/mma.cuh"
#include "../device/overlap.cuh"
#include "adapters.cuh"
#include "few_rows.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kMaxRows = lora_plan::kFewRows, kMaxAdapters = lora_plan::kFewAdapters;
constexpr int kTile = 32, kEight = kTile / 8;  // rows of a tile; by how many times 8 a product takes them
constexpr int kThreads = 128, kWarps = kThreads / 32, kWarpColumns = 64, kColumns = kWarps * kWarpColumns;
template <typename scalar, bool VECTORS>  // of a multiprocessor
constexpr int kBlocks = sizeof(scalar) == 4 ? 2 : 4 + VECTORS;
constexpr int64_t kMaxParts = 16, kAhead = 24 << 20;  // of K; bytes that L2 keeps for expand
constexpr int kSteps = 4;                             // 16-byte vectors of a row that a lane loads in one go
template <typename scalar>
constexpr int kUnit = 4 * kSteps * kVector<scalar>;  // elements of a row that a warp loads in one go

struct Tile {
  int adapter;  // kNone: of rows that have none
  int rows;     // 0: there is no such tile
  int first;    // of the adapter's tiles
  int16_t row[kTile];
};

struct Arguments {
  LowRank p;
  FewSums sums;
  Tile* tiles;  // behind the sums, that shrink found; or null: expand finds them itself
  int groups;   // of blocks that share the rows of a tile, by eights in turn
  bool idle;    // rows without an adapter are written too
  bool ahead;   // L2 has space for `up`
};

// For finding a tile.
struct Choices {
  uint32_t rows[kMaxRows / 32];  // a bit for each row of the adapter
  int count[kMaxRows + 1];       // of an adapter's rows; the last of those that have none
  int adapter, part;
};

// A block's tile, by all threads. Of fewer adapters than rows, the first blocks have the first rows of each, and of
// those that have none; then come the tiles beyond, of the first adapter that has any, of the next, ... Of more
// adapters, a block has the tile that begins with its row, if one does.
__device__ inline void find(const Rows& rows, int index, bool idle, Choices& choices, Tile& tile) {
  constexpr int kEach = kMaxRows / kThreads;
  const int M = static_cast<int>(rows.M), T = static_cast<int>(rows.T), thread = threadIdx.x, lane = thread % 32;
  if (!rows.ids) {
    const int first = index * kTile;
    if (thread < kTile) tile.row[thread] = static_cast<int16_t>(first + thread);
    if (thread == 0) tile.adapter = 0, tile.rows = max(min(M - first, kTile), 0), tile.first = index == 0;
    __syncthreads();
    return;
  }
  int mine[kEach], adapter = T < M ? (index < T ? index : kNone) : choice(rows, index), part = 0;
  read_choices(rows, thread, kThreads, mine);
  if (T < M && index > T) {
    for (int t = thread; t <= T; t += kThreads) choices.count[t] = 0;
    if (thread == 0) choices.adapter = kOutside, choices.part = 0;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      if (mine[e] != kOutside) atomicAdd(&choices.count[mine[e] >= 0 ? mine[e] : T], 1);
    __syncthreads();
    if (thread < 32) {
      const int each = T / 32 + 1;
      const auto beyond = [&](int t) { return t > T ? 0 : max((choices.count[t] - 1) / kTile, 0); };
      int own = 0;
      for (int t = lane * each; t < (lane + 1) * each; ++t) own += beyond(t);
      int left = index - T - 1 - (sum_up_to(lane, own) - own), t = lane * each;
      if (left >= 0 && left < own) {
        for (; left >= beyond(t); ++t) left -= beyond(t);
        choices.adapter = t < T ? t : kNone, choices.part = left + 1;
      }
    }
    __syncthreads();
    adapter = choices.adapter, part = choices.part;
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const uint32_t hits = __ballot_sync(~0u, mine[e] == adapter && adapter != kOutside);
    if (lane == 0) choices.rows[thread / 32 + e * kWarps] = hits;
  }
  __syncthreads();
  int total = 0, place[kEach] = {}, leader = 0;
#pragma unroll
  for (int w = 0; w < kMaxRows / 32; ++w) {
    const uint32_t hits = choices.rows[w];
    if (w % kWarps == thread / 32) place[w / kWarps] = total + __popc(hits & ((1u << lane) - 1));
    if (w == index / 32) leader = total + __popc(hits & ((1u << index % 32) - 1));
    total += __popc(hits);
  }
  const bool begins = T < M || leader % kTile == 0;
  if (T >= M) part = leader / kTile;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int at = place[e] - part * kTile;
    if (mine[e] == adapter && adapter != kOutside && at >= 0 && at < kTile)
      tile.row[at] = static_cast<int16_t>(thread + e * kThreads);
  }
  if (thread == 0) {
    tile.adapter = adapter, tile.first = part == 0;
    tile.rows = begins && (idle || adapter >= 0) ? max(min(total - part * kTile, kTile), 0) : 0;
  }
  __syncthreads();
}

// kVector neighbouring elements, from k on, of ranks 2 g and 2 g + 1 of a chunk that ends with rank `last`: beyond come
// the last ones again. `down` is [T, r, K], or transposed [T, K, r]; VECTORS: K is a whole number of vectors, there r
// is even, and all is aligned.
template <bool TRANSPOSED, bool VECTORS, typename scalar>
__device__ inline void load_pair(const scalar* down, int g, int last, int r, int k, int K, Vector<scalar>& even,
                                 Vector<scalar>& odd) {
  const int first = min(2 * g, last), second = min(2 * g + 1, last);
  if constexpr (!TRANSPOSED) {
    even = load<VECTORS>(down + first * static_cast<int64_t>(K) + k, K - k);
    odd = load<VECTORS>(down + second * static_cast<int64_t>(K) + k, K - k);
  } else {
    struct alignas(2 * sizeof(scalar)) Pair {
      scalar even, odd;
    };
    if constexpr (VECTORS) {
      // Read in any case, as a branch would make the loads of one vector wait for those of another.
      const scalar* const row = down + min(k, K - kVector<scalar>) * static_cast<int64_t>(r) + (first & ~1);
#pragma unroll
      for (int e = 0; e < kVector<scalar>; ++e) {
        const Pair two = *reinterpret_cast<const Pair*>(row + e * r);
        even[e] = two.even, odd[e] = two.odd;
      }
      if (k >= K) even = odd = Vector<scalar>{};
    } else {
      even = odd = Vector<scalar>{};
#pragma unroll
      for (int e = 0; e < kVector<scalar>; ++e) {
        const scalar* const row = down + (k + e) * static_cast<int64_t>(r);
        if (k + e >= K) break;
        even[e] = row[first], odd[e] = row[second];
      }
    }
  }
}

// The grid: tiles, parts of K, chunks of ranks of all adapters.
template <typename scalar, bool TRANSPOSED, bool VECTORS>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar, VECTORS> - 1)
    shrink_kernel(const __grid_constant__ Arguments a) {
  constexpr int V = kVector<scalar>, kPitch = kChunk + 4;
  __shared__ Choices choices;
  __shared__ Tile tile;
  __shared__ float sums[kWarps][kTile][kPitch];
  const LowRank& p = a.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4, K = static_cast<int>(p.K);
  launch_successor();
  find(p.rows, blockIdx.x, a.idle, choices, tile);
  if (a.tiles && blockIdx.y + blockIdx.z == 0 && threadIdx.x < sizeof(Tile) / 4)
    reinterpret_cast<int*>(a.tiles + blockIdx.x)[threadIdx.x] = reinterpret_cast<const int*>(&tile)[threadIdx.x];
  const int rows = tile.adapter >= 0 ? tile.rows : 0, t = tile.adapter + blockIdx.z / a.sums.chunks,
            rank = blockIdx.z % a.sums.chunks * kChunk;
  if (rows == 0) return;
  const int limit = limit_of(p, t);

  if (rank >= limit) return;  // nobody reads what would come of it

  // Of a product, row g of the first operand stands for rank 2 g, row g + 8 for the one after it. Beyond the last rank
  // and row come the last: nobody uses what comes of it.
  const int r = static_cast<int>(p.rows.r);
  const scalar* const down = static_cast<const scalar*>(p.down) + t * p.rows.r * K + rank * (TRANSPOSED ? 1 : p.K);
  float acc[kEight][4] = {};
#pragma unroll 1
  for (int k0 = (blockIdx.y * kWarps + warp) * kUnit<scalar>; k0 < K; k0 += a.sums.parts * kWarps * kUnit<scalar>) {
    Vector<scalar> factors[kSteps][2];
#pragma unroll
    for (int v = 0; v < kSteps; ++v) {
      const int k = k0 + (4 * v + q) * V;
      load_pair<TRANSPOSED, VECTORS>(down, g, limit - rank - 1, r, k, K, factors[v][0], factors[v][1]);
    }
#pragma unroll
    for (int i = 0; i < kEight; i += 2) {
      if (8 * i >= rows) break;
      Vector<scalar> own[2][kSteps];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const scalar* const x = static_cast<const scalar*>(p.x) + tile.row[min(8 * (i + b) + g, rows - 1)] * p.ldx;
#pragma unroll
        for (int v = 0; v < kSteps; ++v) {
          const int k = k0 + (4 * v + q) * V;
          own[b][v] = load<VECTORS>(x + k, K - k);
        }
      }
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int v = 0; v < kSteps; ++v)
#pragma unroll
          for (int f = 0; f < V / 4; ++f)
            multiply(acc[i + b], Operand<scalar>(factors[v][0].four(f)), Operand<scalar>(factors[v][1].four(f)),
                     Operand<scalar>(own[b][v].four(f)));
    }
  }
  const int64_t bytes = p.N * p.rows.r * static_cast<int64_t>(sizeof(scalar));  // of `up`, once `down` is here
  if (a.ahead && threadIdx.x == 0 && tile.first && rank == 0) {
    const int64_t share = (bytes / 16 + a.sums.parts - 1) / a.sums.parts * 16, begin = blockIdx.y * share;
    const int64_t size = min(share, bytes - begin);
    if (size > 0) prefetch_to_l2(static_cast<const char*>(p.up) + t * bytes + begin, static_cast<uint32_t>(size));
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[warp][8 * i + 2 * q + e % 2][2 * g + e / 2] = acc[i][e];
  __syncthreads();
  float* const to = a.sums.partial + blockIdx.y * p.rows.M * a.sums.width + blockIdx.z * kChunk;
  for (int i = threadIdx.x; i < rows * kChunk; i += kThreads) {
    const int row = i / kChunk, c = i % kChunk;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][row][c];
    to[static_cast<int64_t>(tile.row[row]) * a.sums.width + c] = sum;
  }
}

// Four ranks of a row of `up`, of which `left` count. VECTORS: all four are there, and aligned.
template <bool VECTORS, typename scalar>
__device__ inline Four<scalar> load_ranks(const scalar* from, int left) {
  Four<scalar> v{};
  if (VECTORS && left > 0) v.raw = *reinterpret_cast<const typename Four<scalar>::Raw*>(from);
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (!VECTORS && e < left) v[e] = from[e];
  return v;
}

// The grid: the parts of 256 columns of a tile, of the next, ... A lane has 8 neighbouring columns of two rows of 8.
// `up` is [T, N, r], or transposed [T, r, N].
template <typename scalar, bool TRANSPOSED, bool VECTORS>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar, VECTORS>)
    expand_kernel(const __grid_constant__ Arguments a) {
  constexpr int V = kVector<scalar>, kVectors = 8 / V;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Choices choices;
  __shared__ Tile tile;
  const LowRank& p = a.p;
  launch_successor();  // in backward few_rows_grads
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int N = static_cast<int>(p.N), r = static_cast<int>(p.rows.r), slabs = max((N + kColumns - 1) / kColumns, 1);
  const int slab = blockIdx.x % slabs, group = blockIdx.x / slabs % a.groups, index = blockIdx.x / slabs / a.groups;
  const int column = slab * kColumns + warp * kWarpColumns + 8 * g;
  if (a.tiles) {
    if (threadIdx.x < sizeof(Tile) / 4)
      reinterpret_cast<int*>(&tile)[threadIdx.x] = reinterpret_cast<const int*>(a.tiles + index)[threadIdx.x];
    __syncthreads();
  } else {
    find(p.rows, index, a.idle, choices, tile);
  }
  const int rows = 8 * group < tile.rows ? tile.rows : 0, all = a.sums.width,
            width = rows > 0 && tile.adapter >= 0 ? all : 0, per = a.sums.chunks * kChunk, adapters = a.sums.adapters;

  // Of product i, row g of the first operand stands for column 2 i of the lane's g, row g + 8 for the one after it.
  struct Factors {
    Four<scalar> up[4][2];
    int ranks;  // of the four that count
  };
  const auto load_up = [&](int c) {
    const int place = adapters > 1 ? c / per : 0, t = tile.adapter + place, rank = c - place * per + 4 * q;
    const int ranks = limit_of(p, t) - rank;
    const scalar* const up = static_cast<const scalar*>(p.up) + t * p.N * r;
    Factors f;
    f.ranks = ranks;
    if constexpr (!TRANSPOSED) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        f.up[i / 2][i % 2] = load_ranks<VECTORS>(up + static_cast<int64_t>(min(column + i, N - 1)) * r + rank, ranks);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int n = column + v * V;
          const auto some = load<VECTORS>(up + (rank + e) * p.N + n, e < ranks ? N - n : 0);
#pragma unroll
          for (int i = 0; i < V; ++i) f.up[(v * V + i) / 2][i % 2][e] = some[i];
        }
    }
    return f;
  };
  Vector<scalar> y[2][kVectors];
  const auto at = [&](int i, int b) { return tile.row[min(8 * i + 2 * q + b, rows - 1)]; };
  const auto left = [&](int i, int b) { return 8 * i + 2 * q + b < rows ? N - column : 0; };
  const auto load_y = [&](int i) {
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        y[b][v] = load<VECTORS>(static_cast<const scalar*>(p.y0) + at(i, b) * p.ldy0 + column + v * V,
                                p.y0 ? left(i, b) - v * V : 0);
  };
  Factors next{};
  if (rows > 0) {
    load_y(group);
    if (width > 0 && N > 0) next = load_up(0);
  }
  wait_for_predecessor();
  if (rows == 0) return;

  scalar* const h = reinterpret_cast<scalar*>(shared);
  scalar* const kept = slab + group == 0 ? static_cast<scalar*>(p.h) : nullptr;
  const int pitch = padded(all);
  for (int i = threadIdx.x; i < rows * all / 4; i += kThreads) {  // four ranks
    const int row = i / (all / 4), c = i % (all / 4) * 4;
    const Four<scalar> four = finish_ranks(p, a.sums, tile.row[row], tile.adapter, c, kept);
    *reinterpret_cast<Four<scalar>*>(h + row * pitch + c) = four;
  }
  __syncthreads();
  if (column - 8 * g >= N || (width == 0 && p.y == p.y0 && p.ldy == p.ldy0)) return;

  const float scale = width > 0 && adapters == 1 ? p.scaling[tile.adapter] : 1.f;
  float bias[8] = {};
  if (p.bias_up && width > 0)
    for (int t = tile.adapter; t < tile.adapter + adapters; ++t)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        bias[e] += p.scaling[t] * to_float(static_cast<const scalar*>(p.bias_up)[t * p.N + min(column + e, N - 1)]);
#pragma unroll 1
  for (int i = group; 8 * i < rows; i += a.groups) {
    if (i > group) load_y(i);
    float acc[4][4] = {};
#pragma unroll 1
    for (int c = 0; c < width; c += kChunk) {
      Factors now = next;
      if (VECTORS && now.ranks < 4)  // only here, as it waits for them
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (e >= now.ranks) now.up[j / 2][j % 2][e] = from_float<scalar>(0);
      if (c + kChunk < width || 8 * (i + a.groups) < rows) next = load_up(c + kChunk < width ? c + kChunk : 0);
      const Operand<scalar> own(*reinterpret_cast<const Four<scalar>*>(h + (8 * i + g) * pitch + c + 4 * q));
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply(acc[j], Operand<scalar>(now.up[j][0]), Operand<scalar>(now.up[j][1]), own);
    }
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const int n = v * V + e;
          y[b][v][e] = from_float<scalar>(scale * acc[n / 2][b + n % 2 * 2] + bias[n] + to_float(y[b][v][e]));
        }
        store<VECTORS>(static_cast<scalar*>(p.y) + at(i, b) * p.ldy + column + v * V, y[b][v], left(i, b) - v * V);
      }
  }
}

// How many blocks look for a tile (find).
int64_t most_tiles(const LowRank& p) {
  const int64_t M = p.rows.M, T = p.rows.T;
  return !p.rows.ids ? ceil_div(M, kTile) : T < M ? T + 1 + (M - 1) / kTile : M;
}

// Their number, where shrink leaves the tiles to expand.
int64_t tiles_left(const LowRank& p, bool beside) { return beside && p.rows.ids ? most_tiles(p) : 0; }

size_t bytes_of(const Arguments& a, bool beside) {
  return sizeof(float) * a.sums.parts * a.p.rows.M * a.sums.width + sizeof(Tile) * tiles_left(a.p, beside);
}

// `memory`: bytes_of what comes of none.
template <typename scalar>
Arguments arguments(const LowRank& p, bool beside, void* memory = nullptr) {
  const int64_t T = p.rows.T, r = p.rows.r;
  Arguments a{p};
  FewSums& sums = a.sums;
  sums.adapters = narrow(p.rows.ids ? 1 : T), sums.chunks = narrow(ceil_div(r, kChunk));
  sums.width = sums.adapters * sums.chunks * kChunk, sums.columns = narrow(padded_rank(r));
  a.idle = p.h || p.y != p.y0 || p.ldy != p.ldy0;
  // A part of K is a unit for each warp, or more where there are more blocks than run at once.
  const int64_t tiles = most_tiles(p), units = ceil_div(p.K, kWarps * kUnit<scalar>);
  const int64_t blocks = tiles * sums.width / kChunk, most = 4 * multiprocessors();
  const int64_t each = std::max({units * blocks / most, ceil_div(units, kMaxParts), int64_t{1}});
  sums.parts = narrow(ceil_div(units, each));
  sums.partial = static_cast<float*>(memory);
  if (memory && tiles_left(p, beside) > 0)
    a.tiles = reinterpret_cast<Tile*>(sums.partial + sums.parts * p.rows.M * sums.width);
  const int64_t of_y = tiles * std::max<int64_t>(ceil_div(p.N, kColumns), 1);
  a.groups = 2 * of_y <= multiprocessors() ? 4 : of_y <= multiprocessors() ? 2 : 1;

  const int64_t bytes = p.N * r * static_cast<int64_t>(sizeof(scalar));
  a.ahead = aligned(p.up) && bytes % 16 == 0 && std::min(tiles, T) * bytes <= kAhead && bytes < sums.parts << 20;
  return a;
}

// f with the types of the elements and of whether the factors are transposed.
template <typename F>
void dispatch_few(const LowRank& p, const F& f) {
  dispatch("few_rows", p.dtype,
           [&](auto tag) { with_flags([&](auto transposed) { f(tag, transposed); }, p.down_transposed); });
}

}  // namespace

size_t few_rows_bytes(const LowRank& p, bool beside) {
  size_t bytes = 0;
  dispatch("few_rows", p.dtype, [&](auto tag) { bytes = bytes_of(arguments<decltype(tag)>(p, beside), beside); });
  return bytes;
}

FewSums few_rows_shrink(const LowRank& p, void* memory, bool beside, cudaStream_t stream) {
  FewSums sums{};
  dispatch_few(p, [&](auto tag, auto transposed) {
    using scalar = decltype(tag);
    constexpr int V = kVector<scalar>;
    const Arguments a = arguments<scalar>(p, beside, memory);
    const bool vectors =
        aligned(p.x) && aligned(p.down) && p.K % V == 0 && p.ldx % V == 0 && (!transposed || p.rows.r % 2 == 0);
    const auto shrink = vectors ? &shrink_kernel<scalar, transposed, true> : &shrink_kernel<scalar, transposed, false>;
    const dim3 grid(most_tiles(p), a.sums.parts, a.sums.width / kChunk);
    share_all_memory(shrink);
    launch_kernel("few_rows", shrink, grid, kThreads, 0, stream, a);
    sums = a.sums;
  });
  return sums;
}

void few_rows_expand(const LowRank& p, void* memory, bool beside, cudaStream_t stream) {
  PLORA_CHECK(!beside || (p.y == p.y0 && p.ldy == p.ldy0), "few_rows: not what shrink left its tiles for");
  dispatch_few(p, [&](auto tag, auto transposed) {
    using scalar = decltype(tag);
    constexpr int V = kVector<scalar>;
    const Arguments a = arguments<scalar>(p, beside, memory);
    const bool vectors = aligned(p.y, p.y0, p.up) && p.N % V == 0 && p.ldy % V == 0 && p.ldy0 % V == 0 &&
                         (transposed || p.rows.r % 4 == 0);
    const auto expand = vectors ? &expand_kernel<scalar, transposed, true> : &expand_kernel<scalar, transposed, false>;
    const int64_t tiles = most_tiles(p) * std::max<int64_t>(ceil_div(p.N, kColumns), 1);
    launch_overlapped("few_rows", expand, tiles * a.groups, kThreads, kTile * padded(a.sums.width) * sizeof(scalar),
                      stream, !beside, a);
  });
}

void few_rows(const LowRank& p, const Allocator& workspace, cudaStream_t stream) {
  void* const memory = workspace(few_rows_bytes(p, false));
  few_rows_shrink(p, memory, false, stream);
  few_rows_expand(p, memory, false, stream);
}

}  // namespace plora::cuda
