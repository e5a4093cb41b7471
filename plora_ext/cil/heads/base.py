"""What a head is, and the class covariances that two of them keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from plora_ext.cil.alignment import drift_map, has_map
from plora_ext.cil.settings import Settings


class Head(ABC):
    """A classifier of features [n, D]: by the prototypes, or by what it learns task by task.

    Attributes:
        learns: Whether it has a `learn` of its own; all features of a task are then put together for it.
    """

    def __init__(self, settings: Settings, device: torch.device):
        self.settings, self.device = settings, device
        self.learns = type(self).learn is not Head.learn

    def learn(self, prototypes: Tensor, before: Tensor | None, after: Tensor, labels: Tensor) -> None:
        """Takes in a task, once the method has its features and prototypes.

        Args:
            prototypes: [C, D], means of all classes seen in the current space, aligned ones included, the task's last.
            before: Features [n, D] of the task's images in the previous space; None if the space has not moved.
            after: Features [n, D] of the same images in the current space.
            labels: int64 [n], the task's classes counted from 0.
        """
        raise NotImplementedError

    @abstractmethod
    def __call__(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """Logits [n, C] of features [n, D] in the current space, with all classes' prototypes [C, D] there."""

    def state(self) -> dict[str, Any]:
        """Everything it has learned, tensors by name; a checkpoint writes an entry again only when it has changed."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        vars(self).update(state)


class CovarianceHead(Head):
    """A head that keeps a covariance for each class: D^2 numbers a class.

    Where the alignment of prototypes has a linear drift map R, covariances follow it: S_c becomes
    (I + R)' S_c (I + R). Elsewhere they stay as they are, and so does a task's entry in the checkpoint.

    Attributes:
        covariances: float32 [C, D, D], of the samples around their class mean.
    """

    def __init__(self, settings: Settings, device: torch.device):
        super().__init__(settings, device)
        self.covariances = torch.empty(0)
        self._classes: list[int] = []  # of each task

    def take_in(self, before: Tensor | None, after: Tensor, labels: Tensor) -> None:
        """Moves the old covariances into the new space and adds those of the task's classes."""
        s, old = self.settings, self.covariances
        if before is not None and len(old) and has_map(s.alignment):
            moved = drift_map(before, after, s.ridge) + torch.eye(after.shape[1], device=after.device)
            old = torch.stack([(moved.T @ c.double() @ moved).float() for c in old])
        new = torch.stack([_covariance(after[labels == c]) for c in range(int(labels.max()) + 1)])
        self.covariances = torch.cat([old, new]) if len(old) else new
        self._classes.append(len(new))

    def state(self) -> dict[str, Any]:
        state = {name: value for name, value in super().state().items() if name != "covariances"}
        return state | {f"covariances:{t}": part for t, part in enumerate(self.covariances.split(self._classes))}

    def restore(self, state: dict[str, Any]) -> None:
        tasks = [name for name in state if name.partition(":")[0] == "covariances"]
        super().restore({name: value for name, value in state.items() if name not in tasks})
        parts = [state[name] for name in sorted(tasks, key=lambda name: int(name.partition(":")[2] or 0))]
        self.covariances, self._classes = torch.cat(parts), [len(part) for part in parts]


def _covariance(features: Tensor) -> Tensor:
    centred = features.double() - features.double().mean(0)
    return (centred.T @ centred / max(len(features) - 1, 1)).float()
