"""The name that the loop's modules had together: for code written before they were taken apart."""

from __future__ import annotations

import warnings

from plora_ext.cil.build import load_backbone, load_data, make_cache, make_stream, pick_device, prepare, seed_everything
from plora_ext.cil.evaluate import Evaluator
from plora_ext.cil.loop import run
from plora_ext.cil.result import Result
from plora_ext.data import Backbone, Images

__all__ = [
    "Backbone", "Evaluator", "Images", "Result", "load_backbone", "load_data", "make_cache", "make_stream",
    "pick_device", "prepare", "run", "seed_everything",
]  # fmt: skip

warnings.warn(
    "plora_ext.cil.engine is now plora_ext.cil.loop, build, evaluate and result; run, Result and Images are names of "
    "plora_ext.cil",
    DeprecationWarning,
    stacklevel=2,
)
