// A kernel that is launched while its predecessor still runs and waits for it on the device (sm_90 and newer), so that
// the time of a launch is hidden. Elsewhere the two simply follow each other.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace plora::cuda {

// By the predecessor, as early as it likes.
__device__ inline void launch_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// By the successor, before it reads what the predecessor wrote, not through const __restrict__: those loads may move.
__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Sets `bytes` (a multiple of 16) on their way from memory to L2.
__device__ inline void prefetch_to_l2(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
#endif
}

// The kernel runs with as much shared memory as there can be, so that one which needs it can start beside it: a
// multiprocessor that divides its memory otherwise is emptied first.
template <typename... Params>
void share_all_memory(void (*kernel)(Params...)) {
  static PerKernel set;
  set.update(reinterpret_cast<const void*>(kernel), [&](int& number) {
    if (number == 0)
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    number = 1;
  });
}

// Whether a kernel waits by itself: what it was compiled for, not what the device could do.
template <typename... Params>
bool waits(void (*kernel)(Params...)) {
  static PerKernel versions;
  return versions.update(reinterpret_cast<const void*>(kernel), [&](int& version) {
    if (version > 0) return;
    cudaFuncAttributes compiled{};
    cudaFuncGetAttributes(&compiled, kernel);
    version = compiled.ptxVersion;
  }) >= 90;
}

// Whether the driver takes the overlap: in a graph that is being captured from CUDA 12.3 on.
inline bool overlaps(cudaStream_t stream) {
  static const int driver = [] {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
  }();
  if (driver >= 12030) return true;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &status);
  return status == cudaStreamCaptureStatusNone;
}

// A kernel that calls wait_for_predecessor(), after one that calls launch_successor(), in clusters of so many blocks.
template <typename... Params, typename... Arguments>
void launch_clusters(const char* op, void (*kernel)(Params...), unsigned cluster, int64_t blocks, int threads,
                     size_t shared, cudaStream_t stream, bool overlap, const Arguments&... arguments) {
  if (shared > 0) allow_shared_memory(kernel, shared);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  const bool both = overlap && waits(kernel) && overlaps(stream);
  config.attrs = attributes + (cluster == 1), config.numAttrs = (cluster > 1) + both;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  check_launch(op);
}

template <typename... Params, typename... Arguments>
void launch_overlapped(const char* op, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
                       cudaStream_t stream, bool overlap, const Arguments&... arguments) {
  launch_clusters(op, kernel, 1, blocks, threads, shared, stream, overlap, arguments...);
}

}  // namespace plora::cuda
