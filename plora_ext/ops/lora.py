"""The low-rank operators: `lora_indexed`, `lora_sum`, `lora_all`, their in-place forms, and `lora_merge`.

Weights are in PEFT's orientation, lora_A [T, r, in] and lora_B [T, out, r]; adapter t has the scale s_t (PEFT's
lora_alpha / r). With the optional biases a [T, r], b [T, out] and act = ReLU they are AdaptFormer's adapters (Chen et
al., NeurIPS 2022), which EASE, MOS and ACMap use.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from plora_ext import libraries
from plora_ext.ops import compiled, rules
from plora_ext.ops.adapter_batch import AdapterBatch
from plora_ext.ops.autocast import autocasts, cast, dtype_of, without_autocast
from plora_ext.ops.autograd import LowRank, OneAdapter, call, call_one, narrow, rows
from plora_ext.ops.checks import check, check_floating, check_integers, check_tensor, shape, wide
from plora_ext.ops.twins import run, run_twin
from plora_ext.torch_private import (
    PLAIN,
    any_autocast,
    any_requires_grad,
    below,
    forward_mode,
    is_eager,
    is_plain,
    is_unwatched,
    needs_twin,
)

_ACTIVATIONS = ("none", "relu")
_OPERANDS = ("lora_A", "lora_B", "base", "weight", "bias", "bias_A", "bias_B")
_SERVES_CPU, _SERVES_CUDA = (libraries.has_kernel("lora_sum", device_type) for device_type in ("cpu", "cuda"))
_Optional = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _prepare(
    op: str, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | None, coeff: Tensor | None,
    optional: _Optional, activation: str, ranks: Tensor | None, trainable: Sequence[int] | None,
) -> tuple[list[Tensor], Tensor | None, list[int] | None]:  # fmt: skip
    """Checks what all low-rank operators share; returns the scales s, c, ranks and trainable as kernels take them."""
    for name, matrix in (("x", x), ("lora_A", lora_A), ("lora_B", lora_B)):
        check_tensor(op, name, matrix)
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if x.dim() < 1 or lora_A.dim() != 3 or lora_B.dim() != 3:
        raise ValueError(
            f"{op}: x must be [..., in], lora_A [T, r, in] and lora_B [T, out, r], got {shape(x)}, "
            f"{shape(lora_A)} and {shape(lora_B)}"
        )
    (T, r, _), (*lead, n_in), out = lora_A.shape, x.shape, lora_B.shape[1]
    device, dtype = x.device, x.dtype
    shapes = ((T, r, n_in), (T, out, r), (*lead, out), (out, n_in), (out,), (T, r), (T, out))
    for name, t, expected in zip(_OPERANDS, (lora_A, lora_B, *optional), shapes, strict=True):
        fits = t is None or (isinstance(t, Tensor) and t.shape == expected and t.dtype == dtype and t.device == device)
        if t is not None and not fits:
            check(op, name, t, expected, x, None if autocasts(device.type) else dtype)
    if optional[2] is not None and optional[1] is None:
        raise ValueError(f"{op}: bias belongs to the frozen layer and needs weight; an adapter's own bias is bias_B")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {_ACTIVATIONS}, got {activation!r}")
    chosen = None if trainable is None else _numbers(op, trainable)
    if chosen is not None and any(not 0 <= t < T for t in chosen):
        raise IndexError(f"{op}: trainable must hold adapters between 0 and {T - 1}, got {chosen}")
    kept = wide(dtype)
    scales = []
    for name, given in (("scaling", scaling), ("coeff", coeff)):
        if given is not None:
            if not isinstance(given, Tensor) or given.shape != (T,) or given.device != device:
                check(op, name, given, (T,), x, None)
            if given.is_complex():
                raise TypeError(f"{op}: {name} must be real, got {given.dtype}")
            scales.append(given.to(kept))
    if ranks is not None:
        check_integers(op, "ranks", ranks)
        check(op, "ranks", ranks, (T,), x, None)
        ranks = ranks.to(torch.int64)
    return scales or [x.new_ones(T, dtype=kept)], ranks, chosen


def _product(scales: Sequence[Tensor]) -> Tensor:
    return scales[0] if len(scales) == 1 else scales[0] * scales[1]


def _numbers(op: str, trainable: Any) -> list[int]:
    """The adapters that train as plain numbers: an iterator can be read once, and in a mask True would be 1."""
    try:
        listed = [t if type(t) is int else t.item() if hasattr(t, "item") else t for t in trainable]
    except TypeError:  # no sequence
        listed = [trainable, None]
    if any(type(t) is not int for t in listed):
        raise TypeError(f"{op}: trainable must hold the numbers of adapters, got {trainable!r:.60}")
    return listed


def _flat(op: str, slices: Sequence[tuple[int, int]], r: int, out: int) -> list[int]:
    """The row ranges one after another, as the kernels take them."""
    slices = list(slices)
    if not slices or r % len(slices):
        raise ValueError(f"{op}: slices must be as many as divide the rank {r} into equal blocks, got {len(slices)}")
    for start, stop in slices:
        if not 0 <= start < stop <= out:
            raise ValueError(f"{op}: slices must be rows within [0, {out}), got ({start}, {stop})")
    return [row for pair in slices for row in pair]


def _native(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether the compiled operator takes such an x; CUDA's low-rank kernels know no float64."""
    return libraries.has_kernel(op, device_type) and not (dtype == torch.float64 and device_type == "cuda")


def _ids(op: str, ids: Any, x: Tensor, T: int) -> Tensor:
    if isinstance(ids, AdapterBatch):
        if ids.num_adapters > T:  # a GPU's kernels would read beyond the factors
            raise IndexError(f"{op}: ids were checked for {ids.num_adapters} adapters, lora_A holds {T}")
        ids = ids.ids
    check_integers(op, "ids", ids)
    if not 1 <= ids.dim() < x.dim() or ids.shape != x.shape[: ids.dim()]:
        raise ValueError(
            f"{op}: ids must have the shape of the first dimensions of x, such as {shape(x)[:1]} (one id per sample) "
            f"or {shape(x)[:-1]} (one per row), got {shape(ids)}"
        )
    if ids.device != x.device:
        raise ValueError(f"{op}: ids must be on {x.device}, as x, got {ids.device}")
    numbers: Tensor = ids.to(torch.int64)
    return numbers


def _run(
    op: str, x: Tensor, ids: Tensor | AdapterBatch | None, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | None,
    coeff: Tensor | None, optional: _Optional, activation: str, ranks: Tensor | None,
    trainable: Sequence[int] | None, slices: Sequence[tuple[int, int]] | None,
) -> Tensor:  # fmt: skip
    """The operator `op` of one family, by its kernel or its twin."""
    scales, ranks, chosen = _prepare(op, x, lora_A, lora_B, scaling, coeff, optional, activation, ranks, trainable)
    ids = _ids(op, ids, x, lora_A.shape[0]).reshape(-1) if op == "lora_indexed" else None
    flat = None if slices is None else _flat(op, slices, lora_A.shape[1], lora_B.shape[1])
    device_type, native = x.device.type, _native(op, x.device.type, x.dtype)
    types = map(type, (x, ids, lora_A, lora_B, *scales, *optional, ranks))
    plain = native and is_eager() and PLAIN.issuperset(types)
    times: tuple[Tensor, ...] = ()
    if plain and len(scales) == 2 and not scales[0].requires_grad:  # the kernels multiply them
        times = (scales.pop(0),)
    scale, family = _product(scales), "lora_weighted" if times else op
    _, weight, _, bias_A, bias_B = optional
    relu, records = activation == "relu", torch.is_grad_enabled()
    keep = records and rules.keeps(op, x.requires_grad, lora_A, lora_B, scale, weight, bias_A, bias_B, relu)
    options = (ranks, relu, chosen, flat, keep, *times)
    args: Sequence[Any] = (x, ids, lora_A, lora_B, scale, *optional)
    if not plain:
        if native and not needs_twin(*args):
            if torch.jit.is_tracing():  # one graph, whether or not it will record gradients
                options = (*options[:-1], False)
            return call(compiled.op[op], options, *args)[0]
        return call(lambda *rows: (run_twin(op, *rows), None), options, *args)[0]
    if torch.is_autocast_enabled(device_type):
        dtype = dtype_of(op, device_type)
        args = tuple(a if a is scale else cast(a, dtype) for a in args)
    if records and any_requires_grad(*args):
        y: Tensor = LowRank.apply(family, options, *args)
        return y
    with below():
        return call(compiled.eager_op[family], options, *args)[0]


def run_beside(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Any, bias: Any, ranks: Tensor | None = None,
    slices: Sequence[tuple[int, int]] | None = None, ids: Tensor | None = None,
    trainable: Sequence[int] | None = None, times: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """`lora_sum`, or with ids `lora_indexed`, beside a frozen layer, with few looks at its arguments.

    Of one adapter the factors are [r, in] and [out, r], of several they are `stacked`, in the dtype of x. times: what
    the scales of a sum are multiplied with, which gets no gradient.

    None where this is not eager code on plain tensors of one device and, autocast's casts made, one dtype (but for
    float32 factors beside an x of 16 bits, which are narrowed), or the widths do not fit, or the layer trains: that is
    for the operator to serve or to refuse. Whatever else is wrong the kernel refuses. Not for code that is compiled.
    """
    cuda, device = x.is_cuda, x.device
    if (
        not (_SERVES_CUDA and x.dtype != torch.float64 if cuda else _SERVES_CPU and x.is_cpu)
        or not is_unwatched()
        or not (type(x) in PLAIN and type(lora_A) in PLAIN and type(lora_B) in PLAIN)
        or not device == lora_A.device == lora_B.device == scaling.device == weight.device  # which may be "meta"
        or (bias is not None and bias.device != device)
    ):
        return None
    asks, up, records = x.requires_grad, lora_B.requires_grad, torch.is_grad_enabled()
    if records and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    if any_autocast() and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        x, weight, bias = cast(x, dtype), cast(weight, dtype), cast(bias, dtype)
    try:
        if lora_A.dim() == 2:
            if not (records and (asks or up or lora_A.requires_grad)):
                return call_one(x, lora_A, lora_B, scaling, weight, bias, False)[0]
            keep = asks if asks != up and rules.dense("lora_sum", 1, lora_A.size(0), True) else up
            y: Tensor = OneAdapter.apply(x, lora_A, lora_B, (scaling, weight, bias, keep))
            return y
        op = "lora_sum" if ids is None else "lora_indexed"
        family, others = (op, ()) if times is None else ("lora_weighted", (times,))
        flat = None if slices is None else list(chain(*slices))
        args = ids, lora_A, lora_B, scaling, None, weight, bias
        if records and (asks or up or lora_A.requires_grad):
            keep = rules.keeps(op, asks, lora_A, lora_B, scaling, weight, None, None, False)
            y = LowRank.apply(family, (ranks, False, trainable, flat, keep, *others), x, *args, None, None)
            return y
        with below():
            options = (ranks, False, None, flat, False, *others)
            return call(compiled.eager_op[family], options, x, *args, None, None)[0]
    except RuntimeError:  # of the kernel, which sees more than could be asked here for the same price
        dtypes = {x.dtype, narrow(lora_A, x.dtype).dtype, narrow(lora_B, x.dtype).dtype, weight.dtype}
        if len(dtypes) == 1 and scaling.dtype == wide(x.dtype) and x.shape[-1:] == lora_A.shape[-1:]:
            raise
        return None


def _run_in_place(
    op: str, y: Tensor, x: Tensor, ids: Tensor | AdapterBatch | None, lora_A: Tensor, lora_B: Tensor,
    scaling: Tensor | None, coeff: Tensor | None, biases: tuple[Tensor | None, Tensor | None], activation: str,
    ranks: Tensor | None, trainable: Sequence[int] | None,
) -> Tensor:  # fmt: skip
    """y += the low-rank part: by the kernel where nothing needs a gradient, else by torch's own addition."""
    optional = (None, None, None, *biases)
    scales, ranks, chosen = _prepare(op, x, lora_A, lora_B, scaling, coeff, optional, activation, ranks, trainable)
    scale = _product(scales)
    front = (_ids(op, ids, x, lora_A.shape[0]).reshape(-1),) if op == "lora_indexed_" else ()
    slabs = lora_A.shape[:1] if op == "lora_all_" else ()
    check(op, "y", y, (*slabs, *x.shape[:-1], lora_B.shape[1]), x, None)
    target = _writable(op, y, x, (y, x, lora_A, lora_B, scale, *biases))
    if target is None:
        family = op.removesuffix("_")
        return y.add_(_run(family, x, ids, lora_A, lora_B, scale, None, optional, activation, ranks, chosen, None))
    compiled.run_in_place(op, target, rows(x), *front, lora_A, lora_B, scale, *biases, ranks, activation == "relu")
    return y


def _writable(op: str, y: Tensor, x: Tensor, asks: Sequence[Tensor | None]) -> Tensor | None:
    """y as rows where the kernel can write in place; None where torch must (gradients, odd strides, autocast)."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in asks):
        return None
    if y.dtype != x.dtype or autocasts(x.device.type) or y.stride(-1) != 1:
        return None
    native = _native(op, x.device.type, x.dtype)
    if not native or not (is_plain(y, *asks) or torch.compiler.is_compiling()) or forward_mode(*asks):
        return None
    try:
        return y.view(*(y.shape[:1] if op == "lora_all_" else ()), -1, y.shape[-1])
    except RuntimeError:  # rows that no single stride reaches
        return None


def lora_indexed(
    x: Tensor,
    ids: Tensor | AdapterBatch,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | None = None,
    *,
    base: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    activation: str = "none",
    ranks: Tensor | None = None,
    trainable: Sequence[int] | None = None,
    slices: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Every row (or sample) through an adapter of its own.

    With t = ids[m]: y[m] = y0[m] + s_t (act(x[m] A_t^T + a_t) B_t^T + b_t), and y[m] = y0[m] where ids[m] is -1, where
    y0 = base + x W^T + bias, each part if given.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        ids: integers of the shape x.shape[:k] for some k >= 1: [B] for x [B, N, in] selects by sample, [B, N] by row.
            An `AdapterBatch` was checked where it was made, for at most T adapters, and if it has many samples in any
            order a GPU gets them sorted; a plain tensor on a GPU must hold valid ids.
        lora_A: [T, r, in].
        lora_B: [T, out, r].
        scaling: [T], the scales s; ones if not given. Kept in float32 (float64 with float64).
        base: [..., out], a given y to add to.
        weight: [out, in], the frozen layer's weight.
        bias: [out], the frozen layer's bias.
        bias_A: [T, r], the bias of the down projection.
        bias_B: [T, out], the bias of the up projection.
        activation: "none" or "relu", between the projections.
        ranks: [T] integers where adapters have fewer ranks than r; what lies beyond is ignored and gets no gradient.
        trainable: the adapters whose factors and biases get gradients; all that require them if not given.
        slices: row ranges (start, stop) of y, for speed alone: the promise that the rank is as many equal blocks and
            that B_t is zero outside of rows start to stop in the columns of a block, so that the sum over the ranks,
            y[m, o] = y0[m, o] + s_t sum_j h[m, j] B_t[o, j], may leave out the blocks that do not reach row o. The
            gradients are those of all of B_t, without the promise.

    Returns:
        y [..., out]. Differentiable in everything but ids and ranks.

    Raises:
        ValueError: shapes, devices, activation or slices do not fit, or there is a bias and no weight.
        TypeError: dtypes do not fit, or something is no tensor, or in trainable no number.
        IndexError: an `AdapterBatch` is of more adapters, or trainable is out of range.
        RuntimeError: an id or a rank is out of range (on the CPU; a GPU's kernels do not look).

    Source: Punica's SGMV (Chen et al., MLSys 2024; punica/ops), PEFT's mixed batches (`_mixed_batch_forward`).
    """
    frozen = base, weight, bias, bias_A, bias_B

    def run(x: Tensor, ids: Tensor | AdapterBatch) -> Tensor:
        return _run("lora_indexed", x, ids, lora_A, lora_B, scaling, None, frozen, activation, ranks, trainable, slices)

    if isinstance(ids, AdapterBatch) and base is None and is_eager():
        y: Tensor = ids.in_order(x, lora_A, run)
        return y
    return run(x, ids)


def lora_sum(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | None = None,
    *,
    coeff: Tensor | None = None,
    base: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    activation: str = "none",
    ranks: Tensor | None = None,
    trainable: Sequence[int] | None = None,
    slices: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """All adapters on every row, weighted and summed: LoRA fusion.

    y = y0 + sum_t c_t s_t (act(x A_t^T + a_t) B_t^T + b_t) with y0 = base + x W^T + bias, each part if given.

    Args:
        coeff: [T], the weights c; ones if not given. They may require gradients, like everything else.
        x, lora_A, lora_B, scaling, base, weight, bias, bias_A, bias_B, activation, ranks, trainable, slices: as
            in `lora_indexed`. The newest adapter alone is trained with trainable=[T - 1].

    Returns:
        y [..., out].

    Raises:
        The errors of `lora_indexed`.

    Source: the exact fusion of InfLoRA (Liang and Li, CVPR 2024; `models/vit_inflora.py`) and SD-LoRA (Wu et al., ICLR
    2025; `backbone/lora.py`), as one product of the concatenated factors.
    """
    return _run(
        "lora_sum", x, None, lora_A, lora_B, scaling, coeff, (base, weight, bias, bias_A, bias_B), activation, ranks,
        trainable, slices,
    )  # fmt: skip


def lora_all(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | None = None,
    *,
    base: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    activation: str = "none",
    ranks: Tensor | None = None,
    trainable: Sequence[int] | None = None,
    slices: Sequence[tuple[int, int]] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Every adapter on every row, each with an output of its own: the first adapted layer of an ensemble.

    y_t = y0 + s_t (act(x A_t^T + a_t) B_t^T + b_t) for every t, with y0 = base + x W^T + bias, each part if given,
    shared by all t.

    Args:
        x, lora_A, lora_B, scaling, base, weight, bias, bias_A, bias_B, activation, ranks, trainable, slices: as
            in `lora_indexed`.
        out: [T, ..., out], a tensor of x's dtype that takes the result: T times the rows of x are much memory to ask
            for anew. Records no gradients.

    Returns:
        y [T, ..., out], or `out`.

    Raises:
        The errors of `lora_indexed`. ValueError: out= where gradients are recorded.

    Source: the T forward passes of EASE (Zhou et al., CVPR 2024; `backbone/vit_ease.py:forward_test`).
    """
    op, optional = "lora_all", (base, weight, bias, bias_A, bias_B)
    if out is not None:
        (scale,), ranks, trainable = _prepare(
            op, x, lora_A, lora_B, scaling, None, optional, activation, ranks, trainable
        )
        check(op, "out", out, (lora_A.shape[0], *x.shape[:-1], lora_B.shape[1]), x, x.dtype)
        inputs = (x, lora_A, lora_B, scale, *optional, out)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            raise ValueError(f"{op}: out= records no gradients; leave it out, or call this under torch.no_grad()")
        native = libraries.has_kernel("lora_all_out", x.device.type) and is_plain(*inputs)
        if native and out.is_contiguous() and not autocasts(x.device.type):
            base = None if base is None else rows(base)
            flat = rows(x)
            slabs = out.view(out.shape[0], flat.shape[0], out.shape[-1])
            rest = (scale, base, *optional[1:], ranks, activation == "relu")
            compiled.run_in_place("lora_all_out", slabs, flat, lora_A, lora_B, *rest)
            return out
    y = _run(op, x, None, lora_A, lora_B, scaling, None, optional, activation, ranks, trainable, slices)
    return y if out is None else out.copy_(y)


def lora_indexed_(
    y: Tensor,
    x: Tensor,
    ids: Tensor | AdapterBatch,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | None = None,
    *,
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    activation: str = "none",
    ranks: Tensor | None = None,
    trainable: Sequence[int] | None = None,
) -> Tensor:
    """`lora_indexed` added to y in place: y += the low-rank part. y [..., out] may be a slice of a wider tensor.

    Where something requires gradients the sum is torch's own in-place addition, so that autograd sees it. Arguments
    and errors as in `lora_indexed`. Returns y.
    """
    return _run_in_place(
        "lora_indexed_", y, x, ids, lora_A, lora_B, scaling, None, (bias_A, bias_B), activation, ranks, trainable
    )


def lora_sum_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | None = None,
    *,
    coeff: Tensor | None = None,
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    activation: str = "none",
    ranks: Tensor | None = None,
    trainable: Sequence[int] | None = None,
) -> Tensor:
    """`lora_sum` added to y in place: y += the low-rank part. y [..., out] may be a slice of a wider tensor.

    Where something requires gradients the sum is torch's own in-place addition, so that autograd sees it. Arguments
    and errors as in `lora_sum`. Returns y.
    """
    return _run_in_place(
        "lora_sum_", y, x, None, lora_A, lora_B, scaling, coeff, (bias_A, bias_B), activation, ranks, trainable
    )


def lora_all_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | None = None,
    *,
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    activation: str = "none",
    ranks: Tensor | None = None,
    trainable: Sequence[int] | None = None,
) -> Tensor:
    """`lora_all` added to y in place: y[t] += the low-rank part of adapter t, y [T, ..., out].

    Where something requires gradients the sum is torch's own in-place addition, so that autograd sees it. Arguments
    and errors as in `lora_all`. Returns y.
    """
    return _run_in_place(
        "lora_all_", y, x, None, lora_A, lora_B, scaling, None, (bias_A, bias_B), activation, ranks, trainable
    )


def lora_merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | None = None,
    *,
    coeff: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """The weight with the adapters folded in: weight + sum_t c_t s_t B_t A_t, for shared weights that no longer train.

    Summed in float32 (float64 with float64) and rounded once to the weight's dtype.

    Args:
        weight: [out, in], float32, bfloat16, float16 or float64.
        lora_A: [T, r, in], of the weight's dtype.
        lora_B: [T, out, r], of the weight's dtype.
        scaling: [T], the scales s; ones if not given.
        coeff: [T], the weights c; ones if not given.
        ranks: [T] integers where adapters have fewer ranks than r.

    Returns:
        The merged weight [out, in], a new tensor. Differentiable in everything but ranks.

    Raises:
        ValueError: shapes or devices do not fit. TypeError: dtypes do not fit. RuntimeError: on the CPU, a rank outside
            [0, r].

    Source: `merge` of Hu et al., LoRA (ICLR 2022; loralib `Linear.train`), for a weighted sum of adapters.
    """
    op = "lora_merge"
    check_floating(op, "weight", weight, "out, in")
    if lora_B.dim() == 3 and lora_B.shape[1] != weight.shape[0]:
        raise ValueError(f"{op}: lora_B must be [T, {weight.shape[0]}, r] for this weight, got {shape(lora_B)}")
    with without_autocast(weight.device.type):  # weights are merged in their own dtype
        scales, ranks, _ = _prepare(op, weight, lora_A, lora_B, scaling, coeff, (None,) * 5, "none", ranks, None)
        serves = libraries.has_kernel(op, weight.device.type)
        merged: Tensor = run(op, serves, weight, lora_A, lora_B, _product(scales), ranks)
        return merged
