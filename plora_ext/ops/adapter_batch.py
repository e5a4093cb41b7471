"""Adapter ids that were checked once, where they were made, so that no kernel launch has to wait for a look at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class AdapterBatch:
    """Which adapter every sample (or row) of a batch uses; pass it wherever an operator takes `ids`.

    Args:
        ids: integers, any shape: a tensor or a list. -1 stands for the base model alone.
        num_adapters: how many adapters there are.
        device: where the kernels will read the ids; default: where `ids` is.

    Raises:
        TypeError: ids are not integers.
        IndexError: an id is outside [-1, num_adapters).
    """

    def __init__(
        self, ids: Tensor | Sequence[int], num_adapters: int, device: torch.device | str | None = None
    ) -> None:
        if not isinstance(ids, Tensor) and any(isinstance(i, bool | str) for i in ids):
            raise TypeError(f"ids must be integers, got {list(ids)}")
        ids = torch.as_tensor(ids)
        if ids.numel() == 0:
            ids = ids.long()
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        if (
            ids.dtype != torch.uint8 and not ids.dtype.is_signed
        ):  # torch knows little of these; larger ones turn negative
            ids = ids.to(torch.int64)
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < num_adapters:
            bad = int(ids.max()) if int(ids.max()) >= num_adapters else int(ids.min())
            raise IndexError(f"ids must be between -1 (base only) and {num_adapters - 1}, got {bad}")
        self.ids = ids.to(device=device, dtype=torch.int64)
        self.num_adapters = num_adapters

    def to(self, device: torch.device | str) -> AdapterBatch:
        """The same ids on another device, not checked again."""
        moved = object.__new__(AdapterBatch)
        moved.ids, moved.num_adapters = self.ids.to(device), self.num_adapters
        return moved

    def __repr__(self) -> str:
        return f"AdapterBatch({tuple(self.ids.shape)} of {self.num_adapters} adapters, {self.ids.device})"
