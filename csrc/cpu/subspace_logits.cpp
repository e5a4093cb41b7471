// subspace_logits on the CPU: one product of the normalised features with the normalised, weighted prototypes, each
// flattened over the subspaces.

#include <torch/csrc/stable/library.h>

#include "../common/prototype_checks.h"
#include "dispatch.h"
#include "similarity.h"

namespace plora::cpu {
namespace {

constexpr int64_t kRows = 16;

Tensor subspace_logits(const Tensor& features_, const Tensor& prototypes_, const Tensor& weights_, bool) {
  const char* op = "subspace_logits";
  check_subspaces(op, features_, prototypes_, weights_);
  const int64_t B = features_.size(0), T = features_.size(1), D = features_.size(2), C = prototypes_.size(0);
  const Tensor features = compact(features_), prototypes = compact(prototypes_), weights = compact(weights_);
  const Tensor logits = torch::stable::new_empty(features, {B, C});
  dispatch(op, features.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    using acc = acc_type<scalar>;
    Normalised<acc> p(data<scalar>(prototypes), C * T, D, D);
    const acc* weight = data<acc>(weights);
    for (int64_t i = 0; i < C * T; ++i)
      for (acc *row = &p.rows[i * D], *end = row + D; row != end; ++row) *row *= weight[i];
    torch::stable::parallel_for(0, (B + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc> block(kRows * C);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t row = b * kRows, n = std::min(kRows, B - row);
        const Normalised<acc> f(data<scalar>(features) + row * T * D, n * T, D, D);
        gemm<acc>().nt(n, C, T * D, f.rows.data(), T * D, p.rows.data(), T * D, block.data(), C, false);
        std::copy_n(block.data(), n * C, mutable_data<scalar>(logits) + row * C);
      }
    });
  });
  return logits;
}

}  // namespace
}  // namespace plora::cpu

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CPU, m) { m.impl("subspace_logits", TORCH_BOX(&plora::cpu::subspace_logits)); }
