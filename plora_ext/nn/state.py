"""What the adapted layers of a model share: which adapters act, by how much, and on which sample.

`set_adapter` is for everybody who uses the model. What holds for a `with` block alone (`Adapters.batch`, `disabled`, a
pass of an `Ensemble`) is seen by the thread, and the asyncio task, that entered it and by nobody else.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from plora_ext import ops
from plora_ext.torch_private import in_backward

__all__ = ["Active", "State"]

_CHECKPOINT, _RECOMPUTE = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__


@dataclass(frozen=True, eq=False)
class Active:
    """What adapted layers compute with.

    Attributes:
        names: the active set.
        coefficients: `[len(names)]`, `None` for ones.
        written: the coefficients as numbers, where they were given so.
        batch: an adapter for every sample, in place of the set.
        weights: a weight for every layer, by its number, in place of base layer and adapters (`Adapters.frozen`).
        ensemble: takes over a layer's forward (`Ensemble`).
        serial: tells coefficients and batches apart that are not told by numbers; an `id` may come again.
    """

    names: tuple[str, ...] = ()
    coefficients: Tensor | None = None
    written: tuple[float, ...] | None = None
    batch: ops.AdapterBatch | None = None
    weights: dict[int, Tensor] | None = None
    ensemble: Callable[..., Tensor] | None = None
    serial: int = field(default_factory=itertools.count().__next__)

    def only(self, names: tuple[str, ...]) -> Active:
        """The same with the adapters `names`, in the order of the active set, alone."""
        keep = [i for i, name in enumerate(self.names) if name in names]
        coefficients, written = self.coefficients, self.written
        if coefficients is not None and len(keep) < len(self.names):
            parts = coefficients.split(1)
            coefficients = torch.cat([parts[i] for i in keep]) if keep else None
            written = None if written is None or not keep else tuple(written[i] for i in keep)
        return replace(self, names=tuple(self.names[i] for i in keep), coefficients=coefficients, written=written)

    @cached_property
    def rests(self) -> bool:
        """Whether the base layer is all there is."""
        return not (self.names or self.batch or self.weights is not None or self.ensemble)

    @cached_property
    def adds(self) -> bool:
        """Whether the set acts on all samples, beside the base layer."""
        return bool(self.names) and self.batch is None and self.weights is None and self.ensemble is None

    @cached_property
    def picks(self) -> bool:
        """Whether every sample has an adapter of its own, beside the base layer."""
        return self.batch is not None and self.weights is None and self.ensemble is None

    @cached_property
    def alone(self) -> str | None:
        """The adapter that acts on all samples, where it is one and nothing else is asked for."""
        return self.names[0] if self.adds and len(self.names) == 1 and self.coefficients is None else None

    @cached_property
    def key(self) -> int:
        """The same number for the same adapters with the same coefficients."""
        coefficients = None if self.coefficients is None else self.serial if self.written is None else self.written
        others = None if self.batch is None and self.weights is None else self.serial
        return hash((self.names, coefficients, others)) & 0x7FFFFFFF


class _Block:
    """What a `with` block changes, and what comes of it."""

    def __init__(self, changes: dict[str, Any]):
        self.changes = {**changes, "serial": Active().serial}
        self.on: Active | None = None
        self.result = Active()

    def over(self, below: Active) -> Active:
        if self.on is not below:
            self.on, self.result = below, replace(below, **self.changes)
        return self.result


class Checkpoints:
    """What reentrant checkpoints are to compute again as they computed it before.

    Attributes:
        met: whether there has been one.
    """

    def __init__(self) -> None:
        self.met = False

    def agree(self, key: Any) -> bool:
        """Notes with those around the caller what they compute; whether those that compute again know it.

        key: anything with a hash; `None` is not noted, and known where nothing is.
        """
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _CHECKPOINT and key is not None:
                self.met = True
                frame.f_locals["ctx"].__dict__.setdefault("plora_ext_keys", set()).add(key)
            elif frame.f_code is _RECOMPUTE and key not in getattr(frame.f_locals["ctx"], "plora_ext_keys", {None}):
                return False
            frame = frame.f_back  # type: ignore[assignment]
        return True


_Blocks = dict[int, tuple[_Block, ...]]
_blocks: ContextVar[_Blocks | None] = ContextVar("plora_ext_blocks", default=None)  # by state: those of this thread


class State:
    """The `Active` of a model, one object for all its layers.

    Attributes:
        common: what `set_adapter` said last.
        merged: the adapters that are part of the base weights, as they were active; `None` where there are none.
        unchecked: adapters that were added, loaded or trained since they were last found to be finite.
        checkpoints: the reentrant ones that a layer has been within.
        layers: the layers whose state this is.
        defaults: rank and alpha of new adapters, as `inject` was told.
    """

    def __init__(self, r: int = 16, lora_alpha: float | None = None) -> None:
        self.defaults = r, lora_alpha
        self.common = Active()
        self.merged: Active | None = None
        self.unchecked: set[str] = set()
        self.layers: WeakSet[nn.Module] = WeakSet()
        self._members = 0
        self._open: list[tuple[_Block, ...]] = []  # of every thread that is in a block
        self._latest = self.common  # for compiled graphs, which cannot ask who runs them
        self.checkpoints = Checkpoints()

    def join(self, layer: nn.Module) -> int:
        """Takes in one more layer; returns a number that is its own for good."""
        self.layers.add(layer)
        self._members += 1
        return self._members - 1

    def choose(
        self,
        names: str | Sequence[str] | None,
        coefficients: Tensor | Sequence[float] | None,
        layer: Any,
    ) -> None:
        """Make `names` of a layer's adapters the active set: `Adapters.set_adapter`."""
        self.require_unmerged()
        chosen = as_names(names, layer.adapter_names, ordered=coefficients is not None)
        coeff = as_coefficients(chosen, coefficients, layer)
        written = None if coefficients is None or isinstance(coefficients, Tensor) else tuple(map(float, coefficients))
        self.set(Active(tuple(chosen), coeff, written))

    def require_unmerged(self) -> None:
        """Raise RuntimeError where adapters are merged."""
        if self.merged is not None:
            raise RuntimeError("the adapters are merged into the base weight: call unmerge() first")

    def set(self, active: Active) -> None:
        """What holds from now on, in every thread."""
        self.common = active
        self._latest = self._of(self._open[-1]) if self._open else active

    @property
    def current(self) -> Active:
        """What holds here and now."""
        if torch.compiler.is_compiling():
            return self._latest
        if not self._open:
            return self.common
        blocks = (_blocks.get() or {}).get(id(self))
        if blocks is None and in_backward():
            # Backward passes on a GPU run in threads of torch's own: they belong to whoever is in a block.
            if len({id(first) for first, *_ in self._open}) > 1:
                raise RuntimeError(
                    "a layer is computed again within a backward pass while several threads are inside of "
                    "Adapters.batch or disabled(): it cannot be told which of them it belongs to. Let one thread at a "
                    "time train with activation checkpointing"
                )
            blocks = self._open[-1]
        return self.common if blocks is None else self._of(blocks)

    def _of(self, blocks: tuple[_Block, ...]) -> Active:
        active = self.common
        for block in blocks:
            active = block.over(active)
        return active

    @property
    def in_block(self) -> bool:
        """Whether any thread is inside of a `with` block."""
        return bool(self._open)

    @contextmanager
    def within(self, **changes: Any) -> Iterator[None]:
        """These fields of `Active` are others for the while, for this thread."""
        before = _blocks.get() or {}
        blocks = (*before.get(id(self), ()), _Block(changes))
        token = _blocks.set({**before, id(self): blocks})
        self._open.append(blocks)
        self._latest = self._of(blocks)
        try:
            yield
        finally:
            _blocks.reset(token)
            self._open.remove(blocks)
            self._latest = self._of(self._open[-1]) if self._open else self.common

    # ------------------------------------------------------------------ activation checkpointing

    def check_recomputation(self, active: Active) -> None:
        """Raise RuntimeError where a reentrant checkpoint computes a layer again with other adapters than before.

        (A checkpoint that is not reentrant compares what is saved, see `mark`.)
        """
        if (self.checkpoints.met or not torch.is_grad_enabled()) and not self.checkpoints.agree(active.key):
            raise RuntimeError(
                "the active adapters are not those of the forward pass that activation checkpointing computes "
                "again: call backward() before set_adapter and within the block of Adapters.batch, or "
                "checkpoint(..., use_reentrant=False)"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry no block and no graph: coefficients that are a result of other tensors are detached.
        def kept(active: Active | None) -> Active | None:
            if active is None or active.coefficients is None or active.coefficients.is_leaf:
                return active
            return replace(active, coefficients=active.coefficients.detach())

        state = {"common": kept(self.common), "merged": kept(self.merged)}
        return {**state, "unchecked": set(self.unchecked), "members": self._members, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state.get("defaults", ()))  # type: ignore[misc]
        self.common = self._latest = state["common"]
        self.merged, self.unchecked, self._members = state["merged"], state["unchecked"], state["members"]


def require_layer(layer: Any) -> Any:
    """The layer; RuntimeError where it was unloaded from its model, or is None."""
    if layer is None or layer not in layer._state.layers:
        raise RuntimeError("these adapters were unloaded: inject the model again")
    return layer


def check_known(name: str, known: Collection[str]) -> None:
    """Raise KeyError where there is no adapter of this name."""
    if name not in known:
        raise KeyError(f"unknown adapter {name!r}, known ones are {list(known)}")


def as_names(names: str | Sequence[str] | None, known: Collection[str], ordered: bool = False) -> list[str]:
    """One name, several or none as a list; KeyError where one is unknown, ValueError where one repeats.

    TypeError where they should be `ordered` and are a set.
    """
    if ordered and isinstance(names, set | frozenset):
        raise TypeError(f"names must be in an order, such as that of their coefficients, got a {type(names).__name__}")
    chosen = [] if names is None else [names] if isinstance(names, str) else list(names)
    for name in chosen:
        check_known(name, known)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"names must not repeat, got {chosen}")
    return chosen


def as_coefficients(names: Sequence[str], values: Tensor | Sequence[float] | None, layer: Any) -> Tensor | None:
    """`[len(names)]` on a layer's device, numbers in the dtype of its scales; `None` for ones.

    Raises:
        ValueError: it is not one for each name in one tensor.
    """
    if values is None:
        return None
    if isinstance(values, list | tuple) and any(isinstance(v, Tensor) and v.requires_grad for v in values):
        raise ValueError(
            "coefficients that require gradients must be one tensor, which gradients can reach, got several"
        )
    coeff = values if isinstance(values, Tensor) else torch.tensor(values, dtype=layer.scale_dtype)
    if coeff.shape != (len(names),) or not coeff.is_floating_point():
        raise ValueError(
            f"coefficients must be {len(names)} floats, one for each of {names}, "
            f"got {tuple(coeff.shape)} of {coeff.dtype}"
        )
    return coeff if coeff.requires_grad else coeff.to(layer.device)  # a copy would not follow what an optimizer does


class _Mark(torch.autograd.Function):
    """x as it is; saves an empty tensor whose width is the key of what is active.

    A checkpoint that is not reentrant compares the shapes of what is saved in the forward pass and in its
    recomputation, so that other adapters there are an error of torch's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: int) -> Tensor:
        ctx.save_for_backward(x.new_empty(0, key))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.saved_tensors  # noqa: B018 - this is what makes a checkpoint compare
        return grad, None


def mark(t: Tensor, active: Active) -> Tensor:
    """`t`, marked by what is active, if it asks for a gradient: where something keeps an eye on saved tensors."""
    if t.requires_grad:
        marked: Tensor = _Mark.apply(t, active.key)
        return marked
    return t
