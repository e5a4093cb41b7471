// What the kernels share that take s h as low_rank_sm90.cu lays it out (kernels.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../device/pair.cuh"
#include "../device/sm90.cuh"

namespace plora::cuda {

// How s h is told in 16 bits: `factor` multiplies h before it is rounded, `power`, a power of two, the float32 sum of
// its products. The exponents of float16 would be too few for s h itself.
struct Split {
  float factor, power;
};

template <typename scalar>
__device__ inline Split split(float s) {
  if constexpr (!std::is_same_v<scalar, __half>) return {s, 1.f};
  const int bits = __float_as_int(s), exponent = bits >> 23 & 255;  // a factor in (1/2, 1], and so 1 times 1 for s = 1
  const int k = exponent - 127 + ((bits & 0x7fffff) != 0), e = exponent % 255 == 0 ? 0 : min(max(k, -24), 24);
  return {s * __int_as_float((127 - e) << 23), __int_as_float((127 + e) << 23)};
}

// A block of rows of s h and 16 ranks, as the copy engine leaves it in shared memory: 32 bytes a row, swizzled.
constexpr uint64_t kLayoutGiven = sm90::operand_layout(sm90::Swizzle::b32, 16, 256);

}  // namespace plora::cuda
