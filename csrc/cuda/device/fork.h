// Two kernels side by side in a graph. Launched one by one, small kernels wait for the host and not for each other, and
// a second stream would only cost the host; in a graph they are as fast as the longest chain of them.
#pragma once

#include <cuda_runtime_api.h>

namespace plora::cuda {

// Whether a graph is being captured on this stream, and this thread's second stream is in no other.
bool can_fork(cudaStream_t stream);

// What is launched on stream() runs beside what is launched on the stream that this was made from, which waits for both
// from join(), or the end of this, on. Memory that both touch is to be allocated before: torch may fill it, on its own
// stream. The second stream and its events are the thread's own, for each device.
class Fork {
  cudaStream_t from_, to_;
  cudaEvent_t begin_, end_;
  bool joined_ = false;

 public:
  explicit Fork(cudaStream_t from);
  ~Fork();
  Fork(const Fork&) = delete;
  Fork& operator=(const Fork&) = delete;
  cudaStream_t stream() const { return to_; }
  void join();
};

}  // namespace plora::cuda
