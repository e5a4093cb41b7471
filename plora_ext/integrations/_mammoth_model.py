"""PLoRA as a model of Mammoth: `--model plora`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from plora_ext.cil.plora import PLoRA as Network
from plora_ext.integrations._patch import require


class Features(nn.Module):
    """A backbone of Mammoth as a module that returns its features."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        classifier = getattr(backbone, "classifier", None)
        self.num_features = getattr(backbone, "feature_dim", None) or getattr(classifier, "in_features", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x, returnt="features")


@cache
def make_model() -> type:
    """The class, derived from Mammoth's own."""
    module = require("models.utils.continual_model", "run in a checkout of Mammoth with its requirements")
    base: Any = module.ContinualModel

    class PLoRA(base):
        """One adapter per task, fused, with prototypes that follow the fused model."""

        NAME = "plora"
        COMPATIBILITY: ClassVar = ["class-il", "task-il"]

        @staticmethod
        def get_parser(parser: ArgumentParser) -> ArgumentParser:
            parser.set_defaults(optimizer="adamw", lr=3e-3, optim_wd=0.0)
            parser.add_argument("--lora_targets", type=str, nargs="+", default=["qkv", "proj"])
            parser.add_argument("--lora_r", type=int, default=16, help="rank of an adapter")
            parser.add_argument("--lora_alpha", type=float, default=None, help="scale times rank; default: the rank")
            parser.add_argument("--alignment", type=str, default="local")
            parser.add_argument("--plora_tau", type=float, default=0.05)
            parser.add_argument("--plora_ridge", type=float, default=0.1)
            return parser

        def __init__(
            self, backbone: Any, loss: nn.Module, args: Namespace, transform: nn.Module, dataset: Any = None
        ) -> None:
            net = Network(
                Features(backbone), args.lora_targets, args.lora_r, args.lora_alpha, args.alignment, args.plora_tau,
                args.plora_ridge,
            )  # fmt: skip
            super().__init__(net, loss, args, transform, dataset=dataset)
            net.num_classes = self.num_classes

        def get_parameters(self) -> list[nn.Parameter]:
            return self.net.parameters_to_train() if self.net.adapters.names else []

        def begin_task(self, dataset: Any) -> None:
            self.net.to(self.device)
            self.net.add_task(range(self.n_past_classes, self.n_seen_classes))
            self.net.start(self._batches(dataset))
            self.opt = self.get_optimizer()

        def observe(self, inputs: Tensor, labels: Tensor, not_aug_inputs: Tensor, epoch: int | None = None) -> float:
            self.opt.zero_grad()
            loss = self.loss(self.net(inputs), labels)
            loss.backward()
            self.opt.step()
            return float(loss)

        def end_task(self, dataset: Any) -> None:
            self.net.end_task(self._batches(dataset))

        def _batches(self, dataset: Any) -> Iterator[tuple[Tensor, Tensor]]:
            """The task's training images with the transform of its test images; some data sets name it nowhere else."""
            images, tests = dataset.train_loader.dataset, dataset.test_loaders[-1].dataset
            transform = images.transform
            images.transform = (
                getattr(tests, "transform", None) or getattr(self.dataset, "TEST_TRANSFORM", None) or transform
            )
            try:
                for batch in DataLoader(images, self.args.batch_size):
                    yield batch[0].to(self.device), torch.as_tensor(batch[1]).to(self.device)
            finally:
                images.transform = transform

    return PLoRA
