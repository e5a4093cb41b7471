"""The plain-torch twins with the operators' own arguments: for devices without kernels, and for higher derivatives.

What looks at tensors in ways of its own (forward mode, torch.func's derivatives, subclasses) cannot look into compiled
operators; these it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plora_ext import reference
from plora_ext.ops import formulas
from plora_ext.ops.autocast import autocasts, cast, dtype_of, without_autocast
from plora_ext.ops.checks import check_range, wide
from plora_ext.ops.compiled import LORA, op
from plora_ext.torch_private import is_plain, needs_twin


def _lora(name: str) -> Callable[..., Tensor]:
    function = getattr(reference, name)

    def twin(x: Tensor, *rest: Any) -> Tensor:
        *front, base, weight, bias, bias_A, bias_B, ranks, relu, trainable, _, _ = rest
        if name == "lora_indexed" and len(front[0]) != len(x):
            front[0] = front[0].repeat_interleave(len(x) // max(len(front[0]), 1))
        y: Tensor = function(
            x, *front, base=base, weight=weight, bias=bias, bias_A=bias_A, bias_B=bias_B,
            activation="relu" if relu else "none", ranks=ranks, trainable=trainable,
        )  # fmt: skip
        return y

    return twin


def _reconstruct(old: Tensor, new: Tensor, moved: Tensor, tau: float, add_old: bool, tf32: bool) -> Tensor:
    kept = wide(old.dtype)
    result = reference.reconstruct_prototypes(old.to(kept), new.to(kept), moved.to(kept), tau=tau)
    return (old.to(kept) + result if add_old else result).to(moved.dtype)


_twins: dict[str, Callable[..., Any]] = {
    **{name: _lora(name) for name in LORA},
    "lora_merge": lambda weight, A, B, scaling, ranks: reference.lora_merge(weight, A, B, scaling, ranks=ranks),
    "class_sums": reference.class_sums,
    "reconstruct_prototypes": _reconstruct,
    "complete_prototypes": formulas.completed_prototypes,
    "subspace_logits": lambda features, prototypes, weights, tf32: reference.subspace_logits(
        features, prototypes, weights
    ),
}


def _check_values(name: str, args: Sequence[Any]) -> None:
    """What the kernels look at and the twins would clamp or mask."""
    if name in LORA:
        lora_A, ranks = args[2 if name == "lora_indexed" else 1], args[-5]
        if name == "lora_indexed":
            check_range(name, "ids", args[1], -1, lora_A.shape[0] - 1)
        if ranks is not None:
            check_range(name, "ranks", ranks, 0, lora_A.shape[1])
    elif name == "lora_merge":
        if args[4] is not None:
            check_range(name, "ranks", args[4], 0, args[1].shape[1])
    elif name == "class_sums":
        check_range(name, "labels", args[1], -1, args[2] - 1)
    elif name == "complete_prototypes":
        check_range(name, "task_of_class", args[1], 0, args[0].shape[1] - 1)


def run_twin(name: str, *args: Any) -> Any:
    """An operator's plain-torch twin, with the same checks, and the same casts under autocast."""
    _check_values(name, args)
    device_type = args[0].device.type
    if not autocasts(device_type):
        return _twins[name](*args)
    dtype = dtype_of(name, device_type)
    with without_autocast(device_type):
        return _twins[name](*(cast(a, dtype) for a in args))


def run(name: str, serves: bool, *args: Any) -> Any:
    """An operator by the dispatcher's rules, or its twin where no kernel serves, or only torch's own operators do."""
    if not serves or (not is_plain(*args) and needs_twin(*args)):
        return run_twin(name, *args)
    return op[name](*args)


def gradients(name: str, args: Sequence[Any], asks: Sequence[bool], grad: Tensor) -> list[Any]:
    """The gradients of an operator as torch's own operators make them, which may be differentiated in turn.

    Every argument that asks enters as a view of its own, so that none counts for another that was computed from it.
    """
    with torch.enable_grad():
        own = [a.view_as(a) if asked else a for a, asked in zip(args, asks, strict=True)]
    wanted = [a for a, asked in zip(own, asks, strict=True) if asked]
    with without_autocast(grad.device.type):
        with torch.enable_grad():
            y = _twins[name](*own)
            y = y if isinstance(y, Tensor) else y[0]
        if y.requires_grad:
            found = torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled(), materialize_grads=True)
        else:  # as without any adapter
            found = tuple(torch.zeros_like(a) for a in wanted)
    rest = iter(found)
    return [next(rest) if asked else None for asked in asks]
