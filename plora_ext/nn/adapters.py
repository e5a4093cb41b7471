"""A handle on the adapters of a model."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.nn.linear import MultiLoRALinear
from plora_ext.nn.state import State, as_coefficients, as_names, check_known, require_layer
from plora_ext.nn.targets import Rows, replace_module
from plora_ext.ops.autocast import autocast_dtype, without_autocast
from plora_ext.torch_private import PLAIN

__all__ = ["BASE", "Adapters"]

BASE = "__base__"  # PEFT's name for "no adapter" among adapter_names
_COMPILED = "__active__"  # what the active adapter is called inside of `compilable`


class Adapters:
    """A handle on the adapters of every `MultiLoRALinear` in a model.

    The state (factors, active set, coefficients) lives in the layers, so a handle can be made anew at any time, for
    example on a deep copy: `Adapters(copy.deepcopy(model))`.

    Threads may share a model for inference: `set_adapter` is for all of them, `batch`, `disabled` and what `frozen`
    gives for the thread (or asyncio task) alone that uses them. Adding, deleting, merging and training is for one at a
    time, and so is a compiled model: it computes by the block that was entered last, whoever calls it.

    Args:
        model: a model that `inject` has changed.
        r, lora_alpha: defaults for `add_adapter`, by default those of `inject`; with an r alone, alpha = r.

    Attributes:
        model: the model.
        layers: the adapted layers by module name.

    Raises:
        ValueError: the model carries no adapters, or parts of it that were injected apart differ in them or in
            the active set.
        RuntimeError: such a part is merged.
    """

    def __init__(self, model: nn.Module, r: int | None = None, lora_alpha: float | None = None) -> None:
        self.model = model
        self.layers: dict[str, MultiLoRALinear] = {
            name: module for name, module in model.named_modules() if isinstance(module, MultiLoRALinear)
        }
        if not self.layers:
            raise ValueError("model carries no adapters: call inject(model, target_modules) first")
        for key, layer in self.layers.items():
            if layer.adapter_names != self.names:
                raise ValueError(
                    f"all layers of model must have the same adapters in the same order, got {self.names} in "
                    f"{next(iter(self.layers))!r} and {layer.adapter_names} in {key!r}"
                )
        apart = [layer for layer in self.layers.values() if layer._state is not self._state]  # parts injected apart
        for state in {layer._state for layer in apart}:
            if state.merged is not None or self._state.merged is not None:
                raise RuntimeError("parts of model that were injected apart are merged: unmerge() each by its handle")
            if state.common.key != self._state.common.key:
                raise ValueError(
                    "parts of model that were injected apart must have the same active set, got "
                    f"{list(self._state.common.names)} and {list(state.common.names)}: set_adapter each by its handle"
                )
        for layer in apart:
            layer._join(self._state)
        usual = self._state.defaults
        self.r = usual[0] if r is None else r
        self.lora_alpha = usual[1] if r is None and lora_alpha is None else lora_alpha

    def __repr__(self) -> str:
        return f"Adapters(names={self.names}, active={self.active}, layers={len(self.layers)})"

    @property
    def names(self) -> list[str]:
        """Names of the adapters in the order in which they were added; id i of `batch` is `names[i]`."""
        return self._first.adapter_names

    @property
    def active(self) -> list[str]:
        """Names of the active set."""
        return self._first.active_adapters

    @property
    def _first(self) -> MultiLoRALinear:
        first: MultiLoRALinear = require_layer(next(iter(self.layers.values()), None))
        return first

    @property
    def _state(self) -> State:
        return self._first._state

    # ------------------------------------------------------------------ adding and choosing

    def add_adapter(
        self, name: str, init_from: str | None = None, r: int | None = None, lora_alpha: float | None = None
    ) -> None:
        """Add an adapter to every layer, make it the active one, and let it alone train.

        Args:
            name: a new name without dots.
            init_from: start from a copy of this adapter's A and B. Without it A is Kaiming-uniform (a = sqrt(5)) and B
                zero, so that the new adapter changes nothing yet.
            r: rank, default that of `inject` or of `init_from`.
            lora_alpha: alpha, default that of `inject` or of `init_from`.

        Raises:
            ValueError: the name is taken or not usable, r does not fit a layer or `init_from`, or alpha is not > 0.
            KeyError: `init_from` is unknown.
        """
        self._state.require_unmerged()
        self.check_new(name)
        check_alpha(lora_alpha)
        if init_from is not None:
            check_known(init_from, self.names)
        plans = {}
        for key, layer in self.layers.items():
            if init_from is None:
                rank = self.r if r is None else r
                default = rank if self.lora_alpha is None else self.lora_alpha
                check_rank(rank, key, layer, layer.slices)
            else:
                rank, default = layer.r[init_from], layer.lora_alpha[init_from]
                if r not in (None, rank):
                    raise ValueError(
                        f"r must be {rank}, that of adapter {init_from!r} (init_from) in layer {key!r}, got {r}: "
                        "leave r out, or init_from"
                    )
            plans[key] = rank, default if lora_alpha is None else lora_alpha

        def factors(layer: MultiLoRALinear, rank: int) -> Sequence[tuple[Tensor, Tensor]]:
            return layer.init_factors(rank) if init_from is None else layer.pairs(init_from)

        self._add(name, ((factors(self.layers[key], rank), alpha) for key, (rank, alpha) in plans.items()))
        self.set_adapter(name)
        self.train_adapter(name)

    def _add(self, name: str, adapters: Iterable[tuple[Sequence[tuple[Tensor, Tensor]], float]]) -> None:
        """Adds an adapter, factors and alpha for each layer, to all layers or to none."""
        layers = list(self.layers.values())
        try:
            for layer, (pairs, alpha) in zip(layers, adapters, strict=True):
                layer.add_adapter(name, pairs, alpha)
        except BaseException:  # out of memory, say
            for layer in layers:
                with suppress(KeyError):
                    layer.delete_adapter(name)
            raise

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; it leaves the active set first, with its coefficient.

        Raises:
            KeyError: the name is unknown.
            RuntimeError: inside of `batch` or `disabled`: the ids there would be those of other adapters.
        """
        self._state.require_unmerged()
        self._require_whole()
        check_known(name, self.names)
        if self._state.in_block:
            raise RuntimeError("adapters cannot be deleted inside of Adapters.batch or disabled(), here or in a thread")
        active = self._state.common
        self._state.set(active.only(tuple(other for other in active.names if other != name)))
        for layer in self.layers.values():
            layer.delete_adapter(name)

    def set_adapter(
        self, names: str | Sequence[str] | None, coefficients: Tensor | Sequence[float] | None = None
    ) -> None:
        """Choose the active set: y = base + sum_i c_i s_i B_i A_i x.

        Args:
            names: one name, several, or `None` for the base model alone.
            coefficients: c, one for each name, default ones. A tensor may require grad: gradients then reach it through
                every layer. What trains is not changed here (`train_adapter`).

        Raises:
            KeyError: a name is unknown.
            ValueError: a name occurs twice, the number of coefficients is wrong, or several tensors among them require
                gradients, which would not reach them.
            TypeError: the names of coefficients are a set, which has no order.
        """
        self._state.choose(names, coefficients, self._first)

    def train_adapter(self, name: str | Sequence[str] | None) -> None:
        """Let the named adapters train and freeze all others; `None` freezes all.

        Raises:
            KeyError: a name is unknown.

        Warns:
            UserWarning: the model is one in `DistributedDataParallel`, which knows what trained when it was made.
        """
        chosen = as_names(name, self.names)
        if chosen and any(isinstance(module, nn.parallel.DistributedDataParallel) for module in self.model.modules()):
            warnings.warn(
                "DistributedDataParallel sums the gradients of what trained when it was made, and of nothing else: "
                f"wrap the model anew, now that {chosen} train",
                stacklevel=2,
            )
        for other in self.names:
            for parameter in self.parameters(other):
                parameter.requires_grad_(other in chosen)
        self._state.unchecked.update(chosen)

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The A and B of adapter `name` in every layer, or of all adapters.

        Raises:
            KeyError: the name is unknown.
        """
        if name is not None:
            check_known(name, self.names)
        names = self.names if name is None else [name]
        return [p for layer in self.layers.values() for n in names for pair in layer.pairs(n) for p in pair]

    # ------------------------------------------------------------------ for a while

    @contextmanager
    def batch(self, adapters: ops.AdapterBatch | Tensor | Sequence[int] | Sequence[str]) -> Iterator[None]:
        """Give every sample its own adapter, in training too: `with adapters.batch(ids): model(x)`.

        Args:
            adapters: for each sample of the batch an index into `names` (-1 for the base alone) or a name
                (`"__base__"` for the base alone). Adapted layers must see the batch as their first dimension.
                In training, those train that `train_adapter` has named; set_adapter does not change that.
                With activation checkpointing, keep the backward pass inside the `with` block as well.

        Raises:
            IndexError: an id is out of range.
            KeyError: a name is unknown.
            TypeError: an id is no integer.
            ValueError: an adapter that does not train here holds inf or NaN. (Samples of several adapters share
                products, in which what a sample does not choose is multiplied by zero.) The forward pass raises it
                where it sees another number of samples.
            RuntimeError: the adapters are merged.
        """
        self._state.require_unmerged()
        self._check_finite()
        device = self._first.device
        if isinstance(adapters, ops.AdapterBatch):
            if adapters.num_adapters > len(self.names):
                raise IndexError(f"the batch was made for {adapters.num_adapters} adapters, there are {self.names}")
            batch = adapters.to(device)
        else:
            if isinstance(adapters, str | set | frozenset):
                raise TypeError(f"adapters must hold a name or an id for each sample, got {adapters!r}")
            ids = adapters if isinstance(adapters, Tensor) else [self._id_of(adapter) for adapter in adapters]
            if not isinstance(ids, Tensor) and self.model.training and torch.is_grad_enabled():
                self._warn_of_frozen(set(ids))
            batch = ops.AdapterBatch(ids, len(self.names), device)
        with self._state.within(batch=batch):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model alone: `with adapters.disabled(): model(x)`."""
        self._state.require_unmerged()
        with self._state.within(names=(), coefficients=None, batch=None):
            yield

    disable_adapter = disabled
    """PEFT's name."""

    @torch.no_grad()
    def frozen(self) -> Callable[..., Any]:
        """The model under the active set as it is now, as a function: gradients reach no more than its inputs.

        It holds a merged weight for every adapted layer, so that it stays what it is whatever becomes of the adapters,
        and costs no more than a plain model. Made under autocast, the weights have its dtype and the function runs
        under it.

            before = adapters.frozen()
            ...                                 # train, add, set_adapter
            before(images), model(images)       # the features of the old and of the new model

        Raises:
            RuntimeError: the adapters are merged.
        """
        self._state.require_unmerged()
        kind, active = self._first.device.type, self._state.current
        dtype = autocast_dtype(kind)
        weights = {}
        for layer in self.layers.values():
            weight = layer.merged_weight(active)
            # autocast leaves float64 as it is
            weights[layer._number] = weight.to(None if weight.dtype == torch.float64 else dtype, copy=True)

        def call(*inputs: Any) -> Any:
            wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
            autocast = torch.autocast(kind, dtype, enabled=dtype is not None)
            with self._state.within(weights=weights, batch=None), autocast, torch.set_grad_enabled(wanted):
                return self.model(*inputs)

        return call

    @contextmanager
    def merged(self) -> Iterator[None]:
        """What does not train is in the base weights for the while: `with adapters.merged(): model(x)`.

        For passes over much data. Without gradients that is the whole active set, and the model costs what it costs
        without adapters; otherwise the part of it that is frozen, and the rest is added to it as ever. It is the same
        function as before, up to rounding (and to `lora_dropout` in training mode, which drops nothing of what is
        merged). Writes to a merged adapter are seen after the block.

        Where adapters are merged already, inside of `batch` and `disabled`, or where a base weight trains, nothing
        changes.

        Raises:
            RuntimeError: a weight also belongs to a module without adapters, or the handle is on a part of the model.
        """
        if self._state.merged is not None or self._state.in_block:
            yield
            return
        active, gradients = self._state.common, torch.is_grad_enabled()
        trained = [active.coefficients, *(layer.base_layer.weight for layer in self.layers.values())]
        learns = gradients and any(t is not None and t.requires_grad for t in trained)
        frozen = tuple(
            name for name in active.names if not (gradients and any(p.requires_grad for p in self.parameters(name)))
        )
        if learns or not frozen:
            yield
            return
        self._merge(frozen)
        try:
            yield
        finally:
            self.unmerge()

    @contextmanager
    def compilable(self) -> Iterator[None]:
        """For passes through a compiled model: its graphs then serve every adapter, where each name would need its own.

        Without gradients the active set is merged into the base weights. With gradients, a single active adapter goes
        by a name that is always the same; several active adapters stay as they are.
        """
        active = self._state.common
        if not torch.is_grad_enabled():
            with self.merged():
                yield
        elif len(active.names) == 1 and active.coefficients is None:
            (name,) = active.names
            self._rename(name, _COMPILED)
            try:
                yield
            finally:
                self._rename(_COMPILED, name)
        else:
            yield

    def _rename(self, old: str, new: str) -> None:
        self._require_whole()
        for layer in self.layers.values():
            layer.rename_adapter(old, new)
        self._state.unchecked = {new if name == old else name for name in self._state.unchecked}
        active = self._state.common
        self._state.set(replace(active, names=tuple(new if name == old else name for name in active.names)))

    # ------------------------------------------------------------------ fusing and merging

    def fuse(
        self, names: Sequence[str], coefficients: Tensor | Sequence[float] | None = None, name: str = "fused"
    ) -> None:
        """Add the exact sum of adapters as one adapter of the summed rank, frozen and not active.

        A = [A_1; ...; A_n] and B = [c_1 s_1 B_1, ..., c_n s_n B_n] with scale 1, so that B A = sum_i c_i s_i B_i A_i.
        (Averaging the A and the B separately is another function altogether.)

        Args:
            names: adapters to fuse.
            coefficients: c, one for each name, default ones.
            name: name of the new adapter.

        Raises:
            KeyError: a name is unknown.
            ValueError: the new name is taken, names are empty or repeated, or the number of coefficients is wrong.
            TypeError: the names of coefficients are a set, which has no order.
        """
        chosen = as_names(names, self.names, ordered=coefficients is not None)
        if not chosen:
            raise ValueError("names must hold at least one adapter to fuse, got none")
        self.check_new(name)
        coeff = as_coefficients(chosen, coefficients, self._first)
        factors = [1.0] * len(chosen) if coeff is None else coeff.tolist()

        def fused(layer: MultiLoRALinear) -> tuple[Sequence[tuple[Tensor, Tensor]], float]:
            scales = [c * layer.lora_alpha[n] / layer.r[n] for c, n in zip(factors, chosen, strict=True)]
            pairs = [layer.pairs(n) for n in chosen]  # pairs[adapter][slice] = (A, B)
            made = [
                (
                    torch.cat([A.detach() for A, _ in of_slice]),
                    torch.cat([s * B.detach() for s, (_, B) in zip(scales, of_slice, strict=True)], dim=1),
                )
                for of_slice in zip(*pairs, strict=True)
            ]
            return made, made[0][0].shape[0]

        self._add(name, map(fused, self.layers.values()))

    def merge(self) -> None:
        """Write the active set into the base weights, in place, for the fastest inference (also when compiled).

        Until `unmerge`, `state_dict()` holds the merged weights (loading it warns of them), and the active set cannot
        be changed.

        Raises:
            RuntimeError: already merged, nothing is active, a weight also belongs to a module without adapters, or the
                handle is on a part of the model.
        """
        self._state.require_unmerged()
        if not self.active:
            raise RuntimeError("merge needs an active set of adapters: call set_adapter first")
        self._merge(self._state.common.names)

    def _merge(self, names: tuple[str, ...]) -> None:
        """Writes the adapters `names` of the active set into the base weights; the others stay active."""
        self._state.require_unmerged()
        self._require_whole()
        if self._state.in_block:
            raise RuntimeError("adapters cannot be merged inside of Adapters.batch or disabled(), here or in a thread")
        owners = Counter(id(p) for module in self.model.modules() for p in module._parameters.values())
        for key, layer in self.layers.items():
            if owners[id(layer.base_layer.weight)] > 1:
                raise RuntimeError(f"layer {key!r} shares its weight with another module, which merge would change too")
        active = self._state.common
        part, rest = active.only(names), active.only(tuple(name for name in active.names if name not in names))
        try:
            for layer in self.layers.values():
                layer.merge(part)
        except BaseException:  # out of memory, say
            for layer in self.layers.values():
                layer.unmerge()
            raise
        self._state.merged = active
        self._state.set(rest)

    def unmerge(self) -> None:
        """Restore the base weights to the bits they had before `merge`.

        Raises:
            RuntimeError: nothing is merged, or the handle is on a part of the model.
        """
        if self._state.merged is None:
            raise RuntimeError("unmerge needs merged adapters: call merge first")
        self._require_whole()
        for layer in self.layers.values():
            layer.unmerge()
        before, self._state.merged = self._state.merged, None
        self._state.set(before)

    def unload(self, merge: bool = True) -> nn.Module:
        """Put the original `nn.Linear` modules back and forget the adapters. Their handles are of no use afterwards.

        Args:
            merge: write the active set into their weights first (nothing active: they are as they were).

        Returns:
            The model, changed in place, or its linear layer where the model is one adapted layer; parameters stay
            frozen.
        """
        if merge and self.active and self._state.merged is None:
            self.merge()
        elif not merge and self._state.merged is not None:
            self.unmerge()
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if isinstance(module, MultiLoRALinear) and name:
                replace_module(self.model, name, module.base_layer)
        self._state.layers.difference_update(self.layers.values())
        self.layers = {}
        if isinstance(self.model, MultiLoRALinear):
            self.model = self.model.base_layer
        return self.model

    def merge_and_unload(self) -> nn.Module:
        """`unload(merge=True)`, by PEFT's name."""
        return self.unload()

    # ------------------------------------------------------------------ checks

    def _warn_of_frozen(self, ids: set[int]) -> None:
        """Some of the adapters of a training batch train and some do not: hardly what was meant."""
        chosen = [name for i, name in enumerate(self.names) if i in ids]
        frozen = [name for name in chosen if not self._first.pairs(name)[0][0].requires_grad]
        if 0 < len(frozen) < len(chosen):
            trained = [name for name in chosen if name not in frozen]
            warnings.warn(
                f"of the adapters of this batch {trained} train and {frozen} do not: "
                f"train_adapter({chosen}) trains them all",
                stacklevel=4,
            )

    def _check_finite(self) -> None:
        """Refuses adapters that are not finite, before samples of several share a product; once after each change."""
        cuda = self._first.device.type == "cuda"
        if not self._state.unchecked or (cuda and torch.cuda.is_current_stream_capturing()):
            return
        for name in [name for name in self.names if name in self._state.unchecked]:
            layers: list[Any] = [*self._state.layers]  # of the whole model
            parameters = [p for layer in layers if name in layer.r for pair in layer.pairs(name) for p in pair]
            factors = [p.detach() for p in parameters if p.numel() and not p.is_meta]
            trains = any(p.requires_grad for p in parameters)
            if trains and torch.is_grad_enabled():
                continue  # the loss will show it
            if factors and not _are_finite(factors):
                raise ValueError(
                    f"adapter {name!r} holds inf or NaN and would spoil samples of other adapters in the same batch: "
                    "delete_adapter, or train it anew with a smaller learning rate"
                )
            if not trains:
                self._state.unchecked.discard(name)

    def _require_whole(self) -> None:
        if (all_layers := len(self._state.layers)) > len(self.layers):
            raise RuntimeError(
                f"this handle is on {len(self.layers)} of the {all_layers} layers that share their adapters: take "
                "Adapters(model) of the whole model (a layer that was replaced counts while an older handle holds it)"
            )

    def check_new(self, name: str) -> None:
        """Raise ValueError unless `name` can be given to a new adapter, RuntimeError on a part of a model."""
        self._require_whole()
        if name in self.names:
            raise ValueError(f"adapter {name!r} exists already, known ones are {self.names}")
        # Names become attributes of a ParameterDict: no dots, and none of its own attributes.
        reserved = name in (BASE, _COMPILED) or (isinstance(name, str) and hasattr(nn.ParameterDict(), name))
        if not isinstance(name, str) or not name or "." in name or reserved:
            raise ValueError(f"name must be a non-empty string without dots that is not reserved, got {name!r}")

    def _id_of(self, adapter: int | str) -> int:
        if not isinstance(adapter, str):
            if isinstance(adapter, bool) or not hasattr(adapter, "__index__"):
                raise TypeError(f"adapters must be names or integer ids, got {adapter!r}")
            return operator.index(adapter)
        if adapter == BASE:
            return -1
        check_known(adapter, self.names)
        return self.names.index(adapter)


def check_rank(r: int, name: str, layer: nn.Linear | MultiLoRALinear, slices: Rows | None) -> None:
    for key, (start, stop) in (slices or {"": (0, layer.out_features)}).items():
        limit = min(layer.in_features, stop - start)
        if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= limit:
            where = f"{name!r}, slice {key!r}" if key else f"{name!r}"
            raise ValueError(
                f"r must be an integer in [1, {limit}] for layer {where} "
                f"({layer.in_features} inputs, {stop - start} outputs), got {r!r}"
            )


def check_alpha(lora_alpha: float | None) -> None:
    known = lora_alpha is None or (isinstance(lora_alpha, int | float) and 0 < lora_alpha < float("inf"))
    if not known:  # other kinds of numbers could not be written to a file
        raise ValueError(f"lora_alpha must be a positive number, got {lora_alpha!r}")


def _are_finite(factors: list[Tensor]) -> bool:
    """Whether no inf or NaN is among them: of plain tensors in two launches, a sharded one may be empty here."""
    if PLAIN.issuperset(map(type, factors)):
        with without_autocast(factors[0].device.type):  # which knows one 16-bit dtype, not two
            return bool(nn.utils.get_total_norm(factors, torch.inf).isfinite())
    return bool(torch.stack([p.isfinite().all().to(factors[0].device) for p in factors]).all())
