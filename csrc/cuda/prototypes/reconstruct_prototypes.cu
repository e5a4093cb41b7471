// reconstruct_prototypes on CUDA: softmax(cos(old, new) / tau) values, the weights never leaving the chip. A block owns
// some old classes and takes the new ones 32 at a time:
//
//   1. each warp multiplies its own part of D; the parts meet in shared memory and become weights
//   2. each warp multiplies these with its own columns of the values; sums stay in registers to the end
//
// So one warp alone reads each number of the new classes and of the values, through a ring of its own: two barriers per
// 32 new classes are all.
//
// |cos| <= 1 bounds the exponent: exp((cos - 1) / tau) needs no running maximum. Only where tau is so small that all of
// a class's weights could vanish (exp(-2 / tau)) the bound is the largest cosine so far. Few old classes leave blocks
// idle: then the new ones are split among blocks, whose parts combine_kernel adds in order.

#include <algorithm>

#include "../../common/cuda_path.h"
#include "../device/overlap.cuh"
#include "cosine.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

using cosine::kThreads;
using cosine::kWarps;

constexpr int kKeys = 32;          // new classes of a strip
constexpr int kUnit = kKeys * 16;  // floats of a unit: 32 new classes x 16 of D, or 16 new classes x 32 columns
constexpr int kLd = kKeys + 8;     // 8 more keep lanes apart in the banks
constexpr int kMinSplit = 48;      // new classes

// 16 MT old classes, STAGES units of a ring, and up to GROUPS x 256 columns of a block.
template <int MT_, int GROUPS, int STAGES>
struct Tile {
  static constexpr int MT = MT_, kGroups = GROUPS, kStages = STAGES, kRows = 16 * MT;
};
using Narrow = Tile<1, 3, 3>;  // for little shared memory
using Small = Tile<1, 4, 5>;
using Large = Tile<2, 3, 5>;

struct Arguments : Reconstruction {  // `out` is [Co, Dv], or the numerators of each split [splits, Co, Dv]
  float2* stats;                     // [splits, Co]: bound and denominator; null where there is one split
  int per_split;
  int passes, width;  // blocks share out the columns: `width` of them each
  int slot;           // floats of a unit in the ring; with those of the old classes where these cannot stay
  float scale;        // log2(e) / tau
  bool cold, resident, vector_rows, vector_values, vector_out;
};

// What a warp has of the products and squares of a strip.
template <typename T>
struct Part {
  float products[T::kRows * kLd], keys[kKeys], rows[T::kRows];
};

template <typename T>
struct Shared {
  Part<T> parts[kWarps];
  float weights[2][T::kRows * kKeys];  // as two TF32 numbers: [16 new classes][row][16], in the order of place()
  float again[T::kRows], total[T::kRows];
};

// fetch() of what is not in vectors: rows, rare and out of the way.
template <int kCount, int kEach>
__device__ __noinline__ void fetch_each(float* to, const float* row, int64_t ld, int rows, int left, int to_step) {
#pragma unroll 1
  for (int r = 0; r < kCount; r += kEach, to += to_step, row += kEach * ld)
#pragma unroll 1
    for (int i = 0; i < 4; ++i) to[i] = r < rows && i < left ? row[i] : 0.f;
}

// By one warp: kChunks x 16 bytes of each of kCount rows, of which `rows` rows and `left` floats are there; the rest is
// zero. Vectors come later. Rows of 128 bytes are swizzled: chunk c of row r lies at c ^ 2 (r % 4).
template <int kCount, int kChunks>
__device__ inline void fetch(float* to, const float* from, int64_t ld, int rows, int left, bool vectors) {
  constexpr int kEach = 32 / kChunks, kStep = kEach * 4 * kChunks;
  const int lane = threadIdx.x % 32, c = lane % kChunks, first = lane / kChunks;
  to += first * (4 * kChunks) + (kChunks == 8 ? c ^ 2 * first : c) * 4;
  from += first * ld + 4 * c, rows -= first, left -= 4 * c;
  if (!vectors) return fetch_each<kCount, kEach>(to, from, ld, rows, left, kStep);
#pragma unroll
  for (int r = 0; r < kCount; r += kEach, to += kStep, from += kEach * ld)
    smem::copy16(to, from, r < rows && left > 0 ? 16 : 0);
}

template <typename T, bool kTf32>
__global__ void __launch_bounds__(kThreads, 1) reconstruct_kernel(const __grid_constant__ Arguments p) {
  using Split = cosine::Split<kTf32>;
  extern __shared__ __align__(16) float memory[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(memory);
  launch_successor();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int row0 = static_cast<int>(blockIdx.x) / p.passes * T::kRows, rows = min(T::kRows, p.Co - row0);
  const int pass = static_cast<int>(blockIdx.x) % p.passes, limit = min(p.Dv, (pass + 1) * p.width);
  const int begin = blockIdx.y * p.per_split, end = min(begin + p.per_split, p.Cn);
  // This warp's blocks of 16 of D, and groups of 32 columns: every eighth.
  const int depths = max((p.D + 15) / 16 - warp + kWarps - 1, 0) / kWarps;
  const int column0 = pass * p.width + 32 * warp, groups = max(limit - column0 + 255, 0) / 256;
  const int units = depths + 2 * groups;
  const float* const old = p.old + static_cast<int64_t>(row0) * p.D;
  float* const rings = memory + sizeof(Shared<T>) / sizeof(float);
  float* const ring = rings + warp * T::kStages * p.slot;
  float* const kept = rings + kWarps * T::kStages * p.slot + warp * (T::kRows * 16);
  const auto kept_of = [&](int unit) { return kept + unit * (kWarps * T::kRows * 16); };

  int first = begin, unit = 0, slot = 0;  // of the next load
  const auto load = [&] {
    if (first < end && units > 0) {
      float* const to = ring + slot * p.slot;
      slot = slot + 1 == T::kStages ? 0 : slot + 1;
      if (unit < depths) {
        const int k = (warp + unit * kWarps) * 16;
        fetch<kKeys, 4>(to, p.fresh + static_cast<int64_t>(first) * p.D + k, p.D, end - first, p.D - k, p.vector_rows);
        if (!p.resident || first == begin)
          fetch<T::kRows, 4>(p.resident ? kept_of(unit) : to + kUnit, old + k, p.D, rows, p.D - k, p.vector_rows);
      } else {
        const int key = first + (unit - depths) % 2 * 16, column = column0 + (unit - depths) / 2 * 256;
        fetch<16, 8>(to, p.values + static_cast<int64_t>(key) * p.Dv + column, p.Dv, end - key, limit - column,
                     p.vector_values);
      }
      if (++unit == units) unit = 0, first += kKeys;
    }
    smem::commit();
  };
  int stage = 0;
  const auto next = [&] {  // the unit that has come
    smem::wait<T::kStages - 2>();
    __syncwarp();
    load();
    const float* const ready = ring + stage * p.slot;
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
    return ready;
  };
#pragma unroll 1
  for (int i = 0; i < T::kStages - 1; ++i) load();

  // Of rows warp + 8 i: 1 / |old|, the bound of the cosines, and this lane's part of the denominator.
  float inverse[2 * T::MT], bound[2 * T::MT], total[2 * T::MT];
#pragma unroll
  for (int i = 0; i < 2 * T::MT; ++i) bound[i] = p.cold ? -2.f : 1.f, total[i] = 0.f;
  float sums[T::MT][T::kGroups][4][4] = {};  // column 4 c + j of the 32 is column c of product j

#pragma unroll 1
  for (int at = begin; at < end; at += kKeys) {
    Part<T>& part = shared.parts[warp];
    {
      float products[T::MT][4][4] = {}, keys[4] = {}, squares[2 * T::MT] = {};
#pragma unroll 1
      for (int u = 0; u < depths; ++u) {
        const float* const ready = next();
        const float* const from = (p.resident ? kept_of(u) : ready + kUnit) + g * 16 + 4 * q;
        Split left[T::MT], left8[T::MT];
#pragma unroll
        for (int m = 0; m < T::MT; ++m) {
          const Four<float> a = cosine::four(from + m * 256), a8 = cosine::four(from + m * 256 + 128);
          if (at == begin) squares[2 * m] += cosine::dot(a), squares[2 * m + 1] += cosine::dot(a8);
          left[m] = Split(a), left8[m] = Split(a8);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const Four<float> b = cosine::four(ready + (8 * n + g) * 16 + 4 * q);
          keys[n] += cosine::dot(b);
          const Split right(b);
#pragma unroll
          for (int m = 0; m < T::MT; ++m) cosine::add_product(products[m][n], left[m], left8[m], right);
        }
      }
#pragma unroll
      for (int m = 0; m < T::MT; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<float2*>(&part.products[(16 * m + g + 8 * half) * kLd + 8 * n + 2 * q]) =
                make_float2(products[m][n][2 * half], products[m][n][2 * half + 1]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float square = cosine::quad_sum(keys[n]);
        if (q == 0) part.keys[8 * n + g] = square;
      }
      if (at == begin) {
#pragma unroll
        for (int m = 0; m < 2 * T::MT; ++m) {
          const float square = cosine::quad_sum(squares[m]);
          if (q == 0) part.rows[8 * m + g] = square;
        }
      }
    }
    __syncthreads();

    // Weights: a lane has one new class.
    float square = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) square += shared.parts[w].keys[lane];
    const float key_inverse = cosine::inverse_norm(square);
#pragma unroll
    for (int i = 0; i < 2 * T::MT; ++i) {
      const int row = warp + kWarps * i;
      if (at == begin) {
        float square = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) square += shared.parts[w].rows[row];
        inverse[i] = cosine::inverse_norm(square);
      }
      float x = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) x += shared.parts[w].products[row * kLd + lane];
      x *= key_inverse * inverse[i];
      x = x > 1.f ? 1.f : x;
      const bool real = lane < end - at;
      if (p.cold) {
        const float largest = warp_max(real ? fmaxf(bound[i], x) : bound[i]);
        const float again = exp2f((bound[i] - largest) * p.scale);
        bound[i] = largest, total[i] *= again;
        if (lane == 0) shared.again[row] = again;
      }
      x = real ? exp2f((x - bound[i]) * p.scale) : 0.f;
      total[i] += x;
      const int to = lane / 16 * (T::kRows * 16) + row * 16 + cosine::place(lane % 16);
      uint32_t hi, lo;
      Split::split(x, hi, lo);
      shared.weights[0][to] = __uint_as_float(hi);
      if constexpr (!kTf32) shared.weights[1][to] = __uint_as_float(lo);
    }
    __syncthreads();

#pragma unroll
    for (int c = 0; c < T::kGroups; ++c) {
      if (c >= groups) break;
      if (p.cold && at > begin) {
#pragma unroll
        for (int m = 0; m < T::MT; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float again = shared.again[16 * m + g + i / 2 * 8];
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[m][c][j][i] *= again;
          }
      }
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const float* const ready = next() + q * 32 + (g ^ 2 * q) * 4;
        Four<float> v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = cosine::four(ready + 4 * i * 32);
        const int from = half * (T::kRows * 16) + g * 16 + 4 * q;
        Split left[T::MT], left8[T::MT];
#pragma unroll
        for (int m = 0; m < T::MT; ++m) {
          left[m].load(shared.weights[0] + from + m * 256, shared.weights[1] + from + m * 256);
          left8[m].load(shared.weights[0] + from + m * 256 + 128, shared.weights[1] + from + m * 256 + 128);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Four<float> column;
#pragma unroll
          for (int i = 0; i < 4; ++i) column[i] = v[i][j];
          const cosine::Split<kTf32, true> right(column);
#pragma unroll
          for (int m = 0; m < T::MT; ++m) cosine::add_product(sums[m][c][j], left[m], left8[m], right);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2 * T::MT; ++i) {
    const int row = warp + kWarps * i;
    total[i] = warp_sum(total[i]);
    if (lane > 0) continue;
    shared.total[row] = total[i];
    if (p.stats && pass == 0 && row < rows)
      p.stats[static_cast<int64_t>(blockIdx.y) * p.Co + row0 + row] = make_float2(bound[i], total[i]);
  }
  __syncthreads();
  float* const out = p.out + (static_cast<int64_t>(blockIdx.y) * p.Co + row0) * p.Dv;
#pragma unroll
  for (int m = 0; m < 2 * T::MT; ++m) {
    const int row = 8 * m + g;
    if (row >= rows) continue;
    const float factor = p.stats ? 1.f : 1.f / shared.total[row];
#pragma unroll
    for (int c = 0; c < T::kGroups; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = column0 + 256 * c + 8 * q + 4 * e;
        if (column >= limit) continue;
        float* const to = out + static_cast<int64_t>(row) * p.Dv + column;
        const float* const add = p.base ? p.base + static_cast<int64_t>(row0 + row) * p.Dv + column : nullptr;
        Four<float> v;
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = sums[m / 2][c][j][m % 2 * 2 + e] * factor;
        if (p.vector_out) {
          if (add)
#pragma unroll
            for (int j = 0; j < 4; ++j) v[j] += cosine::four(add)[j];
          *reinterpret_cast<Four<float>*>(to) = v;
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (column + j < limit) to[j] = add ? add[j] + v[j] : v[j];
        }
      }
  }
}

// A block per old class adds what its splits gave, kWidth columns a thread. kCold: the splits' bounds differ.
template <int kWidth, bool kCold>
__global__ void __launch_bounds__(kThreads) combine_kernel(const float* parts, const float2* stats, const float* base,
                                                           float* out, int splits, int Co, int Dv, float scale) {
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  float bound = -2.f, total = 0.f;
  if constexpr (kCold)
    for (int s = 0; s < splits; ++s) bound = fmaxf(bound, stats[static_cast<int64_t>(s) * Co + row].x);
  const auto factor = [&](float2 part) { return kCold ? exp2f((part.x - bound) * scale) : 1.f; };
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
    const float2 part = stats[static_cast<int64_t>(s) * Co + row];
    total += part.y * factor(part);
  }
  for (int c = threadIdx.x * kWidth; c < Dv; c += kThreads * kWidth) {
    using Vec = Elements<float, kWidth>;
    Vec sum{};
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      const int64_t at = static_cast<int64_t>(s) * Co + row;
      const Vec part = *reinterpret_cast<const Vec*>(parts + at * Dv + c);
      const float times = kCold ? factor(stats[at]) : 1.f;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum.values[i] += part.values[i] * times;
    }
    const Vec before = base ? *reinterpret_cast<const Vec*>(base + row * Dv + c) : Vec{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum.values[i] = before.values[i] + sum.values[i] / total;
    *reinterpret_cast<Vec*>(out + row * Dv + c) = sum;
  }
}

// Bytes of shared memory, with the old classes kept there or not.
template <typename T>
int shared_bytes(const Arguments& p, bool resident) {
  const int slot = kUnit + (resident ? 0 : T::kRows * 16), kept = resident ? (p.D + 15) / 16 * (T::kRows * 16) : 0;
  return static_cast<int>(sizeof(Shared<T>)) + (kWarps * T::kStages * slot + kept) * static_cast<int>(sizeof(float));
}

template <typename T>
struct Plan {
  int blocks, passes, splits;
  double cost;  // of all waves, in products of a warp; a unit's way to registers costs about as much as one
  explicit Plan(const Arguments& p) {
    passes = (p.Dv + T::kGroups * 256 - 1) / (T::kGroups * 256);
    blocks = (p.Co + T::kRows - 1) / T::kRows * passes;
    splits = std::clamp(multiprocessors() / blocks, 1, std::max(p.Cn / kMinSplit, 1));
    const int waves = (blocks * splits + multiprocessors() - 1) / multiprocessors();
    const int strips = ((p.Cn + splits - 1) / splits + kKeys - 1) / kKeys;
    cost = static_cast<double>(waves) * strips * (T::MT + 1) * (p.D + p.Dv / static_cast<double>(passes));
  }
};

template <typename T>
void launch(Arguments p, bool tf32, const Allocator& memory, cudaStream_t stream) {
  const Plan<T> plan(p);
  p.per_split = ((p.Cn + plan.splits - 1) / plan.splits + kKeys - 1) / kKeys * kKeys;
  const int used = (p.Cn + p.per_split - 1) / p.per_split;  // of which none is empty
  p.passes = plan.passes, p.width = ((p.Dv + plan.passes - 1) / plan.passes + 31) / 32 * 32;
  p.resident = shared_bytes<T>(p, true) <= shared_memory_limit();
  p.slot = kUnit + (p.resident ? 0 : T::kRows * 16);
  float* const out = p.out;
  const float* const base = p.base;
  if (used > 1) {
    const int64_t rows = int64_t(used) * p.Co;
    p.out = static_cast<float*>(memory(rows * p.Dv * sizeof(float)));
    p.stats = static_cast<float2*>(memory(rows * sizeof(float2)));
    p.base = nullptr;
  }
  const auto kernel = tf32 ? &reconstruct_kernel<T, true> : &reconstruct_kernel<T, false>;
  const int bytes = shared_bytes<T>(p, p.resident);
  const char* op = "reconstruct_prototypes";
  launch_kernel(op, kernel, dim3(plan.blocks, used), kThreads, bytes, stream, p);
  if (used > 1)
    launch_overlapped(op,
                      p.vector_out ? p.cold ? &combine_kernel<4, true> : &combine_kernel<4, false>
                      : p.cold     ? &combine_kernel<1, true>
                                   : &combine_kernel<1, false>,
                      p.Co, kThreads, 0, stream, true, p.out, p.stats, base, out, used, p.Co, p.Dv, p.scale);
}

}  // namespace

void reconstruct(const Reconstruction& p, double tau, bool tf32, const Allocator& memory, cudaStream_t stream) {
  Arguments a{p};
  a.scale = scale_of(tau), a.cold = tau < cosine::kCold;
  const auto vectors = [](const float* from, int width) { return width > 0 && width % 4 == 0 && aligned(from); };
  a.vector_rows = vectors(p.old, p.D) && vectors(p.fresh, p.D), a.vector_values = vectors(p.values, p.Dv);
  a.vector_out = p.Dv % 4 == 0 && aligned(p.out) && aligned(p.base);
#ifndef PLORA_NO_SM90
  // From half a wave of its blocks of 128 on; in float32 also from half a tile of 128 new classes on.
  if (!a.cold && a.vector_rows && a.vector_values && p.Co >= 64 * multiprocessors() && (tf32 || p.Cn >= 64) &&
      on_hopper() && !mma_only())
    return reconstruct_fast(p, tau, tf32, memory, stream);
#endif
  if (shared_bytes<Small>(a, false) > shared_memory_limit())
    launch<Narrow>(a, tf32, memory, stream);
  else if (shared_bytes<Large>(a, false) <= shared_memory_limit() && Plan<Large>(a).cost < Plan<Small>(a).cost)
    launch<Large>(a, tf32, memory, stream);
  else
    launch<Small>(a, tf32, memory, stream);
}

}  // namespace plora::cuda
