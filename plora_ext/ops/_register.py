"""What the compiled operators need beside their kernels: fake implementations, autograd, autocast and vmap rules.

Registered once, on import, where the compiled libraries are loaded. Backward formulas that are one or two large
products are written here in torch; the rest are operators of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state
from torch._C import _len_torch_dispatch_stack as _count_dispatch_modes
from torch._C import _len_torch_function_stack as _count_function_modes
from torch._C._functorch import peek_interpreter_stack as _peek_transforms

from plora_ext import _library
from plora_ext.ops import _gradients
from plora_ext.ops._checks import wide
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


def run_reference(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Calls a plain-torch twin with the same casts under autocast as the compiled operator has."""
    device_type = args[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return function(*args, **kwargs)
    dtype = _autocast_dtype(function.__name__, device_type)
    with torch.autocast(device_type, enabled=False):
        cast = [_cast(a, dtype) for a in args]
        return function(*cast, **{name: _cast(a, dtype) for name, a in kwargs.items()})


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
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return op[name](*cast(device_type, args))

    assert _lib is not None
    _lib.impl(name, kernel, key)


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
_PLAIN = {Tensor, nn.Parameter, type(None), bool, list}  # the types of the arguments of the low-rank operators
_ABOVE = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
for _key in ("ADInplaceOrView", "AutogradOther", "AutogradNestedTensor", "AutocastCPU", "AutocastCUDA"):
    _ABOVE |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))


def _call(name: str, args: tuple[Any, ...]) -> Any:
    return op[name](*args)


def _below(name: str, args: tuple[Any, ...]) -> Any:
    """The kernel itself, past autograd and autocast."""
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE):
        return op[name](*args)


def rows(t: Tensor) -> Tensor:
    """[M, n] of [..., n]."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def unflat(y: Tensor, x: Tensor) -> Tensor:
    """[..., out] or [T, ..., out] of rows of y, where x is [..., in]."""
    return y.view(*y.shape[:-2], *x.shape[:-1], y.shape[-1])


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

    def gradients(ctx: Any, grad: Tensor, saved: tuple[Any, ...]) -> list[Any]:
        X, *ids, A, B, s, base, W, bias, a, b, _, _, _, _, _ = ctx.needs_input_grad
        dx = dA = dB = ds = da = db = None
        if needs := X | A << 1 | B << 2 | s << 3 | a << 4 | b << 5:
            dx, dA, dB, ds, da, db = op[backward_name](grad, *saved, ctx.relu, ctx.trainable, needs)
        total = grad.sum(0) if of_all and (base or W or bias) else grad
        return [
            dx if X else None,
            *[None] * len(ids),
            dA if A else None,
            dB if B else None,
            ds if s else None,
            total if base else None,
            total.T @ saved[0] if W else None,
            total.sum(0) if bias else None,
            da if a else None,
            db if b else None,
            *[None] * 5,
        ]

    def registered(ctx: Any, grad: Tensor, of_kept: Tensor | None) -> tuple[Any, ...]:
        return tuple(gradients(ctx, grad, ctx.saved_tensors))

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, base = inputs[0], inputs[i_base]
        ctx.lead = None if x.dim() == 2 else x.shape[:-1]
        if ctx.lead is not None:
            base = None if base is None else rows(base)
            inputs = (rows(x), *inputs[1:i_base], base, *inputs[i_base + 1 :])
        with torch._C._ExcludeDispatchKeyGuard(_ABOVE):  # a view made here counts as none: what follows may write to y
            output = op[name](*inputs)
            y: Tensor = output[0] if ctx.lead is None else unflat(output[0], x)
        setup_context(ctx, inputs, output)
        return y

    def shaped_gradients(ctx: Any, grad: Tensor, saved: tuple[Any, ...]) -> tuple[Any, ...]:
        if ctx.lead is not None:
            grad = grad.reshape(*grad.shape[:of_all], len(saved[0]), grad.shape[-1])
        found = gradients(ctx, grad, saved)
        if ctx.lead is not None:
            for i in (0, i_base):
                if found[i] is not None:
                    found[i] = found[i].view(*ctx.lead, found[i].shape[-1])
        return tuple(found)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # hooks may compute them anew, with autograd
        if torch.is_grad_enabled():  # create_graph: what is registered says that there are no second gradients
            return shaped_gradients(ctx, grad, saved)
        with torch._C._ExcludeDispatchKeyGuard(_ABOVE):
            return shaped_gradients(ctx, grad, saved)

    torch.library.register_autograd(f"plora_ext::{name}", registered, setup_context=setup_registered)
    namespace = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{name}_function", (torch.autograd.Function,), namespace)


def is_plain(*args: Any) -> bool:
    """Whether this is eager code on plain tensors: nothing traces it, transforms it or looks on."""
    return (
        not torch.compiler.is_compiling()
        and _peek_transforms() is None
        and not _count_dispatch_modes()
        and not _count_function_modes()
        and _get_tracing_state() is None
        and _PLAIN.issuperset(map(type, args))
    )


def run_lora(name: str, *args: Any) -> Tensor:
    """y [..., out] of a low-rank operator: by the dispatcher's rules where something needs them, else past them."""
    plain = is_plain(*args)
    if plain:
        device_type = args[0].device.type
        if torch.is_autocast_enabled(device_type):
            args = tuple(_casters[name](device_type, args))
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _functions[name].apply(*args)
    x, base = args[0], _BASE[name]
    if x.dim() != 2:
        args = (rows(x), *args[1:base], None if args[base] is None else rows(args[base]), *args[base + 1 :])
    y: Tensor = (_below if plain else _call)(name, args)[0]
    return y if x.dim() == 2 else unflat(y, x)


class _OneAdapter(torch.autograd.Function):
    """`lora_sum` of one adapter, [r, in] and [out, r], beside a frozen layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Any, bias: Any) -> Tensor:
        X, _, B, *_ = ctx.needs_input_grad
        flat = rows(x)
        with torch._C._ExcludeDispatchKeyGuard(_ABOVE):  # a view made here counts as none: what follows may write to y
            A = lora_A[None]
            keep = X if dense("lora_sum", A, weight, None, None, False) else B
            y, kept = op["lora_sum"](
                flat, A, lora_B[None], scaling, None, weight, bias, None, None, None, False, None, None, keep
            )
            y = y if flat is x else unflat(y, x)
        ctx.lead = None if flat is x else x.shape[:-1]
        ctx.save_for_backward(flat, lora_A, lora_B, scaling, weight, kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # hooks may compute them anew, with autograd
        if torch.is_grad_enabled():  # create_graph: what is registered says that there are no second gradients
            return _OneAdapter.gradients(ctx, grad, *saved)
        with torch._C._ExcludeDispatchKeyGuard(_ABOVE):
            return _OneAdapter.gradients(ctx, grad, *saved)

    @staticmethod
    def gradients(
        ctx: Any, grad: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Tensor, kept: Tensor
    ) -> tuple[Any, ...]:
        X, A, B, *_ = ctx.needs_input_grad
        if ctx.lead is not None:
            grad = grad.reshape(len(x), grad.shape[-1])
        dx, dA, dB, *_ = op["lora_sum_backward"](
            grad,
            x,
            lora_A[None],
            lora_B[None],
            scaling,
            weight,
            None,
            None,
            None,
            kept,
            False,
            None,
            X | A << 1 | B << 2,
        )
        if X and ctx.lead is not None:
            dx = dx.view(*ctx.lead, dx.shape[-1])
        return dx if X else None, dA[0] if A else None, dB[0] if B else None, None, None, None


def run_one(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Any, bias: Any) -> Tensor | None:
    """`lora_sum` of one adapter, [r, in] and [out, r], that trains beside its frozen layer, with few looks at them.

    None where this is not eager code on plain tensors of one dtype without autocast, or the widths do not fit, or the
    layer is not frozen: that is for `lora_sum` to serve or to refuse. Whatever else is wrong the kernel refuses.
    """
    cuda, dtype = x.is_cuda, x.dtype
    if (
        not torch.is_grad_enabled()
        or not is_plain(x, lora_A, lora_B, weight, bias)
        or torch.is_autocast_enabled("cuda" if cuda else "cpu")
        or not (_SERVES_CUDA and dtype != torch.float64 if cuda else x.is_cpu and _lib is not None)
        or not dtype == lora_A.dtype == lora_B.dtype == weight.dtype
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
    d_old, d_new, d_values = _backward("reconstruct_prototypes", grad)(grad, *ctx.saved_tensors, ctx.tau)
    return d_old + grad if ctx.add_old else d_old, d_new, d_values, None, None, None


def _complete_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
