#include "frozen.h"

#include <cstdlib>
#include <cstring>

#include "../common/cpu_features.h"

namespace plora::cpu {

bool own_frozen_product(const Inputs& p) {
  if (p.dtype != ScalarType::Float || p.M == 0 || p.in == 0 || p.out == 0) return false;
  if (const char* wish = std::getenv("PLORA_CPU_BASE"); wish && *wish) {
    PLORA_CHECK(std::strcmp(wish, "own") == 0 || std::strcmp(wish, "torch") == 0,
                "PLORA_CPU_BASE must be own or torch, got ", wish);
    return std::strcmp(wish, "own") == 0;
  }
  return makes_frozen_product(chosen_isa(), p.M, p.in, p.out);
}

}  // namespace plora::cpu
