"""Mammoth (https://github.com/aimagelab/mammoth): its LoRA layer on this package's operators, and PLoRA as a model.

In a checkout of Mammoth, `python -m plora_ext.integrations.mammoth --model plora --dataset seq-cifar100-224 ...` is its
`python main.py ...`, patched. In code, with the checkout on `sys.path`:

    from plora_ext.integrations import mammoth
    print(mammoth.patch())
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext import ops
from plora_ext.integrations import _patch
from plora_ext.integrations._layers import ones
from plora_ext.integrations._patch import Original, Patch, instead
from plora_ext.torch_private import is_plain

__all__ = ["patch", "unpatch"]

TESTED = "aimagelab/mammoth e75a491"


def patch(model: bool = True) -> Patch:
    """Replace `LoRALinear.forward` and register the model `plora`.

    y = x W^T + b + sum_t B_t A_t x for A [T, r, in] and B [T, out, r], or sum_t B_t x for dense B [T, out, in]. Mammoth
    forms the T outputs [batch, T, out, tokens] before it adds them; here they are never in memory.

    Args:
        model: register `plora` for `--model`. Imports Mammoth's models and data sets; where that fails (they need
            kornia and more, and one of them a download), the layer is patched and the model is left out, with the
            reason.

    Returns:
        What was replaced and what was left; also a context manager.

    Raises:
        ImportError: no checkout of Mammoth is on `sys.path`.
        TypeError: the checkout's functions take other arguments; nothing is patched then.
    """
    how = "run in a checkout of Mammoth with its requirements, or put it on sys.path"
    _patch.require("backbone.utils.lora_utils", how)

    def build(patch: Patch) -> None:
        patch.report.host = f"{TESTED} (as tested)"
        patch.replace("backbone.utils.lora_utils:LoRALinear.forward", instead(_forward))
        if model:
            patch.replace("models:REGISTERED_MODELS", _with_plora)
        patch.leave("LoRALinear with fan_in_fan_out, or 4-dimensional A and B", "Mammoth's own forward runs them")
        patch.leave("LoRATuner", "it hands its factors to LoRALinear, which is patched")

    return _patch.apply("Mammoth", build)


def unpatch() -> None:
    """Put Mammoth's own functions back."""
    _patch.remove("Mammoth")


def _forward(original: Original, self: Any, x: Tensor, AB: Any = None) -> Tensor:
    B: Any = AB.get("B") if isinstance(AB, dict) else AB
    A: Any = AB.get("A") if isinstance(AB, dict) else None
    weight, bias = self.weight, self.bias
    served = (
        isinstance(B, Tensor)
        and is_plain(x, weight, bias, A, B)
        and not self.fan_in_fan_out
        and x.dim() == B.dim() == 3
        and (A is None or (A.dim() == 3 and len(A) == len(B)))
        and (torch.is_autocast_enabled(x.device.type) or x.dtype == weight.dtype == B.dtype)
    )
    if not served:
        return original(self, x, AB)
    if A is None:  # dense changes of the weight
        return F.linear(x, weight + B.sum(0).to(weight.dtype), bias)
    return ops.lora_sum(x, A, B, ones(len(A), x), weight=weight, bias=bias)


def _with_plora(models: dict[str, Any]) -> dict[str, Any]:
    from plora_ext.integrations._mammoth_model import make_model

    return {**models, "plora": {"class": make_model(), "parsable_args": {}}}


def main() -> None:
    """Mammoth's own main.py, patched; arguments are Mammoth's."""
    _patch.run_patched(patch, "run in a checkout of Mammoth")


if __name__ == "__main__":
    main()
