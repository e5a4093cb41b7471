"""plora_ext: compiled multi-LoRA and prototype operators for PyTorch, and class-incremental learning built on them."""

from __future__ import annotations

import importlib
from types import ModuleType

from plora_ext import variables

__version__ = "0.1.0"

variables.settle()

from plora_ext import libraries  # noqa: E402  imports torch

libraries.load()

from plora_ext import ops, reference  # noqa: E402  ops gives the loaded operators their fake implementations and gradients

# Imported when first named: timm, matplotlib and rich are theirs to import.
_LAZY = ("cil", "data", "io", "nn")
__all__ = ["__version__", "cil", "data", "io", "nn", "ops", "reference"]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
