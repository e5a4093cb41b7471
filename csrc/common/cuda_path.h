// PLORA_CUDA_PATH: whether kernels for one kind of GPU are left out.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace plora {

// Whether `path` (null: not set) asks for the kernels that every GPU has.
inline bool mma_only(const char* path = std::getenv("PLORA_CUDA_PATH")) {
  if (path == nullptr || *path == 0 || std::strcmp(path, "auto") == 0) return false;
  if (std::strcmp(path, "mma") == 0) return true;
  throw std::invalid_argument("PLORA_CUDA_PATH must be auto or mma, got '" + std::string(path) + "'");
}

}  // namespace plora
