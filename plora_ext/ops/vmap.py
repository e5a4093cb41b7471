"""vmap: a dimension that only rows have is folded into the rows; else there is a call for each slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from plora_ext.ops.compiled import LORA, argument_names, op


def _rule(name: str) -> Callable[..., Any]:
    arguments = argument_names(name)
    row_like = {"x", "ids", "base"} if name in LORA else set()

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        in_dims = tuple(None if isinstance(a, list) else d for a, d in zip(args, in_dims, strict=True))
        mapped = {n for n, d in zip(arguments, in_dims, strict=True) if d is not None}
        n = info.batch_size
        if mapped and mapped <= row_like and n > 0 and args[0].numel():
            values = dict(zip(arguments, args, strict=True))
            for key, d in zip(arguments, in_dims, strict=True):
                if key in row_like and values[key] is not None:
                    t = values[key]
                    t = t.movedim(d, 0) if d is not None else t.expand(n, *t.shape)
                    values[key] = t.reshape(n * t.shape[1], *t.shape[2:])
            y, _ = op[name](*values.values())
            # what is kept belongs to the autograd of this call; there is none above vmap
            return (y.unflatten(-2, (n, y.shape[-2] // n)), y.new_empty(0)), (y.dim() - 2, None)
        slices = [
            op[name](*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(n)
        ]
        if name.endswith("_"):
            return None, None
        if name in LORA:
            y = torch.stack([y for y, _ in slices])
            return (y, y.new_empty(0)), (0, None)
        if isinstance(slices[0], torch.Tensor):
            return torch.stack(slices), 0
        return tuple(torch.stack(parts) for parts in zip(*slices, strict=True)), (0,) * len(slices[0])

    return rule


def register() -> None:
    """The rule of every operator, with torch."""
    for name in op:
        torch.library.register_vmap(f"plora_ext::{name}", _rule(name))
