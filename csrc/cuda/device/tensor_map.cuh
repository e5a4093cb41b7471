// Descriptions of tensors for Hopper's copy engine, made on the host.
#pragma once

#include <cuda.h>

#include "launch.cuh"

namespace plora::cuda {

constexpr auto k128 = CU_TENSOR_MAP_SWIZZLE_128B, k64 = CU_TENSOR_MAP_SWIZZLE_64B, k32 = CU_TENSOR_MAP_SWIZZLE_32B;

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found);
#endif
    PLORA_CHECK(error == cudaSuccess && f != nullptr,
                "the CUDA driver has no cuTensorMapEncodeTiled: it must be 12.0 or newer");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
  }();
  return encode;
}

// Autograd's thread may have called nothing on its device before, and the encoder wants it in use.
inline void use_device() {
  thread_local int used = -1;
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess && device != used && cudaSetDevice(device) == cudaSuccess) used = device;
}

// A tensor with the innermost dimension first, loaded box by box; zero outside. Sizes and strides are in elements.
template <int kDims>
void describe_tensor(CUtensorMap& map, Dtype dtype, const void* data, const int64_t (&sizes)[kDims],
                     const int64_t (&strides)[kDims - 1], const int (&box)[kDims], CUtensorMapSwizzle swizzle) {
  cuuint64_t dims[kDims], bytes[kDims - 1];
  cuuint32_t extent[kDims], ones[kDims];
  const auto type = dtype == Dtype::float32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : dtype == Dtype::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  for (int i = 0; i < kDims; ++i) dims[i] = sizes[i], extent[i] = box[i], ones[i] = 1;
  for (int i = 0; i < kDims - 1; ++i) bytes[i] = strides[i] * (dtype == Dtype::float32 ? 4 : 2);
  use_device();
  const CUresult result = tensor_map_encoder()(&map, type, kDims, const_cast<void*>(data), dims, bytes, extent, ones,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  PLORA_CHECK(result == CUDA_SUCCESS, "a tensor could not be described to the copy engine (CUDA error ",
              static_cast<int>(result), ")");
}

}  // namespace plora::cuda
