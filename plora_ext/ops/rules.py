"""Which products of the low-rank operators are dense, what a forward keeps, and which samples come sorted.

`csrc/common/lora_plan.h` holds the rules of the first two for the kernels as well; a test compares them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def dense(family: str, T: int, r: int, linear: bool) -> bool:
    """Whether CUDA computes with the merged weight W + sum s B A, and keeps that: `lora_dense` of lora_plan.h.

    linear: a frozen weight is given, and the adapters have neither biases nor an activation.
    """
    return linear and family == "lora_sum" and T * r > (64 if T > 1 else 192)


def padded(r: int) -> int:
    """Columns of the kept h for a rank r: `padded_rank` of lora_plan.h."""
    return 8 * max(1, -(-r // 8))


FEW_SAMPLES = 512  # of which kernels gather the rows of each adapter in any case: `kFewRows` of lora_plan.h


def sorting_pays(T: int, rows: int, r: int) -> bool:
    """Whether a GPU's kernels are better given many samples, of so many rows, sorted by their T adapters of rank r.

    As measured on an H200: where the 128 rows of a tile meet adapters of more than 16 slots (of 16 ranks, lora_plan.h).
    """
    met = min(T, -(-128 // max(rows, 1)))
    return met * -(-r // 16) > 16


def keeps(
    family: str, x_asks: bool, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight: Tensor | None,
    bias_A: Tensor | None, bias_B: Tensor | None, relu: bool,
) -> bool:  # fmt: skip
    """Whether a gradient that is asked for needs what the forward can keep: the merged weight, or else h."""
    if dense(family, lora_A.shape[0], lora_A.shape[1], is_linear(weight, bias_A, bias_B, relu)):
        return x_asks
    if lora_B.requires_grad or scaling.requires_grad:
        return True
    return relu and (x_asks or lora_A.requires_grad or (bias_A is not None and bias_A.requires_grad))


def is_linear(weight: Any, bias_A: Any, bias_B: Any, relu: bool) -> bool:
    """As `dense` asks for it."""
    return weight is not None and bias_A is None and bias_B is None and not relu
