// The outputs of all adapters from their h: y_t = y0 + s_t h_t up_t^T + s_t bias_up_t. Bound by the writing of y: a
// block keeps its y0 in registers, and has the factors of the next product on their way while it writes the last.

#include "../device/launch.cuh"
#include "../device/mma.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

// A warp has 32 rows and 32 columns of y, a lane four rows, 8 apart, of 8 neighbouring columns.
constexpr int kThreads = 256, kRows = 64, kColumns = 128;

template <typename scalar>
struct Factors {
  Four<scalar> h[4], up[4];
};

template <typename scalar, bool kBias>
__global__ void __launch_bounds__(kThreads, 2) expand_kernel(const __grid_constant__ LowRank p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int M = static_cast<int>(p.rows.M), N = static_cast<int>(p.N), T = static_cast<int>(p.rows.T);
  const int r = static_cast<int>(p.rows.r);
  // Blocks that run at once write whole rows of y.
  const int blocks = (N + kColumns - 1) / kColumns;
  const int row = blockIdx.x / blocks * kRows + warp / 4 * 32 + g;
  const int column = blockIdx.x % blocks * kColumns + warp % 4 * 32;
  if (row - g >= M || column >= N) return;
  const int own = column + 8 * q;

  // Column c of product i stands for column 8 (c / 2) + 2 i + c % 2, so that a lane ends up with neighbours. Beyond the
  // last row and column come the last: nobody uses what comes of it. The pointers are a step of 16 ranks ahead.
  const int first_row = min(row, M - 1), first = min(column + g / 2 * 8 + g % 2, N - 1);
  const scalar* h = static_cast<const scalar*>(p.h) + static_cast<int64_t>(first_row) * T * r + 4 * q;
  const scalar* up = static_cast<const scalar*>(p.up) + static_cast<int64_t>(first) * r + 4 * q;
  int h_ahead[4], up_ahead[4], rank = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    h_ahead[i] = (min(row + 8 * i, M - 1) - first_row) * T * r;
    up_ahead[i] = (min(column + g / 2 * 8 + g % 2 + 2 * i, N - 1) - first) * r;
  }
  const auto load = [&] {
    Factors<scalar> f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool real = rank + 4 * q < r;
      f.h[i].raw = real ? __ldg(reinterpret_cast<const uint2*>(h + h_ahead[i])) : uint2{};
      f.up[i].raw = real ? __ldg(reinterpret_cast<const uint2*>(up + up_ahead[i])) : uint2{};
    }
    const int steps = rank + 16 < r ? 16 : r - rank;
    h += steps, up += steps, rank += 16;
    if (rank >= r) up += static_cast<int64_t>(N - 1) * r, rank = 0;  // the next adapter
    return f;
  };

  Vector<scalar> y0[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const scalar* const from = static_cast<const scalar*>(p.y0) + (row + 8 * i) * p.ldy0 + own;
    y0[i].raw = p.y0 && row + 8 * i < M && own < N ? *reinterpret_cast<const uint4*>(from) : uint4{};
  }
  scalar* y = static_cast<scalar*>(p.y) + row * p.ldy + own;
  Factors<scalar> next = load();
  float next_s = __ldg(p.scaling);
#pragma unroll 1
  for (int t = 0; t < T; ++t, y += p.y_slab) {
    const float s = next_s;
    next_s = __ldg(p.scaling + min(t + 1, T - 1));
    float sum[2][4][4] = {};
#pragma unroll 1
    for (int c = 0; c < r; c += 16) {
      const Factors<scalar> f = next;
      if (c + 16 < r || t + 1 < T) next = load();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Operand<scalar> up(f.up[j]);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          multiply(sum[i][j], Operand<scalar>(f.h[2 * i]), Operand<scalar>(f.h[2 * i + 1]), up);
      }
    }
    if (own >= N) continue;
    Vector<scalar> bias;
    if constexpr (kBias)
      bias.raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const scalar*>(p.bias_up) + t * p.N + own));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + 8 * i >= M) break;
      Vector<scalar> v;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float low_rank = sum[i / 2][e / 2][i % 2 * 2 + e % 2];
        v[e] = from_float<scalar>(to_float(y0[i][e]) + s * (kBias ? low_rank + to_float(bias[e]) : low_rank));
      }
      store_vector(y + 8 * i * p.ldy, v.raw);
    }
  }
}

}  // namespace

void expand(const LowRank& p, cudaStream_t stream) {
  if (p.rows.M == 0 || p.N == 0 || p.rows.T == 0) return;
  PLORA_CHECK(!p.rows.ids && p.rows.T * p.rows.r < 1 << 26 && p.y_slab % 8 == 0 && p.y0_slab == 0 &&
                  p.rows.r % 8 == 0 && p.N % 8 == 0 && p.ldy % 8 == 0 && p.ldy0 % 8 == 0 &&
                  aligned(p.up, p.y, p.y0, p.bias_up),
              "expand: not what it was planned for");
  dispatch<2>("expand", p.dtype, [&](auto like) {
    using scalar = decltype(like);
    const auto kernel = p.bias_up ? &expand_kernel<scalar, true> : &expand_kernel<scalar, false>;
    launch_kernel("expand", kernel, ceil_div(p.rows.M, kRows) * ceil_div(p.N, kColumns), kThreads, 0, stream, p);
  });
}

}  // namespace plora::cuda
