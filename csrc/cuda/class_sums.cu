// class_sums on CUDA: every class's total grows row by row in the order of the rows, as on the CPU, so the bits depend
// neither on how the rows are cut into batches nor on the machine. Features are read once. Two launches:
//
//   sort_kernel  a block sorts a chunk of rows by class
//   sum_kernel   a warp owns a class and a slab of columns. It finds its rows in the sorted chunks and adds them one
//                after another, with up to twice kBatch rows on their way from memory.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdio>

#include "../common/prototype_checks.h"
#include "mma.cuh"
#include "overlap.cuh"

namespace plora::cuda {
namespace {

constexpr int kChunk = 256;                    // rows, and threads, of a sorting block
constexpr int kChunks = 256;                   // chunks that a summing warp looks at together
constexpr int64_t kAhead = int64_t(16) << 20;  // bytes of features that are sent for while the rows are sorted

// order: the rows of chunk g, sorted by class, at [g kChunk, ...). bounds[c, g]: where class c starts there, and in the
// upper half how many rows it has.
__global__ void __launch_bounds__(kChunk)
    sort_kernel(const int64_t* __restrict__ labels, int64_t N, int C, int* __restrict__ order,
                uint32_t* __restrict__ bounds, const char* features, int64_t row_bytes) {
  __shared__ int4 keys[kChunk / 4];
  __shared__ int sorted[kChunk];
  const int i = threadIdx.x, chunk = blockIdx.x;
  const int64_t n = static_cast<int64_t>(chunk) * kChunk + i;
  launch_successor();
  if (n < N && (n + 1) * row_bytes <= kAhead)
    prefetch_to_l2(features + n * row_bytes, static_cast<uint32_t>(row_bytes));
  const int64_t label = n < N ? labels[n] : -1;
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

template <typename scalar, int kWidth>
struct alignas(sizeof(scalar) * kWidth) Piece {
  scalar values[kWidth];
};

template <typename acc, typename scalar>
__device__ inline acc widened(scalar x) {
  if constexpr (std::is_same_v<scalar, double>)
    return x;
  else
    return to_float(x);
}

// A lane has kWidth neighbouring columns.
template <typename scalar, int kWidth, int kBatch>
__global__ void __launch_bounds__(32, 1)
    sum_kernel(const scalar* __restrict__ features, const int* order, const uint32_t* bounds, acc_type<scalar>* sums,
               int64_t* counts, int64_t D, int chunks, int slabs) {
  using acc = acc_type<scalar>;
  using Vec = Piece<scalar, kWidth>;
  __shared__ int ends[kChunks], offsets[kChunks];  // of the class's rows in each chunk
  const int64_t c = blockIdx.x / slabs;
  const int slab = blockIdx.x % slabs, lane = threadIdx.x;
  const int64_t column = (static_cast<int64_t>(slab) * 32 + lane) * kWidth;
  const bool mine = column < D;
  const scalar* const from = features + (mine ? column : 0);
  acc sum[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sum[k] = mine ? sums[c * D + column + k] : acc(0);
  int64_t found = 0;
  wait_for_predecessor();

  for (int first = 0; first < chunks; first += kChunks) {
    __syncwarp();
    int total = 0;
    for (int g = 0; g < kChunks; g += 32) {
      const int chunk = first + g + lane;
      const uint32_t bound = chunk < chunks ? bounds[c * chunks + chunk] : 0;
      int end = static_cast<int>(bound >> 16);
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, end, d);
        if (lane >= d) end += before;
      }
      end += total;
      ends[g + lane] = end;
      offsets[g + lane] = chunk * kChunk + static_cast<int>(bound & 0xffff) - (end - static_cast<int>(bound >> 16));
      total = __shfl_sync(0xffffffffu, end, 31);
    }
    __syncwarp();

    // The rows at places p, p + 1, ... of the class, one a lane.
    const auto rows_at = [&](int p) {
      const int place = p + lane % kBatch;
      int g = 0;
#pragma unroll
      for (int step = kChunks / 2; step > 0; step /= 2)
        if (ends[g + step - 1] <= place) g += step;
      return place < total ? order[offsets[g] + place] : 0;
    };
    const auto load = [&](Vec(&batch)[kBatch], int rows, int p) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t row = __shfl_sync(0xffffffffu, rows, i);
        if (p + i < total) batch[i] = *reinterpret_cast<const Vec*>(from + row * D);
      }
    };
    const auto add = [&](const Vec(&batch)[kBatch], int p) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (p + i < total)
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sum[k] += widened<acc>(batch[i].values[k]);
    };
    Vec even[kBatch], odd[kBatch];
    load(even, rows_at(0), 0);
    int rows = rows_at(kBatch);
    for (int p = 0; p < total; p += 2 * kBatch) {
      load(odd, rows, p + kBatch);
      rows = rows_at(p + 2 * kBatch);
      add(even, p);
      load(even, rows, p + 2 * kBatch);
      rows = rows_at(p + 3 * kBatch);
      add(odd, p + kBatch);
    }
    found += total;
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    if (mine) sums[c * D + column + k] = sum[k];
  if (slab == 0 && lane == 0) counts[c] += found;
}

void class_sums_(const Tensor& sums, const Tensor& counts, const Tensor& features, const Tensor& labels) {
  const char* op = "class_sums";
  check_class_sums(sums, counts, features, labels);
  const int64_t N = features.size(0), D = features.size(1), C = sums.size(0);
  if (N == 0) return;
  STD_TORCH_CHECK(N < INT32_MAX - kChunk && C < INT32_MAX / kChunk - 1, op, ": N and C are too large, got ", N, " and ",
                  C);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const cudaStream_t stream = stream_of(features);
  const Tensor rows = compact(features), classes = compact(labels);
  const int64_t chunks = (N + kChunk - 1) / kChunk;
  const Tensor order = torch::stable::new_empty(labels, {N}, ScalarType::Int);
  const Tensor bounds = torch::stable::new_empty(labels, {C, chunks}, ScalarType::Int);
  dispatch(op, features.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    const scalar* const from = data<scalar>(rows);
    const int64_t row_bytes = D * static_cast<int64_t>(sizeof(scalar));
    const auto aligned = [&](int64_t bytes) {
      return reinterpret_cast<uintptr_t>(from) % bytes == 0 && row_bytes % bytes == 0;
    };
    sort_kernel<<<static_cast<unsigned>(chunks), kChunk, 0, stream>>>(
        data<int64_t>(classes), N, static_cast<int>(C), mutable_data<int>(order), mutable_data<uint32_t>(bounds),
        reinterpret_cast<const char*>(from), aligned(16) && D > 0 ? row_bytes : kAhead + 1);
    check_launch(op);
    if (C == 0) return;
    const auto sum = [&](auto kernel, int64_t width) {
      const int64_t slabs = std::max<int64_t>((D + 32 * width - 1) / (32 * width), 1);
      launch_overlapped(op, kernel, C * slabs, 32, stream, from, data<int>(order), data<uint32_t>(bounds),
                        mutable_data<acc_type<scalar>>(sums), mutable_data<int64_t>(counts), D,
                        static_cast<int>(chunks), static_cast<int>(slabs));
    };
    // Few warps get narrow slabs, which makes four times as many of them.
    constexpr int64_t kFew = 384;
    if constexpr (sizeof(scalar) <= 4) {
      if (aligned(4 * sizeof(scalar)) && C * ((D + 127) / 128) >= kFew) return sum(&sum_kernel<scalar, 4, 16>, 4);
    }
    sum(&sum_kernel<scalar, 1, 32>, 1);
  });
}

std::tuple<Tensor, Tensor> class_sums(const Tensor& features, const Tensor& labels, int64_t num_classes) {
  const auto [sums, counts] = zero_totals(features, num_classes);
  class_sums_(sums, counts, features, labels);
  return {sums, counts};
}

}  // namespace
}  // namespace plora::cuda

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CUDA, m) {
  m.impl("class_sums", TORCH_BOX(&plora::cuda::class_sums));
  m.impl("class_sums_", TORCH_BOX(&plora::cuda::class_sums_));
}
