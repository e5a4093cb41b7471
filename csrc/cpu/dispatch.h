// The CPU's 16-bit types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../common/dispatch.h"

namespace plora::cpu {

template <typename F>
void dispatch(const char* op, ScalarType dtype, const F& f) {
  dispatch_as<torch::headeronly::BFloat16, torch::headeronly::Half>(op, dtype, f);
}

}  // namespace plora::cpu
