// Storage types of the CPU kernels and the type each is accumulated in.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "../common/checks.h"

namespace plora::cpu {

template <typename scalar>
using acc_type = std::conditional_t<std::is_same_v<scalar, double>, double, float>;

// Calls f with a value of the C++ type of `dtype`; only its type matters.
template <typename F>
void dispatch(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be float32, bfloat16, float16 or float64, got ",
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

}  // namespace plora::cpu
