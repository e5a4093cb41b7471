// class_sums on the CPU: every class's total grows row by row in the order of the rows, whichever thread adds them, so
// the bits depend neither on the number of threads nor on how the rows are cut into batches. A thread takes whole
// classes, or a slab of columns where one class has too many of the rows.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/prototype_checks.h"
#include "dispatch.h"
#include "gemm.h"
#include "scratch.h"

namespace plora::cpu {
namespace {

constexpr int64_t kSlab = 64;  // columns: 256 bytes of a float32 row
constexpr int64_t kLine = 16;  // elements of a cache line, at most

void class_sums_(const Tensor& sums, const Tensor& counts, const Tensor& features, const Tensor& labels) {
  check_class_sums(sums, counts, features, labels);
  const int64_t N = features.size(0), D = features.size(1), C = sums.size(0);
  const Tensor rows = compact(features), classes = compact(labels);
  const int64_t* label = data<int64_t>(classes);
  for (int64_t n = 0; n < N; ++n)
    PLORA_CHECK(label[n] >= -1 && label[n] < C, "class_sums: labels must be between -1 and ", C - 1, ", got ", label[n],
                " at position ", n);
  std::vector<int64_t> start(C + 1, 0);  // of the rows counted by class
  for (int64_t n = 0; n < N; ++n)
    if (label[n] >= 0) ++start[label[n] + 1];
  int64_t* count = mutable_data<int64_t>(counts);
  int64_t largest = 0;
  for (int64_t c = 0; c < C; ++c) {
    largest = std::max(largest, start[c + 1]);
    count[c] += start[c + 1];
    start[c + 1] += start[c];
  }

  const int64_t threads = torch::stable::get_num_threads();
  const bool whole = largest * threads <= start[C];
  dispatch("class_sums", features.scalar_type(), [&](auto tag) {
    using scalar = decltype(tag);
    using acc = acc_type<scalar>;
    const scalar* row = data<scalar>(rows);
    acc* sum = mutable_data<acc>(sums);
    const int64_t parts = whole ? threads : (D + kSlab - 1) / kSlab;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = whole ? 0 : begin * kSlab, width = (whole ? D : std::min(end * kSlab, D)) - first;
      const auto class_of = [&](int64_t part) {  // the first class of a part of about as many rows as every other
        return std::lower_bound(start.begin(), start.end() - 1, start[C] * part / parts) - start.begin();
      };
      const int64_t from = whole ? class_of(begin) : 0, to = whole && end < parts ? class_of(end) : C;
      std::vector<int64_t> mine;
      for (int64_t n = 0; n < N; ++n)
        if (label[n] >= from && label[n] < to) mine.push_back(n);
      Scratch<acc> wide(width);
      for (size_t i = 0; i < mine.size(); ++i) {
        const scalar* x = row + mine[i] * D + first;
        if (i + 1 < mine.size())  // the row to come
          for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + mine[i + 1] * D + first + d);
        acc* total = sum + label[mine[i]] * D + first;
        if constexpr (std::is_same_v<scalar, acc>) {
          gemm<acc>().add(width, x, total);
        } else {
          convert(x, width, wide.data());
          gemm<acc>().add(width, wide.data(), total);
        }
      }
    });
  });
}

std::tuple<Tensor, Tensor> class_sums(const Tensor& features, const Tensor& labels, int64_t num_classes) {
  const auto [sums, counts] = zero_totals(features, num_classes);
  class_sums_(sums, counts, features, labels);
  return {sums, counts};
}

}  // namespace
}  // namespace plora::cpu

STABLE_TORCH_LIBRARY_IMPL(plora_ext, CPU, m) {
  m.impl("class_sums", TORCH_BOX(&plora::cpu::class_sums));
  m.impl("class_sums_", TORCH_BOX(&plora::cpu::class_sums_));
}
