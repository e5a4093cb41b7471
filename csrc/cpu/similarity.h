// softmax(cos(Q, K) / tau) V over blocks of queries and keys, forward and backward, in the accumulation type.
//
// |cos| <= 1 bounds the exponent, so exp((cos - 1) / tau) needs no running maximum: numerators and denominators of
// successive key blocks just add up, in order. The Q x K matrix is never held. Q and K come with rows normalised.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"

namespace plora::cpu {

constexpr int64_t kQueries = 32, kKeys = 128;

// Rows divided by their norm, no less than eps; norms are kept for the backward pass.
template <typename acc>
struct Normalised {
  std::vector<acc> rows, norms;
  int64_t D = 0;

  template <typename scalar>
  Normalised(const scalar* source, int64_t count, int64_t stride, int64_t D) : rows(count * D), norms(count), D(D) {
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        acc* row = &rows[i * D];
        std::copy_n(source + i * stride, D, row);
        acc square = 0;
        gemm<acc>().nt(1, 1, D, row, D, row, D, &square, 1, false);
        norms[i] = std::max(std::sqrt(square), static_cast<acc>(1e-12));
        const acc inverse = 1 / norms[i];
        for (int64_t d = 0; d < D; ++d) row[d] *= inverse;
      }
    });
  }

  // Gradient of the rows before normalisation: (g - (g . x) x) / |x|; below eps the norm is a constant.
  template <typename scalar>
  void unnormalise(const acc* gradient, int64_t first, int64_t last, scalar* to) const {
    for (int64_t i = first; i < last; ++i) {
      const acc* g = gradient + i * D;
      const acc* x = &rows[i * D];
      acc dot = 0;
      if (norms[i] > static_cast<acc>(1e-12))
        for (int64_t d = 0; d < D; ++d) dot += g[d] * x[d];
      for (int64_t d = 0; d < D; ++d) to[i * D + d] = static_cast<scalar>((g[d] - dot * x[d]) / norms[i]);
    }
  }
};

// e[q, k] = exp((Q_q . K_k - 1) / tau)
template <typename acc>
void weights(const acc* Q, int64_t q, const acc* K, int64_t k, int64_t D, acc tau, acc* e) {
  gemm<acc>().nt(q, k, D, Q, D, K, D, e, k, false);
  for (int64_t i = 0; i < q * k; ++i) e[i] = std::exp((e[i] - 1) / tau);
}

// One block of at most kQueries queries: out[q, Dv] = softmax V, total[q] = the denominators.
template <typename acc>
void attend(const acc* Q, int64_t q, const acc* K, const acc* V, int64_t keys, int64_t D, int64_t Dv, acc tau, acc* out,
            acc* total) {
  acc e[kQueries * kKeys];
  std::fill_n(out, q * Dv, acc(0));
  std::fill_n(total, q, acc(0));
  for (int64_t j = 0; j < keys; j += kKeys) {
    const int64_t k = std::min(kKeys, keys - j);
    weights(Q, q, K + j * D, k, D, tau, e);
    for (int64_t i = 0; i < q; ++i)
      for (int64_t n = 0; n < k; ++n) total[i] += e[i * k + n];
    gemm<acc>().nn(q, Dv, k, e, k, 1, V + j * Dv, Dv, out, Dv, true);
  }
  for (int64_t i = 0; i < q; ++i)
    for (int64_t d = 0; d < Dv; ++d) out[i * Dv + d] /= total[i];
}

// P and dS of one block of queries and keys, given each query's denominator and delta = dO . out.
template <typename acc>
void block_gradients(const acc* Q, const acc* dO, const acc* total, const acc* delta, int64_t q, const acc* K,
                     const acc* V, int64_t k, int64_t D, int64_t Dv, acc tau, acc* P, acc* dS) {
  weights(Q, q, K, k, D, tau, P);
  gemm<acc>().nt(q, k, Dv, dO, Dv, V, Dv, dS, k, false);
  for (int64_t i = 0; i < q; ++i)
    for (int64_t n = 0; n < k; ++n) {
      P[i * k + n] /= total[i];
      dS[i * k + n] = P[i * k + n] * (dS[i * k + n] - delta[i]) / tau;
    }
}

// dQ[q, D] += dS K over all keys.
template <typename acc>
void query_gradient(const acc* Q, const acc* dO, const acc* total, const acc* delta, int64_t q, const acc* K,
                    const acc* V, int64_t keys, int64_t D, int64_t Dv, acc tau, acc* dQ) {
  acc P[kQueries * kKeys], dS[kQueries * kKeys];
  for (int64_t j = 0; j < keys; j += kKeys) {
    const int64_t k = std::min(kKeys, keys - j);
    block_gradients(Q, dO, total, delta, q, K + j * D, V + j * Dv, k, D, Dv, tau, P, dS);
    gemm<acc>().nn(q, D, k, dS, k, 1, K + j * D, D, dQ, D, true);
  }
}

// dK[k, D] += dS^T Q and dV[k, Dv] += P^T dO over all queries, for one block of at most kKeys keys; either may be null.
template <typename acc>
void key_gradient(const acc* Q, const acc* dO, const acc* total, const acc* delta, int64_t queries, const acc* K,
                  const acc* V, int64_t k, int64_t D, int64_t Dv, acc tau, acc* dK, acc* dV) {
  acc P[kQueries * kKeys], dS[kQueries * kKeys];
  for (int64_t i = 0; i < queries; i += kQueries) {
    const int64_t q = std::min(kQueries, queries - i);
    block_gradients(Q + i * D, dO + i * Dv, total + i, delta + i, q, K, V, k, D, Dv, tau, P, dS);
    if (dK) gemm<acc>().nn(k, D, q, dS, 1, k, Q + i * D, D, dK, D, true);
    if (dV) gemm<acc>().nn(k, Dv, q, P, 1, k, dO + i * Dv, Dv, dV, Dv, true);
  }
}

}  // namespace plora::cpu
