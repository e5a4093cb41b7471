"""Class prototypes that grow with the classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext import ops

__all__ = ["PrototypeBank", "keep_exact", "resize_buffers"]


def resize_buffers(module: nn.Module, state_dict: dict[str, Any], prefix: str, names: Sequence[str]) -> None:
    """Give buffers the sizes that they have in `state_dict`, so that loading fills them whatever they held."""
    for name in names:
        saved, here = state_dict.get(prefix + name), module.get_buffer(name)
        # Only the number of classes may differ; anything else is left for load_state_dict to report.
        if isinstance(saved, Tensor) and saved.dim() == here.dim() and saved.shape[1:] == here.shape[1:]:
            setattr(module, name, here.new_zeros(saved.shape))


def keep_exact(module: nn.Module, names: Sequence[str], apply: Callable[[], object]) -> None:
    """Move a module by `apply`, but leave buffers in the dtype that they have: a narrower one would round them."""
    before = [module.get_buffer(name) for name in names]
    apply()
    for name, exact in zip(names, before, strict=True):
        moved = module.get_buffer(name)
        if not moved.is_meta and not exact.is_meta:  # else there is nothing to keep
            setattr(module, name, exact.to(moved.device))


def _require_finite(name: str, values: Tensor) -> None:
    """What is not would stay in the totals of its class for good."""
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"{name} must be finite, got inf or NaN; the cause may be the images, or a training that diverged"
        )


class PrototypeBank(nn.Module):
    """The mean feature of every class, kept over batches, tasks and checkpoints.

    Rows are added as classes come, and `load_state_dict` takes over the number of classes of the saved state. The
    means stay in float32 when the model is moved to a narrower dtype.

    Args:
        num_features: size D of a feature.

    Attributes:
        prototypes: buffer `[C, D]` float32, row c for class c; zero for a class not seen yet.
        counts: buffer `[C]` int64, samples of each class.
        sums: buffer `[C, D]` float32, the running totals behind the means.
    """

    prototypes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        self.num_features = num_features
        self.register_buffer("prototypes", torch.zeros(0, num_features, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(0, num_features, dtype=torch.float32))

    @property
    def classes(self) -> list[int]:
        """The classes that have a prototype."""
        return self.counts.nonzero().flatten().tolist()

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: the prototype of a class is the mean of all its features since it came (or since `set`).

        Args:
            features: `[N, D]`.
            labels: `[N]` integer class ids from 0; new ones make the bank grow.

        Raises:
            ValueError: shapes or devices do not fit, a label is negative or no integer, or a feature is not finite.
            TypeError: features are not floating point.
        """
        if features.dim() != 2 or features.shape[1] != self.num_features or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features and labels must be [N, {self.num_features}] and [N], "
                f"got {list(features.shape)} and {list(labels.shape)}"
            )
        if features.device != self.sums.device:
            raise ValueError(f"features must be on the bank's device {self.sums.device}, got {features.device}")
        if features.dtype == torch.float64:
            features = features.to(self.sums)
        _require_finite("features", features)
        labels, rows = self._checked(labels)
        self._resize(rows)
        before = self.counts.clone()
        sums, counts = ops.class_sums(features, labels, len(self.counts), sums=self.sums, counts=self.counts)
        self._take(sums, counts, counts > before)

    def _add(self, other: PrototypeBank) -> None:
        """The samples of another bank beside one's own."""
        number = len(other.counts)
        self._resize(max(number, len(self.counts)))
        self.sums[:number] += other.sums
        self.counts[:number] += other.counts
        self._take(self.sums, self.counts, F.pad(other.counts, (0, len(self.counts) - number)) > 0)

    def _take(self, sums: Tensor, counts: Tensor, changed: Tensor) -> None:
        means = sums / counts.clamp(min=1)[:, None]
        self.sums, self.counts = sums, counts
        self.prototypes = torch.where(changed[:, None], means, self.prototypes)

    @torch.no_grad()
    def set(self, classes: Tensor | Sequence[int], prototypes: Tensor, counts: Tensor | None = None) -> None:
        """Replace prototypes, for example by reconstructed ones, without touching the other classes.

        Args:
            classes: `[n]` integer class ids from 0; new ones make the bank grow.
            prototypes: `[n, D]`.
            counts: `[n]` samples that they stand for; default those known, or 1 for a new class.

        Raises:
            ValueError: shapes do not fit, a class is negative or named twice, or a prototype is not finite.
        """
        value = prototypes.to(self.prototypes)
        _require_finite("prototypes", value)
        index, rows = self._checked(torch.as_tensor(classes))
        if prototypes.shape != (len(index), self.num_features):
            raise ValueError(
                f"prototypes must be [{len(index)}, {self.num_features}], one row for each class, "
                f"got {list(prototypes.shape)}"
            )
        if len(index.unique()) < len(index):
            raise ValueError(f"classes must not repeat, got {index.tolist()}")
        if counts is not None:
            given = torch.as_tensor(counts, device=self.counts.device)
            number = given.to(torch.int64)
            if number.shape != index.shape or bool((number < 0).any()) or bool((number != given).any()):
                raise ValueError(f"counts must be [{len(index)}] numbers of samples, one for each class, got {counts}")
        self._resize(rows)
        if counts is None:
            number = self.counts[index].clamp(min=1)
        self.counts[index], self.prototypes[index], self.sums[index] = number, value, value * number[:, None]

    def select(self, classes: Tensor | Sequence[int]) -> Tensor:
        """The prototypes `[n, D]` of some classes.

        Raises:
            ValueError: a class has no prototype yet.
        """
        wanted, known = torch.as_tensor(classes).tolist(), set(self.classes)
        for label in wanted:
            if label not in known:
                raise ValueError(f"class {label} has no prototype, {len(known)} classes have: {sorted(known)[:20]}")
        return self.prototypes[wanted]

    def reset(self) -> None:
        """Forget all classes."""
        self._resize(0)

    def _checked(self, labels: Tensor) -> tuple[Tensor, int]:
        """Labels as int64 on the bank's device, and rows for all of them. Looks at the values: one wait on a GPU."""
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.dim() != 1:
            raise ValueError(
                f"class labels must be a one-dimensional integer tensor, got {labels.dtype} {list(labels.shape)}"
            )
        labels = labels.to(self.counts)  # before a look: of uint16 torch knows no least
        low, high = (int(value) for value in labels.aminmax()) if labels.numel() else (0, -1)
        if low < 0:
            raise ValueError(f"class labels must not be negative, got {low}")
        return labels, max(high + 1, len(self.counts))

    def _resize(self, num_classes: int) -> None:
        for name in ("prototypes", "counts", "sums"):
            old = self.get_buffer(name)
            new = old.new_zeros(num_classes, *old.shape[1:])
            keep = min(num_classes, len(old))
            new[:keep] = old[:keep]
            setattr(self, name, new)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrototypeBank:
        keep_exact(self, ("prototypes", "sums"), lambda: super(PrototypeBank, self)._apply(fn, recurse))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        resize_buffers(self, state_dict, prefix, ("prototypes", "counts", "sums"))
        super()._load_from_state_dict(state_dict, prefix, *args)
