// The gradients of a sum of adapters from products with the merged weight's gradient (kernels.h). An adapter has blocks
// of each kind: parts of dscaling, which take longest, pieces of dA, tiles of dB.

#include "../../common/lora_plan.h"
#include "../device/launch.cuh"
#include "../device/mma.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kThreads = 512, kTile = 64;

template <typename scalar>
struct Params {
  int64_t r, padded_r, in, out;
  const float* scaling;
  const scalar *U, *V, *A;
  int64_t first_U, first_V;  // the adapters that U and V start with
  scalar *dA, *dB;
  float* dscaling;
  bool fast_A, fast_dot;  // vectors of 16 bytes
  int64_t share;          // of a part of dscaling, in vectors
  int parts, pieces, column_tiles, tasks;
  int64_t begin;        // of this launch
  int64_t first, last;  // its adapters that ask; the others get 0
};

template <typename scalar>
__device__ void sum_part(const Params<scalar>& p, int64_t t, int part) {
  constexpr int kVec = kVector<scalar>, kBatch = 4;  // loads in flight
  const int64_t slab = p.padded_r * p.in, end = min((part + 1) * p.share, slab / kVec);
  const scalar *const U = p.U + t * slab, *const A = p.A + t * slab;
  float sum = 0;
  int64_t i = part * p.share + threadIdx.x;
  if (p.fast_dot) {
#pragma unroll 1
    for (; i < end; i += kBatch * kThreads) {
      Vector<scalar> u[kBatch]{}, a[kBatch]{};
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int64_t at = i + n * kThreads;
        if (at >= end) continue;
        u[n] = reinterpret_cast<const Vector<scalar>*>(U)[at];
        a[n] = reinterpret_cast<const Vector<scalar>*>(A)[at];
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum += to_float(u[n][k]) * to_float(a[n][k]);
    }
  } else {
#pragma unroll 1
    for (; i < end; i += kThreads)
      for (int64_t e = i * kVec; e < (i + 1) * kVec; ++e) sum += to_float(U[e]) * to_float(A[e]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) p.dscaling[t * p.parts + part] = sum;
}

template <typename scalar>
__device__ void scale_piece(const Params<scalar>& p, int64_t t, bool asks, int piece) {
  constexpr int kVec = kVector<scalar>, kPiece = kThreads * kVec;
  const int64_t size = p.r * p.in, first = static_cast<int64_t>(piece) * kPiece;
  const scalar* const U = p.U + (t - p.first_U) * p.padded_r * p.in;  // its real ranks come first, as in dA
  scalar* const dA = p.dA + t * size;
  const float s = asks ? p.scaling[t] : 0.f;
  if (p.fast_A) {
    const int64_t e = first + threadIdx.x * kVec;
    if (e >= size) return;
    Vector<scalar> v{};
    if (asks) v = *reinterpret_cast<const Vector<scalar>*>(U + e);
#pragma unroll
    for (int k = 0; k < kVec; ++k) v[k] = from_float<scalar>(s * to_float(v[k]));
    store_vector(dA + e, v.raw);
  } else {
    for (int64_t e = first + threadIdx.x; e < min(first + kPiece, size); e += kThreads)
      dA[e] = from_float<scalar>(asks ? s * to_float(U[e]) : 0.f);
  }
}

// Up to 64 ranks of 64 columns, read along the columns and written along the ranks.
template <typename scalar>
__device__ void transpose_tile(const Params<scalar>& p, int64_t t, bool asks, int number) {
  constexpr int kRows = kThreads / kTile;
  __shared__ float tile[kTile][kTile + 1];
  const int64_t column = static_cast<int64_t>(number % p.column_tiles) * kTile;
  const int64_t rank = static_cast<int64_t>(number / p.column_tiles) * kTile;
  const int columns = static_cast<int>(min(p.out - column, static_cast<int64_t>(kTile)));
  const int ranks = static_cast<int>(min(p.r - rank, static_cast<int64_t>(kTile)));
  const int c = threadIdx.x % kTile, j = threadIdx.x / kTile;
  const scalar* const V = p.V + ((t - p.first_V) * p.padded_r + rank) * p.out + column;
  scalar* const dB = p.dB + (t * p.out + column) * p.r + rank;
  const float s = asks ? p.scaling[t] : 0.f;
  float values[kTile / kRows];
#pragma unroll
  for (int n = 0; n < kTile / kRows; ++n)
    values[n] = asks && c < columns && j + n * kRows < ranks ? to_float(V[(j + n * kRows) * p.out + c]) : 0.f;
#pragma unroll
  for (int n = 0; n < kTile / kRows; ++n) tile[j + n * kRows][c] = s * values[n];
  __syncthreads();
  for (int i = threadIdx.x; i < columns * ranks; i += kThreads)
    dB[i / ranks * p.r + i % ranks] = from_float<scalar>(tile[i % ranks][i / ranks]);
}

template <typename scalar>
__global__ void __launch_bounds__(kThreads, 2) dense_grads_kernel(const __grid_constant__ Params<scalar> p) {
  const int64_t t = p.begin + blockIdx.x / p.tasks;
  const int task = blockIdx.x % p.tasks;
  const bool asks = t >= p.first && t < p.last;
  if (task < p.parts)
    sum_part(p, t, task);
  else if (task < p.parts + p.pieces)
    scale_piece(p, t, asks, task - p.parts);
  else
    transpose_tile(p, t, asks, task - p.parts - p.pieces);
}

// One launch for each run of adapters that ask, with those in between.
template <typename scalar>
void run(const DenseGrads& p, cudaStream_t stream) {
  constexpr int64_t kVec = kVector<scalar>;
  const int64_t asking = p.adapters.empty() ? 0 : p.adapters.front();
  Params<scalar> q{};
  q.r = p.r, q.padded_r = p.padded_r, q.in = p.in, q.out = p.out;
  q.scaling = p.scaling;
  q.U = static_cast<const scalar*>(p.U), q.V = static_cast<const scalar*>(p.V), q.A = static_cast<const scalar*>(p.A);
  q.first_U = p.dscaling ? 0 : asking, q.first_V = asking;
  q.dA = static_cast<scalar*>(p.dA), q.dB = static_cast<scalar*>(p.dB), q.dscaling = p.dscaling;
  q.fast_A = aligned(p.U) && aligned(p.dA) && p.r * p.in % kVec == 0;
  q.fast_dot = aligned(p.U) && aligned(p.A);  // padded_r is a multiple of 8
  q.parts = p.dscaling ? narrow(dense_parts(p.padded_r, p.in)) : 0;
  q.share = q.parts ? ceil_div(p.padded_r * p.in / kVec, q.parts) : 0;
  q.pieces = p.dA ? narrow(ceil_div(p.r * p.in, kThreads * kVec)) : 0;
  q.column_tiles = narrow(ceil_div(p.out, kTile));
  q.tasks = q.parts + q.pieces + (p.dB ? narrow(ceil_div(p.r, kTile)) * q.column_tiles : 0);
  if (q.tasks == 0) return;
  for (size_t next = 0, size = p.adapters.size(); q.begin < p.T;) {
    for (q.first = q.last = next < size ? p.adapters[next] : p.T; next < size && p.adapters[next] == q.last; ++next)
      ++q.last;
    const int64_t end = next < size ? q.last : p.T;
    launch_kernel("dense_grads", &dense_grads_kernel<scalar>, (end - q.begin) * q.tasks, kThreads, 0, stream, q);
    q.begin = end;
  }
}

}  // namespace

void dense_grads(const DenseGrads& p, cudaStream_t stream) {
  dispatch("dense_grads", p.dtype, [&](auto tag) { run<decltype(tag)>(p, stream); });
}

}  // namespace plora::cuda
