// The CPU's 16-bit types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../common/dispatch.h"
#include "convert.h"

namespace plora::cpu {

template <typename F>
void dispatch(const char* op, ScalarType dtype, const F& f) {
  dispatch_as<torch::headeronly::BFloat16, torch::headeronly::Half>(dtype_of(op, dtype), f);
}

template <typename From, typename To>
void convert(const From* from, int64_t n, To* to) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const auto bits = [](auto* p) {
    return reinterpret_cast<
        std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(p)>>, const uint16_t*, uint16_t*>>(p);
  };
  if constexpr (std::is_same_v<From, BFloat16> && std::is_same_v<To, float>)
    return conversions().widen_bfloat16(n, bits(from), to);
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, BFloat16>)
    return conversions().narrow_bfloat16(n, from, bits(to));
  if constexpr (std::is_same_v<From, Half> && std::is_same_v<To, float>)
    if (conversions().widen_float16) return conversions().widen_float16(n, bits(from), to);
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, Half>)
    if (conversions().narrow_float16) return conversions().narrow_float16(n, from, bits(to));
  std::copy_n(from, n, to);
}

}  // namespace plora::cpu
