// The products in matrix registers against plain loops in double: sizes around each tile's edge, nothing written
// outside, the same bits however rows are cut, and the registers' configuration of before comes back.
#include "cpu/tiles.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/cpu_features.h"

#if defined(PLORA_AMX)
namespace {

using namespace plora::cpu;

int failures = 0;
std::mt19937 generator(0);

void expect(bool condition, const char* what, int64_t n, int64_t N, int64_t K) {
  if (!condition && ++failures <= 10) std::fprintf(stderr, "FAILED: %s n=%d N=%d K=%d\n", what, int(n), int(N), int(K));
}

float widen(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float f;
  std::memcpy(&f, &wide, sizeof(f));
  return f;
}

uint16_t draw() {
  const float f = std::normal_distribution<float>()(generator);
  uint32_t wide;
  std::memcpy(&wide, &f, sizeof(wide));
  return static_cast<uint16_t>(wide >> 16);
}

std::vector<uint16_t> draw(int64_t n) {
  std::vector<uint16_t> values(n);
  for (uint16_t& v : values) v = draw();
  return values;
}

std::vector<uint16_t> packed(const std::vector<uint16_t>& B, int64_t K, int64_t N) {
  const int64_t depth = tile_count(K, kTileDepth);
  std::vector<uint16_t> to(tile_count(N, kTileRows) * depth * kTileSize, 0);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t j = 0; j < N; ++j)
      to[(j / kTileRows * depth + k / kTileDepth) * kTileSize + k % kTileDepth / 2 * kTileDepth + j % kTileRows * 2 +
         k % 2] = B[k * N + j];
  return to;
}

void test_product(const Tiles& tiles, int64_t n, int64_t N, int64_t K) {
  const int64_t ldx = K + 3, ldc = N + 2;
  const std::vector<uint16_t> X = draw(n * ldx), B = draw(K * N), right = packed(B, K, N);
  std::vector<float> C(n * ldc, 7), rows = C;
  tiles.product(n, N, K, X.data(), ldx, right.data(), C.data(), ldc);
  for (int64_t i = 0; i < n; ++i) {
    tiles.product(1, N, K, X.data() + i * ldx, ldx, right.data(), rows.data() + i * ldc, ldc);
    for (int64_t j = 0; j < ldc; ++j) {
      double expected = j < N ? 0 : 7, size = 1;
      for (int64_t k = 0; j < N && k < K; ++k) {
        expected += double(widen(X[i * ldx + k])) * widen(B[k * N + j]);
        size += std::abs(double(widen(X[i * ldx + k])) * widen(B[k * N + j]));
      }
      expect(std::abs(C[i * ldc + j] - expected) <= 1e-6 * size, "product", n, N, K);
    }
  }
  expect(std::memcmp(C.data(), rows.data(), C.size() * sizeof(float)) == 0, "product, bits of single rows", n, N, K);
}

void test_add_product(const Tiles& tiles, int64_t n, int64_t N, int64_t K, bool given, bool in_place) {
  const int64_t ldh = tile_count(K, kTileDepth) * kTileDepth, ldy = N + 3;
  std::vector<uint16_t> H(n * ldh, 0), from = draw(n * ldy), to(n * ldy, 0x4040);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < K; ++k) H[i * ldh + k] = draw();
  const std::vector<uint16_t> B = draw(K * N), right = packed(B, K, N), before = from;
  std::vector<uint16_t>& y = in_place ? from : to;
  std::vector<const uint16_t*> from_rows;
  std::vector<uint16_t*> to_rows;
  for (int64_t i = 0; i < n; ++i) from_rows.push_back(&from[i * ldy]), to_rows.push_back(&y[i * ldy]);
  const std::vector<uint16_t> old = y;
  tiles.add_product(n, N, K, H.data(), right.data(), given ? from_rows.data() : nullptr, to_rows.data());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < ldy; ++j) {
      if (j >= N) {
        expect(y[i * ldy + j] == old[i * ldy + j], "add_product, outside", n, N, K);
        continue;
      }
      double expected = given ? widen(before[i * ldy + j]) : 0, size = std::abs(expected) + 1e-6;
      for (int64_t k = 0; k < K; ++k) {
        expected += double(widen(H[i * ldh + k])) * widen(B[k * N + j]);
        size += std::abs(double(widen(H[i * ldh + k])) * widen(B[k * N + j]));
      }
      expect(std::abs(widen(y[i * ldy + j]) - expected) <= std::abs(expected) / 256 + 1e-6 * size, "add_product", n, N,
             K);
    }
}

void test_accumulate(const Tiles& tiles, int64_t n, int64_t R, int64_t N, bool fresh) {
  const int64_t ldl = R + 1, ldx = N + 5;
  std::vector<float> L(n * ldl), S(R * N + 4, 3);
  for (float& v : L) v = widen(draw());
  const std::vector<uint16_t> X = draw(n * ldx);
  tiles.accumulate(n, R, N, L.data(), ldl, X.data(), ldx, S.data(), fresh);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t j = 0; j < N; ++j) {
      double expected = fresh ? 0 : 3, size = 4;
      for (int64_t i = 0; i < n; ++i) {
        expected += double(L[i * ldl + r]) * widen(X[i * ldx + j]);
        size += std::abs(double(L[i * ldl + r]) * widen(X[i * ldx + j]));
      }
      expect(std::abs(S[r * N + j] - expected) <= 1e-6 * size, "accumulate", n, R, N);
    }
  for (int64_t i = 0; i < 4; ++i) expect(S[R * N + i] == 3, "accumulate, outside", n, R, N);
}

// Another configuration of this thread's registers, of eight rows each.
void test_configuration(const Tiles& tiles) {
  alignas(64) uint8_t before[64] = {1}, after[64];
  for (int i = 0; i < 8; ++i) before[16 + 2 * i] = 64, before[48 + i] = 8;
  asm volatile("ldtilecfg %0" ::"m"(before) : "memory");
  test_product(tiles, 20, 20, 40);
  asm volatile("sttilecfg %0" : "=m"(after)::"memory");
  asm volatile("tilerelease" ::: "memory");
  expect(std::memcmp(before, after, sizeof(before)) == 0, "configuration", 0, 0, 0);
}

}  // namespace

int main() {
  using namespace plora;
  if (choose_isa(detect_cpu_features(), nullptr) != Isa::kAmx || !amx_is_permitted()) {
    std::puts("tiles: no matrix registers here, NOTHING was tested");
    return 0;
  }
  const Tiles& tiles = isa_amx::tiles;
  for (int64_t n : {1, 15, 16, 17, 31, 32, 64})
    for (int64_t N : {1, 15, 16, 17, 32, 33, 49})
      for (int64_t K : {1, 2, 16, 31, 32, 33, 70}) {
        test_product(tiles, n, N, K);
        for (bool given : {false, true}) test_add_product(tiles, n, N, K, given, false);
        test_add_product(tiles, n, N, K, true, true);
        for (bool fresh : {false, true}) test_accumulate(tiles, n, K, N, fresh);
      }
  test_add_product(tiles, 5, 20, 0, true, false);
  test_configuration(tiles);
  if (failures == 0) std::puts("tiles: all equal to the plain loops");
  return failures != 0;
}
#else
int main() { std::puts("tiles: not compiled for matrix registers"); }
#endif
