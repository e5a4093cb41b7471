// Copies the low-rank factors into the shape that the products want: ranks padded with zeros, transposed where asked. A
// block moves tiles of 32 x 32 through shared memory, so that it reads and writes along the rows.

#include <algorithm>

#include "../device/launch.cuh"
#include "../device/mma.cuh"
#include "kernels.h"

namespace plora::cuda {
namespace {

constexpr int kTile = 32, kThreadRows = 8;

struct Shape {
  int64_t T, rows, columns;     // of what is read
  int64_t to_rows, to_columns;  // of what is written, before it is transposed
  bool rank_is_rows, transpose;
};

template <typename scalar>
__global__ void pack_kernel(const scalar* __restrict__ from, scalar* __restrict__ to, const __grid_constant__ Shape s,
                            const int64_t* __restrict__ ranks, const float* __restrict__ scaling) {
  __shared__ scalar tile[kTile][kTile + 1];
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int tx = threadIdx.x, ty = threadIdx.y;
  for (int64_t t = blockIdx.z; t < s.T; t += gridDim.z)
    for (int64_t first_column = static_cast<int64_t>(blockIdx.y) * kTile; first_column < s.to_columns;
         first_column += static_cast<int64_t>(gridDim.y) * kTile) {
      const int64_t limit = ranks ? ranks[t] : s.rank_is_rows ? s.rows : s.columns;
      for (int i = ty; i < kTile; i += kThreadRows) {
        const int64_t row = first_row + i, column = first_column + tx;
        const bool real = row < s.rows && column < s.columns && (s.rank_is_rows ? row : column) < limit;
        scalar value = from_float<scalar>(0);
        if (real) value = from[(t * s.rows + row) * s.columns + column];
        tile[i][tx] = scaling ? from_float<scalar>(scaling[t] * to_float(value)) : value;
      }
      __syncthreads();
      for (int i = ty; i < kTile; i += kThreadRows) {
        const int64_t row = first_row + (s.transpose ? tx : i), column = first_column + (s.transpose ? i : tx);
        if (row < s.to_rows && column < s.to_columns)
          to[t * s.to_rows * s.to_columns + (s.transpose ? column * s.to_rows + row : row * s.to_columns + column)] =
              s.transpose ? tile[tx][i] : tile[i][tx];
      }
      __syncthreads();
    }
}

}  // namespace

void pack(Dtype dtype, const void* from, void* to, int64_t T, int64_t rows, int64_t columns, bool rank_is_rows,
          int64_t padded, bool transpose, const int64_t* ranks, const float* scaling, cudaStream_t stream) {
  const Shape s{T,        rows, columns, rank_is_rows ? padded : rows, rank_is_rows ? columns : padded, rank_is_rows,
                transpose};
  if (T * s.to_rows * s.to_columns == 0) return;
  const dim3 grid(ceil_div(s.to_rows, kTile), std::min<int64_t>(ceil_div(s.to_columns, kTile), 65535),
                  std::min<int64_t>(T, 65535));
  dispatch("pack", dtype, [&](auto like) {
    using scalar = decltype(like);
    launch_kernel("pack", &pack_kernel<scalar>, grid, dim3(kTile, kThreadRows), 0, stream,
                  static_cast<const scalar*>(from), static_cast<scalar*>(to), s, ranks, scaling);
  });
}

}  // namespace plora::cuda
