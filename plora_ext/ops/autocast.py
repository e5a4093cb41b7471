"""Autocast: the low-rank products in its dtype, everything about prototypes in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from plora_ext.ops.compiled import LORA, PROTOTYPES, argument_names, op

# The types of device that know autocast; asked once, since the compiler cannot trace the question.
_KNOW_IT = frozenset(t for t in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if torch.amp.is_autocast_available(t))
_AS_IT_IS = {"scaling", "weights", "y", "sums", "counts"}  # small and kept in float32, or written to


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device; some types have none."""
    return device_type in _KNOW_IT and torch.is_autocast_enabled(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on a type of device; None where it is off."""
    return torch.get_autocast_dtype(device_type) if autocasts(device_type) else None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """No autocast inside."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def dtype_of(name: str, device_type: str) -> torch.dtype | None:
    """What autocast casts the arguments of an operator to; None leaves them."""
    if name.removesuffix("_") in LORA:
        return torch.get_autocast_dtype(device_type)
    return torch.float32 if name in PROTOTYPES else None


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """An argument in that dtype, if it is a tensor of floats; float64 stays."""
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(dtype)


def register(library: torch.library.Library) -> None:
    """The rule of every operator as a kernel of the dispatcher."""
    for name in op:
        casts = [argument not in _AS_IT_IS for argument in argument_names(name)]
        for device_type in ("cpu", "cuda"):
            library.impl(name, partial(_cast_and_run, name, device_type, casts), "Autocast" + device_type.upper())


def _cast_and_run(name: str, device_type: str, casts: list[bool], *args: Any) -> Any:
    dtype = dtype_of(name, device_type)
    with without_autocast(device_type):
        return op[name](*(cast(a, dtype) if casts_it else a for a, casts_it in zip(args, casts, strict=False)))
