// Which way CUDA takes for a shape: the borders of the rules of common/lora_plan.h.
#include "common/lora_plan.h"

#include <algorithm>
#include <cstdio>
#include <random>

#include "common/cuda_path.h"

namespace {

using plora::Family;
using plora::LoraAlgorithm;
using plora::LoraPlan;
using plora::LoraShape;

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

template <typename Change>
LoraPlan plan(Family family, int64_t T, int64_t r, const Change& change) {
  LoraShape s{family, 128 * 197, 768, 768, T, r};  // ViT-B, 128 images
  if (family == Family::indexed) s.rows_per_id = 197;
  s.keep = true;
  change(s);
  return plora::plan_lora(s);
}

LoraPlan plan(Family family, int64_t T, int64_t r) {
  return plan(family, T, r, [](LoraShape&) {});
}

bool takes(const LoraPlan& p, LoraAlgorithm algorithm) { return p.algorithm == algorithm; }

// Whether the kernels that a plan names take what it sends them, as their own checks in csrc/cuda/lora say. Addresses
// are the shape's `aligned` alone: all else is memory of torch's.
bool holds(const LoraShape& s, const LoraPlan& p) {
  using A = LoraAlgorithm;
  using R = plora::LoraRanks;
  const int64_t K = s.backward ? s.out : s.in, N = s.backward ? s.in : s.out, rank = plora::padded_rank(s.r);
  const int64_t met = plora::lora_plan::adapters_of_tile(s);
  const bool ids = s.family == Family::indexed, hopper = s.capability == 90 && !s.mma_only && s.half && s.aligned;
  if (p.by_rows()) {
    const bool transposed = s.backward && p.ranks == R::rows;  // lora_B as it is
    const bool slabs = s.family == Family::all && s.backward;
    if (!hopper || slabs || K == 0 || K % 8 != 0 || s.T * rank >= 1 << 25 || s.T > 1 << 15) return false;
    if (transposed && !ids && s.T > 1 && rank % 16 != 0) return false;
    if (!s.backward && p.ranks == R::packed) return false;
  }
  const bool merges = s.family == Family::sum && s.weight && !s.relu && !s.bias && s.outputs;
  switch (p.algorithm) {
    case A::merge:
      return merges && !s.keep && !s.backward;
    case A::dense:
      return merges && (s.keep || s.backward);
    case A::few_rows:
      return s.M <= 512 && s.T <= 1 << 15 && (ids ? 1 : s.T) * rank <= 1024 && s.family != Family::all;
    case A::few_fused:
      return hopper && s.weight && s.outputs && s.M <= 64 && K % 8 == 0 && N % 8 == 0 && s.r % 8 == 0 &&
             s.M * (ids ? 1 : s.T) * ((s.r + 15) / 16 * 16) <= 4096 && s.family != Family::all;
    case A::in_loop: {  // a slot a tile, or two in a pair, and h is left to the loop
      const bool one = met <= 1 && (rank <= 16 || (!s.backward && !s.slices.empty()));
      const bool two = met * ((rank + 15) / 16) <= 2 && (N + 191) / 192 % 2 == 0 && s.sms > 1;
      return hopper && s.weight && s.outputs && K % 8 == 0 && N % 8 == 0 && p.ranks == R::within &&
             (p.slots == 1 ? one : p.slots == 2 && two);
    }
    case A::precomputed:
      return hopper && s.weight && s.outputs && s.family != Family::all && K % 8 == 0 && N % 8 == 0 &&
             (p.by_rows() || (p.ranks == R::product && !ids && !s.relu)) && (!ids || met * rank <= 2048);
    case A::add:
      return p.by_rows() && s.outputs && s.family != Family::all && N % 8 == 0 && N > 0 && s.ld % 8 == 0 &&
             met * rank <= 2048;
    case A::expand:
      return s.half && s.aligned && s.outputs && s.family == Family::all && !s.backward && !s.in_place && N % 8 == 0 &&
             p.ranks != R::within;
    case A::all:
      return hopper && s.weight && s.outputs && s.family == Family::all && !s.backward && !s.in_place && K > 0 &&
             K % 8 == 0 && N % 8 == 0 && s.M * N < int64_t{1} << 39 && p.ranks != R::within;
    case A::low_rank:
      return s.outputs ? p.ranks == R::within : p.ranks != R::product || (!s.backward && !ids && !s.relu && !s.bias_A);
  }
  return false;
}

LoraShape random_shape(std::mt19937& random) {
  const auto of = [&](std::initializer_list<int64_t> values) { return values.begin()[random() % values.size()]; };
  const auto chance = [&](unsigned one_in) { return random() % one_in == 0; };
  LoraShape s{static_cast<Family>(random() % 3),
              of({1, 2, 100, 127, 128, 255, 256, 512, 513, 1023, 1024, 1366, 3150, 12608, 25216, 1 << 20}),
              of({0, 1, 8, 64, 513, 764, 768, 1024, 1032, 2304, 3072, 4096, 1 << 25}),
              of({1, 8, 64, 513, 764, 768, 1024, 1032, 2304, 3072, 4096, 1 << 25}),
              of({1, 1, 2, 3, 4, 5, 10, 13, 50, 100, 200, 1000, 32767, 32768, 32769}),
              of({0, 1, 4, 7, 8, 9, 16, 16, 17, 24, 32, 48, 64, 65, 128, 192, 193, 256, 512})};
  s.half = !chance(4), s.weight = !chance(3), s.relu = chance(5), s.bias_A = chance(6);
  s.bias = s.bias_A || chance(6), s.backward = chance(2), s.keep = !s.backward && chance(2), s.outputs = !chance(6);
  s.in_place = !s.weight && !s.backward && !s.keep && s.outputs && chance(2),
  s.ld = s.in_place ? s.out + of({0, 3, 8}) : 0;
  s.rows_per_id = of({1, 2, 50, 63, 64, 128, 197, 256, 1000});
  if (s.family == Family::indexed) s.M = (s.M + s.rows_per_id - 1) / s.rows_per_id * s.rows_per_id;
  if (s.r % 2 == 0 && s.r > 0 && s.family != Family::all && chance(4)) s.slices = {0, s.out / 2, s.out / 2, s.out};
  s.capability = static_cast<int>(of({80, 90, 90, 90, 100})), s.sms = static_cast<int>(of({16, 78, 114, 132}));
  s.aligned = !chance(8), s.mma_only = chance(10);
  return s;
}

bool refuses(const char* path) {
  try {
    plora::mma_only(path);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  using A = LoraAlgorithm;

  expect(plan(Family::sum, 1, 16).fused(), "the fused product for the common case");
  expect(!plan(Family::sum, 1, 16, [](LoraShape& s) { s.capability = 80; }).fused(), "not on Ampere");
  expect(!plan(Family::sum, 1, 16, [](LoraShape& s) { s.capability = 100; }).fused(), "nor on Blackwell");
  expect(!plan(Family::sum, 1, 16, [](LoraShape& s) { s.half = false; }).fused(), "not in float32");
  expect(!plan(Family::sum, 1, 16, [](LoraShape& s) { s.weight = false; }).fused(), "not without a frozen layer");
  expect(!plan(Family::sum, 1, 16, [](LoraShape& s) { s.mma_only = true; }).fused(), "not when told otherwise");
  expect(!plan(Family::sum, 1, 16, [](LoraShape& s) { s.aligned = false; }).fused(), "not with odd addresses");
  expect(!plan(Family::sum, 1, 16, [](LoraShape& s) { s.in = 764; }).fused(), "nor odd widths");
  expect(!plan(Family::sum, 1, 16, [](LoraShape& s) { s.out = 764; }).fused(), "of either side");
  expect(plan(Family::sum, 1, 16, [](LoraShape& s) { s.M = 128; }).fused(), "128 rows are enough");
  expect(!plan(Family::sum, 1, 16, [](LoraShape& s) { s.M = 127; }).fused(), "127 are not");
  const auto deep = [](int64_t M, int64_t in, int64_t out) {
    return plan(Family::sum, 1, 16, [=](LoraShape& s) { s.M = M, s.in = in, s.out = out; }).fused();
  };
  expect(deep(1024, 8192, 768) && !deep(1023, 8192, 768), "a deep product wants 1024");
  expect(deep(256, 3072, 768) && deep(512, 4096, 4096), "or one wave of 256 and more");
  expect(!deep(255, 3072, 768) && !deep(768, 4096, 4608), "not of fewer, nor two waves");
  const auto deep_backward = [](int64_t out) {
    return plan(Family::sum, 1, 16, [=](LoraShape& s) { s.M = 1024, s.out = out, s.backward = true; }).fused();
  };
  expect(deep_backward(4088) && !deep_backward(4096), "transposed a very deep one is torch's");
  expect(!plan(Family::all, 4, 16).fused(), "`all` shares one frozen product");

  const auto all_takes = [](A algorithm, const auto& change) {
    return takes(plan(Family::all, 10, 16, change), algorithm);
  };
  expect(all_takes(A::all, [](LoraShape&) {}), "in which all outputs are made");
  expect(all_takes(A::expand, [](LoraShape& s) { s.weight = false; }), "where there is one");
  expect(all_takes(A::expand, [](LoraShape& s) { s.capability = 80; }) &&
             all_takes(A::expand, [](LoraShape& s) { s.mma_only = true; }) &&
             all_takes(A::expand, [](LoraShape& s) { s.in = 764; }),
         "on Hopper, from rows of whole 16 bytes");
  expect(all_takes(A::all, [](LoraShape& s) { s.M = 22 * 128; }) &&
             all_takes(A::expand, [](LoraShape& s) { s.M = 21 * 128; }) &&
             all_takes(A::all, [](LoraShape& s) { s.M = 21 * 128, s.sms = 114; }),
         "of tiles for two in three multiprocessors");

  expect(takes(plan(Family::sum, 1, 16), A::in_loop), "one slot in the loop");
  expect(takes(plan(Family::sum, 1, 8), A::in_loop), "a smaller rank too");
  const auto slots = [&](Family family, int64_t T, int64_t r, const auto& change) {
    return plan(family, T, r, change).slots;
  };
  expect(slots(Family::sum, 1, 16, [](LoraShape&) {}) == 1, "by itself");
  expect(slots(Family::sum, 1, 17, [](LoraShape&) {}) == 2 && slots(Family::sum, 2, 16, [](LoraShape&) {}) == 2 &&
             slots(Family::indexed, 20, 16, [](LoraShape&) {}) == 2,
         "a larger rank, or two adapters, in pairs of tiles");
  expect(takes(plan(Family::sum, 1, 33), A::precomputed) && takes(plan(Family::sum, 3, 16), A::precomputed) &&
             takes(plan(Family::indexed, 20, 17), A::precomputed),
         "more never");
  expect(slots(Family::sum, 2, 16, [](LoraShape& s) { s.out = 960; }) == 0, "nor where the last tile lies alone");
  expect(slots(Family::sum, 2, 16, [](LoraShape& s) { s.sms = 1; }) == 0, "or no two run at the same time");
  const auto out = [](int64_t n) { return [n](LoraShape& s) { s.M = 12608, s.out = n; }; };
  expect(takes(plan(Family::sum, 1, 16, out(768)), A::in_loop), "a pass costs more than the loop's slot");
  expect(takes(plan(Family::sum, 1, 16, out(3072)), A::precomputed), "less where the product is long");
  expect(takes(plan(Family::sum, 1, 16, [](LoraShape& s) { s.in = 3072; }), A::in_loop), "not where x is what is long");

  expect(takes(plan(Family::indexed, 20, 16), A::in_loop), "a tile may meet two images of 197 rows");
  expect(takes(plan(Family::indexed, 1, 16), A::in_loop), "but there may be one adapter only");
  const auto rows = [](int64_t n) { return [n](LoraShape& s) { s.M = 128 * 192, s.rows_per_id = n; }; };
  expect(takes(plan(Family::indexed, 20, 16, rows(128)), A::in_loop), "128 rows of an image are one tile");
  expect(takes(plan(Family::indexed, 20, 16, rows(64)), A::in_loop), "64 are half a tile");
  expect(takes(plan(Family::indexed, 20, 16, rows(63)), A::precomputed), "of 63 it may meet four");
  expect(takes(plan(Family::indexed, 1, 64), A::precomputed), "a large rank is given");
  expect(takes(plan(Family::indexed, 100, 16, rows(1)), A::precomputed), "single rows are taken for segments");

  const auto backward = [](LoraShape& s) { s.backward = true; };
  expect(slots(Family::indexed, 20, 16, backward) == 2, "transposed too");
  expect(slots(Family::sum, 1, 16, backward) == 1, "likewise one adapter");
  const auto widens = [](LoraShape& s) { s.backward = true, s.in = 3072; };
  expect(takes(plan(Family::sum, 1, 16, widens), A::precomputed), "unless its tiles are many and short");
  const auto eight = [&](LoraShape& s) { widens(s), s.M = 8 * 197; };
  expect(takes(plan(Family::sum, 1, 16, eight), A::precomputed), "of few rows as well");

  const auto images = [](int64_t M, int64_t out, bool backward) {
    return [=](LoraShape& s) { s.M = M, s.out = out, s.backward = backward; };
  };
  const auto waves = [&](int64_t M, int64_t out) { return plan(Family::sum, 1, 16, images(M, out, false)).waves; };
  expect(waves(11 * 128, 768) == 0.45 && waves(12 * 128, 768) == 1,
         "a wave of 44 tiles is one in thirds, one of 48 not");
  expect(waves(44 * 128, 768) == 1.45 && waves(33 * 128, 768) == 1, "or what lies beyond a full one");
  expect(plan(Family::sum, 1, 16, images(11 * 128, 768, false)).ctas == 132, "of three blocks a tile");
  expect(slots(Family::sum, 1, 16, images(788, 768, false)) == 1, "the loop serves few tiles");
  const auto tiles = [](int64_t M, int64_t N, bool pairs = false) {
    return plora::lora_plan::fused_tiles(M, N, 132, pairs);
  };
  const auto strips = tiles(12608, 1024), small = tiles(1000, 1024), thin = tiles(12608, 64);
  expect(strips.columns == 5 && strips.whole == 495 && strips.strip == 99 && strips.thirds == 0 && strips.waves == 4.45,
         "64 columns beyond whole tiles are a strip of thirds");
  expect(small.whole == 0 && small.thirds == 120 && small.strip == 8 && small.waves == 0.45, "after thirds");
  expect(thin.columns == 0 && thin.count() == 99 && thin.waves == 0.45, "or alone");
  expect(tiles(12608, 1032).strip == 0 && tiles(12608, 1032).waves == 5, "more of them are a whole tile");
  expect(tiles(165 * 128, 256).thirds == 99 && tiles(165 * 128, 256).waves == 1.9 && tiles(43 * 128, 832).thirds == 0,
         "with a strip, thirds may take two rounds");
  expect(tiles(12608, 1024, true).count() == 594 && tiles(12608, 1024, true).waves == 5, "pairs make whole ones");

  const auto transposed = [&](int64_t M) {
    return slots(Family::sum, 1, 16, [=](LoraShape& s) { s.M = M, s.in = s.out = 1024, s.backward = true; });
  };
  expect(transposed(12608) == 1 && transposed(197) == 0,
         "g joins dx's own product in whole tiles, not in thirds alone");

  const auto qv = [](LoraShape& s) { s.M = 2048, s.out = 2304, s.slices = {0, 768, 1536, 2304}; };
  expect(slots(Family::sum, 1, 32, qv) == 1, "slices leave one slot to a tile");
  const auto odd = [](LoraShape& s) { s.M = 2048, s.out = 2304, s.slices = {0, 800, 800, 1600}; };
  expect(slots(Family::sum, 1, 32, odd) == 2, "unless a tile meets both");
  const auto nine = [](LoraShape& s) {
    s.M = 2048, s.out = 9 * 192;
    for (int64_t i = 0; i < 9; ++i) s.slices.insert(s.slices.end(), {i * 192, (i + 1) * 192});
  };
  expect(!takes(plan(Family::sum, 1, 144, nine), A::in_loop), "or there are more slices than it can tell apart");

  expect(!takes(plan(Family::sum, 4, 16), A::dense), "64 ranks are not dense");
  expect(takes(plan(Family::sum, 5, 16), A::dense), "80 are");
  expect(!takes(plan(Family::sum, 1, 192), A::dense), "one adapter may have 192");
  expect(takes(plan(Family::sum, 1, 193), A::dense), "but not more");
  expect(takes(plan(Family::sum, 13, 16, backward), A::dense), "in backward too");
  expect(!takes(plan(Family::sum, 13, 16, [](LoraShape& s) { s.relu = true; }), A::dense), "not past an activation");
  expect(!takes(plan(Family::sum, 13, 16, [](LoraShape& s) { s.bias = true; }), A::dense), "nor with a bias");
  expect(!takes(plan(Family::indexed, 13, 16), A::dense), "nor where rows choose");
  const auto merges = [](int64_t M, int64_t in, int64_t out, int64_t T, int64_t r, int capability = 90) {
    return takes(
        plan(Family::sum, T, r,
             [=](LoraShape& s) { s.keep = false, s.M = M, s.in = in, s.out = out, s.capability = capability; }),
        A::merge);
  };
  expect(merges(12608, 768, 768, 1, 64) && merges(12608, 3072, 768, 4, 16),
         "merging costs less than a pass over x where nothing is kept");
  expect(!merges(12608, 768, 768, 1, 32) && !merges(12608, 3072, 768, 2, 16), "not less than the loop");
  expect(!merges(12608, 768, 3072, 1, 16) && merges(12608, 768, 3072, 10, 16), "nor where waves are full");
  expect(merges(3152, 3072, 768, 1, 16) && merges(12608, 4096, 1024, 1, 16), "but where they are not");
  expect(!merges(197, 768, 768, 1, 16) && merges(197, 768, 768, 1, 128), "a wave in thirds is as fast as torch's");
  expect(!merges(12608, 4096, 1024, 1, 0), "no rank is nothing to merge");
  expect(merges(64, 768, 768, 4, 16) && merges(1, 768, 768, 10, 16), "many ranks of a small weight for few rows, too");
  expect(!merges(1, 768, 768, 1, 16) && !merges(64, 4096, 4096, 10, 16), "not few, nor of a large weight");
  expect(merges(1, 768, 768, 50, 16) && !merges(64, 4096, 4096, 50, 16), "nor more ranks than few_rows.cu takes");
  expect(merges(12608, 4096, 4096, 50, 16) && !merges(512, 4096, 4096, 50, 16), "or torch's product would merge");
  expect(!merges(64, 768, 768, 1, 4) && merges(64, 768, 768, 1, 16), "nor ranks that merge_sm90.cu does not take");
  expect(!takes(plan(Family::sum, 16, 16, backward), A::merge), "never for backward");
  expect(merges(788, 768, 768, 5, 16, 80) && !merges(788, 768, 768, 4, 16, 80), "and more than 64 on other GPUs");
  expect(!merges(255, 768, 768, 20, 16, 80), "there from 256 rows on");

  const auto serves = [&](Family family, int64_t T, int64_t M, int64_t in, const auto& change) {
    return plan(family, T, 16, [&](LoraShape& s) { s.M = M, s.in = in, s.rows_per_id = 1, change(s); }).few();
  };
  const auto same = [](LoraShape&) {};
  expect(serves(Family::indexed, 64, 1, 4096, same) && serves(Family::indexed, 64, 512, 4096, same),
         "few rows: to 512");
  expect(!serves(Family::indexed, 64, 513, 4096, same), "and no more");
  expect(serves(Family::indexed, 64, 64, 4096, [](LoraShape& s) { s.backward = true; }), "backward too");
  expect(!serves(Family::all, 4, 64, 4096, same), "nor all adapters' outputs");
  expect(serves(Family::indexed, 64, 512, 768, same) && serves(Family::sum, 1, 127, 768, same), "of a short product");
  expect(!serves(Family::sum, 1, 128, 768, same) && serves(Family::sum, 2, 128, 768, same), "unless one slot serves");
  expect(serves(Family::sum, 1, 255, 4096, same) && !serves(Family::sum, 1, 256, 4096, same),
         "of a deep one in fewer rows");
  expect(serves(Family::indexed, 64, 64, 4096, [](LoraShape& s) { s.half = s.weight = false, s.capability = 80; }),
         "in float32, without a frozen layer, and on every GPU");
  const auto few_fused = [&](int64_t M, int64_t r, const auto& change) {
    return takes(
        plan(Family::indexed, 64, r, [&](LoraShape& s) { s.M = M, s.in = 4096, s.rows_per_id = 1, change(s); }),
        A::few_fused);
  };
  expect(few_fused(1, 16, same) && few_fused(64, 64, same), "with the frozen layer");
  expect(!few_fused(65, 16, same) && !few_fused(64, 65, same) && !few_fused(64, 20, same), "not beyond");
  expect(!few_fused(64, 16, [](LoraShape& s) { s.aligned = false; }), "not where bytes do not lie well");
  const auto alone = [](LoraShape& s) { s.T = 1; };
  expect(few_fused(16, 16, alone) && !few_fused(17, 16, alone), "of one adapter, fewer");
  expect(serves(Family::indexed, 64, 64, 4097, [](LoraShape& s) { s.out = 33, s.r = 3; }), "of any width and rank");
  expect(!serves(Family::indexed, 64, 64, 4096, [](LoraShape& s) { s.r = 513; }) &&
             !serves(Family::indexed, 64, 64, 4096, [](LoraShape& s) { s.r = 0; }) &&
             serves(Family::indexed, 64, 64, 4096, [](LoraShape& s) { s.r = 512; }),
         "up to 512");
  expect(serves(Family::indexed, 32768, 64, 64, same) && !serves(Family::indexed, 32769, 64, 64, same),
         "and 32,768 adapters");
  const auto grads = [](Family family, int64_t M) { return few_rows_grads(LoraShape{family, M, 768, 768, 4, 16}); };
  expect(grads(Family::indexed, 512) && !grads(Family::indexed, 513) && !grads(Family::sum, 64),
         "the gradients of few rows that choose adapters");
  const auto wide = [](int64_t in, int64_t out) {
    return few_rows_grads(LoraShape{Family::indexed, 1, in, out, 1, 1});
  };
  expect(wide((1 << 25) - 1, 8) && !wide(1 << 25, 8) && !wide(8, 1 << 25), "of columns that 32 bits can count");

  const auto of_all_rows = [](Family family, int64_t T, int64_t r, int64_t in, const auto& change) {
    LoraShape s{family, 1000, in, 768, T, r};
    s.capability = 90, s.half = s.backward = true;
    change(s);
    return lora_grads_sm90(s);
  };
  const auto ones = [](LoraShape&) {};
  expect(of_all_rows(Family::sum, 1, 64, 768, ones) && of_all_rows(Family::sum, 8, 5, 8, ones),
         "the gradients of adapters on every row");
  expect(!of_all_rows(Family::sum, 1, 65, 768, ones) && !of_all_rows(Family::sum, 3, 17, 768, ones) &&
             !of_all_rows(Family::sum, 1, 0, 768, ones),
         "of up to 64 ranks, each adapter's filled up");
  expect(!of_all_rows(Family::indexed, 1, 8, 768, ones) && !of_all_rows(Family::all, 1, 8, 768, ones) &&
             !of_all_rows(Family::sum, 1, 8, 764, ones) && !of_all_rows(Family::sum, 1, 8, 0, ones) &&
             !of_all_rows(Family::sum, 1, 8, 768, [](LoraShape& s) { s.half = false; }) &&
             !of_all_rows(Family::sum, 1, 8, 768, [](LoraShape& s) { s.capability = 100; }) &&
             !of_all_rows(Family::sum, 1, 8, 768, [](LoraShape& s) { s.M = INT32_MAX; }),
         "and no others");
  const auto of_samples = [&](int64_t samples, int64_t rows, int64_t T, int64_t r) {
    return of_all_rows(Family::indexed, T, r, 768, [=](LoraShape& s) { s.M = samples * rows, s.rows_per_id = rows; });
  };
  expect(of_samples(64, 197, 10, 16) && of_samples(2048, 32, 1000, 64),
         "those of samples of many rows, for each adapter");
  expect(!of_samples(64, 31, 10, 16) && !of_samples(2049, 32, 10, 16) && !of_samples(64, 197, 10, 65) &&
             !of_samples(64, 197, 1 << 15, 16),
         "not of few rows, too many samples, or more than 64 ranks");

  const auto scales = [](int64_t M, int64_t in, int64_t out, int64_t T, int64_t r, int64_t asked, const auto& change) {
    LoraShape s{Family::sum, M, in, out, T, r};
    change(s);
    return dense_on_hopper(s, asked, true);
  };
  const plora::DenseTiles dW = plora::dense_tiles(12608, 768, 768, 132);
  expect(dW.tall == 6 && dW.wide == 4 && dW.slots == 5 && dW.per == 40 && dW.steps == 197,
         "24 tiles of a gradient, each for five blocks");
  expect(plora::dense_tiles(1, 768, 768, 132).slots == 1 && plora::dense_tiles(9999, 3072, 1152, 132).slots == 0,
         "one step of rows, or more tiles than multiprocessors");
  expect(scales(12608, 768, 768, 10, 16, 16, ones) && scales(197, 768, 768, 10, 10, 64, ones) &&
             scales(12608, 768, 768, 20, 32, 0, ones) && scales(12608, 768, 768, 2, 128, 0, ones),
         "the gradients of a sum's scales and of a few ranks");
  expect(!scales(12608, 768, 2304, 10, 16, 16, ones) && !scales(12608, 1024, 1024, 10, 16, 16, ones) &&
             !scales(12608, 768, 768, 100, 16, 16, ones) && !scales(197, 768, 768, 129, 16, 16, ones),
         "where torch's products take longer");
  expect(!scales(12608, 768, 768, 10, 8, 16, ones) && !scales(12608, 768, 768, 10, 48, 48, ones) &&
             !scales(12608, 768, 768, 10, 16, 80, ones) && !scales(12608, 764, 768, 10, 16, 16, ones) &&
             !scales(12608, 768, 768, 10, 16, 16, [](LoraShape& s) { s.half = false; }) &&
             !scales(12608, 768, 768, 10, 16, 16, [](LoraShape& s) { s.capability = 100; }),
         "of ranks that fill chunks, and rows of whole vectors");
  const auto factors_alone = [](int64_t M, int64_t in) {
    return dense_on_hopper(LoraShape{Family::sum, M, in, in, 100, 16}, 16, false);
  };
  expect(
      factors_alone(12608, 768) && factors_alone(197, 768) && factors_alone(788, 1024) && !factors_alone(12608, 1024),
      "without the scales, beside passes over x and dy");

  expect(plan(Family::sum, 1, 16).ctas == 132 && plan(Family::sum, 1, 16).waves == 6, "197 x 4 tiles on 132");
  const auto product = [](Family family, int64_t T, int64_t r, const auto& change) {
    LoraShape s{family, 128 * 197, 768, 768, T, r};
    change(s);
    return plora::h_by_product(s);
  };
  const auto as_is = [](LoraShape&) {};
  const auto ampere = [](LoraShape& s) { s.capability = 80; };
  expect(!product(Family::sum, 1, 64, as_is) && !product(Family::sum, 4, 9, as_is), "64 ranks are a kernel's own");
  expect(product(Family::sum, 1, 65, as_is) && product(Family::sum, 5, 9, as_is), "72 are torch's, once padded");
  expect(product(Family::sum, 1, 17, ampere) && !product(Family::sum, 1, 16, ampere), "24 elsewhere");
  expect(product(Family::sum, 1, 64, [](LoraShape& s) { s.mma_only = true; }), "or when told so");
  expect(product(Family::sum, 1, 64, [](LoraShape& s) { s.in = 764; }), "or with odd widths");
  expect(!product(Family::sum, 1, 64, [](LoraShape& s) { s.in = 764, s.backward = true; }), "of the side that is read");
  expect(!product(Family::indexed, 100, 64, ampere) && !product(Family::indexed, 2, 16, as_is), "never with ids");
  expect(!product(Family::sum, 1, 65, [](LoraShape& s) { s.relu = true; }) &&
             !product(Family::sum, 1, 65, [](LoraShape& s) { s.bias_A = true; }) &&
             product(Family::sum, 1, 65, [](LoraShape& s) { s.bias_A = s.backward = true; }),
         "nor what is more than a product");
  expect(product(Family::all, 10, 16, as_is) && !product(Family::all, 50, 16, as_is), "up to 256 ranks of all");
  expect(!product(Family::all, 10, 16, [](LoraShape& s) { s.half = false; }), "not in float32");
  const auto reads = [](Family family, int64_t T, int64_t r, int64_t rows_per_id) {
    LoraShape s{family, 128 * 197, 768, 768, T, r};
    s.backward = true, s.rows_per_id = rows_per_id;
    return plora::reads_lora_B(s);
  };
  expect(reads(Family::sum, 1, 16, 1) && reads(Family::sum, 1, 128, 1), "B of one adapter is read as it is");
  expect(reads(Family::sum, 4, 16, 1) && !reads(Family::sum, 4, 8, 1), "of a sum where its ranks leave no gap");
  expect(!reads(Family::all, 1, 16, 1), "of `all` never");
  expect(reads(Family::indexed, 50, 16, 1) && reads(Family::indexed, 12, 8, 1), "with ids, too, with few gaps");
  expect(!reads(Family::indexed, 13, 8, 1) && reads(Family::indexed, 13, 8, 197), "but not with many");
  const auto adds = [](Family family, int64_t T, int64_t r, const auto& change) {
    LoraShape s{family, 12608, 768, 768, T, r};
    s.weight = false;
    change(s);
    return plora::adds_on_hopper(s);
  };
  expect(adds(Family::sum, 1, 16, as_is) && adds(Family::indexed, 10, 16, as_is), "adding to y: two kernels");
  expect(!adds(Family::all, 10, 16, as_is), "not of `all`");
  expect(!adds(Family::sum, 1, 16, ampere) && !adds(Family::sum, 1, 16, [](LoraShape& s) { s.mma_only = true; }) &&
             !adds(Family::sum, 1, 16, [](LoraShape& s) { s.half = false; }) &&
             !adds(Family::sum, 1, 16, [](LoraShape& s) { s.aligned = false; }),
         "and on Hopper alone");
  expect(!adds(Family::sum, 1, 16, [](LoraShape& s) { s.in = 764; }) &&
             !adds(Family::sum, 1, 16, [](LoraShape& s) { s.out = 764; }),
         "of rows of whole 16 bytes");
  const auto adds_to = [&](int64_t M, bool backward, int64_t in, int64_t out) {
    return adds(Family::sum, 1, 16, [=](LoraShape& s) { s.M = M, s.backward = backward, s.in = in, s.out = out; });
  };
  expect(adds_to(1366, false, 768, 768) && !adds_to(1365, false, 768, 768), "from 6 MiB of x and y on");
  expect(adds_to(700, false, 768, 3072) && !adds_to(700, false, 3072, 512), "of which y counts twice");
  expect(!adds_to(700, true, 512, 3072) && adds_to(700, true, 3072, 768), "backward it is dx");
  const auto rows_add = [&](int64_t M, int64_t rows_per_id) {
    return adds(Family::indexed, 10, 16, [=](LoraShape& s) { s.M = M, s.rows_per_id = rows_per_id; });
  };
  expect(rows_add(8, 1) && !rows_add(2, 1) && !rows_add(788, 197), "or where a tile may meet more than two adapters");
  expect(adds(Family::sum, 50, 16, [](LoraShape& s) { s.M = 1; }), "as one row of a sum does");
  expect(adds(Family::indexed, 200, 16, as_is) && !adds(Family::indexed, 200, 24, as_is), "up to 2048 ranks a tile");
  expect(plora::padded_rank(0) == 8 && plora::padded_rank(8) == 8 && plora::padded_rank(9) == 16,
         "ranks come in eights");
  expect(!plan(Family::sum, 3, 0).merged() && !plan(Family::indexed, 3, 0).merged(), "no rank at all");
  expect(!plora::mma_only(nullptr) && !plora::mma_only("auto") && plora::mma_only("mma"), "PLORA_CUDA_PATH");
  expect(!plora::mma_only("") && refuses("hopper"), "empty is not set, and nothing else is taken");

  std::mt19937 random(1993);
  bool met[static_cast<int>(LoraAlgorithm::dense) + 1] = {}, made[static_cast<int>(plora::LoraRanks::packed) + 1] = {};
  for (int i = 0; i < 200000 && failures == 0; ++i) {
    const LoraShape s = random_shape(random);
    const LoraPlan p = plora::plan_lora(s);
    met[static_cast<int>(p.algorithm)] = made[static_cast<int>(p.ranks)] = true;
    if (!holds(s, p))
      std::fprintf(stderr, "shape %d: %s, %s; M %lld, in %lld, out %lld, T %lld, r %lld\n", i,
                   plora::algorithm_name(p.algorithm), plora::ranks_name(p.ranks), static_cast<long long>(s.M),
                   static_cast<long long>(s.in), static_cast<long long>(s.out), static_cast<long long>(s.T),
                   static_cast<long long>(s.r));
    expect(holds(s, p), "the kernels take what is planned for them");
  }
  const auto all = [](const auto& seen) {
    return std::find(std::begin(seen), std::end(seen), false) == std::end(seen);
  };
  expect(all(met) && all(made), "and there is a shape for each of them");

  if (failures == 0) std::puts("lora_plan: all passed");
  return failures == 0 ? 0 : 1;
}
