"""PLoRA as a learner of LAMDA-PILOT: "model_name": "plora" in one of its JSON files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from plora_ext.cil.plora import PLoRA
from plora_ext.graphs import Captured, why_not
from plora_ext.integrations._patch import require

# Keys of the JSON file beside PILOT's own, with their defaults.
DEFAULTS: dict[str, Any] = {
    "target_modules": ["qkv", "proj"], "r": 16, "lora_alpha": None, "alignment": "local", "tau": 0.05,
    "ridge": 0.1, "scale": 32.0, "epochs": 5, "lr": 3e-3, "weight_decay": 0.0, "num_workers": 8,
}  # fmt: skip


class Network(nn.Module):
    """What PILOT's BaseLearner evaluates: logits by name."""

    def __init__(self, plora: PLoRA) -> None:
        super().__init__()
        self.plora = plora
        self.feature_dim = plora.bank.num_features

    def extract_vector(self, images: Tensor) -> Tensor:
        """Features of the fused model."""
        return self.plora.backbone(images)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.plora(images)}


def make_learner() -> type:
    """The class, derived from PILOT's own."""
    base: Any = require("models.base", "run in a checkout of LAMDA-PILOT, or put it on sys.path").BaseLearner

    class Learner(base):
        """One adapter per task on a timm model, fused; the loop of PILOT's other learners."""

        def __init__(self, args: dict[str, Any]) -> None:
            super().__init__(args)
            self._known_classes = 0
            s = {name: args.get(name, default) for name, default in DEFAULTS.items()}
            if not isinstance(s["epochs"], int) or s["epochs"] < 1:
                raise ValueError(f"epochs must be a positive integer, got {s['epochs']!r}")
            self.settings, self.batch_size = s, args["batch_size"]
            backbone = timm.create_model(args["backbone_type"], pretrained=args.get("pretrained", True), num_classes=0)
            names = ("target_modules", "r", "lora_alpha", "alignment", "tau", "ridge", "scale")
            self._network = Network(PLoRA(backbone, **{name: s[name] for name in names})).to(self._device)

        def incremental_train(self, data_manager: Any) -> None:
            self._cur_task += 1
            self.data_manager = data_manager
            self._total_classes = self._known_classes + data_manager.get_task_size(self._cur_task)
            logging.info(f"Learning on {self._known_classes}-{self._total_classes}")
            new = np.arange(self._known_classes, self._total_classes)
            self.train_loader = self._loader(new, "train", "train", shuffle=True)
            self.train_loader_for_protonet = self._loader(new, "train", "test")
            self.test_loader = self._loader(np.arange(self._total_classes), "test", "test")
            plora = self._network.plora
            plora.add_task(new.tolist())
            plora.start(self._batches(self.train_loader_for_protonet))
            self._fit(plora)
            plora.end_task(self._batches(self.train_loader_for_protonet))

        def after_task(self) -> None:
            self._known_classes = self._total_classes

        def _loader(self, classes: np.ndarray, source: str, mode: str, shuffle: bool = False) -> DataLoader:
            dataset = self.data_manager.get_dataset(classes, source=source, mode=mode)
            return DataLoader(dataset, self.batch_size, shuffle, num_workers=self.settings["num_workers"])

        def _batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
            for _, images, labels in loader:
                yield images.to(self._device), labels.to(self._device)

        def _fit(self, plora: PLoRA) -> None:
            s = self.settings
            cuda = self._device.type == "cuda"  # there the learning rate is a number that a CUDA graph reads
            lr = torch.tensor(s["lr"], device=self._device) if cuda else s["lr"]
            optimizer = torch.optim.AdamW(
                plora.parameters_to_train(), lr, weight_decay=s["weight_decay"], fused=cuda or None, capturable=cuda
            )
            steps = s["epochs"] * len(self.train_loader)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            plora.train()

            def update(images: Tensor, labels: Tensor) -> Tensor:
                loss = F.cross_entropy(plora(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                return loss.detach()

            step = update if why_not(plora) else Captured(update)
            progress = tqdm(range(s["epochs"]))
            for epoch in progress:
                losses = torch.zeros((), device=self._device)
                for images, labels in self._batches(self.train_loader):
                    losses += step(images, labels)
                    scheduler.step()
                mean = float(losses) / len(self.train_loader)
                if not np.isfinite(mean):
                    raise FloatingPointError(f"the loss is {mean} in task {self._cur_task}; try a smaller lr")
                progress.set_description(f"Task {self._cur_task}, Epoch {epoch + 1}/{s['epochs']} => Loss {mean:.3f}")
            logging.info(f"Task {self._cur_task}: loss {mean:.3f}")

    return Learner
