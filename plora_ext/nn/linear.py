"""A linear layer that carries many LoRA adapters on one frozen weight."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, compress
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from plora_ext import ops
from plora_ext.nn.state import Active, State, check_known, mark, require_layer
from plora_ext.ops.autocast import autocast_dtype, cast
from plora_ext.ops.autograd import narrow, side_by_side, stacked
from plora_ext.ops.lora import run_beside
from plora_ext.torch_private import (
    PLAIN,
    below,
    has_global_module_hooks,
    has_saved_tensor_hooks,
    is_eager,
    is_unwatched,
)

__all__ = ["MultiLoRALinear"]

_PLAIN = (Tensor, nn.Parameter)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` computes `x W^T + b` of parameters of its own whenever it is used.

    Not so: subclasses with another forward, parametrized weights, and the linear layer inside of
    `nn.MultiheadAttention`, whose weight is read but which is never called.
    """
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and type(module).forward is nn.Linear.forward
        and "weight" in module._parameters
    )


def plain_parameters(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias, where a call of `module` is `nn.Linear.forward` on these plain tensors and nothing else.

    Otherwise it has to be called: hooks and an instance's own forward (feature extractors, offloading, sharding) live
    on the call, and a quantised or sharded weight is nobody else's to read.
    """
    own = module.__dict__
    if (
        type(module).forward is not nn.Linear.forward
        or "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or (has_global_module_hooks() and not torch.compiler.is_compiling())
    ):
        return None
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    return (weight, bias) if type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN) else None


# lora_A [T, r, in], lora_B [T, out, r], scaling [T]; where they differ, ranks [T]; where there are slices, their rows
Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, list[tuple[int, int]] | None]
_Constants = tuple[Tensor, Tensor | None]  # scaling [T]; where they differ, ranks [T]


class MultiLoRALinear(nn.Module):
    """A frozen `nn.Linear` with any number of named LoRA adapters.

    y = x W^T + b + sum over the active i of c_i s_i (x A_i^T) B_i^T, with s_i = lora_alpha_i / r_i, x [..., in],
    W [out, in], A_i [r_i, in] and B_i [out, r_i] (PEFT's orientation; Hu et al., LoRA, ICLR 2022). Inside
    `Adapters.batch` every sample has its own adapter instead of the common sum.

    It is one call of `plora_ext.ops.lora_sum`, per sample of `plora_ext.ops.lora_indexed`, on the parameters as they
    are: nothing is kept from one call to the next that could be out of date, so that T active adapters cost 2 T looks
    at a parameter in every call. `Adapters.merge` and `Adapters.merged` write what does not train into the weight for
    as long as one wants, and cost nothing per row or adapter from then on.

    The base layer is part of that call where it is plain. Where something hooks it, offloads it, shards or quantises
    its weight or replaces its forward, it is called as a module, and the adapters are added to what it gives.

    `state_dict` holds A and B of every adapter and its `lora_alpha`; files without the latter load as they did. The
    active set is not part of it. (`functional_call` takes parameters and buffers, `dict(model.named_parameters())`, not
    a `state_dict`: a `lora_alpha` is a number of the host, so that no forward waits for it.)

    Args:
        base: the linear layer to adapt; kept as `base_layer` (PEFT's name) and frozen.
        slices: row ranges `{name: (start, stop)}` of the output, each with an A and a B of its own (the q and v
            rows of a fused qkv). Together they act as one adapter of rank `len(slices) * r` whose B is
            block-diagonal, so one operator call serves all slices. `None` adapts all rows with one A and B.
        lora_dropout: probability of dropping an input of the adapters (not of the base layer) in training.
        autocast_adapter_dtype: keep adapters in float32 where the weight has 16 bits or fewer, as PEFT does: small
            steps of an optimizer would be rounded away there. They are computed with in the dtype of x.
        state: what is active, shared with other layers of the model.

    Raises:
        TypeError: `base` is not a plain `nn.Linear`.
        ValueError: a slice lies outside of the output rows, or `lora_dropout` outside of [0, 1).
    """

    base_layer: nn.Linear
    _original_weight: Tensor | None
    _state: State

    def __init__(
        self,
        base: nn.Linear,
        slices: Mapping[str, tuple[int, int]] | None = None,
        lora_dropout: float = 0.0,
        autocast_adapter_dtype: bool = True,
        state: State | None = None,
    ) -> None:
        super().__init__()
        if not is_plain_linear(base):
            got = f"{type(base).__module__}.{type(base).__name__}"
            if type(base) is nn.Linear:
                got += " whose weight a hook computes"
            raise TypeError(f"base must be a plain torch.nn.Linear, got {got}")
        if not isinstance(lora_dropout, int | float) or not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {lora_dropout!r}")
        for key, (start, stop) in (slices or {}).items():
            if not 0 <= start < stop <= base.out_features:
                raise ValueError(f"slice {key!r} must be rows within [0, {base.out_features}), got ({start}, {stop})")
        self.base_layer = base.requires_grad_(False)
        self.slices = dict(slices) if slices else None
        self.lora_dropout = lora_dropout
        self.autocast_adapter_dtype = autocast_adapter_dtype
        # state_dict keys: lora_A.<adapter>, or lora_A.<slice>.<adapter> where there are slices.
        self.lora_A = self._containers()
        self.lora_B = self._containers()
        self._r: dict[str, int] = {}
        self._alpha: dict[str, float] = {}
        self.register_buffer("_original_weight", None, persistent=False)  # the weight before merge()
        # A sum's scaling is a concatenation of these, so that no forward copies numbers from the host.
        self._scaling: dict[str, Tensor] = {}
        self._ranks: dict[str, Tensor] = {}
        self._last: tuple[tuple[str, ...], _Constants] | None = None  # of the last sum, by its names
        self._join(State() if state is None else state)
        self.register_load_state_dict_post_hook(_renew_constants)

    def _join(self, state: State) -> None:
        """From now on what is active is said by `state`."""
        if "_state" in self.__dict__:
            self._state.layers.discard(self)
            state.unchecked |= self._state.unchecked
        self._state, self._number = state, state.join(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last = None  # older files have none
        self._state.layers.add(self)  # of a copy

    def _containers(self) -> Any:
        if self.slices is None:
            return nn.ParameterDict()
        return nn.ModuleDict({key: nn.ParameterDict() for key in self.slices})

    def _dicts(self) -> list[nn.ParameterDict]:
        """The A and the B by adapter, slice after slice; on the path of every forward, so not through attributes."""
        pair: Any = self._modules["lora_A"], self._modules["lora_B"]
        return list(pair) if self.slices is None else [both._modules[key] for key in self.slices for both in pair]

    def _factors_of(self, names: Sequence[str]) -> list[list[Any]]:
        """The A of the adapters, their B, and so on for every slice."""
        containers = self._dicts()
        try:
            return [list(map(container._parameters.__getitem__, names)) for container in containers]
        except KeyError:  # a factor that is parametrized
            return [[getattr(container, name) for name in names] for container in containers]

    # ------------------------------------------------------------------ what it looks like from outside

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self.base_layer.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias."""
        return self.base_layer.bias

    @property
    def weight(self) -> Tensor:
        """The effective weight `W + sum_i c_i s_i B_i A_i` of the active set, differentiable.

        Some models (timm's BEiT and EVA) read `layer.weight` and call `F.linear` themselves; handing them the
        base weight would switch the adapters off without a word.

        Raises:
            RuntimeError: inside `Adapters.batch`, where no single weight exists.
        """
        active = self._state.current
        if active.batch is not None or active.ensemble is not None:
            raise RuntimeError(
                "this model reads layer.weight instead of calling the layer: per-sample adapters cannot work here, "
                "use set_adapter"
            )
        if active.weights is not None:
            return active.weights[self._number]
        if self.training and self.lora_dropout and active.names and not torch.compiler.is_compiling():
            warnings.warn(
                "this model reads layer.weight instead of calling the layer: lora_dropout drops nothing there",
                stacklevel=2,
            )
        return self._merge(active) if active.names else self.base_layer.weight

    @property
    def r(self) -> Mapping[str, int]:
        """Ranks by adapter; not to be written to."""
        return MappingProxyType(self._r)

    @property
    def lora_alpha(self) -> Mapping[str, float]:
        """Alphas by adapter; not to be written to: a scale of one's own is a coefficient (`set_adapter`)."""
        return MappingProxyType(self._alpha)

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self._r)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active set, which all layers of a model share."""
        return list((self._state.merged or self._state.current).names)

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into the base weight (`merge`)."""
        return self._buffers["_original_weight"] is not None

    @property
    def device(self) -> torch.device:
        """Where the adapters are, or would be."""
        for factor in self._each_factor():
            return factor.device
        weight: Any = self.base_layer.weight
        return weight.device if isinstance(weight, Tensor) else torch.device("cpu")  # some quantised layers have none

    def extra_repr(self) -> str:
        slices = f", slices={self.slices}" if self.slices else ""
        return f"adapters={self.adapter_names}, active={self.active_adapters}{slices}"

    # ------------------------------------------------------------------ adapters

    def pairs(self, name: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The (A, B) parameters of adapter `name`: one pair, or one for each slice in the order of `slices`.

        Raises:
            KeyError: the name is unknown.
        """
        check_known(name, self._r)
        factors = [factor for (factor,) in self._factors_of((name,))]
        return list(zip(factors[::2], factors[1::2], strict=True))

    def add_adapter(self, name: str, pairs: Sequence[tuple[Tensor, Tensor]], lora_alpha: float) -> None:
        """Add an adapter with the given factors, frozen and inactive.

        Args:
            name: a new name.
            pairs: (A `[r, in]`, B `[rows, r]`), one for each slice; copied, in the dtype that adapters have.
            lora_alpha: the scale is `lora_alpha / r`.

        Raises:
            ValueError: the name is taken, or a shape is wrong.
        """
        r, dtype, device = max(pairs[0][0].shape[0], 1), self._dtype(), self.device
        got = [(tuple(A.shape), tuple(B.shape)) for A, B in pairs]
        wanted = [((r, self.in_features), (stop - start, r)) for start, stop in self._rows()]
        if got != wanted:
            raise ValueError(f"pairs must have the shapes {wanted} of A and B, got {got}")
        if name in self._r:
            raise ValueError(f"adapter {name!r} exists already, known ones are {self.adapter_names}")
        with torch.inference_mode(False):  # which makes tensors that can never train
            for container, value in zip(self._dicts(), chain(*pairs), strict=True):
                value = value.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
                container[name] = nn.Parameter(value, requires_grad=False)
        self._r[name], self._alpha[name] = r, lora_alpha
        self._state.unchecked.add(name)
        self._set_constants(name)

    def _dtype(self) -> torch.dtype:
        weight: Any = self.base_layer.weight
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
        return torch.promote_types(dtype, torch.float32) if self.autocast_adapter_dtype else dtype

    def init_factors(self, r: int) -> list[tuple[Tensor, Tensor]]:
        """Fresh factors of rank `r`: A from Kaiming's uniform distribution with a = sqrt(5), B zero (as PEFT)."""
        like: dict[str, Any] = {"dtype": self._dtype(), "device": self.device}
        pairs = [(torch.empty(r, self.in_features, **like), torch.zeros(z - a, r, **like)) for a, z in self._rows()]
        for A, _ in pairs:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return pairs

    def _rows(self) -> list[tuple[int, int]]:
        """The rows of the output that each pair of factors acts on."""
        return [(0, self.out_features)] if self.slices is None else list(self.slices.values())

    def delete_adapter(self, name: str) -> None:
        """Remove adapter `name`, which must not be active, or what there is of it; KeyError where there is nothing."""
        records = [record for record in self._records() if name in record]
        if not records:
            raise KeyError(f"unknown adapter {name!r}, known ones are {self.adapter_names}")
        for record in records:
            del record[name]
        self._last = None
        self._state.unchecked.discard(name)

    def rename_adapter(self, old: str, new: str) -> None:
        """Give adapter `old` another name; its parameters stay the same objects, adapters stay in their order."""
        for record in self._records():
            for name in list(record):
                value = record.pop(name)
                record[new if name == old else name] = value
        self._last = None

    def _records(self) -> list[Any]:
        return [*self._dicts(), self._r, self._alpha, self._scaling, self._ranks]

    def set_adapter(
        self, names: str | Sequence[str] | None, coefficients: Tensor | Sequence[float] | None = None
    ) -> None:
        """Make `names` the active set of all layers that share this one's state: `Adapters.set_adapter`."""
        require_layer(self)
        self._state.choose(names, coefficients, self)

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and (soon := self._soon(x)) is not None:
            return soon
        active = self._state.current
        if active.ensemble is not None:
            return active.ensemble(self, x)
        if "_is_replica" in self.__dict__:
            raise RuntimeError(
                "torch.nn.DataParallel cannot run layers with adapters: use DistributedDataParallel, a process a GPU"
            )
        watched = False
        if not torch.compiler.is_compiling():
            self._state.check_recomputation(active)
            watched = torch.is_grad_enabled() and has_saved_tensor_hooks()
        if active.batch is None and active.weights is None and not active.names:  # `rests`, but the compiler sees it
            y: Tensor = self.base_layer(x)
            return y
        if watched:
            x = mark(x, active)
        if active.weights is not None:
            return self._with_weight(active.weights[self._number], x)
        return self._of_any(x, active, watched)

    def _soon(self, x: Tensor) -> Tensor | None:
        """The forward where nothing else is asked for than a frozen layer, and adapters beside it.

        Of a small layer the host's time is all there is: every function and every look counts.
        """
        state, own = self._state, self.__dict__
        active = state.current if state._open else state.common
        name = active.alone
        several = name is None or own["slices"] is not None
        if several and not (active.adds or active.picks or active.rests):
            return None
        if own["lora_dropout"] and own["training"]:
            return None
        modules = own["_modules"]
        plain = plain_parameters(modules["base_layer"])
        if plain is None or "_is_replica" in own:
            return None
        records = torch.is_grad_enabled()
        if not records or state.checkpoints.met:
            state.check_recomputation(active)
        if several:
            return F.linear(x, *plain) if active.rests else self._several_soon(x, active, *plain)
        try:
            lora_A, lora_B = modules["lora_A"]._parameters[name], modules["lora_B"]._parameters[name]
        except KeyError:  # a factor that is parametrized
            return None
        if records and has_saved_tensor_hooks():
            x, lora_A = mark(x, active), mark(lora_A, active)
        return run_beside(x, lora_A, lora_B, own["_scaling"][name], *plain)

    def _several_soon(self, x: Tensor, active: Active, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The same of several adapters, or of slices: in eager code on a device with kernels, with ids that are x's."""
        kind, coefficients, batch = x.device.type, active.coefficients, active.batch
        names, trained = tuple(self._r) if active.picks else active.names, list[int]()
        if kind not in ("cpu", "cuda") or not is_unwatched() or not names:
            return None
        if batch is not None:
            coefficients = None
            if batch.num_adapters > len(names):  # a GPU's kernels would read beyond the factors
                return None
            if x.dim() < 2 or batch.ids.shape != x.shape[:1] or batch.ids.device != x.device:
                return None
        if torch.is_grad_enabled():
            trained = self._trained(names)
            if coefficients is not None and coefficients.requires_grad:
                return None
            if (trained or x.requires_grad) and (self.slices is not None or has_saved_tensor_hooks()):
                return None
        if (dtype := autocast_dtype(kind)) is not None:
            x = cast(x, dtype)
        lora_A, lora_B, scaling, ranks, slices = self.beside(x, names, trained)
        times = None if coefficients is None else coefficients.to(scaling)
        some = trained if len(trained) < len(names) else None
        own = lora_A, lora_B, scaling, weight, bias, ranks, slices
        if batch is None:
            return run_beside(x, *own, None, some, times)
        y: Tensor | None = batch.in_order(x, lora_A, lambda x, batch: run_beside(x, *own, batch.ids, some))
        return y

    def beside(self, x: Tensor, names: tuple[str, ...], trained: Sequence[int] = ()) -> Operands:
        """`operands` in the dtype of x, for eager code, in which autograd sees no more than what trains."""
        factors = self._factors_of(names)
        plain = PLAIN.issuperset(map(type, chain.from_iterable(factors)))
        one = len(names) == 1 and not trained and x.dtype == factors[0][0].dtype
        if one or not plain or self.slices is not None or not (trained or x.is_cuda):
            # of one, views: where a gradient may need them, torch is to see what is written to the factors since
            with below() if plain and not (one and torch.is_grad_enabled()) else nullcontext():
                lora_A, lora_B, scaling, ranks, slices = self.operands(names, factors=factors)
                return narrow(lora_A, x.dtype), narrow(lora_B, x.dtype), scaling, ranks, slices
        scales = [self._alpha[name] / self._r[name] for name in names] if x.is_cuda else ()
        lora_A, lora_B, made = stacked(x, factors[0], factors[1], scales, trained)
        if made is not None:
            return lora_A, lora_B, made, None, None
        return lora_A, lora_B, *self._constants_of(names), None

    def _trained(self, names: Sequence[str]) -> list[int]:
        """The places in `names` of adapters of which a factor requires a gradient."""
        asks = ([p.requires_grad for p in factors] for factors in self._factors_of(names))
        return list(compress(range(len(names)), map(any, zip(*asks, strict=True))))

    def _of_any(self, x: Tensor, active: Active, watched: bool) -> Tensor:
        op: Callable[..., Tensor] = ops.lora_sum
        names = active.names
        ids: tuple[ops.AdapterBatch, ...] = ()
        keywords: dict[str, Any] = {}
        if active.batch is not None:
            op, names = ops.lora_indexed, tuple(self._r)
            given = active.batch.ids.shape[:1]
            if not torch.compiler.is_compiling() and x.dim() > 1 and given != x.shape[:1]:
                raise ValueError(
                    f"Adapters.batch was given {given.numel()} adapters, but a layer sees {x.shape[0]} samples: give "
                    "one for each (beam search repeats every sample num_beams times)"
                )
            ids = (active.batch if active.batch.ids.device == x.device else active.batch.to(x.device),)
        elif active.coefficients is not None:
            keywords["coeff"] = active.coefficients.to(x.device)
        trained = self._trained(names) if torch.is_grad_enabled() else []
        lora_A, lora_B, scaling, ranks, slices = self.operands(names, active if watched else None)
        if self.training and self.lora_dropout:
            keywords["base"] = self.base_layer(x)  # which sees x itself
            x = F.dropout(x, self.lora_dropout)
        else:
            keywords |= self.frozen_part(x)
        if 0 < len(trained) < len(names):  # only those that train get (and pay for) gradients
            keywords["trainable"] = trained
        lora_A, lora_B = narrow(lora_A, x.dtype), narrow(lora_B, x.dtype)
        return op(x, *ids, lora_A, lora_B, scaling, ranks=ranks, slices=slices, **keywords)

    def frozen_part(self, x: Tensor) -> dict[str, Any]:
        """The base layer as an argument of an operator: weight and bias, or what it gives where it has to be called."""
        plain = plain_parameters(self.base_layer)
        return {"base": self.base_layer(x)} if plain is None else {"weight": plain[0], "bias": plain[1]}

    def _with_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        """What the base layer gives with another weight."""
        plain = plain_parameters(self.base_layer)
        if plain is not None:
            return F.linear(x, weight, plain[1])
        y: Tensor = functional_call(self.base_layer, {"weight": weight}, (x,))
        return y

    def operands(
        self, names: Sequence[str], active: Active | None = None, factors: list[list[Any]] | None = None
    ) -> Operands:
        """The adapters `names` as operators take them: A and B stacked, filled up to one rank; scales, ranks, rows.

        active: what is active, where something is to see from the factors that it stays so (`mark`).
        factors: theirs, from who has them.
        """
        factors, out = self._factors_of(names) if factors is None else factors, self.out_features
        if not names:
            like: dict[str, Any] = {"dtype": self._dtype(), "device": self.device}
            empty = torch.zeros(0, out, 1, **like), torch.zeros(0, dtype=torch.float32, device=self.device)
            return torch.zeros(0, 1, self.in_features, **like), *empty, None, None
        if active is not None:
            factors[0][0] = mark(factors[0][0], active)
        if self.slices is None and len(names) == 1:
            return factors[0][0][None], factors[1][0][None], self._scaling[names[0]], None, None
        (scaling, ranks), T = self._constants_of(tuple(names)), len(names)
        if self.slices is None:
            return *side_by_side(factors[0], factors[1], T), scaling, ranks, None
        of_slices = [list(chain.from_iterable(zip(*factors[i::2], strict=True))) for i in (0, 1)]  # adapter by adapter
        lora_A, blocks = side_by_side(of_slices[0], of_slices[1], T)
        # B's blocks: rows of r numbers, and where they belong among the out * slices rows of r that are all of B.
        n, r = len(self.slices), blocks.shape[2]
        whole = blocks.new_zeros(T, out * n, r).index_copy_(1, self._block_rows, blocks).view(T, out, n * r)
        return lora_A, whole, scaling, None, list(self.slices.values())

    def _constants_of(self, names: tuple[str, ...]) -> _Constants:
        """What of a sum is no parameter, kept for the next call with the same names until an adapter changes.

        On the CPU alone: a tensor on a GPU belongs to the stream, or the graph, that makes it.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self._last is not None and self._last[0] == names:
            return self._last[1]
        own, ranks = [self._r[name] for name in names], None
        with nullcontext() if compiling else torch.inference_mode(False):
            scaling = torch.cat([self._scaling[name] for name in names])
            if min(own) < max(own):
                ranks = torch.cat([self._ranks[name] for name in names])
        if not compiling and scaling.is_cpu and is_eager():
            self._last = names, (scaling, ranks)
        return scaling, ranks

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A `[R, in]` and B `[out, R]` that act on all rows; with slices R = len(slices) * r, B block-wise."""
        lora_A, lora_B, *_ = self.operands((name,))
        return lora_A[0], lora_B[0]

    # ------------------------------------------------------------------ merging

    def _merge(self, active: Active) -> Tensor:
        """The weight with the active set folded in: summed in float32 or wider, rounded once."""
        weight: Any = self.base_layer.weight
        if not isinstance(weight, Tensor) or type(weight) not in _PLAIN or weight.is_meta:
            kind = f"on {weight.device}" if isinstance(weight, Tensor) and weight.is_meta else type(weight).__name__
            raise RuntimeError(
                f"adapters cannot be merged into a weight that is sharded, quantised or offloaded (it is {kind}): "
                "use the model unmerged, or unload() the adapters before it is changed"
            )
        if not active.names:
            return weight
        watched = not torch.compiler.is_compiling() and torch.is_grad_enabled() and has_saved_tensor_hooks()
        lora_A, lora_B, scaling, ranks, _ = self.operands(active.names, active if watched else None)
        coeff = None if active.coefficients is None else active.coefficients.to(weight.device)
        # Adapters may be narrower than the weight, which they are not to round.
        W, A, B = (t.to(torch.promote_types(weight.dtype, lora_A.dtype)) for t in (weight, lora_A, lora_B))
        return ops.lora_merge(W, A, B, scaling, coeff=coeff, ranks=ranks).to(weight.dtype)

    def merged_weight(self, active: Active) -> Tensor:
        """The same, to be the layer's weight.

        Raises:
            RuntimeError: what the layer computes with is not its weight.
        """
        if "weight" not in self.base_layer._parameters and isinstance(self.base_layer.weight, Tensor):
            raise RuntimeError(
                "adapters cannot be merged into a weight that a hook or a parametrization computes at every forward: "
                "make it permanent before (torch.nn.utils.prune.remove, parametrize.remove_parametrizations), or use "
                "the model unmerged"
            )
        return self._merge(active)

    @torch.no_grad()
    def merge(self, active: Active) -> None:
        """Write adapters into the base weight, in place."""
        merged = self.merged_weight(active)
        self._original_weight = self.base_layer.weight.detach().clone()
        self.base_layer.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight to the bits it had before `merge`."""
        if self._original_weight is not None:
            self.base_layer.weight.copy_(self._original_weight)
            self._original_weight = None

    # ------------------------------------------------------------------ constants and state

    def _apply(self, fn: Any, recurse: bool = True) -> MultiLoRALinear:
        super()._apply(fn, recurse)
        self._set_constants(*self._r)
        return self

    def _set_constants(self, *names: str) -> None:
        """Scale and rank of each adapter as one-element tensors beside it, scales in float32 or wider.

        Those that are there take the new numbers where they lie: a captured CUDA graph goes on reading them.
        """
        self._last = None
        wide, device, slices = self.scale_dtype, self.device, list((self.slices or {}).values())
        with torch.inference_mode(False):
            if slices:  # where row o of block i of B is in [out * slices, r]
                rows = [torch.arange(start, stop) * len(slices) + i for i, (start, stop) in enumerate(slices)]
                self._block_rows = _in_place(self.__dict__.get("_block_rows"), torch.cat(rows).to(device))
            for name in names:
                r = self._r[name]
                scale = torch.tensor([self._alpha[name] / r], dtype=wide, device=device)
                self._scaling[name] = _in_place(self._scaling.get(name), scale)
                self._ranks[name] = _in_place(self._ranks.get(name), torch.tensor([r], device=device))

    def _each_factor(self) -> Iterator[nn.Parameter]:
        return (factor for table in self._dicts() for factor in table.parameters())

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of scales and coefficients: float32 or wider."""
        return torch.promote_types(next((p.dtype for p in self._each_factor()), self._dtype()), torch.float32)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, alpha in self._alpha.items():
            destination[f"{prefix}lora_alpha.{name}"] = torch.tensor(alpha, dtype=torch.float64)
        if self.merged:
            destination[f"{prefix}lora_merged"] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            raise RuntimeError(
                "load_state_dict would be undone by unmerge(): the adapters are merged into the base weight, call "
                "unmerge() first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        alphas = {name: state_dict.get(f"{prefix}lora_alpha.{name}") for name in self._r}
        for name, alpha in alphas.items():
            if isinstance(alpha, Tensor) and not alpha.is_meta:
                self._alpha[name] = float(alpha)
        unexpected: list[str] = args[3]
        ours = {f"{prefix}lora_alpha.{name}" for name in self._r} | {f"{prefix}lora_merged"}
        unexpected[:] = [key for key in unexpected if key not in ours]
        if f"{prefix}lora_merged" in state_dict:
            warnings.warn(
                "this state was saved while adapters were merged into its weights, where they would count twice if "
                "active: set_adapter(None), or unmerge() before state_dict()",
                stacklevel=2,
            )


def _in_place(there: Tensor | None, value: Tensor) -> Tensor:
    """`value`, in the tensor that is there where it fits."""
    if there is None or there.dtype != value.dtype or there.device != value.device:
        return value
    there.data.copy_(value)
    return there


def _renew_constants(layer: MultiLoRALinear, _: Any) -> None:
    """After load_state_dict: scales may have been loaded, and with `assign` adapters may be on another device."""
    layer._set_constants(*layer.r)
    layer._state.unchecked.update(layer.r)
