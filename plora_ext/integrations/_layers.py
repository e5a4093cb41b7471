"""Adapters that are separate parameters, as the operands of the low-rank operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from plora_ext.nn import linear


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling `module` is `x W^T + b` and nothing else: a linear layer nobody has hooked or wrapped."""
    return type(module) is nn.Linear and linear.plain_parameters(module) is not None


def kept_on_device(make: Callable[..., Any]) -> Any:
    """`make(*key, device)` remembered: what is copied to a device once, not in every forward. Not to be written to.

    A captured CUDA graph reads such a value whenever it is replayed. So nothing is made while a graph is captured,
    where it would lie in memory that the graph's own results use again, and what a graph has used is never forgotten.
    """
    of_graphs: dict[Any, Any] = {}

    @lru_cache(maxsize=4096)
    def made(*key: Any) -> Any:
        if _is_capturing(key[-1]):
            raise RuntimeError(
                f"{make.__name__}{key[:-1]} is not on {key[-1]} yet, and a CUDA graph that is being captured cannot "
                "copy it there: call the model once on the same input and adapters before the capture, as warm-up"
            )
        with torch.inference_mode(False):
            return make(*key)

    @wraps(make)
    def kept(*key: Any) -> Any:
        value = made(*key)
        if _is_capturing(key[-1]):
            of_graphs[key] = value
        return value

    return kept


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@kept_on_device
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of numbers."""
    return torch.tensor(values, dtype=dtype, device=device)


def ones(n: int, x: Tensor) -> Tensor:
    """The scales of n adapters that have none, for x."""
    return constant((1.0,) * n, torch.promote_types(x.dtype, torch.float32), x.device)
