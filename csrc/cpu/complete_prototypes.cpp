// complete_prototypes on the CPU: every block above the diagonal of [class, subspace] at once. Sorted by task, the keys
// of a pair (i, j) are a suffix of the classes, and all reads touch real prototypes only, so the pairs are independent.

#include <torch/csrc/stable/library.h>

#include <numeric>

#include "../common/prototype_checks.h"
#include "dispatch.h"
#include "similarity.h"

namespace plora::cpu {
namespace {

struct Pair {
  int64_t i, j;  // the classes of task i get subspace j
};

// The classes sorted by task.
struct Sorted {
  int64_t C, T, D;
  std::vector<int64_t> order, start;  // sorted class -> class; task t is [start[t], start[t + 1])
  std::vector<Pair> pairs;            // by i

  Sorted(const Tensor& prototypes, const Tensor& task_of_class, bool last)
      : C(prototypes.size(0)), T(prototypes.size(1)), D(prototypes.size(2)), order(C), start(T + 1) {
    const int64_t* task = data<int64_t>(task_of_class);
    for (int64_t c = 0; c < C; ++c) {
      PLORA_CHECK(task[c] >= 0 && task[c] < T, "complete_prototypes: task_of_class must be between 0 and ", T - 1,
                  ", got ", task[c], " for class ", c);
      ++start[task[c] + 1];
    }
    std::partial_sum(start.begin(), start.end(), start.begin());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return task[a] < task[b]; });
    for (int64_t i = 0; i < T; ++i)
      for (int64_t j = last ? std::max(i + 1, T - 1) : i + 1; j < T; ++j)
        if (start[i] < start[i + 1] && start[j] < C) pairs.push_back({i, j});
  }

  int64_t queries(const Pair& p) const { return start[p.i + 1] - start[p.i]; }
  int64_t keys(const Pair& p) const { return C - start[p.j]; }
};

// The prototypes as [T, C, D], in the accumulation type and sorted by task: as they are where they are that already.
template <typename scalar, typename acc>
class Values {
 public:
  Values(const Sorted& s, const scalar* W) : C_(s.C), T_(s.T), D_(s.D) {
    if constexpr (std::is_same_v<scalar, acc>)
      if (std::is_sorted(s.order.begin(), s.order.end())) given_ = W;
    if (given_) return;
    copy_ = Scratch<acc>(T_ * C_ * D_);
    torch::stable::parallel_for(0, C_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        for (int64_t t = 0; t < T_; ++t)
          std::copy_n(W + (s.order[c] * T_ + t) * D_, D_, copy_.data() + (t * C_ + c) * D_);
    });
  }

  const acc* at(int64_t t, int64_t c) const {
    return given_ ? given_ + (c * T_ + t) * D_ : copy_.data() + (t * C_ + c) * D_;
  }
  int64_t ld() const { return given_ ? T_ * D_ : D_; }

 private:
  int64_t C_, T_, D_;
  const acc* given_ = nullptr;
  Scratch<acc> copy_;
};

// cos [keys, q] of up to kQueries classes from sorted class `first` on with all of later tasks, in subspace i
template <typename scalar, typename acc>
void similarities(const Sorted& s, const Values<scalar, acc>& values, int64_t i, int64_t first, int64_t q, acc* cos) {
  Scratch<acc> rows(std::max(kKeys, kQueries) * s.D);
  const auto normalised = [&](int64_t c, int64_t n) {
    for (int64_t k = 0; k < n; ++k) normalise(values.at(i, c + k), s.D, acc(1), &rows[k * s.D]);
    return rows.data();
  };
  const Queries<acc> queries(normalised(first, q), q, s.D);
  for (int64_t c = s.start[i + 1]; c < s.C; c += kKeys) {
    const int64_t k = std::min(kKeys, s.C - c);
    queries.products(normalised(c, k), k, s.D, cos + (c - s.start[i + 1]) * q);
  }
}

Tensor complete_prototypes(const Tensor& prototypes_, const Tensor& task_of_class, double tau, bool last) {
  check_complete("complete_prototypes", prototypes_, task_of_class, tau);
  const Tensor prototypes = compact(prototypes_);
  const Tensor completed = torch::stable::clone(prototypes);
  dispatch("complete_prototypes", prototypes.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    using acc = acc_type<scalar>;
    const Sorted s(prototypes, compact(task_of_class), last);
    const Values<scalar, acc> values(s, data<scalar>(prototypes));
    scalar* to = mutable_data<scalar>(completed);
    // the first tasks meet the most keys: a thread takes them from both ends
    torch::stable::parallel_for(0, s.T, 1, [&](int64_t begin, int64_t end) {
      Scratch<acc> cos(s.C * kQueries), e(s.C * kQueries), block(kQueries * s.D);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t i = n % 2 ? s.T - 1 - n / 2 : n / 2;
        for (int64_t first = s.start[i]; first < s.start[i + 1] && s.start[i + 1] < s.C; first += kQueries) {
          const int64_t q = std::min(kQueries, s.start[i + 1] - first);
          similarities(s, values, i, first, q, cos.data());
          for (const Pair& p : s.pairs) {
            if (p.i != i) continue;
            Softmax<acc> softmax(q, static_cast<acc>(tau));
            std::copy_n(&cos[(s.start[p.j] - s.start[i + 1]) * q], s.keys(p) * q, e.data());
            softmax.add(e.data(), s.keys(p), values.at(p.j, s.start[p.j]), values.ld(), s.D, block.data());
            softmax.finish(s.D, block.data());
            for (int64_t c = 0; c < q; ++c)
              std::copy_n(&block[c * s.D], s.D, to + (s.order[first + c] * s.T + p.j) * s.D);
          }
        }
      }
    });
  });
  return completed;
}

Tensor complete_prototypes_backward(const Tensor& grad_, const Tensor& prototypes_, const Tensor& task_of_class,
                                    double tau_, bool last) {
  check_complete("complete_prototypes_backward", prototypes_, task_of_class, tau_);
  check_shape("complete_prototypes_backward", "grad", grad_,
              {prototypes_.size(0), prototypes_.size(1), prototypes_.size(2)}, prototypes_);
  check_dtype("complete_prototypes_backward", "grad", grad_, prototypes_.scalar_type());
  const Tensor prototypes = compact(prototypes_), grad = compact(grad_);
  const Tensor result = torch::stable::clone(grad);
  dispatch("complete_prototypes_backward", prototypes.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    using acc = acc_type<scalar>;
    const acc tau = static_cast<acc>(tau_);
    const Sorted s(prototypes, compact(task_of_class), last);
    std::vector<acc> values(s.T * s.C * s.D);
    std::vector<Normalised<acc>> subspace;  // all classes, by subspace
    for (int64_t t = 0; t < s.T; ++t) {
      acc* rows = &values[t * s.C * s.D];
      for (int64_t c = s.start[t]; c < s.C; ++c)  // the others were never seen: what stands there may be anything
        std::copy_n(data<scalar>(prototypes) + (s.order[c] * s.T + t) * s.D, s.D, rows + c * s.D);
      subspace.emplace_back(rows, s.C, s.D);
    }
    const auto Q = [&](const Pair& p) { return &subspace[p.i].rows[s.start[p.i] * s.D]; };
    const auto K = [&](const Pair& p) { return &subspace[p.i].rows[s.start[p.j] * s.D]; };
    const auto V = [&](const Pair& p) { return &values[(p.j * s.C + s.start[p.j]) * s.D]; };
    const int64_t P = static_cast<int64_t>(s.pairs.size()), D = s.D;
    const scalar* g = data<scalar>(grad);
    std::vector<std::vector<acc>> dO(P), log_total(P), delta(P);
    std::vector<acc> d_hat(s.T * s.C * D), d_values(s.T * s.C * D);  // sorted by subspace and class, like the values
    torch::stable::parallel_for(0, P, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc> out(kQueries * D);
      for (int64_t n = begin; n < end; ++n) {
        const Pair& p = s.pairs[n];
        const int64_t queries = s.queries(p);
        dO[n].resize(queries * D), log_total[n].resize(queries), delta[n].resize(queries);
        for (int64_t c = 0; c < queries; ++c)
          std::copy_n(g + (s.order[s.start[p.i] + c] * s.T + p.j) * D, D, &dO[n][c * D]);
        for (int64_t i = 0; i < queries; i += kQueries) {
          const int64_t q = std::min(kQueries, queries - i);
          attend(Queries<acc>(Q(p) + i * D, q, D), K(p), V(p), s.keys(p), D, D, tau, out.data(), &log_total[n][i]);
          for (int64_t c = 0; c < q; ++c)
            for (int64_t d = 0; d < D; ++d) delta[n][i + c] += dO[n][(i + c) * D + d] * out[c * D + d];
        }
      }
    });
    // A thread owns a subspace: first as i, for queries and keys, then as j, for values.
    torch::stable::parallel_for(0, s.T, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < P; ++n) {
        const Pair& p = s.pairs[n];
        const int64_t queries = s.queries(p), keys = s.keys(p);
        if (p.i >= begin && p.i < end) {
          acc* dQ = &d_hat[(p.i * s.C + s.start[p.i]) * D];
          acc* dK = &d_hat[(p.i * s.C + s.start[p.j]) * D];
          for (int64_t i = 0; i < queries; i += kQueries) {
            const int64_t q = std::min(kQueries, queries - i);
            query_gradient(Queries<acc>(Q(p) + i * D, q, D), Queries<acc>(&dO[n][i * D], q, D), &log_total[n][i],
                           &delta[n][i], K(p), V(p), keys, D, D, tau, dQ + i * D);
          }
          for (int64_t k = 0; k < keys; k += kKeys)
            key_gradient<acc>(Q(p), dO[n].data(), log_total[n].data(), delta[n].data(), queries, K(p) + k * D,
                              V(p) + k * D, std::min(kKeys, keys - k), D, D, tau, dK + k * D, nullptr);
        }
        if (p.j >= begin && p.j < end) {
          acc* dV = &d_values[(p.j * s.C + s.start[p.j]) * D];
          for (int64_t k = 0; k < keys; k += kKeys)
            key_gradient<acc>(Q(p), dO[n].data(), log_total[n].data(), delta[n].data(), queries, K(p) + k * D,
                              V(p) + k * D, std::min(kKeys, keys - k), D, D, tau, nullptr, dV + k * D);
        }
      }
    });
    // what was overwritten gets no gradient of its own; then the parts are put back in the classes' order
    scalar* to = mutable_data<scalar>(result);
    for (const Pair& p : s.pairs)
      for (int64_t c = s.start[p.i]; c < s.start[p.i + 1]; ++c)
        std::fill_n(to + (s.order[c] * s.T + p.j) * D, D, scalar(0));
    std::vector<acc> row(s.C * D);
    for (int64_t t = 0; t < s.T; ++t) {
      subspace[t].unnormalise(&d_hat[t * s.C * D], 0, s.C, row.data());
      for (int64_t c = 0; c < s.C; ++c) {
        scalar* dst = to + (s.order[c] * s.T + t) * D;
        for (int64_t d = 0; d < D; ++d)
          dst[d] = static_cast<scalar>(static_cast<acc>(dst[d]) + row[c * D + d] + d_values[(t * s.C + c) * D + d]);
      }
    }
  });
  return result;
}

}  // namespace
}  // namespace plora::cpu

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CPU, m) {
  m.impl("complete_prototypes", TORCH_BOX(&plora::cpu::complete_prototypes));
  m.impl("complete_prototypes_backward", TORCH_BOX(&plora::cpu::complete_prototypes_backward));
}
