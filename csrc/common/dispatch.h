// From torch's tensors to the element types and pointers that kernels take.
#pragma once

#include "checks.h"
#include "dtype.h"

namespace plora {

inline Dtype dtype_of(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      fail(op, ": the dtype must be float32, bfloat16, float16 or float64, got ", torch::headeronly::toString(dtype));
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
