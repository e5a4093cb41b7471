// plora_ext._C: what is not an operator. It knows nothing of torch, so it loads whatever torch is installed and can say
// what the operator libraries were built against when they do not load.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "build_facts.h"
#include "common/cpu_features.h"
#include "common/cuda_path.h"
#include "common/lora_plan.h"

namespace py = pybind11;

namespace {

py::list words(const char* text) { return py::str(text).attr("split")(); }

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

plora::Family family_named(const std::string& name) {
  if (name == "indexed") return plora::Family::indexed;
  if (name == "sum") return plora::Family::sum;
  if (name == "all") return plora::Family::all;
  throw py::value_error("family must be indexed, sum or all, got '" + name + "'");
}

bool is_half(const std::string& dtype) {
  if (dtype == "bfloat16" || dtype == "float16") return true;
  if (dtype == "float32") return false;
  throw py::value_error("dtype must be bfloat16, float16 or float32, got '" + dtype + "'");
}

py::dict lora_plan(const std::string& family, int64_t M, int64_t in_features, int64_t out_features, int64_t T,
                   int64_t r, const std::string& dtype, bool weight, bool relu, bool bias, bool backward, bool keep,
                   int64_t rows_per_id, const std::vector<int64_t>& slices, int capability, int num_sms,
                   const std::string& path) {
  if (std::min({M, in_features, out_features, T, r}) < 0) throw py::value_error("sizes must not be negative");
  if (slices.size() % 2 != 0 || (!slices.empty() && (r == 0 || r % (slices.size() / 2) != 0)))
    throw py::value_error("slices must be pairs of start and stop, as many as divide r");
  plora::LoraShape s{family_named(family), M, in_features, out_features, T, r};
  s.half = is_half(dtype), s.weight = weight, s.relu = relu, s.bias = bias, s.backward = backward, s.keep = keep;
  s.rows_per_id = rows_per_id, s.slices = slices, s.capability = capability, s.sms = num_sms;
  s.mma_only = plora::mma_only(path.c_str());
  const plora::LoraPlan plan = plora::plan_lora(s);
  py::dict result;
  result["path"] = plan.hopper() ? "hopper" : "mma";
  result["algorithm"] = plora::algorithm_name(plan.algorithm);
  result["ranks"] = plora::ranks_name(plan.ranks);
  result["dense"] = plora::lora_dense(s.family, T, r, weight, relu, bias);
  result["ctas"] = plan.ctas;
  result["waves"] = plan.waves;
  result["tile"] = plan.fused()
                       ? py::object(py::make_tuple(plora::lora_plan::kTileRows, plora::lora_plan::kTileColumns))
                       : py::object(py::none());
  result["reason"] = plan.reason;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, CPU features and launch plans of plora_ext.";
  m.def(
      "build_info", &build_info,
      "How plora_ext was built: version, torch and its CUDA, nvcc, GPU and CPU targets, compiler, and the build line.");
  m.def("cpu_features", &cpu_features, "The instruction sets of this processor that the operating system lets us use.");
  m.def(
      "cpu_isa", [] { return plora::isa_name(plora::chosen_isa()); },
      "The instruction set the CPU kernels use: 'default', 'avx2', 'avx512' or 'amx' (PLORA_CPU_ISA lowers it).");
  m.def(
      "cpu_makes_base",
      [](int64_t M, int64_t in_features, int64_t out_features) {
        return plora::makes_frozen_product(plora::chosen_isa(), M, in_features, out_features);
      },
      py::arg("M"), py::arg("in_features"), py::arg("out_features"),
      "Whether the CPU kernels make the frozen layer's float32 product of M rows, rather than torch.");
  m.def("lora_plan", &lora_plan, py::arg("family"), py::arg("M"), py::arg("in_features"), py::arg("out_features"),
        py::arg("T"), py::arg("r"), py::arg("dtype") = "bfloat16", py::kw_only(), py::arg("weight") = true,
        py::arg("relu") = false, py::arg("bias") = false, py::arg("backward") = false, py::arg("keep") = false,
        py::arg("rows_per_id") = 1, py::arg("slices") = std::vector<int64_t>(), py::arg("capability") = 90,
        py::arg("num_sms") = 132, py::arg("path") = "auto",
        "How CUDA would compute a low-rank layer of this shape: path, algorithm and why; no GPU is needed.");
}
