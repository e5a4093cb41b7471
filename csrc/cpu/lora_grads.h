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

}  // namespace plora::cpu
