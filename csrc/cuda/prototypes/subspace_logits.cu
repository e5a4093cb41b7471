// subspace_logits on CUDA: the raw products of every subspace on the tensor cores, with the squares of both sides' rows
// added up on the way, so that nothing is normalised in memory. Where classes and images give few tiles, the subspaces
// are shared out among blocks, whose parts sum_kernel adds in order.

#include <algorithm>

#include "../device/overlap.cuh"
#include "cosine.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

using cosine::kThreads;
using Small = cosine::Tile<2, 2, 4>;     // 32 x 128
using Large = cosine::Tile<2, 4, 4, 2>;  // 64 x 128

struct Arguments : SubspaceLogits {
  int per_group;  // subspaces; with more groups than one, out is that of each group, [groups, B, C]
  bool vectors;
};

template <typename Tile, bool kTf32>
__global__ void __launch_bounds__(kThreads, 1) logits_kernel(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) float stages[];
  launch_successor();
  const int tiles = (p.C + Tile::kColumns - 1) / Tile::kColumns;
  const int row0 = blockIdx.x / tiles * Tile::kRows, column0 = blockIdx.x % tiles * Tile::kColumns;
  const int rows = min(Tile::kRows, p.B - row0), columns = min(Tile::kColumns, p.C - column0);
  const int begin = blockIdx.y * p.per_group, end = min(begin + p.per_group, p.T);
  const int steps = max((p.D + Tile::kDepth - 1) / Tile::kDepth, 1);
  const int64_t ld = static_cast<int64_t>(p.T) * p.D;
  const float* const features = p.features + row0 * ld;
  const float* const prototypes = p.prototypes + column0 * ld;

  int subspace = begin, inner = 0, slot = 0;  // of the next load
  const auto load = [&] {
    if (subspace < end) {
      const int k = inner * Tile::kDepth;
      const int64_t at = static_cast<int64_t>(subspace) * p.D + k;
      float* const to = stages + slot * Tile::kStage;
      cosine::fetch_rows<Tile::kRows, Tile::kDepth>(to, features + at, ld, rows, p.D - k, p.vectors);
      cosine::fetch_rows<Tile::kColumns, Tile::kDepth>(to + Tile::kDepth * Tile::kRows, prototypes + at, ld, columns,
                                                       p.D - k, p.vectors);
      slot = (slot + 1) % Tile::kStages;
      if (++inner == steps) inner = 0, ++subspace;
    }
    smem::commit();
  };
#pragma unroll 1
  for (int i = 0; i < Tile::kStages - 1; ++i) load();

  cosine::Products<Tile, kTf32> logits, products;
  logits.clear();
  int stage = 0;
#pragma unroll 1
  for (int t = begin; t < end; ++t) {
    float squares[Tile::NT] = {}, row_squares[2 * Tile::MT] = {}, factor[Tile::NT][2];
    products.clear();
#pragma unroll 1
    for (int k = 0; k < steps; ++k) {
      smem::wait<Tile::kStages - 2>();
      __syncthreads();
      load();
      products.add_rows(stages + stage * Tile::kStage, squares, row_squares);
      stage = (stage + 1) % Tile::kStages;
    }
#pragma unroll
    for (int n = 0; n < Tile::NT; ++n) {
      const int c = column0 + products.first_column() + 8 * n + threadIdx.x % 32 / 4;
      const float weight = c < p.C ? p.weights[static_cast<int64_t>(c) * p.T + t] : 0.f;
      const float own = weight * cosine::inverse_norm(cosine::quad_sum(squares[n]));
      factor[n][0] = cosine::of_column(own, 0), factor[n][1] = cosine::of_column(own, 1);
    }
    float inverse[2 * Tile::MT];
#pragma unroll
    for (int m = 0; m < 2 * Tile::MT; ++m) inverse[m] = cosine::inverse_norm(cosine::quad_sum(row_squares[m]));
    products.each([&](int m, int n, int i, int, int) {
      logits.sum[m][n][i] += products.sum[m][n][i] * inverse[2 * m + i / 2] * factor[n][i % 2];
    });
  }
  float* const out = p.out + (static_cast<int64_t>(blockIdx.y) * p.B + row0) * p.C + column0;
  logits.each([&](int m, int n, int i, int row, int column) {
    if (row < rows && column < columns) out[static_cast<int64_t>(row) * p.C + column] = logits.sum[m][n][i];
  });
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const float* parts, float* out, int64_t count, int groups) {
  wait_for_predecessor();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0.f;
#pragma unroll 8
  for (int g = 0; g < groups; ++g) sum += parts[g * count + i];
  out[i] = sum;
}

template <typename Tile>
int64_t tiles_of(const Arguments& p) {
  return (int64_t(p.B) + Tile::kRows - 1) / Tile::kRows * ((p.C + Tile::kColumns - 1) / Tile::kColumns);
}

template <typename Tile>
void launch(Arguments p, bool tf32, const Allocator& memory, cudaStream_t stream) {
  const char* op = "subspace_logits";
  const int64_t tiles = tiles_of<Tile>(p), count = int64_t(p.B) * p.C;
  const int64_t wanted = std::clamp<int64_t>(multiprocessors() / tiles, 1, p.T);
  p.per_group = static_cast<int>((p.T + wanted - 1) / wanted);
  const int groups = (p.T + p.per_group - 1) / p.per_group;
  float* const out = p.out;
  if (groups > 1) p.out = static_cast<float*>(memory(groups * count * sizeof(float)));
  const auto kernel = tf32 ? &logits_kernel<Tile, true> : &logits_kernel<Tile, false>;
  constexpr int kBytes = Tile::kStages * Tile::kStage * static_cast<int>(sizeof(float));
  launch_kernel(op, kernel, dim3(tiles, groups), kThreads, kBytes, stream, p);
  if (groups > 1)
    launch_overlapped(op, &sum_kernel, ceil_div(count, kThreads), kThreads, 0, stream, true, p.out, out, count, groups);
}

}  // namespace

void multiply_subspaces(const SubspaceLogits& p, bool tf32, const Allocator& memory, cudaStream_t stream) {
  Arguments a{p};
  a.vectors = p.D > 0 && p.D % 4 == 0 && aligned(p.features) && aligned(p.prototypes);
  if (2 * tiles_of<Large>(a) > multiprocessors())
    launch<Large>(a, tf32, memory, stream);
  else
    launch<Small>(a, tf32, memory, stream);
}

}  // namespace plora::cuda
