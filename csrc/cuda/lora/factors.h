// The merged weight as tensors, for lora_merge and for a sum that goes through it.
#pragma once

#include "../tensors.h"

namespace plora::cuda {

// weight + sum over t of scaling[t] times[t] B_t A_t, of ranks below ranks[t]; both optional.
Tensor merged_weight(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scaling,
                     const OptTensor& ranks, const OptTensor& times);

}  // namespace plora::cuda
