// Register-blocked products, compiled once per instruction set (PLORA_ISA is isa_default, isa_avx2 or isa_avx512).
// Every element is summed in one fixed order, whatever tile it falls into: results depend neither on how rows are cut
// into calls nor on the number of threads.

#include "../gemm.h"

#include <cmath>
#include <utility>

#include "vector.h"

#define PLORA_UNROLL(n) _Pragma(PLORA_TEXT(GCC unroll n))
#define PLORA_TEXT(x) #x

namespace plora::cpu::PLORA_ISA {
namespace {

// Rows of a tile of nn: with two vectors a row, 24 accumulators of 32 registers or 12 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 12;
#else
constexpr int kTile = 6;
#endif

template <typename T>
using Tile = void (*)(int64_t strips, int64_t K, const T* A, int64_t a_row, int64_t a_col, const T* B, int64_t ldb,
                      const T* C0, int64_t ld0, T* C, int64_t ldc, int last);

// MR rows of C in strips of NV vectors, each tile with all of K. With PART, a strip's last vector has `last` elements.
template <typename T, int MR, int NV, bool PART>
void tile_nn(int64_t strips, int64_t K, const T* A, int64_t a_row, int64_t a_col, const T* B, int64_t ldb, const T* C0,
             int64_t ld0, T* C, int64_t ldc, int last) {
  using V = typename Vec<T>::type;
  constexpr int VL = Vec<T>::size;
  const auto get = [&](const T* p, int j) { return PART && j == NV - 1 ? load(p + j * VL, last) : load(p + j * VL); };
  const bool prefetch = C0 != C && K > 4 * kTile;  // by the time of the last sum its place is in cache
  for (; strips > 0; --strips) {
    V c[MR][NV] = {};
    if (C0) {
      PLORA_UNROLL(16)
      for (int i = 0; i < MR; ++i) {
        PLORA_UNROLL(4)
        for (int j = 0; j < NV; ++j) c[i][j] = get(C0 + i * ld0, j);
      }
      C0 += NV * VL;
    }
    if (prefetch) {
      PLORA_UNROLL(16)
      for (int i = 0; i < MR; ++i) {
        PLORA_UNROLL(4)
        for (int j = 0; j < NV; ++j) __builtin_prefetch(C + i * ldc + j * VL, 1);
      }
    }
    const T* b = B;
    const T* a[(MR + 2) / 3];  // rows in threes need fewer address registers
    PLORA_UNROLL(4)
    for (int g = 0; g < (MR + 2) / 3; ++g) a[g] = A + 3 * g * a_row;
    PLORA_UNROLL(4)
    for (int64_t k = 0; k < K; ++k) {
      V right[NV];
      PLORA_UNROLL(4)
      for (int j = 0; j < NV; ++j) right[j] = get(b, j);
      PLORA_UNROLL(16)
      for (int i = 0; i < MR; ++i) {
        const T left = a[i / 3][i % 3 * a_row];
        PLORA_UNROLL(4)
        for (int j = 0; j < NV; ++j) c[i][j] += left * right[j];
      }
      PLORA_UNROLL(4)
      for (int g = 0; g < (MR + 2) / 3; ++g) a[g] += a_col;
      b += ldb;
    }
    PLORA_UNROLL(16)
    for (int i = 0; i < MR; ++i) {
      PLORA_UNROLL(4)
      for (int j = 0; j < NV; ++j) {
        T* to = C + i * ldc + j * VL;
        PART&& j == NV - 1 ? store(to, c[i][j], last) : store(to, c[i][j]);
      }
    }
    B += NV * VL, C += NV * VL;
  }
}

template <typename T, int NV, bool PART, int... I>
Tile<T> tile_of(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr Tile<T> tiles[] = {tile_nn<T, I + 1, NV, PART>...};
  return tiles[rows - 1];
}

// Strips of NV vectors for all rows, which are cut into tiles as equal as can be.
template <typename T, int NV, bool PART>
void strips_nn(int64_t strips, int64_t M, int64_t K, const T* A, int64_t a_row, int64_t a_col, const T* B, int64_t ldb,
               const T* C0, int64_t ld0, T* C, int64_t ldc, int last = 0) {
  const int64_t tiles = (M + kTile - 1) / kTile;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t rows = M / tiles + (t < M % tiles);
    tile_of<T, NV, PART>(rows, std::make_integer_sequence<int, kTile>())(strips, K, A, a_row, a_col, B, ldb, C0, ld0, C,
                                                                         ldc, last);
    A += rows * a_row, C += rows * ldc, C0 = C0 ? C0 + rows * ld0 : nullptr;
  }
}

// With a short K the rows come first, and each sweeps over C; else the strips, whose part of B stays in cache.
template <typename T>
void gemm_nn(int64_t M, int64_t N, int64_t K, const T* A, int64_t a_row, int64_t a_col, const T* B, int64_t ldb,
             const T* C0, int64_t ld0, T* C, int64_t ldc) {
  constexpr int64_t VL = Vec<T>::size, W = 2 * VL;
  const auto from = [&](int64_t j) { return C0 ? C0 + j : nullptr; };
  const int64_t wide = N / W, at_once = K <= 4 * kTile ? wide : 1;
  int64_t j = 0;
  for (; j + W <= N; j += at_once * W)
    strips_nn<T, 2, false>(at_once, M, K, A, a_row, a_col, B + j, ldb, from(j), ld0, C + j, ldc);
  if (j + VL <= N) {
    strips_nn<T, 1, false>(1, M, K, A, a_row, a_col, B + j, ldb, from(j), ld0, C + j, ldc);
    j += VL;
  }
  if (j < N)
    strips_nn<T, 1, true>(1, M, K, A, a_row, a_col, B + j, ldb, from(j), ld0, C + j, ldc, static_cast<int>(N - j));
}

#if defined(__clang__)
#define PLORA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PLORA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Pick){__VA_ARGS__})
#endif

// Four rows of four columns at a time, in registers.
inline void transpose_4x4(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  typedef float Four __attribute__((vector_size(16)));
  [[maybe_unused]] typedef int32_t Pick __attribute__((vector_size(16)));
  Four r[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], from + i * ld_from, sizeof(Four));
  const Four a = PLORA_SHUFFLE(r[0], r[1], 0, 4, 1, 5), b = PLORA_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
  const Four c = PLORA_SHUFFLE(r[2], r[3], 0, 4, 1, 5), d = PLORA_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  const Four columns[4] = {PLORA_SHUFFLE(a, c, 0, 1, 4, 5), PLORA_SHUFFLE(a, c, 2, 3, 6, 7),
                           PLORA_SHUFFLE(b, d, 0, 1, 4, 5), PLORA_SHUFFLE(b, d, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * ld_to, &columns[i], sizeof(Four));
}

inline void transpose_4x4(const double* from, int64_t ld_from, double* to, int64_t ld_to) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[i * ld_to + j] = from[j * ld_from + i];
}

template <typename T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t ld_from, T* to, int64_t ld_to) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  constexpr int64_t kBlock = 16;  // columns: a cache line of each row is read once
  for (int64_t first = 0; first < whole_columns; first += kBlock) {
    const int64_t last = first + kBlock < whole_columns ? first + kBlock : whole_columns;
    for (int64_t r = 0; r < whole_rows; r += 4)
      for (int64_t c = first; c < last; c += 4)
        transpose_4x4(from + r * ld_from + c, ld_from, to + c * ld_to + r, ld_to);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * ld_to + r] = from[r * ld_from + c];
}

template <typename T>
T dot(int64_t n, const T* a, const T* b) {
  using V = typename Vec<T>::type;
  constexpr int VL = Vec<T>::size;
  V sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
    for (int v = 0; v < 4; ++v) sum[v] += load(a + i + v * VL) * load(b + i + v * VL);
  for (; i + VL <= n; i += VL) sum[0] += load(a + i) * load(b + i);
  if (i < n) sum[1] += load(a + i, static_cast<int>(n - i)) * load(b + i, static_cast<int>(n - i));
  const V all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  T total = 0;
  for (int v = 0; v < VL; ++v) total += all[v];
  return total;
}

// exp of x <= 1, to 2 units in the last place; 0 below the smallest normal number.
inline Vec<float>::type exp(Vec<float>::type x) {
  typedef int32_t Int __attribute__((vector_size(kBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kBytes)));
  const Vec<float>::type shift = {}, rounded = x * 1.44269504f + (shift + 12582912.0f);  // 1.5 * 2^23: rounds
  const Vec<float>::type n = rounded - 12582912.0f;
  const Vec<float>::type r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec<float>::type y = shift + 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * r + c;
  y = y * r * r + r + 1.0f;
  Bits bits;
  std::memcpy(&bits, &y, sizeof(y));
  bits = (bits + ((Bits) __builtin_convertvector(n, Int) << 23)) & ~(Bits)(x <= -87.33654f);  // NaN stays NaN
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

void exp_rows(int64_t rows, int64_t columns, float* x, float scale, const float* shift, float* total) {
  constexpr int VL = Vec<float>::size;
  for (int64_t j = 0; j < columns; j += VL) {
    const int n = static_cast<int>(columns - j < VL ? columns - j : VL);
    const Vec<float>::type less = load(shift + j, n);
    Vec<float>::type sum = load(total + j, n);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<float>::type e = exp(load(x + i * columns + j, n) * scale - less);
      store(x + i * columns + j, e, n);
      sum += e;
    }
    store(total + j, sum, n);
  }
}

void exp_rows(int64_t rows, int64_t columns, double* x, double scale, const double* shift, double* total) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      total[j] += x[i * columns + j] = std::exp(x[i * columns + j] * scale - shift[j]);
}

template <typename T>
void add(int64_t n, const T* x, T* y) {
  constexpr int VL = Vec<T>::size;
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(y + i, load(y + i) + load(x + i));
  for (; i < n; ++i) y[i] += x[i];
}

template <typename T>
void stream(int64_t n, const T* x, T* y) {
  int64_t i = 0;
#if defined(__AVX512F__)
  constexpr int VL = Vec<T>::size;
  if (reinterpret_cast<uintptr_t>(y) % kBytes == 0)
    for (; i + VL <= n; i += VL) _mm512_stream_si512(reinterpret_cast<__m512i*>(y + i), _mm512_loadu_si512(x + i));
#endif
  for (; i < n; ++i) y[i] = x[i];
}

}  // namespace

const Gemm<float> gemm_f32 = {gemm_nn, transpose, dot, exp_rows, add, stream, 2 * Vec<float>::size};
const Gemm<double> gemm_f64 = {gemm_nn, transpose, dot, exp_rows, add, stream, 2 * Vec<double>::size};

}  // namespace plora::cpu::PLORA_ISA
