// The operators on factors alone, lora_merge and lora_stack, from tensors to kernels.

#include "factors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../../common/lora_checks.h"
#include "kernels.h"

namespace plora::cuda {

Tensor merged_weight(const Tensor& weight_, const Tensor& A_, const Tensor& B_, const Tensor& scaling_,
                     const OptTensor& ranks_, const OptTensor& times_) {
  check_merge(weight_, A_, B_, scaling_, ranks_);
  const torch::stable::accelerator::DeviceGuard guard(weight_.get_device_index());
  const Tensor weight = compact(weight_), A = compact(A_), B = compact(B_), scaling = compact(scaling_);
  const OptTensor ranks = compact(ranks_), times = compact(times_);
  const Tensor merged = allocate(weight, weight.sizes());
  LoraMerge p{};
  p.dtype = dtype_of("lora_merge", weight.scalar_type());
  p.out = weight.size(0), p.in = weight.size(1), p.T = A.size(0), p.r = A.size(1);
  if (p.out == 0 || p.in == 0) return merged;
  p.weight = weight.const_data_ptr(), p.A = A.const_data_ptr(), p.B = B.const_data_ptr();
  p.scaling = scaling.const_data_ptr(), p.times = times ? times->const_data_ptr() : nullptr;
  p.ranks = ranks ? data<int64_t>(*ranks) : nullptr;
  p.merged = merged.mutable_data_ptr();
  lora_merge(p, stream_of(weight));
  return merged;
}

namespace {

Tensor merge_alone(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scaling,
                   const OptTensor& ranks) {
  return merged_weight(weight, A, B, scaling, ranks, {});
}

using Tensors = std::vector<Tensor>;

std::tuple<Tensor, Tensor, Tensor> stacked(const Tensor& x, const Tensors& A, const Tensors& B,
                                           const std::vector<double>& scaling) {
  const char* op = "lora_stack";
  const int64_t T = static_cast<int64_t>(A.size());
  PLORA_CHECK(T > 0 && B.size() == A.size() && scaling.size() == A.size(), op,
              ": lora_A, lora_B and scaling must be as many, at least one, got ", T, ", ", B.size(), " and ",
              scaling.size());
  PLORA_CHECK(A[0].dim() == 2 && B[0].dim() == 2, op, ": lora_A must be [r, in] and lora_B [out, r], got ",
              plora::shape_of(A[0]), " and ", plora::shape_of(B[0]));
  const int64_t in = A[0].size(1), out = B[0].size(0);
  const ScalarType dtype = A[0].scalar_type();
  PLORA_CHECK(dtype == x.scalar_type() || dtype == ScalarType::Float, op,
              ": factors must be float32 or of the dtype of x");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensors kept;  // copies of what does not lie row after row
  const auto pointer = [&](const Tensor& t) {
    return t.is_contiguous() ? t.const_data_ptr() : kept.emplace_back(torch::stable::contiguous(t)).const_data_ptr();
  };
  std::vector<OneOfStack> adapters;
  adapters.reserve(T);
  int64_t r = 0;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t rank = A[t].dim() == 2 ? A[t].size(0) : 0;
    check_shape(op, "lora_A", A[t], {rank, in}, x);
    check_shape(op, "lora_B", B[t], {out, rank}, x);
    check_dtype(op, "lora_A", A[t], dtype);
    check_dtype(op, "lora_B", B[t], dtype);
    r = std::max(r, rank);
    adapters.push_back({pointer(A[t]), pointer(B[t]), static_cast<float>(scaling[t]), static_cast<int>(rank)});
  }
  PLORA_CHECK((in + out) * r <= std::numeric_limits<int>::max() / 2, op, ": an adapter is too large");
  LoraStack p{dtype_of(op, dtype), dtype_of(op, x.scalar_type())};
  p.r = static_cast<int>(r), p.in = static_cast<int>(in), p.out = static_cast<int>(out);
  const Tensor stack_A = allocate(x, {T, r, in}), stack_B = allocate(x, {T, out, r});
  const Tensor scales = allocate(x, {T}, ScalarType::Float);
  p.A = stack_A.mutable_data_ptr(), p.B = stack_B.mutable_data_ptr(), p.scaling = mutable_data<float>(scales);
  lora_stack(p, adapters, stream_of(x));
  return {stack_A, stack_B, scales};
}

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) {
  m.impl("lora_merge", TORCH_BOX(&plora::cuda::merge_alone));
  m.impl("lora_stack", TORCH_BOX(&plora::cuda::stacked));
}
