// lora_merge on the CPU: weight + sum_t s_t B_t A_t, accumulated in float32 (float64 for float64), a block of rows of
// the weight per task.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/lora_checks.h"
#include "dispatch.h"
#include "gemm.h"

namespace plora::cpu {
namespace {

constexpr int64_t kRows = 24;  // a multiple of the product's tile

template <typename scalar, typename acc = acc_type<scalar>>
void merge(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scaling, const OptTensor& ranks,
           const Tensor& merged) {
  const int64_t out = weight.size(0), in = weight.size(1), T = A.size(0), r = A.size(1);
  std::vector<int64_t> real;  // the ranks t * r + j that are not padding
  for (int64_t t = 0; t < T; ++t)
    for (int64_t j = 0; j < (ranks ? std::clamp<int64_t>(data<int64_t>(*ranks)[t], 0, r) : r); ++j)
      real.push_back(t * r + j);
  const int64_t R = static_cast<int64_t>(real.size());
  const scalar* up = data<scalar>(B);
  const acc* scale = data<acc>(scaling);
  std::vector<acc> wide_A(R * in);
  for (int64_t i = 0; i < R; ++i) std::copy_n(data<scalar>(A) + real[i] * in, in, &wide_A[i * in]);
  torch::stable::parallel_for(0, (out + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc> sum(kRows * in), scaled_B(kRows * R);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kRows, n = std::min(kRows, out - row);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < R; ++k) {
          const int64_t t = real[k] / r, j = real[k] % r;
          scaled_B[i * R + k] = scale[t] * static_cast<acc>(up[(t * out + row + i) * r + j]);
        }
      const scalar* from = data<scalar>(weight) + row * in;
      scalar* to = mutable_data<scalar>(merged) + row * in;
      if constexpr (std::is_same_v<scalar, acc>) {
        gemm<acc>().nn(n, in, R, scaled_B.data(), R, 1, wide_A.data(), in, from, in, to, in);
      } else {
        std::copy_n(from, n * in, sum.data());
        gemm<acc>().nn(n, in, R, scaled_B.data(), R, 1, wide_A.data(), in, sum.data(), in, sum.data(), in);
        std::copy_n(sum.data(), n * in, to);
      }
    }
  });
}

Tensor lora_merge(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scaling,
                  const OptTensor& ranks) {
  check_merge(weight, A, B, scaling, ranks);
  const Tensor merged = torch::stable::new_empty(weight, weight.sizes());
  dispatch("lora_merge", weight.scalar_type(), [&](auto tag) {
    merge<decltype(tag)>(compact(weight), compact(A), compact(B), compact(scaling), compact(ranks), merged);
  });
  return merged;
}

}  // namespace
}  // namespace plora::cpu

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CPU, m) { m.impl("lora_merge", TORCH_BOX(&plora::cpu::lora_merge)); }
