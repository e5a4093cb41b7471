// What launchers ask of the current device and tell it, remembered: each call of the driver costs them a microsecond.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

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

// A number from the environment, by which tests make the device look like a smaller one.
inline int limit_of(const char* variable) {
  const char* text = std::getenv(variable);
  const int number = text ? std::atoi(text) : 0;
  return number > 0 ? number : std::numeric_limits<int>::max();
}

inline int multiprocessors() {
  static const int limit = limit_of("PLORA_SM_COUNT");
  return std::min(limit, device_attribute<cudaDevAttrMultiProcessorCount>());
}

inline int shared_memory_limit() {
  static const int limit = limit_of("PLORA_SMEM_LIMIT");
  return std::min(limit, device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>());
}

inline bool on_hopper() {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9 && shared_memory_limit() >= 232448;
}

// A number for each kernel and device, under a lock.
class PerKernel {
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, int> numbers_;

 public:
  template <typename F>
  int update(const void* kernel, const F& f) {
    int device = 0;
    cudaGetDevice(&device);
    const std::lock_guard<std::mutex> lock(mutex_);
    int& number = numbers_[{kernel, device}];
    f(number);
    return number;
  }
};

// Before a launch with so much shared memory; a failure shows at the launch.
template <typename... Params>
void allow_shared_memory(void (*kernel)(Params...), size_t bytes) {
  static PerKernel allowed;
  const auto most = static_cast<int>(bytes);
  allowed.update(reinterpret_cast<const void*>(kernel), [&](int& number) {
    if (number >= most) return;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    number = most;
  });
}

}  // namespace plora::cuda
