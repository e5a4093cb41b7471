"""What a head is, and the class covariances that two of them keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from plora_ext.cil.alignment import Drift
from plora_ext.cil.covariances import ClassCovariances
from plora_ext.cil.packing import is_plain
from plora_ext.cil.settings import Settings

_GIVEN = ("settings", "device", "learns", "covariances")  # what is made anew, or has entries of its own


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
        """Everything it has learned, by name; a checkpoint writes an entry again only when it has changed.

        Here: its attributes that are tensors, numbers, texts, or lists and dicts of such.
        """
        return {name: value for name, value in vars(self).items() if name not in _GIVEN and is_plain(value)}

    def refuse_loss(self) -> None:
        """Raises TypeError where it learns and has an attribute that is not saved, without a `restore` of its own."""
        if not self.learns or type(self).restore.__module__ != __name__:
            return
        for name, value in vars(self).items():
            if name not in _GIVEN and not is_plain(value):
                raise TypeError(
                    f"head {type(self).__name__} cannot be saved whole: {name} is no tensor, number or text, nor a "
                    f"list or dict of such, but {type(value).__name__}; give the head a state and a restore"
                )

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
