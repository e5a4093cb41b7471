// reconstruct_prototypes in TF32, for Hopper and many old classes: softmax(cos(old, new) / tau) values.
//
//   prepare_kernel      1 / |x| of all old and new classes; the values transposed, as TF32 operands must lie along k
//   reconstruct_kernel  a block owns 128 old classes and takes the new ones 256 at a time: their cosines become weights
//                       in shared memory, which multiply the values, 256 columns after the other
//
// One thread feeds a ring of stages; two warpgroups multiply, 64 rows each, in turn. The matrix units cut operands to
// TF32: norms are taken of what they see, and denominators of the weights that they see.

#include <algorithm>

#include "device.cuh"
#include "reconstruct_kernels.h"
#include "sm90.cuh"
#include "tensor_map.cuh"

namespace plora::cuda {
namespace {

// A row of a stage is 16 floats, 64 bytes; a row of the weights 32 floats; both swizzled. The weights leave little
// room: stages are small, so that three of four are on their way.
constexpr int kRows = 128, kKeys = 256, kColumns = 256, kDepth = 16, kStages = 4, kThreads = 384;
constexpr uint32_t kBytesOld = kRows * kDepth * 4, kBytesTile = 256 * kDepth * 4, kStage = kBytesOld + kBytesTile;
constexpr uint32_t kBytesWeights = kRows * 128;  // of 32 keys
constexpr uint32_t kWeights = kRows * kKeys * 4, kBarriers = kWeights + kStages * kStage;
constexpr uint32_t kBytes = kBarriers + 16 * kStages;
constexpr float kEps = 1e-12f;  // norms below this count as this

struct Maps {
  CUtensorMap old, fresh, values;
};

struct Arguments : FastReconstruction {
  float *inverse_fresh, *inverse_old, *transposed;  // [padded], [Co], [Dv, ld]
  int64_t ld;
  int padded;  // Cn up to a multiple of kKeys
};

// To the nearest TF32.
__device__ inline float rounded(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// 2^x, which is no denormal here.
__device__ inline float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

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
        const float seen = __uint_as_float(__float_as_uint(x) & 0xffffe000u);
        square += seen * seen;
      }
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(0xffffffffu, square, d);
    const float norm = sqrtf(square);
    if (lane == 0) p.inverse_fresh[at] = 1.f / (norm < kEps ? kEps : norm);  // inverse_old follows it
    return;
  }
  const int across = (p.Dv + 31) / 32, key = block / across * 32, column = block % across * 32;
  for (int r = warp; r < 32; r += 8)
    if (key + r < p.Cn && column + lane < p.Dv)
      tile[r][lane] = rounded(p.values[static_cast<int64_t>(key + r) * p.Dv + column + lane]);
  __syncthreads();
  for (int r = warp; r < 32; r += 8)
    if (column + r < p.Dv && key + lane < p.Cn) p.transposed[(column + r) * p.ld + key + lane] = tile[lane][r];
}

__global__ void __launch_bounds__(kThreads, 1)
    reconstruct_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const uint32_t memory = sm90::smem_address(dynamic), stages = memory + kWeights;
  const auto full = [&](uint32_t step) { return memory + kBarriers + step % kStages * 16; };
  const auto empty = [&](uint32_t step) { return full(step) + 8; };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) sm90::barrier_init(full(i), 1), sm90::barrier_init(empty(i), 8);
    sm90::fence_barrier_init();
    sm90::prefetch_map(&maps.old), sm90::prefetch_map(&maps.fresh), sm90::prefetch_map(&maps.values);
  }
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0) - 1;
  const int row0 = static_cast<int>(blockIdx.x) * kRows;
  const int d_steps = (p.D + kDepth - 1) / kDepth, slices = (p.Dv + kColumns - 1) / kColumns;
  const auto v_steps = [&](int first) { return (min(p.Cn - first, kKeys) + kDepth - 1) / kDepth; };
  uint32_t step = 0;

  if (group < 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x > 0) return;
    const auto next = [&](uint32_t bytes) {  // the stage to fill
      sm90::barrier_wait(empty(step), (step / kStages & 1) ^ 1);
      sm90::barrier_arrive_expect(full(step), bytes);
      return stages + step % kStages * kStage;
    };
    for (int first = 0; first < p.Cn; first += kKeys) {
#pragma unroll 1
      for (int k = 0; k < d_steps; ++k, ++step) {
        const uint32_t to = next(kStage);
        sm90::load_2d(&maps.old, full(step), to, k * kDepth, row0);
        sm90::load_2d(&maps.fresh, full(step), to + kBytesOld, k * kDepth, first);
      }
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice)
#pragma unroll 1
        for (int k = 0; k < v_steps(first); ++k, ++step) {
          const uint32_t to = next(kBytesTile);
          sm90::load_2d(&maps.values, full(step), to + kBytesOld, first + k * kDepth, slice * kColumns);
        }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    constexpr uint64_t kStaged = sm90::operand_layout(sm90::Swizzle::b64, 16, 512);
    constexpr uint64_t kWeighted = sm90::operand_layout(sm90::Swizzle::b128, 16, 1024);
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int row = group * 64 + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + g;  // and eight rows further down
    // Of 8 columns j, [4 j + {0, 1}] are row `row`, columns 2 q + {0, 1}, and [4 j + {2, 3}] eight rows further down.
    float d[128];
    const auto multiply = [&](uint64_t a) {  // rows with the stage's tile
      const uint64_t b = sm90::operand(kStaged, stages + step % kStages * kStage + kBytesOld);
      sm90::hold(d);
      sm90::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDepth / 8; ++i) sm90::wgmma_tf32(d, a + 2 * i, b + 2 * i);
      sm90::wgmma_commit();
      sm90::hold(d);
      sm90::wgmma_wait<0>();
      sm90::hold(d);
      __syncwarp();
      if (lane == 0) sm90::barrier_arrive(empty(step));
      ++step;
    };
    const auto wait = [&] { sm90::barrier_wait(full(step), step / kStages & 1); };
    const bool real[2] = {row0 + row < p.Co, row0 + row + 8 < p.Co};
    const auto inverse_of = [&](int half) { return real[half] ? p.inverse_old[row0 + row + 8 * half] * p.scale : 0.f; };
    const float inverse[2] = {inverse_of(0), inverse_of(1)};  // times log2(e) / tau
    float total[2] = {};

#pragma unroll 1
    for (int first = 0; first < p.Cn; first += kKeys) {
#pragma unroll
      for (int i = 0; i < 128; ++i) d[i] = 0.f;
#pragma unroll 1
      for (int k = 0; k < d_steps; ++k) {
        wait();
        multiply(sm90::operand(kStaged, stages + step % kStages * kStage + group * (kBytesOld / 2)));
      }

      sm90::named_barrier(1 + group, 128);  // the weights before are read
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        const int key = first + 8 * j + 2 * q;
        const float2 other = *reinterpret_cast<const float2*>(p.inverse_fresh + key);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float w[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float x = d[4 * j + 2 * half + i] * (inverse[half] * (i ? other.y : other.x)) - p.scale;
            w[i] = key + i < p.Cn ? rounded(power(x > 0.f ? 0.f : x)) : 0.f;
            total[half] += w[i];
          }
          // 32 keys of all rows, then the next 32; 16 bytes c of row r lie at c ^ r % 8.
          const uint32_t at =
              j / 4 * kBytesWeights + (row + 8 * half) * 128 + ((j % 4 * 2 + q / 2) ^ g) * 16 + q % 2 * 8;
          *reinterpret_cast<float2*>(dynamic + at) = make_float2(w[0], w[1]);
        }
      }
      sm90::fence_async();
      sm90::named_barrier(1 + group, 128);

      const bool last = first + kKeys >= p.Cn;
      float factor[2] = {1.f, 1.f};
      if (last)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = total[half];
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          factor[half] = 1.f / sum;
        }
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
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
          wait();
          multiply(sm90::operand(kWeighted, memory + k / 2 * kBytesWeights + group * (kBytesWeights / 2) + k % 2 * 64));
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

}  // namespace

void reconstruct_fast(const FastReconstruction& p, const Tensor& like, cudaStream_t stream) {
  const int64_t ld = (p.Cn + 3) / 4 * 4;
  const int64_t padded = (p.Cn + int64_t(kKeys) - 1) / kKeys * kKeys;
  const Tensor inverse = allocate(like, {padded + p.Co});
  const Tensor transposed = allocate(like, {p.Dv, ld});
  Arguments a{};
  static_cast<FastReconstruction&>(a) = p;
  a.inverse_fresh = mutable_data<float>(inverse), a.inverse_old = a.inverse_fresh + padded;
  a.transposed = mutable_data<float>(transposed), a.ld = ld, a.padded = static_cast<int>(padded);
  Maps maps;
  constexpr auto k64 = CU_TENSOR_MAP_SWIZZLE_64B;
  describe_tensor<2>(maps.old, ScalarType::Float, p.old, {p.D, p.Co}, {p.D}, {kDepth, kRows}, k64);
  describe_tensor<2>(maps.fresh, ScalarType::Float, p.fresh, {p.D, p.Cn}, {p.D}, {kDepth, kKeys}, k64);
  describe_tensor<2>(maps.values, ScalarType::Float, a.transposed, {p.Cn, p.Dv}, {ld}, {kDepth, kColumns}, k64);
  const int norms = (a.padded + p.Co + 7) / 8, tiles = (p.Cn + 31) / 32 * ((p.Dv + 31) / 32);
  prepare_kernel<<<static_cast<unsigned>(norms + tiles), 256, 0, stream>>>(a);
  check_launch("reconstruct_prototypes");
  allow_shared_memory(&reconstruct_kernel, kBytes);
  reconstruct_kernel<<<static_cast<unsigned>((p.Co + kRows - 1) / kRows), kThreads, kBytes, stream>>>(maps, a);
  check_launch("reconstruct_prototypes");
}

}  // namespace plora::cuda
