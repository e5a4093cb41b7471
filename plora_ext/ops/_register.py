"""What the compiled operators need beside their kernels: fake implementations, autograd, autocast and vmap rules.

Registered once, on import, where the compiled libraries are loaded. Backward formulas that are one or two large
products are written here in torch; the rest are operators of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plora_ext import _library, reference
from plora_ext._private import any_requires_grad, below, forward_mode, is_plain, needs_twin
from plora_ext.ops import _gradients
from plora_ext.ops._checks import autocasts, wide, without_autocast
from plora_ext.ops._gradients import through_unit, unit

LORA = ("lora_indexed", "lora_sum", "lora_all")
PROTOTYPES = ("reconstruct_prototypes", "complete_prototypes", "subspace_logits")
_BACKWARD = tuple(f"{name}_backward" for name in (*LORA, "reconstruct_prototypes", "complete_prototypes"))
_IN_PLACE = (*(f"{name}_" for name in LORA), "class_sums_")
_lib = torch.library.Library("plora_ext", "IMPL") if _library.backend() == "native" else None

op: dict[str, Any] = {}
"""The compiled operators by name, looked up once."""
if _lib is not None:
    for _name in (*LORA, *PROTOTYPES, "lora_merge", "class_sums", *_BACKWARD, *_IN_PLACE):
        op[_name] = getattr(torch.ops.plora_ext, _name).default


# --- autocast: the low-rank products in the autocast dtype, everything about prototypes in float32 ------------------

_AS_IT_IS = {"scaling", "weights", "y", "sums", "counts"}  # small and kept in float32, or written to


def _autocast_dtype(name: str, device_type: str) -> torch.dtype | None:
    if name.removesuffix("_") in LORA:
        return torch.get_autocast_dtype(device_type)
    return torch.float32 if name in PROTOTYPES else None


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(dtype)


def _names(name: str) -> list[str]:
    return [argument.name for argument in op[name]._schema.arguments]


def _caster(name: str) -> Callable[[str, tuple[Any, ...]], list[Any]]:
    """What autocast on a type of device makes of the arguments of an operator."""
    casts = [n not in _AS_IT_IS for n in _names(name)]

    def cast(device_type: str, args: tuple[Any, ...]) -> list[Any]:
        dtype = _autocast_dtype(name, device_type)
        return [_cast(a, dtype) if casts_it else a for a, casts_it in zip(args, casts, strict=False)]

    return cast


def _register_autocast(name: str, device_type: str) -> None:
    key = "Autocast" + device_type.upper()
    cast = _caster(name)

    def kernel(*args: Any) -> Any:
        with without_autocast(device_type):
            return op[name](*cast(device_type, args))

    assert _lib is not None
    _lib.impl(name, kernel, key)


# --- the plain-torch twins, with the operators' own arguments ---------------------------------------------------------


def _lora_twin(name: str) -> Callable[..., Tensor]:
    function = getattr(reference, name)

    def twin(x: Tensor, *rest: Any) -> Tensor:
        *front, base, weight, bias, bias_A, bias_B, ranks, relu, trainable, _, _ = rest
        flat = rows(x)
        if name == "lora_indexed" and len(front[0]) != len(flat):
            front[0] = front[0].repeat_interleave(len(flat) // max(len(front[0]), 1))
        y: Tensor = function(
            flat, *front, base=None if base is None else rows(base), weight=weight, bias=bias, bias_A=bias_A,
            bias_B=bias_B, activation="relu" if relu else "none", ranks=ranks, trainable=trainable,
        )  # fmt: skip
        return y if x.dim() == 2 else unflat(y, x)

    return twin


def _reconstruct_twin(old: Tensor, new: Tensor, moved: Tensor, tau: float, add_old: bool, tf32: bool) -> Tensor:
    kept = wide(old)
    result = reference.reconstruct_prototypes(old.to(kept), new.to(kept), moved.to(kept), tau=tau)
    return (old.to(kept) + result if add_old else result).to(moved.dtype)


_twins: dict[str, Callable[..., Any]] = {
    **{name: _lora_twin(name) for name in LORA},
    "lora_merge": lambda weight, A, B, scaling, ranks: reference.lora_merge(weight, A, B, scaling, ranks=ranks),
    "class_sums": reference.class_sums,
    "reconstruct_prototypes": _reconstruct_twin,
    "complete_prototypes": lambda p, task_of_class, tau, last: reference.complete_prototypes(
        p, task_of_class, tau=tau, mode="last" if last else "reset"
    ),
    "subspace_logits": lambda features, prototypes, weights, tf32: reference.subspace_logits(
        features, prototypes, weights
    ),
}


def run_twin(name: str, *args: Any) -> Any:
    """An operator's plain-torch twin, with the same casts under autocast."""
    device_type = args[0].device.type
    if not autocasts(device_type):
        return _twins[name](*args)
    dtype = _autocast_dtype(name, device_type)
    with without_autocast(device_type):
        return _twins[name](*(_cast(a, dtype) for a in args))


def _differentiated_again(grad: Tensor) -> bool:
    """Whether a backward is itself differentiated: under create_graph, or in forward mode."""
    return torch.is_grad_enabled() or forward_mode(grad)


def _twin_gradients(name: str, args: Sequence[Any], asks: Sequence[bool], grad: Tensor) -> list[Any]:
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


# --- fake implementations: shapes only --------------------------------------------------------------------------------


def dense(family: str, lora_A: Tensor, weight: Any, bias_A: Any, bias_B: Any, relu: bool) -> bool:
    """Whether CUDA computes with the merged weight W + sum s B A, and keeps that: `lora_dense` of lora_plan.h."""
    linear = weight is not None and bias_A is None and bias_B is None and not relu
    T, r, _ = lora_A.shape
    return family == "lora_sum" and linear and T * r > (64 if T > 1 else 192)


def keeps(
    family: str,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    weight: Tensor | None,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    relu: bool,
) -> bool:
    """Whether a gradient that is asked for needs what the forward can keep: the merged weight, or else h."""
    if dense(family, lora_A, weight, bias_A, bias_B, relu):
        return x.requires_grad
    if lora_B.requires_grad or scaling.requires_grad:
        return True
    return relu and (x.requires_grad or lora_A.requires_grad or (bias_A is not None and bias_A.requires_grad))


def _lora_fake(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        lora_A, lora_B, _, _, weight, _, bias_A, bias_B, _, relu, _, _, keep = rest[name == "lora_indexed" :]
        (T, r, _), M, out = lora_A.shape, x.shape[0], lora_B.shape[1]
        y = x.new_empty((T, M, out) if name == "lora_all" else (M, out))
        if not keep or x.device.type == "cpu":
            return y, x.new_empty(0)
        if dense(name, lora_A, weight, bias_A, bias_B, relu):
            return y, x.new_empty(weight.shape)
        padded = 8 * max(1, -(-r // 8))  # `padded_rank` of lora_plan.h
        return y, x.new_empty(M, padded if name == "lora_indexed" else T * padded)

    return fake


def _lora_backward_fake(name: str) -> Callable[..., tuple[Tensor, ...]]:
    def fake(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        lora_A, lora_B, scaling, _, bias_A, bias_B, *_, needs = rest[name == "lora_indexed" :]
        return tuple(
            torch.empty(t.shape, dtype=t.dtype, device=t.device)
            if t is not None and needs >> bit & 1
            else (x if t is None else t).new_empty(0)
            for bit, t in enumerate((x, lora_A, lora_B, scaling, bias_A, bias_B))
        )

    return fake


def _class_sums_fake(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    sums = features.new_empty((num_classes, features.shape[1]), dtype=wide(features))
    return sums, features.new_empty(num_classes, dtype=torch.int64)


def _nothing(*args: Any) -> None:
    return None


# --- autograd ---------------------------------------------------------------------------------------------------------


_functions: dict[str, type[torch.autograd.Function]] = {}
_casters: dict[str, Callable[[str, tuple[Any, ...]], list[Any]]] = {}
_BASE = {name: 5 if name == "lora_indexed" else 4 for name in LORA}  # where base is among their arguments
_SERVES_CUDA = _library.has_kernel("lora_sum", "cuda")


def rows(t: Tensor) -> Tensor:
    """[M, n] of [..., n]."""
    return t if t.dim() == 2 else t.flatten(0, -2) if t.dim() > 2 else t[None]


def unflat(y: Tensor, x: Tensor) -> Tensor:
    """[..., out] or [T, ..., out] of rows of y, where x is [..., in]."""
    return y.view(*y.shape[:-2], *x.shape[:-1], y.shape[-1])


def _rows_of_grad(grad: Tensor, x: Tensor) -> Tensor:
    """grad [..., out] or [T, ..., out] as rows, where x is [..., in]; the inverse of `unflat`."""
    if x.dim() == 1:
        return grad.unsqueeze(-2)
    return grad if x.dim() == 2 else grad.flatten(grad.dim() - x.dim(), -2)


def _lora_autograd(name: str) -> type[torch.autograd.Function]:
    """Registers the gradients of a family; returns them as a Function too, which costs eager code far less time.

    The Function takes x, base and grad as [..., n]: views that it makes need no gradients of their own.
    """
    of_all, i_base = name == "lora_all", _BASE[name]
    backward_name = f"{name}_backward"

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *ids, lora_A, lora_B, scaling, _, weight, _, bias_A, bias_B, ranks, ctx.relu, ctx.trainable, _, _ = inputs
        ctx.save_for_backward(x, *ids, lora_A, lora_B, scaling, weight, bias_A, bias_B, ranks, output[1])

    def setup_registered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        setup_context(ctx, inputs, output)

    def gradients(ctx: Any, grad: Tensor, x: Tensor, saved: Sequence[Any], again: bool) -> list[Any]:
        X, *ids, A, B, s, base, W, bias, a, b, _, _, _, _, _ = ctx.needs_input_grad
        dx = dA = dB = ds = da = db = None
        if needs := X | A << 1 | B << 2 | s << 3 | a << 4 | b << 5:
            if again:
                *front, weight, bias_A, bias_B, ranks, _ = saved
                args = [x, *front, None, weight, None, bias_A, bias_B, ranks, ctx.relu, ctx.trainable, None, False]
                asks = [X, *ids, A, B, s, False, False, False, a, b, *[False] * 5]
                dx, *_, dA, dB, ds, _, _, _, da, db, _, _, _, _, _ = _twin_gradients(name, args, asks, grad)
            else:
                dx, dA, dB, ds, da, db = op[backward_name](grad, x, *saved, ctx.relu, ctx.trainable, needs)
        total = grad.sum(0) if of_all and (base or W or bias) else grad
        return [
            dx if X else None,
            *[None] * len(ids),
            dA if A else None,
            dB if B else None,
            ds if s else None,
            total if base else None,
            total.T @ x if W else None,
            total.sum(0) if bias else None,
            da if a else None,
            db if b else None,
            *[None] * 5,
        ]

    def registered(ctx: Any, grad: Tensor, of_kept: Tensor | None) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        with without_autocast(grad.device.type):
            return tuple(gradients(ctx, grad, x, saved, _differentiated_again(grad)))

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, base = inputs[0], inputs[i_base]
        flat = inputs
        if x.dim() != 2:
            base = None if base is None else rows(base)
            flat = (rows(x), *inputs[1:i_base], base, *inputs[i_base + 1 :])
        with below():  # a view made here counts as none: what follows may write to y
            output = op[name](*flat)
            y: Tensor = output[0] if x.dim() == 2 else unflat(output[0], x)
        setup_context(ctx, inputs, output)
        return y

    def shaped_gradients(ctx: Any, grad: Tensor, x: Tensor, saved: Sequence[Any], again: bool) -> tuple[Any, ...]:
        found = gradients(ctx, _rows_of_grad(grad, x), rows(x), saved, again)
        if x.dim() != 2:
            for i in (0, i_base):
                if found[i] is not None:
                    found[i] = unflat(found[i], x)
        return tuple(found)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors  # hooks may compute them anew, with autograd
        if _differentiated_again(grad):
            with without_autocast(grad.device.type):
                return shaped_gradients(ctx, grad, x, saved, True)
        with below():
            return shaped_gradients(ctx, grad, x, saved, False)

    torch.library.register_autograd(f"plora_ext::{name}", registered, setup_context=setup_registered)
    namespace = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{name}_function", (torch.autograd.Function,), namespace)


def run(name: str, serves: bool, *args: Any) -> Any:
    """An operator by the dispatcher's rules, or its twin where no kernel serves, or only torch's own operators do."""
    if not serves or (not is_plain(*args) and needs_twin(*args)):
        return run_twin(name, *args)
    return op[name](*args)


def run_lora(name: str, serves: bool, *args: Any) -> Tensor:
    """y [..., out] of a low-rank operator: as `run` does, but past the dispatcher's rules where nothing needs them."""
    plain = serves and is_plain(*args)
    if not plain and (not serves or needs_twin(*args)):
        by_twin: Tensor = run_twin(name, *args)
        return by_twin
    if plain:
        device_type = args[0].device.type
        if torch.is_autocast_enabled(device_type):
            args = tuple(_casters[name](device_type, args))
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return _functions[name].apply(*args)
    x, i_base = args[0], _BASE[name]
    if x.dim() != 2:
        args = (rows(x), *args[1:i_base], None if args[i_base] is None else rows(args[i_base]), *args[i_base + 1 :])
    if plain:
        with below():
            y: Tensor = op[name](*args)[0]
    else:
        y = op[name](*args)[0]
    return y if x.dim() == 2 else unflat(y, x)


def run_in_place(name: str, *args: Any) -> None:
    """An operator that writes to its first arguments, which autograd is told as of torch's own."""
    getattr(torch.ops.plora_ext, name)(*args)
    if not torch.compiler.is_compiling():
        written = args[: 2 if name == "class_sums_" else 1]
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


class _OneAdapter(torch.autograd.Function):
    """`lora_sum` of one adapter, [r, in] and [out, r], beside a frozen layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Any, bias: Any) -> Tensor:
        X, _, B, *_ = ctx.needs_input_grad
        flat = rows(x)
        with below():  # a view made here counts as none: what follows may write to y
            A = lora_A[None]
            keep = X if dense("lora_sum", A, weight, None, None, False) else B
            y, kept = op["lora_sum"](
                flat, A, lora_B[None], scaling, None, weight, bias, None, None, None, False, None, None, keep
            )
            y = y if flat is x else unflat(y, x)
        ctx.save_for_backward(x, lora_A, lora_B, scaling, weight, kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, lora_A, lora_B, scaling, weight, kept = ctx.saved_tensors  # hooks may compute them anew, with autograd
        X, A, B, *_ = ctx.needs_input_grad
        if _differentiated_again(grad):
            args = [x, lora_A[None], lora_B[None], scaling, None, weight, *[None] * 4, False, None, None, False]
            asks = [X, A, B, *[False] * 11]
            dx, dA, dB, *_ = _twin_gradients("lora_sum", args, asks, grad)
        else:
            with below():
                dx, dA, dB, *_ = op["lora_sum_backward"](
                    _rows_of_grad(grad, x), rows(x), lora_A[None], lora_B[None], scaling, weight, None, None, None,
                    kept, False, None, X | A << 1 | B << 2,
                )  # fmt: skip
                dx = unflat(dx, x) if X and x.dim() != 2 else dx
        return dx if X else None, dA[0] if A else None, dB[0] if B else None, None, None, None


def run_one(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Any, bias: Any) -> Tensor | None:
    """`lora_sum` of one adapter, [r, in] and [out, r], that trains beside its frozen layer, with few looks at them.

    None where this is not eager code on plain tensors of one dtype and device without autocast, or the widths do not
    fit, or the layer is not frozen: that is for `lora_sum` to serve or to refuse. Whatever else is wrong the kernel
    refuses.
    """
    cuda, dtype = x.is_cuda, x.dtype
    if (
        not torch.is_grad_enabled()
        or not is_plain(x, lora_A, lora_B, weight, bias)
        or torch.is_autocast_enabled("cuda" if cuda else "cpu")
        or not (_SERVES_CUDA and dtype != torch.float64 if cuda else x.is_cpu and _lib is not None)
        or not dtype == lora_A.dtype == lora_B.dtype == weight.dtype
        or not x.device == lora_A.device == lora_B.device == scaling.device == weight.device
        or not (bias is None or bias.device == x.device)
        or x.dim() == 0
        or x.size(-1) != lora_A.size(1)
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return None
    y: Tensor = _OneAdapter.apply(x, lora_A, lora_B, scaling, weight, bias)
    return y


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
    if _differentiated_again(grad):
        return tuple(_twin_gradients("subspace_logits", [*ctx.saved_tensors, False], ctx.needs_input_grad, grad))
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
    rows = d_sums[labels.clamp(min=0)].masked_fill((labels < 0)[:, None], 0)
    return rows.to(ctx.dtype), None, None


def _backward(name: str, grad: Tensor) -> Callable[..., Any]:
    """The compiled backward of the gradient's device, or else its formula."""
    compiled = f"{name}_backward"
    found: Callable[..., Any] = (
        op[compiled] if _library.has_kernel(compiled, grad.device.type) else getattr(_gradients, name)
    )
    return found


def _reconstruct_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if _differentiated_again(grad):
        args = [*ctx.saved_tensors, ctx.tau, ctx.add_old, ctx.tf32]
        return tuple(_twin_gradients("reconstruct_prototypes", args, ctx.needs_input_grad, grad))
    d_old, d_new, d_values = _backward("reconstruct_prototypes", grad)(grad, *ctx.saved_tensors, ctx.tau)
    return d_old + grad if ctx.add_old else d_old, d_new, d_values, None, None, None


def _complete_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if _differentiated_again(grad):
        args = [*ctx.saved_tensors, ctx.tau, ctx.last]
        return tuple(_twin_gradients("complete_prototypes", args, ctx.needs_input_grad, grad))
    return _backward("complete_prototypes", grad)(grad, *ctx.saved_tensors, ctx.tau, ctx.last), None, None, None


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
    arguments = _names(name)
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
        _functions[name], _casters[name] = _lora_autograd(name), _caster(name)
    register_fake("plora_ext::lora_merge", lambda weight, *rest: torch.empty_like(weight).contiguous())
    register_fake("plora_ext::class_sums", _class_sums_fake)
    register_fake("plora_ext::class_sums_", _nothing)
    register_fake("plora_ext::lora_all_out", _nothing)
    register_fake(
        "plora_ext::reconstruct_prototypes",
        lambda old, new, values, tau, add_old, tf32: old.new_empty(old.shape[0], values.shape[1]),
    )
    register_fake(
        "plora_ext::reconstruct_prototypes_backward",
        lambda grad, old, new, values, tau: tuple(t.new_empty(t.shape) for t in (old, new, values)),
    )
    register_fake("plora_ext::complete_prototypes", lambda p, task_of_class, tau, last: p.new_empty(p.shape))
    register_fake(
        "plora_ext::complete_prototypes_backward", lambda g, p, task_of_class, tau, last: p.new_empty(p.shape)
    )
    register_fake("plora_ext::subspace_logits", lambda f, p, weights, tf32: f.new_empty(len(f), len(p)))

    for name, backward, setup in (
        ("lora_merge", _merge_backward, _merge_setup),
        ("class_sums", _class_sums_backward, _class_sums_setup),
        ("reconstruct_prototypes", _reconstruct_backward, _save("tau", "add_old", "tf32")),
        ("complete_prototypes", _complete_backward, _save("tau", "last")),
        ("subspace_logits", _subspace_logits_backward, _save("tf32")),
    ):
        register_autograd(f"plora_ext::{name}", backward, setup_context=setup)

    for name in op:
        torch.library.register_vmap(f"plora_ext::{name}", _vmap(name))
        for device_type in ("cpu", "cuda"):
            _register_autocast(name, device_type)


if _lib is not None:
    _register_all()
