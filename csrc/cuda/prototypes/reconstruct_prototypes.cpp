// reconstruct_prototypes on CUDA, from tensors to kernels.
#include <torch/csrc/stable/library.h>

#include "../../common/prototype_checks.h"
#include "../tensors.h"
#include "kernels.h"

namespace plora::cuda {
namespace {

Tensor reconstruct_prototypes(const Tensor& old_, const Tensor& new_, const Tensor& values_, double tau, bool add_old,
                              bool tf32) {
  const char* op = "reconstruct_prototypes";
  check_reconstruct(op, old_, new_, values_, tau, add_old);
  const torch::stable::accelerator::DeviceGuard guard(old_.get_device_index());
  const ScalarType dtype = old_.scalar_type();
  check_float(op, "old", dtype);
  const auto widened = [&](const Tensor& t) {
    return compact(dtype == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
  };
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
  return dtype == ScalarType::Float ? out : torch::stable::to(out, dtype);
}

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) {
  m.impl("reconstruct_prototypes", TORCH_BOX(&plora::cuda::reconstruct_prototypes));
}
