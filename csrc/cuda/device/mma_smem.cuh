// Tensor core operands from shared memory, for the products whose operands need a transpose on the way (sm_80 and
// newer). Left and Right are the a and b of mma.cuh's layouts; `ld` is in elements. Rows of 2 n + 1 vectors of 16 bytes
// (kPad after an even number) are read without bank conflicts, for both sizes of elements.
#pragma once

#include "mma.cuh"

namespace plora::cuda::smem {

inline constexpr int kPad = 8;

__device__ inline uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes to shared memory, later: the first `bytes` of them are read, the others become zero.
__device__ inline void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `kPending` of this thread's latest groups are under way.
template <int kPending>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void ldmatrix(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ inline void ldmatrix_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// One step of k: d [16, 8] += left [16, kK] right [kK, 8]. 16-bit elements.
template <typename scalar>
struct Step {
  static constexpr int kK = 16;

  struct Left {
    uint32_t x[4];
    __device__ void load(const scalar* tile, int ld) {  // tile[m][k]
      const int lane = threadIdx.x % 32;
      ldmatrix(x, address(tile + lane % 16 * ld + lane / 16 * 8));
    }
    __device__ void load_transposed(const scalar* tile, int ld) {  // tile[k][m]
      const int lane = threadIdx.x % 32;
      ldmatrix_transposed(x, address(tile + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8));
    }
  };

  struct Right {  // 16 columns
    uint32_t x[4];
    __device__ void load_transposed(const scalar* tile, int ld) {  // tile[k][n]
      const int lane = threadIdx.x % 32;
      ldmatrix_transposed(x, address(tile + lane % 16 * ld + lane / 16 * 8));
    }
  };

  // `half`: which 8 of the 16 columns
  __device__ static void add(float (&d)[4], const Left& a, const Right& b, int half) {
    mma_m16n8k16<scalar>(d, a.x[0], a.x[1], a.x[2], a.x[3], b.x[2 * half], b.x[2 * half + 1]);
  }
};

// float32: each element is two TF32 numbers, hi + lo, exact to 2^-22.
template <>
struct Step<float> {
  static constexpr int kK = 8;

  struct Left : Operand<float> {
    __device__ void load_transposed(const float* tile, int ld) {  // tile[k][m]
      const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) set(i, tile[(q + i / 2 * 4) * ld + g + i % 2 * 8]);
    }
  };

  struct Right : Operand<float> {
    __device__ void load_transposed(const float* tile, int ld) {  // tile[k][n]
      const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) set(i, tile[(q + i % 2 * 4) * ld + g + i / 2 * 8]);
    }
  };

  // The tensor core cuts what it adds up to d's last bit, always towards zero: over thousands of rows that would be
  // seen, so the sum over the steps is made by ordinary additions.
  __device__ static void add(float (&d)[4], const Left& a, const Right& b, int half) {
    const int n = 2 * half;
    float step[4] = {};
    mma_m16n8k8(step, a.lo[0], a.lo[1], a.lo[2], a.lo[3], b.hi[n], b.hi[n + 1]);
    mma_m16n8k8(step, a.hi[0], a.hi[1], a.hi[2], a.hi[3], b.lo[n], b.lo[n + 1]);
    mma_m16n8k8(step, a.hi[0], a.hi[1], a.hi[2], a.hi[3], b.hi[n], b.hi[n + 1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += step[i];
  }
};

}  // namespace plora::cuda::smem
