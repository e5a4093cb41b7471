// The low-rank families on CUDA: which kernels make the outputs and the gradients, as common/lora_plan.h plans it.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>

#include "../common/cuda_path.h"
#include "../common/lora_inputs.h"
#include "../common/lora_plan.h"
#include "device.cuh"
#include "launch.cuh"
#include "lora_kernels.h"

namespace plora::cuda {
namespace {

using Sizes = std::vector<int64_t>;

const void* pointer(const Tensor& t) { return t.const_data_ptr(); }

const void* pointer(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }

void* out_pointer(const OptTensor& t) { return t && t->defined() && t->numel() > 0 ? t->mutable_data_ptr() : nullptr; }

// [first, first + count) of dimension d.
Tensor part(Tensor t, int64_t d, int64_t first, int64_t count) { return torch::stable::narrow(t, d, first, count); }

Tensor plus(const Tensor& a, const OptTensor& b) { return b ? torch::stable::subtract(a, *b, -1.0) : a; }

// --- the factors as the kernels take them ----------------------------------------------------------------------------

// A copy of a factor [T, rows, columns] with the rank padded, zero where an adapter has fewer ranks, times s if asked.
Tensor packed(const Inputs& p, const Tensor& from, int64_t rows, int64_t columns, bool rank_is_rows, bool transpose,
              bool scaled = false) {
  const int64_t rank = padded_rank(p.r), tall = rank_is_rows ? rank : rows, wide = rank_is_rows ? columns : rank;
  const Tensor to = allocate(from, transpose ? Sizes{p.T, wide, tall} : Sizes{p.T, tall, wide});
  if (to.numel() == 0) return to;
  pack(from.scalar_type(), pointer(from), to.mutable_data_ptr(), p.T, rows, columns, rank_is_rows, rank, transpose,
       p.ranks ? data<int64_t>(*p.ranks) : nullptr, scaled ? data<float>(p.scaling) : nullptr, stream_of(from));
  return to;
}

struct Factors {
  Tensor A, B;
  OptTensor bias_A;
};

// The factors themselves where they need no padding.
bool padded(const Inputs& p) { return p.ranks || p.r != padded_rank(p.r); }

Tensor A_of(const Inputs& p) { return padded(p) ? packed(p, p.lora_A, p.r, p.in, true, false) : p.lora_A; }

Tensor B_of(const Inputs& p) { return padded(p) ? packed(p, p.lora_B, p.out, p.r, false, false) : p.lora_B; }

Factors factors_of(const Inputs& p) {
  return {A_of(p), B_of(p), padded(p) && p.bias_A ? OptTensor(packed(p, *p.bias_A, p.r, 1, true, false)) : p.bias_A};
}

Tensor A_transposed(const Inputs& p) { return packed(p, p.lora_A, p.r, p.in, true, true); }  // [T, in, rank]

Tensor B_transposed(const Inputs& p, bool scaled = false) {  // [T, rank, out]
  return packed(p, p.lora_B, p.out, p.r, false, true, scaled);
}

Tensor scaled_A(const Inputs& p) { return packed(p, p.lora_A, p.r, p.in, true, false, true); }  // [T, rank, in]

Tensor scaled_B(const Inputs& p) { return packed(p, p.lora_B, p.out, p.r, false, false, true); }  // [T, out, rank]

Rows rows_of(const Inputs& p, int64_t rank) {
  Rows rows{p.M, p.T, rank};
  if (p.family == Family::indexed) rows.ids = data<int64_t>(*p.ids), rows.rows_per_id = p.M / p.ids->size(0);
  return rows;
}

// W + sum s B A. Of many ranks torch's own product is faster than lora_merge; like torch's own form it rounds s B, and
// the sum before W joins it, which lora_merge does not.
Tensor merge(const Inputs& p) {
  if (p.x.scalar_type() != ScalarType::Float && p.T * p.r > 256) {
    const int64_t ranks = p.T * padded_rank(p.r);
    const Tensor A = torch::stable::view(A_of(p), {ranks, p.in});
    const Tensor up = torch::stable::transpose(torch::stable::view(B_transposed(p, true), {ranks, p.out}), 0, 1);
    return plus(*p.weight, torch::stable::matmul(up, A));
  }
  std::array<StableIValue, 5> stack{torch::stable::detail::from(*p.weight), torch::stable::detail::from(p.lora_A),
                                    torch::stable::detail::from(p.lora_B), torch::stable::detail::from(p.scaling),
                                    torch::stable::detail::from(p.ranks)};
  check_call(torch_call_dispatcher("plora_ext::lora_merge", "", stack.data(), TORCH_ABI_VERSION), "lora_merge");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Whether so many ranks act on a row that low_rank needs memory for h between its halves.
bool crowded(const Inputs& p) { return padded_rank(p.r) * (p.family == Family::indexed ? 1 : p.T) > 512; }

// For h and g.
Tensor new_ranks(const Inputs& p) {
  return allocate(p.x, {p.M, padded_rank(p.r) * (p.family == Family::indexed ? 1 : p.T)});
}

LowRank low_rank_of(const Inputs& p) {
  LowRank l{};
  l.dtype = p.x.scalar_type();
  l.rows = rows_of(p, padded_rank(p.r));
  l.scaling = data<float>(p.scaling);
  l.hopper = !mma_only();
  return l;
}

// h = act(x A^T + a), into `h` where that is given.
LowRank down_of(const Inputs& p, const Factors& f, const OptTensor& h) {
  LowRank l = low_rank_of(p);
  l.K = p.in;
  l.x = p.in ? pointer(p.x) : pointer(p.scaling);  // no columns: any address, nothing is read
  l.ldx = p.in;
  l.down = pointer(f.A), l.bias_down = pointer(f.bias_A);
  l.relu = p.relu;
  l.h = out_pointer(h);
  return l;
}

// x A^T for all adapters side by side.
Tensor x_times(const Inputs& p, const Tensor& A) {
  return torch::stable::matmul(p.x,
                               torch::stable::transpose(torch::stable::view(A, {A.size(0) * A.size(1), p.in}), 0, 1));
}

// --- plans -----------------------------------------------------------------------------------------------------------

bool dense(const Inputs& p) {
  return lora_dense(p.family, p.T, p.r, p.weight.has_value(), p.relu, p.bias_A || p.bias_B);
}

bool empty(const Inputs& p) { return p.M == 0 || p.T == 0 || p.out == 0; }

// Ranks in slices that the fused product can tell apart: where the rank is not padded, and none is empty, or nobody
// would make its h.
Sizes usable(const Inputs& p, const OptInts& slices) {
  if (!slices || p.r != padded_rank(p.r)) return {};
  for (size_t i = 0; i < slices->size(); i += 2)
    if ((*slices)[i] == (*slices)[i + 1]) return {};
  return *slices;
}

LoraShape shape_of(const Inputs& p, const Tensor& rows, const OptTensor& base, const Sizes& slices, bool backward,
                   bool keep) {
  LoraShape s{p.family, p.M, p.in, p.out, p.T, p.r};
  s.half = p.x.scalar_type() != ScalarType::Float;
  s.weight = p.weight.has_value();
  s.relu = p.relu, s.bias = p.bias_A || p.bias_B;
  s.backward = backward, s.keep = keep, s.slices = slices;
  if (p.family == Family::indexed) s.rows_per_id = p.M / p.ids->size(0);
#ifdef PLORA_NO_SM90
  s.capability = 0;
#else
  s.capability = 10 * device_attribute<cudaDevAttrComputeCapabilityMajor>() +
                 device_attribute<cudaDevAttrComputeCapabilityMinor>();
  if (s.capability == 90 && !on_hopper()) s.capability = 0;
  s.sms = multiprocessors();
#endif
  for (const void* q : {pointer(rows), pointer(p.lora_A), pointer(p.lora_B), pointer(p.weight), pointer(p.bias),
                        pointer(p.bias_A), pointer(p.bias_B), pointer(base)})
    s.aligned = s.aligned && reinterpret_cast<uintptr_t>(q) % 16 == 0;
  s.mma_only = mma_only();
  return s;
}

void check_served(const Inputs& p) {
  const ScalarType dtype = p.x.scalar_type();
  PLORA_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, p.op,
              ": x must be float32, bfloat16 or float16 on CUDA, got ", torch::headeronly::toString(dtype),
              dtype == ScalarType::Double ? "; the nearest is float32" : "");
  // Rows, columns and ranks are counted in 32 bits, elements in 64.
  for (const auto& [name, size] : {std::pair{"rows of x", p.M},
                                   {"columns of x", p.in},
                                   {"rows of lora_B", p.out},
                                   {"adapters times their rank", p.T * padded_rank(p.r)}})
    PLORA_CHECK(size < INT32_MAX - 256, p.op, ": at most 2,147,483,390 ", name, " on CUDA, got ", size,
                ": call it on parts");
}

// Space for s h as the fused product takes it.
Tensor new_given(const Inputs& p, const LoraShape& shape, LowRank& l) {
  l.places = lora_plan::adapters_of_tile(shape);
  const Tensor given = allocate(p.x, {p.M, padded_rank(p.r) * l.places});
  l.scaled_h = given.mutable_data_ptr();
  return given;
}

// Whether it was the kernel that the fused product may overlap with.
bool make_h(const LowRank& l, cudaStream_t stream) {
  if (low_rank_sm90(l, stream)) return true;
  low_rank(l, stream);
  return false;
}

// Both halves of a low-rank part by Hopper's kernels; false, and nothing happened, where low_rank has to make it.
bool add_on_hopper(const Inputs& p, const LoraShape& shape, LowRank l, bool keep) {
  if (!adds_on_hopper(shape)) return false;
  if (!keep) l.h = nullptr;
  const Tensor given = new_given(p, shape, l);
  return low_rank_add_sm90(l, stream_of(p.x));
}

void add(const Inputs& p, const LoraShape& shape, const LowRank& l, bool keep) {
  if (!add_on_hopper(p, shape, l, keep)) low_rank(l, stream_of(p.x));
}

void add_few(const Inputs& p, LowRank l) {
  l.rows.r = p.r;
  l.ranks = p.ranks ? data<int64_t>(*p.ranks) : nullptr;
  few_rows(l, p.x, stream_of(p.x));
}

// Fills in what both directions share.
void run_fused(const Inputs& p, const LoraPlan& plan, const OptTensor& h, Fused& f) {
#ifndef PLORA_NO_SM90
  f.dtype = p.x.scalar_type();
  f.rows = rows_of(p, padded_rank(p.r));
  f.scaling = data<float>(p.scaling);
  f.weight = pointer(p.weight);
  f.in_loop_slots = static_cast<int>(plan.slots);
  if (h) f.h = pointer(h), f.places = h->size(1) / f.rows.r;
  fused(f, stream_of(p.x));
#endif
}

// --- backward --------------------------------------------------------------------------------------------------------

Tensor frozen_dx(const Inputs& p, const Tensor& dy) {
  if (!p.weight) return torch::stable::new_zeros(p.x, p.x.sizes());
  return compact(torch::stable::matmul(p.family == Family::all ? sum_slabs(dy) : dy, *p.weight));
}

Tensor h_of(const Inputs& p, const OptTensor& kept) {
  if (kept && kept->numel() > 0) {
    check_shape(p.op, "kept", *kept, {p.M, padded_rank(p.r) * (p.family == Family::indexed ? 1 : p.T)}, p.x);
    check_dtype(p.op, "kept", *kept, p.x.scalar_type());
    return compact(*kept);
  }
  const LoraShape shape = shape_of(p, p.x, {}, {}, false, true);
  if (few_rows(shape)) {
    const Tensor h = new_ranks(p);
    add_few(p, down_of(p, {p.lora_A, p.lora_B, p.bias_A}, h));
    return h;
  }
  const Factors factors = factors_of(p);
  if (p.family == Family::sum && h_by_product(shape) && !p.relu && !p.bias_A) return x_times(p, factors.A);
  const Tensor h = new_ranks(p);
  low_rank(down_of(p, factors, h), stream_of(p.x));
  return h;
}

// g = dy B, cut where act was, and dx = dy W + s g A, both only where they are asked for.
void backward_rows(const Inputs& p, const Tensor& dy, const OptTensor& gate, bool wants_g, bool wants_x, OptTensor& g,
                   Tensor& dx) {
  LoraShape shape = shape_of(p, dy, {}, {}, true, false);
  shape.aligned = shape.aligned && reinterpret_cast<uintptr_t>(pointer(gate)) % 16 == 0;
  if (few_rows(shape)) {
    if (wants_x) dx = p.weight ? frozen_dx(p, dy) : allocate(p.x, p.x.sizes());
    if (wants_g) g = new_ranks(p);
    LowRank l = low_rank_of(p);
    l.K = l.ldx = p.out, l.x = pointer(dy);
    l.gate = pointer(gate), l.h = out_pointer(g);
    l.down = pointer(p.lora_B), l.up = pointer(p.lora_A), l.down_transposed = l.up_transposed = true;
    if (wants_x) l.N = l.ldy = l.ldy0 = p.in, l.y = out_pointer(dx), l.y0 = p.weight ? l.y : nullptr;
    return add_few(p, l);
  }
  const LoraPlan plan = wants_x ? plan_lora(shape) : LoraPlan{};
  if (wants_x) dx = p.weight && !plan.hopper ? frozen_dx(p, dy) : allocate(p.x, p.x.sizes());
  const Factors factors = factors_of(p);
  const auto add_fused = [&](const Tensor& g, const Tensor& A, bool overlap) {  // one of them scaled
    Fused f{};
    f.overlap = overlap;
    f.transposed = true;
    f.K = p.out, f.N = p.in;
    f.x = pointer(dy), f.ldx = p.out;
    f.y = dx.mutable_data_ptr(), f.ldy = p.in;
    f.up = pointer(A);
    run_fused(p, plan, g, f);
  };
  if (plan.hopper && h_by_product(shape) && !gate) {
    const int64_t rank = padded_rank(p.r);
    const Tensor B = p.T == 1
                         ? torch::stable::view(factors.B, {p.out, rank})
                         : torch::stable::transpose(torch::stable::view(B_transposed(p), {p.T * rank, p.out}), 0, 1);
    g = torch::stable::matmul(dy, B);
    return add_fused(*g, scaled_A(p), false);
  }
  if (wants_g || (crowded(p) && !plan.hopper)) g = new_ranks(p);
  LowRank l = low_rank_of(p);
  const OptTensor scaled_g = plan.hopper ? OptTensor(new_given(p, shape, l)) : std::nullopt;
  l.K = p.out, l.N = p.in;
  l.x = pointer(dy), l.ldx = p.out, l.x_slab = p.family == Family::all ? p.M * p.out : 0;
  l.gate = pointer(gate);
  l.h = out_pointer(g);
  const bool adds = wants_x && !plan.hopper;
  if (adds) {
    l.up = pointer(factors.A), l.up_transposed = true;
    l.y = out_pointer(dx), l.ldy = l.ldy0 = p.in;
    if (p.weight) l.y0 = l.y;
  }
  const auto on_hopper = [&] { return adds ? add_on_hopper(p, shape, l, wants_g) : low_rank_sm90(l, stream_of(p.x)); };
  l.down = pointer(factors.B), l.down_transposed = true;
  bool done = reads_lora_B(shape) && on_hopper();
  if (!done) {
    const Tensor down = B_transposed(p);
    l.down = pointer(down), l.down_transposed = false;
    done = on_hopper();
    if (!done) {
      const OptTensor up = adds ? OptTensor(A_transposed(p)) : std::nullopt;
      l.up = pointer(up), l.up_transposed = false;
      low_rank(l, stream_of(p.x));
    }
  }
  if (plan.hopper) add_fused(*scaled_g, factors.A, done);
}

// `needs` holds no bit of the factors where nobody in `asks` would get a gradient.
Gradients low_rank_gradients(const Inputs& p, const Tensor& dy, const OptTensor& kept, const Sizes& asks,
                             int64_t needs) {
  const auto fresh = [&](int64_t bit, const Tensor& like) {
    return needs & bit ? allocate(like, like.sizes()) : Tensor{};
  };
  Gradients result{Tensor{},
                   fresh(kNeedA, p.lora_A),
                   fresh(kNeedB, p.lora_B),
                   fresh(kNeedScaling, p.scaling),
                   p.bias_A ? fresh(kNeedBiasA, *p.bias_A) : Tensor{},
                   p.bias_B ? fresh(kNeedBiasB, *p.bias_B) : Tensor{}};
  const bool wants_g = needs & (kNeedA | kNeedBiasA | kNeedScaling), wants_rows = wants_g || (needs & kNeedX);
  OptTensor h, g;
  if ((needs & (kNeedB | kNeedScaling)) || (p.relu && wants_rows)) h = h_of(p, kept);
  if (wants_rows) backward_rows(p, dy, p.relu ? h : std::nullopt, wants_g, needs & kNeedX, g, result.x);
  if (!(needs & ~kNeedX)) return result;

  LoraGrads q{};
  q.dtype = p.x.scalar_type();
  q.padded_r = padded_rank(p.r);
  q.rows = rows_of(p, p.r ? p.r : q.padded_r);
  q.scaling = data<float>(p.scaling);
  q.in = q.ldx = p.in, q.out = q.lddy = p.out;
  q.x = pointer(p.x), q.dy = pointer(dy);
  if (p.family == Family::all) q.dy_slab = p.M * p.out;
  q.h = pointer(h), q.g = pointer(g);
  q.bias_B = pointer(p.bias_B);
  if (p.ranks) q.ranks = data<int64_t>(*p.ranks);
  q.adapters = asks;
  q.dA = out_pointer(result.lora_A), q.dB = out_pointer(result.lora_B);
  q.dbias_A = out_pointer(result.bias_A), q.dbias_B = out_pointer(result.bias_B);
  q.dscaling = static_cast<float*>(out_pointer(result.scaling));
  lora_grads(q, p.x, stream_of(p.x));
  return result;
}

// Of the sum, by way of the merged weight's gradient dW.
Gradients dense_gradients(const Inputs& p, const Tensor& dy, const OptTensor& kept, const Sizes& asks, int64_t needs) {
  Gradients result;
  if (needs & kNeedX) {
    const bool given = kept && kept->numel() > 0;
    if (given) {
      check_shape(p.op, "kept", *kept, {p.out, p.in}, p.x);
      check_dtype(p.op, "kept", *kept, p.x.scalar_type());
    }
    result.x = compact(torch::stable::matmul(dy, given ? *kept : merge(p)));
  }
  if (!(needs & ~kNeedX)) return result;

  // the adapters from the first to the last that asks
  const int64_t first = asks.empty() ? 0 : asks.front(), count = asks.empty() ? 0 : asks.back() + 1 - first;
  Inputs some = p;
  if (count < p.T && (needs & (kNeedA | kNeedB))) {
    some.T = count;
    some.lora_A = part(p.lora_A, 0, first, count), some.lora_B = part(p.lora_B, 0, first, count);
    some.scaling = part(p.scaling, 0, first, count);
    if (p.ranks) some.ranks = part(*p.ranks, 0, first, count);
  }

  // few that follow each other: their own ranks cost less than dW
  if (!(needs & kNeedScaling) && count == static_cast<int64_t>(asks.size()) && count * p.r <= lora_plan::kDenseRank) {
    some.weight.reset();
    Sizes every(count);
    std::iota(every.begin(), every.end(), 0);
    const Gradients g = low_rank_gradients(some, dy, {}, every, needs & ~kNeedX);
    const auto put = [&](int64_t bit, Tensor& to, const Tensor& like, const Tensor& from) {
      if (!(needs & bit)) return;
      to = torch::stable::new_zeros(like, like.sizes());
      Tensor target = part(to, 0, first, count);
      torch::stable::copy_(target, from);
    };
    put(kNeedA, result.lora_A, p.lora_A, g.lora_A);
    put(kNeedB, result.lora_B, p.lora_B, g.lora_B);
    return result;
  }

  const int64_t rank = padded_rank(p.r), parts = dense_parts(rank, p.in);
  const Tensor dW = torch::stable::matmul(torch::stable::transpose(dy, 0, 1), p.x);
  const Inputs& most = needs & kNeedScaling ? p : some;
  DenseGrads q{};
  q.dtype = p.x.scalar_type();
  q.T = p.T, q.r = p.r, q.padded_r = rank, q.in = p.in, q.out = p.out;
  q.scaling = data<float>(p.scaling);
  OptTensor U, V, A, sums;
  if (needs & (kNeedA | kNeedB)) q.adapters = asks;
  if (needs & (kNeedB | kNeedScaling)) A = A_of(most);
  if (needs & (kNeedA | kNeedScaling)) {
    const Tensor B = most.T == 1 ? torch::stable::transpose(torch::stable::view(B_of(most), {p.out, rank}), 0, 1)
                                 : torch::stable::view(B_transposed(most), {most.T * rank, p.out});
    U = torch::stable::matmul(B, dW);
  }
  if (needs & kNeedB) {
    const Tensor asking = most.T > count ? part(*A, 0, first, count) : *A;
    V = torch::stable::matmul(torch::stable::view(asking, {count * rank, p.in}), torch::stable::transpose(dW, 0, 1));
  }
  if (needs & kNeedA) result.lora_A = allocate(p.lora_A, p.lora_A.sizes());
  if (needs & kNeedB) result.lora_B = allocate(p.lora_B, p.lora_B.sizes());
  if (needs & kNeedScaling) sums = allocate(p.scaling, parts == 1 ? Sizes{p.T} : Sizes{p.T, parts});
  q.U = pointer(U), q.V = pointer(V), q.A = pointer(A);
  q.dA = out_pointer(result.lora_A), q.dB = out_pointer(result.lora_B);
  q.dscaling = static_cast<float*>(out_pointer(sums));
  dense_grads(q, stream_of(p.x));
  if (sums) {
    const Sizes along{1};
    result.scaling =
        parts == 1 ? *sums : torch::stable::sum(*sums, torch::headeronly::IntHeaderOnlyArrayRef(along), false);
  }
  return result;
}

// --- the operators ---------------------------------------------------------------------------------------------------

struct Cuda {
  static std::tuple<Tensor, Tensor> forward(const Inputs& p, const OptTensor& base, const OptInts& given_slices,
                                            bool keep) {
    check_served(p);
    const torch::stable::accelerator::DeviceGuard guard(p.x.get_device_index());
    const bool slabs = p.family == Family::all;
    const auto frozen = [&] { return p.weight ? plus(linear(p.x, *p.weight, p.bias), base) : *base; };
    if (empty(p)) {
      const Tensor y = slabs      ? torch::stable::new_zeros(p.x, {p.T, p.M, p.out})
                       : p.weight ? frozen()
                       : base     ? torch::stable::clone(*base)
                                  : torch::stable::new_zeros(p.x, {p.M, p.out});
      if (!keep) return {y, none_like(p.x)};
      const Tensor like = dense(p) ? *p.weight : new_ranks(p);
      return {y, torch::stable::new_zeros(like, like.sizes())};
    }

    const Sizes slices = usable(p, given_slices);
    const LoraShape shape = shape_of(p, p.x, base, slices, false, keep);
    const LoraPlan plan = plan_lora(shape);
    if (plan.algorithm == LoraAlgorithm::merge || plan.algorithm == LoraAlgorithm::dense) {
      const Tensor merged = merge(p);
      return {plus(linear(p.x, merged, p.bias), base), keep ? merged : none_like(p.x)};
    }

    const bool few = plan.algorithm == LoraAlgorithm::few_rows;
    const Factors factors = few ? Factors{p.lora_A, p.lora_B, p.bias_A} : factors_of(p);
    OptTensor h;
    if (keep || (crowded(p) && !plan.hopper && !few)) h = new_ranks(p);
    // the fused product writes no h of rows without an adapter, and nobody reads it, but it leaves this operator
    if (keep && plan.slots > 0 && p.ids) torch::stable::zero_(*h);
    LowRank l = down_of(p, factors, h);
    const bool plain = !p.relu && !p.bias_A;
    if (plan.hopper) {
      Tensor up = factors.B;
      OptTensor given;
      bool overlap = false;
      if (plan.algorithm == LoraAlgorithm::precomputed && h_by_product(shape) && plain) {
        h = given = x_times(p, factors.A);
        up = scaled_B(p);
      } else if (plan.algorithm != LoraAlgorithm::in_loop) {
        given = new_given(p, shape, l);
        overlap = make_h(l, stream_of(p.x));
      }
      const Tensor y = allocate(p.x, {p.M, p.out});
      Fused f{};
      f.overlap = overlap;
      f.K = p.in, f.N = p.out;
      f.x = pointer(p.x), f.ldx = p.in;
      f.bias = pointer(p.bias), f.base = pointer(base), f.ld_base = p.out;
      f.y = y.mutable_data_ptr(), f.ldy = p.out;
      f.down = pointer(factors.A), f.up = pointer(up);
      f.bias_down = pointer(factors.bias_A), f.bias_up = pointer(p.bias_B);
      f.relu = p.relu;
      if (keep && plan.slots > 0) f.kept = out_pointer(h);
      f.slices = slices;
      run_fused(p, plan, given, f);
      return {y, keep ? *h : none_like(p.x)};
    }

    OptTensor y0;
    if (p.weight || base) y0 = frozen();
    const Tensor y = slabs ? allocate(p.x, {p.T, p.M, p.out}) : p.weight ? *y0 : allocate(p.x, {p.M, p.out});
    l.N = p.out;
    l.up = pointer(factors.B), l.bias_up = pointer(p.bias_B);
    l.y = y.mutable_data_ptr(), l.ldy = p.out, l.y_slab = slabs ? p.M * p.out : 0;
    l.y0 = pointer(y0), l.ldy0 = p.out;
    if (slabs && expands(l)) {
      if (h_by_product(shape) && plain) {
        h = x_times(p, factors.A);
      } else {
        if (!h) h = new_ranks(p);
        low_rank(down_of(p, factors, h), stream_of(p.x));
      }
      l.h = out_pointer(h);
      expand(l, stream_of(p.x));
      return {y, keep ? *h : none_like(p.x)};
    }
    few ? add_few(p, l) : add(p, shape, l, keep);
    return {y, keep ? *h : none_like(p.x)};
  }

  static void in_place(const Inputs& p, const Tensor& y) {
    check_served(p);
    if (empty(p)) return;
    const torch::stable::accelerator::DeviceGuard guard(p.x.get_device_index());
    const LoraShape shape = shape_of(p, p.x, y, {}, false, false);
    const bool few = few_rows(shape);
    const Factors factors = few ? Factors{p.lora_A, p.lora_B, p.bias_A} : factors_of(p);
    const int64_t d = y.dim();
    LowRank l = down_of(p, factors, crowded(p) && !few ? OptTensor(new_ranks(p)) : std::nullopt);
    l.N = p.out;
    l.up = pointer(factors.B), l.bias_up = pointer(p.bias_B);
    l.y = y.mutable_data_ptr(), l.ldy = p.M > 1 ? y.stride(d - 2) : p.out, l.y_slab = d == 3 ? y.stride(0) : 0;
    l.y0 = l.y, l.ldy0 = l.ldy, l.y0_slab = l.y_slab;
    few ? add_few(p, l) : add(p, shape, l, false);
  }

  static Gradients backward(const Inputs& p, const Tensor& dy, const OptTensor& kept, const OptInts& trainable,
                            int64_t needs) {
    check_served(p);
    const torch::stable::accelerator::DeviceGuard guard(p.x.get_device_index());
    Sizes asks(p.T);
    std::iota(asks.begin(), asks.end(), 0);
    if (trainable) {
      asks = *trainable;
      std::sort(asks.begin(), asks.end());
      asks.erase(std::unique(asks.begin(), asks.end()), asks.end());
    }
    int64_t compute = asks.empty() ? needs & (kNeedX | kNeedScaling) : needs;
    Gradients g;
    if (empty(p)) {
      if (needs & kNeedX) g.x = frozen_dx(p, dy);
      compute = 0;
    } else {
      g = dense(p) ? dense_gradients(p, dy, kept, asks, compute) : low_rank_gradients(p, dy, kept, asks, compute);
    }
    const auto zeros = [&](int64_t bit, Tensor& t, const Tensor& like) {
      if (needs & ~compute & bit) t = torch::stable::new_zeros(like, like.sizes());
    };
    zeros(kNeedA, g.lora_A, p.lora_A);
    zeros(kNeedB, g.lora_B, p.lora_B);
    zeros(kNeedScaling, g.scaling, p.scaling);
    if (p.bias_A) zeros(kNeedBiasA, g.bias_A, *p.bias_A);
    if (p.bias_B) zeros(kNeedBiasB, g.bias_B, *p.bias_B);
    return g;
  }
};

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) { plora::LoraOperators<plora::cuda::Cuda>::add_to(m); }
