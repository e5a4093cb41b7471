// The low-rank half of the families on its own: h = act(x down^T + bias), y = y0 + s h up^T + s bias_up. Bound by
// memory, so nothing of x, y or the factors is staged: lanes load 16-byte vectors and multiply them as they come
// (mma.cuh). A block owns 32 rows. Its warps share out K for h and add their parts through shared memory in a fixed
// order; then they share out N. Rows go by groups of ranks: those of one adapter (ids: of every adapter that the
// block's rows chose, which then writes its own rows only; `all`: of each, with a y of its own), or the ranks of all
// adapters in one (sum). Rank c of a group is rank c % r of adapter first + c / r.

#include <algorithm>

#include "../device/mma.cuh"
#include "../device/overlap.cuh"
#include "adapters.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kThreads = 256, kRows = 32;  // a lane of a warp for each row
constexpr int kBlocks = 512;               // where rows give fewer blocks than this, they are split further

// A warp takes W tiles of 16 rows, one of the two or both, and one of kShares parts of K or of N: with few ranks W = 1,
// which needs fewer registers, with many W = 2, which reads the factors less often.
template <int W>
constexpr int kShares = 4 * W;
template <int W>
__device__ inline int share() {
  return threadIdx.x / 32 % kShares<W>;
}
template <int W>
__device__ inline int tile_row() {
  return threadIdx.x / 32 / kShares<W> * 16 * W;
}

template <typename scalar>
constexpr int kColumns = 4 * kVector<scalar>;  // that a warp takes at a time, of x and of y

// Columns of a warp's partial h in shared memory; the eight more keep fragments apart in the banks.
template <int NT>
constexpr int kPartial = 8 * NT + 8;
template <int NT>
constexpr int kPartialBytes = 4 * kRows * kPartial<NT> * static_cast<int>(sizeof(float));

struct Group {
  int adapter;   // the first; kNone: of the rows that have none
  int adapters;  // one; all of them (sum); none
  int width;     // ranks
  int key;       // the rows whose `owner` this is
  __device__ int of(int rank, int r) const { return adapters == 1 ? adapter : adapter + rank / r; }

  // What multiplies h of this rank before it is rounded, or the sum of its products: s h might not fit into float16.
  __device__ float before(const LowRank& p, int rank, int r) const {
    return adapters == 1 ? 1.f : p.scaling[of(rank, r)];
  }
  __device__ float after(const LowRank& p) const { return adapters == 1 ? p.scaling[adapter] : 1.f; }
};

// A block's memory. h is scaled where a group has several adapters, and zero from the last rank to a multiple of 16.
template <typename scalar>
struct Block {
  int64_t first_row;
  const int* owner;  // [kRows]: the adapter of a row, 0 where there are no ids, or kOutside
  scalar* h;         // [kRows, stride]
  int stride;
  float* partial;  // [4, kRows, kPartial]
  int64_t R;       // width of p.h
};

// Sets a row on its way from memory to L2; not more of it than L2 can hold of all blocks.
__device__ inline void prefetch(const void* row, int64_t bytes) {
  prefetch_to_l2(row, static_cast<uint32_t>(bytes < 2048 ? bytes : 2048));
}

// acc += x down^T over this warp's part of K, for at most 8 NT rows of `down`.
template <typename scalar, int NT, int W, bool VECTORS>
__device__ inline void multiply_down(const LowRank& p, int64_t first_row, const scalar* x, const scalar* down,
                                     int ranks, float (&acc)[W][NT][4]) {
  constexpr int kStep = kShares<W> * kColumns<scalar>, kUnroll = NT == 2 ? 3 : 1;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, K = static_cast<int>(p.K);
  const scalar* rows[2 * W];
#pragma unroll
  for (int i = 0; i < 2 * W; ++i)  // beyond the last row the last: nobody uses what comes of it
    rows[i] = x + std::min<int64_t>(first_row + tile_row<W>() + 8 * i + g, p.rows.M - 1) * p.ldx;
  const int own = g * K, clipped = std::min(g, (ranks - 1) % 8) * K;  // in a tile of 8 ranks, in a last one of fewer

  const auto step = [&](int k0, auto whole) {
    Vector<scalar> a[kUnroll][2 * W];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = k0 + u * kStep + q * kVector<scalar>, left = whole ? kVector<scalar> : K - k;
#pragma unroll
      for (int i = 0; i < 2 * W; ++i) a[u][i] = load<VECTORS, whole>(rows[i] + k, left);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = k0 + u * kStep + q * kVector<scalar>, left = whole ? kVector<scalar> : K - k;
      Vector<scalar> b[NT];
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const int rank = 8 * j + 8 <= ranks ? own : clipped;
        b[j] = 8 * j < ranks ? load<VECTORS, whole>(down + (8 * j * K + rank + k), left) : Vector<scalar>{};
      }
#pragma unroll
      for (int f = 0; f < kVector<scalar> / 4; ++f) {
        Operand<scalar> row[2 * W];
#pragma unroll
        for (int i = 0; i < 2 * W; ++i) row[i] = Operand<scalar>(a[u][i].four(f));
#pragma unroll
        for (int j = 0; j < NT; ++j)
          if (8 * j < ranks) {
            const Operand<scalar> factor(b[j].four(f));
#pragma unroll
            for (int i = 0; i < W; ++i) multiply(acc[i][j], row[2 * i], row[2 * i + 1], factor);
          }
      }
    }
  };
  int k0 = share<W>() * kColumns<scalar>;
  if constexpr (VECTORS)
#pragma unroll 1
    for (; k0 + (kUnroll - 1) * kStep + kColumns<scalar> <= K; k0 += kUnroll * kStep) step(k0, std::true_type());
#pragma unroll 1
  for (; k0 < K; k0 += kUnroll * kStep) step(k0, std::false_type());
}

// The h of a group: to shared memory where y is asked, to the h of the caller where `keep` is set. Without y the chunks
// of 8 NT ranks are shared out over gridDim.y.
template <typename scalar, int NT, int W, bool VECTORS>
__device__ inline void make_h(const LowRank& p, const Group& group, const Block<scalar>& block, bool keep) {
  constexpr int kRanks = 8 * NT;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, r = static_cast<int>(p.rows.r);
  scalar* kept = static_cast<scalar*>(p.h);
  if (group.adapter == kNone) {
    for (int i = threadIdx.x; keep && i < kRows * r; i += kThreads)
      if (block.owner[i / r] == kNone) kept[(block.first_row + i / r) * block.R + i % r] = from_float<scalar>(0);
    return;
  }
  const int unit = p.x_slab ? r : group.width;  // ranks that meet the same x
  const int per_unit = (unit + kRanks - 1) / kRanks, chunks = unit ? group.width / unit * per_unit : 0;
  for (int chunk = p.y ? 0 : blockIdx.y; chunk < chunks; chunk += p.y ? 1 : gridDim.y) {
    const int begin = chunk / per_unit * unit, rank = begin + chunk % per_unit * kRanks;
    const int ranks = std::min(kRanks, begin + unit - rank);
    const int64_t factor = static_cast<int64_t>(group.adapter) * r + rank;  // among the ranks of all adapters
    float acc[W][NT][4] = {};
    multiply_down<scalar, NT, W, VECTORS>(p, block.first_row,
                                          static_cast<const scalar*>(p.x) + group.of(rank, r) * p.x_slab,
                                          static_cast<const scalar*>(p.down) + factor * p.K, ranks, acc);
    const auto hand_in = [&](auto add) {
#pragma unroll
      for (int i = 0; i < 2 * W; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const int row = share<W>() % 4 * kRows + tile_row<W>() + 8 * i + g;
          float2* at = reinterpret_cast<float2*>(block.partial + row * kPartial<NT> + 8 * j + 2 * q);
          float2 sum = make_float2(acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]);
          if (add) sum.x += at->x, sum.y += at->y;
          *at = sum;
        }
    };
    if constexpr (W == 2) {  // there is space for four shares
      if (share<W>() >= 4) hand_in(std::false_type());
      __syncthreads();
    }
    if (share<W>() < 4) hand_in(std::bool_constant<W == 2>());
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kRows * kRanks / kThreads; ++n) {
      const int i = n * kThreads + threadIdx.x, row = i / kRanks, c = i % kRanks;
      if (c >= ranks) continue;
      const bool mine = block.owner[row] == group.key;
      const int64_t at = (block.first_row + row) * block.R + (p.rows.ids ? rank : factor) + c;
      const float bias = p.bias_down ? to_float(__ldg(static_cast<const scalar*>(p.bias_down) + factor + c)) : 0;
      const bool open = !p.gate || (mine && !(to_float(__ldg(static_cast<const scalar*>(p.gate) + at)) <= 0));
      float sum = bias;
#pragma unroll
      for (int w = 0; w < 4; ++w) sum += block.partial[(w * kRows + row) * kPartial<NT> + c];
      if (!open || (p.relu && sum < 0)) sum = 0;
      if (keep && mine) kept[at] = from_float<scalar>(sum);
      if (p.y) block.h[row * block.stride + rank + c] = from_float<scalar>(group.before(p, rank + c, r) * sum);
    }
    __syncthreads();
  }
}

// The h of a group from the caller, from `first` on as many ranks as there is space for.
template <typename scalar>
__device__ inline void read_h(const LowRank& p, const Group& group, const Block<scalar>& block, int first) {
  const int r = static_cast<int>(p.rows.r), ranks = std::min(group.width - first, block.stride);
  const scalar* h = static_cast<const scalar*>(p.h) + block.first_row * block.R +
                    (p.rows.ids ? 0 : static_cast<int64_t>(group.adapter) * r) + first;
  __syncthreads();  // all warps are done with what was there
  for (int row = threadIdx.x / 32; row < kRows; row += kThreads / 32)
    for (int c = threadIdx.x % 32; c < (ranks + 15) / 16 * 16; c += 32) {
      const bool real = c < ranks && block.owner[row] != kOutside;
      const float scaled = real ? to_float(h[row * block.R + c]) * group.before(p, first + c, r) : 0;
      block.h[row * block.stride + c] = from_float<scalar>(scaled);
    }
  __syncthreads();
}

// acc += h up^T for the h in shared memory, whose first rank is `first`, and the columns that this warp has from n on.
// Column c of product i stands for V (c / 2) + 2 i + c % 2 (V: kVector), so that a lane ends up with V neighbours.
template <typename scalar, int W, bool VECTORS>
__device__ inline void multiply_up(const LowRank& p, const Group& group, const Block<scalar>& block, int first, int n,
                                   float (&acc)[W][kVector<scalar> / 2][4]) {
  constexpr int V = kVector<scalar>, NT = V / 2;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, r = static_cast<int>(p.rows.r);
  const int column = n + g / 2 * V + g % 2, last = static_cast<int>(p.N) - 1 - column;
  const scalar* up = static_cast<const scalar*>(p.up) + (group.adapter * p.N + column) * r;
  const int64_t slab = p.N * r;  // between adapters
  const scalar* h = block.h + (tile_row<W>() + g) * block.stride + 4 * q;
  const int ranks = std::min(group.width - first, block.stride);
  int j = first + 4 * q;  // of the first of four ranks, in its adapter
  const scalar* from = up + j;
#pragma unroll 1
  for (int c = 0; c < ranks; c += 16) {
    Four<scalar> b[NT];
    if constexpr (VECTORS) {
      for (; j >= r; j -= r) from += slab - r;
#pragma unroll
      for (int i = 0; i < NT; ++i) {
        const auto* ranks = reinterpret_cast<const typename Four<scalar>::Raw*>(from + c + std::min(2 * i, last) * r);
        b[i].raw = first + c + 4 * q < group.width ? *ranks : typename Four<scalar>::Raw{};
      }
      j += 16;
    } else {
      for (int e = 0; e < 4; ++e) {
        const int rank = first + c + 4 * q + e;
#pragma unroll
        for (int i = 0; i < NT; ++i)
          b[i][e] =
              rank < group.width ? up[rank / r * slab + rank % r + std::min(2 * i, last) * r] : from_float<scalar>(0);
      }
    }
    Operand<scalar> a[2 * W];
#pragma unroll
    for (int i = 0; i < 2 * W; ++i)
      a[i] = Operand<scalar>(*reinterpret_cast<const Four<scalar>*>(h + 8 * i * block.stride + c));
#pragma unroll
    for (int i = 0; i < NT; ++i) {
      const Operand<scalar> factor(b[i]);
#pragma unroll
      for (int j = 0; j < W; ++j) multiply(acc[j][i], a[2 * j], a[2 * j + 1], factor);
    }
  }
}

// The y of a group's rows. NT == 0: its h is read, in parts if it is wider than `stride`.
template <typename scalar, int NT, int W, bool VECTORS>
__device__ inline void make_y(const LowRank& p, const Group& group, const Block<scalar>& block, int64_t slab,
                              int first_part, int parts) {
  constexpr int V = kVector<scalar>, kAll = kShares<W> * kColumns<scalar>;
  const int lane = threadIdx.x % 32, row = tile_row<W>() + lane / 4, q = lane % 4, N = static_cast<int>(p.N);
  const float scale = group.after(p);
  scalar* y = static_cast<scalar*>(p.y) + slab * p.y_slab + (block.first_row + row) * p.ldy;
  const scalar* y0 = static_cast<const scalar*>(p.y0) + slab * p.y0_slab + (block.first_row + row) * p.ldy0;
  for (int n0 = first_part * kAll; n0 < N; n0 += parts * kAll) {
    const int n = n0 + share<W>() * kColumns<scalar>, column = n + V * q;
    int left[2 * W];  // columns of this lane in a row of this group
    Vector<scalar> sum[2 * W];
#pragma unroll
    for (int i = 0; i < 2 * W; ++i) {
      left[i] = block.owner[row + 8 * i] == group.key ? N - column : 0;
      sum[i] = load<VECTORS>(y0 + 8 * i * p.ldy0 + column, p.y0 ? left[i] : 0);
    }
    float acc[W][V / 2][4] = {};
    if constexpr (NT > 0) {
      if (n < N) multiply_up<scalar, W, VECTORS>(p, group, block, 0, n, acc);
    } else {
      for (int first = 0; first < group.width; first += block.stride) {
        if (n0 == first_part * kAll || group.width > block.stride) read_h(p, group, block, first);
        if (n < N) multiply_up<scalar, W, VECTORS>(p, group, block, first, n, acc);
      }
    }
    float bias[V] = {};
    if (p.bias_up)
#pragma unroll 1
      for (int t = group.adapter; t < group.adapter + group.adapters; ++t) {
        const auto values = load<VECTORS>(static_cast<const scalar*>(p.bias_up) + t * p.N + column, N - column);
#pragma unroll
        for (int e = 0; e < V; ++e) bias[e] += p.scaling[t] * to_float(values[e]);
      }
#pragma unroll
    for (int i = 0; i < 2 * W; ++i) {
#pragma unroll
      for (int e = 0; e < V; ++e)
        sum[i][e] = from_float<scalar>(scale * acc[i / 2][e / 2][i % 2 * 2 + e % 2] + bias[e] + to_float(sum[i][e]));
      store<VECTORS>(y + 8 * i * p.ldy + column, sum[i], left[i]);
    }
  }
}

// NT: how many times eight ranks of h are made at a time; 0 where h is read. gridDim.y shares out adapters where each
// has its own y, else columns of y, or chunks of ranks where there is no y.
template <typename scalar, int NT, int W, bool VECTORS>
__global__ void __launch_bounds__(kThreads, W == 1 && sizeof(scalar) == 2 ? 3 : 2)
    low_rank_kernel(const __grid_constant__ LowRank p, int stride) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int owner[kRows], chosen[kRows], choices;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows, row = first_row + lane;

  if (VECTORS && NT && warp == 1 && row < p.rows.M)
    prefetch(static_cast<const scalar*>(p.x) + row * p.ldx, p.K * sizeof(scalar));
  if (VECTORS && p.y && p.y0 && warp == 2 && row < p.rows.M)
    prefetch(static_cast<const scalar*>(p.y0) + row * p.ldy0, p.N * sizeof(scalar));
  if (warp == 0) {
    const int mine = choice(p.rows, row);
    const unsigned same = __match_any_sync(~0u, mine);
    const unsigned firsts = __ballot_sync(~0u, mine != kOutside && lane == __ffs(same) - 1);
    owner[lane] = mine;
    if (firsts >> lane & 1) chosen[__popc(firsts & ((1u << lane) - 1))] = mine;
    choices = __popc(firsts);
  }

  const int T = static_cast<int>(p.rows.T), r = static_cast<int>(p.rows.r);
  const bool each = p.y && p.y_slab;
  const int width = p.rows.ids || each ? r : T * r;
  auto* h = reinterpret_cast<scalar*>(shared);
  const Block<scalar> block{
      first_row, owner, h, stride, reinterpret_cast<float*>(h + kRows * stride), p.rows.ids ? r : p.rows.T * r};
  if (NT && p.y && width % 16)  // no group writes there
    for (int i = threadIdx.x; i < kRows * 16; i += kThreads)
      if (width + i % 16 < stride) h[i / 16 * stride + width + i % 16] = from_float<scalar>(0);
  __syncthreads();

  const int groups = p.rows.ids ? choices : each ? T : 1;
  for (int i = each ? blockIdx.y : 0; i < groups; i += each ? gridDim.y : 1) {
    const int adapter = p.rows.ids ? chosen[i] : i;
    const int adapters = adapter == kNone ? 0 : p.rows.ids || each ? 1 : T;
    const Group group{adapter, adapters, adapters * r, p.rows.ids ? adapter : 0};
    if constexpr (NT > 0) make_h<scalar, NT, W, VECTORS>(p, group, block, p.h && (each || !p.y || blockIdx.y == 0));
    const bool unchanged = adapter == kNone && p.y == p.y0 && p.ldy == p.ldy0;
    if (p.y && !unchanged)
      make_y<scalar, NT, W, VECTORS>(p, group, block, each ? adapter : 0, each ? 0 : blockIdx.y, each ? 1 : gridDim.y);
  }
}

template <typename scalar, int NT, int W, bool VECTORS>
void enqueue(const LowRank& p, int stride, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.rows.M, kRows);
  int64_t parts = p.y_slab ? p.rows.T : ceil_div(p.N, kShares<W> * kColumns<scalar>);
  if constexpr (NT > 0)
    if (!p.y) parts = p.x_slab ? p.rows.T * ceil_div(p.rows.r, 8 * NT) : ceil_div(p.rows.R(), 8 * NT);
  const dim3 grid(blocks, std::max<int64_t>(std::min(kBlocks / blocks, parts), 1));
  const size_t bytes = kRows * stride * sizeof(scalar) + (NT ? kPartialBytes<NT> : 0);
  launch_kernel("low_rank", &low_rank_kernel<scalar, NT, W, VECTORS>, grid, kThreads, bytes, stream, p, stride);
}

// Ranks whose h fits into shared memory: as many as leave room for two blocks or more on an SM of the larger GPUs.
template <typename scalar>
int most_ranks() {
  const int row =
      std::min(shared_memory_limit() - 1024 - kPartialBytes<4>, 96 * 1024) / (kRows * static_cast<int>(sizeof(scalar)));
  return (row - 16) / 64 * 64 + 16;
}

template <typename scalar>
void launch(const LowRank& p, cudaStream_t stream) {
  constexpr int V = kVector<scalar>;
  const int64_t r = p.rows.r, width = p.rows.ids || (p.y && p.y_slab) ? r : p.rows.T * r;
  PLORA_CHECK(std::max({p.x ? p.K : 0, p.y ? p.N : 0, width}) < int64_t(1) << 25,  // offsets of 32 bits
              "low_rank: K, N and the number of ranks must be less than 2^25");
  PLORA_CHECK(!p.scaled_h, "low_rank: s h is made by Hopper's kernel alone");
  const int most = p.y ? most_ranks<scalar>() : 0;
  if (p.x && p.y && width > most) {
    PLORA_CHECK(p.h, "low_rank: more than ", most, " ranks need space for h");
    LowRank down = p, up = p;
    down.y = nullptr, down.y0 = nullptr;
    up.x = nullptr;
    launch<scalar>(down, stream);
    return launch<scalar>(up, stream);
  }

  const bool x_vectors = aligned(p.x) && aligned(p.down) && p.K % V == 0 && p.ldx % V == 0 && p.x_slab % V == 0;
  const bool y_vectors = aligned(p.y, p.y0, p.up, p.bias_up) && p.N % V == 0 && p.ldy % V == 0 && p.ldy0 % V == 0 &&
                         p.y_slab % V == 0 && p.y0_slab % V == 0 && r % 4 == 0;
  const bool vectors = (!p.x || x_vectors) && (!p.y || y_vectors);
  const int stride = p.y ? padded(static_cast<int>(std::min<int64_t>(width, most))) : 0;
  if (!p.x)
    vectors ? enqueue<scalar, 0, 1, true>(p, stride, stream) : enqueue<scalar, 0, 1, false>(p, stride, stream);
  else if (!vectors)
    enqueue<scalar, 2, 1, false>(p, stride, stream);
  else if ((p.x_slab ? r : width) > 16)
    enqueue<scalar, 4, 2, true>(p, stride, stream);
  else
    enqueue<scalar, 2, 1, true>(p, stride, stream);
}

}  // namespace

void low_rank(const LowRank& p, cudaStream_t stream) {
  if (p.rows.M == 0 || (!p.x && !p.y)) return;
  dispatch("low_rank", p.dtype, [&](auto tag) { launch<decltype(tag)>(p, stream); });
}

}  // namespace plora::cuda
