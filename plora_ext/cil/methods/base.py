"""What every method is: prototypes and a head over features, with adapters or without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plora_ext.cil import fusion
from plora_ext.cil.alignment import class_means
from plora_ext.cil.heads import HEADS, Head
from plora_ext.cil.packing import adapters_state, is_plain, pack, restore_adapters, to_device
from plora_ext.cil.settings import Settings
from plora_ext.cil.stream import Task
from plora_ext.cil.training import Trainer, lower_on_exhaustion
from plora_ext.data import View
from plora_ext.nn import Adapters, inject


class Method(ABC):
    """Frozen features and nearest class means: what every method here starts from.

    Under many processes all of them learn the same: images are divided (plora_ext.cil.distributed), results are not.

    Attributes:
        prototypes: One row per class seen, in the class order.
        head: What classifies by them or by what it learns (plora_ext.cil.heads).
        passes: Forward passes of the backbone that one prediction takes.
        trainable: Numbers that the last training optimised, beside the directions that serve it as a classifier.
    """

    STATE: tuple[str, ...] = ("prototypes", "passes", "trainable")  # what a checkpoint holds whatever it is
    prototypes: Tensor | None = None

    def __init__(self, trainer: Trainer, settings: Settings):
        self.trainer, self.settings, self.world = trainer, settings, trainer.world
        self.head: Head = HEADS[settings.head](settings, trainer.device)
        self.passes, self.trainable = 1, 0

    @abstractmethod
    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        """Learns a task.

        Args:
            images: Its n training images.
            labels: int64 [n], counted from 0 within the task.
        """

    def features(self, images: View) -> Tensor:
        """Features of n images in the current space; [n, D], or [n, T, D] for an ensemble."""
        return self.trainer.features(images)

    def spaces(self) -> dict[str, str] | None:
        """The adapters whose spaces the features are in, each with a fingerprint of all that these depend on.

        None where the features of an image change with every task, so that there is no use in keeping them.
        """
        return None

    def features_in(self, images: View, names: Sequence[str]) -> Tensor:
        """Features [n, len(names), D] of images in some of the `spaces`."""
        return self.features(images)[:, None]

    def logits(self, features: Tensor) -> Tensor:
        """Logits [n, classes seen] of features in the current space, [n, D] or [n, 1, D]."""
        assert self.prototypes is not None, "learn a task first"
        return self.head(features.flatten(1), self.prototypes)

    def predict(self, images: View) -> Tensor:
        """Logits [n, classes seen] of images."""
        return self.logits(self.features(images))

    def state(self) -> dict[str, Any]:
        """What the method has learned so far, for a checkpoint: attributes that are tensors and plain values."""
        head = {f"head:{name}": value for name, value in self.head.state().items()}
        plain = [name for name, value in vars(self).items() if is_plain(value)]
        return {"method": {name: getattr(self, name) for name in dict.fromkeys([*self.STATE, *plain])}, **head}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned, in a method that has learned nothing yet."""
        for name, value in to_device(state["method"], self.trainer.device).items():
            setattr(self, name, value)
        head = {name.removeprefix("head:"): value for name, value in state.items() if name.startswith("head:")}
        if head:
            self.head.restore(to_device(head, self.trainer.device))

    def parameters(self) -> dict[str, float]:
        """`trainable`; `stored`, the numbers in all adapters; `stored_mb`, MiB of all that `state` holds.

        The last is what must be kept beside the backbone to classify and to go on: adapters, prototypes, statistics.
        """
        kept: dict[str, Tensor] = {}
        pack(self.state(), "", kept)
        stored = sum(tensor.numel() for name, tensor in kept.items() if name.startswith("/adapter:"))
        size = sum(tensor.nbytes for tensor in kept.values()) / 2**20
        return {"trainable": self.trainable, "stored": stored, "stored_mb": size}

    def _class_means(self, task: Task, features: Tensor, labels: Tensor) -> Tensor:
        """Of the task's classes; FloatingPointError where they are not finite."""
        means = class_means(features, labels, len(task.classes), self.world)
        if not means.isfinite().all():
            amp = self.settings.amp
            raise FloatingPointError(
                f"features of task {task.index} are not finite; the cause may be the images, the backbone's weights"
                + ("" if amp == "none" else f" or amp {amp}")
            )
        return means

    def _append_means(self, task: Task, images: View, labels: Tensor) -> None:
        """Appends the means of the task's classes to the prototypes."""
        with self.trainer.phases("prototypes"):
            own = self.world.rows(len(images))
            features = self.features(images[own])
            new = self._class_means(task, features, labels[own.to(labels.device)])
        self.prototypes = new if self.prototypes is None else torch.cat([self.prototypes, new])
        if self.head.learns:  # else nobody asks for the other processes' rows
            features = self.world.gather(features, len(images))
        self._teach(None, features, labels)

    def _teach(self, before: Tensor | None, after: Tensor, labels: Tensor) -> None:
        """Hands the features of a task to the head, if it learns from them."""
        if not self.head.learns:
            return
        assert self.prototypes is not None
        size = "projections" if self.settings.head == "ranpac" else "covariance_rank (null: as large as the features)"
        with self.trainer.phases("head"), lower_on_exhaustion(size):
            self.head.learn(self.prototypes, before, after, labels)


class _Adapted(Method):
    """A method with adapters, those given or new ones in the trainer's model."""

    def __init__(self, trainer: Trainer, settings: Settings, adapters: Adapters | None = None):
        super().__init__(trainer, settings)
        s = settings
        if any(parameter.is_inference() for parameter in trainer.model.parameters()):
            raise ValueError(
                "the backbone was made under torch.inference_mode, where nothing can train: make it outside"
            )
        self.adapters = adapters or inject(trainer.model, s.target_modules, s.r, s.lora_alpha, s.lora_dropout)

    def state(self) -> dict[str, Any]:
        return {**adapters_state(self.adapters), **super().state()}

    def restore(self, state: dict[str, Any]) -> None:
        restore_adapters(self.adapters, state)
        super().restore(state)

    def _fit(
        self,
        task: Task,
        images: View,
        labels: Tensor,
        extra: tuple[Tensor, ...] = (),
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        newest = self.adapters.parameters(self.adapters.names[-1])
        parameters = [*(p for p in newest if p.requires_grad), *extra]
        self.trainable = sum(p.numel() for p in parameters)
        with self.trainer.phases("train"), lower_on_exhaustion("batch_size in a new run"), self.trainer.speed.passes():
            self.trainer.fit(task.index, parameters, images, labels, len(task.classes), teacher)

    def _add_adapter(self, task: Task) -> None:
        """A new adapter; it alone is active and trains."""
        start = fusion.start(str(self.settings.init), self.adapters.names)
        self.adapters.add_adapter(f"task{task.index}", init_from=start)
