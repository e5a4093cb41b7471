// The adapters as the products take them: in the accumulation type, without padding ranks, each factor in the orders
// that a kernel reads. The bias of the up projection is one more rank whose h is the constant 1.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/lora_inputs.h"
#include "dispatch.h"
#include "gemm.h"
#include "scratch.h"

namespace plora::cpu {

// One adapter, or several whose ranks are concatenated.
template <typename acc>
struct Adapter {
  int64_t first = 0, R = 0;    // its ranks are rows [first, first + R) of Factors
  const acc* A = nullptr;      // [R, in]
  const acc* AT = nullptr;     // [in, R], rows ld apart
  const acc* B = nullptr;      // [out, R], rows ld apart
  const acc* BT = nullptr;     // [R, out], times s
  const acc* bias = nullptr;   // [R]
  const acc* scale = nullptr;  // [R]
  int64_t ld = 0;
};

enum : int { kA = 1, kAT = 2, kB = 4, kBT = 8 };  // the orders

template <typename acc>
class Factors {
 public:
  Factors() = default;

  struct Row {
    int64_t t, j;  // adapter and rank of this row; j = -1: the row of the up projection's bias
  };
  std::vector<Row> rows;
  std::vector<int64_t> start;  // the rows of adapter t are [start[t], start[t + 1])

  // `used` says which adapters rows select; all where it is empty.
  template <typename scalar>
  static Factors of(const Inputs& p, const std::vector<char>& used, int orders) {
    Factors f(p);
    f.start.push_back(0);
    for (int64_t t = 0; t < p.T; ++t) {
      if (used.empty() || used[t]) {
        for (int64_t j = 0; j < rank_of(p, t); ++j) f.rows.push_back({t, j});
        if (p.bias_B) f.rows.push_back({t, -1});
      }
      f.start.push_back(static_cast<int64_t>(f.rows.size()));
    }
    const int64_t R = f.start.back();
    f.bias_ = Scratch<acc>(R), f.scale_ = Scratch<acc>(R);
    if (orders & kAT) f.AT_ = Scratch<acc>(R * p.in);
    if (orders & kBT) f.BT_ = Scratch<acc>(R * p.out);
    if constexpr (std::is_same_v<scalar, acc>) {  // as they are given, where they can be taken so
      if (!p.ranks && !p.bias_B) {
        f.given_A_ = data<acc>(p.lora_A);
        if (p.T == 1 || !f.joined_) f.given_B_ = data<acc>(p.lora_B);
      }
    }
    if ((orders & kA) && !f.given_A_) f.A_ = Scratch<acc>(R * p.in);
    if ((orders & kB) && !f.given_B_) f.B_ = Scratch<acc>(R * p.out);
    torch::stable::parallel_for(0, p.T, 1, [&](int64_t begin, int64_t end) {
      Scratch<acc> wide(p.r * std::max(p.in, p.out));
      for (int64_t t = begin; t < end; ++t)
        if (f.start[t] < f.start[t + 1]) f.template pack<scalar>(p, t, wide.data());
    });
    return f;
  }

  int64_t rank() const { return start.back(); }

  Adapter<acc> one(int64_t t) const { return make(start[t], start[t + 1], t); }

  Adapter<acc> all() const { return make(0, rank(), 0); }

 private:
  explicit Factors(const Inputs& p) : joined_(p.family != Family::indexed), r_(p.r), in_(p.in), out_(p.out) {}

  bool joined_ = true;  // the factors of all adapters are concatenated
  int64_t r_ = 0, in_ = 0, out_ = 0;
  Scratch<acc> A_, AT_, B_, BT_, bias_, scale_;
  const acc *given_A_ = nullptr, *given_B_ = nullptr;

  static int64_t rank_of(const Inputs& p, int64_t t) {
    if (!p.ranks) return p.r;
    const int64_t rank = data<int64_t>(*p.ranks)[t];
    PLORA_CHECK(rank >= 0 && rank <= p.r, p.op, ": ranks[", t, "] must be between 0 and ", p.r, ", got ", rank);
    return rank;
  }

  int64_t column(int64_t row, int64_t height) const { return joined_ ? row : row * height; }

  Adapter<acc> make(int64_t begin, int64_t end, int64_t t) const {
    const auto at = [](const Scratch<acc>& s, int64_t offset) { return s.data() ? s.data() + offset : nullptr; };
    Adapter<acc> a;
    a.first = begin, a.R = end - begin, a.ld = joined_ ? rank() : a.R;
    a.A = given_A_ ? given_A_ + t * r_ * in_ : at(A_, begin * in_);
    a.B = given_B_ ? given_B_ + t * out_ * r_ : at(B_, column(begin, out_));
    a.AT = at(AT_, column(begin, in_)), a.BT = at(BT_, begin * out_);
    a.bias = at(bias_, begin), a.scale = at(scale_, begin);
    return a;
  }

  // `wide` has room for one factor in the accumulation type.
  template <typename scalar>
  void pack(const Inputs& p, int64_t t, acc* wide) {
    const int64_t first = start[t], R = start[t + 1] - first, ranks = R - (p.bias_B ? 1 : 0);
    const int64_t ld = joined_ ? rank() : R;
    const acc scale = data<acc>(p.scaling)[t];
    std::fill_n(scale_.data() + first, R, scale);
    std::fill_n(bias_.data() + first, R, acc(0));
    if (p.bias_A) convert(data<scalar>(*p.bias_A) + t * p.r, ranks, bias_.data() + first);
    if (p.bias_B) bias_[first + ranks] = 1;

    const auto widened = [&](const scalar* from, int64_t n) -> const acc* {
      if constexpr (std::is_same_v<scalar, acc>) {
        return from;
      } else {
        convert(from, n, wide);
        return wide;
      }
    };
    const bool biased = p.bias_B.has_value();  // though there may be no outputs, and no data
    const scalar* b = biased ? data<scalar>(*p.bias_B) + t * p.out : nullptr;
    if (A_.data() || AT_.data()) {
      const acc* A = widened(data<scalar>(p.lora_A) + t * p.r * p.in, ranks * p.in);
      if (A_.data()) {
        acc* to = A_.data() + first * p.in;
        std::copy_n(A, ranks * p.in, to);
        if (biased) std::fill_n(to + ranks * p.in, p.in, acc(0));
      }
      if (AT_.data()) {
        acc* to = AT_.data() + column(first, p.in);
        gemm<acc>().transpose(ranks, p.in, A, p.in, to, ld);
        for (int64_t k = 0; biased && k < p.in; ++k) to[k * ld + ranks] = 0;
      }
    }
    if (!B_.data() && !BT_.data()) return;
    const acc* B = widened(data<scalar>(p.lora_B) + t * p.out * p.r, p.out * p.r);
    if (B_.data()) {
      acc* to = B_.data() + column(first, p.out);
      for (int64_t o = 0; o < p.out; ++o) {
        std::copy_n(B + o * p.r, ranks, to + o * ld);
        if (b) to[o * ld + ranks] = static_cast<acc>(b[o]);
      }
    }
    if (BT_.data()) {
      acc* to = BT_.data() + first * p.out;
      gemm<acc>().transpose(p.out, ranks, B, p.r, to, p.out);
      if (b) convert(b, p.out, to + ranks * p.out);
      if (scale != 1)
        for (int64_t i = 0; i < R * p.out; ++i) to[i] *= scale;
    }
  }
};

}  // namespace plora::cpu
