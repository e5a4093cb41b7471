"""plora_ext: compiled multi-LoRA and prototype operators for PyTorch, and class-incremental learning built on them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from plora_ext import variables

__version__ = "0.1.0"

variables.settle()

if not variables.command():  # which says --help without torch
    from plora_ext import ops, reference  # ops loads the operators and gives them fake implementations and gradients

if TYPE_CHECKING:
    from plora_ext import cil, data, io, nn, ops, reference
    from plora_ext.cil.learner import Learner
    from plora_ext.io import load_adapter, save_adapter
    from plora_ext.nn import Adapters, Ensemble, MultiLoRALinear, inject

__all__ = [
    "Adapters", "Ensemble", "Learner", "MultiLoRALinear", "__version__", "cil", "data", "inject", "io", "load_adapter",
    "nn", "ops", "reference", "save_adapter",
]  # fmt: skip
# What is imported when it is first named: timm, matplotlib and rich are theirs to import.
_ROOMS = ("cil", "data", "io", "nn", "ops", "reference")
_ROOM_OF = {"Learner": "cil.learner", "load_adapter": "io", "save_adapter": "io"}  # of the other names: nn


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF.get(name, 'nn')}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
