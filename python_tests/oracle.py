"""How the operators' tests compare: against the plain-torch twin in float64, allowing twice the twin's own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def widen(value: Any) -> Any:
    """float64 copies of tensors that are floating point; leaves require gradients as before."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def size(value: Any) -> Any:
    """Absolute values in float64 of tensors that are floating point."""
    return value.detach().double().abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def run(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], cotangent: Tensor | None
) -> list[Any]:
    """The output, then the gradient of every tensor that requires one, for this cotangent."""
    y = function(*args, **kwargs)
    leaves = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad]
    if cotangent is None or not leaves:
        return [y]
    if not y.requires_grad:  # nothing that y depends on asks, as with no adapters at all
        return [y, *(None for _ in leaves)]
    return [y, *torch.autograd.grad(y, leaves, cotangent.to(y.dtype), allow_unused=True)]


def rounding(
    i: int, exact: Tensor, dtype: torch.dtype, y: Tensor, y_dtype: torch.dtype, cotangent: Tensor | None
) -> Tensor:
    """What rounding may leave in the norm of result i (0: the output y) whatever the twin's own error is."""
    wide = dtype == torch.float64
    n, eps = max(exact.numel(), 1), 1e-13 if wide else torch.finfo(dtype).eps
    allowed = 4 * eps * (exact.norm() + exact.abs().max() * n**0.5)
    if cotangent is not None:
        # what is left of sums that cancel; a gradient of one number per adapter sums over all of y
        total = i > 0 and exact.dim() == 1
        size = cotangent.double().norm() * (y.norm() if total else 10)
        allowed = allowed + (1e-15 if wide else 1e-7) * size
        if total:  # of terms that were rounded to the dtype of y, one by one, or, where h was, a row's together
            rows = (cotangent.double() * y).flatten(0, -2).sum(1).norm() if y.dim() > 1 else 0
            allowed = allowed + torch.finfo(y_dtype).eps * (size / max(y.numel(), 1) ** 0.5 + rows)
    return allowed


def check(
    function: Callable[..., Any],
    twin: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    cotangent: Tensor | None = None,
    sums: bool = False,
) -> None:
    """Forward and every gradient within twice the error of the twin in the same dtype, both against float64.

    Args:
        sums: The output is made of sums of products of the arguments, whose terms may cancel where there are few of
            them: then it may also be off by what float32 rounds of the terms' absolute values.
    """
    kwargs = kwargs or {}
    exact = run(twin, [widen(a) for a in args], {k: widen(v) for k, v in kwargs.items()}, widen(cotangent))
    plain = run(twin, args, kwargs, cotangent)
    ours = run(function, args, kwargs, cotangent)
    assert len(exact) == len(ours)
    of_terms = torch.zeros(())
    if sums:
        terms = run(twin, [size(a) for a in args], {k: size(v) for k, v in kwargs.items()}, None)[0]
        of_terms = (1e-15 if plain[0].dtype == torch.float64 else 1e-7) * terms.norm()
    for i, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        what = "output" if i == 0 else f"gradient {i - 1}"
        assert (e is None) == (o is None) or not torch.count_nonzero(e if o is None else o), what
        if e is None or o is None:
            continue
        assert o.shape == e.shape, (what, o.shape, e.shape)
        assert o.dtype == p.dtype, (what, o.dtype, p.dtype)
        if not e.numel():
            continue
        assert torch.isfinite(o).all(), f"{what} holds what nobody wrote"
        allowed = 2 * (p.double() - e).norm() + rounding(i, e, o.dtype, exact[0], plain[0].dtype, cotangent)
        if i == 0:
            allowed = allowed + of_terms.to(allowed.device)
        assert (o.double() - e).norm() <= allowed, (what, float((o.double() - e).norm()), float(allowed))


def opcheck(op: Any, args: Sequence[Any]) -> None:
    """torch's own checks of a custom operator: schema, autograd registration, fake kernel, AOT dispatch."""
    torch.library.opcheck(op, tuple(args))
