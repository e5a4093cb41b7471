// How rows are shared out among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace plora::cpu {

// How many rows a chunk has at most, so that the threads have as many chunks each.
inline int64_t even_chunk(int64_t M, int64_t most) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t each = (M + threads * most - 1) / (threads * most);
  return std::max<int64_t>(1, (M + threads * each - 1) / std::max<int64_t>(1, threads * each));
}

}  // namespace plora::cpu
