// dA and dB in one launch, for Hopper and 16-bit dtypes: of adapters that act on all rows, of up to 64 ranks together,
// or of those that samples of many rows chose, of up to 64 ranks each.
//
// Floor: x and dy pass once; [12608, 768] each, 39 MB, 9.2 us at 4.2 TB/s. So some columns of x or dy stream through a
// ring of shared memory, as the wide side of a product whose tall side are the 64 ranks of g or h, sent for while the
// kernel before, which makes g, still runs. The blocks of a cluster share out the rows of the same columns, and add up
// through each other's shared memory, in their order. A block takes a multiprocessor for itself, or those that find one
// free first would crowd together there; of more blocks than multiprocessors, two share one.
//
// With ids a cluster has one adapter, and finds its samples by itself. A step is 64 rows of a sample: what lies beyond
// its last row is outside of the tensor, and so zero.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/mma.cuh"
#include "../device/overlap.cuh"
#include "../device/ring.cuh"
#include "../device/tensor_map.cuh"
#include "asks.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kThreads = 160;  // four warps multiply, one sends for all that they need
constexpr int kRanks = lora_plan::kGradRanks, kRows = lora_plan::kGradRows, kMaxBlocks = 8, kMaxStages = 20;
constexpr int kMaxSamples = lora_plan::kGradSamples;
constexpr uint32_t kBytesBox = kRows * 128;  // of 64 columns, a row 128 bytes, swizzled
// The barriers, and as much as a product of 64 ranks is taken to read where there are fewer and the stage is the last.
constexpr uint32_t kBeyond = 64 * 16 * 2;
static_assert(16 * kMaxStages <= kBeyond);

// Shared memory: the stages, then barriers and samples. The sums take the place of the stages: a rank's columns side by
// side, padded against bank conflicts.
constexpr uint32_t kRing = 200 * 1024, kHalfRing = 96 * 1024, kSamples = kBeyond,
                   kBehind = kSamples + (kMaxSamples + 1) * sizeof(int);  // with their number
template <int kColumns>
struct Layout {
  static constexpr uint32_t kBytesQ = kColumns / 64 * kBytesBox;
  static constexpr int kPitch = kColumns + 4;
  static_assert(kRanks * kPitch * 4 <= kHalfRing && kRing / (kBytesQ + kRows * 32) <= kMaxStages);
};

// dA (P = g, Q = x) or dB (P = h, Q = dy): out[t, j, c] = s_t sum over rows m of P[m, j of t] Q[m, c]
struct Job {
  CUtensorMap P, Q;
  void* out;
  int width;
};

struct Arguments {
  Job jobs[2];         // of dB and of dA: what needs no g comes first
  int first_slabs;     // of columns, those of dB
  int groups, width;   // of clusters with adapters of their own; ranks of one
  int samples, per;    // steps of a sample
  const int64_t* ids;  // of the samples; null: there is one, of all adapters
  Asks asks;
  int r, padded_r;
  uint32_t ring;  // bytes of all stages
  int row_P;      // 16, 32 or 64 ranks: a row of P in shared memory, swizzled
  uint64_t layout_P;
  const float* scaling;
  const int64_t* ranks;
};

// The samples of an adapter, and how many, by one warp.
__device__ inline int find_samples(const Arguments& a, int t, int* samples) {
  const int lane = threadIdx.x % 32;
  int count = 0;
  for (int base = 0; base < a.samples && a.asks.has(t); base += 32) {
    const bool mine = base + lane < a.samples && a.ids[base + lane] == t;
    const unsigned all = __ballot_sync(~0u, mine);
    if (mine) samples[count + __popc(all & ((1u << lane) - 1))] = base + lane;
    count += __popc(all);
  }
  return count;
}

template <typename scalar, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) lora_grads_sm90_kernel(const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Layout<kColumns>;
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const uint32_t memory = sm90::smem_address(dynamic), blocks = sm90::cluster_blocks(), block = sm90::cluster_rank();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int cluster = blockIdx.x / blocks, group = cluster % a.groups, slab = cluster / a.groups;
  const bool of_A = slab >= a.first_slabs;
  const Job& job = a.jobs[of_A];
  const int column = (slab - (of_A ? a.first_slabs : 0)) * kColumns;
  const uint32_t bytes = L::kBytesQ + kRows * 2 * a.row_P;  // of a stage
  sm90::Ring ring{memory, memory + a.ring, bytes, static_cast<int>(a.ring / bytes)};
  int* const samples = reinterpret_cast<int*>(dynamic + a.ring + kSamples);

  if (threadIdx.x == 128) {
    sm90::prefetch_map(&job.Q), sm90::prefetch_map(&job.P);
    ring.init(4);
    sm90::fence_barrier_init();
  }
  if (warp == 4) {
    __syncwarp();
    if (a.ids) samples[kMaxSamples] = find_samples(a, group, samples);
  }
  __syncthreads();
  const int all_steps = (a.ids ? samples[kMaxSamples] : 1) * a.per;
  const int first = all_steps * block / blocks, steps = all_steps * (block + 1) / blocks - first;

  float d[kColumns / 2] = {};
  if (warp == 4) {
    const bool chosen = sm90::elect();
    const auto send_Q = [&](int i, const sm90::Ring& to) {
      const int number = (first + i) / a.per, row = (first + i - number * a.per) * kRows;
      const int sample = a.ids ? samples[number] : 0;
      sm90::barrier_arrive_expect(to.full(), bytes, chosen);
#pragma unroll
      for (int b = 0; b < kColumns / 64; ++b)
        sm90::load_3d(&job.Q, to.full(), to.at() + b * kBytesBox, column + 64 * b, row, sample, chosen);
    };
    const auto send_P = [&](int i, const sm90::Ring& to) {
      const int number = (first + i) / a.per, row = (first + i - number * a.per) * kRows;
      sm90::load_3d(&job.P, to.full(), to.at() + L::kBytesQ, 0, row, a.ids ? samples[number] : 0, chosen);
    };
    const int ahead = min(steps, ring.stages);
#pragma unroll 1
    for (sm90::Ring to = ring; to.index < ahead; ++to.index) send_Q(to.index, to);
    if (of_A) wait_for_predecessor();
#pragma unroll 1
    for (sm90::Ring to = ring; to.index < ahead; ++to.index) send_P(to.index, to);
#pragma unroll 1
    for (int i = ahead; i < steps; ++i, ring.next()) {
      sm90::barrier_wait(ring.empty(), ring.phase);
      send_Q(i, ring), send_P(i, ring);
    }
    __syncwarp();
  } else {
    constexpr uint64_t kLayoutQ = sm90::operand_layout(sm90::Swizzle::b128, kBytesBox, 1024);
    const uint32_t step_P = 16 * 2 * a.row_P >> 4;  // of 16 rows
    if (steps > 0)
      sm90::multiply(d, ring, steps, [&](uint32_t at) {
        const uint64_t Q = sm90::operand(kLayoutQ, at), P = sm90::operand(a.layout_P, at + L::kBytesQ);
#pragma unroll
        for (int k = 0; k < kRows / 16; ++k)
          sm90::wgmma<kColumns, scalar, 1, 1>(d, P + k * step_P, Q + k * (16 * 128 >> 4));
      });
  }

  __syncthreads();  // nobody reads the stages any more
  float* const sums = reinterpret_cast<float*>(dynamic);
  if (16 * warp < a.width && warp < 4)
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i)
      *reinterpret_cast<float2*>(sums + (16 * warp + lane / 4 + i % 2 * 8) * L::kPitch + i / 2 * 8 + lane % 4 * 2) =
          make_float2(d[2 * i], d[2 * i + 1]);
  wait_for_predecessor();  // who waits for this kernel alone waits for both
  sm90::cluster_sync();

#pragma unroll 1
  for (int i = block * kThreads + threadIdx.x; i < kColumns / 4 * a.width; i += blocks * kThreads) {
    // neighbouring threads write what lies side by side
    const int v = of_A ? i / (kColumns / 4) : i % a.width, c = 4 * (of_A ? i % (kColumns / 4) : i / a.width);
    const int of_group = v / a.padded_r, j = v - of_group * a.padded_r, t = group + of_group;
    if (column + c >= job.width || j >= a.r) continue;
    float4 some[kMaxBlocks];
#pragma unroll
    for (int b = 0; b < kMaxBlocks; ++b)
      some[b] =
          b < blocks ? sm90::load_from_block(sm90::place_in_block(memory + 4 * (v * L::kPitch + c), b)) : float4{};
    float sum[4] = {};
#pragma unroll
    for (int b = 0; b < kMaxBlocks; ++b)
      sum[0] += some[b].x, sum[1] += some[b].y, sum[2] += some[b].z, sum[3] += some[b].w;
    const bool real = !a.ranks || j < a.ranks[t];
    const float scale = a.scaling[t];
    scalar* const out = static_cast<scalar*>(job.out) + static_cast<int64_t>(t) * a.r * job.width;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      out[of_A ? static_cast<int64_t>(j) * job.width + column + c + e
               : static_cast<int64_t>(column + c + e) * a.r + j] = from_float<scalar>(real ? scale * sum[e] : 0.f);
  }
  sm90::cluster_sync();  // the others have read what is here
#endif
}

template <typename scalar, int kColumns>
void launch(Arguments& a, int64_t most, cudaStream_t stream, bool overlap) {
  a.first_slabs = narrow(ceil_div(a.jobs[0].width, kColumns));
  const int64_t slabs = (a.first_slabs + ceil_div(a.jobs[1].width, kColumns)) * a.groups;
  int64_t blocks = 1;  // of a cluster; all at once: the larger ones leave some multiprocessors out
  const int64_t room = multiprocessors();
  while (2 * blocks <= most && 2 * blocks * slabs <= (blocks == 1 ? room : room / 16 * 15)) blocks *= 2;
  a.ring = slabs * blocks > room ? kHalfRing : kRing;
  launch_clusters("lora_grads", &lora_grads_sm90_kernel<scalar, kColumns>, static_cast<unsigned>(blocks),
                  slabs * blocks, kThreads, a.ring + kBehind, stream, overlap, a);
}

}  // namespace

void lora_grads_sm90(const LoraGrads& p, bool overlap, cudaStream_t stream) {
  const bool ids = p.rows.ids;
  const int64_t T = p.rows.T, groups = ids ? T : 1, ranks = T / groups * p.padded_r;
  const int64_t rows = ids ? p.rows.rows_per_id : p.rows.M, samples = ids ? p.rows.M / rows : 1;
  PLORA_CHECK(p.dtype != Dtype::float32 && ranks <= kRanks && p.dy_slab == 0 && p.in % 8 == 0 && p.out % 8 == 0 &&
                  p.ldx % 8 == 0 && p.lddy % 8 == 0 && p.padded_r % 8 == 0 && aligned(p.x, p.dy, p.g, p.h) &&
                  p.rows.M <= INT32_MAX - kRows && samples <= kMaxSamples,
              "lora_grads: not what it was planned for");
  // Fewer than 64 ranks are found again where the others would be.
  const int row = ranks <= 16 ? 16 : ranks <= 32 ? 32 : 64;
  const auto swizzle = row == 16 ? sm90::Swizzle::b32 : row == 32 ? sm90::Swizzle::b64 : sm90::Swizzle::b128;
  const auto swizzle_P = row == 16 ? k32 : row == 32 ? k64 : k128;
  Arguments a{};
  const auto describe = [&](Job& job, const void* P, const void* Q, int64_t ldq, int64_t width, void* out) {
    if (!out) return;
    describe_tensor<3>(job.P, p.dtype, P, {ranks, rows, samples}, {ranks, rows * ranks}, {row, kRows, 1}, swizzle_P);
    describe_tensor<3>(job.Q, p.dtype, Q, {width, rows, samples}, {ldq, rows * ldq}, {64, kRows, 1}, k128);
    job.out = out, job.width = narrow(width);
  };
  describe(a.jobs[0], p.h, p.dy, p.lddy, p.out, p.dB);
  describe(a.jobs[1], p.g, p.x, p.ldx, p.in, p.dA);
  a.groups = narrow(groups), a.width = narrow(ranks);
  a.samples = narrow(samples), a.per = narrow(ceil_div(rows, kRows)), a.ids = p.rows.ids;
  a.asks = asks_of("lora_grads", p.adapters, T);
  a.r = narrow(p.rows.r), a.padded_r = narrow(p.padded_r);
  a.row_P = row, a.layout_P = sm90::operand_layout(swizzle, 0, 8 * 2 * row);
  a.scaling = p.scaling, a.ranks = p.ranks;
  const int64_t most = std::clamp<int64_t>(samples * a.per / groups, 1, kMaxBlocks);
  dispatch<2>("lora_grads", p.dtype, [&](auto tag) {
    using scalar = decltype(tag);
    // half as many columns where that makes clusters of four
    const bool narrow = 8 * groups * (ceil_div(p.in, 128) + ceil_div(p.out, 128)) <= multiprocessors();
    narrow ? launch<scalar, 64>(a, most, stream, overlap) : launch<scalar, 128>(a, most, stream, overlap);
  });
}

}  // namespace plora::cuda
