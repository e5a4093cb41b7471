// softmax(cos(Q, K) / tau) V over blocks of queries and keys, forward and backward, in the accumulation type. The Q x K
// matrix is never held. Q and K come with rows normalised; what belongs to a block of queries lies side by side,
// [keys, q], so that the keys are read as they come.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
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

// Rows divided by their norm; norms are kept for the backward pass.
template <typename acc>
struct Normalised {
  Scratch<acc> rows, norms;
  int64_t D = 0;

  template <typename scalar>
  Normalised(const scalar* source, int64_t count, int64_t D) : rows(count * D), norms(count), D(D) {
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) norms[i] = normalise(source + i * D, D, acc(1), &rows[i * D]);
    });
  }

  // Gradient of the rows before normalisation: (g - (g . x) x) / |x|; below eps the norm is a constant.
  template <typename scalar>
  void unnormalise(const acc* gradient, int64_t first, int64_t last, scalar* to) const {
    for (int64_t i = first; i < last; ++i) {
      const acc* g = gradient + i * D;
      const acc* x = &rows[i * D];
      const acc dot = norms[i] > static_cast<acc>(1e-12) ? gemm<acc>().dot(D, g, x) : 0;
      for (int64_t d = 0; d < D; ++d) to[i * D + d] = static_cast<scalar>((g[d] - dot * x[d]) / norms[i]);
    }
  }
};

// Up to kQueries queries, their columns side by side for the products: [D, q].
template <typename acc>
struct Queries {
  int64_t q;
  Scratch<acc> columns;

  Queries(const acc* rows, int64_t q, int64_t D) : q(q), columns(q * D) {
    gemm<acc>().transpose(q, D, rows, D, columns.data(), q);
  }

  // to[k, q] = rows[k, D] . queries
  void products(const acc* rows, int64_t k, int64_t D, acc* to) const {
    const int64_t step = gemm<acc>().panel;
    for (int64_t j = 0; j < q; j += step)
      gemm<acc>().nn(k, std::min(step, q - j), D, rows, D, 1, columns.data() + j, q, nullptr, 0, to + j, q);
  }
};

// A softmax over keys that come block by block, with each query's largest exponent so far.
template <typename acc>
class Softmax {
 public:
  Softmax(int64_t q, acc tau)
      : q_(q), tau_(tau), largest_(q, -std::numeric_limits<acc>::infinity()), shift_(q), total_(q, 0) {}

  // out[q, Dv] += exp(cos / tau) V, up to a factor; cos [k, q] is overwritten
  void add(acc* cos, int64_t k, const acc* V, int64_t ldv, int64_t Dv, acc* out) {
    const bool first = std::isinf(largest_[0]);
    for (int64_t i = 0; i < q_; ++i) {
      acc largest = largest_[i];
      for (int64_t n = 0; n < k; ++n) largest = std::max(largest, cos[n * q_ + i]);
      if (!first && largest > largest_[i]) {
        const acc factor = std::exp((largest_[i] - largest) / tau_);
        total_[i] *= factor;
        for (int64_t d = 0; d < Dv; ++d) out[i * Dv + d] *= factor;
      }
      largest_[i] = largest, shift_[i] = largest / tau_;
    }
    gemm<acc>().exp_rows(k, q_, cos, 1 / tau_, shift_.data(), total_.data());
    gemm<acc>().nn(q_, Dv, k, cos, 1, q_, V, ldv, first ? nullptr : out, Dv, out, Dv);
  }

  // Divides out by the denominators; their logarithms, if wanted.
  void finish(int64_t Dv, acc* out, acc* log_total = nullptr) const {
    for (int64_t i = 0; i < q_; ++i) {
      const acc factor = 1 / total_[i];
      for (int64_t d = 0; d < Dv; ++d) out[i * Dv + d] *= factor;
      if (log_total) log_total[i] = shift_[i] + std::log(total_[i]);
    }
  }

 private:
  int64_t q_;
  acc tau_;
  std::vector<acc> largest_, shift_, total_;
};

// out[q, Dv] = softmax V
template <typename acc>
void attend(const Queries<acc>& Q, const acc* K, const acc* V, int64_t keys, int64_t D, int64_t Dv, acc tau, acc* out,
            acc* log_total = nullptr) {
  Scratch<acc> cos(kKeys * Q.q);
  Softmax<acc> softmax(Q.q, tau);
  for (int64_t j = 0; j < keys; j += kKeys) {
    const int64_t k = std::min(kKeys, keys - j);
    Q.products(K + j * D, k, D, cos.data());
    softmax.add(cos.data(), k, V + j * Dv, Dv, Dv, out);
  }
  softmax.finish(Dv, out, log_total);
}

// P and dS, both [k, q], given the logarithm of each query's denominator and delta = dO . out.
template <typename acc>
void block_gradients(const Queries<acc>& Q, const Queries<acc>& dO, const acc* log_total, const acc* delta,
                     const acc* K, const acc* V, int64_t k, int64_t D, int64_t Dv, acc tau, acc* P, acc* dS) {
  acc unused[kQueries] = {};
  Q.products(K, k, D, P);
  gemm<acc>().exp_rows(k, Q.q, P, 1 / tau, log_total, unused);
  dO.products(V, k, Dv, dS);
  for (int64_t n = 0; n < k; ++n)
    for (int64_t i = 0; i < Q.q; ++i) dS[n * Q.q + i] = P[n * Q.q + i] * (dS[n * Q.q + i] - delta[i]) / tau;
}

// dQ[q, D] += dS K over all keys.
template <typename acc>
void query_gradient(const Queries<acc>& Q, const Queries<acc>& dO, const acc* log_total, const acc* delta, const acc* K,
                    const acc* V, int64_t keys, int64_t D, int64_t Dv, acc tau, acc* dQ) {
  Scratch<acc> P(kKeys * Q.q), dS(kKeys * Q.q);
  for (int64_t j = 0; j < keys; j += kKeys) {
    const int64_t k = std::min(kKeys, keys - j);
    block_gradients(Q, dO, log_total, delta, K + j * D, V + j * Dv, k, D, Dv, tau, P.data(), dS.data());
    gemm<acc>().nn(Q.q, D, k, dS.data(), 1, Q.q, K + j * D, D, dQ, D, dQ, D);
  }
}

// dK[k, D] += dS^T Q and dV[k, Dv] += P^T dO over all queries, for one block of at most kKeys keys; either may be null.
template <typename acc>
void key_gradient(const acc* Q, const acc* dO, const acc* log_total, const acc* delta, int64_t queries, const acc* K,
                  const acc* V, int64_t k, int64_t D, int64_t Dv, acc tau, acc* dK, acc* dV) {
  Scratch<acc> P(kKeys * kQueries), dS(kKeys * kQueries);
  for (int64_t i = 0; i < queries; i += kQueries) {
    const int64_t q = std::min(kQueries, queries - i);
    block_gradients(Queries<acc>(Q + i * D, q, D), Queries<acc>(dO + i * Dv, q, Dv), log_total + i, delta + i, K, V, k,
                    D, Dv, tau, P.data(), dS.data());
    if (dK) gemm<acc>().nn(k, D, q, dS.data(), q, 1, Q + i * D, D, dK, D, dK, D);
    if (dV) gemm<acc>().nn(k, Dv, q, P.data(), q, 1, dO + i * Dv, Dv, dV, Dv, dV, Dv);
  }
}

}  // namespace plora::cpu
