// lora_merge on CUDA: weight + sum_t s_t B_t A_t as one product over the concatenated ranks, in float32 (float64 for
// float64), rounded once. A block owns a 64 x 64 tile of the weight, a thread 4 x 4 of it; the factors pass through
// shared memory 16 ranks at a time, in a fixed order.

#include <torch/csrc/stable/library.h>

#include "../common/lora_checks.h"
#include "launch.cuh"

namespace plora::cuda {
namespace {

constexpr int kTile = 64, kRanks = 16, kThreads = 256, kEach = 4;

template <typename scalar, typename acc>
__global__ void __launch_bounds__(kThreads)
    lora_merge_kernel(const scalar* __restrict__ weight, const scalar* __restrict__ A, const scalar* __restrict__ B,
                      const acc* __restrict__ scaling, const int64_t* __restrict__ ranks, scalar* __restrict__ merged,
                      int64_t out, int64_t in, int64_t T, int64_t r) {
  __shared__ acc tile_B[kRanks][kTile + 1], tile_A[kRanks][kTile];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTile, column = static_cast<int64_t>(blockIdx.y) * kTile;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  acc sum[kEach][kEach];
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int64_t o = row + ty + 16 * i, k = column + tx + 16 * j;
      sum[i][j] = o < out && k < in ? static_cast<acc>(weight[o * in + k]) : acc(0);
    }
  for (int64_t first = 0; first < T * r; first += kRanks) {
    for (int i = threadIdx.x; i < kRanks * kTile; i += kThreads) {  // B: neighbouring threads read neighbouring ranks
      const int64_t rank = first + i % kRanks, o = row + i / kRanks, t = rank / r, j = rank % r;
      const bool real = rank < T * r && o < out && (!ranks || j < ranks[t]);
      tile_B[i % kRanks][i / kRanks] = real ? scaling[t] * static_cast<acc>(B[(t * out + o) * r + j]) : acc(0);
    }
    for (int i = threadIdx.x; i < kRanks * kTile; i += kThreads) {
      const int64_t rank = first + i / kTile, k = column + i % kTile, t = rank / r, j = rank % r;
      const bool real = rank < T * r && k < in && (!ranks || j < ranks[t]);
      tile_A[i / kTile][i % kTile] = real ? static_cast<acc>(A[rank * in + k]) : acc(0);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kRanks; ++n) {
      acc b[kEach], a[kEach];
      for (int i = 0; i < kEach; ++i) b[i] = tile_B[n][ty + 16 * i];
      for (int j = 0; j < kEach; ++j) a[j] = tile_A[n][tx + 16 * j];
      for (int i = 0; i < kEach; ++i)
        for (int j = 0; j < kEach; ++j) sum[i][j] += b[i] * a[j];
    }
    __syncthreads();
  }
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int64_t o = row + ty + 16 * i, k = column + tx + 16 * j;
      if (o < out && k < in) merged[o * in + k] = static_cast<scalar>(sum[i][j]);
    }
}

Tensor lora_merge(const Tensor& weight_, const Tensor& A_, const Tensor& B_, const Tensor& scaling_,
                  const OptTensor& ranks_) {
  check_merge(weight_, A_, B_, scaling_, ranks_);
  const torch::stable::accelerator::DeviceGuard guard(weight_.get_device_index());
  const Tensor weight = compact(weight_), A = compact(A_), B = compact(B_), scaling = compact(scaling_);
  const OptTensor ranks = compact(ranks_);
  const int64_t out = weight.size(0), in = weight.size(1), T = A.size(0), r = A.size(1);
  const Tensor merged = torch::stable::new_empty(weight, weight.sizes());
  if (out == 0 || in == 0) return merged;
  const dim3 grid(static_cast<unsigned>((out + kTile - 1) / kTile), static_cast<unsigned>((in + kTile - 1) / kTile));
  dispatch("lora_merge", weight.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    using acc = acc_type<scalar>;
    lora_merge_kernel<<<grid, kThreads, 0, stream_of(weight)>>>(
        data<scalar>(weight), data<scalar>(A), data<scalar>(B), data<acc>(scaling),
        ranks ? data<int64_t>(*ranks) : nullptr, mutable_data<scalar>(merged), out, in, T, r);
  });
  check_launch("lora_merge");
  return merged;
}

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) { m.impl("lora_merge", TORCH_BOX(&plora::cuda::lora_merge)); }
