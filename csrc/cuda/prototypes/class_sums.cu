// class_sums on CUDA: every class's total grows row by row in the order of the rows, as on the CPU, so the bits depend
// neither on how the rows are cut into batches nor on the machine. Features are read once. Two launches:
//
//   sort_kernel  a block sorts a chunk of rows by class
//   sum_kernel   a warp owns a class and a slab of columns: it finds its rows in the sorted chunks, sends for them well
//                ahead, into a ring in shared memory, and adds one after another

#include <algorithm>
#include <cstdio>

#include "../device/mma_smem.cuh"
#include "../device/overlap.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kChunk = 256;   // rows, and threads, of a sorting block
constexpr int kChunks = 256;  // chunks that a summing warp looks at together
constexpr int kAhead = 512;   // bytes of features that each sorting thread sends for: the first ones that are needed

// order: the rows of chunk g, sorted by class, at [g kChunk, ...). bounds[c, g]: where class c starts there, and in the
// upper half how many rows it has.
__global__ void __launch_bounds__(kChunk)
    sort_kernel(const int64_t* __restrict__ labels, int64_t N, int C, int* __restrict__ order,
                uint32_t* __restrict__ bounds, const char* features, int64_t bytes) {
  __shared__ int4 keys[kChunk / 4];
  __shared__ int sorted[kChunk];
  const int i = threadIdx.x, chunk = blockIdx.x;
  const int64_t n = static_cast<int64_t>(chunk) * kChunk + i;
  launch_successor();
  const int64_t label = n < N ? labels[n] : -1;
  if ((n + 1) * kAhead <= bytes) prefetch_to_l2(features + n * kAhead, kAhead);
  if (label < -1 || label >= C) {  // as torch's own indexing: the launch fails, nothing is silently lost
    printf("plora_ext.class_sums: labels must be between -1 and %d, got %lld at position %lld\n", C - 1,
           static_cast<long long>(label), static_cast<long long>(n));
    __trap();
  }
  // Keys are distinct, so a key's place is the number of those below it.
  const int key = (label < 0 ? C : static_cast<int>(label)) * kChunk + i;
  reinterpret_cast<int*>(keys)[i] = key;
  __syncthreads();
  int place = 0;
#pragma unroll 8
  for (int k = 0; k < kChunk / 4; ++k) {
    const int4 other = keys[k];
    place += (other.x < key) + (other.y < key) + (other.z < key) + (other.w < key);
  }
  sorted[place] = key;
  if (n < N) order[static_cast<int64_t>(chunk) * kChunk + place] = static_cast<int>(n);
  __syncthreads();
  const auto below = [&](int limit) {  // how many keys
    int count = 0;
#pragma unroll
    for (int step = kChunk / 2; step > 0; step /= 2)
      if (sorted[count + step - 1] < limit) count += step;
    return count + (sorted[count] < limit);
  };
  for (int c = i; c < C; c += kChunk) {
    const int start = below(c * kChunk), count = below((c + 1) * kChunk) - start;
    bounds[static_cast<int64_t>(c) * gridDim.x + chunk] = static_cast<uint32_t>(start | count << 16);
  }
}

// A lane has kWidth neighbouring columns; kRows rows make a batch, of which kStages - 1 are on their way.
template <typename scalar, int kWidth, int kRows, int kStages>
__global__ void __launch_bounds__(32)
    sum_kernel(const scalar* __restrict__ features, const int* order, const uint32_t* bounds, acc_type<scalar>* sums,
               int64_t* counts, int64_t D, int chunks, int slabs, bool vectors) {
  using acc = acc_type<scalar>;
  using Vec = Elements<scalar, kWidth>;
  alignas(16) __shared__ Vec ring[kStages][kRows][32];
  __shared__ int ends[kChunks], offsets[kChunks];  // of the class's rows in each chunk
  const int64_t c = blockIdx.x / slabs, first_column = static_cast<int64_t>(blockIdx.x % slabs) * (32 * kWidth);
  const int lane = threadIdx.x;
  const auto stride = static_cast<uint32_t>(D);
  const auto each = [&](const auto& f) {  // f(k, place in sums) of this lane's columns
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const int64_t column = first_column + lane * kWidth + k;
      if (column < D) f(k, c * D + column);
    }
  };
  acc sum[kWidth] = {};
  each([&](int k, int64_t at) { sum[k] = sums[at]; });
  int64_t found = 0;
  wait_for_predecessor();

  for (int first = 0; first < chunks; first += kChunks) {
    uint32_t bound[kChunks / 32];
#pragma unroll
    for (int g = 0; g < kChunks / 32; ++g) {
      const int chunk = first + 32 * g + lane;
      bound[g] = chunk < chunks ? bounds[c * chunks + chunk] : 0;
    }
    __syncwarp();
    int total = 0;
#pragma unroll
    for (int g = 0; g < kChunks / 32; ++g) {
      const int count = static_cast<int>(bound[g] >> 16), start = static_cast<int>(bound[g] & 0xffff);
      const int end = sum_up_to(lane, count) + total;
      ends[32 * g + lane] = end;
      offsets[32 * g + lane] = (first + 32 * g + lane) * kChunk + start - (end - count);
      total = __shfl_sync(0xffffffffu, end, 31);
    }
    __syncwarp();

    const auto number = [&](int batch) {  // of this lane's row of a batch; the last row's past the end
      const int place = min(batch * kRows + lane, total - 1);
      int g = 0;
#pragma unroll
      for (int step = kChunks / 2; step > 0; step /= 2)
        if (ends[g + step - 1] <= place) g += step;
      return order[offsets[g] + place];
    };
    const auto send = [&](int batch, int row) {  // for a batch, of which this lane knows one row
      Vec(*const to)[32] = ring[batch % kStages];
      const int left = total - batch * kRows;
      if (vectors) {
        constexpr int kPieces = 2 * static_cast<int>(sizeof(Vec));  // of 16 bytes in a row
        const int piece = lane % kPieces * (16 / static_cast<int>(sizeof(scalar))), own = lane / kPieces;
        const int limit = first_column + piece < D ? left : 0;
        const scalar* const from = features + (limit > 0 ? first_column + piece : 0);
#pragma unroll
        for (int r = own; r < kRows; r += 32 / kPieces) {
          const auto at = static_cast<uint64_t>(__shfl_sync(0xffffffffu, static_cast<uint32_t>(row), r)) * stride;
          smem::copy16(&to[r]->values[0] + piece, from + at, r < limit ? 16 : 0);
        }
      } else {
#pragma unroll 4
        for (int r = 0; r < kRows; ++r) {
          const int64_t at = (__shfl_sync(0xffffffffu, row, r) - c) * D;
          if (r < left) each([&](int k, int64_t to_sum) { to[r][lane].values[k] = features[at + to_sum]; });
        }
      }
    };
    const auto add = [&](int batch, int r) {
      const Vec v = ring[batch % kStages][r][lane];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] += static_cast<acc>(v.values[k]);
    };
    if (total == 0) continue;
    for (int batch = 0; batch < kStages - 1; ++batch) {
      if (batch * kRows < total) send(batch, number(batch));
      smem::commit();
    }
    int batch = 0, row = number(kStages - 1), after = number(kStages);  // found well before they are needed
#pragma unroll 1
    for (; (batch + 1) * kRows <= total; ++batch) {
      smem::wait<kStages - 2>();
      __syncwarp();
      if ((batch + kStages - 1) * kRows < total) send(batch + kStages - 1, row);
      smem::commit();
      row = after, after = number(batch + kStages + 1);
#pragma unroll
      for (int r = 0; r < kRows; ++r) add(batch, r);
    }
    smem::wait<0>();
    __syncwarp();
    for (int r = 0; batch * kRows + r < total; ++r) add(batch, r);
    found += total;
  }
  each([&](int k, int64_t at) { sums[at] = sum[k]; });
  if (first_column == 0 && lane == 0) counts[c] += found;
}

}  // namespace

void sum_classes(Dtype dtype, const void* features, const int64_t* labels, void* sums, int64_t* counts, int64_t N,
                 int64_t D, int64_t C, const Allocator& memory, cudaStream_t stream) {
  const char* op = "class_sums";
  PLORA_CHECK(N < INT32_MAX - kChunk && C < INT32_MAX / kChunk - 1 && D < INT32_MAX, op,
              ": N, C or D is too large, got ", N, ", ", C, " and ", D);
  const int64_t chunks = ceil_div(N, kChunk);
  // what is noted of every class in every chunk
  PLORA_CHECK(C * chunks <= int64_t{1} << 28, op, ": ", C, " classes and ", N, " rows in one call would take ",
              C * chunks >> 18, " MiB beside the features: give the rows in batches (class_sums_ adds them up)");
  const auto order = static_cast<int*>(memory(N * sizeof(int)));
  const auto bounds = static_cast<uint32_t*>(memory(C * chunks * sizeof(uint32_t)));
  dispatch<8>(op, dtype, [&](auto tag) {
    using scalar = decltype(tag);
    const auto from = static_cast<const scalar*>(features);
    const bool vectors = aligned(features) && D * sizeof(scalar) % 16 == 0;
    launch_kernel(op, &sort_kernel, chunks, kChunk, 0, stream, labels, N, C, order, bounds,
                  static_cast<const char*>(features), vectors ? N * D * sizeof(scalar) : 0);
    if (C == 0) return;
    const auto slabs_of = [&](int bytes) {
      const int64_t width = bytes / static_cast<int64_t>(sizeof(scalar));
      return std::max<int64_t>((D + width - 1) / width, 1);
    };
    const auto sum = [&](auto kernel, int bytes) {
      launch_overlapped(op, kernel, C * slabs_of(bytes), 32, 0, stream, true, from, order, bounds,
                        static_cast<acc_type<scalar>*>(sums), counts, D, chunks, slabs_of(bytes), vectors);
    };
    // The wider the slabs the better for the memory, but some warps are needed to keep it busy. Rings of 24 to 32 KB:
    // seven warps of a multiprocessor run together.
    const int64_t enough = 4 * multiprocessors();
    if constexpr (sizeof(scalar) <= 4) {
      constexpr int kIn4 = 4 / static_cast<int>(sizeof(scalar));
      if (C * slabs_of(512) >= enough) return sum(&sum_kernel<scalar, 4 * kIn4, 16, 4>, 512);
      if (C * slabs_of(256) < enough) return sum(&sum_kernel<scalar, kIn4, 32, 8>, 128);
    }
    sum(&sum_kernel<scalar, 8 / static_cast<int>(sizeof(scalar)), 32, 3>, 256);
  });
}

}  // namespace plora::cuda
