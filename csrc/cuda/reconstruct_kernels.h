// What reconstruct_prototypes.cu asks of reconstruct_sm90.cu.
#pragma once

#include "launch.cuh"

namespace plora::cuda {

struct FastReconstruction {
  const float *old, *fresh, *values;  // [Co, D], [Cn, D], [Cn, Dv], D and Dv multiples of 4, aligned to 16 bytes
  const float* base;                  // [Co, Dv], added to the result, or null
  float* out;                         // [Co, Dv]
  int Co, Cn, D, Dv;
  float scale;  // log2(e) / tau, so that exp((cos - 1) / tau) never vanishes
};

// On compute capability 9.0, for enough old classes to keep it busy. `like`: a float32 tensor there.
void reconstruct_fast(const FastReconstruction& p, bool tf32, const Tensor& like, cudaStream_t stream);

}  // namespace plora::cuda
