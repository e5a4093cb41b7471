// The gradients of the low-rank families on the CPU, and the half of the forward pass that they repeat.
#pragma once

#include "lora_factors.h"

namespace plora::cpu {

Gradients lora_gradients(const Inputs& p, const Tensor& dy, const OptInts& trainable, int64_t needs);

// h[n, R] = act(x A^T + a)
template <typename acc>
acc* shrink(const Inputs& p, const Adapter<acc>& a, const acc* x, int64_t ldx, int64_t n, Scratch<acc>& to) {
  acc* h = to.grown(n * a.R);
  gemm<acc>().nn(n, a.R, p.in, x, ldx, 1, a.AT, a.ld, p.bias_A || p.bias_B ? a.bias : nullptr, 0, h, a.R);
  if (p.relu)
    for (int64_t i = 0; i < n * a.R; ++i) h[i] = h[i] < 0 ? acc(0) : h[i];
  return h;
}

// y[n, N] = y0 + h[n, R] up[R, N], a few rows at a time, which sweeps over y row by row
template <typename acc>
void expand(int64_t n, int64_t N, int64_t R, const acc* h, int64_t ld_h, const acc* up, const acc* y0, int64_t ld0,
            acc* y, int64_t ld) {
  constexpr int64_t kRows = 24;
  for (int64_t i = 0; i < n; i += kRows)
    gemm<acc>().nn(std::min(kRows, n - i), N, R, h + i * ld_h, ld_h, 1, up, N, y0 ? y0 + i * ld0 : nullptr, ld0,
                   y + i * ld, ld);
}

}  // namespace plora::cpu
