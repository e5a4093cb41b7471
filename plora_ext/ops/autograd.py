"""Gradients: `LowRank` for eager code, and what is registered with torch for all else (compiled code, vmap).

Backward formulas that are one or two large products are written here in torch; the rest are operators of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext import libraries
from plora_ext.ops import formulas, twins
from plora_ext.ops.autocast import without_autocast
from plora_ext.ops.compiled import LORA, PROTOTYPES, eager_op, op
from plora_ext.ops.formulas import through_unit, unit
from plora_ext.torch_private import below, forward_mode


def _is_differentiated_again(grad: Tensor) -> bool:
    """Whether a backward is itself differentiated: under create_graph, or in forward mode."""
    return torch.is_grad_enabled() or forward_mode(grad)


# --- the low-rank families --------------------------------------------------------------------------------------------


def rows(t: Tensor) -> Tensor:
    """[M, n] of [..., n]."""
    return t if t.dim() == 2 else t.flatten(0, -2) if t.dim() > 2 else t[None]


def unflat(y: Tensor, x: Tensor) -> Tensor:
    """[..., out] or [T, ..., out] of rows of y, where x is [..., in]."""
    return y.view(*y.shape[:-2], *x.shape[:-1], y.shape[-1])


def rows_of_grad(grad: Tensor, x: Tensor) -> Tensor:
    """grad [..., out] or [T, ..., out] as rows, where x is [..., in]; the inverse of `unflat`."""
    if x.dim() == 1:
        return grad.unsqueeze(-2)
    return grad if x.dim() == 2 else grad.flatten(grad.dim() - x.dim(), -2)


def call(
    run: Callable[..., Any], options: Sequence[Any], x: Tensor, ids: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    scaling: Tensor, base: Tensor | None, weight: Tensor | None, bias: Tensor | None, bias_A: Tensor | None,
    bias_B: Tensor | None,
) -> tuple[Tensor, Any]:  # fmt: skip
    """An operator on x and base [..., n] with factors [T, ...]: y [..., n] and what it keeps.

    ids: of `lora_indexed`, else None. options: ranks, relu, trainable, slices, keep; of `lora_weighted` times, too.
    """
    flat = x
    if x.dim() != 2:
        flat, base = rows(x), None if base is None else rows(base)
    front = (flat,) if ids is None else (flat, ids)
    y, kept = run(*front, lora_A, lora_B, scaling, base, weight, bias, bias_A, bias_B, *options)
    return y if flat is x else unflat(y, x), kept


def _gradients(
    family: str, options: Sequence[Any], needs: Sequence[bool], again: bool, grad: Tensor, x: Tensor,
    ids: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Tensor | None, bias_A: Tensor | None,
    bias_B: Tensor | None, kept: Tensor, *times: Tensor,
) -> list[Any]:  # fmt: skip
    """Of x, ids, lora_A, lora_B, scaling, base, weight, bias, bias_A and bias_B, as far as needed; all in rows."""
    X, _, A, B, s, base, W, bias, a, b = needs
    dx = dA = dB = ds = da = db = None
    if bits := X | A << 1 | B << 2 | s << 3 | a << 4 | b << 5:
        ranks, relu, trainable, _, _ = options
        front = (x,) if ids is None else (x, ids)
        if again:
            family, scale = ("lora_sum", scaling * times[0]) if times else (family, scaling)
            factors = lora_A, lora_B, scale, None, weight, None, bias_A, bias_B
            args = [*front, *factors, ranks, relu, trainable, None, False]
            asks = [X, *[False] * (len(front) - 1), A, B, s, False, False, False, a, b, *[False] * 5]
            dx, *_, dA, dB, ds, _, _, _, da, db, _, _, _, _, _ = twins.gradients(family, args, asks, grad)
            ds = ds * times[0] if times and s else ds
        else:
            dx, dA, dB, ds, da, db = op[family + "_backward"](
                grad, *front, lora_A, lora_B, scaling, weight, bias_A, bias_B, ranks, kept, relu, trainable, bits,
                *times,
            )  # fmt: skip
    total = grad.sum(0) if family == "lora_all" and (base or W or bias) else grad
    return [
        dx if X else None, None, dA if A else None, dB if B else None, ds if s else None, total if base else None,
        total.T @ x if W else None, total.sum(0) if bias else None, da if a else None, db if b else None,
    ]  # fmt: skip


class LowRank(torch.autograd.Function):
    """A low-rank operator as `call` takes it, in eager code on plain tensors.

    The host pays far less than for what is registered, and the views that are made here need no gradients of their own.
    """

    @staticmethod
    def forward(
        ctx: Any, family: str, options: Sequence[Any], x: Tensor, ids: Tensor | None, lora_A: Tensor, lora_B: Tensor,
        scaling: Tensor, base: Tensor | None, weight: Tensor | None, bias: Tensor | None, bias_A: Tensor | None,
        bias_B: Tensor | None,
    ) -> Tensor:  # fmt: skip
        with below():  # a view made here counts as none: what follows may write to y
            y, kept = call(
                eager_op[family], options, x, ids, lora_A, lora_B, scaling, base, weight, bias, bias_A, bias_B
            )
        options, times = options[:5], options[5:]
        ctx.save_for_backward(x, ids, lora_A, lora_B, scaling, weight, bias_A, bias_B, kept, *times)
        ctx.family, ctx.options = family, options
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # hooks may compute them anew, with autograd
        x, ids, lora_A, lora_B, scaling, weight, bias_A, bias_B, kept, *times = saved
        again = _is_differentiated_again(grad)
        with without_autocast(grad.device.type) if again else below():
            flat, of_rows = (x, grad) if x.dim() == 2 else (rows(x), rows_of_grad(grad, x))
            found = _gradients(
                ctx.family, ctx.options, ctx.needs_input_grad[2:], again, of_rows, flat, ids, lora_A, lora_B, scaling,
                weight, bias_A, bias_B, kept, *times,
            )  # fmt: skip
            if flat is not x:
                for i in (0, 5):
                    if found[i] is not None:
                        found[i] = unflat(found[i], x)
        return (None, None, *found)


def narrow(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 factor in the dtype of an x of 16 bits; autocast has rules of its own."""
    if factor.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16):
        return factor.to(dtype)
    return factor


def call_one(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Tensor, bias: Tensor | None, keep: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    """`lora_sum` of one adapter, [r, in] and [out, r], where nothing records gradients.

    Returns:
        y, what it keeps, and the factors where they were narrowed.
    """
    dtype = x.dtype
    with below():
        if lora_A.dtype == dtype and lora_B.dtype == dtype:
            made: tuple[Tensor, Tensor] = eager_op["lora_one"](x, lora_A, lora_B, scaling, weight, bias, keep)
            return made
        if x.is_cuda and lora_A.dtype == lora_B.dtype == torch.float32:  # both casts in one launch
            A, B, _ = eager_op["lora_stack"](x, [lora_A], [lora_B], [1.0])
            narrowed = A[0], B[0]
        else:
            narrowed = narrow(lora_A, dtype), narrow(lora_B, dtype)
        return (*eager_op["lora_one"](x, *narrowed, scaling, weight, bias, keep), *narrowed)


def _gradients_of_one_again(
    asks: Sequence[bool], grad: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Tensor
) -> list[Any]:
    """Of x and the factors, as torch's own operators make them."""
    with without_autocast(grad.device.type):
        factors = narrow(lora_A, x.dtype)[None], narrow(lora_B, x.dtype)[None]
        args = (rows(x), *factors, scaling, None, weight, *[None] * 4, False, None, None, False)
        dx, *of_factors = twins.gradients("lora_sum", args, (*asks, *[False] * 11), rows_of_grad(grad, x))[:3]
        dx = dx if dx is None or x.dim() == 2 else unflat(dx, x)
        return [dx, *(None if d is None else d[0] for d in of_factors)]


class OneAdapter(torch.autograd.Function):
    """`LowRank` for `call_one`, of which only x and the factors get gradients: the least that the host can do.

    rest: the other arguments of `call_one`, in one, for autograd to look at none of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, rest: tuple[Tensor, Tensor, Tensor | None, bool]
    ) -> Tensor:
        y, *kept = call_one(x, lora_A, lora_B, *rest)
        ctx.save_for_backward(x, lora_A, lora_B, rest[0], rest[1], *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, lora_A, lora_B, scaling, weight, kept, *narrowed = ctx.saved_tensors
        X, A, B, _ = ctx.needs_input_grad
        if _is_differentiated_again(grad):
            dx, dA, dB = _gradients_of_one_again((X, A, B), grad, x, lora_A, lora_B, scaling, weight)
        else:
            factors = narrowed or (lora_A, lora_B)
            needs = X | A << 1 | B << 2
            with below():
                dx, dA, dB = eager_op["lora_one_backward"](grad, x, *factors, scaling, weight, kept, needs)
        # where factors were narrowed, torch widens their gradients
        return dx if X else None, dA if A else None, dB if B else None, None


def _register_lora(family: str) -> None:
    indexed = family == "lora_indexed"

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        *front, _, weight, _, bias_A, bias_B, ranks, relu, trainable, _, _ = inputs
        ctx.save_for_backward(*front, weight, bias_A, bias_B, ranks, output[1])
        ctx.relu, ctx.trainable = relu, trainable

    def backward(ctx: Any, grad: Tensor, of_kept: Tensor | None) -> tuple[Any, ...]:
        x, *ids, lora_A, lora_B, scaling, weight, bias_A, bias_B, ranks, kept = ctx.saved_tensors
        needs, options = list(ctx.needs_input_grad[: 9 + indexed]), (ranks, ctx.relu, ctx.trainable, None, False)
        if not indexed:
            needs.insert(1, False)
        with without_autocast(grad.device.type):
            found = _gradients(
                family, options, needs, _is_differentiated_again(grad), grad, x, ids[0] if ids else None, lora_A,
                lora_B, scaling, weight, bias_A, bias_B, kept,
            )  # fmt: skip
        if not indexed:
            del found[1]
        return (*found, None, None, None, None, None)

    torch.library.register_autograd(f"plora_ext::{family}", backward, setup_context=setup_context)


# --- lora_stack: factors that lie one by one, side by side as the operators take them ---------------------------------

_STACKS = libraries.has_kernel("lora_stack", device_type="cuda")
_Stacked = tuple[Tensor, Tensor, Tensor | None]


def stacked(
    x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float], trained: Sequence[int] = ()
) -> _Stacked:
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
    made: _Stacked = _Stack.apply((x, lora_A, lora_B, scaling), trained, *factors)
    return made


def side_by_side(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], T: int) -> tuple[Tensor, Tensor]:
    """lora_A [T, n r, in] and lora_B [T, n out, r] of T times n pairs, with zeros up to one rank; by torch's operators.

    The B among n may differ in their rows.
    """
    As, Bs, ranks = list(lora_A), list(lora_B), [A.shape[0] for A in lora_A]
    r = max(ranks)
    if min(ranks) < r:
        As, Bs = [F.pad(A, (0, 0, 0, r - A.shape[0])) for A in As], [F.pad(B, (0, r - B.shape[1])) for B in Bs]
    # for many small tensors quicker than `stack`
    return torch.cat(As).view(T, r * len(As) // T, -1), torch.cat(Bs).view(T, -1, r)


def _stack(x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float]) -> _Stacked:
    if _STACKS and x.is_cuda and x.dtype != torch.float64:
        try:
            made: _Stacked = eager_op["lora_stack"](x, lora_A, lora_B, scaling)
            return made
        except RuntimeError:  # of several dtypes or devices, which torch joins or refuses
            pass
    A, B = side_by_side(lora_A, lora_B, len(lora_A))
    return narrow(A, x.dtype), narrow(B, x.dtype), None


class _Stack(torch.autograd.Function):
    """Autograd sees the factors that train, A and B of each, and not the stacking of all."""

    @staticmethod
    def forward(ctx: Any, args: Any, trained: Sequence[int], *factors: Tensor) -> _Stacked:
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
    again = _is_differentiated_again(grad)
    with nullcontext() if again else below():  # parts made here count as no views: what follows may write to each
        if len(trained) == len(grad) and not again:
            # one cast for all, and none that rounds; what is left of it, torch casts for each
            parts = grad.to(torch.promote_types(grad.dtype, ctx.dtype)).unbind()
        else:
            parts = tuple(grad.select(0, t) for t in trained)
        return [part if part.shape[rank] == n else part.narrow(rank, 0, n) for part, n in zip(parts, r, strict=True)]


# --- the others -------------------------------------------------------------------------------------------------------


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    lora_A, lora_B, scaling, ranks = ctx.saved_tensors
    kept = scaling.dtype
    g, A, B = grad.to(kept), lora_A.to(kept), lora_B.to(kept)
    real = None if ranks is None else torch.arange(A.shape[1], device=A.device) < ranks[:, None]
    if real is not None:
        A, B = A.masked_fill(~real[..., None], 0), B.masked_fill(~real[:, None], 0)
    Bg = B.transpose(1, 2) @ g  # [T, r, in]
    dA = scaling[:, None, None] * Bg
    dB = scaling[:, None, None] * (g @ A.transpose(1, 2))
    return grad, dA.to(lora_A.dtype), dB.to(lora_B.dtype), (Bg * A).sum((1, 2)), None


def _subspace_logits_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, prototypes, weights = ctx.saved_tensors
    kept = weights.dtype
    g = grad.to(kept)
    f, f_norm = unit(features, kept)
    p, p_norm = unit(prototypes, kept)
    df = (g @ (weights[..., None] * p).flatten(1)).view_as(f)
    dwp = (g.T @ f.flatten(1)).view_as(p)
    return (
        through_unit(df, f, f_norm).to(features.dtype),
        through_unit(weights[..., None] * dwp, p, p_norm).to(prototypes.dtype),
        (dwp * p).sum(-1),
        None,
    )


def _class_sums_backward(ctx: Any, d_sums: Tensor | None, d_counts: Tensor | None) -> tuple[Tensor | None, None, None]:
    if d_sums is None:
        return None, None, None
    (labels,) = ctx.saved_tensors
    if not d_sums.shape[0]:  # no classes, and no row to take from them
        return d_sums.new_zeros(labels.shape[0], d_sums.shape[1], dtype=ctx.dtype), None, None
    of_rows = d_sums[labels.clamp(min=0)].masked_fill((labels < 0)[:, None], 0)
    return of_rows.to(ctx.dtype), None, None


def _class_sums_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype


def _backward(name: str, grad: Tensor) -> Callable[..., Any]:
    """The compiled backward of the gradient's device, or else its formula."""
    compiled = f"{name}_backward"
    serves = libraries.has_kernel(compiled, grad.device.type)
    found: Callable[..., Any] = op[compiled] if serves else getattr(formulas, name)
    return found


def _reconstruct_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tau, add_old, _ = ctx.others
    d_old, d_new, d_values = _backward("reconstruct_prototypes", grad)(grad, *ctx.saved_tensors, tau)
    return d_old + grad if add_old else d_old, d_new, d_values, None, None, None


def _complete_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward("complete_prototypes", grad)(grad, *ctx.saved_tensors, *ctx.others), None, None, None


def _prototypes_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
    ctx.others = [a for a in inputs if not isinstance(a, Tensor)]


def _or_the_twins(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward, but for one that is differentiated in turn."""

    def chosen(ctx: Any, grad: Tensor) -> Any:
        if _is_differentiated_again(grad):
            return tuple(twins.gradients(name, [*ctx.saved_tensors, *ctx.others], ctx.needs_input_grad, grad))
        return backward(ctx, grad)

    return chosen


def register() -> None:
    """The gradients of every operator, with torch."""
    for name in LORA:
        _register_lora(name)
    found: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
        "lora_merge": (_merge_backward, lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:])),
        "class_sums": (_class_sums_backward, _class_sums_setup),
    }
    backwards = _reconstruct_backward, _complete_backward, _subspace_logits_backward
    for name, backward in zip(PROTOTYPES, backwards, strict=True):
        found[name] = _or_the_twins(name, backward), _prototypes_setup
    for name, (backward, setup) in found.items():
        torch.library.register_autograd(f"plora_ext::{name}", backward, setup_context=setup)
