"""The prototype operators beside torch's own forms of the same computation.

    pytest benchmarks/bench_prototypes.py --benchmark-group-by=group --benchmark-sort=mean

Runs on the GPU where there is one, else on the CPU; on a GPU a call is timed to its end (synchronised).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext import ops, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D = 768
RIVALS = {"plora_ext": ops, "plain torch": reference}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def timed(benchmark: Any, function: Callable[[], Any]) -> None:
    def call() -> None:
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    call()
    benchmark(call)


@pytest.mark.parametrize("rival", [*RIVALS, "one-hot product"])
@pytest.mark.benchmark(group="class_sums, 50,000 rows, 100 classes")
def test_class_sums(benchmark: Any, rival: str) -> None:
    features, labels = draw(50_000, D), torch.randint(0, 100, (50_000,), device=DEVICE)
    if rival == "one-hot product":
        timed(benchmark, lambda: F.one_hot(labels, 100).float().T @ features)
    else:
        timed(benchmark, lambda: RIVALS[rival].class_sums(features, labels, 100))


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("old", "new"), [(95, 5), (900, 100), (5000, 1000)])
def test_reconstruct(benchmark: Any, rival: str, old: int, new: int) -> None:
    benchmark.group = f"reconstruct_prototypes, {old} x {new}"
    args = draw(old, D), draw(new, D), draw(new, D)
    timed(benchmark, lambda: RIVALS[rival].reconstruct_prototypes(*args))


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("C", "T"), [(100, 10), (100, 20)])
def test_complete(benchmark: Any, rival: str, C: int, T: int) -> None:
    benchmark.group = f"complete_prototypes, {C} classes, {T} tasks"
    prototypes, task_of_class = draw(C, T, D), torch.arange(C, device=DEVICE) * T // C
    timed(benchmark, lambda: RIVALS[rival].complete_prototypes(prototypes, task_of_class))


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.benchmark(group="subspace_logits, 20 subspaces, 128 images, 100 classes")
def test_subspace_logits(benchmark: Any, rival: str) -> None:
    args = draw(128, 20, D), draw(100, 20, D), torch.rand(100, 20, device=DEVICE)
    timed(benchmark, lambda: RIVALS[rival].subspace_logits(*args))
