"""Modules: a linear layer with many adapters, its injection into models, prototypes and cosine heads."""

from plora_ext.nn.adapters import Adapters
from plora_ext.nn.ensemble import Ensemble
from plora_ext.nn.heads import CosineHead, SubspaceHead
from plora_ext.nn.injection import inject
from plora_ext.nn.linear import MultiLoRALinear
from plora_ext.nn.prototypes import PrototypeBank

__all__ = ["Adapters", "CosineHead", "Ensemble", "MultiLoRALinear", "PrototypeBank", "SubspaceHead", "inject"]
