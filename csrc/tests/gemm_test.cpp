// The inner loops of csrc/cpu/isa against plain loops in double: every instruction set that this machine runs, sizes
// around each tile's edge, strided A, every C0, nothing written outside of C, and the same bits however rows are cut.
#include "cpu/gemm.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/cpu_features.h"

namespace {

using plora::cpu::Gemm;

int failures = 0;

void fail(const char* isa, const char* what, int64_t M, int64_t N, int64_t K) {
  if (++failures <= 10) std::fprintf(stderr, "FAILED: %s %s M=%d N=%d K=%d\n", isa, what, int(M), int(N), int(K));
}

template <typename T>
std::vector<T> draw(int64_t n, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<T> values(n);
  for (T& v : values) v = static_cast<T>(normal(random));
  return values;
}

template <typename T>
bool near(T value, double expected, double size) {
  return std::abs(value - expected) <= (sizeof(T) == 4 ? 1e-6 : 1e-14) * (1 + size);
}

enum Start { kZeros, kItself, kOther, kOneRow };

template <typename T>
void test_nn(const char* isa, const Gemm<T>& gemm, int64_t M, int64_t N, int64_t K, bool by_columns, Start start,
             std::mt19937& random) {
  constexpr T poison = 12345;
  const int64_t ldc = N + 3, a_row = by_columns ? 1 : K, a_col = by_columns ? M : 1;
  const std::vector<T> A = draw<T>(M * K, random), B = draw<T>(N * K, random), other = draw<T>(M * N, random);
  std::vector<T> C = draw<T>(M * ldc, random);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t n = N; n < ldc; ++n) C[i * ldc + n] = poison;
  const std::vector<T> before = C;
  const T* C0 = start == kZeros ? nullptr : start == kItself ? C.data() : other.data();
  const int64_t ld0 = start == kItself ? ldc : start == kOther ? N : 0;
  gemm.nn(M, N, K, A.data(), a_row, a_col, B.data(), N, C0, ld0, C.data(), ldc);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t n = 0; n < ldc; ++n) {
      double expected = poison, size = 0;
      if (n < N)
        expected = start == kZeros ? 0 : start == kItself ? before[i * ldc + n] : other[i * (start == kOther) * N + n];
      for (int64_t k = 0; n < N && k < K; ++k) {
        expected += double(A[i * a_row + k * a_col]) * B[k * N + n];
        size += std::abs(double(A[i * a_row + k * a_col]) * B[k * N + n]);
      }
      if (!near(C[i * ldc + n], expected, size)) return fail(isa, "nn", M, N, K);
    }
  if (start == kItself || M == 0) return;
  std::vector<T> rows = before;  // one row at a time
  for (int64_t i = 0; i < M; ++i)
    gemm.nn(1, N, K, A.data() + i * a_row, a_row, a_col, B.data(), N, C0 ? C0 + i * ld0 : nullptr, ld0,
            rows.data() + i * ldc, ldc);
  if (std::memcmp(rows.data(), C.data(), C.size() * sizeof(T)) != 0) fail(isa, "nn, bits of single rows", M, N, K);
}

template <typename T>
void test_rest(const char* isa, const Gemm<T>& gemm, std::mt19937& random) {
  for (int64_t n : {0, 1, 3, 15, 16, 17, 64, 100, 769}) {
    const std::vector<T> a = draw<T>(n, random), b = draw<T>(n, random);
    double expected = 0, size = 0;
    for (int64_t i = 0; i < n; ++i) expected += double(a[i]) * b[i], size += std::abs(double(a[i]) * b[i]);
    if (!near(gemm.dot(n, a.data(), b.data()), expected, size)) fail(isa, "dot", 1, 1, n);
    std::vector<T> sum = b;
    gemm.add(n, a.data(), sum.data());
    for (int64_t i = 0; i < n; ++i)
      if (sum[i] != a[i] + b[i]) return fail(isa, "add", 1, n, 1);
  }
  T nan = std::nan(""), zero = 0, total = 0;
  gemm.exp_rows(1, 1, &nan, T(1), &zero, &total);
  if (!std::isnan(nan) || !std::isnan(total)) fail(isa, "exp_rows of NaN", 1, 1, 1);
  for (int64_t rows : {1, 5, 16, 33})
    for (int64_t columns : {1, 7, 16, 40}) {
      const std::vector<T> from = draw<T>(rows * (columns + 2), random);
      std::vector<T> to(columns * (rows + 1));
      gemm.transpose(rows, columns, from.data(), columns + 2, to.data(), rows + 1);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
          if (to[j * (rows + 1) + i] != from[i * (columns + 2) + j]) return fail(isa, "transpose", rows, columns, 1);

      std::vector<T> x(rows * columns), shift = draw<T>(columns, random), totals(columns, T(1));
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)  // exponents from 0 far below what a float holds
          x[i * columns + j] = (shift[j] - static_cast<T>(i == 0 ? 0 : i * i * (j + 1)) / 16) / T(2);
      const std::vector<T> before = x;
      gemm.exp_rows(rows, columns, x.data(), T(2), shift.data(), totals.data());
      for (int64_t j = 0; j < columns; ++j) {
        double sum = 1;
        for (int64_t i = 0; i < rows; ++i) {
          const double expected = std::exp(double(before[i * columns + j]) * 2 - double(shift[j]));
          if (std::abs(x[i * columns + j] - expected) > (sizeof(T) == 4 ? 4e-6 : 1e-13) * expected + 1e-37)
            return fail(isa, "exp_rows", rows, columns, 1);
          sum += expected;
        }
        if (!near(totals[j], sum, sum)) return fail(isa, "exp_rows, total", rows, columns, 1);
      }
    }
}

template <typename T>
void test(const char* isa, const Gemm<T>& gemm) {
  std::mt19937 random(0);
  for (int64_t M : {0, 1, 5, 6, 7, 11, 12, 13, 31})
    for (int64_t N : {1, 2, 4, 5, 8, 15, 16, 17, 31, 32, 33, 70})
      for (int64_t K : {0, 1, 3, 8, 17, 48, 49, 210})
        for (bool by_columns : {false, true})
          for (Start start : {kZeros, kItself, kOther, kOneRow}) test_nn(isa, gemm, M, N, K, by_columns, start, random);
  test_rest(isa, gemm, random);
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
