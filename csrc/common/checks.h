// Short checks at the C++ boundary, so that a direct call of torch.ops.plora_ext cannot read out of bounds. People meet
// the friendlier ones of plora_ext/ops first. A message names the operator, the argument, what it must be, what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "check.h"

namespace plora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using OptInts = std::optional<std::vector<int64_t>>;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline std::string shape_text(std::initializer_list<int64_t> sizes) {
  std::string text = "[";
  const char* comma = "";
  for (int64_t size : sizes) {
    text += comma + (size < 0 ? std::string("any") : std::to_string(size));
    comma = ", ";
  }
  return text + "]";
}

// For calls of the C shim; the macro that torch offers for this has another name in every version.
inline void check_call(AOTITorchError error, const char* what) {
  PLORA_CHECK(error == AOTI_TORCH_SUCCESS, what, " failed");
}

// The type of device, which tells the CPU from "meta".
inline int32_t device_of(const Tensor& t) {
  int32_t type = 0;
  PLORA_CHECK(aoti_torch_get_device_type(t.get(), &type) == AOTI_TORCH_SUCCESS, "a tensor has no device");
  return type;
}

// Sizes must match; -1 accepts any. Also the same device type and index as `like`. No text is made where all is well:
// it would cost as much as a small launch.
inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                        const Tensor& like) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) {
    if (same && size >= 0 && t.size(d) != size) same = false;
    ++d;
  }
  PLORA_CHECK(same, op, ": ", name, " must have the shape ", shape_text(sizes), ", got ", shape_of(t));
  PLORA_CHECK(device_of(t) == device_of(like) && t.get_device_index() == like.get_device_index(), op, ": ", name,
              " must be on the device of the first argument");
}

// Torch's number for a type.
inline int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  // in torch's numbers: to tell which type one stands for takes a call for every type that it could be
  int32_t type = 0;
  check_call(aoti_torch_get_dtype(t.get(), &type), "aoti_torch_get_dtype");
  PLORA_CHECK(type == shim_dtype(dtype), op, ": ", name, " must be ", torch::headeronly::toString(dtype), ", got ",
              torch::headeronly::toString(t.scalar_type()));
}

// The type that sums are kept in: float64 for float64, else float32.
inline ScalarType wide(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor compact(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptTensor compact(const OptTensor& t) { return t ? OptTensor(compact(*t)) : std::nullopt; }

// A contiguous tensor on the device of `like`, not written to yet. torch::stable::new_empty does the same by looking
// the operator up by name, which costs as much as launching a kernel.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  std::array<int64_t, 4> strides{};
  PLORA_CHECK(sizes.size() <= strides.size(), "allocate: at most 4 dimensions");
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  int32_t type = 0, device = 0, index = 0;
  check_call(aoti_torch_get_dtype(like.get(), &type), "aoti_torch_get_dtype");
  check_call(aoti_torch_get_device_type(like.get(), &device), "aoti_torch_get_device_type");
  check_call(aoti_torch_get_device_index(like.get(), &index), "aoti_torch_get_device_index");
  if (dtype) type = shim_dtype(*dtype);
  AtenTensorHandle made = nullptr;
  check_call(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, device,
                                      index, &made),
             "aoti_torch_empty_strided");
  return Tensor(made);
}

// Other sizes for the memory of a contiguous tensor; for autograd it is a tensor of its own, and no view.
inline Tensor with_sizes(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::array<int64_t, 64> strides;  // as many dimensions as torch has
  PLORA_CHECK(sizes.size() <= strides.size(), "with_sizes: at most 64 dimensions");
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  AtenTensorHandle made = nullptr;
  check_call(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                            0, &made),
             "aoti_torch__reinterpret_tensor");
  return Tensor(made);
}

inline Tensor none_like(const Tensor& t) { return allocate(t, {0}); }

}  // namespace plora
