// plora_ext._C: what is not an operator. It knows nothing of torch, so it loads whatever torch is installed and can say
// what the operator libraries were built against when they do not load.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_facts.h"
#include "common/cpu_features.h"

namespace py = pybind11;

namespace {

py::list words(const std::string& text) {
  py::list list;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) list.append(word);
  return list;
}

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::dict build_info() {
  py::dict info;
  info["version"] = PLORA_VERSION;
  info["torch"] = PLORA_TORCH_VERSION;
  info["torch_cuda"] = text_or_none(PLORA_TORCH_CUDA);
  info["nvcc"] = text_or_none(PLORA_NVCC_VERSION);
  info["cuda_archs"] = words(PLORA_CUDA_ARCHS);
  info["compiler"] = PLORA_COMPILER;
  info["cxx_flags"] = PLORA_CXX_FLAGS;
  info["build_type"] = PLORA_BUILD_TYPE;
  info["isas"] = words(PLORA_ISAS);
  info["cuda_reason"] = PLORA_CUDA_REASON;
  info["decision"] = PLORA_DECISION;
  return info;
}

py::dict cpu_features() {
  const plora::CpuFeatures f = plora::detect_cpu_features();
  py::dict features;
#define PLORA_FEATURE(name) features[#name] = f.name
  PLORA_FEATURE(avx2);
  PLORA_FEATURE(fma);
  PLORA_FEATURE(f16c);
  PLORA_FEATURE(avx512f);
  PLORA_FEATURE(avx512bw);
  PLORA_FEATURE(avx512vl);
  PLORA_FEATURE(avx512dq);
  PLORA_FEATURE(avx512_bf16);
  PLORA_FEATURE(avx512_fp16);
  PLORA_FEATURE(amx_tile);
  PLORA_FEATURE(amx_bf16);
  PLORA_FEATURE(amx_int8);
  PLORA_FEATURE(neon);
#undef PLORA_FEATURE
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and CPU features of plora_ext.";
  m.def(
      "build_info", &build_info,
      "How plora_ext was built: version, torch and its CUDA, nvcc, GPU and CPU targets, compiler, and the build line.");
  m.def("cpu_features", &cpu_features, "The instruction sets of this processor that the operating system lets us use.");
  m.def(
      "cpu_isa", [] { return plora::isa_name(plora::chosen_isa()); },
      "The instruction set the CPU kernels use: 'default', 'avx2' or 'avx512' (PLORA_CPU_ISA lowers it).");
}
