// How CUDA computes the low-rank families: plan_lora, one pure function of the shape, decides for either direction, so
// that it can be asked and tested without a GPU (plora_ext._C.lora_plan). The host code follows it, and what it calls
// refuses what the plan should not have sent there.
//
// The fused product (cuda/fused_sm90.cu) makes tiles of 128 x 192, some in thirds (fused_tiles). A `slot` is
// 16 ranks of one adapter: 16 more columns in the main loop, which takes one, or two with the tile beside it, or 16
// more of the depth where h was computed before.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arithmetic.h"

namespace plora {

enum class Family { indexed, sum, all };

struct LoraShape {
  Family family;
  int64_t M, in, out, T, r;
  bool half = true;                 // bfloat16 or float16
  bool weight = true;               // with the frozen layer's product
  bool relu = false, bias = false;  // bias: bias_A or bias_B
  bool bias_A = false;
  bool ragged = false;    // not all ranks of every adapter count
  bool backward = false;  // dx from dy, else y from x
  bool keep = false;      // backward will follow
  bool outputs = true;    // y or dx is asked for; else h or g alone
  bool in_place = false;  // y += ..., whose rows are ld elements apart
  int64_t ld = 0;
  int64_t rows_per_id = 1;
  std::vector<int64_t> slices{};  // columns of y for equal blocks of ranks, as cuda/lora/kernels.h has them
  int capability = 90;            // 10 * major + minor
  int sms = 132;
  bool aligned = true;    // every pointer to 16 bytes
  bool mma_only = false;  // PLORA_CUDA_PATH=mma
};

enum class LoraAlgorithm {
  low_rank,     // torch's own product, then the low-rank part on top (low_rank.cu)
  add,          // likewise, by two kernels for Hopper (low_rank_sm90.cu, add_sm90.cu)
  expand,       // likewise, the y of all adapters from their h (expand.cu)
  all,          // the same with the frozen layer in one product (all_sm90.cu)
  few_rows,     // likewise, by kernels that gather the rows of an adapter (few_rows.cu)
  few_fused,    // of few rows h or g first, by few_rows.cu, then all else in one product (few_rows_sm90.cu)
  in_loop,      // one fused product, h or g made in its main loop (fused_sm90.cu)
  precomputed,  // h first, then the fused product
  merge,        // the factors folded into the weight, then torch's own product
  dense,        // the same with gradients: backward goes through the gradient of the merged weight
};

// Who makes h, or backward g.
enum class LoraRanks {
  within,    // the kernel that makes the outputs; h alone: low_rank.cu, or few_rows.cu with that algorithm
  low_rank,  // low_rank.cu, before
  product,   // torch, for all adapters side by side
  rows,      // low_rank_sm90.cu
  packed,    // likewise, backward, from a copy of lora_B whose ranks lie side by side
};

struct LoraPlan {
  LoraAlgorithm algorithm = LoraAlgorithm::low_rank;
  LoraRanks ranks = LoraRanks::within;
  int64_t ctas = 0;  // of the fused product
  double waves = 0;  // likewise; one in thirds counts less
  int slots = 0;     // that it makes in its loop, or two that pairs of blocks make
  const char* reason = "";

  bool fused() const { return algorithm == LoraAlgorithm::in_loop || algorithm == LoraAlgorithm::precomputed; }
  bool few() const { return algorithm == LoraAlgorithm::few_rows || algorithm == LoraAlgorithm::few_fused; }
  // Whether the kernel that makes the outputs makes the frozen layer's product, too.
  bool whole() const { return fused() || algorithm == LoraAlgorithm::few_fused || algorithm == LoraAlgorithm::all; }
  bool merged() const { return algorithm == LoraAlgorithm::merge || algorithm == LoraAlgorithm::dense; }
  bool by_rows() const { return ranks == LoraRanks::rows || ranks == LoraRanks::packed; }
  // Whether a kernel takes part that is for Hopper alone.
  bool hopper() const { return whole() || by_rows(); }
};

inline const char* algorithm_name(LoraAlgorithm algorithm) {
  static const char* const names[] = {"low_rank",  "add",     "expand",      "all",   "few_rows",
                                      "few_fused", "in_loop", "precomputed", "merge", "dense"};
  return names[static_cast<int>(algorithm)];
}

inline const char* ranks_name(LoraRanks ranks) {
  static const char* const names[] = {"within", "low_rank", "product", "rows", "packed"};
  return names[static_cast<int>(ranks)];
}

namespace lora_plan {

// Above: products with the merged weight are cheaper, backward included. One adapter is kept apart for longer, since
// the merged weight rounds away what is small beside W.
constexpr int64_t kDenseRank = 64, kDenseAlone = 192;
// Where nothing is kept the factors may be merged into the weight: on Hopper where that costs less than keeping them
// apart, elsewhere from so many rows on and above so many ranks. Torch's product merges more ranks than kMergeOwn.
constexpr int64_t kMergeRows = 256, kMergeRank = 64, kMergeOwn = 256;
// Fewer rows are few tiles for the fused product. Of a deep product each takes long, and torch's shares out the depth,
// but from kDeepAtOnce rows on one wave of them is as fast, up to a depth.
constexpr int64_t kHopperRows = 128, kDeepRows = 1024, kDeepAtOnce = 256, kDeep = 1024, kDeepest = 4096;
// What cuda/few_rows.cu takes: rows; adapters; ranks that act on a row.
constexpr int64_t kFewRows = 512, kFewAdapters = 1 << 15, kFewRanks = 512;
// What cuda/few_rows_sm90.cu takes: rows; of all of them, the ranks that act on them. It reads a row's adapter for that
// row alone, so where all rows have the same ones it pays for fewer.
constexpr int64_t kFewRowsSm90 = 64, kFewRanksSm90 = 4096, kFewAlike = 16;
// What cuda/lora_grads_sm90.cu takes: ranks of all adapters that act on a row; rows of a step, of which a sample should
// fill half; samples.
constexpr int64_t kGradRanks = 64, kGradRows = 64, kGradSamples = 2048;
// Tiles and steps of cuda/dense_grads_sm90.cu, ranks that it multiplies at a time, and of all adapters at most. As
// measured on an H200, in seconds: all but steps and ranks, a step, 64 ranks; of torch's products in its place:
// operations per second, what is not dW, 64 ranks; of passes over x and dy with dA and dB: all but their bytes, three
// quarters of which take time of their own.
constexpr int64_t kDenseRows = 128, kDenseColumns = 192, kDenseStep = 64, kDenseChunk = 64, kDenseAllRanks = 2048;
constexpr double kDenseStart = 8.3e-6, kDenseSteps = 0.42e-6, kDenseChunks = 0.8e-6;
constexpr double kDenseFlops = 740e12, kDenseTorch = 15.5e-6, kDenseTorchChunks = 0.3e-6, kDensePasses = 15e-6;
constexpr int64_t kTileRows = 128, kTileColumns = 192, kSlot = 16;
constexpr int64_t kMaxSlices = 8;      // that the fused product tells apart
constexpr int64_t kGivenRanks = 2048;  // of all adapters that a tile may meet: a row of h as the fused product takes it
// Ranks of all adapters above which torch's own product makes the h of a sum, though the fused product then needs a
// scaled copy of a factor: low_rank.cu is bound by latency; low_rank_sm90.cu multiplies up to 64 columns in the shadow
// of reading x. The h of `all` is torch's up to so many ranks or so many products.
constexpr int64_t kProductRanks = 16, kProductRanksHopper = 64;
constexpr int64_t kAllRanks = 256, kAllProducts = int64_t{3} << 30;
// What an adapter's ranks are filled up to where low_rank_sm90.cu reads lora_B as it is: a row of shared memory.
constexpr int64_t kFactorRow = 16;
// Bytes of x and y from which on adding to a given y is two kernels on Hopper, cuda/low_rank_sm90.cu and add_sm90.cu:
// they start with 4 us more than low_rank.cu, which then takes twice as long for the bytes, and goes through x once for
// each adapter that its rows meet.
constexpr int64_t kTwoKernels = int64_t{6} << 20;
// As measured on an H200: operations per second and multiprocessor, bytes per second, and of one multiprocessor,
// seconds. A pass over x whose blocks find multiprocessors beside those of the product costs its launch alone. Of a
// slot in the main loop: its share of the product, and seconds per wave, either direction; apart, where g is a product
// of its own, as with pairs and where all tiles are thirds; of a given slot: seconds per wave.
constexpr double kFlops = 650e12 / 132, kBytes = 3.5e12, kBlockBytes = 0.1e12, kLaunch = 2.5e-6, kBeside = 1e-6;
constexpr double kThirds = 0.45;  // of a wave, one in thirds
constexpr double kInLoopShare = 0.1, kInLoopWave = 0.9e-6, kGivenWave = 0.2e-6;
constexpr double kInLoopShareBackward = 0.17, kInLoopShareApart = 0.19, kInLoopWaveBackward = 0.5e-6;
// Of merging: seconds, of an element of the weight, and of 16 ranks of it; what merge_sm90.cu does not take lasts so
// many times as long; then by torch. Torch's product of the merged weight takes longer than the fused one without
// ranks, of a full wave by so much. Of h of many ranks by torch's product: the launches.
constexpr double kMerge = 2.2e-6, kMergeElement = 1.5e-12, kMergeSlot = 0.07e-12, kMergeOther = 3;
constexpr double kAhead = 1e-6;
constexpr double kMergeTorch = 2.7e-6, kMergeTorchElement = 2.7e-12, kMergeTorchSlot = 0.027e-12, kProductH = 14e-6;
// What a sum of few rows takes beyond the frozen product, seconds, and by the rank: few_rows_sm90.cu; few_rows.cu,
// whose ranks take longer with rows that have many columns; of more ranks than that takes, low_rank_sm90.cu and
// add_sm90.cu, by the column.
constexpr double kFewFused = 0.8e-6, kFewFusedRank = 0.05e-6, kFewSum = 4.8e-6, kFewSumRank = 0.11e-6;
constexpr double kFewSumColumn = 0.09e-12, kFewMany = 15e-6, kFewManyColumn = 1.1e-9;

// How many adapters a tile's rows meet at most.
inline int64_t adapters_of_tile(const LoraShape& s) {
  if (s.family != Family::indexed) return s.T;
  const int64_t n = std::max<int64_t>(s.rows_per_id, 1);
  const int64_t samples = n % kTileRows == 0 ? 1 : kTileRows % n == 0 ? kTileRows / n : (kTileRows - 2) / n + 2;
  return std::min(s.T, samples);
}

// How many slots of one adapter the columns of a tile need at most, of `slots` in all; `slices` may spare it some.
inline int64_t slots_of_tile(const LoraShape& s, int64_t slots, int64_t column_tiles) {
  const auto blocks = static_cast<int64_t>(s.slices.size() / 2);
  if (s.backward || blocks == 0 || blocks > kMaxSlices) return slots;
  const int64_t width = s.r / blocks;
  int64_t most = 0;
  for (int64_t tile = 0; tile < column_tiles; ++tile) {
    int64_t met = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
      bool meets = false;
      for (int64_t b = slot * kSlot / width; b < blocks && b * width < (slot + 1) * kSlot; ++b)
        meets |= s.slices[2 * b] < (tile + 1) * kTileColumns && s.slices[2 * b + 1] > tile * kTileColumns;
      met += meets;
    }
    most = std::max(most, met);
  }
  return most;
}

// How the fused product divides y: whole tiles, one row of them after the other; those beyond full waves, if few, in
// thirds, made by three blocks each; and for a last tile of few columns a strip of thirds. Pairs make whole tiles.
struct FusedTiles {
  int64_t columns, whole;  // tiles of a row, and of all rows
  int64_t thirds, strip;   // of 128 x 64: of tiles, three each, then of the strip
  double waves;
  int64_t count() const { return whole + thirds + strip; }
};

inline FusedTiles fused_tiles(int64_t M, int64_t N, int64_t at_once, bool pairs) {
  const int64_t rows = ceil_div(M, kTileRows), columns = ceil_div(N, kTileColumns), beyond = N % kTileColumns;
  if (pairs) return {columns, rows * columns, 0, 0, static_cast<double>(ceil_div(rows * columns, at_once))};
  const bool narrow = beyond > 0 && 3 * beyond <= kTileColumns;
  FusedTiles t{columns - narrow, rows * (columns - narrow), 0, narrow ? rows : 0, 0};
  const int64_t last = t.whole % at_once;
  const auto waves_of = [&](int64_t whole, int64_t thirds) {  // less than a wave of whole tiles, and what comes after
    const int64_t beside = whole > 0 ? at_once - whole : 0, after = std::max<int64_t>(0, thirds - beside);
    return (whole > 0 ? 1 : 0) + kThirds * static_cast<double>(ceil_div(after, at_once));
  };
  const double as_they_are = waves_of(last, t.strip), as_thirds = waves_of(0, 3 * last + t.strip);
  const bool divides = last > 0 && as_thirds < 0.8 * as_they_are;
  t.waves = static_cast<double>(t.whole / at_once) + (divides ? as_thirds : as_they_are);
  if (divides) t.whole -= last, t.thirds = 3 * last;
  return t;
}

}  // namespace lora_plan

// The kernels take ranks in multiples of 8; `kept` holds as many columns per adapter.
inline int64_t padded_rank(int64_t r) { return 8 * std::max<int64_t>(1, ceil_div(r, 8)); }

// Whether the sum is computed through the merged weight, which is then what forward keeps for backward.
inline bool lora_dense(Family family, int64_t T, int64_t r, bool weight, bool relu, bool bias) {
  return family == Family::sum && weight && !relu && !bias &&
         T * r > (T > 1 ? lora_plan::kDenseRank : lora_plan::kDenseAlone);
}

// Whether Hopper's own kernels can take the shape, for what they read: rows of whole 16 bytes.
inline bool for_hopper(const LoraShape& s) {
  const int64_t K = s.backward ? s.out : s.in;
  return s.capability == 90 && !s.mma_only && s.half && s.aligned && K > 0 && K % 8 == 0;
}

// Whether low_rank_sm90.cu can make h or g.
inline bool rows_on_hopper(const LoraShape& s) {
  return for_hopper(s) && !(s.family == Family::all && s.backward) && s.M <= INT32_MAX - lora_plan::kTileRows &&
         s.T <= INT16_MAX && s.T * padded_rank(s.r) < int64_t{1} << 25;
}

// Whether torch's own product makes h (backward: g), which is x times the factors of all adapters side by side. Where
// rows choose one of them it never does: low_rank_sm90.cu multiplies those alone that a block's rows chose.
inline bool h_by_product(const LoraShape& s) {
  using namespace lora_plan;
  const int64_t K = s.backward ? s.out : s.in, ranks = s.T * padded_rank(s.r);
  if (!s.half || K == 0 || s.family == Family::indexed || s.relu || (s.bias_A && !s.backward)) return false;
  if (s.family == Family::all) return !s.backward && (ranks <= kAllRanks || 1.0 * s.M * K * ranks < kAllProducts);
  return ranks > (for_hopper(s) ? kProductRanksHopper : kProductRanks);
}

// Whether low_rank_sm90.cu reads lora_B as it is for g = dy B, though an adapter then takes whole rows of columns, or a
// copy made for it, whose ranks lie side by side: where that would take it more passes over dy, or a sum had gaps.
inline bool reads_lora_B(const LoraShape& s) {
  using namespace lora_plan;
  const int64_t rank = padded_rank(s.r), columns = ceil_div(rank, kFactorRow) * kFactorRow;
  if (s.family == Family::all) return false;
  if (columns == rank) return true;
  return s.family == Family::sum ? s.T == 1 : adapters_of_tile(s) * columns <= 192;
}

// Whether the low-rank part that is added to a y, or is all of it, goes through add_sm90.cu.
inline bool adds_on_hopper(const LoraShape& s) {
  using namespace lora_plan;
  const int64_t K = s.backward ? s.out : s.in, N = s.backward ? s.in : s.out;
  if (s.family == Family::all || !rows_on_hopper(s) || N == 0 || N % 8 != 0 || s.ld % 8 != 0) return false;
  if (N >= int64_t{1} << 25 || ceil_div(s.M, kTileRows) * ceil_div(N, kTileColumns) > INT32_MAX) return false;
  if (adapters_of_tile(s) * padded_rank(s.r) > kGivenRanks) return false;
  return std::min(adapters_of_tile(s), s.family == Family::sum ? s.T : s.M) > 2 || 2 * s.M * (K + 2 * N) >= kTwoKernels;
}

// Whether the y of all adapters are made by expand.cu from their h.
inline bool expands(const LoraShape& s) {
  return s.family == Family::all && !s.backward && !s.in_place && s.half && s.aligned && s.out % 8 == 0 &&
         s.M < int64_t{1} << 30 && s.T * padded_rank(s.r) < int64_t{1} << 26;
}

// Whether all_sm90.cu makes them, and the frozen layer's product with them: where its tiles are not too few for the
// multiprocessors.
inline bool all_on_hopper(const LoraShape& s) {
  using namespace lora_plan;
  const int64_t tiles = ceil_div(s.M, kTileRows) * ceil_div(s.out, kTileColumns);
  return expands(s) && s.weight && for_hopper(s) && 3 * tiles >= 2 * s.sms && tiles <= INT32_MAX / 2 &&
         s.M * s.out < int64_t{1} << 39;
}

// Whether there are rows enough for the fused product.
inline bool rows_for_fused(const LoraShape& s) {
  using namespace lora_plan;
  const int64_t K = s.backward ? s.out : s.in, N = s.backward ? s.in : s.out;
  if (K <= kDeep || s.M >= kDeepRows) return s.M >= kHopperRows;
  return s.M >= kDeepAtOnce && K <= kDeepest && ceil_div(s.M, kTileRows) * ceil_div(N, kTileColumns) <= s.sms;
}

// The ranks that act on a row, those of each adapter in whole chunks.
inline int64_t ranks_of_row(const LoraShape& s) {
  return (s.family == Family::sum ? s.T : 1) * ceil_div(s.r, lora_plan::kSlot) * lora_plan::kSlot;
}

// Whether the low-rank part of so few rows goes through few_rows.cu. With one adapter a tile the fused product, where
// it takes the shape, has h for next to nothing.
inline bool few_rows(const LoraShape& s) {
  using namespace lora_plan;
  const bool fused =
      s.weight && s.half && s.capability == 90 && !s.mma_only && rows_for_fused(s) && adapters_of_tile(s) == 1;
  return s.family != Family::all && s.M <= kFewRows && s.T <= kFewAdapters && s.r > 0 && ranks_of_row(s) <= kFewRanks &&
         std::min(s.in, s.out) > 0 && std::max(s.in, s.out) < int64_t{1} << 25 && !fused;
}

// Whether the frozen layer's product is made with it (few_rows_sm90.cu).
inline bool few_rows_fused(const LoraShape& s) {
  using namespace lora_plan;
  const bool alike = s.family == Family::sum || s.T == 1;
  return s.outputs && s.weight && for_hopper(s) && s.in % 8 == 0 && s.out % 8 == 0 && s.r % 8 == 0 &&
         s.M <= (alike ? kFewAlike : kFewRowsSm90) && s.M * ranks_of_row(s) <= kFewRanksSm90;
}

// Whether the gradients of the factors go through few_rows_grads.cu, which counts columns in 32 bits, a little beyond
// the last one.
inline bool few_rows_grads(const LoraShape& s) {
  return s.family == Family::indexed && s.M <= lora_plan::kFewRows && std::max(s.in, s.out) < int64_t{1} << 25;
}

// Likewise through lora_grads_sm90.cu: of adapters that all act on every row, all of which must ask, or of those that
// samples of many rows chose.
inline bool lora_grads_sm90(const LoraShape& s) {
  using namespace lora_plan;
  const bool sum = s.family == Family::sum;
  const bool samples = s.family == Family::indexed && 2 * s.rows_per_id >= kGradRows &&
                       s.M / s.rows_per_id <= kGradSamples && s.T <= INT16_MAX;
  return (sum || samples) && for_hopper(s) && s.in > 0 && s.in % 8 == 0 && s.out % 8 == 0 && s.r > 0 &&
         (sum ? s.T : 1) * padded_rank(s.r) <= kGradRanks && s.M < INT32_MAX - 256;
}

// How cuda/dense_grads_sm90.cu shares out the gradient of a merged weight: each of its tiles to `slots` blocks, which
// sum `per` of all `steps` of 64 rows; none where there are more tiles than multiprocessors.
struct DenseTiles {
  int64_t tall, wide, slots = 0, per = 0, steps = 0;
};

inline DenseTiles dense_tiles(int64_t M, int64_t in, int64_t out, int64_t sms) {
  using namespace lora_plan;
  DenseTiles t{ceil_div(out, kDenseRows), ceil_div(in, kDenseColumns)};
  t.steps = std::max<int64_t>(ceil_div(M, kDenseStep), 1);
  t.slots = std::min(t.steps, sms / (t.tall * t.wide));
  t.per = t.slots > 0 ? ceil_div(t.steps, t.slots) : 0;
  return t;
}

// Whether it can take the gradients of `asked` ranks of a sum's factors and of its scales, by rows of these lengths.
inline bool takes_dense(int64_t M, int64_t in, int64_t out, int64_t T, int64_t r, int64_t asked, int64_t sms) {
  const int64_t rank = padded_rank(r);
  return in > 0 && in % 8 == 0 && out > 0 && out % 8 == 0 && r > 0 && (rank == 16 || rank == 32 || rank % 64 == 0) &&
         T * rank <= lora_plan::kDenseAllRanks && asked <= lora_plan::kDenseChunk && M < INT32_MAX - 256 &&
         dense_tiles(M, in, out, sms).slots > 0;
}

// Whether it does, as all else would take longer: torch's products, or without the scales a pass over x, one over dy,
// and lora_grads_sm90.cu.
inline bool dense_on_hopper(const LoraShape& s, int64_t asked, bool scales) {
  using namespace lora_plan;
  if (!for_hopper(s) || !takes_dense(s.M, s.in, s.out, s.T, s.r, asked, s.sms)) return false;
  const double chunks = 1.0 * ceil_div(scales ? s.T * padded_rank(s.r) : asked, kDenseChunk);
  const double own = kDenseStart + kDenseSteps * dense_tiles(s.M, s.in, s.out, s.sms).per + kDenseChunks * chunks;
  return own < (scales ? 2.0 * s.M * s.in * s.out / kDenseFlops + kDenseTorch + kDenseTorchChunks * chunks
                       : 3.0 * s.M * (s.in + s.out) / kBytes + kDensePasses);
}

// Whether merge_sm90.cu takes a weight of so many columns and adapters of this rank, where the pointers are aligned.
inline bool merges_on_hopper(int64_t in, int64_t r, bool ragged) {
  return in % 8 == 0 && !ragged && (r == 8 || (r > 0 && r % lora_plan::kSlot == 0));
}

// Whether the factors may be merged into the weight, and what that takes, beyond the product.
inline bool may_merge(const LoraShape& s) {
  using namespace lora_plan;
  return s.outputs && s.family == Family::sum && s.weight && !s.relu && !s.bias && !s.keep && !s.backward && s.r > 0;
}
inline double merging(const LoraShape& s) {
  using namespace lora_plan;
  const double weight = 1.0 * s.in * s.out, slots = 1.0 * s.T * ceil_div(s.r, kSlot);
  const double times = merges_on_hopper(s.in, s.r, s.ragged) ? 1 : kMergeOther;
  return s.T * s.r <= kMergeOwn ? times * (kMerge + weight * (kMergeElement + kMergeSlot * slots))
                                : kMergeTorch + weight * (kMergeTorchElement + kMergeTorchSlot * slots);
}

// Of a sum of few rows: the low-rank part apart.
inline double few_rows_apart(const LoraShape& s) {
  using namespace lora_plan;
  const double ranks = 1.0 * s.T * s.r, columns = 1.0 * (s.in + s.out);
  if (!few_rows(s)) return kFewMany + kFewManyColumn * columns;
  return few_rows_fused(s) ? kFewFused + kFewFusedRank * ranks
                           : kFewSum + ranks * (kFewSumRank + kFewSumColumn * s.M * columns);
}

inline LoraPlan plan_lora(const LoraShape& s) {
  using namespace lora_plan;
  LoraPlan plan;
  const auto choose = [&](LoraAlgorithm algorithm, LoraRanks ranks, const char* reason) {
    plan.algorithm = algorithm;
    plan.ranks = ranks;
    plan.reason = reason;
    return plan;
  };
  const LoraRanks rows = s.backward && !reads_lora_B(s) ? LoraRanks::packed : LoraRanks::rows;
  const bool weighed = for_hopper(s) && s.out % 8 == 0, merges = may_merge(s);
  const auto merge = [&] {
    return choose(LoraAlgorithm::merge, LoraRanks::within, "nothing is kept, and merging costs less than the ranks");
  };
  if (s.outputs && lora_dense(s.family, s.T, s.r, s.weight, s.relu, s.bias) && (s.keep || s.backward))
    return choose(LoraAlgorithm::dense, LoraRanks::within, "the ranks add up to more than the merged weight costs");
  if (merges && !weighed && s.M >= kMergeRows && s.T * s.r > kMergeRank) return merge();
  if (merges && weighed && (few_rows(s) || !rows_for_fused(s)) && merging(s) < few_rows_apart(s)) return merge();
  if (few_rows(s))
    return few_rows_fused(s)
               ? choose(LoraAlgorithm::few_fused, LoraRanks::within, "few rows, with which the weight passes once")
               : choose(LoraAlgorithm::few_rows, LoraRanks::within,
                        "few rows: each adapter that they meet is read once");
  if (!s.outputs)
    return choose(LoraAlgorithm::low_rank,
                  h_by_product(s) && !s.backward ? LoraRanks::product
                  : rows_on_hopper(s)            ? rows
                                                 : LoraRanks::within,
                  "no outputs are asked for");

  const LoraRanks before = h_by_product(s) ? LoraRanks::product : rows_on_hopper(s) ? rows : LoraRanks::low_rank;
  const auto apart = [&](const char* reason) {  // from the frozen product
    if (expands(s)) return choose(LoraAlgorithm::expand, before, reason);
    if (adds_on_hopper(s)) return choose(LoraAlgorithm::add, rows, reason);
    return choose(LoraAlgorithm::low_rank, LoraRanks::within, reason);
  };
  if (!s.weight) return apart("no frozen layer to fuse with");
  if (all_on_hopper(s)) return choose(LoraAlgorithm::all, before, "one frozen product serves all adapters");
  if (s.family == Family::all) return apart("few tiles, or not for Hopper: apart from the frozen product");
  if (s.capability != 90) return apart("the fused product is for compute capability 9.0");
  if (s.mma_only) return apart("PLORA_CUDA_PATH=mma");
  if (!s.half) return apart("the fused product is for bfloat16 and float16");
  if (s.in == 0 || s.in % 8 != 0 || s.out == 0 || s.out % 8 != 0 || !s.aligned)
    return apart("the fused product needs rows of a multiple of 16 bytes");
  if (s.T > INT16_MAX || s.T * padded_rank(s.r) >= int64_t{1} << 25)
    return apart("more adapters or ranks than the fused product can number");

  // From K columns to N.
  const int64_t K = s.backward ? s.out : s.in, N = s.backward ? s.in : s.out;
  if (!rows_for_fused(s)) return apart("too few rows for the fused product");
  if (s.backward && K >= kDeepest && s.M >= kDeepRows)
    return apart("torch's own product of so many columns is faster by more than a pass");
  const int64_t column_tiles = ceil_div(N, kTileColumns), at_once = std::max<int64_t>(1, s.sms);
  const FusedTiles tiles = fused_tiles(s.M, N, at_once, false), paired = fused_tiles(s.M, N, at_once, true);
  const double waves = tiles.waves;
  const int64_t ctas = std::min(tiles.count(), at_once);

  // A slot lengthens every wave of the product, in its main loop more than given; but a given one needs a pass over x
  // of its own, which then serves as well where only some tiles meet several adapters.
  const int64_t each = ceil_div(padded_rank(s.r), kSlot), most = adapters_of_tile(s);
  if (s.family == Family::indexed && most * padded_rank(s.r) > kGivenRanks)
    return apart("a tile may meet more ranks than there is space for");
  const double wave = 2.0 * kTileRows * kTileColumns * K / kFlops;
  const int copies = s.backward && !reads_lora_B(s);
  // Few blocks draw less than the memory's speed, which shows where their rows are long.
  const double bytes = 2.0 * s.M * K / kBytes, block = K > kDeep ? 2.0 * kTileRows * K / kBlockBytes : 0;
  const double read = std::max(bytes, block), given = waves * kGivenWave;
  const bool beside = ctas + ceil_div(s.M, kTileRows) <= at_once;
  const double pass = (beside ? std::max(kBeside, read - waves * wave) : read + kLaunch) + kLaunch * copies;
  // A slot for each tile's loop, or two for those of a pair, which have no thirds.
  const bool one = most <= 1 && slots_of_tile(s, each, column_tiles) <= 1;
  const bool two = most * each <= 2 && column_tiles % 2 == 0 && at_once > 1;
  const double share = !s.backward ? kInLoopShare : one && tiles.whole > 0 ? kInLoopShareBackward : kInLoopShareApart;
  const double in_loop = wave * share + (s.backward ? kInLoopWaveBackward : kInLoopWave);
  const double loop = one ? waves * in_loop : (paired.waves - waves) * wave + paired.waves * in_loop;
  const bool fits = (one || two) && loop < pass + given * most * each;
  const double alone = read + 4.0 * s.M * N / kBytes + kLaunch * (2 + copies);
  // Ids of single rows may be anything; what is met in practice are segments.
  const double mean =
      s.family != Family::indexed
          ? s.T
          : std::min<double>(s.T, 1 + (kTileRows - 1.0) / std::max<int64_t>(s.rows_per_id, kTileRows / 2));
  // Beside torch's product of the merged weight: waves that are not full, and the ranks; of those in the loop, half. A
  // wave of thirds alone, with ranks in the loop, is as fast as that product.
  const double full = 1.0 * s.M * N / (kTileRows * kTileColumns * at_once);
  const double ranks = fits              ? loop / 2
                       : h_by_product(s) ? read + kProductH + full * wave * s.T * s.r / N + given * most * each
                                         : pass + given * most * each;
  if (merges && weighed && (waves >= 1 || !fits) && merging(s) < (waves - full) * wave - waves * kAhead + ranks)
    return merge();
  if (!fits && pass + given * mean * each > alone)
    return apart("a tile may meet more ranks than a second pass over y costs");
  if (!fits && !h_by_product(s) && !rows_on_hopper(s)) return apart("more rows than the fused product can number");

  plan.ctas = ctas, plan.slots = !fits ? 0 : one ? 1 : 2;
  plan.waves = plan.slots == 2 ? paired.waves : waves;
  if (fits) return choose(LoraAlgorithm::in_loop, LoraRanks::within, "the ranks of every tile fit beside it");
  return choose(LoraAlgorithm::precomputed, h_by_product(s) ? LoraRanks::product : rows,
                "a pass over the rows costs less than the ranks beside every tile");
}

}  // namespace plora
