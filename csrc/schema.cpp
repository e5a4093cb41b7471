// Every operator's schema, and nothing else. The functions that people call, with their documentation, are in
// plora_ext/ops; the kernels are in csrc/cpu and csrc/cuda under the operator's name.
//
// Shapes: x [M, in], ids [G] with M a multiple of G, lora_A [T, r, in], lora_B [T, out, r], scaling [T] in the
// accumulation type, base [M, out], weight [out, in], bias [out], bias_A [T, r], bias_B [T, out], ranks [T] int64.
// The forward operators return y and `kept`, which the backward ones take to save work: on CUDA, where `keep` asks, h
// or the merged weight (csrc/common/lora_plan.h says which), else an empty tensor. `slices` is a promise, for speed
// alone: the ranks are equal blocks, and block i of lora_B is zero outside of its rows [slices[2 i], slices[2 i + 1]).
// `trainable` lists the adapters whose factors get gradients (all where it is absent). The backward operators take
// `needs`, a bit each for x, lora_A, lora_B, scaling, bias_A, bias_B, and return an empty tensor for what nobody needs.
//
// `lora_one` is `lora_sum` of one adapter beside the frozen layer, as eager code calls it: x [..., in], lora_A [r, in],
// lora_B [out, r], scaling [1], y [..., out]. Views, and arguments that are not there, would cost the host more than it
// takes to launch the kernels.
//
// `lora_weighted` is `lora_sum` with scales scaling[t] times[t], of which `times` [T] is constant: the gradient of
// scaling is that of the product times `times`. As eager code calls it, for a fusion's weights beside its adapters' own
// scales: torch's product of the two would be a launch in front of every layer.
//
// `lora_stack`, on CUDA alone, is for layers whose adapters lie one by one, [r_t, in] and [out, r_t]: it makes lora_A,
// lora_B and scaling of them in the dtype of x, with zeros beyond an adapter's own rank.
//
// `tf32` lets CUDA round float32 operands to TF32; the caller passes torch's own setting for matrix products.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(plora_ext, m) {
  m.def(
      "lora_indexed(Tensor x, Tensor ids, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? base, Tensor? weight, "
      "Tensor? bias, Tensor? bias_A, Tensor? bias_B, Tensor? ranks, bool relu, int[]? trainable, int[]? slices, "
      "bool keep) -> (Tensor, Tensor)");
  m.def(
      "lora_sum(Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? base, Tensor? weight, Tensor? bias, "
      "Tensor? bias_A, Tensor? bias_B, Tensor? ranks, bool relu, int[]? trainable, int[]? slices, bool keep) "
      "-> (Tensor, Tensor)");
  m.def(
      "lora_all(Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? base, Tensor? weight, Tensor? bias, "
      "Tensor? bias_A, Tensor? bias_B, Tensor? ranks, bool relu, int[]? trainable, int[]? slices, bool keep) "
      "-> (Tensor, Tensor)");

  m.def(
      "lora_weighted(Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? base, Tensor? weight, "
      "Tensor? bias, Tensor? bias_A, Tensor? bias_B, Tensor? ranks, bool relu, int[]? trainable, int[]? slices, "
      "bool keep, Tensor times) -> (Tensor, Tensor)");
  m.def(
      "lora_one(Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor weight, Tensor? bias, bool keep) "
      "-> (Tensor, Tensor)");

  m.def(
      "lora_indexed_(Tensor(a!) y, Tensor x, Tensor ids, Tensor lora_A, Tensor lora_B, Tensor scaling, "
      "Tensor? bias_A, Tensor? bias_B, Tensor? ranks, bool relu) -> ()");
  m.def(
      "lora_sum_(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? bias_A, "
      "Tensor? bias_B, Tensor? ranks, bool relu) -> ()");
  m.def(
      "lora_all_(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? bias_A, "
      "Tensor? bias_B, Tensor? ranks, bool relu) -> ()");

  m.def(
      "lora_all_out(Tensor(a!) out, Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? base, "
      "Tensor? weight, Tensor? bias, Tensor? bias_A, Tensor? bias_B, Tensor? ranks, bool relu) -> ()");

  m.def(
      "lora_indexed_backward(Tensor grad, Tensor x, Tensor ids, Tensor lora_A, Tensor lora_B, Tensor scaling, "
      "Tensor? weight, Tensor? bias_A, Tensor? bias_B, Tensor? ranks, Tensor? kept, bool relu, int[]? trainable, "
      "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lora_sum_backward(Tensor grad, Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? weight, "
      "Tensor? bias_A, Tensor? bias_B, Tensor? ranks, Tensor? kept, bool relu, int[]? trainable, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lora_all_backward(Tensor grad, Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? weight, "
      "Tensor? bias_A, Tensor? bias_B, Tensor? ranks, Tensor? kept, bool relu, int[]? trainable, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "lora_weighted_backward(Tensor grad, Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? weight, "
      "Tensor? bias_A, Tensor? bias_B, Tensor? ranks, Tensor? kept, bool relu, int[]? trainable, int needs, "
      "Tensor times) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lora_one_backward(Tensor grad, Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor weight, "
      "Tensor? kept, int needs) -> (Tensor, Tensor, Tensor)");

  m.def("lora_stack(Tensor x, Tensor[] lora_A, Tensor[] lora_B, float[] scaling) -> (Tensor, Tensor, Tensor)");
  m.def("lora_merge(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? ranks) -> Tensor");

  m.def("class_sums(Tensor features, Tensor labels, int num_classes) -> (Tensor, Tensor)");
  m.def("class_sums_(Tensor(a!) sums, Tensor(b!) counts, Tensor features, Tensor labels) -> ()");
  m.def(
      "reconstruct_prototypes(Tensor old, Tensor new, Tensor values, float tau, bool add_old, bool tf32) "
      "-> Tensor");
  m.def(
      "reconstruct_prototypes_backward(Tensor grad, Tensor old, Tensor new, Tensor values, float tau) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("complete_prototypes(Tensor prototypes, Tensor task_of_class, float tau, bool last) -> Tensor");
  m.def(
      "complete_prototypes_backward(Tensor grad, Tensor prototypes, Tensor task_of_class, float tau, bool last) "
      "-> Tensor");
  m.def("subspace_logits(Tensor features, Tensor prototypes, Tensor weights, bool tf32) -> Tensor");
}
