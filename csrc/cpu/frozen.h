// The frozen layer's own product, so that the low-rank part can be added to its output while that is in cache.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "lora_factors.h"
#include "scratch.h"

namespace plora::cpu {

// A right-hand side [K, N] of a product, packed in panels of columns. It is packed anew in every call (1 % of a product
// of 3,000 rows): torch's stable interface does not tell whether a weight was changed in place since the last one.
template <typename acc>
class Panels {
 public:
  Panels() = default;

  // weight [out, in], transposed for x W^T: K = in, N = out. With an adapter, W + s B A.
  static Panels transposed(const acc* weight, int64_t out, int64_t in, const Adapter<acc>* a) {
    Panels w(in, out);
    w.each([&](int64_t n, int64_t width, acc* panel) {
      gemm<acc>().transpose(width, in, weight + n * in, in, panel, width);
      if (!a) return;
      Scratch<acc> BT(a->R * width);  // side by side, or its rows would compete for a few lines of the cache
      for (int64_t j = 0; j < a->R; ++j) std::copy_n(a->BT + j * out + n, width, &BT[j * width]);
      gemm<acc>().nn(in, width, a->R, a->A, 1, in, BT.data(), width, panel, width, panel, width);
    });
    return w;
  }

  // The same weight as it is, for dy W: K = out, N = in.
  static Panels straight(const acc* weight, int64_t out, int64_t in, const Adapter<acc>* a) {
    Panels w(out, in);
    w.each([&](int64_t n, int64_t width, acc* panel) {
      const int64_t R = a ? a->R : 0;
      Scratch<acc> A(R * width);
      for (int64_t j = 0; j < R; ++j) std::copy_n(a->A + j * in + n, width, &A[j * width]);
      gemm<acc>().nn(out, width, R, a ? a->BT : nullptr, 1, out, A.data(), width, weight + n, in, panel, width);
    });
    return w;
  }

  explicit operator bool() const { return N_ > 0; }

  // C[M, N] = C0 + A[M, K] W + h[M, R] up[R, N], C0 as for Gemm::nn; h is added while a panel of C is in cache
  void product(int64_t M, const acc* A, int64_t lda, const acc* C0, int64_t ld0, acc* C, int64_t ldc,
               const acc* h = nullptr, int64_t R = 0, const acc* up = nullptr) const {
    const int64_t step = gemm<acc>().panel;
    for (int64_t n = 0; n < N_; n += step) {
      const int64_t width = std::min(step, N_ - n);
      gemm<acc>().nn(M, width, K_, A, lda, 1, data_.data() + n * K_, width, C0 ? C0 + n : nullptr, ld0, C + n, ldc);
      if (R > 0) gemm<acc>().nn(M, width, R, h, R, 1, up + n, N_, C + n, ldc, C + n, ldc);
    }
  }

 private:
  int64_t K_ = 0, N_ = 0;
  Scratch<acc> data_;

  Panels(int64_t K, int64_t N) : K_(K), N_(N), data_(K * N) {}

  template <typename F>
  void each(const F& pack) {
    const int64_t step = gemm<acc>().panel;
    torch::stable::parallel_for(0, (N_ + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(i * step, std::min(step, N_ - i * step), data_.data() + i * step * K_);
    });
  }
};

// Whether the frozen product is made here or by torch: makes_frozen_product(), unless PLORA_CPU_BASE=own or torch says.
// float64 and the 16-bit types are torch's.
bool own_frozen_product(const Inputs& p);

// Whether a sum goes through W + s B A: where that is cheaper to make than the products of the rows with A and B. Not
// in 16 bits, which would round a small adapter away.
inline bool merges(const Inputs& p) {
  return p.family == Family::sum && p.weight && !p.relu && !p.bias_A && !p.bias_B &&
         p.M * (p.in + p.out) > p.in * p.out && wide(p.dtype) == p.dtype;
}

// That weight.
inline Tensor merged(const Inputs& p) {
  std::array<StableIValue, 5> stack{torch::stable::detail::from(*p.weight),
                                    torch::stable::detail::from(with_sizes(p.lora_A, {p.T, p.r, p.in})),
                                    torch::stable::detail::from(with_sizes(p.lora_B, {p.T, p.out, p.r})),
                                    torch::stable::detail::from(p.scaling), torch::stable::detail::from(p.ranks)};
  check_call(torch_call_dispatcher("plora_ext::lora_merge", "", stack.data(), TORCH_ABI_VERSION), "lora_merge");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace plora::cpu
