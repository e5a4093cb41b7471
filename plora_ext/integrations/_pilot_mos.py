"""MOS in LAMDA-PILOT: `models/mos.py`."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext.integrations._patch import Original
from plora_ext.integrations._pilot_vit import adapter_features, is_served


def forward_features(original: Original, self: Any, x: Tensor, adapter_id: int, train: bool) -> dict[str, Tensor]:
    momentum, self.config.adapter_momentum = self.config.adapter_momentum, 0.0  # `reweight_adapter` does nothing
    try:
        features: dict[str, Tensor] = original(self, x, adapter_id, train)
    finally:
        self.config.adapter_momentum = momentum
    return features


def eval_cnn(original: Original, self: Any, loader: Any, *, as_shipped: bool) -> tuple[np.ndarray, np.ndarray]:
    network = self._network.eval()
    backbone = network.backbone
    if not is_served(backbone) or len(backbone.adapter_list) <= self._cur_task:
        return original(self, loader)
    task_of = torch.tensor([self.cls2task[c] for c in range(self._total_classes)], device=self._device)
    predicted, targets, orig_right = [], [], []
    with torch.no_grad():
        for _, images, labels in loader:
            adapters = _mos_adapters(backbone, self._cur_task + 1, as_shipped)
            parts = adapter_features(backbone, images.to(self._device), adapters)
            features = torch.cat(parts, 1)  # [B, T, D]
            # The first adapter is never moved: its features are also those of `forward_orig`.
            orig_logits = network.fc(features[:, 0])["logits"][:, : self._total_classes]
            logits = backbone(features, fc_only=True)["logits"][..., : self._total_classes]
            orig = orig_logits.max(dim=1)[1]
            next_task, chosen, row = task_of[logits.max(dim=2)[1]], task_of[orig], torch.arange(len(orig))
            for _ in range(3):  # four looks at most; where a choice confirms itself it stays
                chosen = next_task[row, chosen]
            outputs = logits[row, chosen]
            if self.ensemble:
                sharpened = F.softmax(orig_logits / (1 / (self._cur_task + 1)), dim=1)
                outputs = F.softmax(outputs, dim=1) + sharpened
            predicted.append(torch.topk(outputs, k=self.topk, dim=1, largest=True, sorted=True)[1])
            orig_right.append(orig == labels.to(orig.device))
            targets.append(labels)
    right = torch.cat(orig_right)
    percent = right.sum().cpu().numpy() * 100 / len(right)
    logging.info(f"the accuracy of the original model:{np.around(percent, 2)}")
    return torch.cat(predicted).cpu().numpy(), torch.cat(targets).numpy()


class _Factor:
    """An adapter of one block with weights of its own."""

    def __init__(self, adapter: Any, weights: dict[str, Tensor]) -> None:
        self.scale = adapter.scale
        self.down_proj, self.up_proj = (
            type("Linear", (), {"weight": weights[f"{side}.weight"], "bias": weights[f"{side}.bias"]})
            for side in ("down_proj", "up_proj")
        )


def _mos_adapters(backbone: Any, count: int, as_shipped: bool) -> list[Any]:
    """The adapters of one test batch; as shipped, block l sees them moved l + 1 times, and all are moved at the end.

    w <- (1 - a) w + a m, towards the mean m of its predecessors, k times, gives (1 - a)^k w + (1 - (1 - a)^k) m.
    """
    a = backbone.config.adapter_momentum
    if not as_shipped or a == 0:
        return list(backbone.adapter_list[:count])
    sums = {
        "down_proj.weight": backbone.down_weight_sum, "down_proj.bias": backbone.down_bias_sum,
        "up_proj.weight": backbone.up_weight_sum, "up_proj.bias": backbone.up_bias_sum,
    }  # fmt: skip
    depth, result = len(backbone.blocks), [backbone.adapter_list[0]]
    for task in range(1, count):
        moved = []
        for block, adapter in enumerate(backbone.adapter_list[task]):
            seen = {}
            for name, of_blocks in sums.items():
                parameter, mean = adapter.get_parameter(name), of_blocks[block][task - 1] / task
                seen[name] = torch.lerp(mean, parameter.data, (1 - a) ** (block + 1))
                parameter.data = torch.lerp(mean, parameter.data, (1 - a) ** depth)
            moved.append(_Factor(adapter, seen))
        result.append(moved)
    return result
