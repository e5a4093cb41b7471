// The products of csrc/cpu/isa against plain loops in double: every instruction set that this machine runs, sizes
// around each tile's edge, strided A, accumulation, and nothing written outside of C.
#include "cpu/gemm.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "common/cpu_features.h"

namespace {

int failures = 0;

template <typename T>
std::vector<T> draw(int64_t n, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<T> values(n);
  for (T& v : values) v = static_cast<T>(normal(random));
  return values;
}

template <typename T>
void test(const char* isa, const plora::cpu::Gemm<T>& gemm) {
  std::mt19937 random(0);
  constexpr T poison = 12345;
  for (int64_t M : {1, 3, 4, 6, 7, 32})
    for (int64_t N : {1, 2, 4, 5, 8, 15, 16, 17, 31, 32, 33, 70})
      for (int64_t K : {0, 1, 3, 8, 16, 17, 65, 2100})
        for (int transposed : {0, 1})  // nn with A read by columns, and nt
          for (bool accumulate : {false, true}) {
            const int64_t ldc = N + 3;
            const std::vector<T> A = draw<T>(M * K, random), B = draw<T>(N * K, random);
            std::vector<T> C = draw<T>(M * ldc, random);
            for (int64_t i = 0; i < M; ++i)
              for (int64_t n = N; n < ldc; ++n) C[i * ldc + n] = poison;
            const std::vector<T> before = C;
            if (transposed)
              gemm.nt(M, N, K, A.data(), K, B.data(), K, C.data(), ldc, accumulate);
            else
              gemm.nn(M, N, K, A.data(), 1, M, B.data(), N, C.data(), ldc, accumulate);
            for (int64_t i = 0; i < M; ++i)
              for (int64_t n = 0; n < ldc; ++n) {
                double expected = n < N ? (accumulate ? before[i * ldc + n] : 0) : poison, size = 1;
                for (int64_t k = 0; n < N && k < K; ++k) {
                  const double a = transposed ? A[i * K + k] : A[k * M + i];
                  const double b = transposed ? B[n * K + k] : B[k * N + n];
                  expected += a * b;
                  size += std::abs(a * b);
                }
                if (std::abs(C[i * ldc + n] - expected) <= (sizeof(T) == 4 ? 1e-6 : 1e-14) * size) continue;
                std::fprintf(stderr, "FAILED: %s %s M=%d N=%d K=%d at (%d, %d): %g, expected %g\n", isa,
                             transposed ? "nt" : "nn", int(M), int(N), int(K), int(i), int(n), double(C[i * ldc + n]),
                             expected);
                if (++failures > 10) return;
              }
          }
}

}  // namespace

int main() {
  using namespace plora;
  test("default float", cpu::isa_default::gemm_f32);
  test("default double", cpu::isa_default::gemm_f64);
#if defined(__x86_64__)
  const Isa widest = choose_isa(detect_cpu_features(), nullptr);
  if (widest >= Isa::kAvx2) {
    test("avx2 float", cpu::isa_avx2::gemm_f32);
    test("avx2 double", cpu::isa_avx2::gemm_f64);
  }
  if (widest >= Isa::kAvx512) {
    test("avx512 float", cpu::isa_avx512::gemm_f32);
    test("avx512 double", cpu::isa_avx512::gemm_f64);
  }
#endif
  if (failures == 0) std::puts("gemm: all equal to the plain loops");
  return failures != 0;
}
