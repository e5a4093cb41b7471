// The kernels of the prototype operators, as what has their tensors (*.cpp) calls them. Everything is enqueued on
// `stream`; nothing waits or copies from the host. Arrays are contiguous, and sizes above 0 where nothing else is said.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../common/dtype.h"
#include "../device/memory.h"

namespace plora::cuda {

// Adds the features [N, D] of every class to its sums [C, D], row by row, and their number to counts [C]. `dtype` is
// that of the features; sums are in its acc_type. labels [N]: below C, or -1 for no class. C and D may be 0.
void sum_classes(Dtype dtype, const void* features, const int64_t* labels, void* sums, int64_t* counts, int64_t N,
                 int64_t D, int64_t C, const Allocator& memory, cudaStream_t stream);

// exp(cos / tau) = 2^(scale cos).
inline float scale_of(double tau) { return static_cast<float>(1.4426950408889634 / tau); }

// prototypes and out [C, T, D]; tasks [C]. A class is filled in subspace t, of a later task than its own (`last`: only
// in that of the last one), from the classes k of task t and later ones: softmax(cos / tau) prototypes[k, t], with the
// cosines of its own subspace. The rest is copied. C T and D must be below 2^31, and C small enough to be sorted.
void complete(const float* prototypes, const int64_t* tasks, float* out, int64_t C, int64_t T, int64_t D, double tau,
              bool last, const Allocator& memory, cudaStream_t stream);

struct Reconstruction {
  const float *old, *fresh, *values;  // [Co, D], [Cn, D], [Cn, Dv]
  const float* base;                  // [Co, Dv], added to the result, or null
  float* out;                         // [Co, Dv]
  int Co, Cn, D, Dv;                  // D may be 0
};

// out = base + softmax(cos(old, fresh) / tau) values, in TF32 or true float32.
void reconstruct(const Reconstruction& p, double tau, bool tf32, const Allocator& memory, cudaStream_t stream);

// The same on compute capability 9.0, for enough old classes to keep it busy (reconstruct_sm90.cu). D and Dv are
// multiples of 4, not 0; all is aligned to 16 bytes; tau is so large that exp(-2 / tau) does not vanish.
void reconstruct_fast(const Reconstruction& p, double tau, bool tf32, const Allocator& memory, cudaStream_t stream);

struct SubspaceLogits {
  const float *features, *prototypes, *weights;  // [B, T, D], [C, T, D], [C, T]
  float* out;                                    // [B, C]
  int B, C, T, D;                                // D may be 0
};

// out[b, c] = sum over t of weights[c, t] cos(features[b, t], prototypes[c, t]), in TF32 or true float32.
void multiply_subspaces(const SubspaceLogits& p, bool tf32, const Allocator& memory, cudaStream_t stream);

}  // namespace plora::cuda
