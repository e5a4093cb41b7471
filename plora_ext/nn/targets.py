"""Which linear layers of a model are adapted: names matched as PEFT does, and row slices of fused qkv layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import cast

from torch import nn

from plora_ext.nn.linear import is_plain_linear

Rows = dict[str, tuple[int, int]]
# Attributes of timm's attentions whose qkv holds q, k and v of each head together (CoAtNet and MaxViT; TinyViT and
# EfficientFormer), or k and v alone (GCViT).
_NO_THIRDS = ("head_first", "val_dim", "use_global")


def find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, Rows | None]:
    """Names of the linear layers to adapt, each with its row slices (`None`: all rows)."""
    targets = _named(model, target_modules)
    for name in targets:
        if why := _unsupported(model, name):
            raise ValueError(f"{name!r} {why}; leave it out of target_modules")
    return targets


def _named(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, Rows | None]:
    modules = dict(model.named_modules(remove_duplicate=False))
    linear = [name for name, module in modules.items() if name and isinstance(module, nn.Linear)]
    if isinstance(target_modules, str):
        try:
            found = [name for name in linear if re.fullmatch(target_modules, name)]
        except re.error as error:
            raise ValueError(f"target_modules {target_modules!r} is no regular expression: {error}") from None
        if target_modules == "all-linear":
            found = [name for name in linear if _unsupported(model, name) is None]
        if not found:
            if whole := [name for name in linear if _ends_with(name, target_modules)]:
                raise ValueError(
                    f"target_modules as a text is a regular expression of whole names, such as {whole[0]!r}, which "
                    f"{target_modules!r} does not match: give the list [{target_modules!r}]"
                )
            raise ValueError(_no_match(f"the expression {target_modules!r}", target_modules, linear))
        return dict.fromkeys(found)

    wanted = list(target_modules) if isinstance(target_modules, Iterable) else [target_modules]
    if any(not isinstance(target, str) for target in wanted):
        raise ValueError(f"target_modules must be names of modules or one regular expression, got {target_modules!r}")
    if not wanted:
        raise ValueError("target_modules must name at least one module, got none")
    targets: dict[str, Rows | None] = {}
    sliced: dict[str, list[str]] = {}
    for target in wanted:
        found = [name for name in linear if _ends_with(name, target)]
        targets.update(dict.fromkeys(found))
        if target in ("q", "k", "v"):
            fused = [name for name in linear if _ends_with(name, "qkv")]
            for name in fused:
                sliced.setdefault(name, []).append(target)
            found += fused
        if not found:
            others = sorted({type(modules[name]).__name__ for name in modules if _ends_with(name, target)})
            what = f"{target!r} (only {', '.join(others)})" if others else repr(target)
            raise ValueError(_no_match(what, target, linear))
    for name, slices in sliced.items():
        if name in targets:
            raise ValueError(f"target_modules must choose either qkv or its slices {slices}, got both for {name!r}")
        targets[name] = _qkv_slices(model, name, sorted(set(slices), key="qkv".index))
    return {name: targets[name] for name in linear if name in targets}  # in the order of the model


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _no_match(what: str, target: str, linear: list[str]) -> str:
    last = {name.rpartition(".")[2] for name in linear}
    close = difflib.get_close_matches(target, sorted(last | set(linear)), n=5, cutoff=0.5) or sorted(last)
    said = f"closest are {close[:8]}" if linear else "it has no torch.nn.Linear"
    return f"target_modules must match linear layers of the model; {what} matches none, {said}"


def _qkv_slices(model: nn.Module, name: str, chosen: list[str]) -> Rows:
    out, parent = linear_at(model, name).out_features, model.get_submodule(name.rpartition(".")[0])
    if out % 3 or any(getattr(parent, attribute, False) for attribute in _NO_THIRDS):
        raise ValueError(
            f"target_modules {chosen} need a fused qkv whose rows are q, k, v in thirds; {name!r} with {out} rows "
            "is laid out otherwise: choose 'qkv' instead"
        )
    third = out // 3
    return {key: ("qkv".index(key) * third, ("qkv".index(key) + 1) * third) for key in chosen}


def _unsupported(model: nn.Module, name: str) -> str | None:
    """Why the linear layer `name` cannot be adapted."""
    layer = linear_at(model, name)
    if isinstance(layer._parameters.get("weight"), nn.UninitializedParameter):
        return "has no weight before its first forward: run the model once before"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return (
            "belongs to a torch.nn.MultiheadAttention, which reads its weight and never calls it, so an adapter would "
            "have no effect"
        )
    if is_plain_linear(layer):
        return None
    if type(layer) is nn.Linear:
        return (
            "has a weight that a hook computes, as pruning and weight_norm do: make it permanent "
            "before (torch.nn.utils.prune.remove, remove_weight_norm)"
        )
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    return f"is a {kind}, and only plain torch.nn.Linear layers can be adapted"


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(name))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
