"""Old prototypes in a feature space that has moved.

After task t the fused model has changed, and no image of an old class is left to compute its mean again. The images of
task t pass through the model before (`before`, F [n, D]) and after (`after`, F' [n, D]) the change; together with the
prototypes of the new classes in both spaces (p_k and p'_k, their class means) this is what is known of the drift. With
P_ck = softmax_k(cos(p_c, p_k) / tau), an old prototype p_c becomes

    none        p_c
    complement  sum_k P_ck p'_k                          (EASE: new classes stand in for the old one)
    shift       p_c + sum_k P_ck (p'_k - p_k)            (the drift of similar new classes)
    sdc         p_c + sum_j P_cj (F'_j - F_j)            (the same over images j; after SDC, CVPR 2020)
    ridge       p_c (I + R)                              (R: the linear drift that explains F' - F best)
    semantic    p_c (I + R) + sum_k P_ck (p'_k - p_k (I + R))

The last, the default, applies the linear drift first and then what it leaves unexplained of the new classes' own drift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plora_ext import ops
from plora_ext.cil.distributed import SINGLE, World

ALIGNMENTS = ("none", "complement", "shift", "sdc", "ridge", "semantic")


def class_means(features: Tensor, labels: Tensor, num_classes: int, world: World = SINGLE) -> Tensor:
    """Mean feature of each class, its prototype: features [n, D], labels [n] in 0 ... num_classes - 1; float32 [C, D].

    Args:
        world: Processes that have n rows each; the means are over all of them.

    Raises:
        ValueError: A class without a feature.
    """
    sums, counts = world.sum_(*ops.class_sums(features, labels, num_classes))
    if not bool(counts.all()):
        raise ValueError(f"every class needs a feature, got none for class {int((counts == 0).nonzero()[0])}")
    return sums / counts[:, None]


def drift_map(before: Tensor, after: Tensor, ridge: float) -> Tensor:
    """R [D, D], float64: argmin over R of |F R - (F' - F)|^2 + l |R|^2, with l = ridge * mean(diag(F'F))."""
    before, after = before.double(), after.double()
    gram = before.T @ before
    return solve_ridge(gram, before.T @ (after - before), ridge * gram.diagonal().mean())


def solve_ridge(gram: Tensor, right: Tensor, ridge: Tensor) -> Tensor:
    """(gram + ridge I)^-1 right in float64, by Cholesky; `gram` symmetric, changed in place.

    Without a ridge, when fewer images than features leave no sound Cholesky factor, the solution of least norm.
    """
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed or ridge == 0:
        return torch.linalg.pinv(gram, hermitian=True) @ right
    return torch.cholesky_solve(right, factor)


def align(
    alignment: str,
    prototypes: Tensor,
    before: Tensor,
    after: Tensor,
    labels: Tensor,
    *,
    tau: float = 0.05,
    ridge: float = 0.1,
) -> Tensor:
    """The old `prototypes` [C, D] in the space of the new model, by one of the formulas above.

    Args:
        alignment: none, complement, shift, sdc, ridge or semantic.
        before, after: Features [n, D] of the new task's images under the old and the new model.
        labels: int64 [n], the new task's classes counted from 0.
        tau: Temperature of the similarities.
        ridge: Strength of the ridge, relative to the mean of diag(F'F).

    Raises:
        ValueError: An unknown alignment, features of different shapes, or features that are not finite.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}")
    if before.shape != after.shape or before.shape[1] != prototypes.shape[1]:
        shapes = f"{list(before.shape)}, {list(after.shape)} and {list(prototypes.shape)}"
        raise ValueError(f"before and after must be [n, D] and prototypes [C, D], got {shapes}")
    if not bool(torch.isfinite(before).all() and torch.isfinite(after).all()):
        raise ValueError("before and after must be finite, got a feature that is not")
    if alignment == "none":
        return prototypes
    if alignment == "sdc":
        return ops.reconstruct_prototypes(prototypes, before, after, tau=tau, mode="shift")
    drifted = prototypes
    if alignment in ("ridge", "semantic"):
        moved = torch.eye(before.shape[1], dtype=torch.float64, device=before.device) + drift_map(before, after, ridge)
        drifted = (prototypes.double() @ moved).to(prototypes.dtype)
    if alignment == "ridge":
        return drifted

    num_new = int(labels.max()) + 1
    old_space, new_space = class_means(before, labels, num_new), class_means(after, labels, num_new)
    if alignment == "semantic":
        left = new_space - (old_space.double() @ moved).to(new_space.dtype)
        return drifted + ops.reconstruct_prototypes(prototypes, old_space, left, tau=tau, mode="complement")
    return ops.reconstruct_prototypes(prototypes, old_space, new_space, tau=tau, mode=alignment)
