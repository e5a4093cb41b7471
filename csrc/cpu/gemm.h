// The inner loops behind the CPU kernels, chosen once for the machine's instruction set.
#pragma once

#include <cstdint>

namespace plora::cpu {

template <typename T>
struct Gemm {
  // C[M, N] = C0[M, N] + A[M, K] B[K, N] with A[i, k] = A[i * a_row + k * a_col]. C0 may be C itself, or null for
  // zeros; ld0 = 0 repeats one row.
  void (*nn)(int64_t M, int64_t N, int64_t K, const T* A, int64_t a_row, int64_t a_col, const T* B, int64_t ldb,
             const T* C0, int64_t ld0, T* C, int64_t ldc);
  // to[columns, rows] = from[rows, columns]^T
  void (*transpose)(int64_t rows, int64_t columns, const T* from, int64_t ld_from, T* to, int64_t ld_to);
  // sum of a[i] b[i]
  T (*dot)(int64_t n, const T* a, const T* b);
  // x[i, j] = exp(scale x[i, j] - shift[j]), an exponent of at most 0; total[j] += x[i, j] in the order of i
  void (*exp_rows)(int64_t rows, int64_t columns, T* x, T scale, const T* shift, T* total);
  // y[i] += x[i]
  void (*add)(int64_t n, const T* x, T* y);
  // y[i] = x[i], past the caches where y is aligned
  void (*stream)(int64_t n, const T* x, T* y);
  // the columns of B that nn takes at a time: B packed in panels of this width is read from one end to the other
  int64_t panel;
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
