// What launchers ask of the current device, remembered.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace plora::cuda {

// An attribute of the current device; asked once for each.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  static std::atomic<int> known[64];
  int device = 0, value = 0;
  cudaGetDevice(&device);
  value = known[device % 64].load(std::memory_order_relaxed);
  if (value == 0) {
    cudaDeviceGetAttribute(&value, kAttribute, device);
    known[device % 64].store(value, std::memory_order_relaxed);
  }
  return value;
}

inline int multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }
inline int shared_memory_limit() { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

inline bool on_hopper() {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9 &&
         device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>() >= 232448;
}

}  // namespace plora::cuda
