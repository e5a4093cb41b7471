"""Covariances of classes around their means, whole or of low rank; they follow the drift of the feature space.

Whole ones take D^2 numbers a class. Of rank r they take r D, with the rest of all classes in one matrix:

    S_c = F_c F_c' + E      F_c [D, r]: the r largest principal axes of the class, the best F_c F_c' of rank r
                            E [D, D]: the mean over all classes of what these leave

so that the mean over all classes is exact. 10^4 classes at D = 768 and r = 16 take 0.49 GB, where whole ones take 24.
Under linear maps M_c of the classes' features, and M of all features: F_c <- M_c' F_c and E <- M' E M.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 256  # whose rows are made float64 at a time


def covariance(features: Tensor) -> Tensor:
    """Of features [n, D] around their mean, float32 [D, D]; zero for a single one."""
    return _split(features, 0)[1].float()


def _split(features: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """F' [rank, D], rows of zeros where there are too few images, and what it leaves of their covariance; float64."""
    rows = (features.double() - features.double().mean(0)) / max(len(features) - 1, 1) ** 0.5
    if rank:  # other rows of the same product: those of s V' in U s V', the largest first
        if len(rows) > rows.shape[1]:
            rows = torch.linalg.qr(rows, mode="r").R
        rows = torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(1).T @ rows
    return F.pad(rows[:rank], (0, 0, 0, max(rank - len(rows), 0))), rows[rank:].T @ rows[rank:]


@dataclass(frozen=True, eq=False)
class ClassCovariances:
    """See above.

    Attributes:
        rank: r, of which at most D count; 0: whole covariances.
        rows: F_c', float32 [C, r, D]; [C, 0, D] for whole ones.
        base: E, float32 [1, D, D]; for whole ones S_c [C, D, D].
        classes: Those of each task.
    """

    rank: int = 0
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    base: Tensor = field(default_factory=lambda: torch.empty(0))
    classes: tuple[int, ...] = ()

    def added(self, features: Tensor, labels: Tensor) -> ClassCovariances:
        """These, then those of a task's features [n, D], labels counted from 0; a class of one image has zero.

        Raises:
            ValueError: Features that are not finite, or whose squares are not.
        """
        if not bool((features.abs() < 1e18).all()):
            raise ValueError("features must be finite, below 1e18: got larger ones or nan; did the training diverge?")
        known, new, D = len(self.rows), int(labels.max()) + 1, features.shape[1]
        rows = features.new_empty(new, min(self.rank, D), D, dtype=torch.float32)
        base = features.new_zeros(1 if self.rank else new, D, D, dtype=torch.float64 if self.rank else torch.float32)
        for c in range(new):
            rows[c], left = _split(features[labels == c], rows.shape[1])
            base[0 if self.rank else c] += left
        if known:
            rows = torch.cat([self.rows, rows])
            base = base + known * self.base if self.rank else torch.cat([self.base, base])
        base = (base / (known + new)).float() if self.rank else base
        return replace(self, rows=rows, base=base, classes=(*self.classes, new))

    def moved(self, move: Tensor, *, shared_only: bool = False) -> ClassCovariances:
        """A copy under one map [D, D] of all features; with `shared_only` what is a class's own waits for `move`."""
        copy = replace(self, rows=self.rows.clone(), base=self.base.clone())
        if self.rank:
            copy.base[0] = move.T @ self.base[0].double() @ move
        for c in range(0 if shared_only else len(self.rows)):
            copy.move(c, move)
        return copy

    def move(self, c: int, move: Tensor) -> None:
        """Moves what is class c's own, in place, by a map [D, D] of its features."""
        self.rows[c] = self.rows[c].double() @ move
        if not self.rank:
            self.base[c] = move.T @ self.base[c].double() @ move

    def mean(self) -> Tensor:
        """Over all classes, float64 [D, D]."""
        total = self.base.mean(0, dtype=torch.float64)
        for part in self.rows.split(CLASSES):
            rows = part.double().flatten(0, 1)
            total.addmm_(rows.T, rows, alpha=1 / len(self.rows))
        return total

    def of(self, c: int) -> Tensor:
        """S_c, float32 [D, D]."""
        return self.base[0 if self.rank else c] + self.rows[c].T @ self.rows[c]

    def state(self) -> dict[str, Tensor]:
        """An entry a task, `covariances:0` ..., and E as `covariances:shared`."""
        own = (self.rows if self.rank else self.base).split(self.classes)
        state = {f"covariances:{t}": part for t, part in enumerate(own)}
        return state | ({"covariances:shared": self.base} if self.rank else {})

    def restored(self, state: Mapping[str, Tensor]) -> ClassCovariances:
        """Those of a `state`, or of one entry `covariances` as older checkpoints have it."""
        parts = {name.partition(":")[2]: part for name, part in state.items()}
        shared = parts.pop("shared", None)
        tasks = [parts[t] for t in sorted(parts, key=lambda t: int(t or 0))]
        own = torch.cat(tasks)
        rows, base = (own[:, :0], own) if shared is None else (own, shared)
        return replace(self, rows=rows, base=base, classes=tuple(map(len, tasks)))
