"""The CUDA prototype operators beside every other way to compute the same, on one GPU: one table, with its goals.

    python benchmarks/cuda_prototypes.py [--rows 1 2] [--quick] [--no-compile] [--out FOLDER/NAME]

Times are taken as in cuda_lora.py. EASE's loops, restated in ease.py, move everything to the CPU and back: they are
called once, and wall time counts, as it does for EASE's head, which is launched part by part. Forms named "TF32" run
with torch.backends.cuda.matmul.allow_tf32. Writes NAME.csv, a line for each form, and NAME.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import ease
import harness
import torch
import torch.nn.functional as F
from harness import DEVICE, Form, GPUCase, Line, Step, ceilings, doubled, error_of, extra_megabytes, verdict
from torch import Tensor

from plora_ext import ops, reference
from plora_ext.bench import OURS

D, ALPHA = 768, 0.1
EASE, FAST = "EASE", ", TF32"
Goal = Callable[[dict[str, Line]], str]
FIELDS = {
    "row": "", "case": "", "form": "", "gpu_us": ".1f", "gpu_iqr_us": ".2f", "wall_us": ".1f", "error": ".1e",
    "over_ours": ".2f", "extra_MB": ".1f", "goals": "", "note": "",
}  # fmt: skip


# ---------------------------------------------------------------------- forms


def with_tf32(form: Form) -> Form:
    def fast(p: Any) -> Any:
        switch: Any = torch.backends.cuda.matmul
        switch.allow_tf32 = True
        try:
            return form(p)
        finally:
            switch.allow_tf32 = False

    return fast


def one_hot_product(p: Any) -> Tensor:
    return F.one_hot(p.labels, p.classes).to(p.features.dtype).T @ p.features


def sorted_segments(p: Any) -> Tensor:
    order = p.labels.argsort(stable=True)
    lengths = torch.zeros(p.classes, dtype=torch.int64, device=DEVICE).scatter_add_(
        0, p.labels, torch.ones_like(p.labels)
    )
    return torch.segment_reduce(p.features[order].float(), "sum", lengths=lengths, unsafe=True)


def attention(p: Any) -> Tensor:
    q, k = F.normalize(p.old, dim=-1), F.normalize(p.new, dim=-1)
    return F.scaled_dot_product_attention(q[None, None], k[None, None], p.values[None, None], scale=1.0)[0, 0]


def all_pairs(p: Any) -> Tensor:
    """Every pair of classes in the query's own subspace by one product; then all subspaces by one batched product."""
    C, T, _ = p.bank.shape
    u = F.normalize(p.bank, dim=-1).transpose(0, 1)  # [T, C, D]
    own = u[p.tasks, torch.arange(C, device=DEVICE)].unflatten(0, (T, -1))  # every task has as many classes
    cos = torch.bmm(own, u.mT).flatten(0, 1)  # [C, C]
    keys = p.tasks >= torch.arange(T, device=DEVICE)[:, None]
    weights = torch.softmax(cos.masked_fill(~keys[:, None], -torch.inf), dim=-1)
    filled = torch.bmm(weights, p.bank.transpose(0, 1)).transpose(0, 1)
    return torch.where((p.tasks[:, None] < torch.arange(T, device=DEVICE))[..., None], filled, p.bank)


def pair_by_pair(p: Any) -> Tensor:
    """A few launches for each pair of tasks; the tasks' sizes are known on the host."""
    C, T, _ = p.bank.shape
    result, n = p.bank.clone(), C // T
    unit = F.normalize(p.bank, dim=-1)
    for i in range(T):
        old = slice(i * n, (i + 1) * n)
        cos = unit[old, i] @ unit[:, i].T
        for j in range(i + 1, T):
            result[old, j] = torch.softmax(cos[:, j * n :], dim=-1) @ p.bank[j * n :, j]
    return result


def einsum(p: Any) -> Tensor:
    prototypes = F.normalize(p.prototypes, dim=-1) * p.weights[..., None]
    return torch.einsum("btd,ctd->bc", F.normalize(p.features, dim=-1), prototypes)


# ---------------------------------------------------------------------- cases


@dataclass
class Case(GPUCase):
    """Forms of one computation, and what is asked of ours."""

    goals: list[Goal] = field(default_factory=list)
    compile: bool = True
    eager_sets = 3
    memory = True

    def to_compile(self, name: str) -> bool:
        return is_torch(name) and not name.endswith(FAST)

    def judge(self, lines: dict[str, Line]) -> list[str]:
        return [goal(lines) for goal in self.goals]


def is_torch(name: str) -> bool:
    return not name.startswith((OURS, EASE))


def at_most(bound: float, form: str = OURS, rival: str = "") -> Goal:
    """The time of a form is at most `bound` times that of a rival; "": of the best torch form in the same precision."""

    def goal(lines: dict[str, Line]) -> str:
        alike = [n for n in lines if is_torch(n) and n.endswith(FAST) == form.endswith(FAST)]
        us = {n: line["gpu_us"] for n, line in lines.items() if "gpu_us" in line}
        times = [us[n] for n in ([rival] if rival else alike) if n in us]
        ratio = us[form] / min(times) if form in us and times else None
        return verdict(f"{form} ≤ {bound} × {rival or 'best torch'}", ratio, at_most=bound)

    return goal


def at_least(gain: float, rival: str) -> Goal:
    """Wall time of a rival over ours."""

    def goal(lines: dict[str, Line]) -> str:
        its = lines.get(rival, {}).get("wall_us")
        return verdict(f"{rival} ≥ {gain:.0f} × (wall)", its and its / lines[OURS]["wall_us"], at_least=gain)

    return goal


def within(us: float) -> Goal:
    return lambda lines: verdict(f"≤ {us:.0f} µs", lines[OURS]["gpu_us"], at_most=us)


def memory(form: str, mb: float) -> Goal:
    return lambda lines: verdict(f"{form} ≤ {mb:.0f} MB extra", lines.get(form, {}).get("extra_MB"), at_most=mb)


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(grad)


def case(
    row: int, name: str, make: Callable[[], Any], forms: dict[str, Form], exact: Form, leaves: str = "", **more: Any
) -> Case:
    """Forms of a computation, of a training step where there are `leaves`; `exact` in float64 is the reference."""
    train = bool(leaves)
    if train:
        name += ", forward and backward"
        forms, exact = {n: Step(form, leaves) for n, form in forms.items()}, Step(exact, leaves)
    return Case(row, name, make, forms, lambda p: exact(doubled(p)), train=train, **more)


def class_sums(C: int, dtype: torch.dtype, bandwidth: float, goal: bool) -> Case:
    N = 50_000

    def make() -> Any:
        labels = torch.randint(0, C, (N,), device=DEVICE)
        return SimpleNamespace(features=randn(N, D, dtype=dtype), labels=labels, classes=C)

    def share(lines: dict[str, Line]) -> str:
        achieved = N * D * dtype.itemsize / (lines[OURS]["gpu_us"] * 1e-6) / bandwidth
        return verdict("≥ 0.85 of copy bandwidth", achieved, at_least=0.85) if goal else f"{achieved:.2f} of copy"

    forms: dict[str, Form] = {
        OURS: lambda p: ops.class_sums(p.features, p.labels, C)[0],
        "index_add_": lambda p: reference.class_sums(p.features, p.labels, C)[0],
        "one-hot product": one_hot_product,
        "sort, segment_reduce": sorted_segments,
    }
    name, tolerance = f"class_sums, {N:,} x {D}, {C} classes, {str(dtype)[6:]}", 1e-5 if dtype.itemsize == 4 else 1e-2
    return case(1, name, make, forms, one_hot_product, goals=[share], tolerance=tolerance)


def reconstruct(
    Co: int, Cn: int, mode: str = "complement", train: bool = False, fast: bool = False, **more: Any
) -> Case:
    def make() -> Any:
        old, new, values = (randn(n, D, grad=train) for n in (Co, Cn, Cn))
        return SimpleNamespace(old=old, new=new, values=values, grad=randn(Co, D))

    def plain(p: Any) -> Tensor:
        return reference.reconstruct_prototypes(p.old, p.new, p.values, mode=mode)

    forms: dict[str, Form] = {
        OURS: lambda p: ops.reconstruct_prototypes(p.old, p.new, p.values, mode=mode),
        "plain torch": plain,
    }
    if mode == "complement":
        forms["attention"] = attention
    if fast:
        forms |= {name + FAST: with_tf32(form) for name, form in forms.items()}
    name, leaves = f"reconstruct_prototypes, {mode}, {Co:,} x {Cn:,}", "old new values" if train else ""
    return case(2, name, make, forms, plain, leaves, tolerance=5e-3 if fast else 1e-5, **more)


def complete(C: int, T: int, quick: bool, train: bool = False, **more: Any) -> Case:
    def make() -> Any:
        tasks = torch.arange(C, device=DEVICE) * T // C
        return SimpleNamespace(bank=randn(C, T, D, grad=train), tasks=tasks, grad=randn(C, T, D))

    forms: dict[str, Form] = {
        OURS: lambda p: ops.complete_prototypes(p.bank, p.tasks),
        "torch, all pairs at once": all_pairs,
        "torch, pair by pair": pair_by_pair,
    }
    if not train and not quick:
        forms[f"{EASE}, loops"] = lambda p: ease.complete(p.bank, p.tasks)
    name, leaves = f"complete_prototypes, C={C}, T={T}", "bank" if train else ""
    return case(3, name, make, forms, pair_by_pair, leaves, once=(EASE,), **more)


def head(B: int, C: int, T: int, train: bool = False, **more: Any) -> Case:
    def make() -> Any:
        weights = ops.own_other_weights(torch.arange(C, device=DEVICE) * T // C, T, ALPHA)
        features, prototypes = randn(B, T, D, grad=train), randn(C, T, D, grad=train)
        return SimpleNamespace(features=features, prototypes=prototypes, weights=weights, grad=randn(B, C))

    forms: dict[str, Form] = {
        OURS: lambda p: ops.subspace_logits(p.features, p.prototypes, p.weights),
        "einsum": einsum,
        "plain torch": lambda p: reference.subspace_logits(p.features, p.prototypes, p.weights),
    }
    if not train:
        forms[f"{EASE}, forward_reweight"] = lambda p: ease.logits(p.features, p.prototypes, [C // T] * T, ALPHA)
    name, leaves = f"subspace_logits, T={T}, B={B}, C={C}", "features prototypes" if train else ""
    return case(4, name, make, forms, einsum, leaves, eager=(EASE,), **more)


def cases(rows: list[int], quick: bool, bandwidth: float) -> list[Callable[[], Case]]:
    b16, f32 = torch.bfloat16, torch.float32
    score = 20_000 * 1_000 * 4 / 1e6  # megabytes
    ease_loops, quickly = at_least(1000, f"{EASE}, loops"), partial(complete, quick=quick)
    large = [
        at_most(0.85), at_most(0.35, OURS + FAST, "plain torch"), at_most(0.35, OURS + FAST),
        memory(OURS, 0.05 * score), memory(OURS + FAST, 0.05 * score),
    ]  # fmt: skip
    found: dict[int, list[Callable[[], Case]]] = {
        1: [
            partial(class_sums, 100, f32, bandwidth, True),
            partial(class_sums, 100, b16, bandwidth, False),
            partial(class_sums, 10, f32, bandwidth, False),
        ],
        2: [
            partial(reconstruct, 95, 5),
            partial(reconstruct, 500, 50),
            partial(reconstruct, 900, 100, goals=[within(25)]),
            partial(reconstruct, 900, 100, "shift"),
            partial(reconstruct, 900, 100, train=True, goals=[at_most(1)]),
            partial(reconstruct, 500, 5000),
            partial(reconstruct, 20_000, 1_000, fast=True, goals=large),
            partial(reconstruct, 20_000, 1_000, "shift"),
            partial(reconstruct, 20_000, 1_000, train=True, goals=[at_most(1)]),
        ],
        3: [
            partial(quickly, 100, 20, goals=[at_most(0.2), ease_loops]),
            partial(quickly, 200, 40, goals=[at_most(0.2), ease_loops]),
            partial(quickly, 100, 20, train=True, goals=[at_most(1)]),
        ],
        4: [
            partial(head, 128, 100, 20, goals=[at_most(1), at_least(100, f"{EASE}, forward_reweight")]),
            partial(head, 16, 100, 20),
            partial(head, 1024, 1000, 20),
            partial(head, 128, 100, 20, train=True, goals=[at_most(1)]),
        ],
    }
    return [make for row, those in found.items() if row in rows for make in those]


def hundred_thousand() -> list[Line]:
    """100,000 x 100,000: time and memory, and some rows against float64."""
    torch.set_grad_enabled(False)
    n = 100_000
    p = SimpleNamespace(old=randn(n, D), new=randn(n, D), values=randn(n, D))
    forward: Form = lambda p: ops.reconstruct_prototypes(p.old, p.new, p.values)  # noqa: E731
    some = slice(0, n, n // 50)
    exact = reference.reconstruct_prototypes(p.old[some].double(), p.new.double(), p.values.double())
    lines = []
    for name, form in ((OURS, forward), (OURS + FAST, with_tf32(forward))):
        error = error_of(form(p)[some], (exact,))
        extra = extra_megabytes(form, p)
        start = time.perf_counter()
        form(p)
        torch.cuda.synchronize()
        line: Line = {"row": 2, "case": f"reconstruct_prototypes, {n:,} x {n:,}", "form": name, "error": error}
        line |= {"wall_us": 1e6 * (time.perf_counter() - start), "extra_MB": extra, "note": "called once"}
        line["goals"] = verdict("≤ 1000 MB extra", extra, at_most=1000)
        lines.append(line)
    return lines


# ---------------------------------------------------------------------- the report


HEADS = "row | case | ours µs | wall µs | best torch form | its µs | / ours | EASE wall µs | extra MB | error | goals"


def shown(own: dict[str, Line]) -> list[str]:
    """Of a case: ours, the fastest right form in torch, EASE's, and the goals."""
    rivals = [r for n, r in own.items() if is_torch(n) and "over_ours" in r and not n.endswith(FAST)]
    best = min(rivals, key=lambda r: r["over_ours"], default={})
    loops = next((r for n, r in own.items() if n.startswith(EASE)), {})
    ours, show = own[OURS], partial(harness.cells, FIELDS)
    return [
        *show(ours, "row", "case", "gpu_us", "wall_us"), *show(best, "form", "gpu_us", "over_ours"),
        *show(loops, "wall_us"), *show(ours, "extra_MB", "error", "goals"),
    ]  # fmt: skip


def main() -> None:
    parser = harness.gpu_options(__doc__, "cuda_prototypes", 4)
    parser.add_argument("--quick", action="store_true", help="few rounds, and not EASE's loops")
    args = parser.parse_args()
    harness.need_cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth, _ = ceilings()
    rounds, compiled = 5 if args.quick else 21, not args.no_compile
    found = (make() for make in cases(args.rows, args.quick, bandwidth))
    runs = [partial(harness.measure, case, rounds, compiled) for case in found]
    runs += [hundred_thousand] if 2 in args.rows else []
    where = harness.gpu_facts(args.commit, **{"copy TB/s": f"{bandwidth / 1e12:.2f}"})
    harness.report(args.out, FIELDS, HEADS, shown, where, (run() for run in runs))


if __name__ == "__main__":
    main()
