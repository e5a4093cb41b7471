// Two neighbouring elements of 16 bits, as one word.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace plora::cuda {

template <typename scalar>
__device__ inline uint32_t pair(float low, float high) {
  if constexpr (std::is_same_v<scalar, __nv_bfloat16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
}

template <typename scalar>
__device__ inline float2 unpair(uint32_t v) {
  if constexpr (std::is_same_v<scalar, __nv_bfloat16>)
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v));
  else
    return __half22float2(reinterpret_cast<const __half2&>(v));
}

// Two neighbouring elements, of which the first has an even index.
template <typename scalar>
__device__ inline float2 two(const void* from, int64_t index) {
  return unpair<scalar>(__ldg(reinterpret_cast<const uint32_t*>(static_cast<const scalar*>(from) + index)));
}

}  // namespace plora::cuda
