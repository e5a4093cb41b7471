"""PLoRA's ensemble form: a feature space per adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext import ops
from plora_ext.cil.heads import Subspace
from plora_ext.cil.methods.base import _Adapted
from plora_ext.cil.settings import Settings
from plora_ext.cil.spaces import space_fingerprints
from plora_ext.cil.stream import Task
from plora_ext.cil.training import Trainer
from plora_ext.data import View
from plora_ext.nn import Ensemble


class PLoRAEnsemble(_Adapted):
    """`plora-ensemble`: every adapter keeps its own feature space (EASE, CVPR 2024, with LoRA).

    T forward passes, made as one (`plora_ext.nn.Ensemble`); old adapters stay as they are, so their features are kept.
    Prototypes are [C, T, D]. Those of a class in the spaces of later tasks' adapters are completed from later classes.
    """

    def __init__(self, trainer: Trainer, settings: Settings):
        super().__init__(trainer, settings)
        self.head: Subspace = Subspace(settings, trainer.device)
        memory = settings.ensemble_memory
        self.ensemble = Ensemble(self.adapters, None if memory is None else int(memory * 2**20))

    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        self._add_adapter(task)
        if task.index == 0:
            self.features(images[torch.arange(1)])  # too little ensemble_memory shows before anything is trained
        self._fit(task, images, labels)
        self.add_prototypes(task, images, labels)

    def add_prototypes(self, task: Task, images: View, labels: Tensor) -> None:
        """Means of the task's classes in every space, then what the older classes lack in the newest one."""
        with self.trainer.phases("prototypes"):
            own = self.world.rows(len(images))
            spaces, mine = self.features(images[own]).unbind(1), labels[own.to(labels.device)]
            new = torch.stack([self._class_means(task, space, mine) for space in spaces], 1)
        with self.trainer.phases("align"):
            task_of_class = self.head.add_task(len(new))
            old = new[:0] if self.prototypes is None else F.pad(self.prototypes, (0, 0, 0, 1))  # the newest is empty
            self.prototypes = ops.complete_prototypes(
                torch.cat([old, new]), task_of_class, tau=self.settings.ensemble_tau, mode="reset"
            )
        self.passes = task.index + 1

    def features(self, images: View) -> Tensor:
        return self.features_in(images, self.adapters.names)

    def features_in(self, images: View, names: Sequence[str]) -> Tensor:
        return self.trainer.features(images, lambda batch: self.ensemble(batch, names).movedim(0, 1))

    def spaces(self) -> dict[str, str]:
        return space_fingerprints(self.adapters, self.adapters.names, *self.trainer.speed.context)

    def logits(self, features: Tensor) -> Tensor:
        assert self.prototypes is not None, "learn a task first"
        return self.head(features, self.prototypes)
