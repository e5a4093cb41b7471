// The arguments of the low-rank operators, checked and contiguous, on every device.
#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "checks.h"
#include "lora_plan.h"

namespace plora {

// The bits of `needs`: which gradients the backward operators are asked for.
constexpr int64_t kNeedX = 1, kNeedA = 2, kNeedB = 4, kNeedScaling = 8, kNeedBiasA = 16, kNeedBiasB = 32;

inline Tensor multiply(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  check_call(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION), "aten::mul");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Inputs {
  const char* op;
  Family family;
  Tensor x, lora_A, lora_B, scaling;
  OptTensor ids, weight, bias, bias_A, bias_B, ranks, times;  // times: what the scales are multiplied with
  bool relu;
  ScalarType dtype;  // of x
  int64_t M, T, r, in, out;

  // one: T = 1, and lora_A is [r, in], lora_B [out, r].
  Inputs(const char* op, Family family, const Tensor& x_, const OptTensor& ids_, const Tensor& A, const Tensor& B,
         const Tensor& scaling_, const OptTensor& weight_, const OptTensor& bias_, const OptTensor& bias_A_,
         const OptTensor& bias_B_, const OptTensor& ranks_, bool relu, bool one = false)
      : op(op), family(family), relu(relu) {
    PLORA_CHECK(x_.dim() == 2, op, ": x must be [M, in], got ", shape_of(x_));
    const int64_t d = one ? 0 : 1;
    PLORA_CHECK(A.dim() == d + 2, op, ": lora_A must be ", one ? "[r, in]" : "[T, r, in]", ", got ", shape_of(A));
    PLORA_CHECK(B.dim() == d + 2, op, ": lora_B must be ", one ? "[out, r]" : "[T, out, r]", ", got ", shape_of(B));
    M = x_.size(0), in = x_.size(1), T = one ? 1 : A.size(0), r = A.size(d), out = B.size(d);
    dtype = x_.scalar_type();
    if (one) {
      check_shape(op, "lora_A", A, {r, in}, x_);
      check_shape(op, "lora_B", B, {out, r}, x_);
    } else {
      check_shape(op, "lora_A", A, {T, r, in}, x_);
      check_shape(op, "lora_B", B, {T, out, r}, x_);
    }
    check_shape(op, "scaling", scaling_, {T}, x_);
    check_dtype(op, "lora_A", A, dtype);
    check_dtype(op, "lora_B", B, dtype);
    check_dtype(op, "scaling", scaling_, wide(dtype));
    const auto optional = [&](const char* name, const OptTensor& t, std::initializer_list<int64_t> sizes,
                              ScalarType type) {
      if (!t) return;
      check_shape(op, name, *t, sizes, x_);
      check_dtype(op, name, *t, type);
    };
    optional("weight", weight_, {out, in}, dtype);
    optional("bias", bias_, {out}, dtype);
    optional("bias_A", bias_A_, {T, r}, dtype);
    optional("bias_B", bias_B_, {T, out}, dtype);
    optional("ranks", ranks_, {T}, ScalarType::Long);
    optional("ids", ids_, {-1}, ScalarType::Long);
    if (ids_)
      PLORA_CHECK(ids_->size(0) == 0 ? M == 0 : M % ids_->size(0) == 0, op,
                  ": the rows of x must be a multiple of the ids, got ", M, " rows and ", ids_->size(0), " ids");
    x = compact(x_), lora_A = compact(A), lora_B = compact(B), scaling = compact(scaling_);
    ids = compact(ids_), weight = compact(weight_), bias = compact(bias_), bias_A = compact(bias_A_);
    bias_B = compact(bias_B_), ranks = compact(ranks_);
  }

  Inputs weighted(const Tensor& by) const {
    check_shape(op, "times", by, {T}, x);
    check_dtype(op, "times", by, wide(dtype));
    Inputs p = *this;
    p.times = compact(by);
    return p;
  }

  // The same with the product as scaling.
  Inputs folded() const {
    Inputs p = *this;
    p.scaling = multiply(scaling, *times);
    p.times.reset();
    return p;
  }

  // A tensor of the shape of the output: y of the in-place forms, grad, base.
  void check_output(const char* name, const Tensor& t, bool per_adapter) const {
    if (per_adapter)
      check_shape(op, name, t, {T, M, out}, x);
    else
      check_shape(op, name, t, {M, out}, x);
    check_dtype(op, name, t, dtype);
  }
};

// Of the arguments with these names; not there where `needs` does not ask.
struct Gradients {
  OptTensor x, lora_A, lora_B, scaling, bias_A, bias_B;
};

// `backward(p)` where the scales are products, by one that does not know of it.
template <typename F>
Gradients through_product(const Inputs& p, const F& backward) {
  Gradients g = backward(p.folded());
  if (g.scaling) g.scaling = multiply(*g.scaling, *p.times);
  return g;
}

// x weight^T + bias, by torch.
inline Tensor linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  check_call(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION), "aten::linear");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The sum over the first dimension.
inline Tensor sum_slabs(const Tensor& t) {
  std::vector<int64_t> slabs{0};
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(slabs), false);
}

// Autograd is above these operators: what they call of torch's own records nothing.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// The fourteen operators of a device, as csrc/schema.cpp declares them. Device says how they are computed:
//   forward(Inputs, base, slices, keep) -> (y, kept)     in_place(Inputs, y)     all_out(Inputs, base, y)
//   backward(Inputs, grad, kept, trainable, needs) -> Gradients
template <typename Device>
struct LoraOperators {
  using Pair = std::tuple<Tensor, Tensor>;
  using Three = std::tuple<Tensor, Tensor, Tensor>;
  using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Pair indexed(const Tensor& x, const Tensor& ids, const Tensor& A, const Tensor& B, const Tensor& scaling,
                      const OptTensor& base, const OptTensor& weight, const OptTensor& bias, const OptTensor& bias_A,
                      const OptTensor& bias_B, const OptTensor& ranks, bool relu, const OptInts&, const OptInts& slices,
                      bool keep) {
    return forward({"lora_indexed", Family::indexed, x, ids, A, B, scaling, weight, bias, bias_A, bias_B, ranks, relu},
                   base, slices, keep);
  }

  static Pair sum(const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scaling, const OptTensor& base,
                  const OptTensor& weight, const OptTensor& bias, const OptTensor& bias_A, const OptTensor& bias_B,
                  const OptTensor& ranks, bool relu, const OptInts&, const OptInts& slices, bool keep) {
    return forward({"lora_sum", Family::sum, x, {}, A, B, scaling, weight, bias, bias_A, bias_B, ranks, relu}, base,
                   slices, keep);
  }

  static Pair weighted(const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scaling, const OptTensor& base,
                       const OptTensor& weight, const OptTensor& bias, const OptTensor& bias_A, const OptTensor& bias_B,
                       const OptTensor& ranks, bool relu, const OptInts&, const OptInts& slices, bool keep,
                       const Tensor& times) {
    const Inputs p{"lora_sum", Family::sum, x, {}, A, B, scaling, weight, bias, bias_A, bias_B, ranks, relu};
    return forward(p.weighted(times), base, slices, keep);
  }

  static Pair one(const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scaling, const Tensor& weight,
                  const OptTensor& bias, bool keep) {
    const Inputs p = inputs_of_one("lora_sum", x, A, B, scaling, weight, bias);
    const Pair made = forward(p, {}, {}, keep);
    if (x.dim() == 2) return made;
    const auto lead = x.sizes();
    std::vector<int64_t> sizes(lead.begin(), lead.end());
    sizes.back() = p.out;
    return {with_sizes(std::get<0>(made), sizes), std::get<1>(made)};
  }

  static Pair all(const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scaling, const OptTensor& base,
                  const OptTensor& weight, const OptTensor& bias, const OptTensor& bias_A, const OptTensor& bias_B,
                  const OptTensor& ranks, bool relu, const OptInts&, const OptInts& slices, bool keep) {
    return forward({"lora_all", Family::all, x, {}, A, B, scaling, weight, bias, bias_A, bias_B, ranks, relu}, base,
                   slices, keep);
  }

  static void indexed_(const Tensor& y, const Tensor& x, const Tensor& ids, const Tensor& A, const Tensor& B,
                       const Tensor& scaling, const OptTensor& bias_A, const OptTensor& bias_B, const OptTensor& ranks,
                       bool relu) {
    in_place({"lora_indexed_", Family::indexed, x, ids, A, B, scaling, {}, {}, bias_A, bias_B, ranks, relu}, y);
  }

  static void sum_(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scaling,
                   const OptTensor& bias_A, const OptTensor& bias_B, const OptTensor& ranks, bool relu) {
    in_place({"lora_sum_", Family::sum, x, {}, A, B, scaling, {}, {}, bias_A, bias_B, ranks, relu}, y);
  }

  static void all_(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scaling,
                   const OptTensor& bias_A, const OptTensor& bias_B, const OptTensor& ranks, bool relu) {
    in_place({"lora_all_", Family::all, x, {}, A, B, scaling, {}, {}, bias_A, bias_B, ranks, relu}, y);
  }

  static void all_out(const Tensor& out, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scaling,
                      const OptTensor& base, const OptTensor& weight, const OptTensor& bias, const OptTensor& bias_A,
                      const OptTensor& bias_B, const OptTensor& ranks, bool relu) {
    const Inputs p{"lora_all_out", Family::all, x, {}, A, B, scaling, weight, bias, bias_A, bias_B, ranks, relu};
    p.check_output("out", out, true);
    if (base) p.check_output("base", *base, false);
    PLORA_CHECK(out.is_contiguous(), p.op, ": out must be contiguous");
    const NoGrad guard;
    const OptTensor y0 = compact(base);
    Device::all_out(apart(p, out), y0 && overlap(out, *y0) ? torch::stable::clone(*y0) : y0, out);
  }

  static Six indexed_backward(const Tensor& grad, const Tensor& x, const Tensor& ids, const Tensor& A, const Tensor& B,
                              const Tensor& scaling, const OptTensor& weight, const OptTensor& bias_A,
                              const OptTensor& bias_B, const OptTensor& ranks, const OptTensor& kept, bool relu,
                              const OptInts& trainable, int64_t needs) {
    return backward(
        {"lora_indexed_backward", Family::indexed, x, ids, A, B, scaling, weight, {}, bias_A, bias_B, ranks, relu},
        grad, kept, trainable, needs);
  }

  static Six sum_backward(const Tensor& grad, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scaling,
                          const OptTensor& weight, const OptTensor& bias_A, const OptTensor& bias_B,
                          const OptTensor& ranks, const OptTensor& kept, bool relu, const OptInts& trainable,
                          int64_t needs) {
    return backward({"lora_sum_backward", Family::sum, x, {}, A, B, scaling, weight, {}, bias_A, bias_B, ranks, relu},
                    grad, kept, trainable, needs);
  }

  static Six weighted_backward(const Tensor& grad, const Tensor& x, const Tensor& A, const Tensor& B,
                               const Tensor& scaling, const OptTensor& weight, const OptTensor& bias_A,
                               const OptTensor& bias_B, const OptTensor& ranks, const OptTensor& kept, bool relu,
                               const OptInts& trainable, int64_t needs, const Tensor& times) {
    const Inputs p{"lora_sum_backward", Family::sum, x, {}, A, B, scaling, weight, {}, bias_A, bias_B, ranks, relu};
    return backward(p.weighted(times), grad, kept, trainable, needs);
  }

  static Three one_backward(const Tensor& grad, const Tensor& x, const Tensor& A, const Tensor& B,
                            const Tensor& scaling, const Tensor& weight, const OptTensor& kept, int64_t needs) {
    const Inputs p = inputs_of_one("lora_sum_backward", x, A, B, scaling, weight, {});
    const Gradients g = gradients(p, rows_of("grad", grad), kept, {}, needs & (kNeedX | kNeedA | kNeedB));
    const auto made = [&](const OptTensor& t) { return t ? *t : none_like(x); };
    return {g.x && x.dim() != 2 ? with_sizes(*g.x, x.sizes()) : made(g.x), made(g.lora_A), made(g.lora_B)};
  }

  static Six all_backward(const Tensor& grad, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scaling,
                          const OptTensor& weight, const OptTensor& bias_A, const OptTensor& bias_B,
                          const OptTensor& ranks, const OptTensor& kept, bool relu, const OptInts& trainable,
                          int64_t needs) {
    return backward({"lora_all_backward", Family::all, x, {}, A, B, scaling, weight, {}, bias_A, bias_B, ranks, relu},
                    grad, kept, trainable, needs);
  }

  template <typename Library>
  static void add_to(Library& m) {
    m.impl("lora_indexed", TORCH_BOX(&LoraOperators::indexed));
    m.impl("lora_sum", TORCH_BOX(&LoraOperators::sum));
    m.impl("lora_all", TORCH_BOX(&LoraOperators::all));
    m.impl("lora_weighted", TORCH_BOX(&LoraOperators::weighted));
    m.impl("lora_one", TORCH_BOX(&LoraOperators::one));
    m.impl("lora_indexed_", TORCH_BOX(&LoraOperators::indexed_));
    m.impl("lora_sum_", TORCH_BOX(&LoraOperators::sum_));
    m.impl("lora_all_", TORCH_BOX(&LoraOperators::all_));
    m.impl("lora_all_out", TORCH_BOX(&LoraOperators::all_out));
    m.impl("lora_indexed_backward", TORCH_BOX(&LoraOperators::indexed_backward));
    m.impl("lora_sum_backward", TORCH_BOX(&LoraOperators::sum_backward));
    m.impl("lora_all_backward", TORCH_BOX(&LoraOperators::all_backward));
    m.impl("lora_weighted_backward", TORCH_BOX(&LoraOperators::weighted_backward));
    m.impl("lora_one_backward", TORCH_BOX(&LoraOperators::one_backward));
  }

 private:
  // [..., n] as rows [M, n].
  static Tensor rows_of(const char* name, const Tensor& t) {
    const int64_t last = t.dim() - 1;
    if (last == 1) return t;
    PLORA_CHECK(last >= 0, "lora_sum: ", name, " must be [..., n], got []");
    int64_t M = 1;
    for (int64_t d = 0; d < last; ++d) M *= t.size(d);
    return with_sizes(compact(t), {M, t.size(last)});
  }

  static Inputs inputs_of_one(const char* op, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scaling,
                              const Tensor& weight, const OptTensor& bias) {
    return {op, Family::sum, rows_of("x", x), {}, A, B, scaling, weight, bias, {}, {}, {}, false, true};
  }

  static Pair forward(const Inputs& p, const OptTensor& base, const OptInts& slices, bool keep) {
    if (base) p.check_output("base", *base, false);
    if (slices) check_slices(p, *slices);
    const NoGrad guard;
    return Device::forward(p, compact(base), slices, keep);
  }

  static void in_place(const Inputs& p, const Tensor& y) {
    p.check_output("y", y, p.family == Family::all);
    PLORA_CHECK(y.stride(y.dim() - 1) == 1 || p.out <= 1, p.op, ": the last dimension of y must be contiguous");
    for (int64_t d = 0; d + 1 < y.dim(); ++d)
      PLORA_CHECK(y.size(d) <= 1 || y.stride(d) >= p.out, p.op, ": the rows of y must not overlap");
    const NoGrad guard;
    Device::in_place(apart(p, y), y);
  }

  // With copies of what shares memory with y, which is written while others are read.
  static Inputs apart(Inputs p, const Tensor& y) {
    for (Tensor* t : {&p.x, &p.lora_A, &p.lora_B})
      if (overlap(y, *t)) *t = torch::stable::clone(*t);
    for (OptTensor* t : {&p.weight, &p.bias, &p.bias_A, &p.bias_B})
      if (*t && overlap(y, **t)) *t = torch::stable::clone(**t);
    return p;
  }

  static bool overlap(const Tensor& a, const Tensor& b) {
    const auto range = [](const Tensor& t) {
      int64_t last = t.numel() > 0 ? 1 : 0;
      for (int64_t d = 0; d < t.dim(); ++d) last += last ? (t.size(d) - 1) * t.stride(d) : 0;
      const auto* const first = static_cast<const char*>(t.const_data_ptr());
      return std::pair{first, first + last * static_cast<int64_t>(t.element_size())};
    };
    const auto mine = range(a), other = range(b);
    return other.first < mine.second && mine.first < other.second;
  }

  static Gradients gradients(const Inputs& p, const Tensor& grad, const OptTensor& kept, const OptInts& trainable,
                             int64_t needs) {
    p.check_output("grad", grad, p.family == Family::all);
    if (trainable)
      for (int64_t t : *trainable)
        PLORA_CHECK(t >= 0 && t < p.T, p.op, ": trainable must be between 0 and ", p.T - 1, ", got ", t);
    if (!p.bias_A) needs &= ~kNeedBiasA;
    if (!p.bias_B) needs &= ~kNeedBiasB;
    const NoGrad guard;
    return Device::backward(p, compact(grad), kept, trainable, needs);
  }

  static Six backward(const Inputs& p, const Tensor& grad, const OptTensor& kept, const OptInts& trainable,
                      int64_t needs) {
    const Gradients g = gradients(p, grad, kept, trainable, needs);
    const auto made = [](const OptTensor& t, const Tensor& like) { return t ? *t : none_like(like); };
    return {made(g.x, p.x),      made(g.lora_A, p.x), made(g.lora_B, p.x), made(g.scaling, p.scaling),
            made(g.bias_A, p.x), made(g.bias_B, p.x)};
  }

  static void check_slices(const Inputs& p, const std::vector<int64_t>& slices) {
    const auto blocks = static_cast<int64_t>(slices.size() / 2);
    PLORA_CHECK(slices.size() % 2 == 0 && (blocks == 0 || p.r % blocks == 0), p.op,
                ": slices must be pairs of start and stop, as many as divide the rank ", p.r, ", got ", slices.size(),
                " numbers");
    for (int64_t i = 0; i < blocks; ++i)
      PLORA_CHECK(0 <= slices[2 * i] && slices[2 * i] <= slices[2 * i + 1] && slices[2 * i + 1] <= p.out, p.op,
                  ": slices must lie between 0 and ", p.out, ", got ", slices[2 * i], " to ", slices[2 * i + 1]);
  }
};

}  // namespace plora
