// Two register-blocked products, compiled once per instruction set (PLORA_ISA is isa_default, isa_avx2 or isa_avx512):
//   gemm_nn: C[M, N] (+)= A[M, K] B[K, N]   with any strides of A, rows of B and C contiguous
//   gemm_nt: C[M, N] (+)= A[M, K] B[N, K]^T with rows of A and B contiguous
// They serve the thin products of LoRA (one side is the rank) and the similarity products of the prototypes. Every
// element is summed in one fixed order, so that results do not depend on the number of threads.

#include "../gemm.h"

#include <cstdint>
#include <cstring>

namespace plora::cpu::PLORA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename T>
struct Vec {
  typedef T type __attribute__((vector_size(kBytes)));
  static constexpr int size = kBytes / sizeof(T);
};

template <typename T>
inline typename Vec<T>::type load(const T* p) {
  typename Vec<T>::type v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
inline void store(T* p, typename Vec<T>::type v) {
  std::memcpy(p, &v, sizeof(v));
}

// An MR x (NV vectors) tile of C, all of K.
template <typename T, int MR, int NV>
inline void tile_nn(int64_t K, const T* A, int64_t a_row, int64_t a_col, const T* B, int64_t ldb, T* C, int64_t ldc,
                    bool accumulate) {
  using V = typename Vec<T>::type;
  constexpr int VL = Vec<T>::size;
  V c[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) c[i][j] = accumulate ? load(C + i * ldc + j * VL) : V{};
  for (int64_t k = 0; k < K; ++k) {
    V b[NV];
    for (int j = 0; j < NV; ++j) b[j] = load(B + k * ldb + j * VL);
    for (int i = 0; i < MR; ++i) {
      const T a = A[i * a_row + k * a_col];
      for (int j = 0; j < NV; ++j) c[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store(C + i * ldc + j * VL, c[i][j]);
}

// One strip of columns for all rows: the rows in tiles of MR, the rest one by one.
template <typename T, int NV>
inline void strip_nn(int64_t M, int64_t K, const T* A, int64_t a_row, int64_t a_col, const T* B, int64_t ldb, T* C,
                     int64_t ldc, bool accumulate) {
  constexpr int MR = 6;
  int64_t i = 0;
  for (; i + MR <= M; i += MR) tile_nn<T, MR, NV>(K, A + i * a_row, a_row, a_col, B, ldb, C + i * ldc, ldc, accumulate);
  for (; i < M; ++i) tile_nn<T, 1, NV>(K, A + i * a_row, a_row, a_col, B, ldb, C + i * ldc, ldc, accumulate);
}

template <typename T>
void gemm_nn(int64_t M, int64_t N, int64_t K, const T* A, int64_t a_row, int64_t a_col, const T* B, int64_t ldb, T* C,
             int64_t ldc, bool accumulate) {
  constexpr int VL = Vec<T>::size;
  int64_t j = 0;
  for (; j + 2 * VL <= N; j += 2 * VL) strip_nn<T, 2>(M, K, A, a_row, a_col, B + j, ldb, C + j, ldc, accumulate);
  for (; j + VL <= N; j += VL) strip_nn<T, 1>(M, K, A, a_row, a_col, B + j, ldb, C + j, ldc, accumulate);
  if (j == N) return;
  for (int64_t i = 0; i < M; ++i) {  // the last columns, fewer than a vector
    T c[VL] = {};
    if (accumulate)
      for (int64_t n = j; n < N; ++n) c[n - j] = C[i * ldc + n];
    for (int64_t k = 0; k < K; ++k) {
      const T a = A[i * a_row + k * a_col];
      for (int64_t n = j; n < N; ++n) c[n - j] += a * B[k * ldb + n];
    }
    for (int64_t n = j; n < N; ++n) C[i * ldc + n] = c[n - j];
  }
}

// An MR x NR tile of dot products, vectorised along K.
template <typename T, int MR, int NR>
inline void tile_nt(int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc, bool accumulate) {
  using V = typename Vec<T>::type;
  constexpr int VL = Vec<T>::size;
  V c[MR][NR] = {};
  int64_t k = 0;
  for (; k + VL <= K; k += VL) {
    V b[NR];
    for (int j = 0; j < NR; ++j) b[j] = load(B + j * ldb + k);
    for (int i = 0; i < MR; ++i) {
      const V a = load(A + i * lda + k);
      for (int j = 0; j < NR; ++j) c[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) {
      T part[VL];
      store(part, c[i][j]);
      for (int width = VL / 2; width > 0; width /= 2)
        for (int v = 0; v < width; ++v) part[v] += part[v + width];
      T sum = part[0];
      for (int64_t rest = k; rest < K; ++rest) sum += A[i * lda + rest] * B[j * ldb + rest];
      C[i * ldc + j] = accumulate ? C[i * ldc + j] + sum : sum;
    }
}

template <typename T, int NR>
inline void strip_nt(int64_t M, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc,
                     bool accumulate) {
  constexpr int MR = 4;
  int64_t i = 0;
  for (; i + MR <= M; i += MR) tile_nt<T, MR, NR>(K, A + i * lda, lda, B, ldb, C + i * ldc, ldc, accumulate);
  for (; i < M; ++i) tile_nt<T, 1, NR>(K, A + i * lda, lda, B, ldb, C + i * ldc, ldc, accumulate);
}

template <typename T>
void gemm_nt(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc,
             bool accumulate) {
  constexpr int64_t kDepth = 8192 / sizeof(T);  // of a block: a tile's rows of A and B fit into the first-level cache
  for (; K > kDepth; K -= kDepth, A += kDepth, B += kDepth, accumulate = true)
    gemm_nt(M, N, kDepth, A, lda, B, ldb, C, ldc, accumulate);
  constexpr int NR = kBytes >= 64 ? 4 : 2;  // 16 accumulators of 32 registers, 8 of 16
  int64_t j = 0;
  for (; j + NR <= N; j += NR) strip_nt<T, NR>(M, K, A, lda, B + j * ldb, ldb, C + j, ldc, accumulate);
  for (; j < N; ++j) strip_nt<T, 1>(M, K, A, lda, B + j * ldb, ldb, C + j, ldc, accumulate);
}

}  // namespace

const Gemm<float> gemm_f32 = {gemm_nn<float>, gemm_nt<float>};
const Gemm<double> gemm_f64 = {gemm_nn<double>, gemm_nt<double>};

}  // namespace plora::cpu::PLORA_ISA
