// What the prototype operators check on every device.
#pragma once

#include <tuple>

#include "checks.h"

namespace plora {

inline void check_class_sums(const Tensor& sums, const Tensor& counts, const Tensor& features, const Tensor& labels) {
  const char* op = "class_sums";
  PLORA_CHECK(features.dim() == 2, op, ": features must be [N, D], got ", shape_of(features));
  check_shape(op, "labels", labels, {features.size(0)}, features);
  check_dtype(op, "labels", labels, ScalarType::Long);
  PLORA_CHECK(sums.dim() == 2, op, ": sums must be [C, D], got ", shape_of(sums));
  check_shape(op, "sums", sums, {sums.size(0), features.size(1)}, features);
  check_dtype(op, "sums", sums, wide(features.scalar_type()));
  check_shape(op, "counts", counts, {sums.size(0)}, features);
  check_dtype(op, "counts", counts, ScalarType::Long);
  PLORA_CHECK(sums.is_contiguous() && counts.is_contiguous(), op, ": sums and counts must be contiguous");
}

// The totals of no rows at all.
inline std::tuple<Tensor, Tensor> zero_totals(const Tensor& features, int64_t num_classes) {
  PLORA_CHECK(features.dim() == 2, "class_sums: features must be [N, D], got ", shape_of(features));
  PLORA_CHECK(num_classes >= 0, "class_sums: num_classes must not be negative, got ", num_classes);
  return {torch::stable::new_zeros(features, {num_classes, features.size(1)}, wide(features.scalar_type())),
          torch::stable::new_zeros(features, {num_classes}, ScalarType::Long)};
}

inline void check_float(const char* op, const char* name, ScalarType dtype) {
  PLORA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": ", name,
              " must be float32, bfloat16 or float16 on CUDA, got ", torch::headeronly::toString(dtype));
}

inline void check_tau(const char* op, double tau) { PLORA_CHECK(tau > 0, op, ": tau must be positive, got ", tau); }

inline void check_reconstruct(const char* op, const Tensor& old, const Tensor& fresh, const Tensor& values, double tau,
                              bool add_old) {
  PLORA_CHECK(old.dim() == 2, op, ": old must be [Co, D], got ", shape_of(old));
  PLORA_CHECK(fresh.dim() == 2, op, ": new must be [Cn, D], got ", shape_of(fresh));
  check_shape(op, "new", fresh, {fresh.size(0), old.size(1)}, old);
  check_shape(op, "values", values, {fresh.size(0), add_old ? old.size(1) : -1}, old);
  check_dtype(op, "new", fresh, old.scalar_type());
  check_dtype(op, "values", values, old.scalar_type());
  check_tau(op, tau);
  PLORA_CHECK(fresh.size(0) > 0 || old.size(0) == 0, op, ": new must hold at least one class");
}

inline void check_complete(const char* op, const Tensor& prototypes, const Tensor& task_of_class, double tau) {
  PLORA_CHECK(prototypes.dim() == 3, op, ": prototypes must be [C, T, D], got ", shape_of(prototypes));
  check_shape(op, "task_of_class", task_of_class, {prototypes.size(0)}, prototypes);
  check_dtype(op, "task_of_class", task_of_class, ScalarType::Long);
  check_tau(op, tau);
}

inline void check_subspaces(const char* op, const Tensor& features, const Tensor& prototypes, const Tensor& weights) {
  PLORA_CHECK(features.dim() == 3, op, ": features must be [B, T, D], got ", shape_of(features));
  PLORA_CHECK(prototypes.dim() == 3, op, ": prototypes must be [C, T, D], got ", shape_of(prototypes));
  check_shape(op, "prototypes", prototypes, {prototypes.size(0), features.size(1), features.size(2)}, features);
  check_shape(op, "weights", weights, {prototypes.size(0), features.size(1)}, features);
  check_dtype(op, "prototypes", prototypes, features.scalar_type());
  check_dtype(op, "weights", weights, wide(features.scalar_type()));
}

}  // namespace plora
