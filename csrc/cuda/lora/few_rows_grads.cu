// dA and dB of up to 512 rows that choose adapters, in one launch and without memory of its own: a block has some tiles
// of an adapter's dA and dB, which it alone writes. It finds the adapter's rows from the ids, by itself, and sums over
// them in their order; where there are none it writes zeros.
//
// Floor: dA and dB are written once. 64 rows, 64 adapters of rank 16, 4096 -> 4096: 17 MB, 4 us at 4.2 TB/s; L2, where
// they go first, takes them faster. What counts beside is latency: so there are as many blocks as run at once, each
// with several tiles, and the rows of the next ones are on their way to shared memory while one is multiplied and
// written. Launched while the kernel that makes g still runs, a block starts with dB, which needs no g.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/device.h"
#include "../device/launch.cuh"
#include "../device/mma_smem.cuh"
#include "../device/overlap.cuh"
#include "adapters.cuh"
#include "asks.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kMaxRows = lora_plan::kFewRows;
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kWarpColumns = 32, kColumns = kWarps * kWarpColumns;  // of x or dy, in a tile
constexpr int kStages = 3;
template <typename scalar>
constexpr int kStep = 64 / static_cast<int>(sizeof(scalar));  // rows in a stage

// dB (P = h, Q = dy) or dA (P = g, Q = x): out[t, j, c] = s_t sum over rows m of P[m, j] Q[m, c]
template <typename scalar>
struct Job {
  const scalar *P, *Q;
  scalar* out;
  int64_t ldq;
  int width, slabs;               // columns of Q, and their tiles; a tile has so many of them and up to 16 kTiles ranks
  bool fast_p, fast_q, fast_out;  // by 16 bytes
};

template <typename scalar>
struct Arguments {
  Job<scalar> jobs[2];     // dB, dA
  int first_units, units;  // tiles of dB, of both
  int each, parts;         // tiles of a block, blocks of an adapter
  Rows rows;
  int r, padded_r;
  const float* scaling;
  const int64_t* ranks;
  Asks asks;
};

template <int kTiles>
constexpr int kLdRanks = 16 * kTiles + smem::kPad;
constexpr int kLdQ = kColumns + smem::kPad, kLdColumns = kWarpColumns + smem::kPad;

template <typename scalar, int kTiles>
constexpr int kStageSize = kStep<scalar> * (kLdQ + kLdRanks<kTiles>);

// A warp's part of a tile on its way out: 32 columns of so many ranks, or the other way round.
template <int kTiles>
constexpr int kOutSize = std::max(16 * kTiles * kLdColumns, kWarpColumns* kLdRanks<kTiles>);

template <typename scalar, int kTiles>
constexpr size_t shared_bytes() {
  return (kStages * kStageSize<scalar, kTiles> + kWarps * kOutSize<kTiles>)*sizeof(scalar);
}

// The rows of adapter t, ascending, by all threads; returns how many there are.
__device__ inline int find_rows(const Rows& rows, int t, int16_t* numbers) {
  constexpr int kEach = kMaxRows / kThreads;
  __shared__ int counts[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp * 32 * kEach + lane;
  unsigned hits[kEach];
  int own = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    hits[e] = __ballot_sync(~0u, choice(rows, first + 32 * e) == t);
    own += __popc(hits[e]);
  }
  if (lane == 0) counts[warp] = own;
  __syncthreads();
  int at = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) at += w < warp ? counts[w] : 0, total += counts[w];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    if (hits[e] >> lane & 1) numbers[at + __popc(hits[e] & ((1u << lane) - 1))] = static_cast<int16_t>(first + 32 * e);
    at += __popc(hits[e]);
  }
  __syncthreads();
  return total;
}

// So many numbered rows of kWidth columns to shared memory, later; zero where they end, up to a whole step of the
// product, and from column `left` on.
template <int kWidth, typename scalar>
__device__ inline void fetch(scalar* to, const scalar* from, int64_t ld, const int16_t* numbers, int rows, int left,
                             bool fast) {
  constexpr int kVec = kVector<scalar>, kChunks = kWidth / kVec, kLd = kWidth + smem::kPad;
  constexpr int kK = smem::Step<scalar>::kK;
  const int c = threadIdx.x % kChunks * kVec, valid = max(min(left - c, kVec), 0);
  const scalar* const column = from + (valid > 0 ? c : 0);
#pragma unroll 2
  for (int n = threadIdx.x / kChunks; n < (rows + kK - 1) / kK * kK; n += kThreads / kChunks) {
    const bool there = n < rows;
    const scalar* const row = column + numbers[there ? n : 0] * ld;
    scalar* const at = to + n * kLd + c;
    if (fast) {
      smem::copy16(at, row, there ? valid * static_cast<int>(sizeof(scalar)) : 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < kVec; ++i) at[i] = there && i < valid ? row[i] : from_float<scalar>(0);
    }
  }
}

// A warp's lines of shared memory, `pitch` apart, to memory, `stride` apart.
template <typename scalar>
__device__ inline void write(scalar* to, int64_t stride, const scalar* from, int pitch, int lines, int length,
                             bool fast) {
  constexpr int kVec = kVector<scalar>;
  const int each = fast ? length / kVec : length;
#pragma unroll 2
  for (int i = threadIdx.x % 32; i < lines * each; i += 32) {
    const int line = i / each, at = i - line * each;
    if (fast)
      store_vector(to + line * stride + at * kVec, *reinterpret_cast<const uint4*>(from + line * pitch + at * kVec));
    else
      to[line * stride + at] = from[line * pitch + at];
  }
}

// The grid: the blocks of an adapter, of the next, ...
template <typename scalar, int kTiles>
__global__ void __launch_bounds__(kThreads) few_rows_grads_kernel(const __grid_constant__ Arguments<scalar> a) {
  using Step = smem::Step<scalar>;
  constexpr int kRanks = 16 * kTiles, kLdP = kLdRanks<kTiles>, kRows = kStep<scalar>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int16_t numbers[kMaxRows];
  scalar* const stages = reinterpret_cast<scalar*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  scalar* const mine = stages + kStages * kStageSize<scalar, kTiles> + warp * kOutSize<kTiles>;

  const int t = blockIdx.x / a.parts, begin = blockIdx.x % a.parts * a.each, end = min(begin + a.each, a.units);
  const bool asked = a.asks.has(t);
  const int total = asked ? find_rows(a.rows, t, numbers) : 0, blocks = (total + kRows - 1) / kRows;
  const int limit = !asked ? 0 : a.ranks ? static_cast<int>(min(a.ranks[t], static_cast<int64_t>(a.r))) : a.r;
  const float scale = a.scaling[t];

  struct Unit {
    bool of_A;
    int rank, column;
  };
  const auto unit = [&](int u) {
    const bool of_A = u >= a.first_units;
    if (of_A) u -= a.first_units;
    const int slabs = a.jobs[of_A].slabs;
    return Unit{of_A, u / slabs * kRanks, u % slabs * kColumns};
  };

  int next = begin, next_block = 0, filled = 0;
  bool waited = false;  // for the kernel that makes g
  const auto load = [&] {
    if (blocks > 0 && next < end) {
      const Unit at = unit(next);
      const Job<scalar>& job = a.jobs[at.of_A];
      scalar* const to = stages + filled % kStages * kStageSize<scalar, kTiles>;
      const int done = next_block * kRows, rows = min(total - done, kRows);
      fetch<kColumns>(to, job.Q + at.column, job.ldq, numbers + done, rows, job.width - at.column, job.fast_q);
      if (at.of_A && !waited) wait_for_predecessor(), waited = true;
      fetch<kRanks>(to + kRows * kLdQ, job.P + at.rank, a.padded_r, numbers + done, rows, a.padded_r - at.rank,
                    job.fast_p);
      ++filled, ++next_block;
      if (next_block == blocks) next_block = 0, ++next;
    }
    smem::commit();
  };

#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) load();
  int used = 0;
#pragma unroll 1
  for (int u = begin; u < end; ++u) {
    const Unit at = unit(u);
    const Job<scalar>& job = a.jobs[at.of_A];
    const int ranks = min(kRanks, a.r - at.rank), tiles = (ranks + 15) / 16;
    float sum[kTiles][4][4] = {};
#pragma unroll 1
    for (int block = 0; block < blocks; ++block, ++used) {
      smem::wait<kStages - 2>();
      __syncthreads();
      load();
      const int rows = min(total - block * kRows, kRows);
      const scalar* const of_q = stages + used % kStages * kStageSize<scalar, kTiles>;
#pragma unroll
      for (int k = 0; k < kRows; k += Step::kK) {
        if (k >= rows) break;
        typename Step::Right right[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) right[n].load_transposed(of_q + k * kLdQ + warp * kWarpColumns + n * 16, kLdQ);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if (i >= tiles) break;
          typename Step::Left left;
          left.load_transposed(of_q + kRows * kLdQ + k * kLdP + i * 16, kLdP);
#pragma unroll
          for (int n = 0; n < 4; ++n) Step::add(sum[i][n], left, right[n / 2], n % 2);
        }
      }
    }

    // by lines that lie side by side in memory: ranks of dA, columns of dB
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = i * 16 + half * 8 + g;
        const bool real = at.rank + j < limit;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const int c = n / 2 * 8 + 2 * q + n % 2;
          mine[at.of_A ? j * kLdColumns + c : c * kLdP + j] =
              from_float<scalar>(real ? scale * sum[i][n / 2][half * 2 + n % 2] : 0.f);
        }
      }
    __syncwarp();
    const int64_t column = at.column + warp * kWarpColumns;
    const int columns = static_cast<int>(max(min(job.width - column, int64_t{kWarpColumns}), int64_t{0}));
    if (at.of_A)
      write(job.out + (static_cast<int64_t>(t) * a.r + at.rank) * job.width + column, job.width, mine, kLdColumns,
            columns > 0 ? ranks : 0, columns, job.fast_out);
    else
      write(job.out + (static_cast<int64_t>(t) * job.width + column) * a.r + at.rank, a.r, mine, kLdP, columns, ranks,
            job.fast_out);
  }
  if (!waited) wait_for_predecessor();  // who waits for this kernel alone waits for both
}

template <typename scalar>
void run(const LoraGrads& p, bool overlap, cudaStream_t stream) {
  constexpr int64_t kVec = kVector<scalar>;
  const int64_t M = p.rows.M, T = p.rows.T, r = p.rows.r, padded_r = std::max(p.padded_r, r);
  if (T == 0 || r == 0 || (!p.dA && !p.dB)) return;
  PLORA_CHECK(p.rows.ids && M <= kMaxRows, "few_rows_grads: up to ", kMaxRows, " rows with ids, got ", M);
  const int tiles = r <= 16 ? 1 : 4;
  Arguments<scalar> a{};
  const auto job = [&](void* out, const void* P, const void* Q, int64_t ldq, int64_t width, int64_t line) {
    Job<scalar>& job = a.jobs[out == p.dA];
    job.P = static_cast<const scalar*>(P), job.Q = static_cast<const scalar*>(Q), job.out = static_cast<scalar*>(out);
    job.ldq = ldq, job.width = static_cast<int>(width), job.slabs = static_cast<int>(ceil_div(width, kColumns));
    job.fast_p = aligned(P) && padded_r % kVec == 0, job.fast_q = aligned(Q) && ldq % kVec == 0;
    job.fast_out = aligned(out) && line % kVec == 0;
    a.units += static_cast<int>(job.slabs * ceil_div(r, 16 * tiles));
  };
  if (p.dB) job(p.dB, p.h, p.dy, p.lddy, p.out, r);
  a.first_units = a.units;
  if (p.dA) job(p.dA, p.g, p.x, p.ldx, p.in, p.in);
  if (a.units == 0) return;
  const int64_t at_once = (tiles == 1 ? 6 : 3) * multiprocessors();  // blocks, by their shared memory
  a.each = static_cast<int>(ceil_div(a.units, std::clamp<int64_t>(at_once / T, 1, a.units)));
  a.parts = static_cast<int>(ceil_div(a.units, a.each));
  a.rows = p.rows, a.rows.rows_per_id = std::max<int64_t>(p.rows.rows_per_id, 1);
  a.r = static_cast<int>(r), a.padded_r = static_cast<int>(padded_r);
  a.scaling = p.scaling, a.ranks = p.ranks;
  a.asks = asks_of("few_rows_grads", p.adapters, T);
  const auto launch = [&](auto kernel, size_t shared) {
    launch_overlapped("few_rows_grads", kernel, T * a.parts, kThreads, shared, stream, overlap, a);
  };
  if (tiles == 1)
    launch(&few_rows_grads_kernel<scalar, 1>, shared_bytes<scalar, 1>());
  else
    launch(&few_rows_grads_kernel<scalar, 4>, shared_bytes<scalar, 4>());
}

}  // namespace

void few_rows_grads(const LoraGrads& p, bool overlap, cudaStream_t stream) {
  dispatch("few_rows_grads", p.dtype, [&](auto tag) { run<decltype(tag)>(p, overlap, stream); });
}

}  // namespace plora::cuda
