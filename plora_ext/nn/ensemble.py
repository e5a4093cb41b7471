"""The forward of an ensemble: every adapter of a model on the same images, in one pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.memory import PeakMemory, limit_of_pass
from plora_ext.nn.adapters import BASE, Adapters
from plora_ext.nn.linear import MultiLoRALinear, Operands
from plora_ext.ops.autocast import autocast_dtype
from plora_ext.ops.autograd import narrow
from plora_ext.torch_private import is_eager, tree_map_only

__all__ = ["Ensemble"]

_OfLayers = dict[int, Operands]  # by the number of the layer


class Ensemble:
    """Features of the same images under every adapter: what `set_adapter(name); model(images)` gives for each name.

        features = Ensemble(adapters)(images)                 # [T, B, ...], features[t] of adapter names[t]

    What comes before the first adapted layer is the same for all adapters and runs once. That layer's T outputs are one
    `plora_ext.ops.lora_all`; from there on the model runs on T * B samples, adapter after adapter, and every adapted
    layer is one `plora_ext.ops.lora_indexed` with T segments. Where the batch is repeated is found by trying, once for
    each shape of image: at the innermost module around the first adapted layer whose first argument can be repeated.
    A model where that is nowhere gets plain repetition, or one adapter after the other, and a warning that says why.
    A single adapter has nothing to share: it runs as `set_adapter` has it.

    Passes are cut so that their intermediate results stay within `memory`, over images and, where one image is too
    much, over adapters. A cut changes what is in a batch and nothing else, so results differ between cuts only as far
    as torch's own operators give a sample other bits in a batch of another size. For a ViT in float32 on a CPU they
    do not, as long as layers see 16 rows or more; in 16 bits and on a GPU, where the library picks a kernel by the size
    of the product, cuts agree to rounding.

    The adapted layers must see the batch first in their input, as in `Adapters.batch`. There are no gradients here.
    Nothing waits for the device but the first call with a shape of image.

    Args:
        adapters: handle on the model, which must be in eval mode when called.
        memory: bytes that the intermediate results of a pass may take, the returned features not counted. `None`: half
            of the free memory of a GPU, and up to 1 GiB of a CPU's.
    """

    def __init__(self, adapters: Adapters, memory: int | None = None) -> None:
        if memory is not None and memory < 1:
            raise ValueError(f"memory must be a positive number of bytes, got {memory}")
        self.adapters, self.memory = adapters, memory
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._ids: dict[tuple[Any, ...], Tensor] = {}
        self._warned = False

    @torch.no_grad()
    def __call__(self, images: Tensor, names: str | Sequence[str] | None = None) -> Tensor:
        """Features `[T, B, ...]` of images `[B, ...]` under the adapters `names`, by default all.

        Args:
            images: the model's input.
            names: adapters, in any order; `"__base__"` is the model without one.

        Raises:
            KeyError: a name is unknown.
            ValueError: there are no names, or `memory` is too small for one image under one adapter.
            RuntimeError: the model is in training mode, or its adapters are merged.
            TypeError: the model does not return one tensor, or names are a set.
        """
        adapters, model = self.adapters, self.adapters.model
        adapters._state.require_unmerged()
        adapters._check_finite()
        if model.training:
            raise RuntimeError("an ensemble needs the model in eval mode: call model.eval() first")
        if isinstance(names, set | frozenset):
            raise TypeError("names must be in the order of the features, got a set")
        chosen = list(adapters.names if names is None else [names] if isinstance(names, str) else names)
        ids = [adapters._id_of(name) for name in chosen]
        if not ids:
            raise ValueError("names must hold at least one adapter, got none")
        if not len(images):
            with adapters.disabled():
                y = _tensor(model(images), 0)
            return y.expand(len(ids), *y.shape)
        plan = self._plan(images)
        operands: _OfLayers = {}
        T, B = len(ids), len(images)
        result: Tensor | None = None
        for t, b in _cuts(T, B, self._slabs_at_once(plan, images.device)):
            part = self._run(plan, images[b], ids[t], chosen[t], operands, alone=T == 1)
            if part.shape[:2] == (T, B):
                return part
            if result is None:
                result = part.new_empty(T, B, *part.shape[2:])
            result[t, b] = part
        assert result is not None
        return result

    # ------------------------------------------------------------------ one pass

    def _run(
        self, plan: _Plan, images: Tensor, ids: list[int], names: list[str], operands: _OfLayers, alone: bool
    ) -> Tensor:
        if plan.split is not None and not alone:
            on_device = self._on_device(ids, images.device)
            return self._pass(_Slabs(self.adapters, on_device, ids, len(images), plan.split, operands), images)
        features = []
        for name in names:  # one adapter after the other
            only = () if name == BASE else (name,)
            with self.adapters._state.within(names=only, coefficients=None, batch=None):
                features.append(_tensor(self.adapters.model(images), len(images)))
        return torch.stack(features)

    def _pass(self, slabs: _Slabs, images: Tensor) -> Tensor:
        hook = slabs.split.register_forward_pre_hook(slabs.repeat, prepend=True)
        try:
            with self.adapters._state.within(ensemble=slabs):
                y = _tensor(self.adapters.model(images), slabs.T * len(images))
        finally:
            hook.remove()
        return y.view(slabs.T, len(images), *y.shape[1:])

    def _on_device(self, ids: list[int], device: torch.device) -> Tensor:
        key = (*ids, device)
        if key not in self._ids:
            self._ids[key] = torch.tensor(ids, device=device)
        return self._ids[key]

    # ------------------------------------------------------------------ where the batch is repeated

    def _plan(self, images: Tensor) -> _Plan:
        autocast = autocast_dtype(images.device.type)
        key = images.shape[1:], images.dtype, images.device, autocast
        if key not in self._plans:
            self._plans[key] = self._make_plan(images, autocast)
        return self._plans[key]

    def _make_plan(self, images: Tensor, autocast: torch.dtype | None) -> _Plan:
        """Tries on two images and two stand-ins for adapters, which multiply what adapted layers give by 1 and by 2."""
        two = images[:2] if len(images) > 1 else images.repeat(2, *[1] * (images.dim() - 1))
        split, reason = None, ""
        try:
            first, expected = self._one_by_one(two)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # layers whose weight is read instead; whatever else it is, the loop will raise it
            reason = _line(error)
        else:
            eps = torch.finfo(autocast or first.base_layer.weight.dtype).eps
            # A sample in the place of another is off by about all of the difference; the rest is rounding.
            allowed = (expected[1] - expected[0]).norm() / 20 + 8 * eps * expected.norm()
            for module in self._around(first):
                try:
                    got = self._pass(_Probe(self.adapters, two, module), two).float()
                    off = (got - expected).norm()
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    reason = _line(error)
                    continue
                if off <= allowed:
                    split = module
                    break
                reason = "samples do not stay in their place"
        if (split is None or split is self.adapters.model) and not self._warned:
            self._warned = True
            what = "one adapter after the other" if split is None else "plain repetition of the images"
            warnings.warn(
                f"nothing is shared by the adapters of this ensemble, it runs by {what}: {reason}", stacklevel=5
            )
        fixed, slab = self._measure(split, two)
        return _Plan(split, fixed, slab)

    def _one_by_one(self, two: Tensor) -> tuple[MultiLoRALinear, Tensor]:
        """The adapted layer that is called first, and the features under each stand-in."""
        calls = [_Probe(self.adapters, two, None, factor) for factor in (1, 2)]
        features = []
        for probe in calls:
            with self.adapters._state.within(ensemble=probe):
                features.append(_tensor(self.adapters.model(two), 2).float())
        if calls[0].first is None:
            raise RuntimeError("the model calls none of its adapted layers")
        return calls[0].first, torch.stack(features)

    def _around(self, layer: MultiLoRALinear) -> Iterator[nn.Module]:
        """The layer and the modules around it, from the inside."""
        path = next(key for key, other in self.adapters.layers.items() if other is layer)
        while path:
            yield self.adapters.model.get_submodule(path)
            path = path.rpartition(".")[0]
        yield self.adapters.model

    # ------------------------------------------------------------------ how much at once

    def _measure(self, split: nn.Module | None, two: Tensor) -> tuple[int, int]:
        """Bytes of a pass: those that do not grow with it, and those of every slab, one image under one adapter."""
        if not PeakMemory.measures:
            return 0, 2**62  # a slab at a time
        peaks = []
        for n in (1, 2):
            with PeakMemory() as memory:
                if split is None:
                    with self.adapters.disabled():
                        self.adapters.model(two[:n].repeat(2, *[1] * (two.dim() - 1)))
                else:
                    self._pass(_Probe(self.adapters, two[:n], split), two[:n])
            peaks.append(memory.peak)
        slab = max((peaks[1] - peaks[0]) // 2, 1)
        return max(peaks[0] - 2 * slab, 0), slab

    def _slabs_at_once(self, plan: _Plan, device: torch.device) -> int:
        if self.memory is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return 2**62
            return max(1, (limit_of_pass(device) - plan.fixed) // plan.slab)
        slabs = (self.memory - plan.fixed) // plan.slab
        if slabs < 1:
            raise ValueError(
                f"memory (of a run: ensemble_memory) must be at least {(plan.fixed + plan.slab) / 2**20:.3g} MiB, what "
                f"one image under one adapter takes, got {self.memory / 2**20:.3g} MiB"
            )
        return slabs


@dataclass(frozen=True)
class _Plan:
    """Where the batch is repeated (`None`: nowhere, adapters take turns), and bytes: fixed and for every slab."""

    split: nn.Module | None
    fixed: int
    slab: int


class _Slabs:
    """What the adapted layers do in one pass: they call this instead of their own forward.

    Args:
        adapters: handle on the model.
        ids: the adapters, -1 for the base, on the device.
        numbers: the same on the host.
        B: images.
        split: the module that repeats its input T times, adapter after adapter; an adapted layer has no need to.
        operands: of the layers, as far as this or another pass of the same call has stacked them.
    """

    def __init__(
        self, adapters: Adapters, ids: Tensor, numbers: Sequence[int], B: int, split: nn.Module, operands: _OfLayers
    ) -> None:
        self.adapters, self.operands = adapters, operands
        self.ids, self.numbers, self.T, self.B, self.split = ids, numbers, len(numbers), B, split
        self.first: MultiLoRALinear | None = None
        self._shared: Tensor | None = None  # the first layer's input, alike for all adapters
        self._version: int | None = None
        self._repeated = False

    def repeat(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._repeated or isinstance(module, MultiLoRALinear):
            return None  # a module that is called again has T * B samples by now
        if id(self.adapters._state.current.ensemble) != id(self):
            return None  # another thread's call
        if not args:
            raise RuntimeError(f"{type(module).__name__} is called without positional arguments")
        self._repeated = True
        return tree_map_only(Tensor, lambda t: t.repeat(self.T, *[1] * (t.dim() - 1)), args[0]), *args[1:]

    def __call__(self, layer: MultiLoRALinear, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = layer
            self._shared, self._version = x, None if x.is_inference() else x._version
        elif self._shared is not x or self._version is None or self._version != x._version:
            if x.dim() < 2 or not x.shape[0] or x.shape[0] % (self.T * self.B):
                raise RuntimeError(f"a layer sees {list(x.shape)} where it should see {self.T * self.B} samples")
            return self.each(layer, x.reshape(self.T, -1, x.shape[-1])).view(*x.shape[:-1], -1)
        rows = x[: x.shape[0] // self.T] if self._repeated else x
        return self.all(layer, rows).flatten(0, 1)

    def all(self, layer: MultiLoRALinear, x: Tensor) -> Tensor:
        """[T, B, ..., out] of x [B, ..., in], the same for all adapters."""
        if -1 in self.numbers:
            return self.each(layer, x.expand(self.T, *x.shape))
        lora_A, lora_B, scaling, ranks, slices = self._operands(layer, x)
        if self.numbers != list(range(len(layer.r))):
            lora_A, lora_B, scaling = lora_A[self.ids], lora_B[self.ids], scaling[self.ids]
            ranks = None if ranks is None else ranks[self.ids]
        return ops.lora_all(x, lora_A, lora_B, scaling, ranks=ranks, slices=slices, **layer.frozen_part(x))

    def each(self, layer: MultiLoRALinear, x: Tensor) -> Tensor:
        """[T, ..., out] of x [T, ..., in], a slab for each adapter."""
        lora_A, lora_B, scaling, ranks, slices = self._operands(layer, x)
        return ops.lora_indexed(
            x, self.ids, lora_A, lora_B, scaling, ranks=ranks, slices=slices, **layer.frozen_part(x)
        )

    def _operands(self, layer: MultiLoRALinear, x: Tensor) -> Operands:
        if layer._number not in self.operands:
            names = tuple(layer.r)
            found = layer.beside(x, names) if is_eager() and names else layer.operands(names)
            self.operands[layer._number] = narrow(found[0], x.dtype), narrow(found[1], x.dtype), *found[2:]
        return self.operands[layer._number]


class _Probe(_Slabs):
    """A pass with stand-ins for adapters: the base layer's output, times 1, times 2, ...

    Args:
        adapters: handle on the model.
        images: what goes in.
        split: as in `_Slabs`; `None`: nothing is repeated, and there is but one stand-in, `factor`.
        factor: of the only stand-in.
    """

    def __init__(self, adapters: Adapters, images: Tensor, split: nn.Module | None, factor: int = 0) -> None:
        factors = [1, 2] if split is not None else [factor]
        ids = torch.tensor(factors, device=images.device)
        super().__init__(adapters, ids, factors, len(images), split if split is not None else nn.Module(), {})

    def all(self, layer: MultiLoRALinear, x: Tensor) -> Tensor:
        y: Tensor = layer.base_layer(x)
        return y * self.ids.to(y.dtype).view(-1, *[1] * y.dim())

    def each(self, layer: MultiLoRALinear, x: Tensor) -> Tensor:
        y: Tensor = layer.base_layer(x)
        return y.mul_(self.ids.to(y.dtype).view(-1, *[1] * (y.dim() - 1)))


def _cuts(T: int, B: int, slabs: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of adapters and of images, of at most `slabs` slabs: all adapters together where that is possible."""
    for b in _even(B, max(1, slabs // T)):
        for t in _even(T, slabs):
            yield t, b


def _even(n: int, most: int) -> list[slice]:
    """0 ... n in as few ranges of at most `most` as there can be, all about as long."""
    number = math.ceil(n / min(most, n))
    marks = [n * i // number for i in range(number + 1)]
    return [slice(a, b) for a, b in pairwise(marks)]


def _tensor(output: Any, samples: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"the model of an ensemble must return one tensor, got {type(output).__name__}")
    if not output.dim() or len(output) != samples:
        raise RuntimeError(f"the model returns {list(output.shape)} for {samples} samples")
    return output


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
