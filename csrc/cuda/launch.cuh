// What every CUDA launcher shares: the current stream, checked launches, element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/dispatch.h"

namespace plora::cuda {

template <typename F>
void dispatch(const char* op, ScalarType dtype, const F& f) {
  dispatch_as<__nv_bfloat16, __half>(op, dtype, f);
}

// torch's current stream of the tensor's device; the caller holds a DeviceGuard.
inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  check_call(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream), "the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// To the 16 bytes of a vector.
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  PLORA_CHECK(error == cudaSuccess, op, ": the kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace plora::cuda
