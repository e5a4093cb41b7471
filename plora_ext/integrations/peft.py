"""PEFT (https://github.com/huggingface/peft): its LoRA linear layers on this package's operators.

    from plora_ext.integrations import peft
    print(peft.patch())

Nothing else changes: models, configurations, `save_pretrained` files, `merge_adapter`, `disable_adapter`. On top of the
same results, `adapter_names` may be given in training too, so that every sample of a batch trains its own adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.integrations import _patch
from plora_ext.integrations._layers import constant, is_called_plainly, kept_on_device
from plora_ext.integrations._patch import Original, Patch, Report, instead
from plora_ext.nn.state import Checkpoints
from plora_ext.ops.autocast import autocast_dtype, cast
from plora_ext.ops.autograd import rows, side_by_side, stacked
from plora_ext.ops.lora import run_beside
from plora_ext.torch_private import has_saved_tensor_hooks, is_plain

__all__ = ["patch", "report", "unpatch"]

_LINEAR = "peft.tuners.lora.layer:Linear.forward"
_BASE = "__base__"
TESTED = "0.12", "0.21"  # the oldest and the newest version
_Pair = tuple[Tensor, Tensor, Tensor | None, Any]  # an adapter: A [r, in], B [out, r], its bias and its scale


def patch(train_mixed_batches: bool = True) -> Patch:
    """Run `peft.tuners.lora.Linear` on `plora_ext.ops.lora_sum` and `lora_indexed`, in every model there is.

    y = W x + b + sum over the active i of s_i B_i A_i x; with `adapter_names`, sample m takes the one of its name.
    Served are LoRA adapters without a variant, with any rank, bias (`lora_bias`), dropout and dtype, one active or
    several. A layer or an adapter that is not served runs PEFT's own forward: `report(model)` says which and why.

    Args:
        train_mixed_batches: accept `adapter_names` in training mode, which PEFT refuses.

    Returns:
        What was replaced and what was left; also a context manager. Patching twice changes nothing more.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: this version's functions take other arguments; nothing is patched then.

    Warns:
        UserWarning: this version was not tested, or lacks a function.
    """
    host = _patch.require("peft", 'pip install "plora_ext[integrations]"')

    def build(patch: Patch) -> None:
        patch.report.host = f"peft {host.__version__}, tested: {TESTED[0]} to {TESTED[1]}"
        _patch.check_version("peft", host.__version__, *TESTED, stacklevel=4)
        patch.replace(_LINEAR, _make_forward)
        if train_mixed_batches:
            patch.replace("peft.tuners.lora.model:LoraModel._enable_peft_forward_hooks", instead(_enable_hooks))
        patch.leave("DoRA, aLoRA and the other variants", "they compute more than B A x; PEFT's forward runs them")
        patch.leave("quantized layers, embeddings, convolutions", "they have layer classes of their own")
        patch.leave("merge and unmerge", "they run once, not in every step")
        patch.leave("torch.compile, torch.func, torch.export, tensor parallelism", "PEFT's forward is what they trace")

    return _patch.apply("peft", build)


def unpatch() -> None:
    """Put PEFT's own functions back."""
    _patch.remove("peft")


def report(model: nn.Module) -> Report:
    """Which LoRA layers of a model run on this package's operators, and which do not and why."""
    host = _patch.require("peft.tuners.lora", 'pip install "plora_ext[integrations]"')
    result = Report(type(model).__name__)
    for name, layer in model.named_modules():
        if isinstance(layer, host.LoraLayer):
            if why := _why_layer_left(host, layer, layer.lora_A):
                result.left[name] = why
            else:
                result.replaced.append(name)
    return result


def _why_layer_left(host: Any, layer: Any, adapters: Collection[str]) -> str:
    """Why PEFT's own forward has to run one of these adapters in a layer; empty if it has not."""
    if type(layer).forward is not host.Linear.forward:
        return f"a {type(layer).__name__} has a forward of its own"
    whys = {adapter: _why_left(layer, adapter) for adapter in layer.lora_A if adapter in adapters}
    return "; ".join(f"adapter {adapter!r} {why}" for adapter, why in whys.items() if why)


def _why_left(layer: Any, adapter: str) -> str:
    """Why PEFT's own forward has to run this adapter; empty if it has not."""
    if adapter in layer.__dict__.get("lora_variant", ()) or layer.use_dora.get(adapter, False):
        return "is a LoRA variant"
    A, B, dropout = (layer._modules[name]._modules[adapter] for name in ("lora_A", "lora_B", "lora_dropout"))
    if not (is_called_plainly(A) and is_called_plainly(B)):
        return "has factors that are not plain linear layers, or are hooked"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return "has a dropout of another kind"
    if not isinstance(layer.scaling[adapter], int | float):
        return "has a scale that is no number"
    return ""


_checkpoints = Checkpoints()  # those with a mixed batch, which PEFT computes again without its names


def _make_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        looks = (names is not None or _checkpoints.met) and not torch.compiler.is_compiling()
        if looks and not _checkpoints.agree(None if names is None else tuple(names)):
            raise RuntimeError(
                "activation checkpointing computes a layer again without the adapter_names of the forward pass: train "
                "a mixed batch without it"
            )
        if not args and not self.disable_adapters and (not kwargs or (names is not None and len(kwargs) == 1)):
            if names is None:
                known = self._modules["lora_A"]._modules
                y = None if self.merged else _sum(self, x, [name for name in self.active_adapters if name in known])
            else:
                self._check_forward_args(x, adapter_names=names)  # PEFT's own errors
                y = _indexed(self, x, names)
            if y is not None:
                return y
        return original(self, x, *args, **kwargs)

    return forward


def _sum(layer: Any, x: Tensor, names: Sequence[str]) -> Tensor | None:
    """These adapters summed, or None where PEFT has to."""
    pairs = _pairs(layer, x, names)
    if pairs is None:
        return None
    dropouts = [layer._modules["lora_dropout"]._modules[name] for name in names]
    drops = any([_drops(dropout) for dropout in dropouts])
    A, autocast = pairs[0][0], torch.is_autocast_enabled(x.device.type)
    if (drops and len(names) > 1) or _is_wider(x, A, autocast) or not _pays(x, pairs, autocast):
        return _plainly(layer, x, pairs, dropouts if drops else (), autocast)
    return _run(layer, x, dropouts[0](x.to(A.dtype)) if drops else x, names, pairs)


def _is_wider(x: Tensor, factor: Tensor, autocast: bool) -> bool:
    """Whether y has more bits than the factors: the operators have no dtype for that."""
    return x.dtype != factor.dtype and not autocast and torch.promote_types(x.dtype, factor.dtype) != factor.dtype


def _pays(x: Tensor, pairs: list[_Pair], autocast: bool) -> bool:
    """Whether the operator takes less time than the plain products do.

    CPU, measured on one core with 64 to 768 features and r = 16, forward and backward: in float32 from about 1024 rows
    times adapters on; in 16 bits, where torch's products have instructions of their own, from four adapters on. CUDA:
    one launch saves passes over y, worth having once the GPU, not the host, is what one waits for; training steps of
    one layer cross between 197 and 788 rows of 768 features (`benchmarks/host_time.py` measures such steps).
    """
    (A, B, *_), T = pairs[0], len(pairs)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else A.dtype
    features = A.shape[1]
    work = x.numel() // max(1, features) * T
    if x.is_cpu:
        return work >= 1024 if dtype.itemsize > 2 else T >= 4
    return work * (features + B.shape[0]) >= 1 << 20


def _plainly(layer: Any, x: Tensor, pairs: list[_Pair], dropouts: Sequence[Any], autocast: bool) -> Tensor | None:
    """PEFT's own computation, one product after the other, without the rest of what it does there."""
    dtype, base = pairs[0][0].dtype, layer._modules["base_layer"]
    z = x
    if not autocast and x.dtype != dtype:
        if not getattr(layer, "cast_input_dtype_enabled", True):
            return None
        z = x.to(dtype)
    if not _is_plain_layer(base):
        return _added(base(x), z, pairs, dropouts)
    flat = rows(x)
    y = total = F.linear(flat, base._parameters["weight"], base._parameters["bias"])
    for i, (A, B, bias, scaling) in enumerate(pairs):
        h = F.linear(rows(dropouts[i](z)) if dropouts else flat if z is x else rows(z), A)
        if bias is not None or total.dtype != h.dtype:
            total = torch.add(total, F.linear(h, B, bias), alpha=scaling)
        elif not autocast:  # which does not reach what is done in place
            total.addmm_(h, B.t(), alpha=scaling)
        else:
            total = torch.addmm(total, h, B.t(), alpha=scaling)
    if total.dtype != y.dtype:
        total = total.to(y.dtype)
    return total if x.dim() == 2 else total.reshape(*x.shape[:-1], total.shape[1])


def _added(y: Any, z: Tensor, pairs: list[_Pair], dropouts: Sequence[Any] = ()) -> Any:
    """PEFT's own sum, onto whatever the frozen layer gives."""
    total = y
    for i, (A, B, bias, scaling) in enumerate(pairs):
        total = total + F.linear(F.linear(dropouts[i](z) if dropouts else z, A), B, bias) * scaling
    return total.to(y.dtype)


def _indexed(layer: Any, x: Tensor, adapter_names: Sequence[str]) -> Tensor | None:
    """Every sample through the adapter of its name, or None where PEFT has to."""
    asked = set(adapter_names)
    names = [name for name in layer._modules["lora_A"]._modules if name in asked]
    # (A checkpoint compares what is saved: a mixed batch must not look like an active adapter.)
    if len(asked) == len(names) == 1 and not (torch.is_grad_enabled() and has_saved_tensor_hooks()):
        return _sum(layer, x, names)
    pairs = _pairs(layer, x, names)
    if pairs is None or x.dim() < 2 or _is_wider(x, pairs[0][0], torch.is_autocast_enabled(x.device.type)):
        return None
    drops = {_drops(layer.lora_dropout[name]) for name in names}
    if len(drops) > 1:  # also where PEFT added one to a model in eval mode, whose dropout it leaves in training
        return None
    if drops != {0.0}:
        return _run(layer, x, layer.lora_dropout[names[0]](x.to(pairs[0][0].dtype)), names, pairs, adapter_names)
    if _are_few(x, pairs):
        return _each(layer._modules["base_layer"](x), x, adapter_names, names, pairs)
    return _run(layer, x, x, names, pairs, adapter_names)


def _are_few(x: Tensor, pairs: list[_Pair]) -> bool:
    """Whether a mixed batch is so small that its adapters one by one take less time (CPU, float32; measured)."""
    A = pairs[0][0]
    few = x.is_cpu and len(pairs) <= 8 and x.numel() < 128 * A.shape[1]
    return few and x.dtype == A.dtype and A.dtype.itemsize > 2 and not torch.is_autocast_enabled("cpu")


def _each(y: Any, x: Tensor, adapter_names: Sequence[str], names: Sequence[str], pairs: list[_Pair]) -> Any:
    """A mixed batch, one adapter after the other, onto whatever the frozen layer gives."""
    for name, (A, B, bias, scaling) in zip(names, pairs, strict=True):
        samples = _samples_of(name, tuple(adapter_names), x.device)
        part = F.linear(F.linear(x.index_select(0, samples), A), B, bias)
        if _is_strided(y) and y.dtype == part.dtype:
            y = y.index_add(0, samples, part, alpha=scaling)
        else:  # as PEFT does it
            y[samples] += (part * scaling).to(y.dtype)
    return y


@kept_on_device
def _samples_of(name: str, adapter_names: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=device)


def _drops(dropout: nn.Module) -> float:
    """The probability by which it drops now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _pairs(layer: Any, x: Tensor, names: Sequence[str]) -> list[_Pair] | None:
    """These adapters; None if one of them is not ours to compute."""
    if not names or any([_why_left(layer, name) for name in names]):
        return None
    downs, ups, scaling = layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules, layer.scaling
    found = []
    for name in names:
        up = ups[name]._parameters
        found.append((downs[name]._parameters["weight"], up["weight"], up["bias"], scaling[name]))
    # What kind of tensors these are, before anything looks at their shapes.
    if not _is_strided(x, *[t for pair in found for t in pair[:3]]):
        return None
    A, B, dtype, device = *found[0][:2], found[0][0].dtype, x.device
    if any([t.dtype != dtype or t.device != device for pair in found for t in pair[:2]]):
        return None
    if x.dim() == 0 or x.shape[-1] != A.shape[1] or not A.numel() or not B.numel():
        return None  # PEFT's own errors, and layers without inputs or outputs
    return found


def _is_strided(*tensors: Tensor | None) -> bool:
    """Whether these are eager tensors of numbers side by side: no subclass, not sparse, nested or quantized."""
    return is_plain(*tensors) and all(
        [t is None or (t.layout is torch.strided and not t.is_nested and not t.is_quantized) for t in tensors]
    )


def _is_plain_layer(base: Any) -> bool:
    """Whether the frozen layer is its weight and bias and nothing else, so that it need not be called."""
    return is_called_plainly(base) and _is_strided(base._parameters["weight"], base._parameters["bias"])


def _run(
    layer: Any, x: Tensor, dropped: Tensor, names: Sequence[str], pairs: list[_Pair], adapter_names: Sequence[str] = ()
) -> Tensor | None:
    """The sum, or with adapter names a mixed batch, by the operators."""
    ids = (_ids(tuple(adapter_names), tuple(names), x.device),) if adapter_names else ()
    op: Callable[..., Tensor] = ops.lora_indexed if ids else ops.lora_sum
    A, dtype, base, biases = pairs[0][0], pairs[0][0].dtype, layer._modules["base_layer"], _biases(pairs)
    scales = tuple([float(scaling) for *_, scaling in pairs])
    scaling = constant(scales, torch.promote_types(dtype, torch.float32), x.device)
    # The frozen layer belongs to the product if nobody looks at it, and all is of one dtype.
    fused = dropped is x and _is_plain_layer(base)
    autocast = torch.is_autocast_enabled(x.device.type)
    if fused and biases is None and (autocast or x.dtype == dtype):
        y = _soon(x, ids, pairs, scaling, base.weight, base.bias)
        if y is not None:
            return y
    factors_A, factors_B, *_ = zip(*pairs, strict=True)
    one = len(pairs) == 1
    lora_A, lora_B = (A[None], pairs[0][1][None]) if one else side_by_side(factors_A, factors_B, len(pairs))
    keywords: dict[str, Any] = {"ranks": _ranks(pairs), "bias_B": biases}
    if fused and (autocast or x.dtype == dtype == base.weight.dtype):
        return op(x, *ids, lora_A, lora_B, scaling, weight=base.weight, bias=base.bias, **keywords)
    if not autocast and dropped.dtype != dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return None
    y = base(x)
    fits = _is_strided(y) and y.shape == (*x.shape[:-1], lora_B.shape[1]) and y.device == x.device
    z = dropped if autocast else dropped.to(dtype)
    if not fits or _is_wider(y, A, autocast):
        return _each(y, dropped.to(dtype), adapter_names, names, pairs) if ids else _added(y, z, pairs)
    return op(z, *ids, lora_A, lora_B, scaling, base=y if autocast else y.to(dtype), **keywords).to(y.dtype)


def _soon(
    x: Tensor, ids: Sequence[ops.AdapterBatch], pairs: list[_Pair], scaling: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """The short way, which costs the host least, of all in one dtype or under autocast."""
    T, trained = len(pairs), list[int]()
    if T == 1 and not ids:
        return run_beside(x, *pairs[0][:2], scaling, weight, bias)
    x = cast(x, autocast_dtype(x.device.type))
    lora_A, lora_B, _, scales = zip(*pairs, strict=True)
    if torch.is_grad_enabled():
        trained = [t for t in range(T) if lora_A[t].requires_grad or lora_B[t].requires_grad]
    stacked_A, stacked_B, made = stacked(x, lora_A, lora_B, scales, trained)
    scaling, ranks = (scaling, _ranks(pairs)) if made is None else (made, None)
    own, some = (stacked_A, stacked_B, scaling, weight, bias, ranks, None), trained if len(trained) < T else None
    if not ids:
        return run_beside(x, *own, None, some)
    y: Tensor | None = ids[0].in_order(x, stacked_A, lambda x, batch: run_beside(x, *own, batch.ids, some))
    return y


def _ranks(pairs: list[_Pair]) -> Tensor | None:
    """Of the adapters [T], where they differ."""
    own = tuple([A.shape[0] for A, *_ in pairs])
    return constant(own, torch.int64, pairs[0][0].device) if min(own) < max(own) else None


def _biases(pairs: list[_Pair]) -> Tensor | None:
    given = next((bias for _, _, bias, _ in pairs if bias is not None), None)
    if given is None:
        return None
    return torch.stack([torch.zeros_like(given) if bias is None else bias for _, _, bias, _ in pairs])


@kept_on_device
def _ids(adapter_names: tuple[str, ...], names: tuple[str, ...], device: torch.device) -> ops.AdapterBatch:
    index = {name: i for i, name in enumerate(names)}  # others, such as __base__, take the frozen layer alone
    return ops.AdapterBatch([index.get(name, -1) for name in adapter_names], len(names), device)


def _enable_hooks(original: Original, self: Any, *args: Any, **kwargs: Any) -> Any:
    names = kwargs.get("adapter_names")
    context = original(self, *args, **kwargs)
    if names is None:
        return context
    host, asked = _patch.require("peft.tuners.lora", ""), set(names) - {_BASE}
    layers = (layer for layer in self.modules() if isinstance(layer, host.LoraLayer))
    # In training only where every layer is served; PEFT refuses the others.
    training = self.training and not any(_why_layer_left(host, layer, asked) for layer in layers)
    return _names_for_one_call(self, context, training)


@contextmanager
def _names_for_one_call(model: nn.Module, context: Any, training: bool) -> Iterator[None]:
    """PEFT's context of a mixed batch, also in training."""
    if training:
        model.training = False  # the flag PEFT's refusal looks at; the layers keep their own
    try:
        context.__enter__()
    finally:
        if training:
            model.training = True
    try:
        yield
    finally:  # PEFT takes its hooks off after a call without an error alone: the next call would get these names
        context.__exit__(None, None, None)
