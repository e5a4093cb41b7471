"""`lora_stack`: factors that lie one by one, as a layer keeps its adapters, side by side as the operators take them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext import libraries
from plora_ext.ops.autograd import is_differentiated_again, narrow
from plora_ext.ops.compiled import op
from plora_ext.torch_private import below

_SERVES_CUDA = libraries.has_kernel("lora_stack", device_type="cuda")
_Made = tuple[Tensor, Tensor, Tensor | None]


def stacked(
    x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float], trained: Sequence[int] = ()
) -> _Made:
    """The factors [r_t, in] and [out, r_t] of T adapters in one, with zeros up to the largest rank.

    For eager code, and plain tensors.

    scaling: T numbers, of use on a GPU.
    trained: the t of those that get gradients.

    Returns:
        lora_A [T, r, in] and lora_B [T, out, r] in the dtype of x where they are of that or float32; scaling [T] where
        the kernel made it, which takes one launch for all three.
    """
    if not trained:
        with below():
            return _stack(x, lora_A, lora_B, scaling)
    factors = chain.from_iterable((lora_A[t], lora_B[t]) for t in trained)
    made: _Made = _Stack.apply((x, lora_A, lora_B, scaling), trained, *factors)
    return made


def filled_up(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], r: int) -> tuple[list[Tensor], list[Tensor]]:
    """Factors [r_i, in] and [out, r_i] with zeros up to one rank r."""
    return [F.pad(A, (0, 0, 0, r - A.shape[0])) for A in lora_A], [F.pad(B, (0, r - B.shape[1])) for B in lora_B]


def _stack(x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float]) -> _Made:
    if _SERVES_CUDA and x.is_cuda and x.dtype != torch.float64:
        try:
            made: _Made = op["lora_stack"](x, lora_A, lora_B, scaling)
            return made
        except RuntimeError:  # of several dtypes or devices, which torch joins or refuses
            pass
    As, Bs, ranks = list(lora_A), list(lora_B), [A.shape[0] for A in lora_A]
    T, r = len(ranks), max(ranks)
    if min(ranks) < r:
        As, Bs = filled_up(As, Bs, r)
    A, B = torch.cat(As).view(T, r, -1), torch.cat(Bs).view(T, -1, r)
    return narrow(A, x.dtype), narrow(B, x.dtype), None


class _Stack(torch.autograd.Function):
    """Autograd sees the factors that train, A and B of each, and not the stacking of all."""

    @staticmethod
    def forward(ctx: Any, args: Any, trained: Sequence[int], *factors: Tensor) -> _Made:
        with below():
            made = _stack(*args)
        asks = ctx.needs_input_grad[2:]
        others = (made[0] if not any(asks[::2]) else None, made[1] if not any(asks[1::2]) else None, made[2])
        ctx.mark_non_differentiable(*(t for t in others if t is not None))
        ctx.set_materialize_grads(False)
        ctx.trained, ctx.dtype = trained, factors[0].dtype
        ctx.ranks = [A.shape[0] for A in factors[::2]]
        return made

    @staticmethod
    def backward(ctx: Any, dA: Tensor | None, dB: Tensor | None, _: Any) -> tuple[Any, ...]:
        own = _parts(dA, 0, ctx), _parts(dB, 1, ctx)
        found = chain.from_iterable(zip(*own, strict=True))
        return None, None, *(d if asks else None for d, asks in zip(found, ctx.needs_input_grad[2:], strict=True))


def _parts(grad: Tensor | None, rank: int, ctx: Any) -> Sequence[Tensor | None]:
    """What of a stacked gradient, whose dimension 1 + rank is the ranks, belongs to the factors that train."""
    trained, r = ctx.trained, ctx.ranks
    if grad is None:
        return [None] * len(trained)
    again = is_differentiated_again(grad)
    with nullcontext() if again else below():  # parts made here count as no views: what follows may write to each
        if len(trained) == len(grad) and not again:
            # one cast for all, and none that rounds; what is left of it, torch casts for each
            parts = grad.to(torch.promote_types(grad.dtype, ctx.dtype)).unbind()
        else:
            parts = tuple(grad.select(0, t) for t in trained)
        return [part if part.shape[rank] == n else part.narrow(rank, 0, n) for part, n in zip(parts, r, strict=True)]
