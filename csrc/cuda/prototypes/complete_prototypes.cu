// complete_prototypes on CUDA: every block above the diagonal of [class, subspace] in one launch. Sorted by task, the
// classes to fill in subspace j are the first ones, and those they are made of the others. So after the cosines of each
// class with those of later tasks, in its own subspace, one product per subspace is left.
//
//   1. every block sorts the classes by task; then cosines, 16 x 16 of them at a time, to memory [C, C]; what is not
//      filled is copied; the values of the block's first tile are sent for
//   2. after all blocks: tiles of 32 classes x 128 columns of a subspace. Cosines become weights on their way in.

#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>

#include "../device/overlap.cuh"
#include "cosine.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

using cosine::kThreads;
using cosine::kWarps;
using Tile = cosine::Tile<2, 2, 3>;

constexpr int kSide = 16;                            // of a block of cosines
constexpr int kKeys = Tile::kStages * Tile::kDepth;  // that a tile takes together
constexpr int64_t kAhead = int64_t(48) << 20;  // bytes of prototypes, of which half are sent for ahead of their use

struct Arguments {
  const float* prototypes;  // [C, T, D]
  const int64_t* tasks;     // [C]
  float *cosines, *out;     // [C, C], sorted; [C, T, D]
  int C, T, D;
  float scale;  // log2(e) / tau
  bool last, cold, vectors, pairs, ahead;
};

// Products and squares of each warp, in the first part; values and weights of a tile, and bounds, in the second.
struct Partial {
  float products[kSide * kSide], squares[2 * kSide];
};
struct Step {
  float values[Tile::kStages][Tile::kDepth * Tile::kLd], weights[kKeys * Tile::kRows], bounds[Tile::kRows];
};
union Work {
  Partial partial[kWarps];
  Step step;
};

int shared_bytes(int64_t C, int64_t T) {
  return static_cast<int>(sizeof(Work) + ((C + 3) / 4 * 4 + C + T + 1) * sizeof(int));
}

// The classes sorted by task: class `of(s)` is the s-th, and task t has those from start[t] to start[t + 1].
struct Sorted {
  const int *classes, *start;
  __device__ int of(int s) const { return classes[s]; }
};

__device__ Sorted sort(const Arguments& p, int* unsorted, int* sorted, int* start) {
  const int padded = (p.C + 3) / 4 * 4;
  for (int c = threadIdx.x; c < padded; c += kThreads) {
    const int64_t task = c < p.C ? p.tasks[c] : 0;
    if (task < 0 || task >= p.T) {  // as torch's own indexing: the launch fails
      printf("plora_ext.complete_prototypes: task_of_class must be between 0 and %d, got %lld for class %d\n", p.T - 1,
             static_cast<long long>(task), c);
      __trap();
    }
    unsorted[c] = c < p.C ? static_cast<int>(task) * p.C + c : INT32_MAX;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < p.C; c += kThreads) {
    const int key = unsorted[c];
    int place = 0;
#pragma unroll 4
    for (int k = 0; k < padded / 4; ++k) {
      const int4 other = reinterpret_cast<const int4*>(unsorted)[k];
      place += (other.x < key) + (other.y < key) + (other.z < key) + (other.w < key);
    }
    sorted[place] = key;
  }
  __syncthreads();
  for (int s = threadIdx.x; s <= p.C; s += kThreads) {
    const int task = s < p.C ? sorted[s] / p.C : p.T;
    for (int t = s > 0 ? sorted[s - 1] / p.C + 1 : 0; t <= task; ++t) start[t] = s;
  }
  __syncthreads();
  for (int s = threadIdx.x; s < p.C; s += kThreads) sorted[s] %= p.C;
  __syncthreads();
  return {sorted, start};
}

// Unit n of those of all subspaces, of which t has count(t): the n-th of subspace t. None: t < 0.
struct Unit {
  int t, n;
};
template <typename Count>
__device__ Unit unit_at(int T, int n, const Count& count) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < T; first += 32) {
    const int own = first + lane < T ? count(first + lane) : 0;
    const int end = sum_up_to(lane, own);
    const int at = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, end > n))) - 1;
    if (at >= 0) return {first + at, n - __shfl_sync(0xffffffffu, end - own, at)};
    n -= __shfl_sync(0xffffffffu, end, 31);
  }
  return {-1, 0};
}

// The cosines of 16 classes of task t with 16 of later ones, in subspace t. The warps share out D.
__device__ void make_cosines(const Arguments& p, const Sorted& sorted, Partial* partial, int t, int q0, int queries,
                             int k0, int keys) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const auto row = [&](int s) { return p.prototypes + (static_cast<int64_t>(sorted.of(s)) * p.T + t) * p.D + 4 * q; };
  const float* const rows[4] = {row(q0 + min(g, queries - 1)), row(q0 + min(g + 8, queries - 1)),
                                row(k0 + min(g, keys - 1)), row(k0 + min(g + 8, keys - 1))};
  float sum[2][4] = {}, squares[4] = {};
  constexpr int kTogether = 3, kStep = kWarps * 16;  // loads that are under way together
#pragma unroll 1
  for (int d = warp * 16; d < p.D; d += kTogether * kStep) {
    Four<float> v[kTogether][4];
    const int left = p.D - d - 4 * q;
    if (p.vectors) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) v[k][i] = k * kStep < left ? cosine::four(rows[i] + d + k * kStep) : Four<float>{};
    } else {
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) v[k][i][j] = k * kStep + j < left ? rows[i][d + k * kStep + j] : 0.f;
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      cosine::Split<false> operands[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) squares[i] += cosine::dot(v[k][i]), operands[i] = cosine::Split<false>(v[k][i]);
#pragma unroll
      for (int n = 0; n < 2; ++n) cosine::add_product(sum[n], operands[0], operands[1], operands[2 + n]);
    }
  }
  Partial& mine = partial[warp];
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) mine.products[(g + i / 2 * 8) * kSide + 8 * n + 2 * q + i % 2] = sum[n][i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float square = cosine::quad_sum(squares[i]);
    if (q == 0) mine.squares[8 * i + g] = square;
  }
  __syncthreads();
  static_assert(kThreads == kSide * kSide);
  const int i = threadIdx.x / kSide, j = threadIdx.x % kSide;
  float product = 0.f, query = 0.f, key = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    product += partial[w].products[threadIdx.x];
    query += partial[w].squares[i], key += partial[w].squares[kSide + j];
  }
  const float x = product * cosine::inverse_norm(query) * cosine::inverse_norm(key);
  if (i < queries && j < keys) p.cosines[static_cast<int64_t>(q0 + i) * p.C + k0 + j] = x > 1.f ? 1.f : x;
  __syncthreads();
}

// Values of the classes from the `first` on, kKeys of them at most: 128 columns of subspace t.
__device__ void send_for(const Arguments& p, const Sorted& sorted, Step& step, int t, int first, int column) {
  for (int i = 0; i < Tile::kStages; ++i, first += Tile::kDepth)
    if (first < p.C)
      cosine::fetch_columns<Tile>(
          step.values[i],
          [&](int r) { return p.prototypes + (static_cast<int64_t>(sorted.of(first + r)) * p.T + t) * p.D + column; },
          p.C - first, p.D - column, p.vectors);
  smem::commit();
}

// The sorted classes from row0 on in subspace t, 128 columns from `column` on. The first values are sent for.
__device__ void fill(const Arguments& p, const Sorted& sorted, Step& step, int t, int row0, int column) {
  const int rows = min(Tile::kRows, sorted.start[t] - row0), first = sorted.start[t], keys = p.C - first;
  const float* const cosines = p.cosines + static_cast<int64_t>(row0) * p.C + first;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (p.cold) {
    for (int row = warp; row < rows; row += kWarps) {
      float bound = -1.f;
      for (int k = lane; k < keys; k += 32) bound = fmaxf(bound, __ldcg(&cosines[static_cast<int64_t>(row) * p.C + k]));
      bound = warp_max(bound);
      if (lane == 0) step.bounds[row] = bound;
    }
    __syncwarp();  // the warp has the same rows below
  }

  cosine::Products<Tile, false> products;
  products.clear();
  float totals[2 * Tile::MT] = {};
#pragma unroll 1
  for (int begin = 0; begin < keys; begin += kKeys) {
    if (begin > 0) send_for(p, sorted, step, t, first + begin, column);
    float x[Tile::kRows / kWarps][Tile::kStages];
#pragma unroll
    for (int i = 0; i < Tile::kRows / kWarps; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kStages; ++j) {
        const int row = warp + kWarps * i, key = begin + lane + 32 * j;
        const bool real = row < rows && key < keys;
        x[i][j] = real ? __ldcg(&cosines[static_cast<int64_t>(row) * p.C + key]) : -INFINITY;
      }
#pragma unroll
    for (int i = 0; i < Tile::kRows / kWarps; ++i) {
      const int row = warp + kWarps * i;
      const float bound = p.cold && row < rows ? step.bounds[row] : 1.f;
#pragma unroll
      for (int j = 0; j < Tile::kStages; ++j)
        step.weights[(2 * j + lane / 16) * (Tile::kRows * 16) + row * 16 + cosine::place(lane % 16)] =
            exp2f((x[i][j] - bound) * p.scale);
    }
    smem::wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < Tile::kStages && begin + i * Tile::kDepth < keys; ++i)
      products.add_columns(step.weights + i * (Tile::kDepth * Tile::kRows), step.values[i],
                           [&](int m, const Four<float>& a, const Four<float>& a8) {
                             totals[2 * m] += (a[0] + a[1]) + (a[2] + a[3]);
                             totals[2 * m + 1] += (a8[0] + a8[1]) + (a8[2] + a8[3]);
                           });
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < 2 * Tile::MT; ++m) totals[m] = 1.f / cosine::quad_sum(totals[m]);
  products.each([&](int m, int n, int i, int row, int c) {
    if (i % 2 || row >= rows || column + c >= p.D) return;  // by pairs of neighbours
    float* const to = p.out + (static_cast<int64_t>(sorted.of(row0 + row)) * p.T + t) * p.D + column + c;
    const float x = products.sum[m][n][i] * totals[2 * m + i / 2];
    const float y = products.sum[m][n][i + 1] * totals[2 * m + i / 2];
    if (p.pairs) {
      *reinterpret_cast<float2*>(to) = make_float2(x, y);
    } else {
      to[0] = x;
      if (column + c + 1 < p.D) to[1] = y;
    }
  });
}

__global__ void __launch_bounds__(kThreads, 2) complete_kernel(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Work& work = *reinterpret_cast<Work*>(memory);
  int* const unsorted = reinterpret_cast<int*>(memory + sizeof(Work));
  int* const keys = unsorted + (p.C + 3) / 4 * 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.x, blocks = gridDim.x;
  if (p.ahead)
    for (int row = block + blocks * threadIdx.x; row < p.C * p.T; row += blocks * kThreads)
      if (p.tasks[row / p.T] >= row % p.T)  // what is filled is not read
        prefetch_to_l2(p.prototypes + static_cast<int64_t>(row) * p.D, static_cast<uint32_t>(p.D) * 4);
  const Sorted sorted = sort(p, unsorted, keys, keys + p.C);
  const int* const start = sorted.start;

  const auto first_key = [&](int t) { return p.last ? max(start[t + 1], start[p.T - 1]) : start[t + 1]; };
  const auto sides = [](int n) { return (n + kSide - 1) / kSide; };
  for (int n = block;; n += blocks) {
    const Unit unit =
        unit_at(p.T, n, [&](int t) { return sides(start[t + 1] - start[t]) * sides(p.C - first_key(t)); });
    const int t = unit.t;
    if (t < 0) break;
    const int across = sides(start[t + 1] - start[t]);
    const int q = start[t] + unit.n % across * kSide, k = first_key(t) + unit.n / across * kSide;
    make_cosines(p, sorted, work.partial, t, q, min(kSide, start[t + 1] - q), k, min(kSide, p.C - k));
  }

  // The classes of earlier tasks are filled in subspace t: so many, or none.
  const auto filled = [&](int t) { return (!p.last || t == p.T - 1) && start[t] < p.C ? start[t] : 0; };
  const int slices = (p.D + Tile::kColumns - 1) / Tile::kColumns;
  const auto tile_at = [&](int n) {
    const Unit unit = unit_at(p.T, n, [&](int t) { return (filled(t) + Tile::kRows - 1) / Tile::kRows * slices; });
    if (unit.t >= 0) send_for(p, sorted, work.step, unit.t, start[unit.t], unit.n % slices * Tile::kColumns);
    return unit;
  };
  Unit tile = tile_at(block);

  for (int n = blocks - 1 - block;; n += blocks) {  // eight a time, by the last blocks first
    const Unit unit = unit_at(p.T, n, [&](int t) { return (p.C - filled(t) + kWarps - 1) / kWarps; });
    if (unit.t < 0) break;
    const int s = filled(unit.t) + unit.n * kWarps + warp;
    if (s >= p.C) continue;
    const int64_t at = (static_cast<int64_t>(sorted.of(s)) * p.T + unit.t) * p.D;
    const float* const from = p.prototypes + at;
    float* const to = p.out + at;
    if (p.vectors) {
#pragma unroll 6
      for (int d = 4 * lane; d < p.D; d += 128)
        *reinterpret_cast<float4*>(to + d) = *reinterpret_cast<const float4*>(from + d);
    } else {
      for (int d = lane; d < p.D; d += 32) to[d] = from[d];
    }
  }

  cooperative_groups::this_grid().sync();
  for (int n = block; tile.t >= 0; n += blocks, tile = tile_at(n))
    fill(p, sorted, work.step, tile.t, tile.n / slices * Tile::kRows, tile.n % slices * Tile::kColumns);
}

}  // namespace

void complete(const float* prototypes, const int64_t* tasks, float* out, int64_t C, int64_t T, int64_t D, double tau,
              bool last, const Allocator& memory, cudaStream_t stream) {
  const char* op = "complete_prototypes";
  PLORA_CHECK(C * T < INT32_MAX && D < INT32_MAX, op, ": C T and D must be below 2^31");
  const int bytes = shared_bytes(C, T);
  PLORA_CHECK(bytes <= shared_memory_limit(), op, ": this GPU sorts at most ",
              (shared_memory_limit() - static_cast<int64_t>(sizeof(Work)) - 4 * T) / 8 - 4, " classes, got ", C);

  Arguments p{prototypes, tasks, static_cast<float*>(memory(C * C * sizeof(float))), out};
  p.C = narrow(C), p.T = narrow(T), p.D = narrow(D);
  p.scale = scale_of(tau), p.last = last, p.cold = tau < cosine::kCold;
  p.vectors = D % 4 == 0 && aligned(prototypes) && aligned(out), p.pairs = D % 2 == 0 && aligned(out);
  p.ahead = p.vectors && C * T * D * 4 <= kAhead;

  allow_shared_memory(&complete_kernel, bytes);
  int resident = 0;  // blocks of a multiprocessor: all must run together
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, &complete_kernel, kThreads, static_cast<size_t>(bytes));
  const int64_t blocks = std::min<int64_t>(std::max(resident, 1) * multiprocessors(), C * T);
  void* arguments[] = {&p};
  cudaLaunchCooperativeKernel(&complete_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, arguments, bytes,
                              stream);
  check_launch(op);
}

}  // namespace plora::cuda
