"""`cosine`: the nearest prototype by its cosine, in one feature space or in one for each task (EASE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plora_ext.cil.heads.base import Head
from plora_ext.cil.registry import register_head
from plora_ext.cil.settings import Settings
from plora_ext.nn import CosineHead, SubspaceHead


@register_head("cosine")
class Cosine(Head):
    """logits[c] = scale * cos(x, p_c)."""

    def __init__(self, settings: Settings, device: torch.device):
        super().__init__(settings, device)
        assert settings.scale is not None, "it follows from the method"
        self.cosine = CosineHead(settings.scale).to(device)

    def __call__(self, features: Tensor, prototypes: Tensor) -> Tensor:
        return self.cosine(features, prototypes)


class Subspace(Head):
    """The head of plora-ensemble, for features [n, T, D] and prototypes [C, T, D] (`plora_ext.nn.SubspaceHead`)."""

    def __init__(self, settings: Settings, device: torch.device):
        super().__init__(settings, device)
        self.subspaces = SubspaceHead(settings.ensemble_alpha).to(device)

    def add_task(self, classes: int) -> Tensor:
        """Takes in a task of so many classes; returns the task of every class."""
        known = self.subspaces.task_of_class
        newest = known.new_full((classes,), int(known[-1]) + 1 if len(known) else 0)
        self.subspaces.assign(torch.cat([known, newest]))
        return self.subspaces.task_of_class

    def __call__(self, features: Tensor, prototypes: Tensor) -> Tensor:
        return self.subspaces(features, prototypes)

    def state(self) -> dict[str, Any]:
        return {"task_of_class": self.subspaces.task_of_class}

    def restore(self, state: dict[str, Any]) -> None:
        self.subspaces.assign(state["task_of_class"])
