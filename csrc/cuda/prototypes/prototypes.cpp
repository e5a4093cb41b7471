// The prototype operators on CUDA, from tensors to kernels.
#include <torch/csrc/stable/library.h>

#include "../../common/prototype_checks.h"
#include "../tensors.h"
#include "kernels.h"

namespace plora::cuda {
namespace {

// As the kernels take them; what comes of them goes back to the dtype of the arguments.
Tensor widened(const Tensor& t) {
  return compact(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

Tensor narrowed(const Tensor& t, ScalarType dtype) {
  return dtype == ScalarType::Float ? t : torch::stable::to(t, dtype);
}

void class_sums_(const Tensor& sums, const Tensor& counts, const Tensor& features, const Tensor& labels) {
  check_class_sums(sums, counts, features, labels);
  const int64_t N = features.size(0), D = features.size(1), C = sums.size(0);
  if (N == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor rows = compact(features), classes = compact(labels);
  sum_classes(dtype_of("class_sums", features.scalar_type()), rows.const_data_ptr(), data<int64_t>(classes),
              sums.mutable_data_ptr(), mutable_data<int64_t>(counts), N, D, C, Workspace(rows), stream_of(rows));
}

std::tuple<Tensor, Tensor> class_sums(const Tensor& features, const Tensor& labels, int64_t num_classes) {
  const auto [sums, counts] = zero_totals(features, num_classes);
  class_sums_(sums, counts, features, labels);
  return {sums, counts};
}

Tensor complete_prototypes(const Tensor& prototypes_, const Tensor& task_of_class, double tau, bool last) {
  const char* op = "complete_prototypes";
  check_complete(op, prototypes_, task_of_class, tau);
  const torch::stable::accelerator::DeviceGuard guard(prototypes_.get_device_index());
  const ScalarType dtype = prototypes_.scalar_type();
  check_float(op, "prototypes", dtype);
  const Tensor prototypes = widened(prototypes_), tasks = compact(task_of_class);
  const int64_t C = prototypes.size(0), T = prototypes.size(1), D = prototypes.size(2);
  const Tensor out = allocate(prototypes, prototypes.sizes());
  if (C > 0 && T > 0 && D > 0)
    complete(data<float>(prototypes), data<int64_t>(tasks), mutable_data<float>(out), C, T, D, tau, last,
             Workspace(prototypes), stream_of(prototypes));
  return narrowed(out, dtype);
}

Tensor reconstruct_prototypes(const Tensor& old_, const Tensor& new_, const Tensor& values_, double tau, bool add_old,
                              bool tf32) {
  const char* op = "reconstruct_prototypes";
  check_reconstruct(op, old_, new_, values_, tau, add_old);
  const torch::stable::accelerator::DeviceGuard guard(old_.get_device_index());
  const ScalarType dtype = old_.scalar_type();
  check_float(op, "old", dtype);
  const int64_t Co = old_.size(0), Cn = new_.size(0), D = old_.size(1), Dv = values_.size(1);
  PLORA_CHECK(std::max({Co, Cn, D, Dv}) < INT32_MAX / 2, op, ": sizes beyond 2^30");
  const Tensor old = widened(old_), fresh = widened(new_), values = widened(values_);
  const Tensor out = allocate(old, {Co, Dv});
  if (Co > 0 && Dv > 0) {
    Reconstruction p{};
    p.old = data<float>(old), p.fresh = data<float>(fresh), p.values = data<float>(values);
    p.base = add_old ? p.old : nullptr, p.out = mutable_data<float>(out);
    p.Co = static_cast<int>(Co), p.Cn = static_cast<int>(Cn), p.D = static_cast<int>(D), p.Dv = static_cast<int>(Dv);
    // What 16 bits hold is exact in TF32, so that 16-bit inputs lose nothing by it.
    reconstruct(p, tau, tf32 || dtype != ScalarType::Float, Workspace(old), stream_of(old));
  }
  return narrowed(out, dtype);
}

Tensor subspace_logits(const Tensor& features_, const Tensor& prototypes_, const Tensor& weights_, bool tf32) {
  const char* op = "subspace_logits";
  check_subspaces(op, features_, prototypes_, weights_);
  const torch::stable::accelerator::DeviceGuard guard(features_.get_device_index());
  const ScalarType dtype = features_.scalar_type();
  check_float(op, "features", dtype);
  const int64_t B = features_.size(0), T = features_.size(1), D = features_.size(2), C = prototypes_.size(0);
  PLORA_CHECK(std::max({B, C, T, D}) < INT32_MAX / 2, op, ": sizes beyond 2^30");
  const Tensor features = widened(features_), prototypes = widened(prototypes_), weights = compact(weights_);
  if (B == 0 || C == 0 || T == 0) return narrowed(torch::stable::new_zeros(features, {B, C}), dtype);

  const Tensor out = allocate(features, {B, C});
  SubspaceLogits p{};
  p.features = data<float>(features), p.prototypes = data<float>(prototypes), p.weights = data<float>(weights);
  p.out = mutable_data<float>(out);
  p.B = static_cast<int>(B), p.C = static_cast<int>(C), p.T = static_cast<int>(T), p.D = static_cast<int>(D);
  multiply_subspaces(p, tf32 || dtype != ScalarType::Float, Workspace(features), stream_of(features));
  return narrowed(out, dtype);
}

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) {
  m.impl("class_sums", TORCH_BOX(&plora::cuda::class_sums));
  m.impl("class_sums_", TORCH_BOX(&plora::cuda::class_sums_));
  m.impl("complete_prototypes", TORCH_BOX(&plora::cuda::complete_prototypes));
  m.impl("reconstruct_prototypes", TORCH_BOX(&plora::cuda::reconstruct_prototypes));
  m.impl("subspace_logits", TORCH_BOX(&plora::cuda::subspace_logits));
}
