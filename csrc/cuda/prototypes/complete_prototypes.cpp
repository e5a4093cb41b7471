// complete_prototypes on CUDA, from tensors to kernels.
#include <torch/csrc/stable/library.h>

#include "../../common/prototype_checks.h"
#include "../tensors.h"
#include "kernels.h"

namespace plora::cuda {
namespace {

Tensor complete_prototypes(const Tensor& prototypes_, const Tensor& task_of_class, double tau, bool last) {
  const char* op = "complete_prototypes";
  check_complete(op, prototypes_, task_of_class, tau);
  const torch::stable::accelerator::DeviceGuard guard(prototypes_.get_device_index());
  const ScalarType dtype = prototypes_.scalar_type();
  check_float(op, "prototypes", dtype);
  const Tensor prototypes =
      compact(dtype == ScalarType::Float ? prototypes_ : torch::stable::to(prototypes_, ScalarType::Float));
  const Tensor tasks = compact(task_of_class);
  const int64_t C = prototypes.size(0), T = prototypes.size(1), D = prototypes.size(2);
  const Tensor out = allocate(prototypes, prototypes.sizes());
  if (C > 0 && T > 0 && D > 0)
    complete(data<float>(prototypes), data<int64_t>(tasks), mutable_data<float>(out), C, T, D, tau, last,
             Workspace(prototypes), stream_of(prototypes));
  return dtype == ScalarType::Float ? out : torch::stable::to(out, dtype);
}

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) {
  m.impl("complete_prototypes", TORCH_BOX(&plora::cuda::complete_prototypes));
}
