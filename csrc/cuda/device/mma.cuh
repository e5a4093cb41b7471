// Tensor core products of one warp (sm_80 and newer) whose operands come as vectors, straight from memory.
//
// What lane 4 g + q holds of d += a b, as the hardware has it:
//   m16n8k16, 16 bits   a: rows g, g + 8 at k = 2 q, 2 q + 1, 2 q + 8, 2 q + 9     b: those k of column g
//   m16n8k8, TF32       a: rows g, g + 8 at k = q, q + 4                           b: those k of column g
//   both                d: columns 2 q, 2 q + 1 of rows g, g + 8
// The k may be taken in any order that a and b share. So here a lane gives four neighbouring ones, 4 q to 4 q + 3 of a
// block of 16 (Four), and multiply() contracts the block. A 16-byte vector of 16-bit elements serves two blocks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace plora::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename scalar>
__device__ inline scalar from_float(float x) {
  if constexpr (std::is_same_v<scalar, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<scalar, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

// To the nearest TF32, as the bits of a float.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// d += a b over k = 16, bf16 or fp16; a: row g, row g + 8, then both again at the upper k.
template <typename scalar>
__device__ inline void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  static_assert(sizeof(scalar) == 2);
  if constexpr (std::is_same_v<scalar, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d += a b over k = 8, TF32.
__device__ inline void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four neighbouring elements: 8 or 16 bytes, and aligned to them.
template <typename scalar>
struct alignas(4 * sizeof(scalar)) Four {
  using Raw = std::conditional_t<sizeof(scalar) == 2, uint2, uint4>;
  Raw raw;
  __device__ scalar& operator[](int i) { return reinterpret_cast<scalar*>(&raw)[i]; }
  __device__ const scalar& operator[](int i) const { return reinterpret_cast<const scalar*>(&raw)[i]; }
};

// 16 bytes of elements.
template <typename scalar>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(scalar));

template <typename scalar>
struct alignas(16) Vector {
  uint4 raw;
  __device__ scalar& operator[](int i) { return reinterpret_cast<scalar*>(&raw)[i]; }
  __device__ const scalar& operator[](int i) const { return reinterpret_cast<const scalar*>(&raw)[i]; }
  __device__ const Four<scalar>& four(int i) const { return reinterpret_cast<const Four<scalar>*>(&raw)[i]; }
};

// Neighbouring elements, read and written at once.
template <typename scalar, int kCount>
struct alignas(sizeof(scalar) * kCount) Elements {
  scalar values[kCount];
};

// One store of 16 bytes to global memory. (As an assignment the compiler takes it apart where the parts were computed.)
__device__ inline void store_vector(void* to, const uint4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// `left` elements are there, then come zeros. VECTORS: aligned, and `left` is whole vectors; WHOLE: at least one.
template <bool VECTORS, bool WHOLE = false, typename scalar>
__device__ inline Vector<scalar> load(const scalar* from, int left) {
  Vector<scalar> v;
  if constexpr (VECTORS) {
    v.raw = WHOLE || left > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{};
  } else {
#pragma unroll
    for (int i = 0; i < kVector<scalar>; ++i) v[i] = i < left ? from[i] : from_float<scalar>(0);
  }
  return v;
}

template <bool VECTORS, typename scalar>
__device__ inline void store(scalar* to, const Vector<scalar>& v, int left) {
  if constexpr (VECTORS) {
    if (left > 0) store_vector(to, v.raw);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<scalar>; ++i)
      if (i < left) to[i] = v[i];
  }
}

// The sum over a warp, for all its lanes.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

// Over a block; called once.
template <int kThreads>
__device__ inline float block_sum(float x) {
  __shared__ float warps[kThreads / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < kThreads / 32; ++w) sum += warps[w];
  return sum;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  return x;
}

// The sum over the lanes of a warp up to this one.
__device__ inline int sum_up_to(int lane, int x) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, x, d);
    if (lane >= d) x += before;
  }
  return x;
}

// How far apart the rows of h lie in shared memory, so that the fragments of a warp miss each other's banks.
constexpr int padded(int ranks) { return (ranks + 47) / 64 * 64 + 16; }

// Four elements as multiply() takes them. float32 comes as two TF32 numbers: hi + lo is exact to 2^-22.
template <typename scalar>
struct Operand {
  uint32_t first, second;
  Operand() = default;
  __device__ explicit Operand(const Four<scalar>& v) : first(v.raw.x), second(v.raw.y) {}
};

template <>
struct Operand<float> {
  uint32_t hi[4], lo[4];
  Operand() = default;
  __device__ explicit Operand(const Four<float>& v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) set(i, v[i]);
  }
  __device__ void set(int i, float x) {
    hi[i] = to_tf32(x);
    lo[i] = to_tf32(x - __uint_as_float(hi[i]));
  }
};

// d += a b over a block of 16; `a` is of row g, `a8` of row g + 8, `b` of column g.
template <typename scalar>
__device__ inline void multiply(float (&d)[4], const Operand<scalar>& a, const Operand<scalar>& a8,
                                const Operand<scalar>& b) {
  mma_m16n8k16<scalar>(d, a.first, a8.first, a.second, a8.second, b.first, b.second);
}

// True float32 by three products, the small ones first (lo lo is below the rounding). The matrix units cut their sums
// short instead of rounding them, so blocks are summed by ordinary additions. Operands have hi[4] and lo[4].
template <typename Left, typename Right>
__device__ inline void multiply_float32(float (&d)[4], const Left& a, const Left& a8, const Right& b) {
  float sum[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    mma_m16n8k8(sum, a.lo[i], a8.lo[i], a.lo[i + 1], a8.lo[i + 1], b.hi[i], b.hi[i + 1]);
    mma_m16n8k8(sum, a.hi[i], a8.hi[i], a.hi[i + 1], a8.hi[i + 1], b.lo[i], b.lo[i + 1]);
    mma_m16n8k8(sum, a.hi[i], a8.hi[i], a.hi[i + 1], a8.hi[i + 1], b.hi[i], b.hi[i + 1]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}

__device__ inline void multiply(float (&d)[4], const Operand<float>& a, const Operand<float>& a8,
                                const Operand<float>& b) {
  multiply_float32(d, a, a8, b);
}

}  // namespace plora::cuda
