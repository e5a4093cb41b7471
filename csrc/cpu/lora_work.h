// What the low-rank kernels work on: the adapters as the products take them, and the rows cut into chunks that share
// their adapters.
//   indexed: the rows of one id, gathered        -> one adapter, one output row per row of x
//   sum:     consecutive rows, all T adapters concatenated to one of rank T * r
//   all:     consecutive rows, concatenated too  -> T adapters, T output rows per row of x
// The bias of the up projection is one more rank whose h is the constant 1.
#pragma once

#include <algorithm>

#include "../common/lora_inputs.h"
#include "dispatch.h"
#include "gemm.h"
#include "scratch.h"

namespace plora::cpu {

// The number of ranks of adapter t that are not padding.
inline int64_t rank_of(const Inputs& p, int64_t t) {
  if (!p.ranks) return p.r;
  const int64_t rank = data<int64_t>(*p.ranks)[t];
  STD_TORCH_CHECK(rank >= 0 && rank <= p.r, p.op, ": ranks[", t, "] must be between 0 and ", p.r, ", got ", rank);
  return rank;
}

template <typename From, typename To>
void convert(const From* from, int64_t n, To* to) {
  std::copy_n(from, n, to);
}

// Consecutive ranks of the adapters, each factor in both orders.
template <typename acc>
struct Adapter {
  int64_t first = 0, R = 0;        // rows [first, first + R) of Factors
  const acc* A = nullptr;          // [R, in]
  const acc* AT = nullptr;         // [in, R], rows ld apart
  const acc* B = nullptr;          // [out, R], rows ld apart
  const acc* scaled_BT = nullptr;  // [R, out], times s
  int64_t ld = 0;
  const acc* bias = nullptr;   // [R]
  const acc* scale = nullptr;  // [R]

  // Its ranks [begin, end).
  Adapter part(const Inputs& p, int64_t begin, int64_t end) const {
    const auto at = [](const acc* data, int64_t offset) { return data ? data + offset : nullptr; };
    return {first + begin,
            end - begin,
            at(A, begin * p.in),
            at(AT, begin),
            at(B, begin),
            at(scaled_BT, begin * p.out),
            ld,
            at(bias, begin),
            at(scale, begin)};
  }
};

// Which orders a kernel reads.
enum : int { kA = 1, kAT = 2, kB = 4, kScaledBT = 8 };

template <typename acc>
struct Factors {
  struct Row {
    int64_t t, j;  // adapter and rank of this row; j = -1: the row of the up projection's bias
  };
  std::vector<Row> rows;
  std::vector<int64_t> start;          // the rows of adapter t are [start[t], start[t + 1])
  std::vector<Adapter<acc>> adapters;  // one, or for the family `indexed` one for each t

  template <typename scalar>
  Factors(const Inputs& p, scalar, const std::vector<char>& used, int orders) : start(1, 0) {
    for (int64_t t = 0; t < p.T; ++t) {
      if (used.empty() || used[t]) {
        for (int64_t j = 0; j < rank_of(p, t); ++j) rows.push_back({t, j});
        if (p.bias_B) rows.push_back({t, -1});
      }
      start.push_back(static_cast<int64_t>(rows.size()));
    }
    const int64_t R = start.back();
    const bool joined = p.family != Family::indexed;
    const bool as_given = std::is_same_v<scalar, acc> && !p.ranks && !p.bias_B;
    const bool own_A = (orders & kA) && !as_given, own_B = (orders & kB) && !(as_given && (!joined || p.T == 1));
    if (own_A) A_ = Scratch<acc>(R * p.in);
    if (own_B) B_ = Scratch<acc>(R * p.out);
    if (orders & kAT) AT_ = Scratch<acc>(R * p.in);
    if (orders & kScaledBT) BT_ = Scratch<acc>(R * p.out);
    bias_ = Scratch<acc>(R), scale_ = Scratch<acc>(R);

    for (int64_t a = 0; a < (joined ? 1 : p.T); ++a) {
      Adapter<acc> adapter;
      adapter.first = joined ? 0 : start[a];
      adapter.R = adapter.ld = (joined ? R : start[a + 1]) - adapter.first;
      if (orders & kA) adapter.A = own_A ? A_.data() + adapter.first * p.in : as<acc>(p.lora_A) + a * p.r * p.in;
      if (orders & kAT) adapter.AT = AT_.data() + adapter.first * p.in;
      if (orders & kB) adapter.B = own_B ? B_.data() + adapter.first * p.out : as<acc>(p.lora_B) + a * p.out * p.r;
      if (orders & kScaledBT) adapter.scaled_BT = BT_.data() + adapter.first * p.out;
      adapter.bias = bias_.data() + adapter.first, adapter.scale = scale_.data() + adapter.first;
      adapters.push_back(adapter);
    }
    torch::stable::parallel_for(0, p.T, 1, [&](int64_t begin, int64_t end) {
      Scratch<acc> wide(p.r * std::max(p.in, p.out));
      for (int64_t t = begin; t < end; ++t)
        if (start[t] < start[t + 1]) pack<scalar>(p, t, own_A, own_B, orders, wide.data());
    });
  }

  int64_t rank() const { return start.empty() ? 0 : start.back(); }

  // Adapter t alone.
  Adapter<acc> of(const Inputs& p, int64_t t) const {
    if (p.family == Family::indexed) return adapters[t];
    return adapters[0].part(p, start[t], start[t + 1]);
  }

 private:
  Scratch<acc> A_, AT_, B_, BT_, bias_, scale_;

  template <typename T>
  static const T* as(const Tensor& t) {
    return data<T>(t);
  }

  // `wide` holds one factor in the accumulation type.
  template <typename scalar>
  void pack(const Inputs& p, int64_t t, bool own_A, bool own_B, int orders, acc* wide) {
    const Adapter<acc> to = of(p, t);
    const int64_t ranks = to.R - (p.bias_B ? 1 : 0);
    acc* const bias = bias_.data() + start[t];
    acc* const scale = scale_.data() + start[t];
    std::fill_n(bias, to.R, acc(0));
    if (p.bias_A) convert(data<scalar>(*p.bias_A) + t * p.r, ranks, bias);
    if (p.bias_B) bias[ranks] = 1;
    std::fill_n(scale, to.R, data<acc>(p.scaling)[t]);

    const auto widened = [&](const scalar* from, int64_t n) -> const acc* {
      if constexpr (std::is_same_v<scalar, acc>) return from;
      convert(from, n, wide);
      return wide;
    };
    if ((orders & kAT) || own_A) {
      const acc* A = widened(data<scalar>(p.lora_A) + t * p.r * p.in, ranks * p.in);
      if (own_A) {
        acc* rows = const_cast<acc*>(to.A);
        std::copy_n(A, ranks * p.in, rows);
        if (p.bias_B) std::fill_n(rows + ranks * p.in, p.in, acc(0));
      }
      if (orders & kAT) {
        acc* columns = const_cast<acc*>(to.AT);
        gemm<acc>().transpose(ranks, p.in, A, p.in, columns, to.ld);
        if (p.bias_B)
          for (int64_t k = 0; k < p.in; ++k) columns[k * to.ld + ranks] = 0;
      }
    }
    if (!(orders & kScaledBT) && !own_B) return;
    const acc* B = widened(data<scalar>(p.lora_B) + t * p.out * p.r, p.out * p.r);
    const scalar* bias_B = p.bias_B ? data<scalar>(*p.bias_B) + t * p.out : nullptr;
    if (own_B) {
      acc* rows = const_cast<acc*>(to.B);
      for (int64_t o = 0; o < p.out; ++o) {
        std::copy_n(B + o * p.r, ranks, rows + o * to.ld);
        if (bias_B) rows[o * to.ld + ranks] = static_cast<acc>(bias_B[o]);
      }
    }
    if (orders & kScaledBT) {
      acc* columns = const_cast<acc*>(to.scaled_BT);
      gemm<acc>().transpose(p.out, ranks, B, p.r, columns, p.out);
      if (bias_B) convert(bias_B, p.out, columns + ranks * p.out);
      for (int64_t i = 0; i < to.R * p.out; ++i) columns[i] *= scale[0];
    }
  }
};

// Rows order[begin, end) of x meet one adapter of Factors, all of them (sum, all), or none (-1).
struct Chunk {
  int64_t begin, end, adapter;
};

// The rows by adapter; without ids, as they come.
struct Order {
  std::vector<int64_t> rows;   // empty: as they come
  std::vector<int64_t> start;  // of id t at [t + 1, t + 2), of rows without an adapter at [0, 1)
  std::vector<char> used;      // by adapter; empty without ids

  explicit Order(const Inputs& p) {
    if (p.family != Family::indexed) return;
    const int64_t G = p.ids->size(0), rows_per_id = G ? p.M / G : 0;
    const int64_t* ids = data<int64_t>(*p.ids);
    start.assign(p.T + 2, 0), used.assign(p.T, 0);
    for (int64_t g = 0; g < G; ++g) {
      STD_TORCH_CHECK(ids[g] >= -1 && ids[g] < p.T, p.op, ": ids must be between -1 and ", p.T - 1, ", got ", ids[g],
                      " at position ", g);
      start[ids[g] + 2 > p.T + 1 ? p.T + 1 : ids[g] + 2] += 0;
    }
  }
};

}  // namespace plora::cpu
