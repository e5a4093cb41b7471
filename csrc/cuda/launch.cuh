// What every CUDA launcher shares: the current stream, checked launches, element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "../common/checks.h"

namespace plora::cuda {

template <typename scalar>
using acc_type = std::conditional_t<std::is_same_v<scalar, double>, double, float>;

// Calls f with a value of the CUDA type of `dtype`; only its type matters.
template <typename F>
void dispatch(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Half:
      return f(__half{});
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be float32, bfloat16, float16 or float64, got ",
                      torch::headeronly::toString(dtype));
  }
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// torch's current stream of the tensor's device; the caller holds a DeviceGuard.
inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  check_call(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream), "the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace plora::cuda
