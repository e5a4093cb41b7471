// The gradients of factors, biases and scalings: sums over the rows of an adapter, always in the same order.
//
//   sort_kernel     with ids only: the rows of each adapter, in order, cut into items
//   product_kernel  dA and dB: an item, up to 64 ranks and 128 columns of x or dy per block, on the tensor cores; x and
//                   dy stream through shared memory
//   columns_kernel, dots_kernel   sums over an item's rows of g, of dy, and of g h
//   finish_kernel   adds what the items gave, scales, writes
//
// Each kernel is launched while its predecessor still runs, and waits for it on the device (sm_90 and newer).

#include <algorithm>
#include <utility>

#include "../../common/lora_plan.h"
#include "../device/mma_smem.cuh"
#include "../device/overlap.cuh"
#include "asks.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kThreads = 128;    // of a product block: each of its warps has 32 of the columns
constexpr int kColumns = 128;    // of x or dy, per product block
constexpr int kBlock = 64;       // items hold a multiple of this many rows, save the last of an adapter
constexpr int kItemRows = 2048;  // with ids: at most so many rows in an item, as their numbers are in shared memory
constexpr int kSmall = 256;      // threads of the other kernels

template <typename scalar>
inline constexpr int kStep = 128 / static_cast<int>(sizeof(scalar));  // rows per stage of the product's pipeline

__device__ void start() {
  launch_successor();
  wait_for_predecessor();
}

// Rows [first, first + rows) of adapter t, or of all (t = -1). Partial sums go to `slot`; -1: it is the only item.
struct Item {
  int t, first, rows, slot;
};

// The items of adapter t.
struct Run {
  int first, count, slot;
};

struct Items {
  int M, rows;  // rows: at most per item
  int count;
  // With ids. An adapter before which f rows are sorted starts at item f / rows + t, and at slot 2 (f / rows) if it has
  // several items; so each finds its place alone. Items that nobody needs are empty.
  Item* table = nullptr;  // [count]
  Run* runs = nullptr;    // [T]
  int* order = nullptr;   // the sorted positions of `ids`
  int rows_per_id = 1;

  __device__ Item at(int i) const {
    if (table) return table[i];
    return {-1, i * rows, min(rows, M - i * rows), count == 1 ? -1 : i};
  }
  __device__ Run of(int t) const { return table ? runs[t] : Run{0, count, 0}; }
  __device__ int64_t row(int n) const {
    if (!table) return n;
    const int i = n / rows_per_id;
    return static_cast<int64_t>(order[i]) * rows_per_id + (n - i * rows_per_id);
  }
};

// Block t: a stable counting sort, of which it writes the part of adapter t.
constexpr int kSortThreads = 1024, kSortWarps = kSortThreads / 32;

__global__ void __launch_bounds__(kSortThreads) sort_kernel(const int64_t* __restrict__ ids, const Items items, int G) {
  __shared__ int less[kSortWarps], equal[kSortWarps];
  const int t = blockIdx.x, T = gridDim.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int share = ((G + kSortWarps - 1) / kSortWarps + 31) / 32 * 32;
  const int64_t begin = static_cast<int64_t>(warp) * share;
  const int64_t end = min(begin + share, static_cast<int64_t>(G));
  start();
  int before = 0, mine = 0;
#pragma unroll 4
  for (int64_t i = begin + lane; i < end; i += 32) {
    const int64_t id = ids[i];
    before += id >= 0 && id < t;
    mine += id == t;
  }
  before = __reduce_add_sync(0xffffffffu, before), mine = __reduce_add_sync(0xffffffffu, mine);
  if (lane == 0) less[warp] = before, equal[warp] = mine;
  __syncthreads();
  int first = 0, total = 0, at = 0;
  for (int w = 0; w < kSortWarps; ++w) {
    if (w == warp) at = total;
    first += less[w], total += equal[w];
  }
  at += first;
#pragma unroll 4
  for (int64_t base = begin; base < end; base += 32) {
    const int64_t i = base + lane;
    const bool is_mine = i < end && ids[i] == t;
    const unsigned ballot = __ballot_sync(0xffffffffu, is_mine);
    if (is_mine) items.order[at + __popc(ballot & ((1u << lane) - 1))] = static_cast<int>(i);
    at += __popc(ballot);
  }

  first *= items.rows_per_id, total *= items.rows_per_id;
  const int count = (total + items.rows - 1) / items.rows;
  const int share_rows = count ? ((total + count - 1) / count + kBlock - 1) / kBlock * kBlock : 0;  // <= items.rows
  const Run run{first / items.rows + t, count, first / items.rows * 2};
  const int next = t == T - 1 ? items.count : (first + total) / items.rows + t + 1;
  if (threadIdx.x == 0) items.runs[t] = run;
  for (int i = threadIdx.x; i < next - run.first; i += kSortThreads) {
    const int from = i * share_rows;
    items.table[run.first + i] =
        i < count ? Item{t, first + from, min(share_rows, total - from), count == 1 ? -1 : run.slot + i}
                  : Item{t, 0, 0, -1};
  }
}

// dA (P = g, Q = x) or dB (P = h, Q = dy): out[t, j, c] = s_t sum over rows m of P[m, j of t] Q[m, c].
template <typename scalar>
struct Job {
  const scalar *P, *Q;
  int ldq;
  int64_t q_slab, width;
  bool fast_p, fast_q;  // 16-byte copies
  // The ranks of all adapters that ask, in their order, are `groups` times `group`; a group is cut into tiles.
  int groups, group, tiles, slabs;
  scalar* out;
  int64_t rank_stride, column_stride;  // of out[t]
  int64_t offset;                      // of this job in a slot
  int tasks() const { return groups * tiles * slabs; }
};

template <typename scalar>
struct Product {
  Job<scalar> jobs[2];
  int first_tasks, tasks;  // of the first job, of both
  Items items;
  Asks asks;
  int r, padded_r, ldp;
  float* partial;     // [slots, slot_size]; without ids a slot is an item's share of one adapter that asks
  int64_t slot_size;  // that of one adapter's dA and dB
  const float* scaling;
  const int64_t* ranks;
};

// Rows of kWidth columns to shared memory, zero where `rows` ends and where no column is: `column(i)`, for the columns
// i of the tile below `width`. A thread copies the same columns of all its rows.
template <int kWidth, typename scalar, typename Row, typename Column>
__device__ void fetch(scalar* to, const scalar* from, int ld, int rows, const Row& row, int width, bool fast,
                      int64_t first_column, const Column& column) {
  constexpr int kVec = kVector<scalar>, kChunks = kWidth / kVec, kEach = kThreads / kChunks, kLd = kWidth + smem::kPad;
  const int c = threadIdx.x % kChunks * kVec, valid = max(min(width - c, kVec), 0);
  int n = threadIdx.x / kChunks;
  to += n * kLd + c;
  if (fast) {
    from += first_column;
#pragma unroll
    for (int i = 0; i < kStep<scalar> / kEach; ++i, n += kEach)
      smem::copy16(to + i * kEach * kLd, from + static_cast<int64_t>(row(n)) * ld,
                   n < rows ? valid * static_cast<int>(sizeof(scalar)) : 0);
  } else {
#pragma unroll 1
    for (; n < kStep<scalar>; n += kEach, to += kEach * kLd)
#pragma unroll 1
      for (int i = 0; i < kVec; ++i)
        to[i] = n < rows && i < valid ? from[static_cast<int64_t>(row(n)) * ld + column(c + i)] : from_float<scalar>(0);
  }
}

template <int kTiles>
inline constexpr int kStages = kTiles == 1 ? 4 : 3;

template <typename scalar, int kTiles>
inline constexpr int kStageSize = kStep<scalar> * (kColumns + 16 * kTiles + 2 * smem::kPad);

template <typename scalar, int kTiles>
constexpr size_t product_smem(bool ids) {
  return kStages<kTiles> * kStageSize<scalar, kTiles> * sizeof(scalar) + (ids ? kItemRows * sizeof(int) : 0);
}

template <typename scalar, int kTiles>  // kTiles of 16 ranks
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const __grid_constant__ Product<scalar> p) {
  using Step = smem::Step<scalar>;
  constexpr int kRanks = 16 * kTiles, kVec = kVector<scalar>, kRows = kStep<scalar>;
  constexpr int kLdP = kRanks + smem::kPad, kLdQ = kColumns + smem::kPad;
  extern __shared__ __align__(16) unsigned char memory[];
  scalar* const stages = reinterpret_cast<scalar*>(memory);
  int* const numbers = reinterpret_cast<int*>(stages + kStages<kTiles> * kStageSize<scalar, kTiles>);
  start();

  const int index = blockIdx.x / p.tasks;
  int task = blockIdx.x % p.tasks;
  const Job<scalar>& job = p.jobs[task >= p.first_tasks];
  if (task >= p.first_tasks) task -= p.first_tasks;
  const Item item = p.items.at(index);
  const bool ids = p.items.table;
  if (item.rows == 0 || (ids && !p.asks.has(item.t))) return;
  const int64_t column = static_cast<int64_t>(task % job.slabs) * kColumns;
  const int tile = task / job.slabs % job.tiles, group = task / job.slabs / job.tiles;
  const int rank = group * job.group + tile * kRanks;  // the first of this block, in the order of those that ask
  const int ranks = min(kRanks, (group + 1) * job.group - rank);

  struct Place {
    int place, t, j;
  };
  const auto place_of = [&](int v) {
    if (ids) return Place{0, item.t, v};
    const int place = v / p.padded_r;
    return Place{place, p.asks.adapter(place), v - place * p.padded_r};
  };
  const auto p_column = [&](int i) {
    const Place at = place_of(rank + i);
    return (ids ? 0 : static_cast<int64_t>(at.t) * p.padded_r) + at.j;
  };
  const auto q_column = [&](int i) { return column + i; };
  const scalar* const Q = job.Q + (job.q_slab ? place_of(rank).t * job.q_slab : 0);
  const int p_first = threadIdx.x % (kRanks / kVec) * kVec;
  const int64_t my_p_column = p_first < ranks ? p_column(p_first) : 0;
  const int q_first = threadIdx.x % (kColumns / kVec) * kVec;
  const int64_t my_q_column = column + (column + q_first < job.width ? q_first : 0);
  const int q_width = static_cast<int>(min(job.width - column, static_cast<int64_t>(kColumns)));

  if (ids) {
    for (int n = threadIdx.x; n < item.rows; n += kThreads) numbers[n] = static_cast<int>(p.items.row(item.first + n));
    __syncthreads();
  }
  const int blocks = (item.rows + kRows - 1) / kRows, tiles = (ranks + 15) / 16;
  const auto load = [&](int block) {
    if (block < blocks) {
      scalar* const to = stages + block % kStages<kTiles> * kStageSize<scalar, kTiles>;
      const int done = block * kRows;
      const auto row = [&](int n) {
        const int at = min(done + n, item.rows - 1);
        int row = item.first + at;
        if (ids) row = numbers[at];
        return row;
      };
      fetch<kColumns>(to, Q, job.ldq, item.rows - done, row, q_width, job.fast_q, my_q_column, q_column);
      if (p_first < tiles * 16)
        fetch<kRanks>(to + kRows * kLdQ, job.P, p.ldp, item.rows - done, row, ranks, job.fast_p, my_p_column, p_column);
    }
    smem::commit();
  };

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum[kTiles][4][4] = {};
#pragma unroll 1
  for (int i = 0; i < kStages<kTiles> - 1; ++i) load(i);
  for (int block = 0; block < blocks; ++block) {
    smem::wait<kStages<kTiles> - 2>();
    __syncthreads();
    load(block + kStages<kTiles> - 1);
    const scalar* const q = stages + block % kStages<kTiles> * kStageSize<scalar, kTiles>;
#pragma unroll
    for (int k = 0; k < kRows; k += Step::kK) {
      typename Step::Right right[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) right[n].load_transposed(q + k * kLdQ + warp * 32 + n * 16, kLdQ);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (i >= tiles) break;
        typename Step::Left left;
        left.load_transposed(q + kRows * kLdQ + k * kLdP + i * 16, kLdP);
#pragma unroll
        for (int n = 0; n < 4; ++n) Step::add(sum[i][n], left, right[n / 2], n % 2);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int v = i * 16 + half * 8 + lane / 4;
      if (v >= ranks) continue;
      const Place at = place_of(rank + v);
      if (at.j >= p.r) continue;
      const bool alone = item.slot < 0, real = alone && (!p.ranks || at.j < p.ranks[at.t]);
      const float scale = real ? p.scaling[at.t] : 0.f;
      const int64_t slot = ids ? item.slot : static_cast<int64_t>(item.slot) * p.asks.count + at.place;
      scalar* const out = job.out + (static_cast<int64_t>(at.t) * p.r * job.width + at.j * job.rank_stride);
      float* const partial = p.partial + (slot * p.slot_size + job.offset + at.j * job.rank_stride);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int64_t c = column + warp * 32 + n / 2 * 8 + lane % 4 * 2 + n % 2;
        const float value = sum[i][n / 2][half * 2 + n % 2];
        if (c >= job.width) continue;
        if (alone)
          out[c * job.column_stride] = from_float<scalar>(real ? scale * value : 0.f);
        else
          partial[c * job.column_stride] = value;
      }
    }
}

// sums[item, slab] = the sum over the item's rows of V[slab]; 32 columns per block.
template <typename scalar>
__global__ void __launch_bounds__(kSmall)
    columns_kernel(const scalar* __restrict__ V, int64_t ld, int64_t slab, int slabs, int64_t width, const Items items,
                   float* __restrict__ sums) {
  constexpr int kWarps = kSmall / 32;
  __shared__ float parts[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = static_cast<int>((width + 31) / 32);
  const int64_t c = static_cast<int64_t>(blockIdx.x % blocks) * 32 + lane, to = blockIdx.x / blocks;
  start();
  const Item item = items.at(static_cast<int>(to / slabs));
  float sum = 0;
  if (c < width) {
    const scalar* const from = V + to % slabs * slab + c;
#pragma unroll 4
    for (int n = warp; n < item.rows; n += kWarps) sum += to_float(from[items.row(item.first + n) * ld]);
  }
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= width) return;
  for (int w = 1; w < kWarps; ++w) sum += parts[w][lane];
  sums[to * width + c] = sum;
}

// dots[item, t] = the sum over the item's rows of g . h, of adapter t; with ids: dots[item], of its adapter.
template <typename scalar>
__global__ void __launch_bounds__(kSmall)
    dots_kernel(const scalar* __restrict__ g, const scalar* __restrict__ h, const Items items, int T, int r,
                int padded_r, const int64_t* __restrict__ ranks, bool fast, float* __restrict__ dots) {
  constexpr int kVec = kVector<scalar>;
  start();
  const Item item = items.at(items.table ? blockIdx.x : blockIdx.x / T);
  const int t = items.table ? item.t : blockIdx.x % T;
  const int rank = ranks ? static_cast<int>(min(ranks[t], static_cast<int64_t>(r))) : r;
  const int64_t ld = static_cast<int64_t>(items.table ? 1 : T) * padded_r;
  const int64_t column = items.table ? 0 : static_cast<int64_t>(t) * padded_r;
  const int width = fast ? kVec : 1, per_row = (rank + width - 1) / width;
  float sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < item.rows * per_row; i += kSmall) {
    const int n = i / per_row, j = (i - n * per_row) * width;
    const int64_t at = items.row(item.first + n) * ld + column + j;
    if (fast) {
      const auto a = *reinterpret_cast<const Vector<scalar>*>(g + at),
                 b = *reinterpret_cast<const Vector<scalar>*>(h + at);
#pragma unroll
      for (int k = 0; k < kVec; ++k)
        if (j + k < rank) sum += to_float(a[k]) * to_float(b[k]);
    } else {
      sum += to_float(g[at]) * to_float(h[at]);
    }
  }
  sum = block_sum<kSmall>(sum);
  if (threadIdx.x == 0) dots[blockIdx.x] = sum;
}

template <typename scalar>
struct Finish {
  Items items, small_items;  // of the product, of the other sums
  Asks asks;
  int T, r, padded_r, element_blocks, blocks;
  bool slabs;  // every adapter has a dy
  int64_t in, out;
  const float *partial, *sums_g, *sums_dy, *dots, *scaling;
  const int64_t* ranks;
  const scalar* bias_B;
  scalar *dA, *dB, *dbias_A, *dbias_B;
  float* dscaling;
};

__device__ float add_up(const float* from, int64_t stride, int count) {
  constexpr int kAtOnce = 16;  // on their way: each wait is longer than all that is done with them
  float sum = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce) {
    float some[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) some[i] = first + i < count ? from[(first + i) * stride] : 0.f;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += some[i];
  }
  return sum;
}

template <typename scalar>
__device__ float sum_of_dy(const Finish<scalar>& p, const Run& run, int t, int64_t c) {
  const int64_t stride = (p.slabs ? p.T : 1) * p.out;
  return add_up(p.sums_dy + run.first * stride + (p.slabs ? t * p.out : 0) + c, stride, run.count);
}

template <typename scalar>
__global__ void __launch_bounds__(kSmall) finish_kernel(const __grid_constant__ Finish<scalar> p) {
  const int t = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks;
  const bool ids = p.items.table, asked = p.asks.has(t);
  start();
  const Run run = p.items.of(t), small = p.small_items.of(t);

  if (block == p.element_blocks) {
    float sum = 0;
    const int64_t stride = ids ? 1 : p.T;
    for (int i = threadIdx.x; i < small.count; i += kSmall) sum += p.dots[(small.first + i) * stride + (ids ? 0 : t)];
    if (p.bias_B)
      for (int64_t c = threadIdx.x; c < p.out; c += kSmall)
        sum += sum_of_dy(p, small, t, c) * to_float(p.bias_B[t * p.out + c]);
    sum = block_sum<kSmall>(sum);
    if (threadIdx.x == 0) p.dscaling[t] = sum;
    return;
  }

  const int64_t size_A = p.dA ? p.r * p.in : 0, size_B = p.dB ? p.r * p.out : 0, size = size_A + size_B;
  const int64_t biases_A = p.dbias_A ? p.r : 0, end = size + biases_A + (p.dbias_B ? p.out : 0);
  const int64_t rank = p.ranks ? p.ranks[t] : p.r;
  const int64_t slot = ids ? run.slot : asked ? p.asks.place(t) : 0, slot_stride = (ids ? 1 : p.asks.count) * size;
  const float scale = p.scaling[t];
  const auto finished = [&](int64_t j, float sum) { return from_float<scalar>(asked && j < rank ? scale * sum : 0.f); };
  const int64_t g_stride = static_cast<int64_t>(ids ? 1 : p.T) * p.padded_r;
  for (int64_t e = static_cast<int64_t>(block) * kSmall + threadIdx.x; e < end; e += p.element_blocks * kSmall) {
    if (e < size) {
      if (asked && run.count == 1) continue;  // the product wrote it
      const float sum = asked ? add_up(p.partial + slot * size + e, slot_stride, run.count) : 0.f;
      if (e < size_A)
        p.dA[t * size_A + e] = finished(e / p.in, sum);
      else
        p.dB[t * size_B + e - size_A] = finished((e - size_A) % p.r, sum);
    } else if (e < size + biases_A) {
      const int64_t j = e - size;
      const float* const from = p.sums_g + small.first * g_stride + (ids ? 0 : t * p.padded_r) + j;
      p.dbias_A[t * p.r + j] = finished(j, asked ? add_up(from, g_stride, small.count) : 0.f);
    } else {
      const int64_t c = e - size - biases_A;
      p.dbias_B[t * p.out + c] = finished(-1, asked ? sum_of_dy(p, small, t, c) : 0.f);
    }
  }
}

template <typename scalar>
void run(const LoraGrads& p, const Allocator& workspace, cudaStream_t stream) {
  constexpr int64_t kVec = kVector<scalar>;
  const int64_t M = p.rows.M, T = p.rows.T, r = p.rows.r, padded_r = std::max(p.padded_r, r);
  const bool ids = p.rows.ids;
  if (T == 0) return;
  PLORA_CHECK(std::max({M, p.ldx, p.lddy, T * padded_r}) <= INT32_MAX, "lora_grads: sizes beyond 2^31");
  bool overlap = false;  // the first launch follows whatever the stream holds
  const auto launch = [&](auto kernel, int64_t blocks, int threads, size_t shared, const auto&... arguments) {
    if (blocks > 0)
      launch_overlapped("lora_grads", kernel, blocks, threads, shared, stream, std::exchange(overlap, true),
                        arguments...);
  };

  const Asks asks = asks_of("lora_grads", p.adapters, T);

  // what the product makes
  const auto vectors = [](const void* pointer, int64_t ld) { return aligned(pointer) && ld % kVec == 0; };
  const int64_t all_ranks = (ids ? 1 : asks.count) * padded_r;
  const bool apart = p.dy_slab != 0;
  const bool thin = std::max(p.dA || !apart ? all_ranks : 0, padded_r) <= 16;
  Product<scalar> product{};
  int jobs = 0;
  const auto add = [&](void* out, const void* P, const void* Q, int64_t ldq, int64_t q_slab, int64_t width,
                       int64_t rank_stride, int64_t column_stride) {
    if (!out || asks.count == 0 || M == 0) return;
    Job<scalar>& job = product.jobs[jobs++];
    job.P = static_cast<const scalar*>(P), job.Q = static_cast<const scalar*>(Q);
    job.ldq = narrow(ldq), job.q_slab = q_slab, job.width = width;
    job.fast_p = vectors(P, padded_r), job.fast_q = vectors(Q, ldq) && q_slab % kVec == 0;
    job.groups = q_slab ? asks.count : 1;
    job.group = narrow(q_slab ? padded_r : all_ranks);
    job.tiles = narrow(ceil_div(job.group, thin ? 16 : 64));
    job.slabs = narrow(ceil_div(width, kColumns));
    job.out = static_cast<scalar*>(out);
    job.rank_stride = rank_stride, job.column_stride = column_stride;
    job.offset = product.slot_size;
    product.slot_size += r * width;
    product.tasks += job.tasks();
    if (jobs == 1) product.first_tasks = product.tasks;
  };
  add(p.dA, p.g, p.x, p.ldx, 0, p.in, p.in, 1);
  add(p.dB, p.h, p.dy, p.lddy, p.dy_slab, p.out, 1, r);

  // rows into items: the product shall have two blocks on each multiprocessor
  const int64_t blocks = ceil_div(M, kBlock);
  const auto cut = [&](int64_t wanted) {
    Items items{};
    items.M = narrow(M);
    int64_t rows = kBlock * std::max<int64_t>(ceil_div(blocks, std::max<int64_t>(wanted, 1)), 1);
    if (ids) rows = std::min<int64_t>(rows, kItemRows);
    items.rows = narrow(rows), items.count = narrow(ids ? M / rows + T : ceil_div(M, rows));
    items.rows_per_id = narrow(ids ? std::max<int64_t>(p.rows.rows_per_id, 1) : 1);
    return items;
  };
  const int64_t wanted = 2 * multiprocessors() / std::max(product.tasks, 1);
  Items items = cut(ids ? wanted - std::min(T, wanted) / 2 : wanted);  // each adapter's rows end with part of an item
  Items small_items = ids ? items : cut(std::min<int64_t>(blocks / 4, 64));

  // workspace, in units of 16 bytes
  const bool sums_g = p.dbias_A, dy_dots = p.dscaling && p.bias_B, sums_dy = p.dbias_B || dy_dots;
  const int64_t dy_slabs = apart ? T : 1, G = ids ? M / items.rows_per_id : 0;
  const int64_t g_width = (ids ? 1 : T) * padded_r;
  const int64_t slots = ids ? M / items.rows * 2 : items.count > 1 ? items.count * asks.count : 0;
  int64_t total = 0;
  const auto reserve = [&](int64_t bytes) {
    const int64_t at = total;
    total += ceil_div(bytes, 16);
    return at;
  };
  const int64_t at_partial = reserve(slots * product.slot_size * 4);
  const int64_t at_g = reserve(sums_g ? small_items.count * g_width * 4 : 0);
  const int64_t at_dy = reserve(sums_dy ? small_items.count * dy_slabs * p.out * 4 : 0);
  const int64_t at_dots = reserve(p.dscaling ? small_items.count * (ids ? 1 : T) * 4 : 0);
  const int64_t at_table = reserve(ids ? items.count * sizeof(Item) : 0);
  const int64_t at_runs = reserve(ids ? T * sizeof(Run) : 0), at_order = reserve(G * sizeof(int));
  uint4* const base = static_cast<uint4*>(workspace(total * sizeof(uint4)));
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(base + at); };
  if (ids) {
    items.table = reinterpret_cast<Item*>(base + at_table);
    items.runs = reinterpret_cast<Run*>(base + at_runs);
    items.order = reinterpret_cast<int*>(base + at_order);
    small_items = items;
    launch(sort_kernel, T, kSortThreads, 0, p.rows.ids, items, G);
  }

  if (product.tasks > 0) {
    product.items = items, product.asks = asks;
    product.r = narrow(r), product.padded_r = narrow(padded_r), product.ldp = narrow(g_width);
    product.partial = floats(at_partial), product.scaling = p.scaling, product.ranks = p.ranks;
    const int64_t blocks = static_cast<int64_t>(product.tasks) * items.count;
    thin ? launch(&product_kernel<scalar, 1>, blocks, kThreads, product_smem<scalar, 1>(ids), product)
         : launch(&product_kernel<scalar, 4>, blocks, kThreads, product_smem<scalar, 4>(ids), product);
  }
  const auto sum_columns = [&](const void* V, int64_t ld, int64_t slab, int64_t slabs, int64_t width, float* to) {
    launch(&columns_kernel<scalar>, ceil_div(width, 32) * slabs * small_items.count, kSmall, 0,
           static_cast<const scalar*>(V), ld, slab, slabs, width, small_items, to);
  };
  if (sums_g) sum_columns(p.g, g_width, 0, 1, g_width, floats(at_g));
  if (sums_dy) sum_columns(p.dy, p.lddy, p.dy_slab, dy_slabs, p.out, floats(at_dy));
  if (p.dscaling)
    launch(dots_kernel<scalar>, (ids ? 1 : T) * small_items.count, kSmall, 0, static_cast<const scalar*>(p.g),
           static_cast<const scalar*>(p.h), small_items, T, r, padded_r, p.ranks,
           vectors(p.g, padded_r) && vectors(p.h, padded_r), floats(at_dots));

  if (!ids && items.count == 1 && asks.all && !p.dscaling && !p.dbias_A && !p.dbias_B) return;  // all is written
  const int64_t elements =
      (p.dA ? r * p.in : 0) + (p.dB ? r * p.out : 0) + (p.dbias_A ? r : 0) + (p.dbias_B ? p.out : 0);
  Finish<scalar> f{};
  f.items = items, f.small_items = small_items, f.asks = asks;
  f.T = narrow(T), f.r = narrow(r), f.padded_r = narrow(padded_r);
  f.element_blocks = narrow(std::min(ceil_div(elements, kSmall), ceil_div(4096, T)));
  f.blocks = f.element_blocks + (p.dscaling ? 1 : 0);
  f.slabs = apart, f.in = p.in, f.out = p.out;
  f.partial = floats(at_partial), f.sums_g = floats(at_g), f.sums_dy = floats(at_dy), f.dots = floats(at_dots);
  f.scaling = p.scaling, f.ranks = p.ranks;
  f.bias_B = static_cast<const scalar*>(p.bias_B);
  f.dA = static_cast<scalar*>(p.dA), f.dB = static_cast<scalar*>(p.dB);
  f.dbias_A = static_cast<scalar*>(p.dbias_A), f.dbias_B = static_cast<scalar*>(p.dbias_B);
  f.dscaling = p.dscaling;
  launch(finish_kernel<scalar>, T * f.blocks, kSmall, 0, f);
}

}  // namespace

void lora_grads(const LoraGrads& p, const Allocator& workspace, cudaStream_t stream) {
  dispatch("lora_grads", p.dtype, [&](auto tag) { run<decltype(tag)>(p, workspace, stream); });
}

}  // namespace plora::cuda
