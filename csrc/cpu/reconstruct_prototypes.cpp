// reconstruct_prototypes on the CPU: softmax(cos(old, new) / tau) values, a block of old classes per task; backward
// once over the old classes and once over the new ones, so that no two threads add to the same row.

#include <torch/csrc/stable/library.h>

#include "../common/prototype_checks.h"
#include "dispatch.h"
#include "similarity.h"

namespace plora::cpu {
namespace {

template <typename scalar, typename acc = acc_type<scalar>>
std::vector<acc> widened(const Tensor& t) {
  return std::vector<acc>(data<scalar>(t), data<scalar>(t) + t.numel());
}

Tensor reconstruct_prototypes(const Tensor& old_, const Tensor& new_, const Tensor& values_, double tau_, bool add_old,
                              bool) {
  check_reconstruct("reconstruct_prototypes", old_, new_, values_, tau_, add_old);
  const Tensor old = compact(old_), fresh = compact(new_), values = compact(values_);
  const int64_t Co = old.size(0), Cn = fresh.size(0), D = old.size(1), Dv = values.size(1);
  const Tensor out = allocate(old, {Co, Dv});
  dispatch("reconstruct_prototypes", old.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    using acc = acc_type<scalar>;
    const acc tau = static_cast<acc>(tau_);
    const Normalised<acc> Q(data<scalar>(old), Co, D), K(data<scalar>(fresh), Cn, D);
    const std::vector<acc> V = widened<scalar>(values);
    torch::stable::parallel_for(0, (Co + kQueries - 1) / kQueries, 1, [&](int64_t begin, int64_t end) {
      Scratch<acc> block(kQueries * Dv);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t i = b * kQueries, q = std::min(kQueries, Co - i);
        attend(Queries<acc>(&Q.rows[i * D], q, D), K.rows.data(), V.data(), Cn, D, Dv, tau, block.data());
        if (add_old)
          for (int64_t n = 0; n < q * Dv; ++n) block[n] += static_cast<acc>(data<scalar>(old)[i * Dv + n]);
        std::copy_n(block.data(), q * Dv, mutable_data<scalar>(out) + i * Dv);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> reconstruct_prototypes_backward(const Tensor& grad_, const Tensor& old_,
                                                                   const Tensor& new_, const Tensor& values_,
                                                                   double tau_) {
  check_reconstruct("reconstruct_prototypes_backward", old_, new_, values_, tau_, false);
  check_shape("reconstruct_prototypes_backward", "grad", grad_, {old_.size(0), values_.size(1)}, old_);
  check_dtype("reconstruct_prototypes_backward", "grad", grad_, old_.scalar_type());
  const Tensor grad = compact(grad_), old = compact(old_), fresh = compact(new_);
  const Tensor values = compact(values_);
  const int64_t Co = old.size(0), Cn = fresh.size(0), D = old.size(1), Dv = values.size(1);
  const Tensor d_old = allocate(old, old.sizes());
  const Tensor d_new = allocate(fresh, fresh.sizes());
  const Tensor d_values = allocate(values, values.sizes());
  dispatch("reconstruct_prototypes_backward", old.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    using acc = acc_type<scalar>;
    const acc tau = static_cast<acc>(tau_);
    const Normalised<acc> Q(data<scalar>(old), Co, D), K(data<scalar>(fresh), Cn, D);
    const std::vector<acc> V = widened<scalar>(values), dO = widened<scalar>(grad);
    std::vector<acc> log_total(Co), delta(Co), dQ(Co * D), dK(Cn * D), dV(Cn * Dv);
    torch::stable::parallel_for(0, (Co + kQueries - 1) / kQueries, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc> out(kQueries * Dv);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t i = b * kQueries, q = std::min(kQueries, Co - i);
        const Queries<acc> queries(&Q.rows[i * D], q, D), grads(&dO[i * Dv], q, Dv);
        attend(queries, K.rows.data(), V.data(), Cn, D, Dv, tau, out.data(), &log_total[i]);
        for (int64_t n = 0; n < q; ++n)
          for (int64_t d = 0; d < Dv; ++d) delta[i + n] += dO[(i + n) * Dv + d] * out[n * Dv + d];
        query_gradient(queries, grads, &log_total[i], &delta[i], K.rows.data(), V.data(), Cn, D, Dv, tau, &dQ[i * D]);
        Q.unnormalise(dQ.data(), i, i + q, mutable_data<scalar>(d_old));
      }
    });
    torch::stable::parallel_for(0, (Cn + kKeys - 1) / kKeys, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t j = b * kKeys, k = std::min(kKeys, Cn - j);
        key_gradient(Q.rows.data(), dO.data(), log_total.data(), delta.data(), Co, &K.rows[j * D], &V[j * Dv], k, D, Dv,
                     tau, &dK[j * D], &dV[j * Dv]);
        K.unnormalise(dK.data(), j, j + k, mutable_data<scalar>(d_new));
      }
    });
    std::copy(dV.begin(), dV.end(), mutable_data<scalar>(d_values));
  });
  return {d_old, d_new, d_values};
}

}  // namespace
}  // namespace plora::cpu

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CPU, m) {
  m.impl("reconstruct_prototypes", TORCH_BOX(&plora::cpu::reconstruct_prototypes));
  m.impl("reconstruct_prototypes_backward", TORCH_BOX(&plora::cpu::reconstruct_prototypes_backward));
}
