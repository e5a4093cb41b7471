"""A linear layer that carries many LoRA adapters on one frozen weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.ops._register import is_plain, run_one

__all__ = ["MultiLoRALinear"]


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


# lora_A [T, r, in], lora_B [T, out, r], scaling [T]; where they differ, ranks [T]; where there are slices, their rows
_Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, list[tuple[int, int]] | None]


class MultiLoRALinear(nn.Module):
    """A frozen `nn.Linear` with any number of named LoRA adapters.

    y = x W^T + b + sum over the active i of c_i s_i (x A_i^T) B_i^T, with s_i = lora_alpha_i / r_i, x [..., in],
    W [out, in], A_i [r_i, in] and B_i [out, r_i] (PEFT's orientation; Hu et al., LoRA, ICLR 2022). Inside
    `Adapters.batch` every sample has its own adapter instead of the common sum.

    How `y` is computed follows from what trains:

    * what does not train is merged into one cached weight, `W + sum_i c_i s_i B_i A_i`, which costs nothing per row;
      the cache follows every change of a parameter, of the active set and of its coefficients;
    * what trains goes through `plora_ext.ops.lora_sum` together with that weight;
    * per-sample adapters go through `plora_ext.ops.lora_indexed`.

    Writes that torch does not count (`parameter.data.add_()`, the replay of a CUDA graph) become visible to the
    caches with the next call of `train()`, `eval()` or `set_adapter`. A CUDA graph that is being captured, like a
    compiled one, merges anew each time it runs, so that it follows the parameters; `Adapters.merge` spares it that.

    Args:
        base: the linear layer to adapt; kept as `base_layer` (PEFT's name) and frozen.
        slices: row ranges `{name: (start, stop)}` of the output, each with an A and a B of its own (the q and v
            rows of a fused qkv). Together they act as one adapter of rank `len(slices) * r` whose B is
            block-diagonal, so one operator call serves all slices. `None` adapts all rows with one A and B.
        lora_dropout: probability of dropping an input of the adapters (not of the base layer) in training.

    Raises:
        TypeError: `base` is not a plain `nn.Linear`.
        ValueError: a slice lies outside of the output rows, or `lora_dropout` outside of [0, 1).
    """

    base_layer: nn.Linear
    _original_weight: Tensor | None

    def __init__(
        self, base: nn.Linear, slices: Mapping[str, tuple[int, int]] | None = None, lora_dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not is_plain_linear(base):
            raise TypeError(f"base must be a plain torch.nn.Linear, got {type(base).__module__}.{type(base).__name__}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {lora_dropout}")
        for key, (start, stop) in (slices or {}).items():
            if not 0 <= start < stop <= base.out_features:
                raise ValueError(f"slice {key!r} must be rows within [0, {base.out_features}), got ({start}, {stop})")
        self.base_layer = base.requires_grad_(False)
        self.slices = dict(slices) if slices else None
        self.lora_dropout = lora_dropout
        # state_dict keys: lora_A.<adapter>, or lora_A.<slice>.<adapter> where there are slices.
        self.lora_A = self._containers()
        self.lora_B = self._containers()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.register_buffer("_original_weight", None, persistent=False)  # the weight before merge()
        # A sum's scaling is a concatenation of these, so that no forward copies numbers from the host.
        self._scaling: dict[str, Tensor] = {}
        self._ranks: dict[str, Tensor] = {}
        self._active: tuple[str, ...] = ()
        self._coefficients: Tensor | None = None
        self._batch: ops.AdapterBatch | None = None
        self._ensemble: Callable[[MultiLoRALinear, Tensor], Tensor] | None = None  # takes over inside of nn.Ensemble
        self._cache: dict[str, tuple[list[Tensor], list[tuple[int, int, int]], Any]] = {}

    def _containers(self) -> Any:
        if self.slices is None:
            return nn.ParameterDict()
        return nn.ModuleDict({key: nn.ParameterDict() for key in self.slices})

    def _dicts(self) -> list[nn.ParameterDict]:
        """The A and the B by adapter, slice after slice; on the path of every forward, so not through attributes."""
        pair: Any = self._modules["lora_A"], self._modules["lora_B"]
        return list(pair) if self.slices is None else [both._modules[key] for key in self.slices for both in pair]

    def _factors_of(self, names: Sequence[str]) -> list[Tensor]:
        """The A and B of every slice of every adapter."""
        tables: list[Any] = [container._parameters for container in self._dicts()]
        return [table[name] for name in names for table in tables]

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
        if self._batch is not None or self._ensemble is not None:
            raise RuntimeError(
                "this model reads layer.weight instead of calling the layer: per-sample adapters cannot work here, "
                "use set_adapter"
            )
        if not self._active or self.merged:
            return self.base_layer.weight
        learns = self._training_of(self._active) or self._coefficients_train()
        return self._merge(self._active) if learns else self._cached("weight", self._active, self._merge)

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self.r)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active set."""
        return list(self._active)

    @property
    def merged(self) -> bool:
        """Whether the active set is merged into the base weight (`merge`)."""
        return self._buffers["_original_weight"] is not None

    def extra_repr(self) -> str:
        slices = f", slices={self.slices}" if self.slices else ""
        return f"adapters={self.adapter_names}, active={self.active_adapters}{slices}"

    # ------------------------------------------------------------------ adapters

    def pairs(self, name: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The (A, B) parameters of adapter `name`: one pair, or one for each slice in the order of `slices`."""
        factors: list[Any] = self._factors_of((name,))
        return list(zip(factors[::2], factors[1::2], strict=True))

    def add_adapter(self, name: str, pairs: Sequence[tuple[Tensor, Tensor]], lora_alpha: float) -> None:
        """Add an adapter with the given factors, frozen and inactive.

        Args:
            name: a new name.
            pairs: (A `[r, in]`, B `[rows, r]`), one for each slice; copied, in the dtype of the base weight.
            lora_alpha: the scale is `lora_alpha / r`.
        """
        weight, r = self.base_layer.weight, pairs[0][0].shape[0]
        for container, value in zip(self._dicts(), itertools.chain(*pairs), strict=True):
            value = value.detach().to(weight, copy=True, memory_format=torch.contiguous_format)
            container[name] = nn.Parameter(value, requires_grad=False)
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self._set_constants(name)

    def init_factors(self, r: int) -> list[tuple[Tensor, Tensor]]:
        """Fresh factors of rank `r`: A from Kaiming's uniform distribution with a = sqrt(5), B zero (as PEFT)."""
        weight = self.base_layer.weight
        rows = [(0, self.out_features)] if self.slices is None else list(self.slices.values())
        pairs = [(weight.new_empty(r, self.in_features), weight.new_zeros(stop - start, r)) for start, stop in rows]
        for A, _ in pairs:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return pairs

    def delete_adapter(self, name: str) -> None:
        """Remove adapter `name`, which must not be active."""
        records: list[Any] = [*self._dicts(), self.r, self.lora_alpha, self._scaling, self._ranks]
        for record in records:
            del record[name]
        self._cache.clear()

    def rename_adapter(self, old: str, new: str) -> None:
        """Give adapter `old` another name; its parameters stay the same objects, adapters stay in their order."""
        records: list[Any] = [*self._dicts(), self.r, self.lora_alpha, self._scaling, self._ranks]
        for record in records:
            for name in list(record):
                value = record.pop(name)
                record[new if name == old else name] = value
        self._active = tuple(new if name == old else name for name in self._active)
        self._cache.clear()

    def set_adapter(self, names: Sequence[str], coefficients: Tensor | None = None) -> None:
        """Make `names` the active set, with coefficients `[len(names)]` (ones where `None`)."""
        self._active = tuple(names)
        self.__dict__["_coefficients"] = coefficients  # an nn.Parameter stays its owner's, it is not registered here
        self._cache.clear()

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        y = None if torch.compiler.is_compiling() else self._of_one(x)
        return self._of_any(x) if y is None else y

    def _of_one(self, x: Tensor) -> Tensor | None:
        """The forward of one adapter that trains and acts on all rows, where nothing else is asked for; else None."""
        if (
            len(self._active) != 1
            or self._coefficients is not None
            or self._batch is not None
            or self._ensemble is not None
            or self.slices is not None
            or self.merged
            or (self.lora_dropout and self.training)
        ):
            return None
        (name,) = self._active
        modules: dict[str, Any] = self._modules
        base = modules["base_layer"]
        lora_A, lora_B = modules["lora_A"]._parameters[name], modules["lora_B"]._parameters[name]
        if not (lora_A.requires_grad or lora_B.requires_grad) or "weight" not in base._parameters:
            return None
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        return run_one(x, lora_A, lora_B, self._scaling[name], weight, bias)

    def _of_any(self, x: Tensor) -> Tensor:
        if self._ensemble is not None:
            return self._ensemble(self, x)
        base = self.base_layer
        weight, bias = base.weight, base.bias
        if self._batch is not None:
            names = tuple(self.r)
            return self._low_rank(ops.lora_indexed, x, weight, bias, names, self._training_of(names), self._batch)
        if self.merged or not self._active:  # in this order: a compiled graph of the merged layer knows no names
            return F.linear(x, weight, bias)

        names, coeff = self._active, self._coefficients
        train = self._training_of(names)
        if not self._coefficients_train():
            # The frozen part of the sum costs nothing once it is in the weight.
            if len(train) < len(names):
                weight = self._cached("weight", tuple(name for name in names if name not in train), self._merge)
            if not train:
                return F.linear(x, weight, bias)
            coeff, names = self._coefficients_of(train), train
        return self._low_rank(ops.lora_sum, x, weight, bias, names, train, coeff=coeff)

    def _low_rank(
        self,
        op: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        names: tuple[str, ...],
        train: tuple[str, ...],
        *ids: ops.AdapterBatch,
        **keywords: Any,
    ) -> Tensor:
        operands = self._operands(names) if train else self._cached("operands", names, self._operands)
        lora_A, lora_B, scaling, ranks, keywords["slices"] = operands
        if self.training and self.lora_dropout:  # the base layer sees x itself
            keywords["base"] = F.linear(x, weight, bias)
            x = F.dropout(x, self.lora_dropout)
        else:
            keywords["weight"], keywords["bias"] = weight, bias
        if 0 < len(train) < len(names):  # only those that train get (and pay for) gradients
            keywords["trainable"] = [i for i, name in enumerate(names) if name in train]
        return op(x, *ids, lora_A, lora_B, scaling, ranks=ranks, **keywords)

    def _training_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `names` that receive gradients in this forward."""
        if not torch.is_grad_enabled():
            return ()
        return tuple(name for name in names if any([p.requires_grad for p in self._factors_of((name,))]))

    def _coefficients_train(self) -> bool:
        return self._coefficients is not None and self._coefficients.requires_grad and torch.is_grad_enabled()

    def _coefficients_of(self, names: tuple[str, ...]) -> Tensor | None:
        coefficients = self._coefficients
        if coefficients is None or names == self._active:
            return coefficients
        return torch.cat([c for name, c in zip(self._active, coefficients.split(1), strict=True) if name in names])

    def _operands(self, names: tuple[str, ...]) -> _Operands:
        factors, out = self._factors_of(names), self.out_features
        if self.slices is None and len(names) == 1:
            return factors[0][None], factors[1][None], self._scaling[names[0]], None, None
        if not names:
            weight = self.base_layer.weight
            empty = weight.new_zeros(0, out, 1), weight.new_zeros(0, dtype=torch.float32)
            return weight.new_zeros(0, 1, self.in_features), *empty, None, None
        scaling = self._scaling[names[0]] if len(names) == 1 else torch.cat([self._scaling[name] for name in names])
        lora_A, lora_B = factors[::2], factors[1::2]
        r, ranks = max(self.r[name] for name in names), None
        if any(self.r[name] < r for name in names):
            lora_A = [F.pad(A, (0, 0, 0, r - A.shape[0])) for A in lora_A]
            lora_B = [F.pad(B, (0, r - B.shape[1])) for B in lora_B]
            ranks = torch.cat([self._ranks[name] for name in names])
        if self.slices is None:
            return torch.stack(lora_A), torch.stack(lora_B), scaling, ranks, None
        # B's blocks: rows of r numbers, and where they belong among the out * slices rows of r that are all of B.
        T, n, blocks = len(names), len(self.slices), torch.cat(lora_B).view(len(names), -1, r)
        whole = blocks.new_zeros(T, out * n, r).index_copy_(1, self._block_rows, blocks).view(T, out, n * r)
        return torch.cat(lora_A).view(T, n * r, -1), whole, scaling, None, list(self.slices.values())

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A `[R, in]` and B `[out, R]` that act on all rows; with slices R = len(slices) * r, B block-wise."""
        lora_A, lora_B, *_ = self._operands((name,))
        return lora_A[0], lora_B[0]

    def _merge(self, names: tuple[str, ...]) -> Tensor:
        lora_A, lora_B, scaling, ranks, _ = self._operands(names)
        coeff = self._coefficients_of(names)
        return ops.lora_merge(self.base_layer.weight, lora_A, lora_B, scaling, coeff=coeff, ranks=ranks)

    # ------------------------------------------------------------------ caches and merging

    def _cached(self, slot: str, names: tuple[str, ...], compute: Callable[[tuple[str, ...]], Any]) -> Any:
        """`compute(names)` without gradients, kept until one of the tensors that it reads changes."""
        weight = self.base_layer.weight
        sources: list[Tensor] = [weight, *self._factors_of(names)]
        if self._coefficients is not None:
            sources.append(self._coefficients)
        if not is_plain(*sources) or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return compute(names)  # a graph has no memory of its own; it computes the few products each time
        countable = not any(t.is_inference() for t in sources)  # inference tensors carry no version
        stamp = [(id(t), t._version, t.data_ptr()) for t in sources] if countable else []
        kept = self._cache.get(slot)
        if kept and countable and kept[1] == stamp:
            return kept[2]
        # Out of inference mode, so that a later training step may save the result for its backward.
        with torch.inference_mode(False), torch.no_grad():
            value = compute(names)
        self._cache[slot] = (sources, stamp, value)  # holding the sources keeps their ids unique
        return value

    def merge(self) -> None:
        """Write the active set into the base weight, in place. The forward is then the plain linear layer.

        Raises:
            RuntimeError: already merged, or nothing is active.
        """
        self.require_unmerged()
        if not self._active:
            raise RuntimeError("merge needs an active set of adapters: call set_adapter first")
        with torch.no_grad():
            merged = self._merge(self._active)
            self._original_weight = self.base_layer.weight.detach().clone()
            self.base_layer.weight.copy_(merged)
        self._cache.clear()

    def unmerge(self) -> None:
        """Restore the base weight to the bits it had before `merge`.

        Raises:
            RuntimeError: nothing is merged.
        """
        if self._original_weight is None:
            raise RuntimeError("unmerge needs merged adapters: call merge first")
        with torch.no_grad():
            self.base_layer.weight.copy_(self._original_weight)
        self._original_weight = None
        self._cache.clear()

    def require_unmerged(self) -> None:
        """Raise RuntimeError while the adapters are merged into the base weight."""
        if self.merged:
            raise RuntimeError("the adapters are merged into the base weight: call unmerge() first")

    def train(self, mode: bool = True) -> MultiLoRALinear:
        self._cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiLoRALinear:
        super()._apply(fn, recurse)
        self._cache.clear()
        self._set_constants(*self.r)
        if self._coefficients is not None and not self._coefficients.requires_grad:
            self._coefficients = self._coefficients.to(self.base_layer.weight.device)
        return self

    def _set_constants(self, *names: str) -> None:
        """Scale and rank of each adapter as one-element tensors beside the weight, scales in float32 or wider."""
        weight, slices = self.base_layer.weight, list((self.slices or {}).values())
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.inference_mode(False):
            if slices:  # where row o of block i of B is in [out * slices, r]
                rows = [torch.arange(start, stop) * len(slices) + i for i, (start, stop) in enumerate(slices)]
                self._block_rows = torch.cat(rows).to(weight.device)
            for name in names:
                r = self.r[name]
                self._scaling[name] = torch.tensor([self.lora_alpha[name] / r], dtype=wide, device=weight.device)
                self._ranks[name] = torch.tensor([r], device=weight.device)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry no cache and no graph: coefficients that are a result of other tensors are detached.
        state = {**self.__dict__, "_cache": {}, "_batch": None, "_ensemble": None}
        if self._coefficients is not None and not self._coefficients.is_leaf:
            state["_coefficients"] = self._coefficients.detach()
        return state
