"""The low-rank operators beside torch's own forms of the same product.

    pytest benchmarks/bench_lora.py --benchmark-group-by=group --benchmark-sort=mean

One group a case, with the frozen layer alone as its floor. Runs on the GPU where there is one, else on the CPU; inputs
rotate among several sets, so that the next one is not in cache. On a GPU a call is timed to its end (synchronised).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext import ops, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SETS = 4  # of inputs
B, N, D, R = 16, 197, 768, 16  # 16 images of a ViT-B/16


class Problem:
    """A frozen linear layer, T adapters and SETS inputs; `ids` gives every image an adapter of its own."""

    def __init__(self, T: int, grad: bool = False) -> None:
        torch.manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE, dtype=DTYPE)

        self.xs = [draw(B, N, D) for _ in range(SETS)]
        self.weight, self.bias = draw(D, D) / D**0.5, draw(D)
        self.A = (draw(T, R, D) / D**0.5).requires_grad_(grad)
        self.B = draw(T, D, R).requires_grad_(grad)
        self.s = torch.full((T,), 0.5, device=DEVICE)
        self.ids = torch.arange(B, device=DEVICE) % T
        self.layer = {"weight": self.weight, "bias": self.bias}

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def timed(benchmark: Any, problem: Problem, function: Callable[[Tensor], Any]) -> None:
    xs = itertools.cycle(problem.xs)

    def call() -> None:
        function(next(xs))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2 * SETS):  # compile, fill the allocator
        call()
    benchmark(call)


def bmm_by_image(p: Problem, x: Tensor) -> Tensor:
    """The best torch form for one adapter an image: gathered factors, two batched products."""
    h = torch.bmm(x, p.A[p.ids].transpose(1, 2))
    return torch.baddbmm(p.base(x), h, p.B[p.ids].transpose(1, 2), alpha=0.5)


def loop(p: Problem, x: Tensor) -> Tensor:
    """PEFT's mixed batch: gather, two products and scatter per adapter."""
    y = p.base(x)
    for t in range(len(p.s)):
        rows = (p.ids == t).nonzero().squeeze(1)
        y[rows] += 0.5 * (x[rows] @ p.A[t].T) @ p.B[t].T
    return y


INDEXED = {
    "plora_ext": lambda p, x: ops.lora_indexed(x, p.ids, p.A, p.B, p.s, **p.layer),
    "plain torch": lambda p, x: reference.lora_indexed(x, p.ids, p.A, p.B, p.s, **p.layer),
    "bmm + baddbmm": bmm_by_image,
    "loop": loop,
    "frozen layer alone": lambda p, x: p.base(x),
}
SUM = {
    "plora_ext": lambda p, x: ops.lora_sum(x, p.A, p.B, p.s, **p.layer),
    "plain torch": lambda p, x: reference.lora_sum(x, p.A, p.B, p.s, **p.layer),
    "merge, then linear": lambda p, x: F.linear(x, ops.lora_merge(p.weight, p.A, p.B, p.s), p.bias),
    "frozen layer alone": lambda p, x: p.base(x),
}
ALL = {
    "plora_ext": lambda p, x: ops.lora_all(x, p.A, p.B, p.s, **p.layer),
    "plain torch": lambda p, x: reference.lora_all(x, p.A, p.B, p.s, **p.layer),
    "frozen layer alone": lambda p, x: p.base(x),
}
MERGE = {
    "plora_ext": lambda p, x: ops.lora_merge(p.weight, p.A, p.B, p.s),
    "plain torch": lambda p, x: reference.lora_merge(p.weight, p.A, p.B, p.s),
}


CASES = {
    "lora_indexed, T=10": (INDEXED, 10),
    "lora_sum, T=1": (SUM, 1),
    "lora_sum, T=10": (SUM, 10),
    "lora_all, T=10": (ALL, 10),
    "lora_merge, T=10": (MERGE, 10),
}


@pytest.mark.parametrize(("case", "rival"), [(case, rival) for case, (forms, _) in CASES.items() for rival in forms])
def test_forward(benchmark: Any, case: str, rival: str) -> None:
    forms, T = CASES[case]
    benchmark.group = case
    problem = Problem(T)
    timed(benchmark, problem, lambda x: forms[rival](problem, x))


@pytest.mark.parametrize("rival", SUM)
@pytest.mark.benchmark(group="one adapter trained: forward and backward")
def test_training(benchmark: Any, rival: str) -> None:
    """Gradients to x, A and B; the frozen layer alone gives the gradient to x only."""
    problem = Problem(1, grad=True)
    for x in problem.xs:
        x.requires_grad_()

    def step(x: Tensor) -> None:
        leaves = [x] if rival == "frozen layer alone" else [x, problem.A, problem.B]
        y = SUM[rival](problem, x)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    timed(benchmark, problem, step)
