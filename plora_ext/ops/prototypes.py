"""The prototype operators: class sums, reconstruction through semantic relations, completion, the ensemble's head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plora_ext import libraries, reference
from plora_ext.ops.autocast import autocasts
from plora_ext.ops.checks import check, check_floating, check_integers, check_range, shape, wide
from plora_ext.ops.compiled import run_in_place
from plora_ext.ops.twins import run

# Below this tau a sum of exp((cos - 1) / tau) may vanish in float32; CUDA's kernels then shift by the largest cosine.
_COLD = 0.025


def _native(op: str, t: Tensor, tau: float = 1) -> bool:
    """Whether the compiled operator takes this; CUDA's know no float64, the CPU's no tau below _COLD."""
    if t.is_cuda:
        return libraries.has_kernel(op, "cuda") and t.dtype != torch.float64
    return libraries.has_kernel(op, t.device.type) and tau >= _COLD


def _check_tau(op: str, tau: float, dtype: torch.dtype) -> None:
    """Raises a ValueError where 1 / tau is no positive number of the precision that is computed in."""
    if not tau > 0:
        raise ValueError(f"{op}: tau must be positive, got {tau}")
    least = 1 / torch.finfo(torch.promote_types(dtype, torch.float32)).max
    if tau < least:
        raise ValueError(f"{op}: tau must be at least {least:.3g}, or 1 / tau is infinite for {dtype}, got {tau}")


def _tf32(t: Tensor) -> bool:
    """Whether torch's own products of float32 matrices may use TF32 there (set_float32_matmul_precision and others)."""
    switch: Any = torch.backends.cuda.matmul
    if not t.is_cuda:
        return False
    # Tracing knows and guards the old switch alone; the new one can be read whichever of them was set.
    return bool(switch.allow_tf32) if torch.compiler.is_compiling() else bool(switch.fp32_precision == "tf32")


def class_sums(
    features: Tensor, labels: Tensor, num_classes: int, *, sums: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum and number of the rows of every class: sums_c = sum over n with y_n = c of f_n; prototypes are sums / counts.

    Deterministic: each class's rows are added one after another in their order, in float32 (float64 with float64), so
    a running total over batches has the bits of one call over all of them, on the CPU and on any GPU.

    Args:
        features: [N, D], float32, bfloat16, float16 or float64.
        labels: [N] integers; -1 skips a row.
        num_classes: C.
        sums: [C, D] float32 (float64 with float64), a running total, updated in place; zeros if not given.
        counts: [C] int64, the running number of rows, updated in place; given together with sums.

    Returns:
        sums [C, D], counts [C]. The sums are differentiable in features unless running totals are given.

    Raises:
        ValueError: shapes, devices or num_classes do not fit, or one of sums and counts is missing. TypeError: dtypes
            do not fit, or a running total is not contiguous. RuntimeError: on the CPU, a label outside [-1, C); on a
            GPU it stops the kernel, as torch's own indexing does.

    Source: the class means of SimpleCIL (Zhou et al., IJCV 2024; LAMDA-PILOT `models/simplecil.py:replace_fc`).
    """
    op = "class_sums"
    check_floating(op, "features", features, "N, D")
    check_integers(op, "labels", labels)
    check(op, "labels", labels, (features.shape[0],), features, None)
    if isinstance(num_classes, float | str | None):
        raise TypeError(f"{op}: num_classes must be an integer, got {num_classes!r}")
    if num_classes < 0:
        raise ValueError(f"{op}: num_classes must not be negative, got {num_classes}")
    if (sums is None) != (counts is None):
        raise ValueError(f"{op}: sums and counts are one running total: give both or neither")
    labels = labels.to(torch.int64)
    if sums is None or counts is None:
        made: tuple[Tensor, Tensor] = run(
            op, libraries.has_kernel(op, features.device.type), features, labels, num_classes
        )
        return made
    for name, total, expected, dtype in (
        ("sums", sums, (num_classes, features.shape[1]), wide(features.dtype)),
        ("counts", counts, (num_classes,), torch.int64),
    ):
        check(op, name, total, expected, features, None)
        if total.dtype != dtype or not total.is_contiguous():
            raise TypeError(f"{op}: {name} must be contiguous {dtype}, got {total.dtype}, strides {total.stride()}")
    with torch.no_grad():
        if libraries.has_kernel("class_sums_", features.device.type):
            run_in_place("class_sums_", sums, counts, features, labels)
        else:
            check_range(op, "labels", labels, -1, num_classes - 1)
            reference.class_sums(features, labels, num_classes, sums=sums, counts=counts)
    return sums, counts


def reconstruct_prototypes(
    old: Tensor, new: Tensor, values: Tensor, *, tau: float = 1.0, mode: str = "complement"
) -> Tensor:
    """Old class prototypes in a new feature space, from their semantic relations to the new classes.

    With P = softmax over k of cos(old_c, new_k) / tau:
        complement: result_c = sum_k P_ck values_k
        shift:      result_c = old_c + sum_k P_ck (values_k - new_k)
    A row of zeros has cosine 0 with all others. The Co x Cn matrix P is never held in memory by the compiled operator.
    On CUDA, products are in float32, or in TF32 where torch's own are (`torch.set_float32_matmul_precision`).

    Args:
        old: [Co, D], prototypes of the old classes in the old space.
        new: [Cn, D], prototypes of the new classes in the old space.
        values: [Cn, Dv], prototypes of the new classes in the new space (Dv = D for `shift`).
        tau: temperature, positive; EASE uses 1.
        mode: "complement" or "shift".

    Returns:
        [Co, Dv], of the inputs' dtype. Differentiable in old, new and values.

    Raises:
        ValueError: shapes, devices, tau or mode do not fit, or new is empty. TypeError: dtypes do not fit.

    Source: complement is the semantic-guided prototype complement of EASE (Zhou et al., CVPR 2024;
    `models/ease.py:solve_similarity`); shift moves prototypes as SDC does samples (Yu et al., CVPR 2020).
    """
    op = "reconstruct_prototypes"
    if mode not in ("complement", "shift"):
        raise ValueError(f"{op}: mode must be 'complement' or 'shift', got {mode!r}")
    check_floating(op, "old", old, "Co, D")
    _check_tau(op, tau, old.dtype)
    D = old.shape[1]
    dtype = None if autocasts(old.device.type) else old.dtype
    check(op, "new", new, ("Cn", D), old, dtype)
    check(op, "values", values, (new.shape[0], D if mode == "shift" else "Dv"), old, dtype)
    if new.shape[0] == 0 and old.shape[0] > 0:
        raise ValueError(f"{op}: new must hold at least one class to reconstruct from, got {shape(new)}")
    shift = mode == "shift"
    moved = values - new if shift else values
    made: Tensor = run(op, _native(op, old, tau), old, new, moved, tau, shift, _tf32(old))
    return made


def complete_prototypes(prototypes: Tensor, task_of_class: Tensor, *, tau: float = 1.0, mode: str = "reset") -> Tensor:
    """Fills every block of prototypes that was never seen: classes of task i in a later subspace j > i.

    prototypes[c, j] = sum_k P_ck prototypes[k, j] with P = softmax over k of cos(prototypes[c, i], prototypes[k, i]) /
    tau, for c of task i and k of the tasks j, j + 1, ... All pairs (i, j) read real prototypes only, so they are one
    launch. `last` fills the newest subspace alone, from the newest task's classes.

    Args:
        prototypes: [C, T, D]; entry [c, j] is class c in subspace j, real for j <= task_of_class[c].
        task_of_class: [C] integers in [0, T), in any order, tasks of any size.
        tau: temperature, positive.
        mode: "reset" (EASE's solve_sim_reset, the default there too) or "last" (EASE's solve_similarity).

    Returns:
        [C, T, D], a new tensor. Differentiable in prototypes.

    Raises:
        ValueError: shapes, devices, tau or mode do not fit. TypeError: dtypes do not fit. RuntimeError: on the CPU, a
            task outside [0, T); on a GPU it stops the kernel, as torch's own indexing does.

    Source: EASE (Zhou et al., CVPR 2024; LAMDA-PILOT `models/ease.py`).
    """
    op = "complete_prototypes"
    if mode not in ("reset", "last"):
        raise ValueError(f"{op}: mode must be 'reset' or 'last', got {mode!r}")
    check_floating(op, "prototypes", prototypes, "C, T, D")
    check_integers(op, "task_of_class", task_of_class)
    check(op, "task_of_class", task_of_class, (prototypes.shape[0],), prototypes, None)
    _check_tau(op, tau, prototypes.dtype)
    task_of_class = task_of_class.to(torch.int64)
    made: Tensor = run(op, _native(op, prototypes, tau), prototypes, task_of_class, tau, mode == "last")
    return made


def own_other_weights(task_of_class: Tensor, num_tasks: int, alpha: float) -> Tensor:
    """The weights of EASE's head: 1 for a class's own subspace, alpha / (T - 1) for every other.

    Args:
        task_of_class: [C] integers in [0, T).
        num_tasks: T.
        alpha: weight of all other subspaces together.

    Returns:
        [C, T] float32, for `subspace_logits`.

    Raises:
        TypeError: task_of_class is not of integers. RuntimeError: a task is outside [0, T).

    Source: EASE (`backbone/linears.py:EaseCosineLinear.forward_reweight`, where T - 1 is `_cur_task`).
    """
    check_integers("own_other_weights", "task_of_class", task_of_class)
    check_range("own_other_weights", "task_of_class", task_of_class, 0, num_tasks - 1)
    return reference.own_other_weights(task_of_class, num_tasks, alpha)


def subspace_logits(features: Tensor, prototypes: Tensor, weights: Tensor) -> Tensor:
    """Reweighted cosine logits over all subspaces: logits_bc = sum_t w_ct cos(features_bt, prototypes_ct).

    One product of the normalised, weighted and flattened subspaces instead of T^2 small ones; on CUDA in float32, or in
    TF32 where torch's own products are.

    Args:
        features: [B, T, D], float32, bfloat16, float16 or float64.
        prototypes: [C, T, D].
        weights: [C, T], from `own_other_weights` or one's own; kept in float32 (float64 with float64).

    Returns:
        [B, C], of the features' dtype. Differentiable in all three.

    Raises:
        ValueError: shapes or devices do not fit. TypeError: dtypes do not fit.

    Source: EASE (`backbone/linears.py:EaseCosineLinear.forward_reweight`).
    """
    op = "subspace_logits"
    check_floating(op, "features", features, "B, T, D")
    dtype = None if autocasts(features.device.type) else features.dtype
    check(op, "prototypes", prototypes, ("C", *features.shape[1:]), features, dtype)
    check(op, "weights", weights, (prototypes.shape[0], features.shape[1]), features, None)
    weights = weights.to(wide(features.dtype))
    made: Tensor = run(op, _native(op, features), features, prototypes, weights, _tf32(features))
    return made
