// class_sums on CUDA. A block owns one class and a slab of columns: it walks the labels in order, picks the rows of its
// class by ballot, and each thread adds its column of them one after another. No atomics and no workspace: the bits are
// those of the rows added in order, whatever the batches. Labels are re-read per block from L2; features are read once.

#include <torch/csrc/stable/library.h>

#include <cstdio>

#include "../common/prototype_checks.h"
#include "launch.cuh"

namespace plora::cuda {
namespace {

constexpr int kThreads = 256;

template <typename scalar, typename acc>
__global__ void __launch_bounds__(kThreads)
    class_sums_kernel(const scalar* __restrict__ features, const int64_t* __restrict__ labels, acc* sums,
                      int64_t* counts, int64_t N, int64_t D, int64_t C) {
  __shared__ int rows[kThreads];  // this class's rows among the current kThreads labels
  __shared__ int warp_start[kThreads / 32 + 1];
  const int64_t c = blockIdx.x;
  const int64_t d = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  acc sum = d < D ? sums[c * D + d] : acc(0);
  int64_t found = 0;
  for (int64_t first = 0; first < N; first += kThreads) {
    const int64_t n = first + threadIdx.x;
    const int64_t label = n < N ? labels[n] : -1;
    if (label < -1 || label >= C) {  // as torch's own indexing: the launch fails, nothing is silently lost
      printf("plora_ext.class_sums: labels must be between -1 and %lld, got %lld at position %lld\n",
             static_cast<long long>(C - 1), static_cast<long long>(label), static_cast<long long>(n));
      __trap();
    }
    const bool mine = label == c;
    const unsigned ballot = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) warp_start[warp + 1] = __popc(ballot);
    __syncthreads();
    if (threadIdx.x == 0) {
      warp_start[0] = 0;
      for (int w = 0; w < kThreads / 32; ++w) warp_start[w + 1] += warp_start[w];
    }
    __syncthreads();
    if (mine) rows[warp_start[warp] + __popc(ballot & ((1u << lane) - 1))] = threadIdx.x;
    const int count = warp_start[kThreads / 32];
    __syncthreads();
    if (d < D)
      for (int i = 0; i < count; ++i) sum += static_cast<acc>(features[(first + rows[i]) * D + d]);
    found += count;
    __syncthreads();
  }
  if (d < D) sums[c * D + d] = sum;
  if (blockIdx.y == 0 && threadIdx.x == 0) counts[c] += found;
}

void class_sums_(const Tensor& sums, const Tensor& counts, const Tensor& features, const Tensor& labels) {
  check_class_sums(sums, counts, features, labels);
  const int64_t N = features.size(0), D = features.size(1), C = sums.size(0);
  if (N == 0 || C == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor rows = compact(features), classes = compact(labels);
  const dim3 grid(static_cast<unsigned>(C), static_cast<unsigned>(D == 0 ? 1 : (D + kThreads - 1) / kThreads));
  dispatch("class_sums", features.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    using acc = acc_type<scalar>;
    class_sums_kernel<<<grid, kThreads, 0, stream_of(features)>>>(
        data<scalar>(rows), data<int64_t>(classes), mutable_data<acc>(sums), mutable_data<int64_t>(counts), N, D, C);
  });
  check_launch("class_sums");
}

std::tuple<Tensor, Tensor> class_sums(const Tensor& features, const Tensor& labels, int64_t num_classes) {
  const auto [sums, counts] = zero_totals(features, num_classes);
  class_sums_(sums, counts, features, labels);
  return {sums, counts};
}

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) {
  m.impl("class_sums", TORCH_BOX(&plora::cuda::class_sums));
  m.impl("class_sums_", TORCH_BOX(&plora::cuda::class_sums_));
}
