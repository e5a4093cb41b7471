// lora_merge on CUDA: the operator.

#include <torch/csrc/stable/library.h>

#include "../../common/lora_checks.h"
#include "../tensors.h"
#include "kernels.h"

namespace plora::cuda {
namespace {

Tensor merged_weight(const Tensor& weight_, const Tensor& A_, const Tensor& B_, const Tensor& scaling_,
                     const OptTensor& ranks_) {
  check_merge(weight_, A_, B_, scaling_, ranks_);
  const torch::stable::accelerator::DeviceGuard guard(weight_.get_device_index());
  const Tensor weight = compact(weight_), A = compact(A_), B = compact(B_), scaling = compact(scaling_);
  const OptTensor ranks = compact(ranks_);
  const Tensor merged = allocate(weight, weight.sizes());
  LoraMerge p{};
  p.dtype = dtype_of("lora_merge", weight.scalar_type());
  p.out = weight.size(0), p.in = weight.size(1), p.T = A.size(0), p.r = A.size(1);
  if (p.out == 0 || p.in == 0) return merged;
  p.weight = weight.const_data_ptr(), p.A = A.const_data_ptr(), p.B = B.const_data_ptr();
  p.scaling = scaling.const_data_ptr(), p.ranks = ranks ? data<int64_t>(*ranks) : nullptr;
  p.merged = merged.mutable_data_ptr();
  lora_merge(p, stream_of(weight));
  return merged;
}

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) { m.impl("lora_merge", TORCH_BOX(&plora::cuda::merged_weight)); }
