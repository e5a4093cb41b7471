"""The compiled operators by name; none under `PLORA_BACKEND=reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plora_ext import libraries
from plora_ext.torch_private import in_c

LORA = ("lora_indexed", "lora_sum", "lora_all")
PROTOTYPES = ("reconstruct_prototypes", "complete_prototypes", "subspace_logits")
_EAGER = ("lora_weighted", "lora_one")
_BACKWARD = tuple(f"{name}_backward" for name in (*LORA, *_EAGER, "reconstruct_prototypes", "complete_prototypes"))
_IN_PLACE = (*(f"{name}_" for name in LORA), "class_sums_")
_NAMES = (*LORA, *_EAGER, "lora_stack", *PROTOTYPES, "lora_merge", "class_sums", *_BACKWARD, *_IN_PLACE)

op: dict[str, Any] = {}
"""Every compiled operator, looked up once."""
if libraries.backend() == "native":
    op = {name: getattr(torch.ops.plora_ext, name).default for name in _NAMES}
eager_op = {name: in_c(overload) for name, overload in op.items()}
"""The same for eager code, where the host pays for every function."""


def argument_names(name: str) -> list[str]:
    """The names in the schema of an operator."""
    return [argument.name for argument in op[name]._schema.arguments]


def run_in_place(name: str, *args: Any) -> None:
    """An operator that writes to its first arguments, which autograd is told as of torch's own."""
    getattr(torch.ops.plora_ext, name)(*args)
    if not torch.compiler.is_compiling():
        written: tuple[Tensor, ...] = args[: 2 if name == "class_sums_" else 1]
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
