// reconstruct_prototypes on CUDA: softmax(cos(old, new) / tau) values, the weights never leaving the chip. A block owns
// some old classes and takes the new ones strip by strip: their cosines go to shared memory, become weights there, and
// multiply the values, slice by slice of their columns; both products stream through the same ring of stages.
//
// |cos| <= 1 bounds the exponent: exp((cos - 1) / tau) needs no running maximum, and numerators and denominators of
// strips just add up, in order. Only where tau is so small that all of a class's weights could vanish (exp(-2 / tau))
// the bound is the largest cosine so far. Few old classes leave blocks idle: then the new ones are split among blocks,
// whose parts combine_kernel adds in order.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/prototype_checks.h"
#include "cosine.cuh"
#include "device.cuh"
#include "overlap.cuh"

namespace plora::cuda {
namespace {

using cosine::kThreads;
using cosine::kWarps;

using Small = cosine::Tile<1, 2, 32, 4>;
using Medium = cosine::Tile<2, 2, 32, 4>;
using Large = cosine::Tile<5, 4, 16, 3>;

constexpr int kMaxStrip = 1024, kMinSplit = 512;  // new classes
constexpr double kCold = 0.025;                   // exp(-2 / tau) is a float32 above this

struct Arguments {
  const float *old, *fresh, *values;
  const float* base;  // [Co, Dv], added to the result, or null
  float* out;         // [Co, Dv], or the numerators of each split [splits, Co, Dv]
  float2* stats;      // [splits, Co]: bound and denominator; null where there is one split
  int Co, Cn, D, Dv, strip, per_split;
  float scale;  // log2(e) / tau
  bool cold, vector_rows, vector_values, pairs;
};

// Per row: 1 / |old|, the bound of the cosines, the denominator, and what earlier numerators are multiplied with.
template <typename T>
struct Rows {
  float inverse[T::kRows], bound[T::kRows], total[T::kRows], again[T::kRows];
};

template <typename T>
constexpr int shared_bytes(int strip) {
  return (T::kStages * T::kStage + strip * T::kRows) * static_cast<int>(sizeof(float)) +
         static_cast<int>(sizeof(Rows<T>));
}

// The cosines of a strip, [block][row][16] in the order of place(), become weights; zero beyond the last of `keys`.
template <typename T>
__device__ void soften(float* weights, Rows<T>& rows, int keys, int padded, float scale, bool cold, bool first) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < T::kRows; row += kWarps) {
    const auto each = [&](const auto& f) {  // f(cell, key) of this lane's
      for (int u = lane; u < padded / 4; u += 32) {
        float* const four = weights + u / 4 * (T::kRows * 16) + row * 16 + u % 4 * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) f(four[i], u / 4 * 16 + u % 4 + 4 * i);
      }
    };
    float bound = 1.f, again = 1.f, sum = 0.f;
    if (cold) {
      bound = first ? -2.f : rows.bound[row];
      float largest = bound;
      each([&](float& x, int key) { largest = key < keys ? fmaxf(largest, x) : largest; });
#pragma unroll
      for (int d = 16; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
      again = exp2f((bound - largest) * scale);
      bound = largest;
    }
    each([&](float& x, int key) {
      x = key < keys ? exp2f((x - bound) * scale) : 0.f;
      sum += x;
    });
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (lane == 0) {
      rows.total[row] = first ? sum : rows.total[row] * again + sum;
      rows.bound[row] = bound, rows.again[row] = again;
    }
  }
}

template <typename T, bool kTf32>
__global__ void __launch_bounds__(kThreads, 1) reconstruct_kernel(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) float memory[];
  float* const stages = memory;
  float* const weights = stages + T::kStages * T::kStage;
  Rows<T>& state = *reinterpret_cast<Rows<T>*>(weights + p.strip * T::kRows);
  launch_successor();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = blockIdx.x * T::kRows, rows = min(T::kRows, p.Co - row0);
  const int begin = blockIdx.y * p.per_split, end = min(begin + p.per_split, p.Cn);
  const int d_steps = max((p.D + T::kDepth - 1) / T::kDepth, 1), slices = (p.Dv + T::kColumns - 1) / T::kColumns;
  const float* const old = p.old + static_cast<int64_t>(row0) * p.D;
  float* const out = p.out + (static_cast<int64_t>(blockIdx.y) * p.Co + row0) * p.Dv;

  cosine::Products<T, kTf32> products;
  float squares[T::NT], unused[2 * T::MT];
  const auto clear = [&] {
    products.clear();
#pragma unroll
    for (int n = 0; n < T::NT; ++n) squares[n] = 0.f;
  };
  clear();

  for (int first = begin; first < end; first += p.strip) {
    const int keys = min(p.strip, end - first), v_steps = (keys + T::kDepth - 1) / T::kDepth;
    const int passes = (keys + T::kColumns - 1) / T::kColumns;
    const float* const fresh = p.fresh + static_cast<int64_t>(first) * p.D;
    const float* const values = p.values + static_cast<int64_t>(first) * p.Dv;

    // What is loaded next: step `inner` of pass `outer`, then of slice `outer`.
    int outer = 0, inner = 0, slot = 0;
    bool slicing = false;
    const auto load = [&] {
      float* const to = stages + slot * T::kStage;
      slot = slot + 1 == T::kStages ? 0 : slot + 1;
      if (!slicing) {
        const int k = inner * T::kDepth, key = outer * T::kColumns;
        cosine::fetch_rows<T::kRows, T::kDepth>(to, old + k, p.D, rows, p.D - k, p.vector_rows);
        cosine::fetch_rows<T::kColumns, T::kDepth>(to + T::kDepth * T::kRows,
                                                   fresh + static_cast<int64_t>(key) * p.D + k, p.D, keys - key,
                                                   p.D - k, p.vector_rows);
        if (++inner == d_steps) inner = 0, ++outer;
        if (outer == passes) outer = 0, slicing = true;
      } else if (outer < slices) {
        const int key = inner * T::kDepth, column = outer * T::kColumns;
        const float* const from = values + static_cast<int64_t>(key) * p.Dv + column;
        cosine::fetch_columns<T>(
            to, [&](int r) { return from + static_cast<int64_t>(r) * p.Dv; }, keys - key, p.Dv - column,
            p.vector_values);
        if (++inner == v_steps) inner = 0, ++outer;
      }
      smem::commit();
    };
    if (first > begin) __syncthreads();  // the last slice of the strip before is read
#pragma unroll 1
    for (int i = 0; i < T::kStages - 1; ++i) load();
    if (first == begin) {
      for (int r = warp; r < T::kRows; r += kWarps) {
        float square = 0.f;
        if (r < rows)
#pragma unroll 8
          for (int d = lane; d < p.D; d += 32)
            square += old[static_cast<int64_t>(r) * p.D + d] * old[static_cast<int64_t>(r) * p.D + d];
#pragma unroll
        for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(0xffffffffu, square, d);
        if (lane == 0) state.inverse[r] = cosine::inverse_norm(square);
      }
    }

    int stage = 0;
    const auto next = [&] {  // the stage that has come
      smem::wait<T::kStages - 2>();
      __syncthreads();
      load();
      const float* const ready = stages + stage * T::kStage;
      stage = stage + 1 == T::kStages ? 0 : stage + 1;
      return ready;
    };
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 1
      for (int k = 0; k < d_steps; ++k) products.template add_rows<false>(next(), squares, unused);
      float inverse[T::NT][2];
#pragma unroll
      for (int n = 0; n < T::NT; ++n) {
        const float own = cosine::inverse_norm(cosine::quad_sum(squares[n]));
        inverse[n][0] = cosine::of_column(own, 0), inverse[n][1] = cosine::of_column(own, 1);
      }
      products.each([&](int m, int n, int i, int row, int column) {
        const float x = products.sum[m][n][i] * inverse[n][i % 2] * state.inverse[row];
        const int key = pass * T::kColumns + column;
        weights[key / 16 * (T::kRows * 16) + row * 16 + cosine::place(key % 16)] = x > 1.f ? 1.f : x;
      });
      clear();
    }
    __syncthreads();
    soften(weights, state, keys, v_steps * T::kDepth, p.scale, p.cold, first == begin);

    const bool start = first == begin, finish = first + keys == end && p.stats == nullptr;
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
#pragma unroll 1
      for (int k = 0; k < v_steps; ++k)  // the weights are there from the first next() on
      {
        const float* const ready = next();
        products.add_columns(weights + k * (T::kDepth * T::kRows), ready,
                             [](int, const Four<float>&, const Four<float>&) {});
      }
      products.each([&](int m, int n, int i, int row, int column) {
        if (i % 2) return;  // by pairs of neighbours
        const int c = slice * T::kColumns + column;
        if (row >= rows || c >= p.Dv) return;
        const bool two = c + 1 < p.Dv;
        float* const to = out + static_cast<int64_t>(row) * p.Dv + c;
        float x = products.sum[m][n][i], y = products.sum[m][n][i + 1];
        if (!start) {
          x += to[0] * state.again[row];
          if (two) y += to[1] * state.again[row];
        }
        if (finish) {
          const float inverse = 1.f / state.total[row];
          x *= inverse, y *= inverse;
          if (p.base) {
            const float* const add = p.base + static_cast<int64_t>(row0 + row) * p.Dv + c;
            x += add[0];
            if (two) y += add[1];
          }
        }
        if (p.pairs) {
          *reinterpret_cast<float2*>(to) = make_float2(x, y);
        } else {
          to[0] = x;
          if (two) to[1] = y;
        }
      });
      products.clear();
    }
  }
  if (p.stats)
    for (int r = threadIdx.x; r < rows; r += kThreads)
      p.stats[static_cast<int64_t>(blockIdx.y) * p.Co + row0 + r] = make_float2(state.bound[r], state.total[r]);
}

// A block per old class adds what its splits gave.
__global__ void __launch_bounds__(kThreads) combine_kernel(const float* parts, const float2* stats, const float* base,
                                                           float* out, int splits, int Co, int Dv, float scale) {
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  float bound = -2.f, total = 0.f;
  for (int s = 0; s < splits; ++s) bound = fmaxf(bound, stats[static_cast<int64_t>(s) * Co + row].x);
  for (int s = 0; s < splits; ++s) {
    const float2 part = stats[static_cast<int64_t>(s) * Co + row];
    total += part.y * exp2f((part.x - bound) * scale);
  }
  for (int c = threadIdx.x; c < Dv; c += kThreads) {
    float sum = 0.f;
    for (int s = 0; s < splits; ++s) {
      const int64_t at = static_cast<int64_t>(s) * Co + row;
      sum += parts[at * Dv + c] * exp2f((stats[at].x - bound) * scale);
    }
    sum /= total;
    out[row * Dv + c] = base ? base[row * Dv + c] + sum : sum;
  }
}

template <typename T>
int strip_of(int64_t keys) {
  const int64_t whole = (keys + T::kColumns - 1) / T::kColumns * T::kColumns;
  const int64_t room = (shared_memory_limit() - shared_bytes<T>(0)) / (T::kRows * 4) / T::kColumns * T::kColumns;
  return static_cast<int>(std::min<int64_t>({whole, room, kMaxStrip}));
}

template <typename T>
void launch(Arguments p, bool tf32, cudaStream_t stream, const Tensor& like) {
  const int blocks = (p.Co + T::kRows - 1) / T::kRows;
  const int splits = std::clamp(multiprocessors() / blocks, 1, std::max(p.Cn / kMinSplit, 1));
  p.per_split = ((p.Cn + splits - 1) / splits + T::kColumns - 1) / T::kColumns * T::kColumns;
  const int used = (p.Cn + p.per_split - 1) / p.per_split;  // of which none is empty
  p.strip = strip_of<T>(std::min(p.per_split, p.Cn));
  float* const out = p.out;
  const float* const base = p.base;
  OptTensor parts, stats;
  if (used > 1) {
    parts = torch::stable::new_empty(like, {used, p.Co, p.Dv});
    stats = torch::stable::new_empty(like, {used, p.Co, 2});
    p.out = mutable_data<float>(*parts), p.stats = mutable_data<float2>(*stats), p.base = nullptr;
  }
  const auto kernel = tf32 ? &reconstruct_kernel<T, true> : &reconstruct_kernel<T, false>;
  const int bytes = shared_bytes<T>(p.strip);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(used)), kThreads, bytes, stream>>>(p);
  check_launch("reconstruct_prototypes");
  if (used > 1)
    launch_overlapped("reconstruct_prototypes", &combine_kernel, p.Co, kThreads, stream,
                      static_cast<const float*>(p.out), static_cast<const float2*>(p.stats), base, out, used, p.Co,
                      p.Dv, p.scale);
}

Tensor reconstruct_prototypes(const Tensor& old_, const Tensor& new_, const Tensor& values_, double tau, bool add_old,
                              bool tf32) {
  const char* op = "reconstruct_prototypes";
  check_reconstruct(op, old_, new_, values_, tau, add_old);
  const torch::stable::accelerator::DeviceGuard guard(old_.get_device_index());
  const ScalarType dtype = old_.scalar_type();
  check_float(op, "old", dtype);
  // What 16 bits hold is exact in TF32, so that 16-bit inputs lose nothing by it.
  const auto widened = [&](const Tensor& t) {
    return compact(dtype == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
  };
  const int64_t Co = old_.size(0), Cn = new_.size(0), D = old_.size(1), Dv = values_.size(1);
  STD_TORCH_CHECK(std::max({Co, Cn, D, Dv}) < INT32_MAX / 2, op, ": sizes beyond 2^30");
  const Tensor old = widened(old_), fresh = widened(new_), values = widened(values_);
  const Tensor out = torch::stable::new_empty(old, {Co, Dv});
  const auto result = [&] { return dtype == ScalarType::Float ? out : torch::stable::to(out, dtype); };
  if (Co == 0 || Dv == 0) return result();

  const auto aligned = [](const Tensor& t, int64_t width) {
    return width > 0 && width % 4 == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  };
  Arguments p{};
  p.old = data<float>(old), p.fresh = data<float>(fresh), p.values = data<float>(values);
  p.base = add_old ? p.old : nullptr;
  p.out = mutable_data<float>(out);
  p.Co = static_cast<int>(Co), p.Cn = static_cast<int>(Cn), p.D = static_cast<int>(D), p.Dv = static_cast<int>(Dv);
  p.scale = static_cast<float>(1.4426950408889634 / tau);
  p.cold = tau < kCold;
  p.vector_rows = aligned(old, D) && aligned(fresh, D), p.vector_values = aligned(values, Dv);
  p.pairs = Dv % 2 == 0;

  // The rows of a block: a wave of blocks costs about as much as its rows and 1.5 tiles of 16 more.
  const auto waves = [&](int64_t rows) {
    const int64_t blocks = (Co + rows - 1) / rows, sms = multiprocessors();
    return static_cast<double>((blocks + sms - 1) / sms) * (static_cast<double>(rows) / 16 + 1.5);
  };
  const bool fast = tf32 || dtype != ScalarType::Float;
  const cudaStream_t stream = stream_of(old_);
  if (strip_of<Large>(Cn) > 0 && waves(Large::kRows) < std::min(waves(Medium::kRows), waves(Small::kRows)))
    launch<Large>(p, fast, stream, old);
  else if (waves(Medium::kRows) < waves(Small::kRows))
    launch<Medium>(p, fast, stream, old);
  else
    launch<Small>(p, fast, stream, old);
  return result();
}

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) {
  m.impl("reconstruct_prototypes", TORCH_BOX(&plora::cuda::reconstruct_prototypes));
}
