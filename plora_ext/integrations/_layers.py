"""Adapters that are separate parameters, as the operands of the low-rank operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from plora_ext.nn import linear
from plora_ext.ops.autograd import side_by_side


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


def stack(factors_A: Sequence[Tensor], factors_B: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """lora_A [T, r, in] and lora_B [T, out, r] of T pairs; where their ranks differ, padded, with the ranks [T]."""
    if len(factors_A) == 1:
        return factors_A[0][None], factors_B[0][None], None
    own = tuple(A.shape[0] for A in factors_A)
    ranks = constant(own, torch.int64, factors_A[0].device) if min(own) < max(own) else None
    return *side_by_side(factors_A, factors_B, len(own)), ranks
