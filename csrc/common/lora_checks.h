// What lora_merge checks on every device.
#pragma once

#include "checks.h"

namespace plora {

inline void check_merge(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scaling,
                        const OptTensor& ranks) {
  const char* op = "lora_merge";
  PLORA_CHECK(weight.dim() == 2, op, ": weight must be [out, in], got ", shape_of(weight));
  PLORA_CHECK(A.dim() == 3, op, ": lora_A must be [T, r, in], got ", shape_of(A));
  const int64_t T = A.size(0), r = A.size(1);
  check_shape(op, "lora_A", A, {T, r, weight.size(1)}, weight);
  check_shape(op, "lora_B", B, {T, weight.size(0), r}, weight);
  check_shape(op, "scaling", scaling, {T}, weight);
  check_dtype(op, "lora_A", A, weight.scalar_type());
  check_dtype(op, "lora_B", B, weight.scalar_type());
  check_dtype(op, "scaling", scaling, wide(weight.scalar_type()));
  if (ranks) {
    check_shape(op, "ranks", *ranks, {T}, weight);
    check_dtype(op, "ranks", *ranks, ScalarType::Long);
  }
}

}  // namespace plora
