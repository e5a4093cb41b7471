"""Classifiers on top of any method's features, beyond the cosine to prototypes; none keeps an image or its feature."""

from __future__ import annotations

import torch

from plora_ext.cil.heads.base import Head
from plora_ext.cil.heads.gaussian import Gaussian
from plora_ext.cil.heads.ranpac import RanPAC
from plora_ext.cil.heads.replay import Replay
from plora_ext.cil.settings import Settings

HEADS: dict[str, type[Head]] = {"gaussian": Gaussian, "ranpac": RanPAC, "replay": Replay}


def create_head(name: str, settings: Settings, device: torch.device) -> Head:
    """The head `name`, one of HEADS."""
    return HEADS[name](settings, device)


__all__ = ["HEADS", "Gaussian", "Head", "RanPAC", "Replay", "create_head"]
