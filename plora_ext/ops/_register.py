"""What the compiled operators need beside their kernels: fake implementations, autograd, autocast and vmap rules.

Registered once, on import, where the compiled libraries are loaded. Backward formulas that are one or two large
products are written here in torch; the rest are operators of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plora_ext import _library
from plora_ext.ops._checks import wide
from plora_ext.reference import EPS

LORA = ("lora_indexed", "lora_sum", "lora_all")
PROTOTYPES = ("reconstruct_prototypes", "complete_prototypes", "subspace_logits")
_lib = torch.library.Library("plora_ext", "IMPL") if _library.backend() == "native" else None


def _op(name: str) -> Any:
    return getattr(torch.ops.plora_ext, name)


# --- autocast: the low-rank products in the autocast dtype, everything about prototypes in float32 ------------------

_KEEP = {"scaling", "weights"}  # small, and kept in float32


def _autocast_dtype(name: str, device_type: str) -> torch.dtype | None:
    if name.removesuffix("_") in LORA:
        return torch.get_autocast_dtype(device_type)
    return torch.float32 if name in PROTOTYPES else None


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(dtype)


def run_reference(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Calls a plain-torch twin with the same casts under autocast as the compiled operator has."""
    device_type = args[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return function(*args, **kwargs)
    dtype = _autocast_dtype(function.__name__, device_type)
    with torch.autocast(device_type, enabled=False):
        cast = [_cast(a, dtype) for a in args]
        return function(*cast, **{name: _cast(a, dtype) for name, a in kwargs.items()})


def _register_autocast(name: str, device_type: str) -> None:
    key = "Autocast" + device_type.upper()
    names = [argument.name for argument in _op(name).default._schema.arguments]
    mutated = {"y", "sums", "counts"}

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            dtype = _autocast_dtype(name, device_type)
            cast = (a if n in _KEEP or n in mutated else _cast(a, dtype) for n, a in zip(names, args, strict=False))
            return _op(name)(*cast)

    assert _lib is not None
    _lib.impl(name, kernel, key)


# --- fake implementations: shapes only --------------------------------------------------------------------------------


def _lora_fake(name: str) -> Callable[..., Tensor]:
    def fake(x: Tensor, *rest: Any) -> Tensor:
        lora_A, lora_B = rest[1:3] if name == "lora_indexed" else rest[:2]
        shape = (x.shape[0], lora_B.shape[1])
        return x.new_empty((lora_A.shape[0], *shape) if name == "lora_all" else shape)

    return fake


def _lora_backward_fake(name: str) -> Callable[..., tuple[Tensor, ...]]:
    def fake(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        factors = rest[1:] if name == "lora_indexed" else rest
        lora_A, lora_B, scaling, _, bias_A, bias_B, *_, needs = factors
        return tuple(
            torch.empty(t.shape, dtype=t.dtype, device=t.device)
            if t is not None and needs >> bit & 1
            else x.new_empty(0)
            for bit, t in enumerate((x, lora_A, lora_B, scaling, bias_A, bias_B))
        )

    return fake


def _class_sums_fake(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    sums = features.new_empty((num_classes, features.shape[1]), dtype=wide(features))
    return sums, features.new_empty(num_classes, dtype=torch.int64)


def _nothing(*args: Any) -> None:
    return None


# --- autograd ---------------------------------------------------------------------------------------------------------


def _register_lora_autograd(name: str) -> None:
    indexed = name == "lora_indexed"

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *rest = inputs
        ids = rest.pop(0) if indexed else None
        lora_A, lora_B, scaling, _, weight, _, bias_A, bias_B, ranks, ctx.relu, ctx.trainable = rest
        ctx.save_for_backward(x, ids, lora_A, lora_B, scaling, weight, bias_A, bias_B, ranks)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, ids, lora_A, lora_B, scaling, weight, bias_A, bias_B, ranks = ctx.saved_tensors
        asks = list(ctx.needs_input_grad)
        if indexed:
            asks.pop(1)
        x_, A, B, s, base, W, bias, a, b = asks[:9]
        needs = sum(bit << i for i, bit in enumerate((x_, A, B, s, a, b)))
        parts: list[Tensor | None] = [None] * 6
        if needs:
            id_args = (ids,) if indexed else ()
            gradients = _op(name + "_backward")(
                grad, x, *id_args, lora_A, lora_B, scaling, weight, bias_A, bias_B, ranks, ctx.relu, ctx.trainable,
                needs,
            )  # fmt: skip
            parts = [g if needs >> i & 1 else None for i, g in enumerate(gradients)]
        dx, dA, dB, ds, da, db = parts
        total = grad.sum(0) if name == "lora_all" and (base or W or bias) else grad
        result = [
            dx, dA, dB, ds, total if base else None, total.T @ x if W else None, total.sum(0) if bias else None,
            da, db, None, None, None,
        ]  # fmt: skip
        if indexed:
            result.insert(1, None)
        return tuple(result)

    torch.library.register_autograd(f"plora_ext::{name}", backward, setup_context=setup_context)


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

    def unit(x: Tensor) -> tuple[Tensor, Tensor]:
        norm = x.to(kept).norm(dim=-1, keepdim=True).clamp_min(EPS)
        return x.to(kept) / norm, norm

    def through(d: Tensor, u: Tensor, norm: Tensor) -> Tensor:  # the gradient before normalisation
        return torch.where(norm > EPS, d - (d * u).sum(-1, keepdim=True) * u, d) / norm

    f, f_norm = unit(features)
    p, p_norm = unit(prototypes)
    df = (g @ (weights[..., None] * p).flatten(1)).view_as(f)
    dwp = (g.T @ f.flatten(1)).view_as(p)
    return (
        through(df, f, f_norm).to(features.dtype),
        through(weights[..., None] * dwp, p, p_norm).to(prototypes.dtype),
        (dwp * p).sum(-1),
    )


def _class_sums_backward(ctx: Any, d_sums: Tensor | None, d_counts: Tensor | None) -> tuple[Tensor | None, None, None]:
    if d_sums is None:
        return None, None, None
    (labels,) = ctx.saved_tensors
    rows = d_sums[labels.clamp(min=0)].masked_fill((labels < 0)[:, None], 0)
    return rows.to(ctx.dtype), None, None


def _reconstruct_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_op("reconstruct_prototypes_backward")(grad, *ctx.saved_tensors, ctx.tau), None


def _complete_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _op("complete_prototypes_backward")(grad, *ctx.saved_tensors, ctx.tau, ctx.last), None, None, None


def _save(*names: str) -> Callable[..., None]:
    """A setup_context that keeps the tensor inputs, and the others as attributes of these names."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
        for name, value in zip(names, (a for a in inputs if not isinstance(a, Tensor)), strict=True):
            setattr(ctx, name, value)

    return setup_context


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _class_sums_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype


# --- vmap: fold the mapped dimension into the rows where only rows are mapped, else one call per slice ---------------


def _vmap(name: str) -> Callable[..., Any]:
    op = _op(name)
    arguments = [argument.name for argument in op.default._schema.arguments]
    row_like = {"x", "ids", "base"} if name in LORA else set()

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        mapped = {n for n, d in zip(arguments, in_dims, strict=True) if d is not None}
        n = info.batch_size
        if mapped and mapped <= row_like and n > 0 and args[0].numel():
            values = dict(zip(arguments, args, strict=True))
            for key, d in zip(arguments, in_dims, strict=True):
                if key in row_like and values[key] is not None:
                    t = values[key]
                    t = t.movedim(d, 0) if d is not None else t.expand(n, *t.shape)
                    values[key] = t.reshape(n * t.shape[1], *t.shape[2:])
            y = op(*values.values())
            return y.unflatten(-2, (n, y.shape[-2] // n)), y.dim() - 2
        slices = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(n)
        ]
        if name.endswith("_"):
            return None, None
        if isinstance(slices[0], Tensor):
            return torch.stack(slices), 0
        return tuple(torch.stack(parts) for parts in zip(*slices, strict=True)), (0,) * len(slices[0])

    return rule


def _register_all() -> None:
    register_fake = torch.library.register_fake
    register_autograd = torch.library.register_autograd
    for name in LORA:
        register_fake(f"plora_ext::{name}", _lora_fake(name))
        register_fake(f"plora_ext::{name}_", _nothing)
        register_fake(f"plora_ext::{name}_backward", _lora_backward_fake(name))
        _register_lora_autograd(name)
    register_fake("plora_ext::lora_merge", lambda weight, *rest: torch.empty_like(weight).contiguous())
    register_fake("plora_ext::class_sums", _class_sums_fake)
    register_fake("plora_ext::class_sums_", _nothing)
    register_fake(
        "plora_ext::reconstruct_prototypes",
        lambda old, new, values, tau: old.new_empty(old.shape[0], values.shape[1]),
    )
    register_fake(
        "plora_ext::reconstruct_prototypes_backward",
        lambda grad, old, new, values, tau: tuple(t.new_empty(t.shape) for t in (old, new, values)),
    )
    register_fake("plora_ext::complete_prototypes", lambda p, task_of_class, tau, last: p.new_empty(p.shape))
    register_fake(
        "plora_ext::complete_prototypes_backward", lambda g, p, task_of_class, tau, last: p.new_empty(p.shape)
    )
    register_fake("plora_ext::subspace_logits", lambda f, p, weights: f.new_empty(f.shape[0], p.shape[0]))

    for name, backward, setup in (
        ("lora_merge", _merge_backward, _merge_setup),
        ("class_sums", _class_sums_backward, _class_sums_setup),
        ("reconstruct_prototypes", _reconstruct_backward, _save("tau")),
        ("complete_prototypes", _complete_backward, _save("tau", "last")),
        ("subspace_logits", _subspace_logits_backward, _save()),
    ):
        register_autograd(f"plora_ext::{name}", backward, setup_context=setup)

    backwards = [f"{name}_backward" for name in (*LORA, "reconstruct_prototypes", "complete_prototypes")]
    in_place = [f"{name}_" for name in LORA] + ["class_sums_"]
    for name in (*LORA, *PROTOTYPES, "lora_merge", "class_sums", *backwards, *in_place):
        torch.library.register_vmap(f"plora_ext::{name}", _vmap(name))
        for device_type in ("cpu", "cuda"):
            _register_autocast(name, device_type)


if _lib is not None:
    _register_all()
