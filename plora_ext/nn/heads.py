"""Classifiers that compare features with prototypes by their cosine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.nn.prototypes import keep_exact, resize_buffers

__all__ = ["CosineHead", "SubspaceHead"]


class CosineHead(nn.Module):
    """logits[..., c] = scale * cos(features[...], prototypes[c]), in float32 or wider, under autocast too.

    Args:
        scale: factor of the cosines, a buffer that stays in float32.
    """

    scale: Tensor

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale), dtype=torch.float32))

    def forward(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """Logits `[..., C]` of features `[..., D]` for prototypes `[C, D]` (`PrototypeBank.prototypes`).

        A prototype of zeros stands for a class without data: its logit is -inf, so it is never predicted.

        Raises:
            ValueError: the feature sizes differ.
        """
        if prototypes.dim() != 2 or features.shape[-1] != prototypes.shape[-1]:
            raise ValueError(
                f"features [..., D] and prototypes [C, D] must share D, "
                f"got {list(features.shape)} and {list(prototypes.shape)}"
            )
        wide = torch.promote_types(torch.promote_types(features.dtype, prototypes.dtype), torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            directions = F.normalize(prototypes.to(wide), dim=-1)
            logits = self.scale * (F.normalize(features.to(wide), dim=-1) @ directions.T)
        return logits.masked_fill(~prototypes.any(dim=-1), -torch.inf)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CosineHead:
        keep_exact(self, ("scale",), lambda: super(CosineHead, self)._apply(fn, recurse))
        return self


class SubspaceHead(nn.Module):
    """The reweighted cosine head of EASE: every adapter is a subspace, a class counts most in the one of its task.

    logits[b, c] = sum_t w[c, t] cos(features[b, t], prototypes[c, t]), with w = 1 in the class's own subspace and
    alpha / (T - 1) in the others (`plora_ext.ops.own_other_weights`; arXiv 2403.12030).

    Args:
        alpha: weight that the other subspaces share; part of the state, where older files have none.

    Attributes:
        task_of_class: buffer `[C]` int64.
        weights: buffer `[C, T]` float32, from `task_of_class` and `alpha`; not part of the state.
    """

    task_of_class: Tensor
    weights: Tensor

    def __init__(self, alpha: float = 0.1) -> None:
        super().__init__()
        self.alpha = float(alpha)
        self.register_buffer("task_of_class", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(0, 0, dtype=torch.float32), persistent=False)

    def assign(self, task_of_class: Tensor | Sequence[int]) -> None:
        """Say which task each class came with; the number of subspaces T is the number of tasks.

        Raises:
            ValueError: not a one-dimensional sequence of task ids from 0.
        """
        tasks = torch.as_tensor(task_of_class)
        ids = tasks.to(self.task_of_class)
        if tasks.dim() != 1 or tasks.is_floating_point() or (ids.numel() and int(ids.min()) < 0):
            raise ValueError(f"task_of_class must be a sequence of task ids from 0, got {task_of_class}")
        self.task_of_class = ids
        self.weights = self._weights()

    def _weights(self) -> Tensor:
        num_tasks = int(self.task_of_class.max()) + 1 if self.task_of_class.numel() else 0
        return ops.own_other_weights(self.task_of_class, num_tasks, self.alpha)

    def forward(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """Logits `[B, C]` of features `[B, T, D]` for prototypes `[C, T, D]`, one product for all of them."""
        return ops.subspace_logits(features, prototypes, self.weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubspaceHead:
        keep_exact(self, ("weights",), lambda: super(SubspaceHead, self)._apply(fn, recurse))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "alpha"] = torch.tensor(self.alpha, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        resize_buffers(self, state_dict, prefix, ["task_of_class"])
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected: list[str] = args[3]
        unexpected[:] = [key for key in unexpected if key != prefix + "alpha"]
        self.alpha = float(state_dict.get(prefix + "alpha", self.alpha))
        self.weights = self._weights()
