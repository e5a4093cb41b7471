"""The place where `plora_ext.cil.PLoRA` was before, and its name there."""

from plora_ext.cil.plora import PLoRA as PLoRANet

__all__ = ["PLoRANet"]
