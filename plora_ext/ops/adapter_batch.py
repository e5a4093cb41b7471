"""Adapter ids that were checked once, where they were made, so that no kernel launch has to wait for a look at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plora_ext.ops import rules

_Sorted = tuple["AdapterBatch", Tensor, Tensor]  # what `_sort` makes


class AdapterBatch:
    """Which adapter every sample (or row) of a batch uses; pass it wherever an operator takes `ids`.

    More than 512 samples that are not sorted by their adapters are sorted once, here: where many adapters meet in the
    rows that a GPU's kernel takes at a time, it takes the rows sorted, up to five times as fast. (Of a plain tensor
    nobody knows whether it is sorted, without waiting for the GPU.) So `ids` are not to be written to: other ids are
    another batch.

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
        ids = ids.to(torch.int64)  # of some integers torch knows little; what is too large turns negative
        if ids.numel():
            flat = ids.flatten()
            low, high, falls = torch.stack([flat.min(), flat.max(), (flat[1:] < flat[:-1]).sum()]).tolist()
            if not -1 <= low <= high < num_adapters:
                bad = high if high >= num_adapters else low
                raise IndexError(f"ids must be between -1 (base only) and {num_adapters - 1}, got {bad}")
        self.ids = ids.to(device)
        self.num_adapters = num_adapters
        self._sorted = self._sort() if ids.numel() > rules.FEW_SAMPLES and falls else None
        self._writes = _writes(self.ids)

    def _sort(self) -> _Sorted:
        """The ids sorted, those of one adapter in the order they have; which sample is there; where each sample is."""
        ids = self.ids.flatten()
        samples = ids.argsort(stable=True)
        places = torch.empty_like(samples)
        places[samples] = torch.arange(len(samples), device=samples.device)
        return self._like(ids[samples], None), samples, places

    def _like(self, ids: Tensor, own: _Sorted | None) -> AdapterBatch:
        made = object.__new__(AdapterBatch)
        made.ids, made.num_adapters, made._sorted, made._writes = ids, self.num_adapters, own, _writes(ids)
        return made

    def in_order(self, x: Tensor, lora_A: Tensor, run: Callable[[Tensor, AdapterBatch], Any]) -> Any:
        """run(x, self), which is y or None, for x [*ids.shape, ..., in] and lora_A [T, r, in]: of sorted samples where
        that pays. Not for code that is compiled or transformed.

        Raises:
            RuntimeError: the ids were written to since they were sorted.
        """
        lead = self.ids.dim()
        if self._sorted is None or not (isinstance(x, Tensor) and isinstance(lora_A, Tensor) and lora_A.dim() == 3):
            return run(x, self)
        if x.shape[:lead] != self.ids.shape or not self._pays(x, lora_A):
            return run(x, self)
        batch, samples, places = self._unwritten(self._sorted)
        y = run(Reorder.apply(x.reshape(-1, *x.shape[lead:]), samples, places), batch)
        if y is not None:
            y = Reorder.apply(y, places, samples).view(*self.ids.shape, *y.shape[1:])
        return y

    def _pays(self, x: Tensor, lora_A: Tensor) -> bool:
        rows = x.shape[self.ids.dim() : -1].numel()  # of a sample
        return x.is_cuda and rules.sorting_pays(self.num_adapters, rows, lora_A.shape[-2])

    def to(self, device: torch.device | str) -> AdapterBatch:
        """The same ids on another device, not checked again."""
        ids = self.ids.to(device)
        if ids is self.ids:
            return self
        if self._sorted is None:
            return self._like(ids, None)
        batch, samples, places = self._unwritten(self._sorted)
        return self._like(ids, (batch.to(device), samples.to(device), places.to(device)))

    def _unwritten(self, own: _Sorted) -> _Sorted:
        if _writes(self.ids) != self._writes:
            raise RuntimeError("ids of an AdapterBatch were written to after it was made: make another one")
        return own

    def __repr__(self) -> str:
        return f"AdapterBatch({tuple(self.ids.shape)} of {self.num_adapters} adapters, {self.ids.device})"


def _writes(ids: Tensor) -> int:
    """How often torch saw them written to; under inference mode it does not count."""
    return 0 if ids.is_inference() else ids._version


class Reorder(torch.autograd.Function):
    """x[order] of the first dimension, where x[order][back] is x: its gradient is no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return Reorder.apply(grad, back, order), None, None
