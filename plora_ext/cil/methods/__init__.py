"""The methods: PLoRA in its fused and its ensemble form, and the baselines it is measured against.

All have prototypes and a head on top (plora_ext.cil.heads) and train an adapter with the same loop, so a comparison
differs only in what the methods are about: which adapters exist, which are active, and what becomes of old prototypes.
"""

from __future__ import annotations

from plora_ext.cil.methods.base import Method, _Adapted
from plora_ext.cil.methods.baselines import APER, Joint, LoRAFirst, LoRASequential, SimpleCIL
from plora_ext.cil.methods.ensemble import PLoRAEnsemble
from plora_ext.cil.methods.fused import PLoRAFused
from plora_ext.cil.registry import METHODS

__all__ = [
    "APER", "METHODS", "Joint", "LoRAFirst", "LoRASequential", "Method", "PLoRAEnsemble", "PLoRAFused", "SimpleCIL",
    "_Adapted",
]  # fmt: skip

METHODS |= {
    "plora": PLoRAFused,
    "plora-ensemble": PLoRAEnsemble,
    "simplecil": SimpleCIL,
    "lora-sequential": LoRASequential,
    "lora-first": LoRAFirst,
    "aper": APER,
    "joint": Joint,
}
