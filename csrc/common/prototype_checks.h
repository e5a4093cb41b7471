// What the prototype operators check on every device.
#pragma once

#include <tuple>

#include "checks.h"

namespace plora {

inline void check_class_sums(const Tensor& sums, const Tensor& counts, const Tensor& features, const Tensor& labels) {
  const char* op = "class_sums";
  STD_TORCH_CHECK(features.dim() == 2, op, ": features must be [N, D], got ", shape_of(features));
  check_shape(op, "labels", labels, {features.size(0)}, features);
  check_dtype(op, "labels", labels, ScalarType::Long);
  STD_TORCH_CHECK(sums.dim() == 2, op, ": sums must be [C, D], got ", shape_of(sums));
  check_shape(op, "sums", sums, {sums.size(0), features.size(1)}, features);
  check_dtype(op, "sums", sums, wide(features.scalar_type()));
  check_shape(op, "counts", counts, {sums.size(0)}, features);
  check_dtype(op, "counts", counts, ScalarType::Long);
  STD_TORCH_CHECK(sums.is_contiguous() && counts.is_contiguous(), op, ": sums and counts must be contiguous");
}

// The totals of no rows at all.
inline std::tuple<Tensor, Tensor> zero_totals(const Tensor& features, int64_t num_classes) {
  STD_TORCH_CHECK(features.dim() == 2, "class_sums: features must be [N, D], got ", shape_of(features));
  STD_TORCH_CHECK(num_classes >= 0, "class_sums: num_classes must not be negative, got ", num_classes);
  return {torch::stable::new_zeros(features, {num_classes, features.size(1)}, wide(features.scalar_type())),
          torch::stable::new_zeros(features, {num_classes}, ScalarType::Long)};
}

}  // namespace plora
