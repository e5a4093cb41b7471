"""What the features under an adapter depend on, as a fingerprint: what kept features are known by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import plora_ext
from plora_ext.change import fingerprint
from plora_ext.cil.frozen import base_modules
from plora_ext.nn import Adapters
from plora_ext.nn.adapters import BASE

__all__ = ["space_fingerprints"]


def space_fingerprints(model: nn.Module | Adapters, names: Sequence[str], *context: str) -> dict[str, str]:
    """For each adapter the fingerprint of all that its features depend on.

    That is: the frozen weights, buffers and other tensors, the modules and their numbers and switches, the adapter's
    factors and scale, the versions of torch and of this package, the type of device, and `context`, whatever else
    there is (the dtype of autocast). Pixels are known by their own digests.

    Args:
        model: a model, or a handle on its adapters.
        names: adapters; `"__base__"` is the model without one.
    """
    whole = model.model if isinstance(model, Adapters) else model
    layers = model.layers if isinstance(model, Adapters) else {}
    tensors = {
        f"{prefix}.{key}": t
        for prefix, module in base_modules(whole)
        for key, t in (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
        if isinstance(t, Tensor)
    }
    device = next(iter(tensors.values())).device.type if tensors else "cpu"
    about = [torch.__version__, plora_ext.__version__, device, *context, *_structure(whole), *tensors]
    base = fingerprint(*about, *tensors.values())
    prints = {}
    for name in names:
        parts: list[Tensor | str] = [base]
        if name != BASE:
            for key, layer in layers.items():
                parts += [key, f"{layer.lora_alpha[name]} {layer.r[name]}"]
                parts += [p for pair in layer.pairs(name) for p in pair]
        prints[name] = fingerprint(*parts)
    return prints


def _structure(model: nn.Module) -> Iterable[str]:
    """A line for each module: its class and those of its attributes that are numbers, switches or words."""
    plain = (int, float, bool, str, tuple)
    for prefix, module in base_modules(model):
        values: dict[str, Any] = {k: v for k, v in vars(module).items() if isinstance(v, plain)}
        own = {k: v for k, v in values.items() if k != "training" and not k.startswith("_")}
        yield f"{prefix} {type(module).__module__}.{type(module).__qualname__} {module.extra_repr()} {own}"
