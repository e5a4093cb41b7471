// dA and dB of up to 512 rows that choose adapters, in one launch and without memory of its own: a block has 16 ranks
// and some columns of an adapter's dA or dB. It finds the adapter's rows from the ids and sums over them in their
// order; where there are none it writes zeros.
//
// Floor: dA and dB are written once. 64 rows, 64 adapters of rank 16, 4096 -> 4096: 17 MB, 4 us at 4.2 TB/s. Of so few
// rows little is to be multiplied, so what counts is that an element costs few instructions: x and dy go from memory to
// the products' operands, and the sums to memory, through registers alone. Launched while the kernel that makes g still
// runs, the blocks of dB, which need no g, come first, and those of dA load their x meanwhile.
//
// Columns are the wide side of a product (mma.cuh), ranks the narrow one, rows its depth. A lane has 8 neighbouring
// columns of four ranks, so that it reads and writes whole vectors.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/mma.cuh"
#include "../device/overlap.cuh"
#include "adapters.cuh"
#include "asks.cuh"
#include "few_rows.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kMaxRows = lora_plan::kFewRows;
constexpr int kThreads = 128, kWarps = kThreads / 32, kWarpColumns = 64, kColumns = kWarps * kWarpColumns;
constexpr int kDepth = 16;  // rows of a product
template <typename scalar>
constexpr int kBlocks = sizeof(scalar) == 4 ? 2 : 5;  // of a multiprocessor
// How far apart the ranks lie in shared memory, so that the fragments of a warp miss each other's banks.
constexpr int kPitch = kMaxRows + 16;

// dB (P = h, Q = dy) or dA (P = g, Q = x): out[t, j, c] = s_t sum over rows m of P[m, j] Q[m, c]
struct Job {
  const void *P, *Q;
  void* out;
  int ldq;
  int width;   // columns
  int parts;   // blocks that share them
  int blocks;  // of an adapter: parts times chunks of ranks
};

struct Arguments {
  Job of_B, of_A;
  int each;  // tiles of kColumns columns in a part
  Rows rows;
  int r, padded_r;
  const float* scaling;
  const int64_t* ranks;
  Asks asks;
};

// The rows of adapter t, ascending, by all threads; returns how many there are.
__device__ inline int find_rows(const Rows& rows, int t, int16_t* numbers) {
  constexpr int kEach = kMaxRows / kThreads;
  __shared__ int counts[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp * 32 * kEach + lane;
  int adapter[kEach], own = 0;
  unsigned hits[kEach];
  read_choices(rows, first, 32, adapter);
#pragma unroll
  for (int e = 0; e < kEach; ++e) hits[e] = __ballot_sync(~0u, adapter[e] == t), own += __popc(hits[e]);
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

// A chunk of P, of which `left` ranks are there, to shared memory, each rank's rows side by side; zero from row `total`
// to a whole product. A lane's ranks 4 q, 4 q + 1 come in the first half of them, the other two in the second.
template <bool VECTORS, typename scalar>
__device__ inline void gather(scalar* to, const scalar* P, int64_t ld, const int16_t* numbers, int total, int left) {
  constexpr int kVec = kVector<scalar>, kVectors = kChunk / kVec;
#pragma unroll 1
  for (int i = threadIdx.x; i < (total + kDepth - 1) / kDepth * kDepth * kVectors; i += kThreads) {
    const int n = i / kVectors, first = i % kVectors * kVec;
    const auto some = load<VECTORS>(P + numbers[min(n, total - 1)] * ld + first, n < total ? left - first : 0);
#pragma unroll
    for (int e = 0; e < kVec; ++e) to[(first / 2 + e % 4 / 2 * 8 + e / 4 * 2 + e % 2) * kPitch + n] = some[e];
  }
}

// The grid: the blocks of dB, adapter after adapter, then those of dA. VECTORS: all rows are whole vectors, aligned,
// and ranks come in fours.
template <typename scalar, bool VECTORS>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar>)
    few_rows_grads_kernel(const __grid_constant__ Arguments a) {
  constexpr int V = kVector<scalar>, kVectors = 8 / V;
  __shared__ __align__(16) scalar of_ranks[kChunk * kPitch];
  __shared__ int16_t numbers[kMaxRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;

  const int of_B = static_cast<int>(a.rows.T) * a.of_B.blocks;
  const bool is_A = static_cast<int>(blockIdx.x) >= of_B;
  const Job& job = is_A ? a.of_A : a.of_B;
  const int index = blockIdx.x - (is_A ? of_B : 0), t = index / job.blocks, within = index % job.blocks;
  const int rank = within / job.parts * kChunk, width = job.width;
  const int begin = within % job.parts * a.each * kColumns + warp * kWarpColumns;
  const int end = min(begin + a.each * kColumns, width);
  const bool asked = a.asks.has(t);
  const int total = asked ? find_rows(a.rows, t, numbers) : 0;
  const int limit = !asked ? 0 : a.ranks ? static_cast<int>(min(max(a.ranks[t], int64_t{0}), int64_t{a.r})) : a.r;
  const float factor = asked ? a.scaling[t] : 0.f;
  scalar* const out = static_cast<scalar*>(job.out) + static_cast<int64_t>(t) * a.r * width;

  // Four rows at 8 columns.
  struct Own {
    Vector<scalar> row[4][kVectors];
  };
  int row[4];
  const auto seek = [&](int done) {  // the four from there on
#pragma unroll
    for (int k = 0; k < 4; ++k) row[k] = done + 4 * q + k < total ? numbers[done + 4 * q + k] : kOutside;
  };
  const auto load_rows = [&](int column) {
    Own own;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const scalar* const from =
          static_cast<const scalar*>(job.Q) + static_cast<int64_t>(row[k]) * job.ldq + column + 8 * g;
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        own.row[k][v] = load<VECTORS>(from + v * V, row[k] >= 0 ? width - column - 8 * g - v * V : 0);
    }
    return own;
  };
  Own next{};
  if (total > 0 && begin < end) seek(0), next = load_rows(begin);
  const bool wants_g = is_A && total > 0;
  if (wants_g) wait_for_predecessor();
  if (total > 0)
    gather<VECTORS>(of_ranks, static_cast<const scalar*>(job.P) + rank, a.padded_r, numbers, total, a.padded_r - rank);
  __syncthreads();

#pragma unroll 1
  for (int column = begin; column < end; column += kColumns) {
    // Of product i, row g of the first operand stands for column 2 i of the lane's g, row g + 8 for the one after it.
    float acc[2][4][4] = {};
#pragma unroll 1
    for (int done = 0; done < total; done += kDepth) {
      Four<scalar> even[4], odd[4];  // columns 2 i and 2 i + 1
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          even[i][k] = next.row[k][2 * i / V][2 * i % V];
          odd[i][k] = next.row[k][2 * i / V][2 * i % V + 1];
        }
      const bool more = done + kDepth < total;
      const int then = more ? column : column + kColumns;
      if (total > kDepth) seek(more ? done + kDepth : 0);
      if (then < end) next = load_rows(then);
      Operand<scalar> ranks[2];
#pragma unroll
      for (int b = 0; b < 2; ++b)
        ranks[b] =
            Operand<scalar>(*reinterpret_cast<const Four<scalar>*>(of_ranks + (8 * b + g) * kPitch + done + 4 * q));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Operand<scalar> left(even[i]), right(odd[i]);
#pragma unroll
        for (int b = 0; b < 2; ++b) multiply(acc[b][i], left, right, ranks[b]);
      }
    }

    const int first = rank + 4 * q, c = column + 8 * g;
    if (rank + kChunk > limit) {  // no matter what was summed up there
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int n = 0; n < 8; ++n)
          if (first + e >= limit) acc[e / 2][n / 2][n % 2 * 2 + e % 2] = 0;
    }
    const auto value = [&](int n, int e) {  // of a column and a rank
      return from_float<scalar>(factor * acc[e / 2][n / 2][n % 2 * 2 + e % 2]);
    };
    if (is_A) {
      scalar* const to = out + static_cast<int64_t>(first) * width + c;
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          Vector<scalar> some;
#pragma unroll
          for (int n = 0; n < V; ++n) some[n] = value(v * V + n, e);
          store<VECTORS>(to + static_cast<int64_t>(e) * width + v * V, some, first + e < a.r ? width - c - v * V : 0);
        }
    } else if (first < a.r) {
      scalar* const to = out + static_cast<int64_t>(c) * a.r + first;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (c + (VECTORS ? n / V * V : n) >= width) break;
        Four<scalar> some;
#pragma unroll
        for (int e = 0; e < 4; ++e) some[e] = value(n, e);
        if (VECTORS) {
          *reinterpret_cast<Four<scalar>*>(to + n * a.r) = some;
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (first + e < a.r) to[n * a.r + e] = some[e];
        }
      }
    }
  }
  if (!wants_g) wait_for_predecessor();  // who waits for this kernel alone waits for both
}

template <typename scalar>
void run(const LoraGrads& p, bool overlap, cudaStream_t stream) {
  constexpr int64_t V = kVector<scalar>;
  const int64_t M = p.rows.M, T = p.rows.T, r = p.rows.r, padded_r = std::max(p.padded_r, r);
  PLORA_CHECK(p.rows.ids && M <= kMaxRows, "few_rows_grads: up to ", kMaxRows, " rows with ids, got ", M);
  PLORA_CHECK(std::max(p.ldx, p.lddy) <= INT32_MAX, "few_rows_grads: sizes beyond 2^31");
  const int64_t tiles_A = p.dA ? ceil_div(p.in, kColumns) : 0, tiles_B = p.dB ? ceil_div(p.out, kColumns) : 0;
  const int64_t tiles = T * ceil_div(r, kChunk) * (tiles_A + tiles_B);
  if (tiles == 0) return;
  Arguments a{};
  // As many blocks as run at once; more and smaller ones of many rows, which may all be of one adapter.
  const int64_t most = std::min(std::max(tiles_A, tiles_B), kMaxRows / std::max<int64_t>(M, 1));
  a.each = narrow(std::clamp<int64_t>(ceil_div(tiles, kBlocks<scalar> * multiprocessors()), 1, most));
  const auto job = [&](void* out, const void* P, const void* Q, int64_t ldq, int64_t width, int64_t of_width) {
    Job job{P, Q, out};
    job.ldq = narrow(ldq), job.width = narrow(width), job.parts = narrow(ceil_div(of_width, a.each));
    job.blocks = narrow(job.parts * ceil_div(r, kChunk));
    return job;
  };
  a.of_A = job(p.dA, p.g, p.x, p.ldx, p.in, tiles_A), a.of_B = job(p.dB, p.h, p.dy, p.lddy, p.out, tiles_B);
  const int64_t blocks = T * (a.of_A.blocks + a.of_B.blocks);
  PLORA_CHECK(blocks <= INT32_MAX, "few_rows_grads: more blocks than can be counted");
  a.rows = p.rows, a.rows.rows_per_id = std::max<int64_t>(p.rows.rows_per_id, 1);
  a.r = narrow(r), a.padded_r = narrow(padded_r);
  a.scaling = p.scaling, a.ranks = p.ranks;
  a.asks = asks_of("few_rows_grads", p.adapters, T);
  bool vectors = padded_r % V == 0;
  if (p.dA) vectors &= aligned(p.g, p.x, p.dA) && p.ldx % V == 0 && p.in % V == 0;
  if (p.dB) vectors &= aligned(p.h, p.dy, p.dB) && p.lddy % V == 0 && p.out % V == 0 && r % 4 == 0;
  launch_overlapped("few_rows_grads",
                    vectors ? &few_rows_grads_kernel<scalar, true> : &few_rows_grads_kernel<scalar, false>, blocks,
                    kThreads, 0, stream, overlap, a);
}

}  // namespace

void few_rows_grads(const LoraGrads& p, bool overlap, cudaStream_t stream) {
  dispatch("few_rows_grads", p.dtype, [&](auto tag) { run<decltype(tag)>(p, overlap, stream); });
}

}  // namespace plora::cuda
