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
    local       p_c (I + R + R_c)          (R_c: the linear drift that explains F' - F (I + R) best near p_c)

`semantic` applies the linear drift first and then what it leaves unexplained of the new classes' own drift. `local`
has a map for each class, from images weighted by their similarity to it, exp(cos(p_c, F_j) / tau); it is at its best
with images moved to where old classes are (plora_ext.cil.sought), which tell of the drift there. All but `local` follow
from sums over the images (`Drift`) and hold no more features than those of a batch.

The class covariances that a head keeps (plora_ext.cil.covariances) follow the same maps, (I + R)' S_c (I + R); for
`local` with R + R_c, but for what low-rank ones share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext import ops
from plora_ext.cil.covariances import ClassCovariances
from plora_ext.cil.distributed import SINGLE, World
from plora_ext.cil.registry import ALIGNMENTS, register_alignment

ROWS = 1024  # features that are made float64 at a time
LOCAL_RIDGE = 0.1  # of R_c, relative to the mean of the weighted diag(F'F); 0.03 and 0.3 do as well on photographs


def class_means(features: Tensor, labels: Tensor, num_classes: int, world: World = SINGLE) -> Tensor:
    """Mean feature of each class, its prototype: features [n, D], labels [n] in 0 ... num_classes - 1; float32 [C, D].

    Args:
        world: Processes that have n rows each; the means are over all of them.

    Raises:
        ValueError: A class without a feature.
    """
    return _means(*world.sum_(*ops.class_sums(features, labels, num_classes)))


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    if not bool(counts.all()):
        raise ValueError(f"every class needs a feature, got none for class {int((counts == 0).nonzero()[0])}")
    return sums / counts[:, None]


def solve_ridge(gram: Tensor, right: Tensor, ridge: Tensor) -> Tensor:
    """(gram + ridge I)^-1 right in float64, by Cholesky; `gram` symmetric, changed in place.

    The solution of least norm without a ridge, or where a pivot is within rounding of 0: with fewer images than
    features, or features that say the same, there may be no sound Cholesky factor.
    """
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    rounding = len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().max()
    if failed or ridge == 0 or factor.diagonal().square().min() <= rounding:
        return torch.linalg.pinv(gram, hermitian=True) @ right
    return torch.cholesky_solve(right, factor)


class Drift:
    """The sums over images from which `align` follows: features come batch by batch, and only `local` keeps them.

    With F and G the features [n, D] before and after, they are

        linear drift   F' F and F' (G - F), [D, D] each                                   for ridge, semantic
        image drift    sum_j e_cj (G_j - F_j) and sum_j e_cj with e_cj = exp((cos(p_c, F_j) - 1) / tau)   for sdc
        class sums     of F and of G, and the classes' numbers of images
        the rows       of F and G themselves, float32                                     for local

    Class sums are float32 and have the same bits however the images are split into batches. All else is float64, with
    the same bits for the same batches; over others it differs by float64's rounding. A cosine is at most 1, so that
    e_cj needs no running maximum; it is held above exp(-600), which matters below tau = 1/300, lest all of them vanish.

    Args:
        alignment: One of ALIGNMENTS: none, complement, shift, sdc, ridge, semantic, local, or a user's own.
        prototypes: Those of the old classes, [C, D].
        num_classes: New classes.
        tau: Temperature of the similarities.
        ridge: Strength of the ridge, relative to the mean of diag(F' F).
        covariances: Those of the old classes around their prototypes, where a head keeps them.

    Attributes:
        covariances: After `align` in the new space, where the alignment has a linear drift map.

    Raises:
        ValueError: An unknown alignment, or a tau that is not positive.
    """

    def __init__(
        self,
        alignment: str,
        prototypes: Tensor,
        num_classes: int,
        *,
        tau: float = 0.05,
        ridge: float = 0.1,
        covariances: ClassCovariances | None = None,
    ) -> None:
        if alignment not in ALIGNMENTS:
            raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}")
        if not tau > 0:
            raise ValueError(f"tau must be positive, got {tau}")
        kind = ALIGNMENTS[alignment]
        self.kind, self.prototypes, self.tau, self.ridge = kind, prototypes, tau, ridge
        self.covariances = covariances
        (C, D), wide = prototypes.shape, torch.promote_types(prototypes.dtype, torch.float32)
        self._rows = [prototypes.new_zeros(0, 2, D, dtype=wide)]
        linear, images = (D if kind.linear else 0), (C if kind.images else 0)
        zeros = prototypes.new_zeros
        self.gram, self.cross = (zeros(linear, linear, dtype=torch.float64) for _ in range(2))
        self.moved, self.weight = zeros(images, D, dtype=torch.float64), zeros(images, 1, dtype=torch.float64)
        self.sums = zeros(num_classes, 2 * D, dtype=wide)
        self.counts, self.unsound = (zeros(size, dtype=torch.int64) for size in ((num_classes,), ()))

    @torch.no_grad()
    def add(self, before: Tensor, after: Tensor, labels: Tensor | None) -> None:
        """Takes in n images, which may be none; the host does not wait for the device.

        Args:
            before, after: Features [n, D] under the old and the new model.
            labels: int64 [n], the new classes counted from 0; None: the images are of none.

        Raises:
            ValueError: Shapes do not fit.
        """
        if before.shape != after.shape or before.dim() != 2 or before.shape[1] != self.prototypes.shape[1]:
            shapes = f"{list(before.shape)}, {list(after.shape)} and {list(self.prototypes.shape)}"
            raise ValueError(f"before and after must be [n, D] and prototypes [C, D], got {shapes}")
        both = torch.cat([before, after], 1).to(self.sums.dtype)
        self.unsound += (~torch.isfinite(both)).sum()
        if labels is not None:
            ops.class_sums(both, labels, len(self.counts), sums=self.sums, counts=self.counts)
        if self.kind.rows:
            self._rows.append(torch.stack([before, after], 1).to(self.sums.dtype))
        if not len(self.gram) + len(self.moved):
            return
        for old, new in zip(before.split(ROWS), after.split(ROWS)):
            old, drift = old.double(), new.double() - old.double()
            if len(self.gram):
                self.gram.addmm_(old.T, old)
                self.cross.addmm_(old.T, drift)
            if len(self.moved):
                cosines = F.normalize(self.prototypes.double()) @ F.normalize(old).T
                similar = ((cosines - 1) / self.tau).clamp_(min=-600).exp_()
                self.moved.addmm_(similar, drift)
                self.weight += similar.sum(1, keepdim=True)

    def gather(self, world: World) -> None:
        """Makes the sums, and the rows, those of the images of all processes, which had `world.rows` of them each."""
        world.sum_(self.gram, self.cross, self.moved, self.weight, self.sums, self.counts, self.unsound)
        if self.kind.rows:
            self._rows = [world.gather(torch.cat(self._rows), int(self.counts.sum()))]

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of the new classes before and after, [classes, D] each.

        Raises:
            ValueError: A class without an image.
        """
        before, after = _means(self.sums, self.counts).chunk(2, 1)
        return before.contiguous(), after.contiguous()

    def align(self) -> Tensor:
        """The prototypes in the space of the new model; as they were where no image tells of a linear or image drift.

        Raises:
            ValueError: A feature was not finite; a new class without an image, where the formula needs its mean.
        """
        if self.unsound:
            raise ValueError("before and after must be finite, got a feature that is not")
        if self.covariances is not None and self.kind.linear:
            self.covariances = self.covariances.moved(self.map(), shared_only=self.kind.rows)
        return self.kind.rule(self)

    def map(self) -> Tensor:
        """I + R [D, D], float64: the linear drift map."""
        move = solve_ridge(self.gram.clone(), self.cross, self.ridge * self.gram.diagonal().mean())
        move.diagonal().add_(1)
        return move

    def local_maps(self) -> Iterator[Tensor]:
        """I + R + R_c [D, D], float64, of each old class c: with e_cj as for sdc,

        R_c = argmin over R of sum_j e_cj |F_j R - (G_j - F_j (I + R))|^2 + l |R|^2, l = LOCAL_RIDGE mean(diag(F' E F)).
        """
        before, after = torch.cat(self._rows).double().unbind(1)
        move = self.map()
        left, unit = after - before @ move, F.normalize(before)
        for prototype in F.normalize(self.prototypes.double()):
            similar = ((unit @ prototype - 1) / self.tau).clamp_(min=-600).exp_()
            weighted = before * similar[:, None]
            gram = weighted.T @ before
            yield move + solve_ridge(gram, weighted.T @ left, LOCAL_RIDGE * gram.diagonal().mean())


def has_map(alignment: str) -> bool:
    """Whether an alignment follows a linear drift map, which a head's sums can follow as well."""
    return ALIGNMENTS[alignment].linear


@register_alignment("none")
def _none(drift: Drift) -> Tensor:
    return drift.prototypes


@register_alignment("complement")
def _complement(drift: Drift) -> Tensor:
    return ops.reconstruct_prototypes(drift.prototypes, *drift.means(), tau=drift.tau, mode="complement")


@register_alignment("shift")
def _shift(drift: Drift) -> Tensor:
    return ops.reconstruct_prototypes(drift.prototypes, *drift.means(), tau=drift.tau, mode="shift")


@register_alignment("sdc", images=True)
def _sdc(drift: Drift) -> Tensor:
    old = drift.prototypes
    return (old.double() + drift.moved / drift.weight.clamp(min=1e-300)).to(old.dtype)


@register_alignment("ridge", linear=True)
def _ridge(drift: Drift) -> Tensor:
    return (drift.prototypes.double() @ drift.map()).to(drift.prototypes.dtype)


@register_alignment("semantic", linear=True)
def _semantic(drift: Drift) -> Tensor:
    old, move, (old_space, new_space) = drift.prototypes, drift.map(), drift.means()
    left = new_space - (old_space.double() @ move).to(new_space.dtype)
    rest = ops.reconstruct_prototypes(old, old_space, left, tau=drift.tau, mode="complement")
    return (old.double() @ move).to(old.dtype) + rest


@register_alignment("local", linear=True, rows=True)
def _local(drift: Drift) -> Tensor:
    aligned = torch.empty_like(drift.prototypes)
    for c, move in enumerate(drift.local_maps()):
        aligned[c] = drift.prototypes[c].double() @ move
        if drift.covariances is not None:
            drift.covariances.move(c, move)
    return aligned


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
    """The old `prototypes` [C, D] in the space of the new model, by one of the formulas above: a `Drift` of one `add`.

    Arguments and errors are those of `Drift` and of its `add`.
    """
    drift = Drift(alignment, prototypes, int(labels.max()) + 1 if len(labels) else 0, tau=tau, ridge=ridge)
    drift.add(before, after, labels)
    return drift.align()
