// The gradients of a sum of adapters from products with the merged weight's gradient (kernels.h). An adapter has blocks
// of each kind: parts of dscaling, which take longest, pieces of dA, pieces of dB.

#include "../../common/lora_plan.h"
#include "../device/launch.cuh"
#include "../device/mma.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kThreads = 512;

template <typename scalar>
struct Params {
  int64_t r, padded_r, in, out;
  const float *scaling, *times;
  const scalar *U, *V, *B;
  int64_t first_U, first_V, width_V;  // the adapters that U and V start with; a row of V
  scalar *dA, *dB;
  float* dscaling;
  bool fast_A, fast_B, fast_dot;  // vectors of 16 bytes
  int64_t share;                  // of a part of dscaling, in vectors
  int parts, pieces_A, pieces_B, tasks;
  int64_t begin;        // of this launch
  int64_t first, last;  // its adapters that ask; the others get 0
};

template <typename scalar>
__device__ float times_of(const Params<scalar>& p, int64_t t) {
  return p.times ? p.times[t] : 1.f;
}

template <typename scalar>
__device__ void sum_part(const Params<scalar>& p, int64_t t, int part) {
  constexpr int kVec = kVector<scalar>, kBatch = 4;  // loads in flight
  const int64_t size = p.out * p.padded_r, end = min((part + 1) * p.share, size / kVec);
  const scalar *const V = p.V + (t - p.first_V) * p.padded_r, *const B = p.B + t * size;
  const auto place = [&](int64_t e) { return e / p.padded_r * p.width_V + e % p.padded_r; };  // in V, of one in B
  float sum = 0;
  int64_t i = part * p.share + threadIdx.x;
  if (p.fast_dot) {
#pragma unroll 1
    for (; i < end; i += kBatch * kThreads) {
      Vector<scalar> v[kBatch]{}, b[kBatch]{};
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int64_t at = i + n * kThreads;
        if (at >= end) continue;
        v[n] = *reinterpret_cast<const Vector<scalar>*>(V + place(at * kVec));
        b[n] = reinterpret_cast<const Vector<scalar>*>(B)[at];
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum += to_float(v[n][k]) * to_float(b[n][k]);
    }
  } else {
#pragma unroll 1
    for (; i < end; i += kThreads)
      for (int64_t e = i * kVec; e < (i + 1) * kVec; ++e) sum += to_float(V[place(e)]) * to_float(B[e]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) p.dscaling[t * p.parts + part] = times_of(p, t) * sum;
}

// to[e] = s_t from[place(e)] for some of `size` elements of adapter t's gradient.
template <typename scalar, typename F>
__device__ void scale_piece(const Params<scalar>& p, int64_t t, bool asks, int piece, bool fast, const scalar* from,
                            const F& place, scalar* to, int64_t size) {
  constexpr int kVec = kVector<scalar>, kPiece = kThreads * kVec;
  const int64_t first = static_cast<int64_t>(piece) * kPiece;
  const float s = asks ? p.scaling[t] * times_of(p, t) : 0.f;
  if (fast) {
    const int64_t e = first + threadIdx.x * kVec;
    if (e >= size) return;
    Vector<scalar> v{};
    if (asks) v = *reinterpret_cast<const Vector<scalar>*>(from + place(e));
#pragma unroll
    for (int k = 0; k < kVec; ++k) v[k] = from_float<scalar>(s * to_float(v[k]));
    store_vector(to + e, v.raw);
  } else {
    for (int64_t e = first + threadIdx.x; e < min(first + kPiece, size); e += kThreads)
      to[e] = from_float<scalar>(asks ? s * to_float(from[place(e)]) : 0.f);
  }
}

template <typename scalar>
__global__ void __launch_bounds__(kThreads, 2) dense_grads_kernel(const __grid_constant__ Params<scalar> p) {
  const int64_t t = p.begin + blockIdx.x / p.tasks, of_A = p.r * p.in, of_B = p.out * p.r;
  const int task = blockIdx.x % p.tasks;
  const bool asks = t >= p.first && t < p.last;
  if (task < p.parts)
    sum_part(p, t, task);
  else if (task < p.parts + p.pieces_A)  // the real ranks of U come first, as in dA
    scale_piece(
        p, t, asks, task - p.parts, p.fast_A, p.U + (t - p.first_U) * p.padded_r * p.in, [](int64_t e) { return e; },
        p.dA + t * of_A, of_A);
  else
    scale_piece(
        p, t, asks, task - p.parts - p.pieces_A, p.fast_B, p.V + (t - p.first_V) * p.padded_r,
        [&](int64_t e) { return e / p.r * p.width_V + e % p.r; }, p.dB + t * of_B, of_B);
}

// One launch for each run of adapters that ask, with those in between.
template <typename scalar>
void run(const DenseGrads& p, cudaStream_t stream) {
  constexpr int64_t kVec = kVector<scalar>;
  const int64_t asking = p.adapters.empty() ? 0 : p.adapters.front();
  const auto pieces = [&](const void* to, int64_t size) { return to ? narrow(ceil_div(size, kThreads * kVec)) : 0; };
  Params<scalar> q{};
  q.r = p.r, q.padded_r = p.padded_r, q.in = p.in, q.out = p.out;
  q.scaling = p.scaling, q.times = p.times;
  q.U = static_cast<const scalar*>(p.U), q.V = static_cast<const scalar*>(p.V), q.B = static_cast<const scalar*>(p.B);
  q.first_U = asking, q.first_V = p.dscaling ? 0 : asking, q.width_V = p.width_V;
  q.dA = static_cast<scalar*>(p.dA), q.dB = static_cast<scalar*>(p.dB), q.dscaling = p.dscaling;
  q.fast_A = aligned(p.U) && aligned(p.dA) && p.r * p.in % kVec == 0;
  q.fast_B = aligned(p.V) && aligned(p.dB) && p.r % kVec == 0;
  q.fast_dot = aligned(p.V) && aligned(p.B);  // padded_r is a multiple of 8
  q.parts = p.dscaling ? narrow(dense_parts(p.padded_r, p.out)) : 0;
  q.share = q.parts ? ceil_div(p.padded_r * p.out / kVec, q.parts) : 0;
  q.pieces_A = pieces(p.dA, p.r * p.in), q.pieces_B = pieces(p.dB, p.out * p.r);
  q.tasks = q.parts + q.pieces_A + q.pieces_B;
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
