// The three low-rank families on the CPU, backward: one pass over x and dy.
//
// With g = dy B, dh = s g where act passes it on, and h again from x: dx = dy W + dh A, dA = dh^T x, dB = (s h)^T dy,
// ds = sum of g and h. The rows are cut into tasks by their number alone, each with sums of its own, which are then
// added in order: the same bits for any number of threads.

#include "lora_grads.h"

#include <cstring>

#include "frozen.h"
#include "lora_rows.h"
#include "lora_tiles.h"

namespace plora::cpu {
namespace {

constexpr int64_t kRows = 64;                      // worked on at a time: x and dy of 768 float32 columns take 400 kB
constexpr int64_t kTaskRows = 128, kTasks = 64;    // a task has so many rows or more; there are about so many or fewer
constexpr int64_t kTaskBytes = int64_t{32} << 20;  // what the sums of all tasks may take
constexpr int64_t kSlab = 64;                      // columns that a thread adds up over the tasks

// Ranks [begin, end) of Factors, of adapter t (and those that follow it), that get gradients: at row `at` of the sums
// of the tasks [first, last).
struct Run {
  int64_t t, begin, end, at, first, last;
};

template <typename scalar, typename acc = acc_type<scalar>>
class Backward {
 public:
  Backward(const Inputs& p, const Tensor& dy, const OptInts& trainable, int64_t needs, const Gradients& g, bool own)
      : p_(p), needs_(needs), g_(g), dy_(data<scalar>(dy)), order_(p), merged_(merges(p)) {
    wants_A_ = needs & (kNeedA | kNeedBiasA), wants_B_ = needs & (kNeedB | kNeedBiasB);
    wants_s_ = needs & kNeedScaling, wants_x_ = needs & kNeedX;
    wants_dh_ = wants_A_ || (wants_x_ && !merged_);
    wants_h_ = wants_B_ || wants_s_ || (p.relu && wants_dh_);
    int orders = 0;
    if (wants_x_ && merged_ && own) orders |= kA | kBT;
    if (wants_x_ && !merged_) orders |= kA;
    if (wants_h_) orders |= kAT;
    if (wants_dh_ || wants_s_) orders |= kB;
    factors_ = Factors<acc>::template of<scalar>(p, order_.used, tiled_ ? 0 : orders);
    if constexpr (kBits)
      if (tiled_) tiled_factors_ = TiledFactors(p, factors_, orders);
    if constexpr (std::is_same_v<scalar, acc>)
      if (own && wants_x_) {
        const Adapter<acc> all = factors_.all();
        panels_ = Panels<acc>::straight(data<acc>(*p.weight), p.out, p.in, merged_ ? &all : nullptr);
      }
    plan(trainable);
  }

  void run() {
    torch::stable::parallel_for(0, static_cast<int64_t>(tasks_.size()), 1, [&](int64_t begin, int64_t end) {
      Local local(p_, dy_);
      for (int64_t task = begin; task < end; ++task) {
        const Chunk& c = tasks_[task];
        for (int64_t i = c.begin; i < c.end; i += kRows)
          if constexpr (kBits)
            tiled_ ? in_tiles({i, std::min(i + kRows, c.end), c.t}, task, i == c.begin, local)
                   : rows({i, std::min(i + kRows, c.end), c.t}, task, i == c.begin, local);
          else
            rows({i, std::min(i + kRows, c.end), c.t}, task, i == c.begin, local);
      }
    });
    if (needs_ & kNeedA)
      add_up(dA_, p_.in, [&](auto row, int64_t column, int64_t n, const acc* sum) {
        if (row.j >= 0) convert(sum, n, mutable_data<scalar>(*g_.lora_A) + (row.t * p_.r + row.j) * p_.in + column);
      });
    if (wants_B_)
      add_up(dBT_, p_.out, [&](auto row, int64_t column, int64_t n, const acc* sum) {
        if (row.j < 0) {
          if (needs_ & kNeedBiasB) convert(sum, n, mutable_data<scalar>(*g_.bias_B) + row.t * p_.out + column);
        } else if (needs_ & kNeedB) {
          scalar* to = mutable_data<scalar>(*g_.lora_B) + (row.t * p_.out + column) * p_.r + row.j;
          for (int64_t k = 0; k < n; ++k) to[k * p_.r] = static_cast<scalar>(sum[k]);
        }
      });
    numbers();
  }

 private:
  static constexpr bool kBits = std::is_same_v<scalar, BFloat16>;  // may go through matrix registers

  struct Local {  // of a thread
    Rows<scalar, acc> x, dy;
    Scratch<acc> h, g, dx, total;
    Rows<scalar, scalar> bits_of_x, bits_of_dy;
    Scratch<uint16_t> dh_tiles;
    Local(const Inputs& p, const scalar* dy)
        : x(data<scalar>(p.x), p.in), dy(dy, p.out), bits_of_x(data<scalar>(p.x), p.in), bits_of_dy(dy, p.out) {}
  };

  const Inputs& p_;
  int64_t needs_;
  const Gradients& g_;
  const scalar* dy_;
  Order order_;
  bool merged_, wants_A_, wants_B_, wants_s_, wants_x_, wants_dh_, wants_h_;
  bool tiled_ = kBits && tiles();
  Factors<acc> factors_;
  TiledFactors tiled_factors_;
  Panels<acc> panels_;
  std::vector<Chunk> tasks_;
  std::vector<Run> runs_;
  int64_t width_ = 0;         // the most ranks that get gradients in a task
  Scratch<acc> dA_, dBT_;     // by task: [width, in] and [width, out]
  int64_t ranks_ = 0;         // the most ranks that a row meets
  std::vector<double> sums_;  // by task and rank: of dh and of g h

  bool slabs() const { return p_.family == Family::all; }
  bool indexed() const { return p_.family == Family::indexed; }
  Adapter<acc> adapter(int64_t t) const { return indexed() ? factors_.one(t) : factors_.all(); }

  void plan(const OptInts& trainable) {
    std::vector<char> asks(p_.T, !trainable && (wants_A_ || wants_B_));
    if (trainable && (wants_A_ || wants_B_))
      for (int64_t t : *trainable) asks[t] = 1;
    const auto& start = factors_.start;
    for (int64_t t = 0; t < p_.T; ++t) {
      const int64_t R = start[t + 1] - start[t];
      ranks_ = indexed() ? std::max(ranks_, R) : start[t + 1];
      if (!asks[t] || R == 0) continue;
      const bool goes_on = p_.family == Family::sum && !runs_.empty() && runs_.back().end == start[t];
      if (goes_on)
        runs_.back().end = start[t + 1];
      else
        runs_.push_back({t, start[t], start[t + 1], indexed() ? 0 : width_, 0, 0});
      width_ = indexed() ? std::max(width_, R) : width_ + R;
    }
    const int64_t bytes = std::max<int64_t>(1, width_ * (p_.in + p_.out) * static_cast<int64_t>(sizeof(acc)));
    const int64_t most = std::clamp<int64_t>(kTaskBytes / bytes, 4, kTasks);
    tasks_ = order_.chunks(std::max(kTaskRows, (p_.M + most - 1) / most));
    const int64_t count = static_cast<int64_t>(tasks_.size());
    for (Run& run : runs_) {
      const auto belongs = [&](const Chunk& c) { return indexed() ? c.t == run.t : c.t >= 0; };
      while (run.first < count && !belongs(tasks_[run.first])) ++run.first;
      for (run.last = run.first; run.last < count && belongs(tasks_[run.last]);) ++run.last;
    }
    if (wants_A_) dA_ = Scratch<acc>(count * width_ * p_.in);
    if (wants_B_) dBT_ = Scratch<acc>(count * width_ * p_.out);
    sums_.assign(2 * count * ranks_, 0);
  }

  // Rows that share their adapters; `fresh` ones begin the sums of a task.
  void rows(const Chunk& c, int64_t task, bool fresh, Local& local) {
    const int64_t n = c.end - c.begin;
    const Adapter<acc> a = c.t < 0 ? Adapter<acc>{} : adapter(c.t);
    acc* g = nullptr;
    if (a.R > 0) {
      Block<acc> x{};
      if (wants_h_ || wants_A_) x = local.x.get(order_, c);
      acc* h = wants_h_ ? shrink(p_, a, x.data, x.ld, n, local.h) : nullptr;
      if (wants_dh_ || wants_s_) g = from_dy(c, a, local);
      gate(n, a, g, h, task);
      if (wants_A_)
        for (const Run& run : runs_)
          if (meets(run, c, task)) accumulate(run, n, g, a, x, p_.in, dA_.data() + task * width_ * p_.in, fresh);
      if (wants_B_)
        for (const Run& run : runs_) {
          if (!meets(run, c, task)) continue;
          const int64_t slab = slabs() ? factors_.rows[run.begin].t : 0;
          const Block<acc> dy = local.dy.get(order_, c, slab * p_.M);
          accumulate(run, n, h, a, dy, p_.out, dBT_.data() + task * width_ * p_.out, fresh);
        }
    }
    if (wants_x_) to_x(c, a, g, local);
  }

  // The same in matrix registers; h, dh and what they meet are bfloat16, all sums float32.
  void in_tiles(const Chunk& c, int64_t task, bool fresh, Local& local) {
    const int64_t n = c.end - c.begin, units = slabs() ? p_.T : 1;
    const Adapter<acc> a = c.t < 0 ? Adapter<acc>{} : adapter(c.t);
    acc *g = nullptr, *h = nullptr;
    if (a.R > 0) {
      Block<scalar> x{};
      if (wants_h_ || wants_A_) x = local.bits_of_x.get(order_, c);
      if (wants_h_) h = local.h.grown(n * a.R);
      if (wants_dh_ || wants_s_) g = local.g.grown(n * a.R);
      for (int64_t i = 0; i < units; ++i) {
        const int64_t unit = indexed() ? c.t : i;
        const Adapter<acc> one = slabs() ? factors_.one(unit) : a;
        const int64_t at = one.first - a.first;
        if (h) tiled_shrink(p_, one, tiled_factors_[unit], x, n, h + at, a.R);
        if (!g) continue;
        const Block<scalar> dy = local.bits_of_dy.get(order_, c, i * p_.M);
        tiles()->product(n, one.R, p_.out, bits(dy.data), dy.ld, tiled_factors_[unit].B.data(), g + at, a.R);
      }
      gate(n, a, g, h, task);
      const auto sum = [&](const Run& run, const acc* left, const Block<scalar>& right, int64_t N, acc* sums) {
        tiles()->accumulate(n, run.end - run.begin, N, left + (run.begin - a.first), a.R, bits(right.data), right.ld,
                            sums + (task * width_ + run.at) * N, fresh);
      };
      for (const Run& run : runs_) {
        if (!meets(run, c, task)) continue;
        if (wants_A_) sum(run, g, x, p_.in, dA_.data());
        const int64_t slab = slabs() ? factors_.rows[run.begin].t : 0;
        if (wants_B_) sum(run, h, local.bits_of_dy.get(order_, c, slab * p_.M), p_.out, dBT_.data());
      }
    }
    if (!wants_x_ || (p_.weight && a.R == 0)) return;
    std::array<uint16_t*, kRows> dx;
    std::array<const uint16_t*, kRows> frozen;  // its own content: torch made it
    for (int64_t i = 0; i < n; ++i)
      frozen[i] = dx[i] = bits(mutable_data<scalar>(*g_.x)) + order_.row(c.begin + i) * p_.in;
    const uint16_t* dh = a.R > 0 ? left_tiles(n, a.R, g, a.R, nullptr, local.dh_tiles) : nullptr;
    tiles()->add_product(n, p_.in, a.R, dh, a.R > 0 ? tiled_factors_[indexed() ? c.t : 0].A.data() : nullptr,
                         p_.weight ? frozen.data() : nullptr, dx.data());
  }

  static bool meets(const Run& run, const Chunk& c, int64_t task) {
    return c.t >= 0 && run.first <= task && task < run.last;
  }

  // g[n, R] = dy B, of each adapter with its own dy
  acc* from_dy(const Chunk& c, const Adapter<acc>& a, Local& local) const {
    const int64_t n = c.end - c.begin;
    acc* g = local.g.grown(n * a.R);
    for (int64_t t = 0; t < (slabs() ? p_.T : 1); ++t) {
      const Adapter<acc> one = slabs() ? factors_.one(t) : a;
      const Block<acc> dy = local.dy.get(order_, c, t * p_.M);
      gemm<acc>().nn(n, one.R, p_.out, dy.data, dy.ld, 1, one.B, one.ld, nullptr, 0, g + (one.first - a.first), a.R);
    }
    return g;
  }

  // g becomes dh, h becomes s h
  void gate(int64_t n, const Adapter<acc>& a, acc* g, acc* h, int64_t task) {
    double* sum_dh = sums_.data() + 2 * task * ranks_;
    double* sum_gh = sum_dh + ranks_;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < a.R; ++j) {
        const int64_t at = i * a.R + j;
        if (g) {
          if (wants_s_) sum_gh[j] += static_cast<double>(g[at]) * h[at];
          g[at] = p_.relu && h[at] <= 0 ? acc(0) : g[at] * a.scale[j];
          sum_dh[j] += g[at];
        }
        if (h) h[at] *= a.scale[j];
      }
  }

  // sum[run, N] += left[n, run]^T right[n, N]
  void accumulate(const Run& run, int64_t n, const acc* left, const Adapter<acc>& a, const Block<acc>& right, int64_t N,
                  acc* sums, bool fresh) const {
    acc* sum = sums + run.at * N;
    gemm<acc>().nn(run.end - run.begin, N, n, left + (run.begin - a.first), 1, a.R, right.data, right.ld,
                   fresh ? nullptr : sum, N, sum, N);
  }

  // dx = dy W + dh A
  void to_x(const Chunk& c, const Adapter<acc>& a, const acc* dh, Local& local) const {
    const int64_t n = c.end - c.begin;
    scalar* const dx = mutable_data<scalar>(*g_.x);
    const auto row = [&](int64_t i) { return dx + order_.row(c.begin + i) * p_.in; };
    acc* to = nullptr;
    if constexpr (std::is_same_v<scalar, acc>)
      if (order_.consecutive(c.begin, c.end)) to = row(0);
    const bool is_direct = to != nullptr;
    if (!is_direct) to = local.dx.grown(n * p_.in);
    const acc* start = to;
    if (panels_) {
      const Block<acc> dy = slabs() ? total_dy(c, local) : local.dy.get(order_, c);
      panels_.product(n, dy.data, dy.ld, nullptr, 0, to, p_.in, dh, merged_ ? 0 : a.R, a.A);
    } else if (!p_.weight) {
      start = nullptr;
    } else if (!is_direct) {  // torch made the frozen part
      for (int64_t i = 0; i < n; ++i) convert(row(i), p_.in, to + i * p_.in);
    }
    const int64_t R = merged_ || panels_ ? 0 : a.R;
    if (R > 0 || !start) gemm<acc>().nn(n, p_.in, R, dh, R, 1, a.A, p_.in, start, p_.in, to, p_.in);
    if (!is_direct)
      for (int64_t i = 0; i < n; ++i) convert(to + i * p_.in, p_.in, row(i));
  }

  // The sum of dy over the adapters.
  Block<acc> total_dy(const Chunk& c, Local& local) const {
    const int64_t n = c.end - c.begin;
    acc* total = local.total.grown(n * p_.out);
    std::fill_n(total, n * p_.out, acc(0));
    for (int64_t t = 0; t < p_.T; ++t) {
      const Block<acc> dy = local.dy.get(order_, c, t * p_.M);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < p_.out; ++k) total[i * p_.out + k] += dy.data[i * dy.ld + k];
    }
    return {total, p_.out};
  }

  // put(row of Factors, column, n, sums): what the tasks hold of dA or dB^T, a run and a slab of columns at a time
  template <typename Put>
  void add_up(const Scratch<acc>& parts, int64_t columns, const Put& put) const {
    const int64_t slabs = (columns + kSlab - 1) / kSlab;
    torch::stable::parallel_for(0, static_cast<int64_t>(runs_.size()) * slabs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Run& run = runs_[i / slabs];
        const int64_t column = i % slabs * kSlab, n = std::min(kSlab, columns - column);
        for (int64_t j = run.begin; j < run.end; ++j) {
          acc sum[kSlab] = {};
          for (int64_t task = run.first; task < run.last; ++task) {
            const acc* part = parts.data() + (task * width_ + run.at + j - run.begin) * columns + column;
            for (int64_t k = 0; k < n; ++k) sum[k] += part[k];
          }
          put(factors_.rows[j], column, n, sum);
        }
      }
    });
  }

  // The gradients that are one number per rank or adapter.
  void numbers() const {
    if (!wants_s_ && !(needs_ & kNeedBiasA)) return;
    std::vector<double> dh(factors_.rank(), 0), ds(p_.T, 0);
    for (size_t task = 0; task < tasks_.size(); ++task) {
      if (tasks_[task].t < 0) continue;
      const Adapter<acc> a = adapter(tasks_[task].t);
      const double* sums = sums_.data() + 2 * task * ranks_;
      for (int64_t j = 0; j < a.R; ++j) {
        dh[a.first + j] += sums[j];
        ds[factors_.rows[a.first + j].t] += sums[ranks_ + j];
      }
    }
    if (wants_s_) std::copy(ds.begin(), ds.end(), mutable_data<acc>(*g_.scaling));
    if (!(needs_ & kNeedBiasA)) return;
    for (const Run& run : runs_)
      for (int64_t i = run.begin; i < run.end; ++i) {
        const auto [t, j] = factors_.rows[i];
        if (j >= 0) mutable_data<scalar>(*g_.bias_A)[t * p_.r + j] = static_cast<scalar>(static_cast<acc>(dh[i]));
      }
  }
};

}  // namespace

Gradients lora_gradients(const Inputs& p, const Tensor& dy, const OptInts& trainable, int64_t needs) {
  const bool own = p.weight && own_frozen_product(p);
  const auto zeros = [&](int64_t bit, const Tensor& like) -> OptTensor {
    if (!(needs & bit)) return std::nullopt;
    const Tensor t = allocate(like, like.sizes());
    if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size());
    return t;
  };
  OptTensor dx;
  if (needs & kNeedX) {
    if (p.weight && !own)
      dx = compact(
          torch::stable::matmul(p.family == Family::all ? sum_slabs(dy) : dy, merges(p) ? merged(p) : *p.weight));
    else
      dx = allocate(p.x, p.x.sizes());
    if (!p.weight || own) large_pages(dx->mutable_data_ptr(), dx->numel() * dx->element_size());
  }
  const Gradients g{dx,
                    zeros(kNeedA, p.lora_A),
                    zeros(kNeedB, p.lora_B),
                    zeros(kNeedScaling, p.scaling),
                    p.bias_A ? zeros(kNeedBiasA, *p.bias_A) : std::nullopt,
                    p.bias_B ? zeros(kNeedBiasB, *p.bias_B) : std::nullopt};
  dispatch(p.op, p.dtype, [&](auto tag) { Backward<decltype(tag)>(p, dy, trainable, needs, g, own).run(); });
  return g;
}

}  // namespace plora::cpu
