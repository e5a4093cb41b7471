"""Avalanche (https://github.com/ContinualAI/avalanche): PLoRA as a dynamic module, driven by a plugin.

    model = PLoRAModule(backbone)
    strategy = SupervisedTemplate(model=model, optimizer=..., plugins=[PLoRAPlugin()], ...)
    for experience in benchmark.train_stream:
        strategy.train(experience)

These classes derive from Avalanche's own, so importing this module imports Avalanche; nothing of it is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from plora_ext.cil.frozen import hold_statistics
from plora_ext.cil.plora import UNSEEN, PLoRA
from plora_ext.integrations._patch import check_version, require
from plora_ext.nn import CosineHead, PrototypeBank

_HOW = 'pip install "plora_ext[integrations]"'
_models: Any = require("avalanche.models", _HOW)
_core: Any = require("avalanche.core", _HOW)
TESTED = "0.6", "0.6"  # the oldest and the newest version
check_version("Avalanche", require("avalanche", _HOW).__version__, *TESTED, stacklevel=2)

__all__ = ["PLoRAModule", "PLoRAPlugin", "PrototypeClassifier", "PrototypePlugin"]


class PLoRAModule(_models.DynamicModule):
    """A backbone with one LoRA adapter per training experience; `forward` gives logits of all classes seen so far.

    `adaptation()` adds the adapter, as Avalanche asks of dynamic modules before it makes the optimizer; `PLoRAPlugin`
    does what needs the experience's data. Class ids may come in any order.

    Args:
        backbone: maps images to features [B, D]; changed in place.
        settings: those of `plora_ext.cil.PLoRA`: target_modules, r, lora_alpha, lora_dropout, alignment, tau, ridge,
            sought, init, scale, num_features.
    """

    def __init__(self, backbone: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.net = PLoRA(backbone, **settings)

    def adaptation(self, experience: Any) -> None:
        """A new adapter before training; before evaluation, logits as wide as the experience's classes ask for."""
        classes = [int(c) for c in experience.classes_in_this_experience]
        if self.training:
            self.net.add_task(classes)
        self.net.num_classes = max([self.net.num_classes, *(c + 1 for c in classes)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PLoRAPlugin(_core.SupervisedPlugin):
    """Starts each experience's classifier from its class means, and fuses and aligns after it.

    Args:
        batch_size: images per pass over an experience's data when nothing is trained; default the strategy's own.

    Raises:
        TypeError: the strategy's model is not a `PLoRAModule`.
        ValueError: the first batch of an experience holds images of other classes, as replay brings them.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._net(strategy).start(_batches(strategy, self.batch_size))

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_iterations:  # a look at every batch would make the host wait
            return
        classes = self._net(strategy).task_classes.tolist()
        if others := set(strategy.mb_y.tolist()).difference(classes):
            raise ValueError(
                f"batches must hold images of the experience's classes {classes} alone, got {sorted(others)}: no logit "
                "of another class trains, so leave out plugins that replay old images"
            )

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._net(strategy).end_task(_batches(strategy, self.batch_size))

    def _net(self, strategy: Any) -> PLoRA:
        if not isinstance(strategy.model, PLoRAModule):
            raise TypeError(f"PLoRAPlugin needs a strategy whose model is a PLoRAModule, got {type(strategy.model)}")
        return strategy.model.net


class PrototypeClassifier(_models.DynamicModule):
    """Nearest class mean by cosine, of features; its state_dict holds the means, and may be loaded at any size.

    Args:
        num_features: size of a feature.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.bank, self.head, self.num_classes = PrototypeBank(num_features), CosineHead(), 0

    def adaptation(self, experience: Any) -> None:
        self.num_classes = max([self.num_classes, *(int(c) + 1 for c in experience.classes_in_this_experience)])

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples to the means of their classes: features [N, D], labels [N]."""
        self.bank.update(features.float(), labels)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, number of classes]: cosines; -1000 for a class without a sample."""
        known = self.head(features, self.bank.prototypes).clamp(min=UNSEEN)
        return nn.functional.pad(known, (0, max(0, self.num_classes - known.shape[1])), value=UNSEEN)


class PrototypePlugin(_core.SupervisedPlugin):
    """After each experience, adds its data to a `PrototypeClassifier`.

    An extractor without a parameter that trains keeps its running statistics too, in training mode as well.

    Args:
        extractor: maps images to features; part of the strategy's model.
        classifier: the classifier to update.
        batch_size: as in `PLoRAPlugin`.
    """

    def __init__(self, extractor: nn.Module, classifier: PrototypeClassifier, batch_size: int | None = None) -> None:
        super().__init__()
        self.extractor, self.classifier, self.batch_size = extractor, classifier, batch_size

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if not any(parameter.requires_grad for parameter in self.extractor.parameters()):
            hold_statistics(self.extractor)

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        trains = strategy.model.training  # also after this: a stream may have been given as one, with more to come
        strategy.model.eval()
        for images, labels in _batches(strategy, self.batch_size):
            self.classifier.update(self.extractor(images), labels)
        strategy.model.train(trains)


def _batches(strategy: Any, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The experience's own images, as they look in evaluation."""
    dataset = strategy.experience.dataset.eval()
    for images, labels, *_ in DataLoader(dataset, batch_size or strategy.eval_mb_size):
        yield images.to(strategy.device), torch.as_tensor(labels, device=strategy.device)
