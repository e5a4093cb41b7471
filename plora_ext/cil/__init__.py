"""Class-incremental learning: task stream, methods, loop and metrics, a learner of tasks as they come."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plora_ext.cil.callbacks import Callback as Callback
    from plora_ext.cil.heads import Head as Head
    from plora_ext.cil.learner import Learner as Learner
    from plora_ext.cil.loop import run as run
    from plora_ext.cil.methods import Method as Method
    from plora_ext.cil.plora import PLoRA as PLoRA
    from plora_ext.cil.registry import register_alignment as register_alignment
    from plora_ext.cil.registry import register_backbone as register_backbone
    from plora_ext.cil.registry import register_head as register_head
    from plora_ext.cil.registry import register_method as register_method
    from plora_ext.cil.result import Result as Result
    from plora_ext.cil.settings import Settings as Settings
    from plora_ext.cil.stream import Task as Task
    from plora_ext.cil.stream import TaskStream as TaskStream
    from plora_ext.data import Images as Images
    from plora_ext.data import load_images as load_images

# Imported when first named: the loop needs timm, a learner that is not yet made does not.
_FROM = {
    "Callback": "cil.callbacks",
    "Head": "cil.heads",
    "Images": "data",
    "Learner": "cil.learner",
    "Method": "cil.methods",
    "PLoRA": "cil.plora",
    "Result": "cil.result",
    "Settings": "cil.settings",
    "Task": "cil.stream",
    "TaskStream": "cil.stream",
    "load_images": "data",
    "register_alignment": "cil.registry",
    "register_backbone": "cil.registry",
    "register_head": "cil.registry",
    "register_method": "cil.registry",
    "run": "cil.loop",
}
__all__ = sorted(_FROM)


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"plora_ext.{_FROM[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
