"""Every operator of `plora_ext.bench.OPERATORS` beside its twin and torch's own forms of the same computation.

    python benchmarks/operators.py [--device cuda] [--only REGEX] [--seconds S] [--out FOLDER/NAME]

With the frozen layer alone as the floor of the low-rank operators. Inputs rotate among several sets, so that the next
one is not in cache; forms take turns; on a GPU, in bfloat16, a call is timed to its end. Writes NAME.csv and NAME.md.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext import bench, ops
from plora_ext.bench import OPERATORS, OURS, in_turn
from plora_ext.cil.build import pick_device

SETS, BASE = 4, "frozen layer alone"
FIELDS = ("case", "rival", "median_ms", "iqr_ms", "rounds")
Form = Callable[..., Any]


def base(x: Tensor, weight: Tensor, bias: Tensor, **rest: Any) -> Tensor:
    return F.linear(x, weight, bias)


def bmm(x: Tensor, ids: Tensor, lora_A: Tensor, lora_B: Tensor, **layer: Any) -> Tensor:
    """The best torch form for one adapter an image: gathered factors, two batched products."""
    h = torch.bmm(x, lora_A[ids].transpose(1, 2))
    return torch.baddbmm(base(x, **layer), h, lora_B[ids].transpose(1, 2), alpha=0.5)


def loop(x: Tensor, ids: Tensor, lora_A: Tensor, lora_B: Tensor, **layer: Any) -> Tensor:
    """PEFT's mixed batch: gather, two products and scatter per adapter."""
    y = base(x, **layer)
    for t in range(len(lora_A)):
        rows = (ids == t).nonzero().squeeze(1)
        y[rows] += 0.5 * (x[rows] @ lora_A[t].T) @ lora_B[t].T
    return y


def merge(x: Tensor, bias: Tensor, **given: Tensor) -> Tensor:
    return F.linear(x, ops.lora_merge(**given), bias)


def one_hot(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return F.one_hot(labels, num_classes).to(features.dtype).T @ features


RIVALS: dict[str, dict[str, Form]] = {
    "lora_indexed": {"bmm + baddbmm": bmm, "loop": loop, BASE: base},
    "lora_sum": {"merge, then linear": merge, BASE: base},
    "lora_all": {BASE: base},
    "class_sums": {"one-hot product": one_hot},
}
TRAINED = "lora_sum, one adapter trained: forward and backward"
CASES: dict[str, tuple[str, dict[str, int]]] = {  # the operator, and sizes other than usual
    **{f"{name}, T=10": (name, {}) for name in ("lora_indexed", "lora_sum", "lora_all", "lora_merge")},
    **{name: ("lora_sum", {"T": 1}) for name in ("lora_sum, T=1", TRAINED)},
    "class_sums, 50,000 rows, 100 classes": ("class_sums", {}),
    "reconstruct_prototypes, 95 x 5": ("reconstruct_prototypes", {"old": 95, "new": 5}),
    "reconstruct_prototypes, 900 x 100": ("reconstruct_prototypes", {}),
    "reconstruct_prototypes, 5000 x 1000": ("reconstruct_prototypes", {"old": 5000, "new": 1000}),
    "complete_prototypes, 100 classes, 10 tasks": ("complete_prototypes", {"T": 10}),
    "complete_prototypes, 100 classes, 20 tasks": ("complete_prototypes", {}),
    "subspace_logits, 20 subspaces, 128 images, 100 classes": ("subspace_logits", {}),
}


def step(form: Form, floor: bool, **given: Tensor) -> None:
    """Gradients to x, A and B; the frozen layer alone gives the gradient to x only."""
    leaves = [given[name].requires_grad_() for name in (("x",) if floor else ("x", "lora_A", "lora_B"))]
    y = form(**given)
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def measure(case: str, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A line for each form."""
    torch.manual_seed(0)
    name, sizes = CASES[case]
    half = device.type == "cuda" and name.startswith("lora")
    sets = [OPERATORS[name].inputs(device, torch.bfloat16 if half else torch.float32, **sizes) for _ in range(SETS)]
    forms = {**OPERATORS[name].forms, **RIVALS.get(name, {})}
    if case == TRAINED:
        forms = {rival: partial(step, form, rival == BASE) for rival, form in forms.items()}

    def timed(form: Form, inputs: Any) -> float:
        return bench.timed(partial(form, **next(inputs)), device)

    calls = {rival: partial(timed, form, itertools.cycle(sets)) for rival, form in forms.items()}
    with torch.set_grad_enabled(case == TRAINED):
        in_turn(calls, 2 * SETS)  # compile, fill the allocator
        times = in_turn(calls, 5, seconds)
    quartiles = {rival: statistics.quantiles(own, n=4) for rival, own in times.items()}
    figures = ((rival, round(q[1], 3), round(q[2] - q[0], 3), len(times[rival])) for rival, q in quartiles.items())
    return [dict(zip(FIELDS, (case, *line))) for line in figures]


def table(lines: list[dict[str, Any]]) -> str:
    ours = {line["case"]: line["median_ms"] for line in lines if line["rival"] == OURS}
    rows = ((n["case"], n["rival"], f"{n['median_ms']:.3f}", f"{n['median_ms'] / ours[n['case']]:.2f}") for n in lines)
    return harness.table(("case", "form", "median ms", "its time / ours"), rows, texts=2)


def main() -> None:
    parser = harness.options(__doc__, "operators")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=2, help="for each case (default: 2)")
    parser.add_argument("--only", default="", help="a regular expression that the case's name must hold")
    args = parser.parse_args()
    device = pick_device(args.device)
    lines = [line for case in CASES if re.search(args.only, case) for line in measure(case, device, args.seconds)]
    where = harness.facts(device, args.commit, threads=torch.get_num_threads())
    harness.write(args.out, FIELDS, lines, table(lines), where)
    print(table(lines), end="")


if __name__ == "__main__":
    main()
