"""Fake implementations: the shapes and dtypes of results, for `torch.compile` and `torch.export`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plora_ext.ops import rules
from plora_ext.ops.checks import wide
from plora_ext.ops.compiled import LORA


def lora(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of y and of what is kept."""

    def fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        lora_A, lora_B, _, _, weight, _, bias_A, bias_B, _, relu, _, _, keep, *_ = rest[name == "lora_indexed" :]
        (T, r, _), M, out = lora_A.shape, x.shape[0], lora_B.shape[1]
        y = x.new_empty((T, M, out) if name == "lora_all" else (M, out))
        if not keep or x.device.type == "cpu":
            return y, x.new_empty(0)
        if rules.dense(name, T, r, rules.is_linear(weight, bias_A, bias_B, relu)):
            return y, x.new_empty(weight.shape)
        return y, x.new_empty(M, rules.padded(r) * (1 if name == "lora_indexed" else T))

    return fake


def _lora_backward(name: str) -> Callable[..., tuple[Tensor, ...]]:
    def fake(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        lora_A, lora_B, scaling, _, bias_A, bias_B, _, _, _, _, needs, *_ = rest[name == "lora_indexed" :]
        return tuple(
            torch.empty(t.shape, dtype=t.dtype, device=t.device)
            if t is not None and needs >> bit & 1
            else (x if t is None else t).new_empty(0)
            for bit, t in enumerate((x, lora_A, lora_B, scaling, bias_A, bias_B))
        )

    return fake


def _one(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Tensor, bias: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    lead, r, out = x.shape[:-1], lora_A.shape[0], lora_B.shape[0]
    y = x.new_empty(*lead, out)
    if not keep or x.device.type == "cpu":
        return y, x.new_empty(0)
    return y, x.new_empty(weight.shape if rules.dense("lora_sum", 1, r, True) else (lead.numel(), rules.padded(r)))


def _one_backward(
    grad: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Tensor, kept: Any, needs: int
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if needs >> bit & 1 else 0) for bit, t in enumerate((x, lora_A, lora_B)))


def _stack(x: Tensor, lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float]) -> tuple[Tensor, ...]:
    T, r = len(lora_A), max(A.shape[0] for A in lora_A)
    scales = x.new_empty(T, dtype=torch.float32)
    return x.new_empty(T, r, lora_A[0].shape[1]), x.new_empty(T, lora_B[0].shape[0], r), scales


def _class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    sums = features.new_empty((num_classes, features.shape[1]), dtype=wide(features.dtype))
    return sums, features.new_empty(num_classes, dtype=torch.int64)


def register() -> None:
    """All of them, with torch."""
    nothing = lambda *args: None  # noqa: E731
    fakes: dict[str, Callable[..., Any]] = {
        "lora_merge": lambda weight, *rest: torch.empty_like(weight).contiguous(),
        "class_sums": _class_sums,
        "class_sums_": nothing,
        "lora_all_out": nothing,
        "lora_weighted": lora("lora_sum"),
        "lora_weighted_backward": _lora_backward("lora_sum"),
        "lora_one": _one,
        "lora_one_backward": _one_backward,
        "lora_stack": _stack,
        "reconstruct_prototypes": lambda old, new, values, *rest: old.new_empty(old.shape[0], values.shape[1]),
        "reconstruct_prototypes_backward": lambda grad, *of: tuple(t.new_empty(t.shape) for t in of[:3]),
        "complete_prototypes": lambda p, *rest: p.new_empty(p.shape),
        "complete_prototypes_backward": lambda grad, p, *rest: p.new_empty(p.shape),
        "subspace_logits": lambda f, p, *rest: f.new_empty(len(f), len(p)),
    }
    for name in LORA:
        fakes |= {name: lora(name), f"{name}_": nothing, f"{name}_backward": _lora_backward(name)}
    for name, fake in fakes.items():
        torch.library.register_fake(f"plora_ext::{name}", fake)
