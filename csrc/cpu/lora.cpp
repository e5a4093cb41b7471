// The three low-rank families on the CPU (indexed, sum, all), forward and backward.
//
// All three are one loop over chunks of rows that share their adapters:
//   indexed: the rows of one id, gathered        -> one adapter, one output row per row of x
//   sum:     consecutive rows, all T adapters concatenated to one of rank T * r
//   all:     consecutive rows                    -> T adapters, T output rows per row of x
// A chunk's x stays in cache through h = act(x A^T + a) and y += s h B^T. The bias of the up projection is one more
// rank whose h is the constant 1. Backward stores s h and dh per row, then sums dA and dB over the rows in order, a
// slab of columns per thread: the same bits for any number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "../common/lora_inputs.h"
#include "dispatch.h"
#include "gemm.h"

namespace plora::cpu {
namespace {

constexpr int64_t kRows = 32;   // rows of a chunk: x and y of 768 float32 columns take 200 kB of L2
constexpr int64_t kSlab = 128;  // columns of dA and dB that one thread sums at a time

// The number of ranks of adapter t that are not padding.
int64_t rank_of(const Inputs& p, int64_t t) {
  if (!p.ranks) return p.r;
  const int64_t rank = data<int64_t>(*p.ranks)[t];
  STD_TORCH_CHECK(rank >= 0 && rank <= p.r, p.op, ": ranks[", t, "] must be between 0 and ", p.r, ", got ", rank);
  return rank;
}

// One adapter, or the concatenation of several, in the accumulation type.
template <typename acc>
struct Adapter {
  struct Row {
    int64_t t, j;  // adapter and rank of this row; j = -1: the row of the up projection's bias
  };
  std::vector<Row> rows;
  std::vector<acc> A, BT, bias, scale;  // [rank, in], [rank, out], [rank], [rank]

  int64_t rank() const { return static_cast<int64_t>(rows.size()); }
};

template <typename scalar, typename acc = acc_type<scalar>>
Adapter<acc> pack(const Inputs& p, int64_t first, int64_t last) {
  Adapter<acc> packed;
  for (int64_t t = first; t < last; ++t) {
    for (int64_t j = 0; j < rank_of(p, t); ++j) packed.rows.push_back({t, j});
    if (p.bias_B) packed.rows.push_back({t, -1});
  }
  const int64_t R = packed.rank();
  packed.A.resize(R * p.in);
  packed.BT.resize(R * p.out);
  packed.bias.resize(R);
  packed.scale.resize(R);
  const scalar* A = data<scalar>(p.lora_A);
  const scalar* B = data<scalar>(p.lora_B);
  for (int64_t i = 0; i < R; ++i) {
    const auto [t, j] = packed.rows[i];
    packed.scale[i] = data<acc>(p.scaling)[t];
    if (j < 0) {
      packed.bias[i] = 1;
      std::copy_n(data<scalar>(*p.bias_B) + t * p.out, p.out, &packed.BT[i * p.out]);
      continue;
    }
    if (p.bias_A) packed.bias[i] = static_cast<acc>(data<scalar>(*p.bias_A)[t * p.r + j]);
    std::copy_n(A + (t * p.r + j) * p.in, p.in, &packed.A[i * p.in]);
    for (int64_t o = 0; o < p.out; ++o) packed.BT[i * p.out + o] = static_cast<acc>(B[(t * p.out + o) * p.r + j]);
  }
  return packed;
}

// Rows order[begin, end) of x share the packed adapters [first, last).
struct Chunk {
  int64_t begin, end, first, last;
};

template <typename acc>
struct Work {
  std::vector<int64_t> order;  // empty: the rows as they come
  std::vector<Chunk> chunks;
  std::vector<Adapter<acc>> adapters;
  std::vector<std::pair<int64_t, int64_t>> span;  // positions in `order` of each packed adapter
  int64_t width = 0;                              // the largest packed rank

  int64_t row(int64_t position) const { return order.empty() ? position : order[position]; }
};

template <typename acc>
void cut(Work<acc>& work, int64_t begin, int64_t end, int64_t first, int64_t last) {
  for (int64_t i = begin; i < end; i += kRows) work.chunks.push_back({i, std::min(i + kRows, end), first, last});
}

template <typename scalar, typename acc = acc_type<scalar>>
Work<acc> plan(const Inputs& p) {
  Work<acc> work;
  if (p.family == Family::sum) {
    work.adapters.push_back(pack<scalar>(p, 0, p.T));
    work.span.assign(1, {0, p.M});
    cut(work, 0, p.M, 0, 1);
  } else if (p.family == Family::all) {
    for (int64_t t = 0; t < p.T; ++t) work.adapters.push_back(pack<scalar>(p, t, t + 1));
    work.span.assign(p.T, {0, p.M});
    cut(work, 0, p.M, 0, p.T);
  } else {  // a stable counting sort of the rows by id, -1 first
    const int64_t G = p.ids->size(0), rows_per_id = G ? p.M / G : 0;
    const int64_t* ids = data<int64_t>(*p.ids);
    std::vector<int64_t> start(p.T + 2, 0);  // the rows of id t are order[start[t + 1], start[t + 2])
    for (int64_t g = 0; g < G; ++g) {
      STD_TORCH_CHECK(ids[g] >= -1 && ids[g] < p.T, p.op, ": ids must be between -1 and ", p.T - 1, ", got ", ids[g],
                      " at position ", g);
      start[ids[g] + 2] += rows_per_id;
    }
    for (int64_t t = 1; t < p.T + 2; ++t) start[t] += start[t - 1];
    std::vector<int64_t> next(start.begin(), start.end());
    work.order.resize(p.M);
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = 0; i < rows_per_id; ++i) work.order[next[ids[g] + 1]++] = g * rows_per_id + i;
    work.adapters.resize(p.T);
    cut(work, 0, start[1], 0, 0);
    for (int64_t t = 0; t < p.T; ++t) {
      work.span.push_back({start[t + 1], start[t + 2]});
      if (start[t + 1] == start[t + 2]) continue;  // nobody selects it
      work.adapters[t] = pack<scalar>(p, t, t + 1);
      cut(work, start[t + 1], start[t + 2], t, t + 1);
    }
  }
  for (const auto& a : work.adapters) work.width = std::max(work.width, a.rank());
  return work;
}

// Rows of a matrix in the accumulation type: in place where nothing has to be moved, else gathered into `buffer`.
template <typename scalar, typename acc>
struct Rows {
  const scalar* source;
  int64_t stride;
  std::vector<acc> buffer;

  // columns [c, c + n) of the rows at positions [begin, end), shifted by `offset` rows; returns data and row stride
  std::pair<const acc*, int64_t> get(const Work<acc>& work, int64_t begin, int64_t end, int64_t c, int64_t n,
                                     int64_t offset = 0) {
    if constexpr (std::is_same_v<scalar, acc>)
      if (work.order.empty()) return {source + (offset + begin) * stride + c, stride};
    buffer.resize((end - begin) * n);
    for (int64_t i = begin; i < end; ++i)
      std::copy_n(source + (offset + work.row(i)) * stride + c, n, &buffer[(i - begin) * n]);
    return {buffer.data(), n};
  }
};

// h[n, rank] = act(x A^T + a)
template <typename acc>
void shrink(const Inputs& p, const Adapter<acc>& a, const acc* x, int64_t ldx, int64_t n, acc* h) {
  gemm<acc>().nt(n, a.rank(), p.in, x, ldx, a.A.data(), p.in, h, a.rank(), false);
  if (!p.bias_A && !p.bias_B && !p.relu) return;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < a.rank(); ++j) {
      acc& value = h[i * a.rank() + j];
      value += a.bias[j];
      if (p.relu && value < 0) value = 0;
    }
}

// What y holds before the low-rank part: nothing, or any of the base layer's output, a given base, and y itself.
template <typename scalar>
struct Output {
  scalar* y;
  int64_t row_stride, slab_stride;  // of y; slab t of the family `all`
  const scalar* linear = nullptr;   // [M, out]
  const scalar* base = nullptr;     // [M, out]
  bool in_place = false;
};

template <typename scalar, typename acc = acc_type<scalar>>
void add_low_rank(const Inputs& p, const Output<scalar>& o) {
  const Work<acc> work = plan<scalar>(p);
  torch::stable::parallel_for(0, static_cast<int64_t>(work.chunks.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<acc> h(kRows * work.width), low(kRows * p.out);
    Rows<scalar, acc> x{data<scalar>(p.x), p.in, {}};
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = work.chunks[c];
      const int64_t n = chunk.end - chunk.begin;
      const auto write = [&](int64_t slab) {
        for (int64_t i = 0; i < n; ++i) {
          const int64_t row = work.row(chunk.begin + i);
          scalar* y = o.y + slab * o.slab_stride + row * o.row_stride;
          acc* sum = &low[i * p.out];
          if (o.linear)
            for (int64_t k = 0; k < p.out; ++k) sum[k] += static_cast<acc>(o.linear[row * p.out + k]);
          if (o.base)
            for (int64_t k = 0; k < p.out; ++k) sum[k] += static_cast<acc>(o.base[row * p.out + k]);
          if (o.in_place)
            for (int64_t k = 0; k < p.out; ++k) sum[k] += static_cast<acc>(y[k]);
          for (int64_t k = 0; k < p.out; ++k) y[k] = static_cast<scalar>(sum[k]);
        }
      };
      if (chunk.first == chunk.last) {  // rows without an adapter
        if (p.family == Family::all || (o.in_place && !o.base)) continue;
        std::fill(low.begin(), low.end(), acc(0));
        write(0);
        continue;
      }
      const auto [rows, ldx] = x.get(work, chunk.begin, chunk.end, 0, p.in);
      for (int64_t t = chunk.first; t < chunk.last; ++t) {
        const Adapter<acc>& a = work.adapters[t];
        shrink(p, a, rows, ldx, n, h.data());
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < a.rank(); ++j) h[i * a.rank() + j] *= a.scale[j];
        gemm<acc>().nn(n, p.out, a.rank(), h.data(), a.rank(), 1, a.BT.data(), p.out, low.data(), p.out, false);
        write(p.family == Family::all ? t : 0);
      }
    }
  });
}

// Rows [begin, end) of a packed adapter whose factors get gradients.
struct Run {
  int64_t adapter, begin, end;
};

template <typename acc>
std::vector<Run> runs(const Work<acc>& work, int64_t T, const OptInts& trainable) {
  std::vector<char> asks(T, !trainable);
  if (trainable)
    for (int64_t t : *trainable) asks[t] = 1;
  std::vector<Run> result;
  for (int64_t a = 0; a < static_cast<int64_t>(work.adapters.size()); ++a) {
    const auto& rows = work.adapters[a].rows;
    for (int64_t i = 0; i < static_cast<int64_t>(rows.size()); ++i) {
      if (!asks[rows[i].t]) continue;
      if (!result.empty() && result.back().adapter == a && result.back().end == i)
        ++result.back().end;
      else
        result.push_back({a, i, i + 1});
    }
  }
  return result;
}

template <typename scalar, typename acc = acc_type<scalar>>
void add_gradients(const Inputs& p, const Tensor& grad, const OptInts& trainable, int64_t needs, const Gradients& g) {
  const Work<acc> work = plan<scalar>(p);
  const int64_t W = work.width, positions = (p.family == Family::all ? p.T : 1) * p.M;
  const bool wants_A = needs & (kNeedA | kNeedBiasA), wants_B = needs & (kNeedB | kNeedBiasB);
  const bool wants_h = wants_B || (needs & kNeedScaling) || p.relu;
  const auto position = [&](int64_t t, int64_t i) { return (p.family == Family::all ? t * p.M : 0) + i; };
  // per position and packed rank: dh, s h, and (dy B) h, which sums to the gradient of s
  std::vector<acc> dh(wants_A ? positions * W : 0), sh(wants_B ? positions * W : 0);
  std::vector<acc> ds(needs & kNeedScaling ? positions * W : 0);

  torch::stable::parallel_for(0, static_cast<int64_t>(work.chunks.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<acc> h(kRows * W), gB(kRows * W), dx(kRows * p.in);
    Rows<scalar, acc> x{data<scalar>(p.x), p.in, {}}, dy{data<scalar>(grad), p.out, {}};
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = work.chunks[c];
      const int64_t n = chunk.end - chunk.begin;
      std::fill(dx.begin(), dx.end(), acc(0));
      for (int64_t t = chunk.first; t < chunk.last; ++t) {
        const Adapter<acc>& a = work.adapters[t];
        const int64_t R = a.rank();
        const auto [dy_rows, ld] = dy.get(work, chunk.begin, chunk.end, 0, p.out, position(t, 0));
        gemm<acc>().nt(n, R, p.out, dy_rows, ld, a.BT.data(), p.out, gB.data(), R, false);
        if (wants_h) {
          const auto [x_rows, ldx] = x.get(work, chunk.begin, chunk.end, 0, p.in);
          shrink(p, a, x_rows, ldx, n, h.data());
        }
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = position(t, chunk.begin + i) * W;
          for (int64_t j = 0; j < R; ++j) {
            acc& gradient = gB[i * R + j];
            const acc value = wants_h ? h[i * R + j] : acc(0);
            if (needs & kNeedScaling) ds[at + j] = gradient * value;
            gradient = p.relu && !(value > 0) ? acc(0) : gradient * a.scale[j];
            if (wants_A) dh[at + j] = gradient;
            if (wants_B) sh[at + j] = value * a.scale[j];
          }
        }
        if (needs & kNeedX) gemm<acc>().nn(n, p.in, R, gB.data(), R, 1, a.A.data(), p.in, dx.data(), p.in, true);
      }
      if (!(needs & kNeedX)) continue;
      for (int64_t i = 0; i < n; ++i) {
        scalar* row = mutable_data<scalar>(g.x) + work.row(chunk.begin + i) * p.in;
        for (int64_t k = 0; k < p.in; ++k) row[k] = static_cast<scalar>(static_cast<acc>(row[k]) + dx[i * p.in + k]);
      }
    }
  });

  // dA = dh^T x and dB^T = (s h)^T dy, a run of ranks and a slab of columns at a time, over the rows in order
  const std::vector<Run> asking = runs(work, p.T, trainable);
  const auto reduce = [&](const std::vector<acc>& left, const scalar* right, int64_t columns, const auto& put) {
    const int64_t slabs = (columns + kSlab - 1) / kSlab;
    torch::stable::parallel_for(0, static_cast<int64_t>(asking.size()) * slabs, 1, [&](int64_t begin, int64_t end) {
      Rows<scalar, acc> rows{right, columns, {}};
      std::vector<acc> sum;
      for (int64_t task = begin; task < end; ++task) {
        const Run& run = asking[task / slabs];
        const int64_t column = task % slabs * kSlab, n = std::min(kSlab, columns - column), R = run.end - run.begin;
        sum.assign(R * n, 0);
        const auto [from, to] = work.span[run.adapter];
        for (int64_t i = from; i < to; i += kRows) {
          const int64_t last = std::min(i + kRows, to);
          const int64_t offset = right == data<scalar>(grad) ? position(run.adapter, 0) : 0;
          const auto [values, ld] = rows.get(work, i, last, column, n, offset);
          gemm<acc>().nn(R, n, last - i, &left[position(run.adapter, i) * W + run.begin], 1, W, values, ld, sum.data(),
                         n, true);
        }
        for (int64_t j = 0; j < R; ++j) put(work.adapters[run.adapter].rows[run.begin + j], column, n, &sum[j * n]);
      }
    });
  };
  if (needs & kNeedA)
    reduce(dh, data<scalar>(p.x), p.in, [&](auto row, int64_t column, int64_t n, const acc* sum) {
      if (row.j >= 0) std::copy_n(sum, n, mutable_data<scalar>(g.lora_A) + (row.t * p.r + row.j) * p.in + column);
    });
  if (wants_B)
    reduce(sh, data<scalar>(grad), p.out, [&](auto row, int64_t column, int64_t n, const acc* sum) {
      if (row.j < 0) {
        if (needs & kNeedBiasB) std::copy_n(sum, n, mutable_data<scalar>(g.bias_B) + row.t * p.out + column);
      } else if (needs & kNeedB) {
        scalar* to = mutable_data<scalar>(g.lora_B) + row.t * p.out * p.r + row.j;
        for (int64_t k = 0; k < n; ++k) to[(column + k) * p.r] = static_cast<scalar>(sum[k]);
      }
    });

  // the gradients that are one number per rank or adapter
  const auto column_sum = [&](const std::vector<acc>& values, int64_t a, int64_t j) {
    double sum = 0;
    for (int64_t i = work.span[a].first; i < work.span[a].second; ++i) sum += values[position(a, i) * W + j];
    return sum;
  };
  if (needs & kNeedBiasA)
    for (const Run& run : asking)
      for (int64_t i = run.begin; i < run.end; ++i) {
        const auto row = work.adapters[run.adapter].rows[i];
        if (row.j >= 0)
          mutable_data<scalar>(g.bias_A)[row.t * p.r + row.j] =
              static_cast<scalar>(static_cast<acc>(column_sum(dh, run.adapter, i)));
      }
  if (needs & kNeedScaling) {
    std::vector<double> total(p.T, 0);
    for (int64_t a = 0; a < static_cast<int64_t>(work.adapters.size()); ++a)
      for (int64_t i = 0; i < work.adapters[a].rank(); ++i) total[work.adapters[a].rows[i].t] += column_sum(ds, a, i);
    std::copy(total.begin(), total.end(), mutable_data<acc>(g.scaling));
  }
}

struct Cpu {
  static std::tuple<Tensor, Tensor> forward(const Inputs& p, const OptTensor& base, const OptInts&, bool) {
    OptTensor layer;
    if (p.weight) layer = linear(p.x, *p.weight, p.bias);
    const bool in_place = layer && p.family != Family::all;  // one output per row: the layer's output becomes y
    const Tensor y = in_place                  ? *layer
                     : p.family == Family::all ? torch::stable::new_empty(p.x, {p.T, p.M, p.out})
                                               : torch::stable::new_empty(p.x, {p.M, p.out});
    dispatch(p.op, p.x.scalar_type(), [&](auto tag) {
      using scalar = decltype(tag);
      add_low_rank<scalar>(
          p, {mutable_data<scalar>(y), p.out, p.M * p.out, layer && !in_place ? data<scalar>(*layer) : nullptr,
              base ? data<scalar>(*base) : nullptr, in_place});
    });
    return {y, none_like(p.x)};
  }

  static void in_place(const Inputs& p, const Tensor& y) {
    const int64_t d = y.dim();
    dispatch(p.op, p.x.scalar_type(), [&](auto tag) {
      using scalar = decltype(tag);
      add_low_rank<scalar>(
          p, {mutable_data<scalar>(y), y.stride(d - 2), d == 3 ? y.stride(0) : 0, nullptr, nullptr, true});
    });
  }

  static Gradients backward(const Inputs& p, const Tensor& dy, const OptTensor&, const OptInts& trainable,
                            int64_t needs) {
    const auto zeros = [&](int64_t bit, const Tensor& like) {
      return needs & bit ? torch::stable::new_zeros(like, like.sizes()) : none_like(like);
    };
    Tensor dx = none_like(p.x);
    if (needs & kNeedX) {
      if (p.weight)  // the frozen layer's part first, the low-rank part is added to it
        dx = compact(torch::stable::matmul(p.family == Family::all ? sum_slabs(dy) : dy, *p.weight));
      else
        dx = torch::stable::new_zeros(p.x, p.x.sizes());
    }
    Gradients g{dx,
                zeros(kNeedA, p.lora_A),
                zeros(kNeedB, p.lora_B),
                zeros(kNeedScaling, p.scaling),
                p.bias_A ? zeros(kNeedBiasA, *p.bias_A) : none_like(p.x),
                p.bias_B ? zeros(kNeedBiasB, *p.bias_B) : none_like(p.x)};
    dispatch(p.op, p.x.scalar_type(), [&](auto tag) { add_gradients<decltype(tag)>(p, dy, trainable, needs, g); });
    return g;
  }
};

}  // namespace
}  // namespace plora::cpu

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CPU, m) { plora::LoraOperators<plora::cpu::Cpu>::add_to(m); }
