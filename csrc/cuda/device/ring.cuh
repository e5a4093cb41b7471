// A ring of stages in shared memory, which the copy engine fills and warps empty. Both sides walk through the stages in
// the same order, each with a Ring of its own.
#pragma once

#include "sm90.cuh"

namespace plora::cuda::sm90 {

struct Ring {
  uint32_t memory, barriers, bytes;  // of the first stage; a stage has 16 bytes of barriers; its size
  int stages, index = 0;
  uint32_t phase = 0;

  __device__ uint32_t at() const { return memory + index * bytes; }
  __device__ uint32_t full() const { return barriers + 16 * index; }
  __device__ uint32_t empty() const { return full() + 8; }
  __device__ void next() {
    if (++index == stages) index = 0, phase ^= 1;
  }
  // By one thread, before all others begin; `warps` release each stage.
  __device__ void init(int warps) const {
    for (int i = 0; i < stages; ++i) barrier_init(barriers + 16 * i, 1), barrier_init(barriers + 16 * i + 8, warps);
  }
  // By the feeding warp, whose chosen lane then copies so many bytes to at(); returns the barrier that they tell.
  __device__ uint32_t fill(uint32_t expected, bool chosen) const {
    barrier_wait(empty(), phase ^ 1);
    barrier_arrive_expect(full(), expected, chosen);
    return full();
  }
  __device__ void wait() const { barrier_wait(full(), phase); }
};

// By a warpgroup: d += product(at) of each of so many stages, one or more, released when those of the next have
// started.
template <int kCount, typename F>
__device__ inline void multiply(float (&d)[kCount], Ring& ring, int steps, const F& product) {
  uint32_t before = 0;
#pragma unroll 1
  for (int i = 0; i < steps; ++i, ring.next()) {
    // Wait for the copies
    ring.wait();
    // Start the products
    hold(d);
    wgmma_fence();
    product(ring.at());
    wgmma_commit();
    hold(d);
    // Give back the stage of those before, which have ended
    wgmma_wait<1>();
    if (i > 0) release(before);
    before = ring.empty();
  }
  wgmma_wait<0>();
  hold(d);
  release(before);
}

}  // namespace plora::cuda::sm90
