"""Classifiers on top of any method's features; none keeps an image or its feature."""

from __future__ import annotations

from plora_ext.cil.heads.base import Head
from plora_ext.cil.heads.cosine import Cosine, Subspace
from plora_ext.cil.heads.gaussian import Gaussian
from plora_ext.cil.heads.ranpac import RanPAC
from plora_ext.cil.heads.replay import Replay
from plora_ext.cil.registry import HEADS

__all__ = ["HEADS", "Cosine", "Gaussian", "Head", "RanPAC", "Replay", "Subspace"]
