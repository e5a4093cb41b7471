// The host code of the CUDA operators (cuda/lora/lora.cpp, factors.cpp) on CPU tensors: its kernels are loops here,
// written from what cuda/lora/kernels.h says of them, which refuse what the real ones could not take. So which kernels
// are called, with what, and what becomes of their memory is tested where there is no GPU
// (python_tests/test_cuda_host_code.py).
//
// The operators are called plora_host; calls() tells which kernels ran since it was last asked, capture() whether a
// graph is being captured. PLORA_CUDA_PATH=mma makes the GPU one without Hopper's kernels.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <set>
#include <string>

// The operators' own registrations, by another name.
static void define(torch::stable::detail::StableLibrary& m);
static void implement(torch::stable::detail::StableLibrary& m);
static void implement_factors(torch::stable::detail::StableLibrary& m);
STABLE_TORCH_LIBRARY(plora_host, m) { define(m); }
STABLE_TORCH_LIBRARY_IMPL(plora_host, CPU, m) {
  implement(m);
  implement_factors(m);
}
#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY(name, m) static void define(torch::stable::detail::StableLibrary& m)
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m) static void implement(torch::stable::detail::StableLibrary& m)

#include "../../cuda/lora/lora.cpp"
#include "../../schema.cpp"
#define implement implement_factors
#include "../../cuda/lora/factors.cpp"
#undef implement

namespace {

std::string g_calls;
bool g_captures = false;

}  // namespace

// What stands between the host code and a GPU, beside cuda_runtime.h. These symbols are this library's own
// (-Wl,-Bsymbolic).
extern "C" {

const char* calls() {
  static std::string asked;
  asked.swap(g_calls);
  g_calls.clear();
  return asked.c_str();
}

void capture(bool now) { g_captures = now; }

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
}

namespace plora::cuda {
namespace {

double get(Dtype dtype, const void* from, int64_t i) {
  double value = 0;
  dispatch_as<torch::headeronly::BFloat16, torch::headeronly::Half>(
      dtype, [&](auto tag) { value = static_cast<double>(static_cast<const decltype(tag)*>(from)[i]); });
  return value;
}

void put(Dtype dtype, void* to, int64_t i, double value) {
  dispatch_as<torch::headeronly::BFloat16, torch::headeronly::Half>(dtype, [&](auto tag) {
    static_cast<decltype(tag)*>(to)[i] = static_cast<decltype(tag)>(static_cast<float>(value));
  });
}

int chosen(const Rows& rows, int64_t m) {
  const int64_t id = rows.ids ? rows.ids[m / rows.rows_per_id] : 0;
  return id >= 0 && id < rows.T ? static_cast<int>(id) : -1;
}

// The adapters that act in the tile of row m, ascending.
std::vector<int> met(const Rows& rows, int64_t m) {
  std::set<int> all;
  if (rows.ids)
    for (int64_t i = m / 128 * 128; i < std::min(m / 128 * 128 + 128, rows.M); ++i) all.insert(chosen(rows, i));
  else
    for (int t = 0; t < rows.T; ++t) all.insert(t);
  all.erase(-1);
  return {all.begin(), all.end()};
}

// The halves of a low-rank part. `width`: columns of an adapter in p.h; `ranks`: how many are real.
void multiply(const LowRank& p, int64_t width, const int64_t* ranks) {
  const int64_t M = p.rows.M, T = p.rows.T, r = p.rows.r, each = p.rows.ids ? 1 : T;
  const auto limit = [&](int64_t t) { return ranks ? std::clamp<int64_t>(ranks[t], 0, r) : r; };
  std::vector<double> h(M * each * width);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t a = 0; a < each; ++a)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t t = p.rows.ids ? chosen(p.rows, m) : a, at = (m * each + a) * width + j;
        if (!p.x) h[at] = get(p.dtype, p.h, at);
        if (!p.x) continue;
        double sum = 0;
        if (t >= 0 && j < limit(t)) {
          for (int64_t k = 0; k < p.K; ++k)
            sum += get(p.dtype, p.x, t * p.x_slab + m * p.ldx + k) *
                   get(p.dtype, p.down, p.down_transposed ? (t * p.K + k) * r + j : (t * r + j) * p.K + k);
          if (p.bias_down) sum += get(p.dtype, p.bias_down, t * r + j);
          if ((p.relu && sum < 0) || (p.gate && get(p.dtype, p.gate, at) <= 0)) sum = 0;
        }
        h[at] = sum;
        if (p.h) put(p.dtype, p.h, at, sum);
      }
  if (p.scaled_h)
    for (int64_t m = 0; m < M; ++m) {
      const std::vector<int> all = met(p.rows, m);
      PLORA_CHECK(static_cast<int64_t>(all.size()) <= p.places, "more adapters than places");
      for (int64_t place = 0; place < p.places; ++place)
        for (int64_t j = 0; j < r; ++j) {
          const int t = place < static_cast<int64_t>(all.size()) ? all[place] : -1;
          const bool own = t >= 0 && (!p.rows.ids || t == chosen(p.rows, m));
          const int64_t at = (m * each + (p.rows.ids ? 0 : t)) * width + j;
          put(p.dtype, p.scaled_h, (m * p.places + place) * r + j, own ? p.scaling[t] * h[at] : 0);
        }
    }
  if (!p.y) return;
  for (int64_t slab = 0; slab < (p.y_slab ? T : 1); ++slab)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < p.N; ++n) {
        double sum = p.y0 ? get(p.dtype, p.y0, slab * p.y0_slab + m * p.ldy0 + n) : 0;
        for (int64_t a = 0; a < each; ++a) {
          const int64_t t = p.rows.ids ? chosen(p.rows, m) : a;
          if (t < 0 || (p.y_slab && t != slab)) continue;
          for (int64_t j = 0; j < limit(t); ++j)
            sum += p.scaling[t] * h[(m * each + a) * width + j] *
                   get(p.dtype, p.up, p.up_transposed ? (t * r + j) * p.N + n : (t * p.N + n) * r + j);
          if (p.bias_up) sum += p.scaling[t] * get(p.dtype, p.bias_up, t * p.N + n);
        }
        put(p.dtype, p.y, slab * p.y_slab + m * p.ldy + n, sum);
      }
}

void check_rows(const LowRank& p) {
  PLORA_CHECK(!mma_only() && p.x && !p.x_slab && p.dtype != Dtype::float32 && p.K > 0 && p.K % 8 == 0 &&
                  p.ldx % 8 == 0 && p.rows.r > 0 && p.rows.r % 8 == 0 && p.rows.T * p.rows.r < 1 << 25 &&
                  p.rows.T <= 1 << 15,
              "low_rank_sm90 refuses");
  PLORA_CHECK(!p.down_transposed || p.rows.ids || p.rows.T <= 1 || p.rows.r % 16 == 0, "low_rank_sm90: gaps");
  PLORA_CHECK(aligned(p.x, p.down, p.bias_down, p.gate, p.h, p.scaled_h), "low_rank_sm90: addresses");
}

}  // namespace

void low_rank(const LowRank& p, cudaStream_t) {
  if (p.rows.M == 0 || (!p.x && !p.y)) return;
  const int64_t width = p.rows.ids || (p.y && p.y_slab) ? p.rows.r : p.rows.T * p.rows.r;
  PLORA_CHECK(!p.scaled_h && !(p.x && p.down_transposed) && !(p.y && p.up_transposed), "low_rank refuses");
  PLORA_CHECK(p.h || !p.x || !p.y || width <= 512, "low_rank: no space for h");
  g_calls += p.x && p.y ? " low_rank" : p.x ? " low_rank_down" : " low_rank_up";
  multiply(p, p.rows.r, nullptr);
}

void low_rank_sm90(const LowRank& p, cudaStream_t) {
  check_rows(p);
  g_calls += p.down_transposed ? " rows_transposed" : " rows";
  LowRank down = p;
  down.y = nullptr;
  multiply(down, p.rows.r, nullptr);
}

void low_rank_add_sm90(const LowRank& p, cudaStream_t) {
  check_rows(p);
  PLORA_CHECK(p.y && p.scaled_h && !p.y_slab && p.N % 8 == 0 && p.ldy % 8 == 0 && p.ldy0 % 8 == 0 &&
                  aligned(p.y, p.y0, p.up, p.bias_up),
              "low_rank_add_sm90 refuses");
  g_calls += " add";
  multiply(p, p.rows.r, nullptr);
}

bool can_fork(cudaStream_t) { return g_captures; }
Fork::Fork(cudaStream_t from) : from_(from), to_(from), begin_(nullptr), end_(nullptr) { g_calls += " fork"; }
void Fork::join() { joined_ = true, g_calls += " join"; }
Fork::~Fork() {}

size_t few_rows_bytes(const LowRank&, bool) { return 64; }

FewSums few_rows_shrink(const LowRank& p, void* memory, bool beside, cudaStream_t) {
  PLORA_CHECK(memory && beside && p.rows.M <= 512 && p.x && p.down && p.up, "few_rows_shrink refuses");
  return {};
}

void few_rows_expand(const LowRank& p, void* memory, bool beside, cudaStream_t) {
  PLORA_CHECK(memory && beside && p.y == p.y0 && p.ldy == p.ldy0, "few_rows_expand refuses");
  PLORA_CHECK(g_calls.rfind(" join") + 1 > g_calls.rfind(" fork") + 1, "few_rows_expand: before the join");
  few_rows(p, [&](size_t) { return memory; }, nullptr);
}

void few_rows(const LowRank& p, const Allocator& workspace, cudaStream_t) {
  PLORA_CHECK(p.rows.M <= 512, "few_rows refuses");
  workspace(64);
  g_calls += " few_rows";
  multiply(p, padded_rank(p.rows.r), p.ranks);
}

void few_rows_sm90(const LowRank& p, const void* weight, const void* bias, const Allocator& workspace, cudaStream_t) {
  PLORA_CHECK(!mma_only() && p.dtype != Dtype::float32 && p.rows.M <= 64 && p.K % 8 == 0 && p.N % 8 == 0 &&
                  p.rows.r % 8 == 0 && aligned(p.x, p.down, p.up, weight, bias, p.y, p.y0, p.bias_up, p.gate),
              "few_rows_sm90 refuses");
  for (int64_t m = 0; m < p.rows.M; ++m)
    for (int64_t n = 0; n < p.N; ++n) {
      double sum = (bias ? get(p.dtype, bias, n) : 0) + (p.y0 ? get(p.dtype, p.y0, m * p.ldy0 + n) : 0);
      for (int64_t k = 0; k < p.K; ++k)
        sum += get(p.dtype, p.x, m * p.ldx + k) * get(p.dtype, weight, p.up_transposed ? k * p.N + n : n * p.K + k);
      put(p.dtype, p.y, m * p.ldy + n, sum);
    }
  workspace(64);
  g_calls += p.up_transposed ? " few_fused_transposed" : " few_fused";
  LowRank rest = p;
  rest.y0 = p.y, rest.ldy0 = p.ldy;
  multiply(rest, padded_rank(p.rows.r), p.ranks);
}

void expand(const LowRank& p, cudaStream_t) {
  PLORA_CHECK(p.dtype != Dtype::float32 && !p.rows.ids && p.y_slab % 8 == 0 && p.y0_slab == 0 && p.rows.r % 8 == 0 &&
                  p.N % 8 == 0 && p.ldy % 8 == 0 && p.ldy0 % 8 == 0 && aligned(p.y, p.y0, p.up, p.bias_up),
              "expand refuses");
  g_calls += " expand";
  LowRank up = p;
  up.x = nullptr;
  multiply(up, p.rows.r, nullptr);
}

void all_sm90(const LowRank& p, const void* weight, const void* bias, bool overlap, cudaStream_t) {
  PLORA_CHECK(!mma_only() && p.dtype != Dtype::float32 && !p.rows.ids && p.x && p.h && p.K > 0 && p.K % 8 == 0 &&
                  p.N % 8 == 0 && p.rows.r % 8 == 0 && p.ldy % 8 == 0 && p.y_slab % 8 == 0 && p.y0_slab == 0 &&
                  aligned(p.x, weight, bias, p.h, p.up, p.bias_up, p.y, p.y0),
              "all_sm90 refuses");
  PLORA_CHECK(!overlap || g_calls.substr(g_calls.rfind(' ') + 1) == "rows", "all_sm90: not after low_rank_sm90");
  for (int64_t t = 0; t < p.rows.T; ++t)
    for (int64_t m = 0; m < p.rows.M; ++m)
      for (int64_t n = 0; n < p.N; ++n) {
        double sum = p.y0 ? get(p.dtype, p.y0, m * p.ldy0 + n) : 0, low_rank = 0;
        if (bias) sum += get(p.dtype, bias, n);
        for (int64_t k = 0; k < p.K; ++k) sum += get(p.dtype, p.x, m * p.ldx + k) * get(p.dtype, weight, n * p.K + k);
        for (int64_t j = 0; j < p.rows.r; ++j)
          low_rank +=
              get(p.dtype, p.h, (m * p.rows.T + t) * p.rows.r + j) * get(p.dtype, p.up, (t * p.N + n) * p.rows.r + j);
        if (p.bias_up) low_rank += get(p.dtype, p.bias_up, t * p.N + n);
        put(p.dtype, p.y, t * p.y_slab + m * p.ldy + n, sum + p.scaling[t] * low_rank);
      }
  g_calls += overlap ? " all*" : " all";
}

void fused(const Fused& p, cudaStream_t) {
  const int64_t r = p.rows.r, each = p.rows.ids ? 1 : p.rows.T;
  PLORA_CHECK(!mma_only() && p.dtype != Dtype::float32 && p.K % 8 == 0 && p.N % 8 == 0 && r % 8 == 0 &&
                  aligned(p.x, p.weight, p.bias, p.y0, p.y, p.down, p.up, p.bias_down, p.bias_up, p.scaled_h),
              "fused refuses");
  PLORA_CHECK(!p.slots || p.down_transposed == p.up_transposed, "fused: one factor is transposed");
  PLORA_CHECK(p.slots ? p.down != nullptr : p.scaled_h != nullptr, "fused: no h");
  PLORA_CHECK(!p.gate || p.slots, "fused: only the loop knows a gate");
  PLORA_CHECK(p.slots != 2 || (p.slices.empty() && (p.N + 191) / 192 % 2 == 0), "fused: no pair");
  g_calls += p.slots == 2 ? " in_loop_of_two" : p.slots ? " in_loop" : " fused";
  if (p.up_transposed) g_calls += "_transposed";
  if (p.overlap) g_calls += "*";
  for (int64_t m = 0; m < p.rows.M; ++m) {
    const std::vector<int> all = met(p.rows, m);
    PLORA_CHECK(!p.slots || !p.slices.empty() || static_cast<int64_t>(all.size()) * ((r + 15) / 16) <= p.slots,
                "fused: more slots in a tile than the loop takes");
    std::vector<double> h(all.size() * r);
    for (size_t place = 0; place < all.size(); ++place)
      for (int64_t j = 0; j < r; ++j) {
        double& value = h[place * r + j];
        if (!p.slots) {
          value = get(p.dtype, p.scaled_h, (m * (p.rows.ids ? p.places : each) + static_cast<int64_t>(place)) * r + j);
        } else if (!p.rows.ids || chosen(p.rows, m) == all[place]) {
          for (int64_t k = 0; k < p.K; ++k)
            value +=
                get(p.dtype, p.x, m * p.ldx + k) *
                get(p.dtype, p.down, p.up_transposed ? (all[place] * p.K + k) * r + j : (all[place] * r + j) * p.K + k);
          if (p.bias_down) value += get(p.dtype, p.bias_down, all[place] * r + j);
          if (p.relu) value = std::max(value, 0.0);
          const int64_t at = (m * each + (p.rows.ids ? 0 : all[place])) * r + j;
          if (p.gate && get(p.dtype, p.gate, at) <= 0) value = 0;
          if (p.h) put(p.dtype, p.h, at, value);
          value *= p.scaling[all[place]];
        }
      }
    for (int64_t n = 0; n < p.N; ++n) {
      double sum = (p.bias ? get(p.dtype, p.bias, n) : 0) + (p.y0 ? get(p.dtype, p.y0, m * p.ldy0 + n) : 0);
      for (int64_t k = 0; k < p.K; ++k)
        sum += get(p.dtype, p.x, m * p.ldx + k) * get(p.dtype, p.weight, p.up_transposed ? k * p.N + n : n * p.K + k);
      for (size_t place = 0; place < all.size(); ++place) {
        for (int64_t j = 0; j < r; ++j)
          sum += h[place * r + j] *
                 get(p.dtype, p.up, p.up_transposed ? (all[place] * r + j) * p.N + n : (all[place] * p.N + n) * r + j);
        if (p.bias_up && (!p.rows.ids || chosen(p.rows, m) == all[place]))
          sum += p.scaling[all[place]] * get(p.dtype, p.bias_up, all[place] * p.N + n);
      }
      put(p.dtype, p.y, m * p.ldy + n, sum);
    }
  }
}

void pack(Dtype dtype, const void* from, void* to, int64_t T, int64_t rows, int64_t columns, bool rank_is_rows,
          int64_t padded, bool transpose, const int64_t* ranks, const float* scaling, cudaStream_t) {
  const int64_t tall = rank_is_rows ? padded : rows, wide = rank_is_rows ? columns : padded;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t i = 0; i < tall; ++i)
      for (int64_t j = 0; j < wide; ++j) {
        const int64_t rank = rank_is_rows ? i : j, real = ranks ? ranks[t] : rank_is_rows ? rows : columns;
        double value = 0;
        if (i < rows && j < columns && rank < real) value = get(dtype, from, (t * rows + i) * columns + j);
        put(dtype, to, t * tall * wide + (transpose ? j * tall + i : i * wide + j),
            scaling ? scaling[t] * value : value);
      }
}

static void gradients(const LoraGrads& p) {
  const int64_t r = p.rows.r, padded = std::max(p.padded_r, r), each = p.rows.ids ? 1 : p.rows.T;
  for (int64_t t = 0; t < p.rows.T; ++t) {
    const bool asks = std::find(p.adapters.begin(), p.adapters.end(), t) != p.adapters.end();
    const int64_t real = p.ranks ? std::clamp<int64_t>(p.ranks[t], 0, r) : r;
    const auto rank = [&](const void* of, int64_t m, int64_t j) {
      return get(p.dtype, of, (m * each + (p.rows.ids ? 0 : t)) * padded + j);
    };
    const auto x = [&](int64_t m, int64_t i) { return get(p.dtype, p.x, m * p.ldx + i); };
    const auto dy = [&](int64_t m, int64_t o) { return get(p.dtype, p.dy, t * p.dy_slab + m * p.lddy + o); };
    const auto sum = [&](bool wanted, const auto& f) {
      double total = 0;
      for (int64_t m = 0; wanted && m < p.rows.M; ++m)
        if (!p.rows.ids || chosen(p.rows, m) == t) total += f(m);
      return total;
    };
    const double s = p.scaling[t];
    for (int64_t j = 0; j < r; ++j) {
      for (int64_t i = 0; p.dA && i < p.in; ++i)
        put(p.dtype, p.dA, (t * r + j) * p.in + i,
            s * sum(asks && j < real, [&](int64_t m) { return rank(p.g, m, j) * x(m, i); }));
      for (int64_t o = 0; p.dB && o < p.out; ++o)
        put(p.dtype, p.dB, (t * p.out + o) * r + j,
            s * sum(asks && j < real, [&](int64_t m) { return dy(m, o) * rank(p.h, m, j); }));
      if (p.dbias_A)
        put(p.dtype, p.dbias_A, t * r + j, s * sum(asks && j < real, [&](int64_t m) { return rank(p.g, m, j); }));
    }
    for (int64_t o = 0; p.dbias_B && o < p.out; ++o)
      put(p.dtype, p.dbias_B, t * p.out + o, s * sum(asks, [&](int64_t m) { return dy(m, o); }));
    if (p.dscaling)
      p.dscaling[t] = static_cast<float>(sum(true, [&](int64_t m) {
        double total = 0;
        for (int64_t j = 0; j < real; ++j) total += rank(p.g, m, j) * rank(p.h, m, j);
        for (int64_t o = 0; p.bias_B && o < p.out; ++o) total += dy(m, o) * get(p.dtype, p.bias_B, t * p.out + o);
        return total;
      }));
  }
}

void lora_grads(const LoraGrads& p, const Allocator& workspace, cudaStream_t) {
  workspace(64);
  g_calls += " lora_grads";
  gradients(p);
}

void few_rows_grads(const LoraGrads& p, bool overlap, cudaStream_t) {
  PLORA_CHECK(p.rows.ids && p.rows.M <= 512, "few_rows_grads refuses");
  const std::string last = g_calls.substr(g_calls.rfind(' ') + 1);
  PLORA_CHECK(!overlap || last == "few_rows" || last == "few_fused_transposed", "few_rows_grads: not after few_rows");
  g_calls += " few_rows_grads";
  LoraGrads factors = p;
  factors.dbias_A = factors.dbias_B = nullptr, factors.dscaling = nullptr;
  gradients(factors);
}

void lora_grads_sm90(const LoraGrads& p, bool overlap, cudaStream_t) {
  PLORA_CHECK(p.rows.ids ? p.padded_r <= 64 && p.rows.rows_per_id >= 32
                         : p.rows.T * p.padded_r <= 64 && static_cast<int64_t>(p.adapters.size()) == p.rows.T,
              "lora_grads_sm90 refuses");
  PLORA_CHECK(!overlap || g_calls.find("rows") != std::string::npos || g_calls.find("transposed") != std::string::npos,
              "lora_grads_sm90: not after a kernel that it may overlap");
  g_calls += " lora_grads_sm90";
  LoraGrads factors = p;
  factors.dbias_A = factors.dbias_B = nullptr, factors.dscaling = nullptr;
  gradients(factors);
}

void dense_grads(const DenseGrads& p, cudaStream_t) {
  g_calls += " dense_grads";
  const int64_t first = p.adapters.empty() ? 0 : p.adapters.front(), first_V = p.dscaling ? 0 : first;
  for (int64_t t = 0; t < p.T; ++t) {
    const bool asks = std::find(p.adapters.begin(), p.adapters.end(), t) != p.adapters.end();
    const float times = p.times ? p.times[t] : 1, scale = p.scaling[t] * times;
    const auto V = [&](int64_t o, int64_t j) {
      return get(p.dtype, p.V, o * p.width_V + (t - first_V) * p.padded_r + j);
    };
    for (int64_t i = 0; p.dA && i < p.r * p.in; ++i)
      put(p.dtype, p.dA, t * p.r * p.in + i, asks ? scale * get(p.dtype, p.U, (t - first) * p.padded_r * p.in + i) : 0);
    for (int64_t o = 0; p.dB && o < p.out; ++o)
      for (int64_t j = 0; j < p.r; ++j) put(p.dtype, p.dB, (t * p.out + o) * p.r + j, asks ? scale * V(o, j) : 0);
    const int64_t parts = dense_parts(p.padded_r, p.out);
    for (int64_t part = 0; p.dscaling && part < parts; ++part) p.dscaling[t * parts + part] = 0;
    double sum = 0;
    for (int64_t o = 0; p.dscaling && o < p.out; ++o)
      for (int64_t j = 0; j < p.padded_r; ++j) sum += V(o, j) * get(p.dtype, p.B, (t * p.out + o) * p.padded_r + j);
    if (p.dscaling) p.dscaling[t * parts] = times * static_cast<float>(sum);
  }
}

void dense_grads_sm90(const DenseGrads& p, const DenseRows& rows, const Allocator& workspace, cudaStream_t) {
  const size_t count = p.adapters.size();
  PLORA_CHECK((p.dscaling || count > 0) && p.dtype != Dtype::float32 &&
                  takes_dense(rows.M, p.in, p.out, p.T, p.r, count * p.padded_r, multiprocessors()) &&
                  (count == 0 || p.adapters.back() + 1 == p.adapters.front() + static_cast<int64_t>(count)),
              "dense_grads_sm90 refuses");
  workspace(64);
  g_calls += " dense_grads_sm90";
  for (int64_t t = 0; t < p.T; ++t) {
    const bool asks = std::find(p.adapters.begin(), p.adapters.end(), t) != p.adapters.end();
    const double times = p.times ? p.times[t] : 1, scale = asks ? p.scaling[t] * times : 0;
    std::vector<double> dA(p.padded_r * p.in), dB(p.out * p.padded_r);
    for (int64_t m = 0; m < rows.M; ++m)
      for (int64_t j = 0; j < p.padded_r; ++j) {
        double g = 0, h = 0;
        for (int64_t o = 0; o < p.out; ++o)
          g += get(p.dtype, rows.dy, m * p.out + o) * get(p.dtype, p.B, (t * p.out + o) * p.padded_r + j);
        for (int64_t i = 0; i < p.in; ++i) {
          const double x = get(p.dtype, rows.x, m * p.in + i);
          h += x * get(p.dtype, rows.A, (t * p.padded_r + j) * p.in + i), dA[j * p.in + i] += g * x;
        }
        for (int64_t o = 0; o < p.out; ++o) dB[o * p.padded_r + j] += get(p.dtype, rows.dy, m * p.out + o) * h;
      }
    double sum = 0;
    for (int64_t i = 0; i < p.out * p.padded_r; ++i) sum += dB[i] * get(p.dtype, p.B, t * p.out * p.padded_r + i);
    if (p.dscaling) p.dscaling[t] = static_cast<float>(times * sum);
    for (int64_t i = 0; p.dA && i < p.r * p.in; ++i) put(p.dtype, p.dA, t * p.r * p.in + i, scale * dA[i]);
    for (int64_t o = 0; p.dB && o < p.out; ++o)
      for (int64_t j = 0; j < p.r; ++j) put(p.dtype, p.dB, (t * p.out + o) * p.r + j, scale * dB[o * p.padded_r + j]);
  }
}

void lora_merge(const LoraMerge& p, cudaStream_t) {
  g_calls += p.times ? " merge_weighted" : " merge";
  const auto number = [](const void* of, int64_t t) { return of ? static_cast<const float*>(of)[t] : 1.f; };
  for (int64_t o = 0; o < p.out; ++o)
    for (int64_t i = 0; i < p.in; ++i) {
      double sum = get(p.dtype, p.weight, o * p.in + i);
      for (int64_t t = 0; t < p.T; ++t)
        for (int64_t j = 0; j < (p.ranks ? std::clamp<int64_t>(p.ranks[t], 0, p.r) : p.r); ++j)
          sum += number(p.scaling, t) * number(p.times, t) * get(p.dtype, p.B, (t * p.out + o) * p.r + j) *
                 get(p.dtype, p.A, (t * p.r + j) * p.in + i);
      put(p.dtype, p.merged, o * p.in + i, sum);
    }
}

void lora_stack(const LoraStack& p, const std::vector<OneOfStack>& adapters, cudaStream_t) {
  g_calls += "stack ";
  for (int t = 0; t < static_cast<int>(adapters.size()); ++t) {
    const OneOfStack& one = adapters[t];
    p.scaling[t] = one.scaling;
    for (int64_t i = 0; i < p.r; ++i)
      for (int64_t k = 0; k < p.in; ++k)
        put(p.to, p.A, (t * p.r + i) * p.in + k, i < one.r ? get(p.from, one.A, i * p.in + k) : 0);
    for (int64_t o = 0; o < p.out; ++o)
      for (int64_t j = 0; j < p.r; ++j)
        put(p.to, p.B, (t * p.out + o) * p.r + j, j < one.r ? get(p.from, one.B, o * one.r + j) : 0);
  }
}

}  // namespace plora::cuda
