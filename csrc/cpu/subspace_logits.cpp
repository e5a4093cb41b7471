// subspace_logits on the CPU: one product of the normalised features with the normalised, weighted prototypes, each
// flattened over the subspaces.

#include <torch/csrc/stable/library.h>

#include "../common/prototype_checks.h"
#include "dispatch.h"
#include "similarity.h"

namespace plora::cpu {
namespace {

constexpr int64_t kRows = 64;

Tensor subspace_logits(const Tensor& features_, const Tensor& prototypes_, const Tensor& weights_, bool) {
  const char* op = "subspace_logits";
  check_subspaces(op, features_, prototypes_, weights_);
  const int64_t B = features_.size(0), T = features_.size(1), D = features_.size(2), C = prototypes_.size(0);
  const Tensor features = compact(features_), prototypes = compact(prototypes_), weights = compact(weights_);
  const Tensor logits = allocate(features, {B, C});
  dispatch(op, features.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    using acc = acc_type<scalar>;
    // the prototypes, normalised and weighted, as panels of classes: [T, D, width] each
    const int64_t step = gemm<acc>().panel, panels = (C + step - 1) / step;
    Scratch<acc> packed(C * T * D);
    torch::stable::parallel_for(0, panels * T, 1, [&](int64_t begin, int64_t end) {
      Scratch<acc> rows(step * D);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i / T * step, t = i % T, width = std::min(step, C - c);
        for (int64_t j = 0; j < width; ++j) {
          const scalar* from = data<scalar>(prototypes) + ((c + j) * T + t) * D;
          normalise(from, D, data<acc>(weights)[(c + j) * T + t], &rows[j * D]);
        }
        gemm<acc>().transpose(width, D, rows.data(), D, packed.data() + (c * T + t * width) * D, width);
      }
    });
    const int64_t parts = std::max<int64_t>(1, torch::stable::get_num_threads());
    const int64_t most = std::min(kRows, (B + parts - 1) / parts);
    torch::stable::parallel_for(0, B ? (B + most - 1) / most : 0, 1, [&](int64_t begin, int64_t end) {
      Scratch<acc> rows(most * D), block(most * C);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t row = b * most, n = std::min(most, B - row);
        for (int64_t t = 0; t < T; ++t) {
          for (int64_t i = 0; i < n; ++i)
            normalise(data<scalar>(features) + ((row + i) * T + t) * D, D, acc(1), &rows[i * D]);
          for (int64_t c = 0; c < C; c += step) {
            const int64_t width = std::min(step, C - c);
            gemm<acc>().nn(n, width, D, rows.data(), D, 1, packed.data() + (c * T + t * width) * D, width,
                           t ? block.data() + c : nullptr, C, block.data() + c, C);
          }
        }
        if (T == 0) std::fill_n(block.data(), n * C, acc(0));
        std::copy_n(block.data(), n * C, mutable_data<scalar>(logits) + row * C);
      }
    });
  });
  return logits;
}

}  // namespace
}  // namespace plora::cpu

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CPU, m) { m.impl("subspace_logits", TORCH_BOX(&plora::cpu::subspace_logits)); }
