"""Covariances of classes around their means, whole or of low rank; they follow the drift of the feature space.

Whole ones take D^2 numbers a class. Of rank r they take r D, with the rest of all classes in one matrix:

    S_c = F_c F_c' + E      F_c [D, r]: the best F_c F_c' for the class's own covariance, its largest r eigenvalues
                            E [D, D]: the mean over all classes of what this leaves

so that the mean over all classes is exact. 10^4 classes at D = 768 and r = 16 take 0.49 GB, where whole ones take 24.
Under linear maps M_c of the classes' features, and M of all features: F_c <- M_c' F_c and E <- M' E M.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 256  # whose rows are made float64 at a time


def covariance(features: Tensor) -> Tensor:
    """Of features [n, D] around their mean, float32 [D, D]; zero for a single one."""
    centred = _centred(features)
    return (centred.T @ centred).float()


def _centred(features: Tensor) -> Tensor:
    """X, float64 [n, D], whose X' X is the covariance."""
    return (features.double() - features.double().mean(0)) / max(len(features) - 1, 1) ** 0.5


def _principal(features: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """F' [rank, D], with rows of zeros where there are fewer images, and E [D, D] of one class; float64."""
    centred = _centred(features)
    if len(centred) > centred.shape[1]:
        centred = torch.linalg.qr(centred, mode="r").R  # has the same X' X
    axes = torch.linalg.eigh(centred @ centred.T).eigenvectors.flip(1)
    rows = axes.T @ centred  # X = U s V': these are s V', the largest first
    return F.pad(rows[:rank], (0, 0, 0, max(rank - len(rows), 0))), rows[rank:].T @ rows[rank:]


class ClassCovariances:
    """See above.

    Args:
        rank: r, at most D of which counts; None: whole covariances.

    Attributes:
        rows: F_c', float32 [C, r, D]; [C, 0, D] for whole ones.
        base: E, float32 [1, D, D]; for whole ones S_c [C, D, D].
    """

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank
        self.rows = self.base = torch.empty(0)
        self._classes: list[int] = []  # of each task

    def __len__(self) -> int:
        return len(self.rows)

    def added(self, features: Tensor, labels: Tensor) -> ClassCovariances:
        """These, then those of a task.

        Args:
            features: [n, D]. A class of one image has a covariance of zero, one of n images rank n - 1 at most.
            labels: int64 [n], the task's classes counted from 0.

        Raises:
            ValueError: Features that are not finite, or whose squares are not.
        """
        if not bool((features.abs() < 1e18).all()):
            raise ValueError("features must be finite, below 1e18: got larger ones or nan; did the training diverge?")
        C, D = int(labels.max()) + 1, features.shape[1]
        classes = [features[labels == c] for c in range(C)]
        if self.rank is None:
            rows, base = features.new_zeros(C, 0, D, dtype=torch.float32), torch.stack([*map(covariance, classes)])
            base = torch.cat([self.base, base]) if len(self) else base
        else:
            rows = features.new_empty(C, min(self.rank, D), D, dtype=torch.float32)
            left = len(self) * self.base.double() if len(self) else features.new_zeros(1, D, D, dtype=torch.float64)
            for c, own in enumerate(classes):
                rows[c], rest = _principal(own, rows.shape[1])
                left += rest
            base = (left / (len(self) + C)).float()
        return self._with(torch.cat([self.rows, rows]) if len(self) else rows, base, [*self._classes, C])

    def moved(self, move: Tensor, *, shared_only: bool = False) -> ClassCovariances:
        """A copy under one map [D, D] of all features; with `shared_only` what is a class's own waits for `move`."""
        copy = self._with(self.rows.clone(), self.base.clone(), self._classes)
        if self.rank is not None:
            copy.base[0] = _moved(self.base[0], move)
        for c in range(0 if shared_only else len(self)):
            copy.move(c, move)
        return copy

    def move(self, c: int, move: Tensor) -> None:
        """Moves what is class c's own, in place, by a map [D, D] of its features."""
        if self.rank is None:
            self.base[c] = _moved(self.base[c], move)
        else:
            self.rows[c] = self.rows[c].double() @ move

    def mean(self) -> Tensor:
        """Over all classes, float64 [D, D]."""
        total = self.base.mean(0, dtype=torch.float64)
        for part in self.rows.split(CLASSES):
            rows = part.double().flatten(0, 1)
            total.addmm_(rows.T, rows, alpha=1 / len(self))
        return total

    def of(self, c: int) -> Tensor:
        """S_c, float32 [D, D]."""
        return self.base[c if self.rank is None else 0] + self.rows[c].T @ self.rows[c]

    def state(self) -> dict[str, Tensor]:
        """An entry a task, `covariances:0` ..., and E as `covariances:shared`."""
        own = self.base if self.rank is None else self.rows
        state = {f"covariances:{t}": part for t, part in enumerate(own.split(self._classes))}
        return state if self.rank is None else state | {"covariances:shared": self.base}

    def restored(self, state: Mapping[str, Tensor]) -> ClassCovariances:
        """Those of a `state`, or of one entry `covariances` as older checkpoints have it."""
        parts = {name.partition(":")[2]: part for name, part in state.items()}
        base = parts.pop("shared", None)
        tasks = [parts[t] for t in sorted(parts, key=lambda t: int(t or 0))]
        own = torch.cat(tasks)
        rows, base = (own[:, :0], own) if base is None else (own, base)
        return self._with(rows, base, [len(part) for part in tasks])

    def _with(self, rows: Tensor, base: Tensor, classes: list[int]) -> ClassCovariances:
        made = ClassCovariances(self.rank)
        made.rows, made.base, made._classes = rows, base, classes
        return made


def _moved(covariance: Tensor, move: Tensor) -> Tensor:
    return (move.T @ covariance.double() @ move).float()
