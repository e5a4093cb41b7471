#include "fork.h"

#include <map>

#include "../../common/check.h"

namespace plora::cuda {
namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed
  fail("a second stream beside torch's: ", cudaGetErrorString(error));
}

// While a graph is captured, streams and events may be made by who says so.
class Relaxed {
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;

 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
};

struct Side {
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
};

// Made once; never given back, as threads may end after the driver.
const Side& side_of_device() {
  thread_local std::map<int, Side> sides;
  int device = 0;
  check(cudaGetDevice(&device));
  const auto found = sides.find(device);
  if (found != sides.end()) return found->second;
  const Relaxed relaxed;
  Side side;
  check(cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking));
  check(cudaEventCreateWithFlags(&side.begin, cudaEventDisableTiming));
  check(cudaEventCreateWithFlags(&side.end, cudaEventDisableTiming));
  return sides[device] = side;
}

}  // namespace

bool can_fork(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone, other = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0, of_side = 0;
  check(cudaStreamGetCaptureInfo(stream, &status, &capture));
  if (status != cudaStreamCaptureStatusActive) return false;
  check(cudaStreamGetCaptureInfo(side_of_device().stream, &other, &of_side));
  return other == cudaStreamCaptureStatusNone || (other == cudaStreamCaptureStatusActive && of_side == capture);
}

Fork::Fork(cudaStream_t from) : from_(from) {
  const Side& side = side_of_device();
  to_ = side.stream, begin_ = side.begin, end_ = side.end;
  check(cudaEventRecord(begin_, from_));
  check(cudaStreamWaitEvent(to_, begin_, 0));
}

void Fork::join() {
  joined_ = true;
  check(cudaEventRecord(end_, to_));
  check(cudaStreamWaitEvent(from_, end_, 0));
}

Fork::~Fork() {
  if (joined_) return;  // else something was thrown, and the capture is to end all the same
  cudaEventRecord(end_, to_);
  cudaStreamWaitEvent(from_, end_, 0);
  cudaGetLastError();
}

}  // namespace plora::cuda
