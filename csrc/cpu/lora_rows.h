// The rows of the low-rank kernels: in which order, and cut into chunks that share their adapters.
#pragma once

#include <algorithm>

#include "lora_factors.h"

namespace plora::cpu {

// Positions [begin, end) of the order, and what they meet: adapter t (indexed), all adapters (sum, all) or none (-1).
struct Chunk {
  int64_t begin, end, t;
};

class Order {
 public:
  std::vector<char> used;  // by adapter, whether a row selects it; empty where all rows meet all adapters

  explicit Order(const Inputs& p) : M_(p.M) {
    if (p.family != Family::indexed) return;
    const int64_t G = p.ids->size(0), rows_per_id = G ? p.M / G : 0;
    const int64_t* ids = data<int64_t>(*p.ids);
    start_.assign(p.T + 2, 0);  // a stable counting sort of the rows by id, -1 first
    used.assign(p.T, 0);
    bool sorted = true;
    for (int64_t g = 0; g < G; ++g) {
      PLORA_CHECK(ids[g] >= -1 && ids[g] < p.T, p.op, ": ids must be between -1 and ", p.T - 1, ", got ", ids[g],
                  " at position ", g);
      start_[ids[g] + 2] += rows_per_id;
      if (ids[g] >= 0) used[ids[g]] = 1;
      if (g > 0 && ids[g] < ids[g - 1]) sorted = false;
    }
    for (int64_t t = 1; t < p.T + 2; ++t) start_[t] += start_[t - 1];
    if (sorted) return;
    std::vector<int64_t> next(start_.begin(), start_.end());
    rows_.resize(p.M);
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = 0; i < rows_per_id; ++i) rows_[next[ids[g] + 1]++] = g * rows_per_id + i;
  }

  int64_t row(int64_t position) const { return rows_.empty() ? position : rows_[position]; }

  // Whether these positions are rows that follow each other in memory.
  bool consecutive(int64_t begin, int64_t end) const { return row(end - 1) - row(begin) == end - 1 - begin; }

  // All positions in chunks of at most `most` rows, those of an adapter as equal as can be.
  std::vector<Chunk> chunks(int64_t most) const { return chunks(most, 0, M_); }

  // The same of positions [from, to).
  std::vector<Chunk> chunks(int64_t most, int64_t from, int64_t to) const {
    std::vector<Chunk> result;
    if (start_.empty()) cut(from, to, 0, most, result);
    for (size_t i = 0; i + 1 < start_.size(); ++i)
      cut(std::max(start_[i], from), std::min(start_[i + 1], to), static_cast<int64_t>(i) - 1, most, result);
    return result;
  }

 private:
  int64_t M_;
  std::vector<int64_t> start_;  // the positions of id t are [start_[t + 1], start_[t + 2])
  std::vector<int64_t> rows_;   // by position; empty: as they come

  static void cut(int64_t begin, int64_t end, int64_t t, int64_t most, std::vector<Chunk>& result) {
    const int64_t count = begin < end ? (end - begin + most - 1) / most : 0;
    for (int64_t i = 0; i < count; ++i)
      result.push_back({begin + (end - begin) * i / count, begin + (end - begin) * (i + 1) / count, t});
  }
};

// A block of rows in the accumulation type.
template <typename acc>
struct Block {
  const acc* data;
  int64_t ld;
};

// Rows of a matrix: in place where nothing has to be moved, else copied to a buffer of this object.
template <typename scalar, typename acc>
class Rows {
 public:
  Rows(const scalar* source, int64_t columns) : source_(source), columns_(columns) {}

  Block<acc> get(const Order& order, const Chunk& c, int64_t offset = 0) {
    const int64_t n = c.end - c.begin;
    if constexpr (std::is_same_v<scalar, acc>) {
      // rows that many bytes of a power of two apart would compete for the same lines of the first-level cache
      if (order.consecutive(c.begin, c.end) && columns_ * sizeof(acc) % 2048 != 0)
        return {source_ + (offset + order.row(c.begin)) * columns_, columns_};
    }
    const int64_t ld = columns_ + 16;
    acc* to = buffer_.grown(n * ld);
    for (int64_t i = 0; i < n; ++i)
      convert(source_ + (offset + order.row(c.begin + i)) * columns_, columns_, to + i * ld);
    return {to, ld};
  }

 private:
  const scalar* source_;
  int64_t columns_;
  Scratch<acc> buffer_;
};

}  // namespace plora::cpu
