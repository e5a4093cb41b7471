// Products of float32 rows with rows, and with columns, that pass through shared memory: a block of 256 threads makes a
// tile; each warp has 16 MT of the rows and 8 NT of the columns. True float32 by three TF32 products, or TF32.
//
// Operands in shared memory are blocks of 16 k: [block][row][16], so that a lane's four k come as one vector and eight
// lanes read 128 bytes in a row. Which four of a block lane 4 g + q takes is the same for both operands, and free: 4 q
// to 4 q + 3 where both are rows; q, q + 4, q + 8, q + 12 where one is columns, which are read one by one.
#pragma once

#include "../device/mma_smem.cuh"

namespace plora::cuda::cosine {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr float kEps = 1e-12f;   // norms below this count as this
constexpr double kCold = 0.025;  // exp(-2 / tau) is a float32 above this

// DOWN x 8 / DOWN warps.
template <int MT_, int NT_, int STAGES, int DOWN = 1>
struct Tile {
  static constexpr int MT = MT_, NT = NT_, kDepth = 32, kStages = STAGES, kAcross = kWarps / DOWN;
  static constexpr int kRows = 16 * MT * DOWN, kColumns = 8 * NT * kAcross, kBlocks = kDepth / 16;
  static constexpr int kLd = kColumns + 8;  // of columns as they are in memory; 8 more keep lanes apart in the banks
  // floats of a stage: k of rows and of other rows, or k of columns
  static constexpr int kStage = kDepth * (kRows + kColumns) > kDepth* kLd ? kDepth * (kRows + kColumns) : kDepth * kLd;
};

// Where key k of 16 lies among them when a lane takes q, q + 4, q + 8 and q + 12.
__device__ inline int place(int k) { return k % 4 * 4 + k / 4; }

// k0 to k0 + kDepth of kCount rows: `from` is the first row's k0, of which `left` k and `rows` rows are there; the rest
// is zero. VECTORS: 16 bytes at a time, later.
template <int kCount, int kDepth>
__device__ inline void fetch_rows(float* to, const float* from, int64_t ld, int rows, int left, bool vectors) {
  constexpr int kChunks = kDepth / 4, kEach = kThreads / kChunks;
  const int c = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  to += c / 4 * (kCount * 16) + first * 16 + c % 4 * 4;
  const float* row = from + first * ld + 4 * c;
  if (vectors) {
    const int real = 4 * c < left ? rows : 0;
#pragma unroll
    for (int r = first; r < kCount; r += kEach, to += kEach * 16, row += kEach * ld)
      smem::copy16(to, r < real ? row : from, r < real ? 16 : 0);
  } else {
#pragma unroll 1
    for (int r = first; r < kCount; r += kEach, to += kEach * 16, row += kEach * ld)
#pragma unroll 1
      for (int i = 0; i < 4; ++i) to[i] = r < rows && 4 * c + i < left ? row[i] : 0.f;
  }
}

// kDepth rows of kColumns columns, as they are in memory: the k of a product with columns. row(r): where row r begins.
template <typename Tile, typename Row>
__device__ inline void fetch_columns(float* to, const Row& row, int rows, int left, bool vectors) {
  constexpr int kChunks = Tile::kColumns / 4, kEach = kThreads / kChunks;
  const int c = threadIdx.x % kChunks;
  int r = threadIdx.x / kChunks;
  to += r * Tile::kLd + 4 * c;
  if (vectors) {
    const int real = 4 * c < left ? rows : 0;
#pragma unroll
    for (; r < Tile::kDepth; r += kEach, to += kEach * Tile::kLd)
      smem::copy16(to, row(r < real ? r : 0) + (r < real ? 4 * c : 0), r < real ? 16 : 0);
  } else {
#pragma unroll 1
    for (; r < Tile::kDepth; r += kEach, to += kEach * Tile::kLd)
#pragma unroll 1
      for (int i = 0; i < 4; ++i) to[i] = r < rows && 4 * c + i < left ? row(r)[4 * c + i] : 0.f;
  }
}

// A lane's four k of a row or column: to the nearest TF32, and for true float32 what is left of each. Half a last place
// is added and the matrix units leave out the rest of the bits: a few operations, as there are many of these. A NaN of
// all ones would become zero by it. Then `lo` is NaN; in TF32 the NaN must show elsewhere, or kSafe be set.
template <bool kTf32, bool kSafe = false>
struct Split {
  uint32_t hi[4], lo[kTf32 ? 1 : 4];

  static __device__ void split(float x, uint32_t& high, uint32_t& low) {
    high = kTf32 && kSafe ? to_tf32(x) : __float_as_uint(x) + 0x1000u;
    if constexpr (!kTf32) {
      high &= 0xffffe000u;
      low = __float_as_uint(x - __uint_as_float(high));
    }
  }

  Split() = default;
  __device__ explicit Split(const Four<float>& v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) split(v[i], hi[i], lo[kTf32 ? 0 : i]);
  }

  // What split() gave before.
  __device__ void load(const float* high, const float* low) {
    const auto copy = [](uint32_t* to, const float* from) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    };
    copy(hi, high);
    if constexpr (!kTf32) copy(lo, low);
  }
};

// d += a b over 16 k, in true float32 or TF32.
template <typename Left, typename Right>
__device__ inline void add_product(float (&d)[4], const Left& a, const Left& a8, const Right& b) {
  if constexpr (sizeof(a.lo) == sizeof(a.hi)) {
    multiply_float32(d, a, a8, b);
  } else {
    mma_m16n8k8(d, a.hi[0], a8.hi[0], a.hi[1], a8.hi[1], b.hi[0], b.hi[1]);
    mma_m16n8k8(d, a.hi[2], a8.hi[2], a.hi[3], a8.hi[3], b.hi[2], b.hi[3]);
  }
}

__device__ inline float dot(const Four<float>& v) {
  const float* x = reinterpret_cast<const float*>(&v);
  return x[0] * x[0] + x[1] * x[1] + (x[2] * x[2] + x[3] * x[3]);
}

__device__ inline const Four<float>& four(const float* at) { return *reinterpret_cast<const Four<float>*>(at); }

// The sum over the four lanes that share a row.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ inline float inverse_norm(float square) {
  const float norm = sqrtf(square);
  return 1.f / (norm < kEps ? kEps : norm);  // NaN stays
}

// A warp's part of a tile of products: of its rows 16 m + g and 16 m + 8 + g, columns 8 n + 2 q and 8 n + 2 q + 1.
template <typename T, bool kTf32>
struct Products {
  float sum[T::MT][T::NT][4];

  __device__ static int first_row() { return threadIdx.x / 32 / T::kAcross * (16 * T::MT); }
  __device__ static int first_column() { return threadIdx.x / 32 % T::kAcross * (8 * T::NT); }

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < T::MT; ++m)
#pragma unroll
      for (int n = 0; n < T::NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.f;
  }

  // f(m, n, i, row, column) of every sum[m][n][i].
  template <typename F>
  __device__ void each(const F& f) const {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, top = first_row(), first = first_column();
#pragma unroll
    for (int m = 0; m < T::MT; ++m)
#pragma unroll
      for (int n = 0; n < T::NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) f(m, n, i, top + 16 * m + g + i / 2 * 8, first + 8 * n + 2 * q + i % 2);
  }

  // += the product of kBlocks blocks of k: `rows` [block][row][16], and right(block, n) the lane's four of column
  // 8 n + g. seen(m, a, a8) sees the lane's own elements of the rows.
  template <bool kSafe, typename Right, typename Seen>
  __device__ void add(const float* rows, const Right& right, const Seen& seen) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int block = 0; block < T::kBlocks; ++block) {
      Split<kTf32, kSafe> b[T::NT];
#pragma unroll
      for (int n = 0; n < T::NT; ++n) b[n] = Split<kTf32, kSafe>(right(block, n));
      const float* const at = rows + block * (T::kRows * 16) + (first_row() + g) * 16 + q * 4;
#pragma unroll
      for (int m = 0; m < T::MT; ++m) {
        const Four<float> a = four(at + m * 256), a8 = four(at + m * 256 + 128);
        seen(m, a, a8);
        const Split<kTf32> left(a), left8(a8);
#pragma unroll
        for (int n = 0; n < T::NT; ++n) add_product(sum[m][n], left, left8, b[n]);
      }
    }
  }

  // Rows with rows; the squares of the lane's part of both sides' vectors are added up, and show a NaN.
  __device__ void add_rows(const float* stage, float (&squares)[T::NT], float (&row_squares)[2 * T::MT]) {
    const int lane = threadIdx.x % 32;
    const float* const columns = stage + T::kDepth * T::kRows + first_column() * 16 + lane * 4;
    add<false>(
        stage,
        [&](int block, int n) {
          const Four<float> v = four(columns + block * (T::kColumns * 16) + n * 128);
          squares[n] += dot(v);
          return v;
        },
        [&](int m, const Four<float>& a, const Four<float>& a8) {
          row_squares[2 * m] += dot(a), row_squares[2 * m + 1] += dot(a8);
        });
  }

  // Rows, their k in the order of place(), with columns [kDepth][kLd]. A NaN in the rows must show elsewhere.
  template <typename Seen>
  __device__ void add_columns(const float* rows, const float* stage, const Seen& seen) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const float* const columns = stage + q * T::kLd + first_column() + g;
    add<true>(
        rows,
        [&](int block, int n) {
          Four<float> v;
#pragma unroll
          for (int i = 0; i < 4; ++i) v[i] = columns[(16 * block + 4 * i) * T::kLd + 8 * n];
          return v;
        },
        seen);
  }
};

// What a lane holds of column 8 n + g, for column 8 n + 2 q + i of the same warp.
__device__ inline float of_column(float x, int i) { return __shfl_sync(0xffffffffu, x, threadIdx.x % 4 * 8 + i * 4); }

}  // namespace plora::cuda::cosine
