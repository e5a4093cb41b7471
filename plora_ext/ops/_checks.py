"""What the public operators share in looking at their arguments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def shape(t: Tensor) -> list[int]:
    """The shape as an error message shows it."""
    return list(t.shape)


# The types of device that know autocast; asked once, since the compiler cannot trace the question.
_AUTOCAST = frozenset(t for t in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if torch.amp.is_autocast_available(t))


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device; some types have none."""
    return device_type in _AUTOCAST and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """No autocast inside."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def wide(t: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64, else float32."""
    return torch.promote_types(t.dtype, torch.float32)


def check(
    op: str, name: str, t: Tensor, expected: tuple[int | str, ...], like: Tensor, dtype: torch.dtype | None
) -> None:
    """One clear error where `t` does not fit; a name in `expected` accepts any size, `dtype` None any dtype."""
    if t.dim() != len(expected) or any(isinstance(n, int) and n != m for n, m in zip(expected, t.shape, strict=False)):
        raise ValueError(f"{op}: {name} must have the shape [{', '.join(map(str, expected))}], got {shape(t)}")
    if t.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, as the first argument, got {t.device}")
    if dtype is not None and t.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, as the first argument, got {t.dtype}")
