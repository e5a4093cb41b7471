"""What the public operators share in looking at their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from plora_ext.torch_private import untraced, unwrapped


def shape(t: Tensor) -> list[int]:
    """The shape as an error message shows it."""
    return list(t.shape)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(op: str, name: str, t: object) -> None:
    """One clear error where `t` is no tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")


def check(
    op: str, name: str, t: Tensor, expected: tuple[int | str, ...], like: Tensor, dtype: torch.dtype | None
) -> None:
    """One clear error where `t` does not fit; a name in `expected` accepts any size, `dtype` None any dtype."""
    check_tensor(op, name, t)
    if t.dim() != len(expected) or any(isinstance(n, int) and n != m for n, m in zip(expected, t.shape, strict=False)):
        raise ValueError(f"{op}: {name} must have the shape [{', '.join(map(str, expected))}], got {shape(t)}")
    if t.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, as the first argument, got {t.device}")
    if dtype is not None and t.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, as the first argument, got {t.dtype}")


def check_floating(op: str, name: str, t: Tensor, dims: str) -> None:
    """One clear error where `t` is not of floats, or has not as many dimensions as `dims` names."""
    check_tensor(op, name, t)
    if not t.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {t.dtype}")
    if t.dim() != dims.count(",") + 1:
        raise ValueError(f"{op}: {name} must be [{dims}], got {shape(t)}")


def check_integers(op: str, name: str, t: Tensor) -> None:
    """One clear error where `t` is not of integers."""
    check_tensor(op, name, t)
    if t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be integers, got {t.dtype}")


def check_range(op: str, name: str, t: Tensor, low: int, high: int) -> None:
    """The error of the CPU's kernels where a value is outside of [low, high], for what runs without them.

    Only on the CPU, and where there are values to look at: `torch.jit.trace` looks at those that it traces with, and
    code that is compiled or exported at none.
    """
    if t.device.type != "cpu" or torch.compiler.is_compiling():
        return
    try:
        with untraced() as unseen:
            values = unwrapped(t)
            bad = values[(values < low) | (values > high)].tolist() if unseen else []
    except RuntimeError:  # torch's about tensors without values
        return
    if bad:
        raise RuntimeError(f"{op}: {name} must be between {low} and {high}, got {bad[0]}")
