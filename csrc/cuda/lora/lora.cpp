// The low-rank families on CUDA: calls the kernels that make the outputs and the gradients, as common/lora_plan.h
// plans.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>

#include "../../common/cuda_path.h"
#include "../../common/lora_inputs.h"
#include "../../common/lora_plan.h"
#include "../device/device.h"
#include "../device/fork.h"
#include "../tensors.h"
#include "factors.h"
#include "kernels.h"

namespace plora::cuda {

#ifdef PLORA_NO_SM90  // then the plan knows of no Hopper, and never asks for these
[[noreturn]] static void missing() { fail("built without Hopper's kernels"); }
void low_rank_sm90(const LowRank&, cudaStream_t) { missing(); }
void low_rank_add_sm90(const LowRank&, cudaStream_t) { missing(); }
void fused(const Fused&, cudaStream_t) { missing(); }
void few_rows_sm90(const LowRank&, const void*, const void*, const Allocator&, cudaStream_t) { missing(); }
void lora_grads_sm90(const LoraGrads&, bool, cudaStream_t) { missing(); }
void dense_grads_sm90(const DenseGrads&, const DenseRows&, const Allocator&, cudaStream_t) { missing(); }
void all_sm90(const LowRank&, const void*, const void*, bool, cudaStream_t) { missing(); }
#endif

namespace {

using Sizes = std::vector<int64_t>;

const void* pointer(const Tensor& t) { return t.const_data_ptr(); }

const void* pointer(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }

void* out_pointer(const OptTensor& t) { return t && t->numel() > 0 ? t->mutable_data_ptr() : nullptr; }

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
  pack(dtype_of(p.op, from.scalar_type()), pointer(from), to.mutable_data_ptr(), p.T, rows, columns, rank_is_rows, rank,
       transpose, p.ranks ? data<int64_t>(*p.ranks) : nullptr, scaled ? data<float>(p.scaling) : nullptr,
       stream_of(from));
  return to;
}

struct Factors {
  Tensor A, B;
  OptTensor bias_A;
  bool few = false;  // of any rank, as the kernels of few rows take them
};

// The factors themselves where they need no padding.
bool padded(const Inputs& p) { return p.ranks || p.r != padded_rank(p.r); }

Tensor A_of(const Inputs& p) { return padded(p) ? packed(p, p.lora_A, p.r, p.in, true, false) : p.lora_A; }

Tensor B_of(const Inputs& p) { return padded(p) ? packed(p, p.lora_B, p.out, p.r, false, false) : p.lora_B; }

Factors factors_of(const Inputs& p) {
  return {A_of(p), B_of(p), padded(p) && p.bias_A ? OptTensor(packed(p, *p.bias_A, p.r, 1, true, false)) : p.bias_A};
}

Factors own_factors(const Inputs& p) { return {p.lora_A, p.lora_B, p.bias_A, true}; }

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
  if (p.dtype != ScalarType::Float && p.T * p.r > lora_plan::kMergeOwn) {
    if (p.times) return merge(p.folded());
    const int64_t ranks = p.T * padded_rank(p.r);
    const Tensor A = torch::stable::view(A_of(p), {ranks, p.in});
    const Tensor up = torch::stable::transpose(torch::stable::view(B_transposed(p, true), {ranks, p.out}), 0, 1);
    return plus(*p.weight, torch::stable::matmul(up, A));
  }
  return merged_weight(*p.weight, with_sizes(p.lora_A, {p.T, p.r, p.in}), with_sizes(p.lora_B, {p.T, p.out, p.r}),
                       p.scaling, p.ranks, p.times);
}

// Of h and g.
int64_t rank_columns(const Inputs& p) { return padded_rank(p.r) * (p.family == Family::indexed ? 1 : p.T); }

Tensor new_ranks(const Inputs& p) { return allocate(p.x, {p.M, rank_columns(p)}); }

// Whether so many ranks act on a row that low_rank needs memory for h between its halves.
bool crowded(const Inputs& p) { return rank_columns(p) > 512; }

LowRank low_rank_of(const Inputs& p, bool few) {
  LowRank l{};
  l.dtype = dtype_of(p.op, p.dtype);
  l.rows = rows_of(p, few ? p.r : padded_rank(p.r));
  if (few && p.ranks) l.ranks = data<int64_t>(*p.ranks);
  l.scaling = data<float>(p.scaling);
  return l;
}

// h = act(x A^T + a), into `h` where that is given.
LowRank down_of(const Inputs& p, const Factors& f, const OptTensor& h) {
  LowRank l = low_rank_of(p, f.few);
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
  const Tensor rows = torch::stable::view(A, {p.T * padded_rank(p.r), p.in});
  return torch::stable::matmul(p.x, torch::stable::transpose(rows, 0, 1));
}

// --- plans -----------------------------------------------------------------------------------------------------------

bool dense(const Inputs& p) {
  return lora_dense(p.family, p.T, p.r, p.weight.has_value(), p.relu, p.bias_A || p.bias_B);
}

bool empty(const Inputs& p) { return p.M == 0 || p.T == 0 || p.out == 0; }

// Slices that the fused product can tell apart: of a rank that is not padded; of an empty one nobody would make h.
Sizes usable(const Inputs& p, const OptInts& slices) {
  if (!slices || p.r != padded_rank(p.r)) return {};
  for (size_t i = 0; i < slices->size(); i += 2)
    if ((*slices)[i] == (*slices)[i + 1]) return {};
  return *slices;
}

// `rows`: x, or backward dy; `other`: the base, the y that is added to, or the gate.
LoraShape shape_of(const Inputs& p, const Tensor& rows, const OptTensor& other) {
  LoraShape s{p.family, p.M, p.in, p.out, p.T, p.r};
  s.half = p.dtype != ScalarType::Float;
  s.weight = p.weight.has_value();
  s.relu = p.relu, s.bias = p.bias_A || p.bias_B, s.bias_A = p.bias_A.has_value();
  s.ragged = p.ranks.has_value();
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
                        pointer(p.bias_A), pointer(p.bias_B), pointer(other)})
    s.aligned = s.aligned && aligned(q);
  s.mma_only = mma_only();
  return s;
}

void check_served(const Inputs& p) {
  const ScalarType dtype = p.dtype;
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

// Space for s h as the fused product takes it, behind as many columns of something else.
Tensor new_given(const Inputs& p, const LoraShape& shape, LowRank& l, int64_t before = 0) {
  l.places = lora_plan::adapters_of_tile(shape);
  const Tensor given = allocate(p.x, {p.M, before + padded_rank(p.r) * l.places});
  l.scaled_h = static_cast<char*>(given.mutable_data_ptr()) + p.M * before * given.element_size();
  return given;
}

void add_few(const Inputs& p, const LowRank& l) { few_rows(l, Workspace(p.x), stream_of(p.x)); }

// With the frozen layer in one product.
void add_few_fused(const Inputs& p, const LowRank& l, const OptTensor& bias) {
  few_rows_sm90(l, pointer(p.weight), pointer(bias), Workspace(p.x), stream_of(p.x));
}

// Onto the frozen layer's own product, which frozen() makes and tells l.y: the first half runs beside it.
template <typename Frozen>
void add_few_beside(const Inputs& p, LowRank& l, const Frozen& frozen) {
  const cudaStream_t stream = stream_of(p.x);
  Workspace workspace(p.x);
  void* const memory = workspace(few_rows_bytes(l, true));
  Fork fork(stream);
  few_rows_shrink(l, memory, true, fork.stream());
  frozen();
  fork.join();
  few_rows_expand(l, memory, true, stream);
}

bool runs_beside(const Inputs& p, const LoraPlan& plan) {
  return plan.algorithm == LoraAlgorithm::few_rows && p.weight && can_fork(stream_of(p.x));
}

// Both halves of a low-rank part by Hopper's kernels.
void add_on_hopper(const Inputs& p, const LoraShape& shape, LowRank l, bool keep) {
  if (!keep) l.h = nullptr;
  const Tensor given = new_given(p, shape, l);
  low_rank_add_sm90(l, stream_of(p.x));
}

// --- forward ---------------------------------------------------------------------------------------------------------

// h alone.
Tensor make_h(const Inputs& p, LoraRanks by, const Factors& factors) {
  if (by == LoraRanks::product) return x_times(p, factors.A);
  const Tensor h = new_ranks(p);
  const LowRank l = down_of(p, factors, h);
  by == LoraRanks::rows ? low_rank_sm90(l, stream_of(p.x)) : low_rank(l, stream_of(p.x));
  return h;
}

// What the low-rank part is added to where there is a frozen layer or a base.
OptTensor frozen(const Inputs& p, const OptTensor& base) {
  return p.weight ? OptTensor(plus(linear(p.x, *p.weight, p.bias), base)) : base;
}

// The pointers and strides of a contiguous y and y0, for add_low_rank.
LowRank written(const Inputs& p, const OptTensor& y0, const Tensor& y) {
  LowRank l{};
  l.y = y.mutable_data_ptr(), l.ldy = l.ldy0 = p.out, l.y_slab = p.family == Family::all ? p.M * p.out : 0;
  l.y0 = pointer(y0);
  return l;
}

// Both halves, from the factors as a plan takes them.
LowRank halves_of(const Inputs& p, const Factors& f, const OptTensor& h) {
  LowRank l = down_of(p, f, h);
  l.N = p.out, l.up = pointer(f.B), l.bias_up = pointer(p.bias_B);
  return l;
}

Tensor fused_forward(const Inputs& p, const LoraPlan& plan, const LoraShape& shape, const OptTensor& base,
                     OptTensor& h) {
  const Factors factors = factors_of(p);
  const bool product = plan.ranks == LoraRanks::product;
  if (product) h = x_times(p, factors.A);
  // the loop writes no h of rows without an adapter, and nobody reads it, but it leaves this operator
  if (plan.slots > 0 && h && p.ids) torch::stable::zero_(*h);
  const Tensor up = product ? scaled_B(p) : factors.B, y = allocate(p.x, {p.M, p.out});
  Fused f{halves_of(p, factors, h), pointer(p.weight), pointer(p.bias), plan.slots, plan.by_rows()};
  OptTensor given;
  if (product) f.scaled_h = f.h, f.places = p.T;
  if (plan.by_rows()) {
    given = new_given(p, shape, f);
    f.followed = plan.ctas;
    low_rank_sm90(f, stream_of(p.x));
  }
  f.ldy = f.ldy0 = p.out;
  f.y = y.mutable_data_ptr(), f.y0 = pointer(base);
  f.up = pointer(up);
  if (plan.slots == 1) f.slices = shape.slices;
  fused(f, stream_of(p.x));
  return y;
}

// All of y of few rows, the first half of the low-rank part beside the frozen layer's product.
Tensor few_forward(const Inputs& p, const OptTensor& base, const OptTensor& h) {
  LowRank l = halves_of(p, own_factors(p), h);
  OptTensor y;
  add_few_beside(p, l, [&] {
    y = frozen(p, base);
    l.y = y->mutable_data_ptr(), l.y0 = l.y, l.ldy = l.ldy0 = p.out;
  });
  return *y;
}

// y = y0 + the low-rank part, or the frozen layer too; `y` has the pointers of both. Keeps h where it is given.
void add_low_rank(const Inputs& p, const LoraPlan& plan, const LoraShape& shape, const LowRank& y, OptTensor& h,
                  bool keep) {
  const Factors factors = plan.few() ? own_factors(p) : factors_of(p);
  if (plan.algorithm == LoraAlgorithm::expand || plan.algorithm == LoraAlgorithm::all)
    h = make_h(p, plan.ranks, factors);
  if (!h && plan.algorithm == LoraAlgorithm::low_rank && crowded(p)) h = new_ranks(p);
  LowRank l = halves_of(p, factors, h);
  l.y = y.y, l.ldy = y.ldy, l.y_slab = y.y_slab;
  l.y0 = y.y0, l.ldy0 = y.ldy0, l.y0_slab = y.y0_slab;
  switch (plan.algorithm) {
    case LoraAlgorithm::few_rows:
      return add_few(p, l);
    case LoraAlgorithm::few_fused:
      return add_few_fused(p, l, p.bias);
    case LoraAlgorithm::add:
      return add_on_hopper(p, shape, l, keep);
    case LoraAlgorithm::expand:
      return expand(l, stream_of(p.x));
    case LoraAlgorithm::all:
      return all_sm90(l, pointer(p.weight), pointer(p.bias), plan.by_rows(), stream_of(p.x));
    default:
      return low_rank(l, stream_of(p.x));
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

Tensor frozen_dx(const Inputs& p, const Tensor& dy) {
  if (!p.weight) return torch::stable::new_zeros(p.x, p.x.sizes());
  return compact(torch::stable::matmul(p.family == Family::all ? sum_slabs(dy) : dy, *p.weight));
}

Tensor h_of(const Inputs& p, const OptTensor& kept) {
  if (kept && kept->numel() > 0) {
    check_shape(p.op, "kept", *kept, {p.M, rank_columns(p)}, p.x);
    check_dtype(p.op, "kept", *kept, p.dtype);
    return compact(*kept);
  }
  LoraShape shape = shape_of(p, p.x, {});
  shape.keep = true, shape.outputs = false;
  const LoraPlan plan = plan_lora(shape);
  if (plan.algorithm != LoraAlgorithm::few_rows) return make_h(p, plan.ranks, factors_of(p));
  const Tensor h = new_ranks(p);
  add_few(p, down_of(p, own_factors(p), h));
  return h;
}

// g = dy B, cut where act was, and dx = dy W + s g A, both only where they are asked for.
void backward_rows(const Inputs& p, const LoraPlan& plan, const LoraShape& shape, const Tensor& dy,
                   const OptTensor& gate, bool wants_g, bool wants_x, OptTensor& g, OptTensor& dx) {
  const bool few = plan.few(), low_rank_alone = plan.algorithm == LoraAlgorithm::low_rank;
  const bool product = plan.ranks == LoraRanks::product, both = wants_g && plan.fused() && plan.by_rows();
  const bool beside = wants_x && runs_beside(p, plan);
  if (wants_x && !beside) dx = p.weight && !plan.whole() ? frozen_dx(p, dy) : allocate(p.x, p.x.sizes());
  const Factors factors = few ? own_factors(p) : factors_of(p);
  if (product) {
    const int64_t rank = padded_rank(p.r);
    g = torch::stable::matmul(
        dy, p.T == 1 ? torch::stable::view(factors.B, {p.out, rank})
                     : torch::stable::transpose(torch::stable::view(B_transposed(p), {p.T * rank, p.out}), 0, 1));
  } else if ((wants_g && !both) || (wants_x && low_rank_alone && crowded(p))) {
    g = new_ranks(p);
  }

  // low_rank alone takes transposed copies of both factors; with `packed` low_rank_sm90 takes one of lora_B
  const bool B_as_it_is = few || plan.algorithm == LoraAlgorithm::in_loop || plan.ranks == LoraRanks::rows || product;
  const Tensor down = B_as_it_is ? factors.B : B_transposed(p);
  const Tensor up = product ? scaled_A(p) : low_rank_alone && wants_x ? A_transposed(p) : factors.A;
  LowRank l = low_rank_of(p, few);
  l.K = p.out;
  l.x = pointer(dy), l.ldx = p.out, l.x_slab = p.family == Family::all ? p.M * p.out : 0;
  l.down = pointer(down), l.down_transposed = B_as_it_is;
  l.gate = pointer(gate), l.h = out_pointer(g);
  const auto add_to_dx = [&] { l.y = out_pointer(dx), l.y0 = p.weight && !plan.whole() ? l.y : nullptr; };
  if (wants_x) {
    l.N = l.ldy = l.ldy0 = p.in;
    l.up = pointer(up), l.up_transposed = !low_rank_alone;
    if (!beside) add_to_dx();
  }
  const cudaStream_t stream = stream_of(p.x);
  if (plan.fused()) {
    OptTensor given;
    if (product) l.scaled_h = l.h, l.places = p.T;
    if (plan.by_rows()) {  // g, if asked for, in one piece of memory with s g
      given = new_given(p, shape, l, both ? rank_columns(p) : 0);
      if (both) g = given, l.h = out_pointer(g);
      l.followed = plan.ctas;
      low_rank_sm90(l, stream);
    }
    return fused({l, pointer(p.weight), nullptr, plan.slots, plan.by_rows()}, stream);
  }
  if (beside)
    return add_few_beside(p, l, [&] {
      dx = frozen_dx(p, dy);
      add_to_dx();
    });
  if (few) return plan.whole() ? add_few_fused(p, l, {}) : add_few(p, l);
  if (plan.algorithm == LoraAlgorithm::add) return add_on_hopper(p, shape, l, wants_g);
  plan.by_rows() ? low_rank_sm90(l, stream) : low_rank(l, stream);
}

// `needs` holds no bit of the factors where nobody in `asks` would get a gradient.
Gradients low_rank_gradients(const Inputs& p, const Tensor& dy, const OptTensor& kept, const Sizes& asks,
                             int64_t needs) {
  const auto fresh = [&](int64_t bit, const OptTensor& like) {
    return needs & bit ? OptTensor(allocate(*like, like->sizes())) : std::nullopt;
  };
  // first of all, as some kernels write them while others run whose workspace is already given back
  Gradients result{std::nullopt,
                   fresh(kNeedA, p.lora_A),
                   fresh(kNeedB, p.lora_B),
                   fresh(kNeedScaling, p.scaling),
                   fresh(kNeedBiasA, p.bias_A),
                   fresh(kNeedBiasB, p.bias_B)};
  const bool wants_g = needs & (kNeedA | kNeedBiasA | kNeedScaling), wants_rows = wants_g || (needs & kNeedX);
  OptTensor h, g;
  if ((needs & (kNeedB | kNeedScaling)) || (p.relu && wants_rows)) h = h_of(p, kept);
  const OptTensor gate = p.relu ? h : std::nullopt;
  LoraShape shape = shape_of(p, dy, gate);
  shape.backward = true, shape.outputs = needs & kNeedX;
  const LoraPlan plan = plan_lora(shape);
  if (wants_rows) backward_rows(p, plan, shape, dy, gate, wants_g, needs & kNeedX, g, result.x);
  if (!(needs & ~kNeedX)) return result;

  LoraGrads q{};
  q.dtype = dtype_of(p.op, p.dtype);
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
  if (few_rows_grads(shape)) {
    few_rows_grads(q, wants_rows && plan.few(), stream_of(p.x));
    q.dA = q.dB = nullptr;
  } else if (lora_grads_sm90(shape) && (p.ids || static_cast<int64_t>(asks.size()) == p.T) && (q.dA || q.dB) &&
             aligned(q.x) && aligned(q.h) && aligned(q.g)) {
    lora_grads_sm90(q, wants_rows && (plan.few() || plan.hopper()), stream_of(p.x));
    q.dA = q.dB = nullptr;
  }
  if (!q.dA && !q.dB && !q.dbias_A && !q.dbias_B && !q.dscaling) return result;
  lora_grads(q, Workspace(p.x), stream_of(p.x));
  return result;
}

// The adapters of a sum from the first to the last that asks.
Inputs asking(const Inputs& p, const Sizes& asks) {
  const int64_t first = asks.front(), count = asks.back() + 1 - first;
  Inputs some = p;
  if (count == p.T) return some;
  some.T = count;
  some.lora_A = part(p.lora_A, 0, first, count), some.lora_B = part(p.lora_B, 0, first, count);
  some.scaling = part(p.scaling, 0, first, count);
  if (p.times) some.times = part(*p.times, 0, first, count);
  if (p.ranks) some.ranks = part(*p.ranks, 0, first, count);
  return some;
}

// dA and dB of all of `some`, from their h and g; the others' are zero.
void gradients_by_ranks(const Inputs& p, Inputs some, const Tensor& dy, int64_t first, int64_t needs,
                        Gradients& result) {
  some.weight.reset();
  if (some.times) some = some.folded();
  Sizes every(some.T);
  std::iota(every.begin(), every.end(), 0);
  const Gradients g = low_rank_gradients(some, dy, {}, every, needs);
  const auto put = [&](int64_t bit, OptTensor& to, const Tensor& like, const OptTensor& from) {
    if (!(needs & bit)) return;
    to = some.T == p.T ? *from : torch::stable::new_zeros(like, like.sizes());
    if (some.T == p.T) return;
    Tensor target = part(*to, 0, first, some.T);
    torch::stable::copy_(target, *from);
  };
  put(kNeedA, result.lora_A, p.lora_A, g.lora_A);
  put(kNeedB, result.lora_B, p.lora_B, g.lora_B);
}

// Of all that asks, by torch's products: dW, then those with it.
void gradients_by_products(const Inputs& p, const Inputs& some, const Tensor& dy, DenseGrads q, int64_t needs,
                           Gradients& result) {
  const bool scales = needs & kNeedScaling;
  const int64_t rank = q.padded_r, parts = dense_parts(rank, p.out);
  const Tensor dW = torch::stable::matmul(torch::stable::transpose(dy, 0, 1), p.x);
  const Inputs& most = scales ? p : some;
  OptTensor U, V, B, sums;
  if (scales) B = B_of(p);
  if (needs & kNeedA) {
    const Tensor rows = some.T == 1 ? torch::stable::transpose(torch::stable::view(B_of(some), {p.out, rank}), 0, 1)
                                    : torch::stable::view(B_transposed(some), {some.T * rank, p.out});
    U = torch::stable::matmul(rows, dW);
  }
  if ((needs & kNeedB) || scales) {
    const Tensor A = torch::stable::view(A_of(most), {most.T * rank, p.in});
    V = torch::stable::matmul(dW, torch::stable::transpose(A, 0, 1));
    q.width_V = most.T * rank;
  }
  if (scales) sums = allocate(p.scaling, parts == 1 ? Sizes{p.T} : Sizes{p.T, parts});
  q.U = pointer(U), q.V = pointer(V), q.B = pointer(B);
  q.dscaling = static_cast<float*>(out_pointer(sums));
  dense_grads(q, stream_of(p.x));
  if (!scales) return;
  const Sizes along{1};
  result.scaling =
      parts == 1 ? *sums : torch::stable::sum(*sums, torch::headeronly::IntHeaderOnlyArrayRef(along), false);
}

// Of the sum, by way of the merged weight.
Gradients dense_gradients(const Inputs& p, const Tensor& dy, const OptTensor& kept, const Sizes& asks, int64_t needs) {
  Gradients result;
  if (needs & kNeedX) {
    const bool given = kept && kept->numel() > 0;
    if (given) {
      check_shape(p.op, "kept", *kept, {p.out, p.in}, p.x);
      check_dtype(p.op, "kept", *kept, p.dtype);
    }
    result.x = compact(torch::stable::matmul(dy, given ? *kept : merge(p)));
  }
  if (!(needs & ~kNeedX)) return result;

  const bool scales = needs & kNeedScaling, factors = needs & (kNeedA | kNeedB);
  const Inputs some = factors ? asking(p, asks) : p;
  const bool in_a_row = !factors || some.T == static_cast<int64_t>(asks.size());
  const int64_t rank = padded_rank(p.r);
  const bool own = in_a_row && (scales || !padded(p)) && aligned(pointer(p.x)) &&
                   dense_on_hopper(shape_of(p, dy, {}), factors ? some.T * rank : 0, scales);
  if (!own && !scales && in_a_row && some.T * p.r <= lora_plan::kDenseRank) {  // cost less than dW
    gradients_by_ranks(p, some, dy, asks.front(), needs & ~kNeedX, result);
    return result;
  }

  if (needs & kNeedA) result.lora_A = allocate(p.lora_A, p.lora_A.sizes());
  if (needs & kNeedB) result.lora_B = allocate(p.lora_B, p.lora_B.sizes());
  DenseGrads q{};
  q.dtype = dtype_of(p.op, p.dtype);
  q.T = p.T, q.r = p.r, q.padded_r = rank, q.in = p.in, q.out = p.out;
  q.scaling = data<float>(p.scaling), q.times = p.times ? data<float>(*p.times) : nullptr;
  if (factors) q.adapters = asks;
  q.dA = out_pointer(result.lora_A), q.dB = out_pointer(result.lora_B);
  if (!own) {
    gradients_by_products(p, some, dy, q, needs, result);
    return result;
  }
  const Tensor A = A_of(p), B = B_of(p);
  if (scales) result.scaling = allocate(p.scaling, p.scaling.sizes());
  q.B = pointer(B), q.dscaling = static_cast<float*>(out_pointer(result.scaling));
  dense_grads_sm90(q, {p.M, pointer(p.x), pointer(dy), pointer(A)}, Workspace(p.x), stream_of(p.x));
  return result;
}

// --- the operators ---------------------------------------------------------------------------------------------------

struct Cuda {
  static std::tuple<Tensor, Tensor> forward(const Inputs& p, const OptTensor& base, const OptInts& given_slices,
                                            bool keep) {
    check_served(p);
    const torch::stable::accelerator::DeviceGuard guard(p.x.get_device_index());
    const bool slabs = p.family == Family::all;
    if (empty(p)) {
      const Tensor y = slabs      ? torch::stable::new_zeros(p.x, {p.T, p.M, p.out})
                       : p.weight ? *frozen(p, base)
                       : base     ? torch::stable::clone(*base)
                                  : torch::stable::new_zeros(p.x, {p.M, p.out});
      if (!keep) return {y, none_like(p.x)};
      const Tensor like = dense(p) ? *p.weight : new_ranks(p);
      return {y, torch::stable::new_zeros(like, like.sizes())};
    }

    LoraShape shape = shape_of(p, p.x, base);
    shape.keep = keep, shape.slices = usable(p, given_slices);
    const LoraPlan plan = plan_lora(shape);
    if (plan.merged()) {
      const Tensor merged = merge(p);
      return {plus(linear(p.x, merged, p.bias), base), keep ? merged : none_like(p.x)};
    }
    if (p.times) return forward(p.folded(), base, given_slices, keep);
    OptTensor h;
    if (keep) h = new_ranks(p);
    Tensor y;
    if (plan.fused()) {
      y = fused_forward(p, plan, shape, base, h);
    } else if (runs_beside(p, plan)) {
      y = few_forward(p, base, h);
    } else {
      const OptTensor y0 = plan.whole() ? base : frozen(p, base);
      y = slabs ? allocate(p.x, {p.T, p.M, p.out}) : p.weight && !plan.whole() ? *y0 : allocate(p.x, {p.M, p.out});
      add_low_rank(p, plan, shape, written(p, y0, y), h, keep);
    }
    return {y, keep ? *h : none_like(p.x)};
  }

  static void all_out(const Inputs& p, const OptTensor& base, const Tensor& out) {
    check_served(p);
    if (empty(p)) return;  // as is `out`
    const torch::stable::accelerator::DeviceGuard guard(p.x.get_device_index());
    LoraShape shape = shape_of(p, p.x, base);
    shape.aligned = shape.aligned && aligned(pointer(out));
    const LoraPlan plan = plan_lora(shape);
    const OptTensor y0 = plan.whole() ? base : frozen(p, base);
    OptTensor h;
    add_low_rank(p, plan, shape, written(p, y0, out), h, false);
  }

  static void in_place(const Inputs& p, const Tensor& y) {
    check_served(p);
    if (empty(p)) return;
    const torch::stable::accelerator::DeviceGuard guard(p.x.get_device_index());
    const int64_t d = y.dim();
    LowRank to{};
    to.y = y.mutable_data_ptr(), to.ldy = p.M > 1 ? y.stride(d - 2) : p.out, to.y_slab = d == 3 ? y.stride(0) : 0;
    to.y0 = to.y, to.ldy0 = to.ldy, to.y0_slab = to.y_slab;
    LoraShape shape = shape_of(p, p.x, y);
    shape.in_place = true, shape.ld = to.ldy;
    OptTensor h;
    add_low_rank(p, plan_lora(shape), shape, to, h, false);
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
      const auto found = [&](const Inputs& q) {
        return dense(p) ? dense_gradients(q, dy, kept, asks, compute) : low_rank_gradients(q, dy, kept, asks, compute);
      };
      g = p.times && !dense(p) ? through_product(p, found) : found(p);
    }
    const auto zeros = [&](int64_t bit, OptTensor& t, const OptTensor& like) {
      if (needs & ~compute & bit) t = torch::stable::new_zeros(*like, like->sizes());
    };
    zeros(kNeedA, g.lora_A, p.lora_A);
    zeros(kNeedB, g.lora_B, p.lora_B);
    zeros(kNeedScaling, g.scaling, p.scaling);
    zeros(kNeedBiasA, g.bias_A, p.bias_A);
    zeros(kNeedBiasB, g.bias_B, p.bias_B);
    return g;
  }
};

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) { plora::LoraOperators<plora::cuda::Cuda>::add_to(m); }
