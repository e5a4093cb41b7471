"""The operators: batched multi-adapter LoRA products, and the reconstruction of class prototypes.

Every function runs the compiled operator of the tensors' device where there is one, and its plain-torch twin in
`plora_ext.reference` elsewhere (other devices, `PLORA_BACKEND=reference`); both have the same meaning, gradients
included. They work under autocast, `torch.compile(fullgraph=True)` and `torch.vmap`.
"""

import torch

from plora_ext.ops import autocast, autograd, compiled, fake, vmap
from plora_ext.ops.adapter_batch import AdapterBatch
from plora_ext.ops.lora import lora_all, lora_all_, lora_indexed, lora_indexed_, lora_merge, lora_sum, lora_sum_
from plora_ext.ops.prototypes import (
    class_sums,
    complete_prototypes,
    own_other_weights,
    reconstruct_prototypes,
    subspace_logits,
)

if compiled.op:
    _rules = torch.library.Library("plora_ext", "IMPL")  # which hold for as long as it lives
    autocast.register(_rules)
    for room in (fake, autograd, vmap):
        room.register()

__all__ = [
    "AdapterBatch",
    "class_sums",
    "complete_prototypes",
    "lora_all",
    "lora_all_",
    "lora_indexed",
    "lora_indexed_",
    "lora_merge",
    "lora_sum",
    "lora_sum_",
    "own_other_weights",
    "reconstruct_prototypes",
    "subspace_logits",
]
