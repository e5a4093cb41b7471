// The thin matrix products behind the CPU kernels, chosen once for the machine's instruction set.
#pragma once

#include <cstdint>

namespace plora::cpu {

template <typename T>
struct Gemm {
  // C[M, N] (+)= A[M, K] B[K, N]; A[i, k] = A[i * a_row + k * a_col]
  void (*nn)(int64_t M, int64_t N, int64_t K, const T* A, int64_t a_row, int64_t a_col, const T* B, int64_t ldb, T* C,
             int64_t ldc, bool accumulate);
  // C[M, N] (+)= A[M, K] B[N, K]^T
  void (*nt)(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc,
             bool accumulate);
};

template <typename T>
const Gemm<T>& gemm();  // T is float or double

// One table for each instruction set that csrc/cpu/isa is compiled for.
#define PLORA_DECLARE_ISA(isa)        \
  namespace isa {                     \
  extern const Gemm<float> gemm_f32;  \
  extern const Gemm<double> gemm_f64; \
  }
PLORA_DECLARE_ISA(isa_default)
#if defined(__x86_64__)
PLORA_DECLARE_ISA(isa_avx2)
PLORA_DECLARE_ISA(isa_avx512)
#endif
#undef PLORA_DECLARE_ISA

}  // namespace plora::cpu
