// Element types, shared by the CPU and the CUDA kernels; without torch's headers, which take a CUDA file longer to
// compile than all that it holds.
#pragma once

#include <cstdint>
#include <type_traits>

namespace plora {

enum class Dtype : int8_t { float32, float64, bfloat16, float16 };

// The type that sums are kept in.
template <typename scalar>
using acc_type = std::conditional_t<std::is_same_v<scalar, double>, double, float>;

// Calls f with a value of the C++ type of `dtype`, of which only the type matters; the 16-bit types differ by device.
template <typename bfloat16, typename float16, typename F>
void dispatch_as(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::float64:
      return f(double{});
    case Dtype::bfloat16:
      return f(bfloat16{});
    case Dtype::float16:
      return f(float16{});
  }
}

}  // namespace plora
