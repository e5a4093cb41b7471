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
#include "scratch.h"

namespace plora::cpu {

constexpr int64_t kQueries = 96, kKeys = 128;

// to = scale from / |from|, the norm no less than eps; returns the norm
template <typename scalar, typename acc>
acc normalise(const scalar* from, int64_t D, acc scale, acc* to) {
  std::copy_n(from, D, to);
  const acc norm = std::max(std::sqrt(gemm<acc>().dot(D, to, to)), static_cast<acc>(1e-12)), factor = scale / norm;
  for (int64_t d = 0; d < D; ++d) to[d] *= factor;
  return norm;
}

// Rows divided by their norm, no less than eps; norms are kept for the backward pass.
template <typename acc>
struct Normalised {
  std::vector<acc> rows, norms;
  int64_t D = 0;

  template <typename scalar>
  Normalised(const scalar* source, int64_t count, int64_t stride, int64_t D) : rows(count * D), norms(count), D(D) {
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) norms[i] = normalise(source + i * stride, D, acc(1), &rows[i * D]);
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

// Up to kQueries queries, their columns side by side for the products: [D, q].
template <typename acc>
struct Queries {
  const acc* rows;  // [q, D]
  int64_t q;
  Scratch<acc> columns;

  Queries(const acc* rows, int64_t q, int64_t D) : rows(rows), q(q), columns(q * D) {
    gemm<acc>().transpose(q, D, rows, D, columns.data(), q);
  }
};

// to[k, q] = rows[k, D] . queries[q, D]
template <typename acc>
void products(const acc* rows, int64_t k, const Queries<acc>& with, int64_t D, acc* to) {
  const int64_t step = gemm<acc>().panel;
  for (int64_t j = 0; j < with.q; j += step)
    gemm<acc>().nn(k, std::min(step, with.q - j), D, rows, D, 1, with.columns.data() + j, with.q, nullptr, 0, to + j,
                   with.q);
}

// out[q, Dv] = softmax V, total[q] = the denominators.
template <typename acc>
void attend(const Queries<acc>& Q, const acc* K, const acc* V, int64_t keys, int64_t D, int64_t Dv, acc tau, acc* out,
            acc* total) {
  Scratch<acc> e(kKeys * Q.q);
  std::fill_n(total, Q.q, acc(0));
  if (keys == 0) std::fill_n(out, Q.q * Dv, acc(0));
  for (int64_t j = 0; j < keys; j += kKeys) {
    const int64_t k = std::min(kKeys, keys - j);
    products(K + j * D, k, Q, D, e.data());
    gemm<acc>().exp_rows(k, Q.q, e.data(), tau, total);
    gemm<acc>().nn(Q.q, Dv, k, e.data(), 1, Q.q, V + j * Dv, Dv, j ? out : nullptr, Dv, out, Dv);
  }
  for (int64_t i = 0; i < Q.q; ++i)
    for (int64_t d = 0; d < Dv; ++d) out[i * Dv + d] /= total[i];
}

// P and dS, both [k, q], given each query's denominator and delta = dO . out.
template <typename acc>
void block_gradients(const Queries<acc>& Q, const Queries<acc>& dO, const acc* total, const acc* delta, const acc* K,
                     const acc* V, int64_t k, int64_t D, int64_t Dv, acc tau, acc* P, acc* dS) {
  acc sums[kQueries] = {};
  products(K, k, Q, D, P);
  gemm<acc>().exp_rows(k, Q.q, P, tau, sums);
  products(V, k, dO, Dv, dS);
  for (int64_t n = 0; n < k; ++n)
    for (int64_t i = 0; i < Q.q; ++i) {
      const int64_t at = n * Q.q + i;
      P[at] /= total[i];
      dS[at] = P[at] * (dS[at] - delta[i]) / tau;
    }
}

// dQ[q, D] += dS K over all keys.
template <typename acc>
void query_gradient(const Queries<acc>& Q, const Queries<acc>& dO, const acc* total, const acc* delta, const acc* K,
                    const acc* V, int64_t keys, int64_t D, int64_t Dv, acc tau, acc* dQ) {
  Scratch<acc> P(kKeys * Q.q), dS(kKeys * Q.q);
  for (int64_t j = 0; j < keys; j += kKeys) {
    const int64_t k = std::min(kKeys, keys - j);
    block_gradients(Q, dO, total, delta, K + j * D, V + j * Dv, k, D, Dv, tau, P.data(), dS.data());
    gemm<acc>().nn(Q.q, D, k, dS.data(), 1, Q.q, K + j * D, D, dQ, D, dQ, D);
  }
}

// dK[k, D] += dS^T Q and dV[k, Dv] += P^T dO over all queries, for one block of at most kKeys keys; either may be null.
template <typename acc>
void key_gradient(const acc* Q, const acc* dO, const acc* total, const acc* delta, int64_t queries, const acc* K,
                  const acc* V, int64_t k, int64_t D, int64_t Dv, acc tau, acc* dK, acc* dV) {
  Scratch<acc> P(kKeys * kQueries), dS(kKeys * kQueries);
  for (int64_t i = 0; i < queries; i += kQueries) {
    const int64_t q = std::min(kQueries, queries - i);
    block_gradients(Queries<acc>(Q + i * D, q, D), Queries<acc>(dO + i * Dv, q, Dv), total + i, delta + i, K, V, k, D,
                    Dv, tau, P.data(), dS.data());
    if (dK) gemm<acc>().nn(k, D, q, dS.data(), q, 1, Q + i * D, D, dK, D, dK, D);
    if (dV) gemm<acc>().nn(k, Dv, q, P.data(), q, 1, dO + i * Dv, Dv, dV, Dv, dV, Dv);
  }
}

}  // namespace plora::cpu
