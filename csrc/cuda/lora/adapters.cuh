// From rows to adapters, on the device: which one a row chose, and which ones the rows of a tile chose.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace plora::cuda {

constexpr int kNone = -1, kOutside = -2;  // instead of an adapter: the row has none; there is no such row

// The adapter that a row chose; 0 where there are no ids.
__device__ inline int choice(const Rows& rows, int64_t row) {
  if (row >= rows.M) return kOutside;
  if (!rows.ids) return 0;
  const int64_t id = rows.ids[static_cast<int>(row) / static_cast<int>(rows.rows_per_id)];
  return id >= 0 && id < rows.T ? static_cast<int>(id) : kNone;
}

// Those of rows `first`, `first` + step, ..., with ids: read at the same time, where each choice() waits for its own.
template <int kCount>
__device__ inline void read_choices(const Rows& rows, int first, int step, int (&adapter)[kCount]) {
  const int M = static_cast<int>(rows.M), n = static_cast<int>(rows.rows_per_id);
  int64_t id[kCount];
  const auto read = [&](const auto& place) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) id[e] = first + e * step < M ? rows.ids[place(first + e * step)] : kNone;
  };
  if (n == 1)
    read([](int row) { return row; });
  else
    read([n](int row) { return row / n; });
#pragma unroll
  for (int e = 0; e < kCount; ++e)
    adapter[e] = first + e * step >= M ? kOutside : id[e] >= 0 && id[e] < rows.T ? static_cast<int>(id[e]) : kNone;
}

// The adapter of a row, or -1.
__device__ inline int adapter_of_row(const int64_t* ids, int rows_per_id, int M, int64_t T, int row) {
  if (row >= M) return -1;
  const int64_t id = ids[row / rows_per_id];
  return id >= 0 && id < T ? static_cast<int>(id) : -1;
}

// By one warp, whose lanes have the adapters of a tile's rows: writes each once, ascending, and tells their number.
template <int kEach>
__device__ inline int list_adapters(const int (&adapter)[kEach], int16_t* all) {
  constexpr int kNone = 0x7fffffff;
  int count = 0;
  for (int last = -1;; ++count) {
    int next = kNone;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (adapter[i] > last) next = min(next, adapter[i]);
    next = __reduce_min_sync(0xffffffffu, next);
    if (next == kNone) return count;
    if (threadIdx.x % 32 == 0) all[count] = static_cast<int16_t>(next);
    last = next;
  }
}

}  // namespace plora::cuda
