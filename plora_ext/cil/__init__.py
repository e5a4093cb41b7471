"""Class-incremental learning: task stream, methods, the loop and metrics, a learner of tasks as they come."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plora_ext.cil.callbacks import Callback
    from plora_ext.cil.heads import Head
    from plora_ext.cil.learner import Learner
    from plora_ext.cil.loop import run
    from plora_ext.cil.methods import Method
    from plora_ext.cil.plora import PLoRA
    from plora_ext.cil.registry import register_alignment, register_backbone, register_head, register_method
    from plora_ext.cil.result import Result
    from plora_ext.cil.settings import Settings
    from plora_ext.cil.stream import Task, TaskStream
    from plora_ext.cil.trained import Trained
    from plora_ext.data import Images, load_images

__all__ = [
    "Callback", "Head", "Images", "Learner", "Method", "PLoRA", "Result", "Settings", "Task", "TaskStream", "Trained",
    "load_images", "register_alignment", "register_backbone", "register_head", "register_method", "run",
]  # fmt: skip
# Imported when first named: the loop needs timm, a learner that is not yet made does not.
_HOMES = {"Images": "data", "load_images": "data", "run": "cil.loop", "Head": "cil.heads", "Method": "cil.methods",
          "Task": "cil.stream", "TaskStream": "cil.stream", "Callback": "cil.callbacks"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "cil.registry" if name.startswith("register") else f"cil.{name.lower()}")
    value = globals()[name] = getattr(importlib.import_module(f"plora_ext.{home}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
