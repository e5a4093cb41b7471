// lora_merge on the CPU: weight + sum_t s_t B_t A_t, accumulated in float32 (float64 for float64), a block of rows of
// the weight per task.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/lora_checks.h"
#include "dispatch.h"
#include "frozen.h"

namespace plora::cpu {
namespace {

constexpr int64_t kRows = 48;

template <typename scalar, typename acc = acc_type<scalar>>
void merge(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scaling, const OptTensor& ranks,
           const Tensor& merged) {
  const int64_t out = weight.size(0), in = weight.size(1), T = A.size(0), r = A.size(1);
  std::vector<int64_t> start(1, 0);  // the ranks of adapter t, without padding, are [start[t], start[t + 1])
  for (int64_t t = 0; t < T; ++t) {
    const int64_t rank = ranks ? data<int64_t>(*ranks)[t] : r;
    PLORA_CHECK(rank >= 0 && rank <= r, "lora_merge: ranks[", t, "] must be between 0 and ", r, ", got ", rank);
    start.push_back(start[t] + rank);
  }
  const int64_t R = start[T];
  const acc* all_A = nullptr;
  if constexpr (std::is_same_v<scalar, acc>)
    if (!ranks) all_A = data<acc>(A);
  Scratch<acc> copy_of_A(all_A ? 0 : R * in);
  if (!all_A) {
    for (int64_t t = 0; t < T; ++t)
      convert(data<scalar>(A) + t * r * in, (start[t + 1] - start[t]) * in, copy_of_A.data() + start[t] * in);
    all_A = copy_of_A.data();
  }
  const auto right = Panels<acc>::straight(all_A, R, in, nullptr);
  torch::stable::parallel_for(0, (out + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    Scratch<acc> sum(kRows * in), scaled_B(kRows * R);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kRows, n = std::min(kRows, out - row);
      for (int64_t t = 0; t < T; ++t) {
        const acc scale = data<acc>(scaling)[t];
        const scalar* from = data<scalar>(B) + (t * out + row) * r;
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = start[t]; j < start[t + 1]; ++j)
            scaled_B[i * R + j] = scale * static_cast<acc>(from[i * r + j - start[t]]);
      }
      const scalar* from = data<scalar>(weight) + row * in;
      scalar* to = mutable_data<scalar>(merged) + row * in;
      if constexpr (std::is_same_v<scalar, acc>) {
        right.product(n, scaled_B.data(), R, from, in, to, in);
      } else {
        convert(from, n * in, sum.data());
        right.product(n, scaled_B.data(), R, sum.data(), in, sum.data(), in);
        convert(sum.data(), n * in, to);
      }
    }
  });
}

Tensor lora_merge(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scaling,
                  const OptTensor& ranks) {
  check_merge(weight, A, B, scaling, ranks);
  const Tensor merged = allocate(weight, weight.sizes());
  dispatch("lora_merge", weight.scalar_type(), [&](auto tag) {
    merge<decltype(tag)>(compact(weight), compact(A), compact(B), compact(scaling), compact(ranks), merged);
  });
  return merged;
}

}  // namespace
}  // namespace plora::cpu

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CPU, m) { m.impl("lora_merge", TORCH_BOX(&plora::cpu::lora_merge)); }
