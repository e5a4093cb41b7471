// class_sums on the CPU: every class's total grows row by row in the order of the rows, a slab of columns per thread,
// so the bits depend neither on the number of threads nor on how the rows are cut into batches.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/prototype_checks.h"
#include "dispatch.h"
#include "gemm.h"
#include "scratch.h"

namespace plora::cpu {
namespace {

constexpr int64_t kSlab = 64;  // columns: 256 bytes of a float32 row, which threads share out

void class_sums_(const Tensor& sums, const Tensor& counts, const Tensor& features, const Tensor& labels) {
  check_class_sums(sums, counts, features, labels);
  const int64_t N = features.size(0), D = features.size(1), C = sums.size(0);
  const Tensor rows = compact(features), classes = compact(labels);
  const int64_t* label = data<int64_t>(classes);
  for (int64_t n = 0; n < N; ++n)
    STD_TORCH_CHECK(label[n] >= -1 && label[n] < C, "class_sums: labels must be between -1 and ", C - 1, ", got ",
                    label[n], " at position ", n);
  int64_t* count = mutable_data<int64_t>(counts);
  for (int64_t n = 0; n < N; ++n)
    if (label[n] >= 0) ++count[label[n]];
  dispatch("class_sums", features.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    using acc = acc_type<scalar>;
    const scalar* row = data<scalar>(rows);
    acc* sum = mutable_data<acc>(sums);
    torch::stable::parallel_for(0, (D + kSlab - 1) / kSlab, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kSlab, width = std::min(end * kSlab, D) - first;
      Scratch<acc> wide(width);
      for (int64_t n = 0; n < N; ++n) {
        if (label[n] < 0) continue;
        const scalar* from = row + n * D + first;
        if constexpr (std::is_same_v<scalar, acc>) {
          gemm<acc>().add(width, from, sum + label[n] * D + first);
        } else {
          std::copy_n(from, width, wide.data());
          gemm<acc>().add(width, wide.data(), sum + label[n] * D + first);
        }
      }
    });
  });
}

std::tuple<Tensor, Tensor> class_sums(const Tensor& features, const Tensor& labels, int64_t num_classes) {
  const auto [sums, counts] = zero_totals(features, num_classes);
  class_sums_(sums, counts, features, labels);
  return {sums, counts};
}

}  // namespace
}  // namespace plora::cpu

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CPU, m) {
  m.impl("class_sums", TORCH_BOX(&plora::cpu::class_sums));
  m.impl("class_sums_", TORCH_BOX(&plora::cpu::class_sums_));
}
