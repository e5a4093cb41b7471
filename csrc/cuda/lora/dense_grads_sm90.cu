// The gradients of a sum of adapters for Hopper and 16-bit dtypes, without the merged weight's gradient dW in memory.
//
// Floor: dW is one product as large as dx's; 14.9 GFLOP for 12,608 rows, 768 x 768, 20 us at 750 TFLOP/s. A block sums
// a tile of dW over some of the rows, and as everything else is linear in dW, multiplies its share by the factors where
// it is, in registers: by A^T for V, of which dscaling, where it is asked for, takes the products with B at once, and
// by B^T of the adapters that ask for U. What blocks have of U and V then adds up in a second kernel, in a fixed order.
// A share is rounded to 16 bits for that, as dW would be: in float16 one beyond 65,504 is infinite.
//
// The factors come as further stages of the same ring, 64 ranks of all adapters side by side (a chunk): of A the
// tile's columns in the place of x, of B its rows in the place of dy.

#include <algorithm>

#include "../../common/lora_plan.h"
#include "../device/mma.cuh"
#include "../device/overlap.cuh"
#include "../device/pair.cuh"
#include "../device/ring.cuh"
#include "../device/tensor_map.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kTileOut = lora_plan::kDenseRows, kTileIn = lora_plan::kDenseColumns, kRows = lora_plan::kDenseStep;
constexpr int kChunk = lora_plan::kDenseChunk, kSlices = kChunk / 16;
static_assert(kTileOut == 128 && kTileIn == 192 && kRows == 64 && kChunk == 64);
constexpr int kWarps = 8, kThreads = 32 * (kWarps + 1);
constexpr uint32_t kBox = 64 * 128;              // 64 rows of 64 columns, swizzled
constexpr uint32_t kBytesSlice = kTileOut * 32;  // of B: 16 ranks, likewise
constexpr uint32_t kBytesOut = kTileOut / 64 * kBox, kBytesStage = kBytesOut + kTileIn / 64 * kBox;
// In shared memory: the ring, the tile of dW in 16 bits, barriers, what there is of dscaling.
constexpr int kStages = 4;
constexpr uint32_t kTile = kStages * kBytesStage, kBoxTile = kTileOut * 128,
                   kBarriers = kTile + kTileIn / 64 * kBoxTile, kDots = kBarriers + 16 * kStages;

struct Arguments {
  CUtensorMap x, dy, A, B;
  int tall, wide, slots, per, steps;  // DenseTiles
  int T, slices;                      // of 16 ranks, of an adapter
  int first_chunk, chunks;            // those of all adapters, or from the first that asks up to the last
  int first, asked;                   // ranks that ask
  float *U, *V;                       // [tall, slots, asked, in], [wide, slots, out, asked], of whole tiles, or null
  float* dots;                        // [blocks, T], or null: the scales do not ask
};

// Of four values of each lane: the sum over all lanes of value l % 4, at lane l.
__device__ inline float sum_four(float (&v)[4]) {
#pragma unroll
  for (int n = 2; n > 0; n /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const bool upper = threadIdx.x & n;
      const float other = __shfl_xor_sync(~0u, upper ? v[i] : v[i + n], n);
      v[i] = (upper ? v[i + n] : v[i]) + other;
    }
#pragma unroll
  for (int n = 4; n < 32; n *= 2) v[0] += __shfl_xor_sync(~0u, v[0], n);
  return v[0];
}

template <typename scalar>
__global__ void __launch_bounds__(kThreads, 1) dense_grads_sm90_kernel(const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const uint32_t memory = sm90::smem_address(dynamic);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int tile = static_cast<int>(blockIdx.x) / a.slots, slot = static_cast<int>(blockIdx.x) % a.slots;
  const int tile_row = tile / a.wide, tile_column = tile % a.wide, begin = slot * a.per;
  const int steps = min(a.per, a.steps - begin);  // none or fewer for the last shares
  sm90::Ring ring{memory, memory + kBarriers, kBytesStage, kStages};
  if (threadIdx.x == 32 * kWarps) {
    for (const CUtensorMap* map : {&a.x, &a.dy, &a.A, &a.B}) sm90::prefetch_map(map);
    ring.init(kWarps);
    sm90::fence_barrier_init();
  }
  float* const dots = reinterpret_cast<float*>(dynamic + kDots);  // [warps, chunks, slices of a chunk]
  __syncthreads();
  wait_for_predecessor();

  if (warp == kWarps) {
    const bool chosen = sm90::elect();
    const auto load = [&](const CUtensorMap* map, int b, int c0, int c1) {  // 64 columns
      sm90::load_2d(map, ring.full(), ring.at() + b * kBox, c0, c1, chosen);
    };
    const int row = tile_row * kTileOut, column = tile_column * kTileIn;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, ring.next()) {
      ring.fill(kBytesStage, chosen);
#pragma unroll
      for (int b = 0; b < kTileOut / 64; ++b) load(&a.dy, b, row + 64 * b, (begin + i) * kRows);
#pragma unroll
      for (int b = 0; b < kTileIn / 64; ++b) load(&a.x, kTileOut / 64 + b, column + 64 * b, (begin + i) * kRows);
    }
#pragma unroll 1
    for (int c = a.first_chunk; c < a.chunks; ++c, ring.next()) {
      ring.fill(kBytesStage, chosen);
      sm90::load_4d(&a.B, ring.full(), ring.at(), 0, row, c * kSlices % a.slices, c * kSlices / a.slices, chosen);
#pragma unroll
      for (int b = 0; b < kTileIn / 64; ++b) load(&a.A, kTileOut / 64 + b, column + 64 * b, c * kChunk);
    }
    return;
  }

  const int group = warp / 4, own = 16 * warp, line = own + lane / 4, two = lane % 4 * 2;  // in a tile
  constexpr uint64_t kLayout = sm90::operand_layout(sm90::Swizzle::b128, 0, 1024);         // of 64 columns
  constexpr uint64_t kLayoutX = sm90::operand_layout(sm90::Swizzle::b128, kBox, 1024);
  constexpr uint64_t kLayoutB = sm90::operand_layout(sm90::Swizzle::b32, kBytesSlice, 256);
  float d[kTileIn / 2] = {};
  if (steps > 0)
    sm90::multiply(d, ring, steps, [&](uint32_t at) {
      const uint64_t dy = sm90::operand(kLayout, at + group * kBox), x = sm90::operand(kLayoutX, at + kBytesOut);
#pragma unroll
      for (int k = 0; k < kRows / 16; ++k)
        sm90::wgmma<kTileIn, scalar, 1, 1>(d, dy + k * (16 * 128 >> 4), x + k * (16 * 128 >> 4));
    });
  launch_successor();
  uint32_t dW[kTileIn / 4];
#pragma unroll
  for (int i = 0; i < kTileIn / 4; ++i) dW[i] = pair<scalar>(d[2 * i], d[2 * i + 1]);
  if (a.U) {  // for B^T dW
    const int r = own + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int k = 0; k < kTileIn / 16; ++k)
      sm90::store_matrices(memory + kTile + k / 4 * kBoxTile + r * 128 + ((k % 4 * 2 + lane / 16) ^ r % 8) * 16,
                           dW[4 * k], dW[4 * k + 1], dW[4 * k + 2], dW[4 * k + 3]);
    sm90::fence_async();
    sm90::named_barrier(1, 32 * kWarps);
  }

  sm90::Ring ahead = ring;
  const auto start = [&](float (&v)[kChunk / 2]) {  // dW A^T of the next chunk
    ahead.wait();
    const uint64_t A = sm90::operand(kLayout, ahead.at() + kBytesOut);
    sm90::hold(v), sm90::hold(dW);
    sm90::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileIn / 16; ++k)
      sm90::wgmma_registers<scalar>(v, dW + 4 * k, A + ((k / 4 * kBox + k % 4 * 32) >> 4), k > 0);
    sm90::wgmma_commit();
    sm90::hold(v), sm90::hold(dW);
    ahead.next();
  };
  const auto finish = [&](int c, uint32_t at, float (&v)[kChunk / 2]) {  // the products with B, for dscaling
    sm90::hold(v), sm90::hold(dW);
    if (!a.dots) return;
    const uint8_t* const B = dynamic + (at - memory) + line * 32 + two * 2;
    const int first = line / 4 % 2 * 16;  // of two swizzled vectors; eight rows on it is the same
    float dot[kSlices] = {};
#pragma unroll
    for (int i = 0; i < kChunk / 4; ++i) {
      const float2 b = unpair<scalar>(*reinterpret_cast<const uint32_t*>(B + i / 4 * kBytesSlice + i % 2 * (8 * 32) +
                                                                         (i / 2 % 2 ? 16 - first : first)));
      dot[i / 4] += v[2 * i] * b.x + v[2 * i + 1] * b.y;
    }
    const float sum = sum_four(dot);
    if (lane < kSlices) dots[(warp * a.chunks + c) * kSlices + lane] = sum;
  };
  const auto give = [&](int c, uint32_t at, const float (&v)[kChunk / 2]) {  // what adapters ask for
    const int before = a.first - kChunk * c;                                 // ranks
    if (before + a.asked <= 0 || before >= kChunk) return;
    if (a.V) {
      const int64_t part = tile_column * a.slots + slot;
      float* const to = a.V + (part * a.tall * kTileOut + tile_row * kTileOut + line) * a.asked + two - before;
#pragma unroll
      for (int i = 0; i < kChunk / 4; ++i) {
        const int rank = i / 2 * 8 + two - before;
        if (rank >= 0 && rank < a.asked)
          *reinterpret_cast<float2*>(to + i % 2 * 8 * a.asked + i / 2 * 8) = make_float2(v[2 * i], v[2 * i + 1]);
      }
    }
    if (!a.U) return;
    const int64_t part = tile_row * a.slots + slot, columns = a.wide * kTileIn;
    const int rank = line % 64 - before;
#pragma unroll 1
    for (int i = 3 * group; i < 3 * group + 3; ++i) {  // B^T dW of 32 columns
      float u[16];
      const uint64_t B = sm90::operand(kLayoutB, at);
      const uint64_t columns_dW = sm90::operand(kLayout, memory + kTile + i / 2 * kBoxTile + i % 2 * 64);
      sm90::hold(u);
      sm90::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileOut / 16; ++k)
        sm90::wgmma<32, scalar, 1, 1>(u, B + k * (16 * 32 >> 4), columns_dW + k * (16 * 128 >> 4), k > 0);
      sm90::wgmma_commit();
      sm90::wgmma_wait<0>();
      sm90::hold(u);
      float* const to = a.U + (part * a.asked + rank) * columns + tile_column * kTileIn + 32 * i + two;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (rank + 8 * h < 0 || rank + 8 * h >= a.asked) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          *reinterpret_cast<float2*>(to + 8 * h * columns + 8 * j) =
              make_float2(u[4 * j + 2 * h], u[4 * j + 2 * h + 1]);
      }
    }
  };
  const auto next = [&](int c, const float (&v)[kChunk / 2]) {
    give(c, ring.at(), v);
    sm90::release(ring.empty());
    ring.next();
  };

  float v[2][kChunk / 2];
  int c = a.first_chunk;
#pragma unroll 1
  for (; c + 1 < a.chunks; c += 2) {
    start(v[0]);
    const uint32_t second = ahead.at();
    start(v[1]);
    sm90::wgmma_wait<1>();
    finish(c, ring.at(), v[0]);
    sm90::wgmma_wait<0>();
    finish(c + 1, second, v[1]);
    next(c, v[0]), next(c + 1, v[1]);
  }
  if (c < a.chunks) {
    start(v[0]);
    sm90::wgmma_wait<0>();
    finish(c, ring.at(), v[0]);
    next(c, v[0]);
  }

  if (!a.dots) return;
  sm90::named_barrier(1, 32 * kWarps);
  for (int t = threadIdx.x; t < a.T; t += 32 * kWarps) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w)
      for (int i = 0; i < a.slices; ++i) sum += dots[w * a.chunks * kSlices + t * a.slices + i];
    a.dots[static_cast<int>(blockIdx.x) * a.T + t] = sum;
  }
#endif
}

// --- the sums over blocks --------------------------------------------------------------------------------------------

constexpr int kSumThreads = 256, kSumPiece = 64;  // elements of a block, each summed by 16 threads

// out = s times the sum over n of from[n, lines, columns], whose first lines and columns are the gradient's.
struct Sum {
  const float* from;
  int parts, blocks;
  int64_t lines, columns;
  void* out;
};

struct Sums {
  Sum A, B;
  int T, rank, r, in, out;
  int first, count;  // adapters that ask
  const float *scaling, *times, *dots;
  int parts;   // of dots
  int scales;  // T, or 0: they do not ask
  float* dscaling;
  int zeros_A;  // blocks
};

template <typename scalar>
__global__ void __launch_bounds__(kSumThreads) dense_sums_kernel(const __grid_constant__ Sums p) {
  __shared__ float4 sums[kSumThreads];
  wait_for_predecessor();
  const auto times = [&](int t) { return p.times ? p.times[t] : 1.f; };
  int block = blockIdx.x;
  if (block < p.scales) {  // dscaling
    float sum = 0;
    for (int n = threadIdx.x; n < p.parts; n += kSumThreads) sum += __ldcg(p.dots + n * p.T + block);
    sum = block_sum<kSumThreads>(sum);
    if (threadIdx.x == 0) p.dscaling[block] = times(block) * sum;
    return;
  }
  block -= p.scales;
  if (block < p.A.blocks + p.B.blocks) {
    const bool is_A = block < p.A.blocks;
    const Sum& q = is_A ? p.A : p.B;
    const int64_t first = static_cast<int64_t>(is_A ? block : block - p.A.blocks) * kSumPiece;
    const int column = threadIdx.x % (kSumPiece / 4), slice = threadIdx.x / (kSumPiece / 4);
    constexpr int kSlices = kSumThreads / (kSumPiece / 4), kBatch = 4;  // loads in flight
    float4 sum{};
#pragma unroll 1
    for (int n = slice; n < q.parts; n += kBatch * kSlices) {
      float4 v[kBatch]{};
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (n + i * kSlices < q.parts)
          v[i] = __ldcg(reinterpret_cast<const float4*>(q.from + (n + i * kSlices) * q.lines * q.columns + first) +
                        column);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= kSumPiece) return;
    float total = 0;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) total += reinterpret_cast<const float*>(sums)[i * kSumPiece + threadIdx.x];
    const int64_t line = (first + threadIdx.x) / q.columns, place = first + threadIdx.x - line * q.columns;
    const int64_t rank = is_A ? line : place, other = is_A ? place : line;
    const int t = static_cast<int>(rank) / p.rank, j = static_cast<int>(rank) % p.rank;
    if (j >= p.r || other >= (is_A ? p.in : p.out)) return;
    const float s = p.scaling[p.first + t] * times(p.first + t);
    const int64_t to = is_A ? (static_cast<int64_t>(p.first + t) * p.r + j) * p.in + other
                            : (static_cast<int64_t>(p.first + t) * p.out + other) * p.r + j;
    static_cast<scalar*>(q.out)[to] = from_float<scalar>(s * total);
    return;
  }
  // the others' zeros, in vectors of 16 bytes
  block -= p.A.blocks + p.B.blocks;
  const bool is_A = block < p.zeros_A;
  const int64_t size = static_cast<int64_t>(is_A ? p.in : p.out) * p.r / kVector<scalar>;
  int64_t e = static_cast<int64_t>(is_A ? block : block - p.zeros_A) * kSumThreads + threadIdx.x;
  if (e >= size * (p.T - p.count)) return;
  if (e >= size * p.first) e += size * p.count;
  store_vector(static_cast<scalar*>(is_A ? p.A.out : p.B.out) + e * kVector<scalar>, Vector<scalar>{}.raw);
}

}  // namespace

void dense_grads_sm90(const DenseGrads& p, const DenseRows& rows, const Allocator& workspace, cudaStream_t stream) {
  const int64_t ranks = p.T * p.padded_r, count = p.adapters.size(), asked = count * p.padded_r;
  const int64_t first = count > 0 ? p.adapters.front() : 0;
  PLORA_CHECK((p.dscaling || asked > 0) && p.dtype != Dtype::float32 &&
                  takes_dense(rows.M, p.in, p.out, p.T, p.r, asked, multiprocessors()) &&
                  (count == 0 || p.adapters.back() == first + count - 1) && aligned(rows.x, rows.dy, rows.A, p.B) &&
                  aligned(p.dA, p.dB),
              "dense_grads: not what was planned for dense_grads_sm90");
  const DenseTiles tiles = dense_tiles(rows.M, p.in, p.out, multiprocessors());
  const int64_t slices = p.padded_r / 16, at_once = std::min<int64_t>(slices, kSlices);
  Arguments a{};
  describe_tensor<2>(a.x, p.dtype, rows.x, {p.in, rows.M}, {p.in}, {64, kRows}, k128);
  describe_tensor<2>(a.dy, p.dtype, rows.dy, {p.out, rows.M}, {p.out}, {64, kRows}, k128);
  describe_tensor<2>(a.A, p.dtype, rows.A, {p.in, ranks}, {p.in}, {64, kChunk}, k128);
  describe_tensor<4>(a.B, p.dtype, p.B, {16, p.out, slices, p.T}, {p.padded_r, 16, p.padded_r * p.out},
                     {16, kTileOut, narrow(at_once), narrow(kSlices / at_once)}, k32);
  a.tall = narrow(tiles.tall), a.wide = narrow(tiles.wide), a.slots = narrow(tiles.slots), a.per = narrow(tiles.per);
  a.steps = narrow(tiles.steps);
  a.T = narrow(p.T), a.slices = narrow(slices), a.first = narrow(first * p.padded_r), a.asked = narrow(asked);
  a.first_chunk = p.dscaling ? 0 : a.first / kChunk;
  a.chunks = narrow(ceil_div(p.dscaling ? ranks : a.first + asked, kChunk));
  const int blocks = a.tall * a.wide * a.slots;

  Sums s{};
  const auto sum_up = [&](Sum& of, void* out, int64_t parts, int64_t lines, int64_t columns) {
    if (out && asked > 0) of.parts = narrow(parts), of.blocks = narrow(lines * columns / kSumPiece);
    of.lines = lines, of.columns = columns, of.out = out;
    return of.parts * lines * columns;
  };
  const int64_t size_U = sum_up(s.A, p.dA, tiles.tall * a.slots, asked, tiles.wide * kTileIn);
  const int64_t size_V = sum_up(s.B, p.dB, tiles.wide * a.slots, tiles.tall * kTileOut, asked);
  float* const memory =
      static_cast<float*>(workspace((size_U + size_V + (p.dscaling ? blocks * p.T : 0)) * sizeof(float)));
  if (size_U > 0) a.U = memory;
  if (size_V > 0) a.V = memory + size_U;
  if (p.dscaling) a.dots = memory + size_U + size_V, s.scales = a.T;
  s.A.from = a.U, s.B.from = a.V, s.dots = a.dots, s.parts = blocks;
  s.T = a.T, s.rank = narrow(p.padded_r), s.r = narrow(p.r), s.in = narrow(p.in), s.out = narrow(p.out);
  s.first = narrow(first), s.count = narrow(count);
  s.scaling = p.scaling, s.times = p.times, s.dscaling = p.dscaling;
  const auto zeros = [&](const void* out, int64_t columns) {
    return out ? narrow(ceil_div((p.T - count) * p.r * columns / 8, kSumThreads)) : 0;
  };
  s.zeros_A = zeros(p.dA, p.in);
  const int64_t all = s.scales + s.A.blocks + s.B.blocks + s.zeros_A + zeros(p.dB, p.out);
  dispatch<2>("dense_grads", p.dtype, [&](auto tag) {
    using scalar = decltype(tag);
    launch_overlapped("dense_grads", &dense_grads_sm90_kernel<scalar>, blocks, kThreads,
                      kDots + kWarps * a.chunks * kSlices * sizeof(float), stream, true, a);
    launch_overlapped("dense_grads", &dense_sums_kernel<scalar>, all, kSumThreads, 0, stream, true, s);
  });
}

}  // namespace plora::cuda
