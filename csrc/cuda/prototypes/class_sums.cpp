// class_sums on CUDA, from tensors to kernels.
#include <torch/csrc/stable/library.h>

#include "../../common/prototype_checks.h"
#include "../tensors.h"
#include "kernels.h"

namespace plora::cuda {
namespace {

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

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) {
  m.impl("class_sums", TORCH_BOX(&plora::cuda::class_sums));
  m.impl("class_sums_", TORCH_BOX(&plora::cuda::class_sums_));
}
