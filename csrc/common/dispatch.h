// Element types, shared by the CPU and the CUDA kernels.
#pragma once

#include <type_traits>

#include "checks.h"

namespace plora {

// The type that sums are kept in.
template <typename scalar>
using acc_type = std::conditional_t<std::is_same_v<scalar, double>, double, float>;

// Calls f with a value of the C++ type of `dtype`, of which only the type matters; the 16-bit types differ by device.
template <typename bfloat16, typename float16, typename F>
void dispatch_as(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    case ScalarType::Half:
      return f(float16{});
    default:
      PLORA_CHECK(false, op, ": the dtype must be float32, bfloat16, float16 or float64, got ",
                  torch::headeronly::toString(dtype));
  }
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace plora
