// The CUDA kernels of the low-rank families, as their host code (lora.cpp) calls them. Everything is enqueued on
// `stream`; nothing waits, allocates or copies from the host. Pointers are 16-byte aligned where the fast paths of a
// kernel need it, which each launcher looks at itself; rows may have any stride that is not smaller than their width.
//
// Ranks. R, the width of h and g, is r where rows choose an adapter (ids) and T r where every row meets all of them
// (sum, all): then column t r + j belongs to rank j of adapter t. h and g are kept unscaled, in the dtype of x:
//   forward   h = act(x A^T + a)             y  = y0 + s h B^T + s b
//   backward  g = dy B, 0 where act cut      dx = dy W + s g A
//
// Words of these files:
//   down, up     the factor of the first product and of the second: A and B, backward B and A
//   padded rank  r filled up with zeros to a multiple of 8, as the products take it
//   tile         128 rows by 192 columns of y, the work of a block at a time; column tiles lie side by side
//                (few_rows.cu: up to 32 rows of an adapter; few_rows_sm90.cu: all rows by 128 columns)
//   third        64 of a tile's columns, a block's work where tiles would leave most blocks idle
//   slot         16 ranks of one adapter, a step of a product
//   chunk        likewise of few rows, where the last one of an adapter is filled up with zeros (few_rows.cuh)
//   place        the number of an adapter among those that a tile's rows met, ascending
//   given        s h, computed before the product that adds it; else h is made `in the loop` over x
//   pair         two blocks on tiles side by side, of which each makes one of two slots in the loop, for both
//   kept         h, or the merged weight, as forward leaves it for backward
//   gate         the h whose zeros cut the gradient where act did
//   slab         the y, or dy, of one adapter of `all`
//   slice        columns of y that an equal block of an adapter's ranks alone reaches (q and v of a qkv layer)
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../common/dtype.h"
#include "../device/memory.h"

namespace plora::cuda {

// Which adapters act on which row. Ids outside of [0, T) count as -1, no adapter, whatever the tensor holds.
struct Rows {
  int64_t M;
  int64_t T, r;
  const int64_t* ids = nullptr;  // [M / rows_per_id]; null: every row meets all T adapters
  int64_t rows_per_id = 1;
  int64_t R() const { return ids ? r : T * r; }
};

// h = act(x down^T + bias), then y = y0 + s h up^T + s bias_up. Either half may be left out (low_rank.cu).
struct LowRank {
  Dtype dtype;  // bf16, fp16 or fp32, the latter in true float32: three TF32 products
  Rows rows;
  const float* scaling;  // [T]
  int64_t K, N;          // width of x, width of y

  const void* x = nullptr;  // null: h is read
  int64_t ldx = 0;
  int64_t x_slab = 0;          // elements from the x of adapter t to that of t + 1 (the dy of `all`); 0: one x for all
  const void* down = nullptr;  // [T, r, K]
  const int64_t* ranks = nullptr;   // [T], for few_rows and few_rows_sm90 alone: what lies beyond does not count
  bool down_transposed = false;     // it is [T, K, r], which low_rank_sm90 and few_rows take
  const void* bias_down = nullptr;  // [T, r]
  bool relu = false;
  const void* gate = nullptr;  // [M, R]: h becomes 0 where the gate is <= 0 (not where it is NaN)
  void* h = nullptr;           // [M, R], written where x is given (if not null), else read
  // [M, places, r], written with h by low_rank_sm90: s h of the adapters that the row's aligned block of 128 met,
  // ascending, zero but for the row's own, and in float16 without the power of two in s (given.cuh). Without ids
  // [M, T r].
  void* scaled_h = nullptr;
  int64_t places = 0;
  int64_t followed = 0;  // blocks of the kernel that follows low_rank_sm90, and may start beside it

  void* y = nullptr;              // null: no second half
  const void* up = nullptr;       // [T, N, r]
  bool up_transposed = false;     // it is [T, r, N], which low_rank_add_sm90 takes, and few_rows with the other one
  const void* bias_up = nullptr;  // [T, N]
  const void* y0 = nullptr;  // [M, N], one for all slabs of y, or null: zero. For y += ... give y and y_slab itself
  int64_t ldy = 0, ldy0 = 0;
  int64_t y_slab = 0, y0_slab = 0;  // elements from the y of adapter t to that of t + 1 (`all`); 0: they are summed
};
void low_rank(const LowRank& p, cudaStream_t stream);

// The first half alone (low_rank_sm90.cu). What y0 points to, if anything, comes to L2 meanwhile.
void low_rank_sm90(const LowRank& p, cudaStream_t stream);

// Both halves, s h between them in p.scaled_h (add_sm90.cu).
void low_rank_add_sm90(const LowRank& p, cudaStream_t stream);

// Both halves of a few rows (lora_plan.h), or h alone where N = 0, from factors of any rank as they are; h and the gate
// have padded_rank(r) columns for each adapter (few_rows.cu).
void few_rows(const LowRank& p, const Allocator& workspace, cudaStream_t stream);

// What the first half leaves of few rows: sums over parts of K, in float32, unfinished.
struct FewSums {
  int adapters;    // that a row meets: 1 with ids, else T
  int chunks;      // of 16 ranks of an adapter
  int width;       // ranks of a row in `partial`: the chunks of all its adapters
  int columns;     // of an adapter in h and the gate
  int parts;       // of K
  float* partial;  // [parts, M, width]
};

// Each half alone, with memory of so many bytes between them. `beside`: other kernels come between them, as the first
// one runs on a stream of its own; it needs no y yet, but all else, and what is added to is y itself.
size_t few_rows_bytes(const LowRank& p, bool beside);
FewSums few_rows_shrink(const LowRank& p, void* memory, bool beside, cudaStream_t stream);
void few_rows_expand(const LowRank& p, void* memory, bool beside, cudaStream_t stream);

// Both halves and the frozen layer of few rows, for Hopper: y = x W^T + bias + y0 + s h up^T + s bias_up, or with
// transposed factors y = x W + y0 + s h up; weight [N, K], or [K, N] (few_rows_sm90.cu).
void few_rows_sm90(const LowRank& p, const void* weight, const void* bias, const Allocator& workspace,
                   cudaStream_t stream);

// The second half alone, of `all`: h [M, T r] is read, y_slab is set (expand.cu).
void expand(const LowRank& p, cudaStream_t stream);

// Likewise with the frozen layer, for Hopper: y_t = x W^T + bias + y0 + s_t h_t up_t^T + s_t bias_up_t, from h; weight
// [N, K]. `overlap`: the kernel before on the stream is low_rank_sm90's, which made h (all_sm90.cu).
void all_sm90(const LowRank& p, const void* weight, const void* bias, bool overlap, cudaStream_t stream);

// A copy of the factors that low_rank and the fused product can take: from [T, rows, columns], of which one dimension
// is the rank, to [T, rows', columns'] or, transposed, [T, columns', rows'], the rank padded with zeros to `padded` (a
// multiple of 8) and zero from ranks[t] on, times scaling[t]; either may be null (pack.cu).
void pack(Dtype dtype, const void* from, void* to, int64_t T, int64_t rows, int64_t columns, bool rank_is_rows,
          int64_t padded, bool transpose, const int64_t* ranks, const float* scaling, cudaStream_t stream);

// The gradients of everything but x; null: not asked (lora_grads.cu). Sums over rows in a fixed order.
//   dA[t, j] = s_t sum g[m, j] x[m]     dB[t, :, j] = s_t sum dy[m] h[m, j]     over the rows m of adapter t
//   dbias_A[t, j] = s_t sum g[m, j]     dbias_B[t] = s_t sum dy[m]
//   dscaling[t] = sum_m (sum_j g'[m, j] h[m, j] + dy[m] bias_B[t])     (g' = g: h is 0 where act cut)
struct LoraGrads {
  Dtype dtype;
  Rows rows;
  const float* scaling;  // [T]
  int64_t in, out;
  const void *x = nullptr, *dy = nullptr;
  int64_t ldx = 0, lddy = 0;
  int64_t dy_slab = 0;                    // `all`: elements from the dy of adapter t to that of t + 1
  const void *h = nullptr, *g = nullptr;  // [M, ld_rank], of which the first columns are the R
  int64_t padded_r = 0;                   // h and g hold padded_r (>= r) columns per adapter instead of r
  const void* bias_B = nullptr;           // [T, out], for dscaling
  const int64_t* ranks = nullptr;         // [T]: gradients of ranks from there on are 0
  std::vector<int64_t> adapters;          // those whose factors and biases ask; the others' entries are written as 0
  void *dA = nullptr, *dB = nullptr, *dbias_A = nullptr,
       *dbias_B = nullptr;    // [T, r, in], [T, out, r], [T, r], [T, out]
  float* dscaling = nullptr;  // [T], for all adapters
};
void lora_grads(const LoraGrads& p, const Allocator& workspace, cudaStream_t stream);

// dA and dB alone, for Hopper, where all adapters act on every row and ask, or, with ids of samples of many rows, any
// of them (lora_grads_sm90.cu). `overlap`: the kernel before on the stream makes g and nothing else that is read; it
// may still run, but what it follows is done.
void lora_grads_sm90(const LoraGrads& p, bool overlap, cudaStream_t stream);

// dA and dB alone, of a few rows with ids (few_rows_grads.cu). `overlap`: the kernel before on the stream is few_rows'
// or few_rows_sm90's, which made g and nothing else that is read. Both are then written while it may still run, so
// their memory must have been allocated before its own: from what it gives back they would be written too early.
void few_rows_grads(const LoraGrads& p, bool overlap, cudaStream_t stream);

// Likewise of a sum, by way of the merged weight's gradient dW: from U[t] = B[t]^T dW and V[t] = dW A[t]^T
// (dense_grads.cu).
//   dA[t] = s_t U[t]     dB[t] = s_t V[t]     dscaling[t] = times[t] the sum of the products of V[t] and B[t]
struct DenseGrads {
  Dtype dtype;
  int64_t T, r, padded_r, in, out;
  const float *scaling, *times;   // [T], s is their product; times: or null, ones
  std::vector<int64_t> adapters;  // those whose factors ask, ascending; the others' entries are written as 0
  // U [n, padded_r, in], V [out, n, padded_r] and B [T, out, padded_r], whose padding is 0: U of the adapters from the
  // first to the last that asks; V of those too, or of all with dscaling, which alone needs B
  const void *U = nullptr, *V = nullptr, *B = nullptr;
  int64_t width_V = 0;                // n padded_r
  void *dA = nullptr, *dB = nullptr;  // [T, r, in], [T, out, r]
  float* dscaling = nullptr;          // [T, dense_parts], to be added up
};
void dense_grads(const DenseGrads& p, cudaStream_t stream);

// Likewise for Hopper, where few adapters ask, all in a row, and the scales or not, from what dW, U and V are made of,
// not from these; dscaling is [T] (dense_grads_sm90.cu).
struct DenseRows {
  int64_t M;
  const void *x, *dy, *A;  // [M, in], [M, out], [T, padded_r, in]
};
void dense_grads_sm90(const DenseGrads& p, const DenseRows& rows, const Allocator& workspace, cudaStream_t stream);

// In how many parts an adapter's dscaling is summed: no block has more than 2^17 products.
inline int64_t dense_parts(int64_t padded_r, int64_t out) { return std::max<int64_t>(padded_r * out >> 16, 1); }

// weight + sum over t of s_t B_t A_t, of ranks below ranks[t] where that is given (lora_merge.cu).
struct LoraMerge {
  Dtype dtype;
  int64_t out, in, T, r;
  const void *weight, *A, *B;   // [out, in], [T, r, in], [T, out, r]
  const void *scaling, *times;  // s is their product; [T] of float32, or of float64 with it; times: or null, ones
  const int64_t* ranks;         // [T] or null
  void* merged;
};
void lora_merge(const LoraMerge& p, cudaStream_t stream);

// The same on compute capability 9.0, in 16-bit dtypes, for rows of whole 16 bytes, 8 ranks or whole 16, all of which
// count (merge_sm90.cu).
void merge_sm90(const LoraMerge& p, cudaStream_t stream);

// The factors of adapters side by side, filled up with zeros to rank r (lora_stack.cu). `from` is float32 or `to`.
struct LoraStack {
  Dtype from, to;
  int r, in, out;
  void *A, *B;  // [T, r, in], [T, out, r]
  float* scaling;
};
struct OneOfStack {
  const void *A, *B;  // [r, in], [out, r], of its own rank
  float scaling;
  int r;
};
void lora_stack(const LoraStack& p, const std::vector<OneOfStack>& adapters, cudaStream_t stream);

// Both halves and the frozen layer in one persistent product, for Hopper (fused_sm90.cu); 16-bit dtypes, K, N and r
// multiples of 8, pointers 16-byte aligned. h is made in the loop, or its s h given. With up_transposed backward's:
//   forward     y = x W^T + bias + y0 + s h up^T + s bias_up       weight [N, K], down [T, r, K], up [T, N, r]
//   transposed  y = x W + y0 + s h up                               weight [K, N], down [T, K, r], up [T, r, N]
struct Fused : LowRank {
  const void *weight, *bias;
  // Of a tile at most so many slots are made in the loop from `down`, and written to `h`, but for rows without an
  // adapter: none, and scaled_h is given, or h itself where `up` is scaled; one, as no tile needs two (`slices` may
  // leave one of several); or two, without slices, where tiles lie in pairs beside each other.
  int slots;
  bool overlap;  // the kernel before on the stream is low_rank_sm90's, which made scaled_h
  // Column ranges of y, one for each equal block of ranks of an adapter; ranks outside of theirs are known to be zero
  // in `up` and are left out of the loop. Empty: none is known.
  std::vector<int64_t> slices{};
};
void fused(const Fused& p, cudaStream_t stream);

}  // namespace plora::cuda
