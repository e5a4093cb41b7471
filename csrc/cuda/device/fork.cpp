#include "fork.h"

#include <map>

#include "../../common/check.h"

namespace plora::cuda {
namespace {

void check(cudaError_t error) {
  PLORA_CHECK(error == cudaSuccess, "a second stream beside torch's: ", cudaGetErrorString(error));
}

struct Side {
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
};

// Made once, while the device is captured as well; never given back, as threads may end after the driver.
Side& side_of_device() {
  thread_local std::map<int, Side> sides;
  int device = 0;
  check(cudaGetDevice(&device));
  Side& side = sides[device];
  if (side.stream == nullptr) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    check(cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking));
    check(cudaEventCreateWithFlags(&side.begin, cudaEventDisableTiming));
    check(cudaEventCreateWithFlags(&side.end, cudaEventDisableTiming));
    check(cudaThreadExchangeStreamCaptureMode(&mode));
  }
  return side;
}

}  // namespace

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess && status == cudaStreamCaptureStatusActive;
}

Fork::Fork(cudaStream_t from) : from_(from) {
  const Side& side = side_of_device();
  to_ = side.stream, begin_ = side.begin, end_ = side.end;
  check(cudaEventRecord(begin_, from_));
  check(cudaStreamWaitEvent(to_, begin_, 0));
}

void Fork::join() {
  check(cudaEventRecord(end_, to_));
  check(cudaStreamWaitEvent(from_, end_, 0));
}

}  // namespace plora::cuda
