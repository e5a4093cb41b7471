// Two kernels side by side in a graph. Launched one by one, small kernels wait for the host and not for each other, and
// a second stream would only cost the host; in a graph they are as fast as the longest chain of them.
#pragma once

#include <cuda_runtime_api.h>

namespace plora::cuda {

bool capturing(cudaStream_t stream);

// While it lives, what is launched on stream() runs beside what is launched on the stream that it was made from; after
// join() the latter waits for both. Its stream and events are the thread's own, for each device.
class Fork {
  cudaStream_t from_, to_;
  cudaEvent_t begin_, end_;

 public:
  explicit Fork(cudaStream_t from);
  cudaStream_t stream() const { return to_; }
  void join();
};

}  // namespace plora::cuda
