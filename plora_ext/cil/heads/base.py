"""What a head is, and the class covariances that two of them keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from plora_ext.cil.alignment import Drift
from plora_ext.cil.covariances import ClassCovariances
from plora_ext.cil.settings import Settings


class Head(ABC):
    """A classifier of features [n, D]: by the prototypes, or by what it learns task by task.

    Attributes:
        learns: Whether it has a `learn` of its own; all features of a task are then put together for it.
        covariances: Of the classes, where it keeps them.
    """

    covariances: ClassCovariances | None = None

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

    def follow(self, drift: Drift) -> None:  # noqa: B027
        """Takes over what has moved with the prototypes to the current space, before it learns the task."""

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
    """A head that keeps the covariances of the classes, whole or of rank `covariance_rank`.

    They follow the alignment's linear drift maps (plora_ext.cil.alignment). Under one that has none they stay as they
    are, and so does a task's entry in the checkpoint.
    """

    covariances: ClassCovariances

    def __init__(self, settings: Settings, device: torch.device):
        super().__init__(settings, device)
        self.covariances = ClassCovariances(settings.covariance_rank or 0)

    def follow(self, drift: Drift) -> None:
        if drift.covariances is not None:
            self.covariances = drift.covariances

    def take_in(self, features: Tensor, labels: Tensor) -> None:
        """Adds the covariances of the task's classes."""
        self.covariances = self.covariances.added(features, labels)

    def state(self) -> dict[str, Any]:
        return super().state() | self.covariances.state()

    def restore(self, state: dict[str, Any]) -> None:
        own = {name: value for name, value in state.items() if name.startswith("covariances")}
        super().restore({name: value for name, value in state.items() if name not in own})
        self.covariances = self.covariances.restored(own)
