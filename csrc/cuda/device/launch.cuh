// What every CUDA launcher shares: element types, questions to the device (device.h), checked launches. No torch here:
// what launchers want of it comes as pointers, a stream and an Allocator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../../common/arithmetic.h"
#include "../../common/check.h"
#include "../../common/dtype.h"
#include "device.h"

namespace plora::cuda {

// f with a value of the C++ type of `dtype`, of which only the type matters; it has at most so many bytes.
template <size_t kBytes = 4, typename F>
void dispatch(const char* op, Dtype dtype, const F& f) {
  dispatch_as<__nv_bfloat16, __half>(dtype, [&](auto tag) {
    if constexpr (sizeof(tag) <= kBytes)
      f(tag);
    else
      fail(op, ": no kernel has this dtype");
  });
}

// f with each of the flags as a type whose `value` it is.
template <typename F>
void with_flags(const F& f) {
  f();
}
template <typename F, typename... Flags>
void with_flags(const F& f, bool flag, Flags... flags) {
  const auto bind = [&](auto value) { with_flags([&](auto... others) { f(value, others...); }, flags...); };
  flag ? bind(std::true_type{}) : bind(std::false_type{});
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  PLORA_CHECK(error == cudaSuccess, op, ": the kernel could not be launched: ", cudaGetErrorString(error));
}

// The arguments may be whatever those of the kernel can be made of.
template <typename... Params, typename... Arguments>
void launch_kernel(const char* op, void (*kernel)(Params...), dim3 grid, dim3 threads, size_t shared,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (shared > 0) allow_shared_memory(kernel, shared);
  kernel<<<grid, threads, shared, stream>>>(arguments...);
  check_launch(op);
}

}  // namespace plora::cuda
