// subspace_logits on CUDA, from tensors to kernels.
#include <torch/csrc/stable/library.h>

#include "../../common/prototype_checks.h"
#include "../tensors.h"
#include "kernels.h"

namespace plora::cuda {
namespace {

Tensor subspace_logits(const Tensor& features_, const Tensor& prototypes_, const Tensor& weights_, bool tf32) {
  const char* op = "subspace_logits";
  check_subspaces(op, features_, prototypes_, weights_);
  const torch::stable::accelerator::DeviceGuard guard(features_.get_device_index());
  const ScalarType dtype = features_.scalar_type();
  check_float(op, "features", dtype);
  const auto widened = [&](const Tensor& t) {
    return compact(dtype == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
  };
  const int64_t B = features_.size(0), T = features_.size(1), D = features_.size(2), C = prototypes_.size(0);
  PLORA_CHECK(std::max({B, C, T, D}) < INT32_MAX / 2, op, ": sizes beyond 2^30");
  const Tensor features = widened(features_), prototypes = widened(prototypes_), weights = compact(weights_);
  const auto result = [&](const Tensor& logits) {
    return dtype == ScalarType::Float ? logits : torch::stable::to(logits, dtype);
  };
  if (B == 0 || C == 0 || T == 0) return result(torch::stable::new_zeros(features, {B, C}));

  const Tensor out = allocate(features, {B, C});
  SubspaceLogits p{};
  p.features = data<float>(features), p.prototypes = data<float>(prototypes), p.weights = data<float>(weights);
  p.out = mutable_data<float>(out);
  p.B = static_cast<int>(B), p.C = static_cast<int>(C), p.T = static_cast<int>(T), p.D = static_cast<int>(D);
  multiply_subspaces(p, tf32 || dtype != ScalarType::Float, Workspace(features), stream_of(features));
  return result(out);
}

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) { m.impl("subspace_logits", TORCH_BOX(&plora::cuda::subspace_logits)); }
