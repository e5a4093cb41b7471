"""Put multi-adapter linear layers into a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from plora_ext.nn.adapters import Adapters, check_alpha, check_rank
from plora_ext.nn.linear import MultiLoRALinear
from plora_ext.nn.state import State
from plora_ext.nn.targets import find_targets, linear_at, replace_module

__all__ = ["inject"]


def inject(
    model: nn.Module,
    target_modules: str | Sequence[str] = ("qkv", "proj"),
    r: int = 16,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    autocast_adapter_dtype: bool = True,
) -> Adapters:
    """Replace linear layers of `model` by `MultiLoRALinear`, in place, and freeze the whole model.

    Args:
        model: any torch model; its parameters stop training (only adapters train from here on, unless
            `requires_grad_` is called on them later).
        target_modules: which layers, matched as PEFT does: a list of names, each of which a module's full name equals
            or ends with after a dot (`"qkv"` matches `blocks.0.attn.qkv`), or one regular expression for the full
            name, or `"all-linear"` for all that can be adapted. `"q"`, `"k"` and `"v"` choose row slices of fused
            `qkv` layers as well (rows in the order q, k, v, as in timm), each with an A and a B of its own. Modules
            other than linear ones that share a name (`patch_embed.proj`, a convolution) are left alone.
        r: default rank of the adapters.
        lora_alpha: default alpha, the scale being alpha / r; `None` means alpha = r.
        lora_dropout: dropout before the adapters in training.
        autocast_adapter_dtype: keep adapters in float32 where weights have 16 bits, as PEFT does.

    Returns:
        A handle on the adapters. No adapter exists yet: add one with `Adapters.add_adapter`.

    Raises:
        ValueError: the model carries adapters already, a target is no name and no regular expression or matches no
            linear layer, a layer cannot be adapted, r does not fit it, or alpha or the dropout is out of range.
    """
    if any(isinstance(module, MultiLoRALinear) for module in model.modules()):
        raise ValueError("model already carries adapters: take hold of them with Adapters(model)")
    check_alpha(lora_alpha)
    targets = find_targets(model, target_modules)
    for name, rows in targets.items():
        check_rank(r, name, linear_at(model, name), rows)
    wrapped: dict[nn.Module, MultiLoRALinear] = {}
    state = State(r, lora_alpha)
    for name, rows in targets.items():
        layer = linear_at(model, name)
        if layer not in wrapped:
            made = MultiLoRALinear(layer, rows, lora_dropout, autocast_adapter_dtype, state)
            wrapped[layer] = made.train(layer.training)
    # A module may be reachable under several names: it is wrapped once and replaced under all, targets or not.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in wrapped:
            replace_module(model, name, wrapped[module])
    model.requires_grad_(False)
    return Adapters(model)
