// lora_stack on CUDA: the factors of T adapters side by side in the dtype of x, filled up with zeros to one rank. One
// launch in place of a concatenation and a cast for each of A, B and scaling; a block of the grid's second dimension
// has one adapter, a thread kVec neighbours of its A or its B at a time.

#include <algorithm>
#include <array>

#include "../device/launch.cuh"
#include "../device/mma.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 64;  // adapters of a launch: what fits into its arguments

using Adapters = std::array<OneOfStack, kAtOnce>;

template <int kVec, typename from_t, typename to_t>
__device__ void copy(const from_t* from, to_t* to, bool real) {
  Elements<from_t, kVec> read{};
  if (real) read = *reinterpret_cast<const Elements<from_t, kVec>*>(from);
  Elements<to_t, kVec> written;
  for (int i = 0; i < kVec; ++i) written.values[i] = from_float<to_t>(to_float(read.values[i]));
  *reinterpret_cast<Elements<to_t, kVec>*>(to) = written;
}

template <int kVec, typename from_t, typename to_t>
__global__ void __launch_bounds__(kThreads)
    stack_kernel(const __grid_constant__ Adapters adapters, int r, int in, int out, to_t* A, to_t* B, float* scaling) {
  const int t = blockIdx.y, first = (blockIdx.x * kThreads + threadIdx.x) * kVec;
  const int step = gridDim.x * kThreads * kVec;
  const OneOfStack& one = adapters[t];
  const auto *from_A = static_cast<const from_t*>(one.A), *from_B = static_cast<const from_t*>(one.B);
  if (first == 0) scaling[t] = one.scaling;
  A += static_cast<int64_t>(t) * r * in, B += static_cast<int64_t>(t) * out * r;
  for (int i = first; i < (in + out) * r; i += step) {
    if (i < r * in) {
      copy<kVec>(from_A + i, A + i, i < one.r * in);
    } else {
      const int j = i - r * in, rank = one.r == r ? 0 : j % r;
      copy<kVec>(from_B + (one.r == r ? j : j / r * one.r + rank), B + j, rank < one.r);
    }
  }
}

}  // namespace

void lora_stack(const LoraStack& p, const std::vector<OneOfStack>& adapters, cudaStream_t stream) {
  const int T = static_cast<int>(adapters.size());
  constexpr int kWide = 8;
  const size_t bytes = p.from == Dtype::float32 ? sizeof(float) : sizeof(__half);
  const bool vectors = std::all_of(adapters.begin(), adapters.end(), [&](const OneOfStack& a) {
    const auto aligned = [&](const void* q) { return reinterpret_cast<uintptr_t>(q) % (kWide * bytes) == 0; };
    const bool columns = a.r == p.r ? p.out * p.r % kWide == 0 : a.r % kWide == 0 && p.r % kWide == 0;
    return p.in % kWide == 0 && columns && aligned(a.A) && aligned(a.B);
  });
  const auto launch = [&](auto from, auto to, auto wide) {
    using from_t = decltype(from);
    using to_t = decltype(to);
    constexpr int kVec = wide ? kWide : 1;
    const int blocks = std::clamp<int>(ceil_div((p.in + p.out) * p.r, kThreads * kVec), 1, 1024);
    for (int t = 0; t < T; t += kAtOnce) {
      const int here = std::min(kAtOnce, T - t);
      Adapters some{};
      std::copy_n(adapters.begin() + t, here, some.begin());
      launch_kernel("lora_stack", &stack_kernel<kVec, from_t, to_t>, dim3(blocks, here), kThreads, 0, stream, some, p.r,
                    p.in, p.out, static_cast<to_t*>(p.A) + static_cast<int64_t>(t) * p.r * p.in,
                    static_cast<to_t*>(p.B) + static_cast<int64_t>(t) * p.out * p.r, p.scaling + t);
    }
  };
  dispatch("lora_stack", p.to, [&](auto to) {
    with_flags([&](auto wide) { p.from == p.to ? launch(to, to, wide) : launch(float{}, to, wide); }, vectors);
  });
}

}  // namespace plora::cuda
