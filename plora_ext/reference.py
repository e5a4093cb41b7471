"""Plain-torch twin of every operator: the oracle of the tests, the fallback, and the fair baseline of the benchmarks.

Same names and arguments as in `plora_ext.ops`, where each operator is documented. Nothing here is compiled, every
formula is written out once, and gradients are torch's own. The functions trust their arguments; `plora_ext.ops` checks
them, and `slices`, a hint to the kernels, is not read here. Options are the operator's own keywords. Shapes:
x [..., in], lora_A [T, r, in], lora_B [T, out, r], scaling [T], ids of shape x.shape[:k].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Norms below this count as this, as in torch.nn.functional.normalize.
EPS = 1e-12


def _low_rank(
    lora_A: Tensor, lora_B: Tensor, bias_A: Tensor | None, bias_B: Tensor | None, ranks: Tensor | None,
    trainable: Sequence[int] | None,
) -> list[Tensor]:  # fmt: skip
    """The four factors with missing biases as zeros, frozen adapters detached and padding masked out."""
    T, r, _ = lora_A.shape
    bias_A = lora_A.new_zeros(T, r) if bias_A is None else bias_A
    bias_B = lora_B.new_zeros(T, lora_B.shape[1]) if bias_B is None else bias_B
    factors = [lora_A, lora_B, bias_A, bias_B]
    if trainable is not None:
        ask = torch.zeros(T, dtype=torch.bool)
        ask[list(trainable)] = True
        ask = ask.to(lora_A.device)
        factors = [torch.where(ask.view(T, *[1] * (f.dim() - 1)), f, f.detach()) for f in factors]
    if ranks is not None:
        real = torch.arange(r, device=ranks.device) < ranks[:, None]
        factors[0] = factors[0].masked_fill(~real[:, :, None], 0)
        factors[1] = factors[1].masked_fill(~real[:, None, :], 0)
        factors[2] = factors[2].masked_fill(~real, 0)
    return factors


def _scale(scaling: Tensor | None, coeff: Tensor | None, like: Tensor) -> Tensor:
    scale = like.new_ones(like.shape[0], dtype=torch.float32) if scaling is None else scaling
    return scale if coeff is None else scale * coeff


def _parts(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | None, *, coeff: Tensor | None = None,
    base: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, bias_A: Tensor | None = None,
    bias_B: Tensor | None = None, activation: str = "none", ranks: Tensor | None = None,
    trainable: Sequence[int] | None = None, slices: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, list[Tensor], Callable[[Tensor], Tensor]]:  # fmt: skip
    """y0 [..., out]; the factors A, B, a, b and the scale c s [T]; the activation."""
    y = x.new_zeros(*x.shape[:-1], lora_B.shape[1]) if weight is None else F.linear(x, weight, bias)
    if base is not None:
        y = base if weight is None else y + base
    factors = _low_rank(lora_A, lora_B, bias_A, bias_B, ranks, trainable)
    return y, [*factors, _scale(scaling, coeff, lora_A).to(x.dtype)], F.relu if activation == "relu" else lambda h: h


def lora_indexed(
    x: Tensor, ids: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | None = None, **options: Any
) -> Tensor:
    """Twin of `plora_ext.ops.lora_indexed`: every row through the adapter of its id; -1 leaves the base alone."""
    y, factors, act = _parts(x, lora_A, lora_B, scaling, **options)
    if ids.numel() == 0:
        return y.clone() if y is options.get("base") else y
    # -1 picks the last one, of zeros: what the others hold, inf and NaN too, is nothing to the base alone.
    A, B, a, b, s = (F.pad(f, (0, 0) * (f.dim() - 1) + (0, 1))[ids.reshape(-1).long()] for f in factors)
    rows = x.reshape(len(s), x.shape[:-1].numel() // len(s), x.shape[-1])
    h = act(rows @ A.transpose(1, 2) + a[:, None])
    delta = s[:, None, None] * (h @ B.transpose(1, 2) + b[:, None])
    return y + delta.reshape(y.shape)


def lora_sum(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | None = None, **options: Any) -> Tensor:
    """Twin of `plora_ext.ops.lora_sum`: one product of the concatenated factors, rank T * r."""
    y, (A, B, a, b, s), act = _parts(x, lora_A, lora_B, scaling, **options)
    T, r, in_features = A.shape
    if T == 0:
        return y.clone() if y is options.get("base") else y
    h = act(F.linear(x, A.reshape(T * r, in_features), a.reshape(T * r)))
    return y + (h * s.repeat_interleave(r)) @ B.transpose(1, 2).flatten(0, 1) + s @ b


def lora_all(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | None = None, **options: Any) -> Tensor:
    """Twin of `plora_ext.ops.lora_all`: the T outputs of the T adapters, stacked in front."""
    y, (A, B, a, b, s), act = _parts(x, lora_A, lora_B, scaling, **options)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    h = act(rows @ A.transpose(1, 2) + a[:, None])
    return y + (s[:, None, None] * (h @ B.transpose(1, 2) + b[:, None])).reshape(len(A), *y.shape)


def lora_indexed_(
    y: Tensor, x: Tensor, ids: Tensor, lora_A: Tensor, lora_B: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Twin of `plora_ext.ops.lora_indexed_`."""
    return y.copy_(lora_indexed(x, ids, lora_A, lora_B, *args, base=y, **kwargs))


def lora_sum_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Twin of `plora_ext.ops.lora_sum_`."""
    return y.copy_(lora_sum(x, lora_A, lora_B, *args, base=y, **kwargs))


def lora_all_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Twin of `plora_ext.ops.lora_all_`."""
    return y.add_(lora_all(x, lora_A, lora_B, *args, **kwargs))


def lora_merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | None = None,
    *,
    coeff: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Twin of `plora_ext.ops.lora_merge`: weight + sum_t c_t s_t B_t A_t, accumulated in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B, _, _ = _low_rank(lora_A, lora_B, None, None, ranks, None)
    s = _scale(scaling, coeff, lora_A).to(wide)
    T, r, in_features = A.shape
    B_cat = (B.to(wide) * s[:, None, None]).transpose(0, 1).reshape(weight.shape[0], T * r)
    return (weight.to(wide) + B_cat @ A.to(wide).reshape(T * r, in_features)).to(weight.dtype)


def class_sums(
    features: Tensor, labels: Tensor, num_classes: int, *, sums: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of `plora_ext.ops.class_sums`: rows added to the total of their class; label -1 is skipped."""
    wide = torch.promote_types(features.dtype, torch.float32)
    if sums is None or counts is None:
        sums = features.new_zeros(num_classes, features.shape[1], dtype=wide)
        counts = labels.new_zeros(num_classes, dtype=torch.int64)
    if num_classes == 0:
        return sums + features[:0].sum(), counts  # of which autograd knows
    counted = (labels >= 0).to(torch.int64)
    index = labels.clamp(min=0).long()
    rows = features.to(wide).masked_fill(counted[:, None] == 0, 0)
    return sums.index_add_(0, index, rows), counts.index_add_(0, index, counted)


def reconstruct_prototypes(
    old: Tensor, new: Tensor, values: Tensor, *, tau: float = 1.0, mode: str = "complement"
) -> Tensor:
    """Twin of `plora_ext.ops.reconstruct_prototypes`: softmax(cos(old, new) / tau) times the values."""
    wide = torch.promote_types(old.dtype, torch.float32)
    moved = values.to(wide) - new.to(wide) if mode == "shift" else values.to(wide)
    cos = F.normalize(old.to(wide), dim=-1, eps=EPS) @ F.normalize(new.to(wide), dim=-1, eps=EPS).T
    result = torch.softmax(cos / tau, dim=-1) @ moved
    return (old.to(wide) + result if mode == "shift" else result).to(values.dtype)


def complete_prototypes(prototypes: Tensor, task_of_class: Tensor, *, tau: float = 1.0, mode: str = "reset") -> Tensor:
    """Twin of `plora_ext.ops.complete_prototypes`: EASE's loops over pairs of tasks, each pair vectorised."""
    T = prototypes.shape[1]
    members = [(task_of_class == t).nonzero().squeeze(1) for t in range(T)]
    result = prototypes.clone()
    for i in range(T):
        for j in range(i + 1, T) if mode == "reset" else range(max(i + 1, T - 1), T):
            keys = torch.cat(members[j:])
            if len(keys) and len(members[i]):
                query, key = prototypes[members[i], i], prototypes[keys, i]
                result[members[i], j] = reconstruct_prototypes(query, key, prototypes[keys, j], tau=tau)
    return result


def own_other_weights(task_of_class: Tensor, num_tasks: int, alpha: float) -> Tensor:
    """Twin of `plora_ext.ops.own_other_weights`: 1 for a class's own subspace, alpha / (T - 1) for the others."""
    own = F.one_hot(task_of_class.long(), num_tasks).float()
    return own + (1 - own) * (alpha / max(num_tasks - 1, 1))


def subspace_logits(features: Tensor, prototypes: Tensor, weights: Tensor) -> Tensor:
    """Twin of `plora_ext.ops.subspace_logits`: one product of the normalised, weighted, flattened subspaces."""
    wide = torch.promote_types(features.dtype, torch.float32)
    f = F.normalize(features.to(wide), dim=-1, eps=EPS)
    p = F.normalize(prototypes.to(wide), dim=-1, eps=EPS) * weights.to(wide)[..., None]
    return (f.flatten(1) @ p.flatten(1).T).to(features.dtype)
