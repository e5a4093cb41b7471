// What the host code of the CUDA operators asks of torch: streams, memory. Never included by a kernel's file.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "../common/dispatch.h"
#include "device/memory.h"

namespace plora::cuda {

// torch's current stream of the tensor's device; the caller holds a DeviceGuard.
inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  check_call(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream), "the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Memory of torch's caching allocator, on the device of `like`, given back to the stream at the end of its life.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}
  void* operator()(size_t bytes) {
    parts_.push_back(allocate(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return parts_.back().mutable_data_ptr();
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> parts_;
};

}  // namespace plora::cuda
