// The three low-rank families on the CPU, forward; what they share with backward is in lora_rows.h and lora_factors.h.
//
// All three are one loop over chunks of rows. A chunk's x stays in cache through the frozen product, h = act(x A^T + a)
// and y += h (s B)^T, and its y from the frozen product until h is there. A sum whose rows outnumber its widths goes
// through the merged weight instead.

#include <torch/csrc/stable/library.h>

#include "frozen.h"
#include "lora_grads.h"
#include "lora_rows.h"
#include "lora_tiles.h"

namespace plora::cpu {
namespace {

constexpr int64_t kRows = 24;        // of a chunk: x and y of 768 float32 columns take 150 kB of the second-level cache
constexpr int64_t kFrozenRows = 96;  // with the frozen product, whose panels every chunk reads again: where there are
                                     // too few for all threads, smaller chunks cost less than idle threads
constexpr int64_t kTiledRows = 128;  // in matrix registers: x and y of bfloat16 in the second-level cache
constexpr size_t kStreamBytes = size_t{32} << 20;  // outputs of this size pass by the caches

// What y holds before the low-rank part: any sum of these, or zero.
template <typename scalar>
struct Output {
  scalar* y;
  int64_t row_stride, slab_stride;  // of y; slab t of the family `all`
  bool in_place = false;            // what y holds already
  const scalar* base = nullptr;     // [M, out]
  const scalar* linear = nullptr;   // [M, out], by torch
  const scalar* bias = nullptr;     // [out], with the frozen product made here
};

// to += from
template <typename scalar, typename acc>
void add(const scalar* from, int64_t n, acc* to) {
  for (int64_t k = 0; k < n; ++k) to[k] += static_cast<acc>(from[k]);
}

template <typename scalar, typename acc = acc_type<scalar>>
class Forward {
 public:
  Forward(const Inputs& p, const Output<scalar>& o, bool own) : p_(p), o_(o), order_(p), merged_(merges(p)) {
    streams_ = p.family == Family::all && !o.in_place && p.T * p.M * p.out * sizeof(scalar) > kStreamBytes;
    tiled_ =
        std::is_same_v<scalar, BFloat16> && tiles() && o.in_place + (o.base != nullptr) + (o.linear != nullptr) <= 1;
    const int orders = tiled_ ? 0 : !merged_ ? kBT | kAT : own ? kBT | kA : 0;
    factors_ = Factors<acc>::template of<scalar>(p, order_.used, orders);
    if constexpr (std::is_same_v<scalar, acc>)
      if (own) {
        const Adapter<acc> all = factors_.all();
        panels_ = Panels<acc>::transposed(data<acc>(*p.weight), p.out, p.in, merged_ ? &all : nullptr);
      }
    if constexpr (std::is_same_v<scalar, BFloat16>)
      if (tiled_) tiled_factors_ = TiledFactors(p, factors_, kAT | kBT);
  }

  void run() {
    const int64_t most = tiled_ ? kTiledRows : panels_ ? kFrozenRows : kRows;
    const int64_t least = panels_ ? kRows : most;
    const int64_t parts = std::min<int64_t>(torch::stable::get_num_threads(), (p_.M + least - 1) / least);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      Local local(p_);
      for (const Chunk& c : order_.chunks(most, p_.M * begin / parts, p_.M * end / parts))
        if constexpr (std::is_same_v<scalar, BFloat16>)
          tiled_ ? in_tiles(c, local) : one(c, local);
        else
          one(c, local);
    });
  }

 private:
  struct Local {  // of a thread
    Rows<scalar, acc> x;
    Scratch<acc> h, base, y;
    Rows<scalar, scalar> bits_of_x;
    Scratch<uint16_t> h_tiles;
    explicit Local(const Inputs& p) : x(data<scalar>(p.x), p.in), bits_of_x(data<scalar>(p.x), p.in) {}
  };

  const Inputs& p_;
  const Output<scalar>& o_;
  Order order_;
  bool merged_, streams_, tiled_;
  Factors<acc> factors_;
  TiledFactors tiled_factors_;
  Panels<acc> panels_;

  scalar* y_row(int64_t slab, int64_t position) const {
    return o_.y + slab * o_.slab_stride + order_.row(position) * o_.row_stride;
  }

  // Rows of y as the products can write them: themselves, or null.
  acc* direct(const Chunk& c, int64_t slab) const {
    if constexpr (std::is_same_v<scalar, acc>)
      if (order_.consecutive(c.begin, c.end) && !streams_) return y_row(slab, c.begin);
    return nullptr;
  }

  void put(const acc* from, scalar* to) const {
    if constexpr (std::is_same_v<scalar, acc>)
      if (streams_) return gemm<acc>().stream(p_.out, from, to);
    convert(from, p_.out, to);
  }

  // y0 of a chunk but for what y holds: the frozen product, with h B^T if an adapter is given, then the given parts.
  // Returns where it lies.
  Block<acc> start(const Chunk& c, const Block<acc>& x, const acc* h, const Adapter<acc>& a, acc* to,
                   int64_t ld) const {
    const int64_t n = c.end - c.begin;
    if constexpr (std::is_same_v<scalar, acc>) {
      const acc* given = o_.base ? o_.base : o_.linear;  // one part alone may stay where it is
      if (given && !(o_.base && o_.linear) && !panels_ && order_.consecutive(c.begin, c.end))
        return {given + order_.row(c.begin) * p_.out, p_.out};
    }
    if (panels_) {
      if constexpr (std::is_same_v<scalar, acc>) panels_.product(n, x.data, x.ld, o_.bias, 0, to, ld, h, a.R, a.BT);
    } else if (o_.base || o_.linear) {
      for (int64_t i = 0; i < n; ++i) std::fill_n(to + i * ld, p_.out, acc(0));
    } else {
      return {nullptr, 0};
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = order_.row(c.begin + i);
      if (o_.linear) add(o_.linear + row * p_.out, p_.out, to + i * ld);
      if (o_.base) add(o_.base + row * p_.out, p_.out, to + i * ld);
    }
    return {to, ld};
  }

  void one(const Chunk& c, Local& local) const {
    const int64_t n = c.end - c.begin;
    const bool slabs = p_.family == Family::all;
    const bool adapts = c.t >= 0 && !merged_ && factors_.rank() > 0;
    if (!adapts && !slabs && o_.in_place && !panels_ && !o_.base && !o_.linear) return;  // y is right already
    Block<acc> x{};
    if (adapts || panels_) x = local.x.get(order_, c);

    acc* first = slabs ? nullptr : direct(c, 0);
    if (!first) first = local.base.grown(n * p_.out);
    const int64_t ld_first = first == local.base.data() ? p_.out : o_.row_stride;

    const Adapter<acc> none, a = !adapts ? none : order_.used.empty() ? factors_.all() : factors_.one(c.t);
    const acc* h = adapts ? shrink(p_, a, x.data, x.ld, n, local.h) : nullptr;
    const bool at_once = panels_ && !slabs;
    const Block<acc> y0 = start(c, x, h, at_once ? a : none, first, ld_first);
    for (int64_t slab = 0; slab < (slabs ? p_.T : 1); ++slab) {
      const Adapter<acc> up = at_once || !adapts ? none : slabs ? factors_.one(slab) : a;
      write(c, slab, y0, up.R > 0 ? h + (up.first - a.first) : nullptr, a.R, up, local);
    }
  }

  // The whole of a chunk in matrix registers: y = y0 + (s h) B^T, one unit of adapters after the other.
  void in_tiles(const Chunk& c, Local& local) const {
    const int64_t n = c.end - c.begin;
    const bool slabs = p_.family == Family::all, adapts = c.t >= 0 && !merged_ && factors_.rank() > 0;
    if (!adapts && o_.in_place) return;
    const Block<scalar> x = adapts ? local.bits_of_x.get(order_, c) : Block<scalar>{};
    const scalar* given = o_.base ? o_.base : o_.linear;
    std::array<const uint16_t*, kTiledRows> from;
    std::array<uint16_t*, kTiledRows> to;
    for (int64_t slab = 0; slab < (slabs ? p_.T : 1); ++slab) {
      for (int64_t i = 0; i < n; ++i) {
        to[i] = bits(y_row(slab, c.begin + i));
        from[i] = o_.in_place ? to[i] : given ? bits(given + order_.row(c.begin + i) * p_.out) : nullptr;
      }
      const int64_t unit = slabs ? slab : order_.used.empty() ? 0 : c.t;
      const Adapter<acc> none, a = !adapts ? none : slabs || !order_.used.empty() ? factors_.one(unit) : factors_.all();
      const uint16_t* h = nullptr;
      if (a.R > 0) {
        tiled_shrink(p_, a, tiled_factors_[unit], x, n, local.h.grown(n * a.R), a.R);
        h = left_tiles(n, a.R, local.h.data(), a.R, a.scale, local.h_tiles);
      }
      tiles()->add_product(n, p_.out, a.R, h, a.R > 0 ? tiled_factors_[unit].BT.data() : nullptr,
                           o_.in_place || given ? from.data() : nullptr, to.data());
    }
  }

  // y = y0 + h (s B)^T
  void write(const Chunk& c, int64_t slab, Block<acc> y0, const acc* h, int64_t ld_h, const Adapter<acc>& up,
             Local& local) const {
    const int64_t n = c.end - c.begin;
    acc* y = direct(c, slab);
    int64_t ld = o_.row_stride;
    const bool is_direct = y != nullptr;
    if (!y) y = local.y.grown(n * p_.out), ld = p_.out;
    if (o_.in_place) {
      if (is_direct && !y0.data) {
        y0 = {y, ld};
      } else {  // what y holds first
        for (int64_t i = 0; i < n; ++i) {
          if (!is_direct) convert(y_row(slab, c.begin + i), p_.out, y + i * ld);
          if (y0.data) add(y0.data + i * y0.ld, p_.out, y + i * ld);
        }
        y0 = {y, ld};
      }
    }
    if (up.R == 0 && y0.data == y) {
      // nothing to add
    } else {
      gemm<acc>().nn(n, p_.out, up.R, h, ld_h, 1, up.BT, p_.out, y0.data, y0.ld, y, ld);
    }
    if (!is_direct)
      for (int64_t i = 0; i < n; ++i) put(y + i * ld, y_row(slab, c.begin + i));
  }
};

template <typename scalar>
void forward(const Inputs& p, const Output<scalar>& o, bool own) {
  Forward<scalar>(p, o, own).run();
}

// y0 + the low-rank part into y, which is written for the first time; `layer` is torch's frozen product.
void write(const Inputs& p, const OptTensor& base, const OptTensor& layer, bool own, const Tensor& y) {
  dispatch(p.op, p.dtype, [&](auto tag) {
    using scalar = decltype(tag);
    Output<scalar> o{mutable_data<scalar>(y), p.out, p.M * p.out};
    o.in_place = layer && layer->const_data_ptr() == y.const_data_ptr();
    if (base) o.base = data<scalar>(*base);
    if (layer && !o.in_place) o.linear = data<scalar>(*layer);
    if (own && p.bias) o.bias = data<scalar>(*p.bias);
    forward(p, o, own);
  });
}

OptTensor torch_product(const Inputs& p, bool own) {
  if (!p.weight || own) return std::nullopt;
  return linear(p.x, merges(p) ? merged(p) : *p.weight, p.bias);
}

struct Cpu {
  static std::tuple<Tensor, Tensor> forward(const Inputs& p, const OptTensor& base, const OptInts&, bool) {
    if (p.times) return forward(p.folded(), base, {}, false);
    const bool own = p.weight && own_frozen_product(p), slabs = p.family == Family::all;
    const OptTensor layer = torch_product(p, own);
    if (layer && merges(p) && !base) return {*layer, none_like(p.x)};
    const bool in_place = layer && !slabs;  // one output per row: the layer's output becomes y
    const Tensor y = in_place ? *layer : slabs ? allocate(p.x, {p.T, p.M, p.out}) : allocate(p.x, {p.M, p.out});
    if (!in_place) large_pages(y.mutable_data_ptr(), y.numel() * y.element_size());
    write(p, base, layer, own, y);
    return {y, none_like(p.x)};
  }

  static void in_place(const Inputs& p, const Tensor& y) {
    const int64_t d = y.dim();
    dispatch(p.op, p.dtype, [&](auto tag) {
      using scalar = decltype(tag);
      const Output<scalar> o{mutable_data<scalar>(y), y.stride(d - 2), d == 3 ? y.stride(0) : 0, true};
      cpu::forward(p, o, false);
    });
  }

  static void all_out(const Inputs& p, const OptTensor& base, const Tensor& out) {
    const bool own = p.weight && own_frozen_product(p);
    write(p, base, torch_product(p, own), own, out);
  }

  static Gradients backward(const Inputs& p, const Tensor& dy, const OptTensor&, const OptInts& trainable,
                            int64_t needs) {
    const auto found = [&](const Inputs& q) { return lora_gradients(q, dy, trainable, needs); };
    return p.times ? through_product(p, found) : found(p);
  }
};

}  // namespace
}  // namespace plora::cpu

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CPU, m) { plora::LoraOperators<plora::cpu::Cpu>::add_to(m); }
