"""The methods that PLoRA is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from plora_ext.cil.frozen import refuse_adapters
from plora_ext.cil.methods.base import Method, _Adapted
from plora_ext.cil.settings import Settings
from plora_ext.cil.spaces import space_fingerprints
from plora_ext.cil.stream import Task
from plora_ext.cil.training import Trainer
from plora_ext.data import View
from plora_ext.nn import Ensemble
from plora_ext.nn.adapters import BASE


class SimpleCIL(Method):
    """`simplecil`: the frozen backbone's class means."""

    def features(self, images: View) -> Tensor:
        refuse_adapters(self.trainer.model)  # another learner may have been given the same backbone since
        return super().features(images)

    def spaces(self) -> dict[str, str]:
        return space_fingerprints(self.trainer.model, [BASE], *self.trainer.speed.context)

    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        self._append_means(task, images, labels)


class LoRASequential(_Adapted):
    """`lora-sequential`: one adapter, trained on and on; prototypes stay as they were when their class was new."""

    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        if task.index == 0:
            self._add_adapter(task)
        self._fit(task, images, labels)
        self._append_means(task, images, labels)


class LoRAFirst(_Adapted):
    """`lora-first`: an adapter trained on the first task only, class means from then on.

    First-session adaptation (Panos et al., ICCV 2023) with LoRA.
    """

    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        if task.index == 0:
            self._add_adapter(task)
            self._fit(task, images, labels)
        self._append_means(task, images, labels)

    def spaces(self) -> dict[str, str]:
        return space_fingerprints(self.adapters, self.adapters.names, *self.trainer.speed.context)


class APER(LoRAFirst):
    """`aper`: f(x) = [f_0(x), f_1(x)], the frozen model's features and those of `lora-first` side by side, [n, 2 D].

    `aper_adapter` (Zhou et al., IJCV 2024) with LoRA for its adapters. Two forward passes, made as one
    (`plora_ext.nn.Ensemble`).
    """

    def __init__(self, trainer: Trainer, settings: Settings):
        super().__init__(trainer, settings)
        self.ensemble, self.passes = Ensemble(self.adapters), 2

    def features(self, images: View) -> Tensor:
        return self.features_in(images, [BASE, *self.adapters.names]).flatten(1)

    def features_in(self, images: View, names: Sequence[str]) -> Tensor:
        return self.trainer.features(images, lambda batch: self.ensemble(batch, names).movedim(0, 1))

    def spaces(self) -> dict[str, str]:
        return space_fingerprints(self.adapters, [BASE, *self.adapters.names], *self.trainer.speed.context)


class Joint(LoRAFirst):
    """`joint`: all classes at once as a single task, the upper bound of this recipe; the loop hands it that task.

    It is evaluated as the others are, on the growing sets of classes, among these alone.
    """
