// What the prototype operators check on every device.
#pragma once

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

}  // namespace plora
