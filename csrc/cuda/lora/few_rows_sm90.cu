// The frozen layer and its adapters for few rows, for Hopper: y = x W^T + bias + y0 + s h up^T + s bias_up, and with
// transposed factors dx = dy W + s g A.
//
// Floor: W and the factors met pass once. So W streams through a ring of shared memory from the moment the kernel
// starts, while the first half of the low-rank part (few_rows.cu) still runs, which is waited for when W has passed.
// Two blocks a multiprocessor keep 144 KB on their way.
//
// A block has 128 columns of y, of all rows, and a part of K; the blocks of a cluster have the parts of the same
// columns. 128 rows of W are the tall side of a product, the rows of x the narrow one. Then each block adds the
// low-rank part to the sums of its share of the rows, and last what the blocks of the cluster have of them, in their
// order. What a block runs through once is kept short: it comes from memory, too.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/mma_smem.cuh"
#include "../device/overlap.cuh"
#include "../device/ring.cuh"
#include "../device/tensor_map.cuh"
#include "adapters.cuh"
#include "few_rows.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kColumns = 128, kDepth = 64, kWarps = 8, kThreads = 32 * kWarps, kMaxBlocks = 8;
constexpr int kMaxRows = lora_plan::kFewRowsSm90;
// Rows times their ranks, whose h a block has space for.
constexpr int kMaxRanks = lora_plan::kFewRanksSm90;

// `kN`: rows, filled up with zeros. A stage: W [128, 64], or transposed two boxes [64, 64], and x [kN, 64], each row
// 128 bytes, swizzled. The sums take the place of the stages, rows of 128 columns, padded against bank conflicts. `up`:
// a chunk of ranks for each warp, [128, 16] or transposed, and another one behind the sums.
template <int kN>
struct Layout {
  static constexpr uint32_t kBytesW = kColumns * kDepth * 2, kStage = kBytesW + kN * kDepth * 2;
  static constexpr int kStages = kN == 8 ? 4 : 3;
  static constexpr int kPitch = kColumns + 4;
  static constexpr uint32_t kBytesUp = kColumns * kChunk * 2, kUp = kStages * kStage, kH = kUp + kWarps * kBytesUp;
  static constexpr uint32_t kSums = kN * kPitch * 4, kRows = kH + kMaxRanks * 2, kBarriers = kRows + kMaxRows * 8;
  static constexpr uint32_t kBytes = kBarriers + 8 * (2 * kStages + 2 * kWarps);
  static_assert(kSums + kWarps * kBytesUp <= kStages * kStage && 2 * (kBytes + 1024) <= 233472,
                "two blocks a multiprocessor");
};

struct Maps {
  CUtensorMap x, weight, up;
};

struct Row {
  int adapter;  // negative: none
  float scale;  // of its low-rank part; where a row meets several adapters, h has theirs
};

struct Arguments {
  LowRank p;
  FewSums sums;
  const void* bias;
};

// 16 ranks of a row of h times those of `up`, onto its sums.
template <typename scalar, bool kTransposed>
__device__ inline void add_ranks(float* row, const scalar* up, const scalar* h, int left, float scale) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  // h is the first column of a product's narrow side. Of `up` ranks beyond `left` may be anything.
  const auto two = [&](int k) { return g == 0 ? *reinterpret_cast<const uint32_t*>(h + k + 2 * q) : 0u; };
  const auto mask = [&](int k) {
    return (k + 2 * q < left ? 0xffffu : 0u) | (k + 2 * q + 1 < left ? 0xffff0000u : 0u);
  };
  const uint32_t lower = two(0), upper = two(8), lower_mask = mask(0), upper_mask = mask(8);
#pragma unroll 2
  for (int i = 0; i < kColumns; i += 16) {
    typename smem::Step<scalar>::Left f;
    if constexpr (kTransposed)
      f.load_transposed(up + i, kColumns);
    else
      f.load(up + i * kChunk, kChunk);
    float sum[4] = {};
    mma_m16n8k16<scalar>(sum, f.x[0] & lower_mask, f.x[1] & lower_mask, f.x[2] & upper_mask, f.x[3] & upper_mask, lower,
                         upper);
    if (q == 0) row[i + g] += scale * sum[0], row[i + g + 8] += scale * sum[2];
  }
}

// Four neighbouring elements of memory, added.
template <typename scalar>
__device__ inline void add(float (&sum)[4], const void* from, int64_t at, float scale = 1) {
  Four<scalar> v;
  v.raw = __ldg(reinterpret_cast<const uint2*>(static_cast<const scalar*>(from) + at));
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] += scale * to_float(v[e]);
}

template <typename scalar, int kN, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2)
    few_rows_sm90_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<kN>;
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const LowRank& p = a.p;
  const uint32_t stages = sm90::smem_address(dynamic), blocks = sm90::cluster_blocks(), block = sm90::cluster_rank();
  const int tile = blockIdx.x / blocks, column = tile * kColumns, M = static_cast<int>(p.rows.M);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int k_steps = (static_cast<int>(p.K) + kDepth - 1) / kDepth;
  const int first = k_steps * block / blocks, steps = k_steps * (block + 1) / blocks - first;
  sm90::Ring ring{stages, stages + L::kBarriers, L::kStage, L::kStages};
  const uint32_t ups = ring.barriers + 16 * L::kStages, come = ups + 16 * warp;  // two for each warp's ranks of `up`

  const bool chosen = sm90::elect();  // of each warp; the first one's feeds the ring
  const auto feed = [&](int i, const sm90::Ring& stage) {
    const uint32_t full = stage.full(), to = stage.at();
    const int k = (first + i) * kDepth;
    sm90::barrier_arrive_expect(full, L::kStage, chosen);
    if constexpr (kTransposed) {
      sm90::load_2d(&maps.weight, full, to, column, k, chosen);
      sm90::load_2d(&maps.weight, full, to + L::kBytesW / 2, column + 64, k, chosen);
    } else {
      sm90::load_2d(&maps.weight, full, to, k, column, chosen);
    }
    sm90::load_2d(&maps.x, full, to + L::kBytesW, k, 0, chosen);
  };
  if (warp == 0) {
    if (chosen) {
      ring.init(kWarps);
      for (int i = 0; i < 2 * kWarps; ++i) sm90::barrier_init(ups + 8 * i, 1);
      sm90::fence_barrier_init();
    }
    for (sm90::Ring stage = ring; stage.index < min(steps, L::kStages); ++stage.index) feed(stage.index, stage);
  }
  // Rows block, block + blocks, ... are this block's, of which each warp takes one after the other.
  const int rows = M > static_cast<int>(block) ? (M - block + blocks - 1) / blocks : 0;
  Row* const row = reinterpret_cast<Row*>(dynamic + L::kRows);
  if (threadIdx.x < rows) {
    const int t = choice(p.rows, block + blocks * threadIdx.x);
    row[threadIdx.x] = {t, t >= 0 && a.sums.adapters == 1 ? p.scaling[t] : 1.f};
  }
  __syncthreads();

  // A warp's rows and chunks of their ranks, one after the other; it asks for `up` two ahead of its use.
  struct Step {
    int j, c;
  };
  const int width = a.sums.width, per = a.sums.chunks * kChunk;
  const auto skip_idle = [&](Step& at) {
    while (at.j < rows && row[at.j].adapter < 0) at.j += kWarps;
  };
  const auto advance = [&](Step& at) {
    at.c += kChunk;
    if (at.c < width) return;
    at.c = 0, at.j += kWarps;
    skip_idle(at);
  };
  const auto up_at = [&](int half) { return (half ? L::kSums : L::kUp) + warp * L::kBytesUp; };
  Step now{warp, 0};
  skip_idle(now);
  Step ahead = now;
  int asked = 0;
  const auto ask = [&] {
    if (ahead.j >= rows) return;
    const int half = asked % 2, t = row[ahead.j].adapter + ahead.c / per, rank = ahead.c % per;
    sm90::barrier_arrive_expect(come + 8 * half, L::kBytesUp, chosen);
    sm90::load_3d(&maps.up, come + 8 * half, stages + up_at(half), kTransposed ? column : rank,
                  kTransposed ? rank : column, t, chosen);
    ++asked;
    advance(ahead);
  };
  ask();

  float acc[kN / 2] = {};
  constexpr uint64_t kLayout = sm90::operand_layout(sm90::Swizzle::b128, 16, 1024);
  constexpr uint64_t kStepW = (kTransposed ? 16 * 128 : 32) >> 4;
#pragma unroll 1
  for (int i = 0; i < steps; ++i, ring.next()) {
    ring.wait();
    const uint64_t left = sm90::operand(kLayout, ring.at() + warp / 4 * (L::kBytesW / 2));
    const uint64_t right = sm90::operand(kLayout, ring.at() + L::kBytesW);
    sm90::hold(acc);
    sm90::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
      sm90::wgmma<kN, scalar, 0, kTransposed>(acc, left + k * kStepW, right + k * 2);
    sm90::wgmma_commit();
    sm90::hold(acc);
    sm90::wgmma_wait<0>();  // which costs nothing: a stage takes longer to come
    sm90::hold(acc);
    sm90::release(ring.empty());
    if (warp == 0 && i + L::kStages < steps) {
      sm90::barrier_wait(ring.empty(), ring.phase);
      feed(i + L::kStages, ring);
    }
    __syncwarp();
  }
  launch_successor();
  __syncthreads();  // nobody reads the stages any more
  ask();
  float* const sums = reinterpret_cast<float*>(dynamic);
  float* const to = sums + warp / 4 * 64 + warp % 4 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) to[(i / 4 * 8 + lane % 4 * 2 + i % 2) * L::kPitch + i % 4 / 2 * 8] = acc[i];

  wait_for_predecessor();
  scalar* const h = reinterpret_cast<scalar*>(dynamic + L::kH);
#pragma unroll 1
  for (int i = 4 * threadIdx.x; i < rows * width; i += 4 * kThreads)
    *reinterpret_cast<Four<scalar>*>(h + i) =
        finish_ranks(p, a.sums, block + blocks * (i / width), row[i / width].adapter, i % width,
                     tile == 0 ? static_cast<scalar*>(p.h) : nullptr);
  __syncthreads();

#pragma unroll 1
  for (int n = 0; now.j < rows; ++n) {
    sm90::barrier_wait(come + n % 2 * 8, n / 2 & 1);
    add_ranks<scalar, kTransposed>(sums + (block + blocks * now.j) * L::kPitch,
                                   reinterpret_cast<const scalar*>(dynamic + up_at(n % 2)), h + now.j * width + now.c,
                                   limit_of(p, row[now.j].adapter + now.c / per) - now.c % per, row[now.j].scale);
    __syncwarp();
    advance(now);
    ask();
  }
  sm90::cluster_sync();

  const int n = column + 4 * lane;
#pragma unroll 1
  for (int j = warp; j < rows && n < p.N; j += 2 * kWarps) {
    float4 some[2][kMaxBlocks];  // of two rows: the way to another block is long
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int i = 0; i < kMaxBlocks; ++i) {
        const int m = block + blocks * min(j + u * kWarps, rows - 1);
        some[u][i] = i < blocks
                         ? sm90::load_from_block(sm90::place_in_block(stages + 4 * (m * L::kPitch + 4 * lane), i))
                         : float4{};
      }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int own = j + u * kWarps, m = block + blocks * own;
      if (own >= rows) break;
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < kMaxBlocks; ++i)
        sum[0] += some[u][i].x, sum[1] += some[u][i].y, sum[2] += some[u][i].z, sum[3] += some[u][i].w;
      if (a.bias) add<scalar>(sum, a.bias, n);
      if (p.y0) add<scalar>(sum, p.y0, m * p.ldy0 + n);
      if (p.bias_up)
        for (int t = row[own].adapter, i = t; t >= 0 && i < t + a.sums.adapters; ++i)
          add<scalar>(sum, p.bias_up, i * p.N + n, p.scaling[i]);
      Four<scalar> y;
#pragma unroll
      for (int e = 0; e < 4; ++e) y[e] = from_float<scalar>(sum[e]);
      *reinterpret_cast<uint2*>(static_cast<scalar*>(p.y) + m * p.ldy + n) = y.raw;
    }
  }
  __syncwarp();
  sm90::cluster_sync();  // the others have read what is here
#endif
}

template <typename scalar, int kN, bool kTransposed>
void launch(Maps& maps, const Arguments& a, const void* weight, cudaStream_t stream) {
  constexpr auto kPlain = CU_TENSOR_MAP_SWIZZLE_NONE;
  const LowRank& p = a.p;
  const int64_t K = p.K, N = p.N, T = p.rows.T, r = p.rows.r;
  describe_tensor<2>(maps.x, p.dtype, p.x, {K, p.rows.M}, {p.ldx}, {kDepth, kN}, k128);
  if constexpr (kTransposed) {
    describe_tensor<2>(maps.weight, p.dtype, weight, {N, K}, {N}, {64, kDepth}, k128);
    describe_tensor<3>(maps.up, p.dtype, p.up, {N, r, T}, {N, r * N}, {kColumns, kChunk, 1}, kPlain);
  } else {
    describe_tensor<2>(maps.weight, p.dtype, weight, {K, N}, {K}, {kDepth, kColumns}, k128);
    describe_tensor<3>(maps.up, p.dtype, p.up, {r, N, T}, {r, N * r}, {kChunk, kColumns, 1}, kPlain);
  }
  const int64_t tiles = ceil_div(N, kColumns), room = 2 * multiprocessors() / 16 * 15;
  int64_t blocks = kMaxBlocks;  // of a cluster; all at once: clusters leave some multiprocessors out
  while (blocks > 1 && (blocks * tiles > room || blocks * kDepth > K)) blocks /= 2;
  launch_clusters("few_rows", &few_rows_sm90_kernel<scalar, kN, kTransposed>, static_cast<unsigned>(blocks),
                  tiles * blocks, kThreads, Layout<kN>::kBytes, stream, true, maps, a);
}

}  // namespace

void few_rows_sm90(const LowRank& p, const void* weight, const void* bias, const Allocator& workspace,
                   cudaStream_t stream) {
  const int64_t M = p.rows.M, width = (p.rows.ids ? 1 : p.rows.T) * ceil_div(p.rows.r, kChunk) * kChunk;
  PLORA_CHECK(p.dtype != Dtype::float32 && M <= kMaxRows && M * width <= kMaxRanks && p.K % 8 == 0 && p.N % 8 == 0 &&
                  p.ldx % 8 == 0 && p.ldy % 4 == 0 && p.ldy0 % 4 == 0 && p.rows.r % 8 == 0 &&
                  p.down_transposed == p.up_transposed && aligned(p.x, weight, p.up, p.y, p.y0, bias, p.bias_up),
              "few_rows: not what it was planned for");
  LowRank first = p;
  first.N = 0;  // `up` is not sent for: it comes while the product runs
  Maps maps;
  const Arguments a{p, few_rows_shrink(first, workspace(few_rows_bytes(first, false)), false, stream), bias};
  dispatch<2>("few_rows", p.dtype, [&](auto tag) {
    using scalar = decltype(tag);
    const auto with = [&](auto transposed) {
      const auto of_rows = M <= 8    ? &launch<scalar, 8, transposed>
                           : M <= 32 ? &launch<scalar, 32, transposed>
                                     : &launch<scalar, 64, transposed>;
      of_rows(maps, a, weight, stream);
    };
    with_flags(with, p.up_transposed);
  });
}

}  // namespace plora::cuda
