// reconstruct_prototypes for Hopper and many old classes: softmax(cos(old, new) / tau) values, in TF32 or true float32.
//
//   prepare_kernel      1 / |x| of all old and new classes; the values transposed, as TF32 operands must lie along k
//   reconstruct_kernel  a block owns 128 old classes and takes the new ones 256 at a time: their cosines become weights
//                       in shared memory, which multiply the values, a tile of columns after the other
//
// One thread feeds a ring of stages; two warpgroups multiply, 64 rows each, in turn.
//
// TF32: the matrix units cut operands to it. Norms and denominators are taken of what they see.
//
// Float32: a factor is the sum of two TF32 numbers, and a product three products of these; the fourth, of both low
// parts, is below the rounding. What lies in a stage is, cut by the matrix units, a tile's high part; three warps write
// the low one beside it. Rows come through registers, rounded to their high part, so that what the fourth products
// leave out has no sign. The units also cut their sums short, which would add up: they only sum over a stage, and
// ordinary additions do the rest. That takes twice the registers, so that tiles are half as wide.

#include <algorithm>
#include <type_traits>

#include "../device/sm90.cuh"
#include "../device/tensor_map.cuh"
#include "cosine.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

// A row of a stage is 16 floats, 64 bytes; a row of the weights 32 floats; both swizzled. The weights leave little
// room: stages are small, so that three of four are on their way.
constexpr int kRows = 128, kKeys = 256, kDepth = 16, kStages = 4, kThreads = 384;
constexpr uint32_t kBytesOld = kRows * kDepth * 4, kStage = kBytesOld + 256 * kDepth * 4;
constexpr uint32_t kBytesWeights = kRows * 128;  // of 32 keys
constexpr uint32_t kWeights = kRows * kKeys * 4, kBarriers = kWeights + kStages * kStage;
constexpr uint32_t kBytes = kBarriers + 24 * kStages;

constexpr int kSplitters = 96;  // threads

// The columns of a product: new classes, or of the values. In float32 their low parts take as much of a stage again.
template <bool kStrict>
constexpr int kTile = kStrict ? 128 : 256;

struct Maps {
  CUtensorMap old, fresh, values;
};

struct Arguments : Reconstruction {
  float scale;                                      // scale_of(tau)
  float *inverse_fresh, *inverse_old, *transposed;  // [padded], [Co], [Dv, ld]
  int64_t ld;
  int padded;              // Cn up to a multiple of kKeys
  int whole, parts, each;  // the first so many blocks have all columns; then so many share 128 rows, `each` slices each
};

// What the matrix units see of it.
__device__ inline float cut(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// What is left of it. That may have two bits more than the units see; the factor makes them round it, about, not cut.
__device__ inline float rest(float x) { return (x - cut(x)) * (1.f + 0x1p-12f); }

// 2^x, which is no denormal here.
__device__ inline float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <bool kStrict>
__global__ void __launch_bounds__(256) prepare_kernel(const __grid_constant__ Arguments p) {
  __shared__ float tile[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int norms = (p.padded + p.Co + 7) / 8, block = static_cast<int>(blockIdx.x) - norms;
  if (block < 0) {
    const int at = static_cast<int>(blockIdx.x) * 8 + warp, row = at - p.padded;
    if (row >= p.Co) return;
    const float* const from =
        row >= 0 ? p.old + static_cast<int64_t>(row) * p.D : p.fresh + static_cast<int64_t>(at) * p.D;
    float square = 0.f;
#pragma unroll 6
    for (int d = 4 * lane; d < (at < p.Cn || row >= 0 ? p.D : 0); d += 128) {
      const float4 v = *reinterpret_cast<const float4*>(from + d);
      for (const float x : {v.x, v.y, v.z, v.w}) {
        const float seen = kStrict ? x : cut(x);
        square += seen * seen;
      }
    }
    square = warp_sum(square);
    if (lane == 0) p.inverse_fresh[at] = cosine::inverse_norm(square);  // inverse_old follows it
    return;
  }
  const int across = (p.Dv + 31) / 32, key = block / across * 32, column = block % across * 32;
  for (int r = warp; r < 32; r += 8)
    if (key + r < p.Cn && column + lane < p.Dv) {
      const float x = p.values[static_cast<int64_t>(key + r) * p.Dv + column + lane];
      tile[r][lane] = kStrict ? x : __uint_as_float(to_tf32(x));
    }
  __syncthreads();
  for (int r = warp; r < 32; r += 8)
    if (column + r < p.Dv && key + lane < p.Cn) p.transposed[(column + r) * p.ld + key + lane] = tile[lane][r];
}

template <bool kStrict>
__global__ void __launch_bounds__(kThreads, 1)
    reconstruct_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic[];
  constexpr int kColumns = kTile<kStrict>;
  constexpr uint32_t kTileBytes = kColumns * kDepth * 4;
  const uint32_t memory = sm90::smem_address(dynamic);
  const auto stage = [](uint32_t step) { return kWeights + step % kStages * kStage; };
  const auto full = [&](uint32_t step) { return memory + kBarriers + step % kStages * 24; };
  const auto empty = [&](uint32_t step) { return full(step) + 8; };
  const auto split = [&](uint32_t step) { return full(step) + 16; };
  const auto wait_for = [&](uint32_t barrier, uint32_t step) { sm90::barrier_wait(barrier, step / kStages & 1); };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      sm90::barrier_init(full(i), 1), sm90::barrier_init(empty(i), 8);
      if (kStrict) sm90::barrier_init(split(i), kSplitters / 32);
    }
    sm90::fence_barrier_init();
    sm90::prefetch_map(&maps.old), sm90::prefetch_map(&maps.fresh), sm90::prefetch_map(&maps.values);
  }
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0) - 1;
  const int over = static_cast<int>(blockIdx.x) - p.whole;
  const int row0 = (over < 0 ? static_cast<int>(blockIdx.x) : p.whole + over / p.parts) * kRows;
  const int slices = (p.Dv + kColumns - 1) / kColumns, d_steps = (p.D + kDepth - 1) / kDepth;
  const int slice0 = over < 0 ? 0 : over % p.parts * p.each, slice1 = over < 0 ? slices : min(slices, slice0 + p.each);
  const auto v_steps = [&](int first) { return (min(p.Cn - first, kKeys) + kDepth - 1) / kDepth; };
  const auto end_of = [&](int first) { return min(p.Cn, first + kKeys); };
  uint32_t step = 0;

  if (group < 0) {
    if constexpr (kStrict) {
      sm90::shrink_registers<88>();
      if (threadIdx.x >= 128 - kSplitters) {
        const int thread = threadIdx.x - (128 - kSplitters);
        constexpr int kVectors = kTileBytes / 16, kEach = (kVectors + kSplitters - 1) / kSplitters;
        uint32_t steps = 0;
        for (int first = 0; first < p.Cn; first += kKeys)
          steps += (end_of(first) - first + kColumns - 1) / kColumns * d_steps + (slice1 - slice0) * v_steps(first);
#pragma unroll 1
        for (; step < steps; ++step) {
          wait_for(full(step), step);
          float4* const tile = reinterpret_cast<float4*>(dynamic + stage(step) + kBytesOld) + thread;
          float4 v[kEach];
#pragma unroll
          for (int i = 0; i < kEach; ++i)
            if (thread + i * kSplitters < kVectors) v[i] = tile[i * kSplitters];
#pragma unroll
          for (int i = 0; i < kEach; ++i)
            if (thread + i * kSplitters < kVectors)
              tile[kVectors + i * kSplitters] = make_float4(rest(v[i].x), rest(v[i].y), rest(v[i].z), rest(v[i].w));
          sm90::fence_async();
          sm90::release(split(step));
        }
        return;
      }
    } else {
      sm90::shrink_registers<40>();
    }
    if (threadIdx.x >= 32) return;
    const bool chosen = sm90::elect();
    const auto next = [&](uint32_t bytes) {  // the stage to fill
      sm90::barrier_wait(empty(step), (step / kStages & 1) ^ 1);
      sm90::barrier_arrive_expect(full(step), bytes, chosen);
      return memory + stage(step);
    };
    for (int first = 0; first < p.Cn; first += kKeys) {
#pragma unroll 1
      for (int at = first; at < end_of(first); at += kColumns)
#pragma unroll 1
        for (int k = 0; k < d_steps; ++k, ++step) {
          const uint32_t to = next(kBytesOld + kTileBytes);
          sm90::load_2d(&maps.old, full(step), to, k * kDepth, row0, chosen);
          sm90::load_2d(&maps.fresh, full(step), to + kBytesOld, k * kDepth, at, chosen);
        }
#pragma unroll 1
      for (int slice = slice0; slice < slice1; ++slice)
#pragma unroll 1
        for (int k = 0; k < v_steps(first); ++k, ++step) {
          const uint32_t to = next(kTileBytes);
          sm90::load_2d(&maps.values, full(step), to + kBytesOld, first + k * kDepth, slice * kColumns, chosen);
        }
    }
  } else {
    sm90::grow_registers<kStrict ? 208 : 232>();
    constexpr uint64_t kStaged = sm90::operand_layout(sm90::Swizzle::b64, 16, 512);
    constexpr uint64_t kWeighted = sm90::operand_layout(sm90::Swizzle::b128, 16, 1024);
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int row = group * 64 + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + g;  // and eight rows further down
    // Of 8 columns j, [4 j + {0, 1}] are row `row`, columns 2 q + {0, 1}, and [4 j + {2, 3}] eight rows further down.
    float d[kColumns / 2];
    // Adds the products of the block's rows at `rows`, in memory 64 or 128 bytes long, with the stage's tile; 16 bytes
    // c of a row, from `chunk` on, are multiplied.
    const auto multiply = [&](auto pitch, uint32_t rows, int chunk) {
      constexpr int kPitch = decltype(pitch)::value;
      const uint64_t b = sm90::operand(kStaged, memory + stage(step) + kBytesOld);
      if constexpr (kStrict) {
        const uint8_t* const from = dynamic + rows + row * kPitch + 4 * q;
        const int swizzle = kPitch == 64 ? g / 2 : g;
        uint32_t high[kDepth / 8][4], low[kDepth / 8][4];
#pragma unroll
        for (int i = 0; i < kDepth / 8; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at = ((chunk + 2 * i + e / 2) ^ swizzle) * 16 + e % 2 * 8 * kPitch;
            cosine::Split<false>::split(*reinterpret_cast<const float*>(from + at), high[i][e], low[i][e]);
          }
        wait_for(split(step), step);
        const uint64_t rest_of_b = b + kTileBytes / 16;
        float part[kColumns / 2];
        sm90::wgmma_fence();
        sm90::wgmma_tf32<false>(part, low[0], b);
        sm90::wgmma_tf32<true>(part, high[0], rest_of_b);
#pragma unroll
        for (int i = 1; i < kDepth / 8; ++i) {
          sm90::wgmma_tf32<true>(part, low[i], b + 2 * i);
          sm90::wgmma_tf32<true>(part, high[i], rest_of_b + 2 * i);
        }
#pragma unroll
        for (int i = 0; i < kDepth / 8; ++i) sm90::wgmma_tf32<true>(part, high[i], b + 2 * i);
        sm90::wgmma_commit();
        sm90::hold(part);
        sm90::wgmma_wait<0>();
        sm90::hold(part);
#pragma unroll
        for (int i = 0; i < kDepth / 8; ++i) sm90::hold(high[i]), sm90::hold(low[i]);
        sm90::release(empty(step));
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) d[i] += part[i];
      } else {
        const uint64_t a =
            sm90::operand(kPitch == 64 ? kStaged : kWeighted, memory + rows + group * 64 * kPitch + chunk * 16);
        sm90::hold(d);
        sm90::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kDepth / 8; ++i) sm90::wgmma_tf32(d, a + 2 * i, b + 2 * i);
        sm90::wgmma_commit();
        sm90::hold(d);
        sm90::wgmma_wait<0>();
        sm90::hold(d);
        sm90::release(empty(step));
      }
      ++step;
    };
    const std::integral_constant<int, 64> staged;
    const std::integral_constant<int, 128> weighted;
    const bool real[2] = {row0 + row < p.Co, row0 + row + 8 < p.Co};
    const auto inverse_of = [&](int half) { return real[half] ? p.inverse_old[row0 + row + 8 * half] * p.scale : 0.f; };
    const float inverse[2] = {inverse_of(0), inverse_of(1)};  // times log2(e) / tau
    float total[2] = {};

#pragma unroll 1
    for (int first = 0; first < p.Cn; first += kKeys) {
#pragma unroll 1
      for (int start = first; start < end_of(first); start += kColumns) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) d[i] = 0.f;
#pragma unroll 1
        for (int k = 0; k < d_steps; ++k) {
          wait_for(full(step), step);
          multiply(staged, stage(step), 0);
        }

        sm90::named_barrier(1 + group, 128);  // the weights before are read
        uint8_t* const weights = dynamic + (start - first) / 32 * kBytesWeights;
        float sum[2] = {};
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          const int key = start + 8 * j + 2 * q;
          const float2 other = *reinterpret_cast<const float2*>(p.inverse_fresh + key);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float w[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float x = d[4 * j + 2 * half + i] * (inverse[half] * (i ? other.y : other.x)) - p.scale;
              const float y = power(x > 0.f ? 0.f : x);
              w[i] = key + i < p.Cn ? kStrict ? y : __uint_as_float(to_tf32(y)) : 0.f;
              sum[half] += w[i];
            }
            // 32 keys of all rows, then the next 32; 16 bytes c of row r lie at c ^ r % 8.
            const uint32_t at =
                j / 4 * kBytesWeights + (row + 8 * half) * 128 + ((j % 4 * 2 + q / 2) ^ g) * 16 + q % 2 * 8;
            *reinterpret_cast<float2*>(weights + at) = make_float2(w[0], w[1]);
          }
        }
        total[0] += sum[0], total[1] += sum[1];
        if (!kStrict) sm90::fence_async();
        sm90::named_barrier(1 + group, 128);
      }

      const bool last = first + kKeys >= p.Cn;
      float factor[2] = {1.f, 1.f};
      if (last)
#pragma unroll
        for (int half = 0; half < 2; ++half) factor[half] = 1.f / cosine::quad_sum(total[half]);
#pragma unroll 1
      for (int slice = slice0; slice < slice1; ++slice) {
        // f(half, index in d, place) of all pairs of columns, eight apart: with its neighbour's other pair, a lane then
        // has four columns in a row.
        const bool odd = q % 2;
        const auto each = [&](const auto& f) {
#pragma unroll
          for (int j = 0; j < kColumns / 8; j += 2)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int column = slice * kColumns + 8 * j + 8 * odd + q / 2 * 4;
              f(half, 4 * j + 2 * half, static_cast<int64_t>(row0 + row + 8 * half) * p.Dv + column,
                real[half] && column < p.Dv);
            }
        };
        const auto swapped = [](float2 v) {
          return make_float2(__shfl_xor_sync(0xffffffffu, v.x, 1), __shfl_xor_sync(0xffffffffu, v.y, 1));
        };
        each([&](int, int i, int64_t at, bool there) {
          const float4 v = first > 0 && there ? __ldcg(reinterpret_cast<const float4*>(p.out + at))
                                              : make_float4(0.f, 0.f, 0.f, 0.f);
          const float2 other = swapped(odd ? make_float2(v.x, v.y) : make_float2(v.z, v.w));
          d[i] = odd ? other.x : v.x, d[i + 1] = odd ? other.y : v.y;
          d[i + 4] = odd ? v.z : other.x, d[i + 5] = odd ? v.w : other.y;
        });
#pragma unroll 1
        for (int k = 0; k < v_steps(first); ++k) {
          wait_for(full(step), step);
          multiply(weighted, k / 2 * kBytesWeights, k % 2 * 4);
        }
        each([&](int half, int i, int64_t at, bool there) {
          const float2 other = swapped(odd ? make_float2(d[i], d[i + 1]) : make_float2(d[i + 4], d[i + 5]));
          if (!there) return;
          float4 v =
              odd ? make_float4(other.x, other.y, d[i + 4], d[i + 5]) : make_float4(d[i], d[i + 1], other.x, other.y);
          v.x *= factor[half], v.y *= factor[half], v.z *= factor[half], v.w *= factor[half];
          if (last && p.base) {
            const float4 add = *reinterpret_cast<const float4*>(p.base + at);
            v.x += add.x, v.y += add.y, v.z += add.z, v.w += add.w;
          }
          __stcg(reinterpret_cast<float4*>(p.out + at), v);
        });
      }
    }
  }
#endif
}

template <bool kStrict>
void launch(const Reconstruction& p, double tau, const Allocator& memory, cudaStream_t stream) {
  const int64_t ld = (p.Cn + 3) / 4 * 4;
  const int64_t padded = (p.Cn + int64_t(kKeys) - 1) / kKeys * kKeys;
  Arguments a{p, scale_of(tau)};
  a.inverse_fresh = static_cast<float*>(memory((padded + p.Co) * sizeof(float)));
  a.inverse_old = a.inverse_fresh + padded;
  a.transposed = static_cast<float*>(memory(p.Dv * ld * sizeof(float)));
  a.ld = ld, a.padded = static_cast<int>(padded);
  // Float32: blocks of a last wave that would leave multiprocessors idle share out the columns, each with weights of
  // its own. TF32 would wait for the L2 cache instead.
  constexpr int kColumns = kTile<kStrict>;
  const int rows = (p.Co + kRows - 1) / kRows, left = rows % multiprocessors();
  const int slices = (p.Dv + kColumns - 1) / kColumns;
  const int shares = kStrict && left > 0 ? std::min(multiprocessors() / left, slices) : 1;
  a.each = (slices + shares - 1) / shares, a.parts = (slices + a.each - 1) / a.each, a.whole = rows - left;
  const int blocks = a.whole + left * a.parts;
  Maps maps;
  describe_tensor<2>(maps.old, Dtype::float32, p.old, {p.D, p.Co}, {p.D}, {kDepth, kRows}, k64);
  describe_tensor<2>(maps.fresh, Dtype::float32, p.fresh, {p.D, p.Cn}, {p.D}, {kDepth, kColumns}, k64);
  describe_tensor<2>(maps.values, Dtype::float32, a.transposed, {p.Cn, p.Dv}, {ld}, {kDepth, kColumns}, k64);
  const int norms = (a.padded + p.Co + 7) / 8, tiles = (p.Cn + 31) / 32 * ((p.Dv + 31) / 32);
  const char* op = "reconstruct_prototypes";
  launch_kernel(op, &prepare_kernel<kStrict>, norms + tiles, 256, 0, stream, a);
  launch_kernel(op, &reconstruct_kernel<kStrict>, blocks, kThreads, kBytes, stream, maps, a);
}

}  // namespace

void reconstruct_fast(const Reconstruction& p, double tau, bool tf32, const Allocator& memory, cudaStream_t stream) {
  tf32 ? launch<false>(p, tau, memory, stream) : launch<true>(p, tau, memory, stream);
}

}  // namespace plora::cuda
