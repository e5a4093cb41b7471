"""The CUDA prototype operators beside every other way to compute the same, on one GPU: one table, with its goals.

    python benchmarks/cuda_prototypes.py [--rows 1 2] [--quick] [--no-compile] [--out FOLDER/NAME]

GPU and wall times are taken as in cuda_lora.py: calls in one CUDA graph that walk through sets of inputs larger than
the L2 cache, rounds that visit every form in turn, medians over rounds; each form is first compared with float64.
EASE's loops, restated here from its description, move everything to the CPU and back: they are called once, and wall
time counts, as it does for EASE's head, which is launched part by part. The best torch form joins in once more under
torch.compile. Forms named "TF32" run with torch.backends.cuda.matmul.allow_tf32. Writes NAME.csv, a line for each form,
and NAME.md.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import record
import torch
import torch.nn.functional as F
from cuda_cases import DEVICE, OURS, Step
from cuda_lora import FOOTPRINT, Run, as_tuple, ceilings, error_of, gpu_times, markdown, prepare, wall_times
from torch import Tensor

from plora_ext import libraries, ops, reference

D, ALPHA = 768, 0.1
EASE, COMPILED = "EASE", "torch.compile"
FAST = ", TF32"
FIELDS = {
    "row": "", "case": "", "form": "", "gpu_us": ".1f", "gpu_iqr_us": ".2f", "wall_us": ".1f", "error": ".1e",
    "over_ours": ".2f", "extra_MB": ".1f", "goals": "", "note": "",
}  # fmt: skip
Form = Callable[[Any], Any]
Line = dict[str, Any]


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


def ease_completion(p: Any) -> Tensor:
    """EASE's loops: on the CPU, a cosine and an addition for each old and new class of each pair of tasks."""
    bank = p.bank.cpu()
    C, T, _ = bank.shape
    n = C // T
    result = bank.clone()
    for i in range(T):
        for j in range(i + 1, T):
            old, new, values = bank[i * n : (i + 1) * n, i], bank[j * n :, i], bank[j * n :, j]
            similarity = torch.zeros(len(old), len(new))
            for a in range(len(old)):
                for b in range(len(new)):
                    similarity[a][b] = torch.cosine_similarity(old[a], new[b], dim=0)
            similarity = torch.softmax(similarity, dim=1)
            filled = torch.zeros_like(old)
            for a in range(len(old)):
                for b in range(len(new)):
                    filled[a] += similarity[a][b] * values[b]
            result[i * n : (i + 1) * n, j] = filled
    return result.to(DEVICE)


def einsum(p: Any) -> Tensor:
    prototypes = F.normalize(p.prototypes, dim=-1) * p.weights[..., None]
    return torch.einsum("btd,ctd->bc", F.normalize(p.features, dim=-1), prototypes)


def ease_head(p: Any) -> Tensor:
    """EASE's head: for each task's classes, each subspace is normalised and multiplied anew."""
    blocks, T = [], p.features.shape[1]
    n = len(p.prototypes) // T
    features, weight = p.features.flatten(1), p.prototypes.flatten(1)
    for i in range(T):
        total: Tensor | None = None
        for j in range(T):
            part = slice(j * D, (j + 1) * D)
            x, w = (
                F.normalize(features[:, part], p=2, dim=1),
                F.normalize(weight[i * n : (i + 1) * n, part], p=2, dim=1),
            )
            logits = F.linear(x, w) if i == j else ALPHA * F.linear(x, w) / (T - 1)
            total = logits if total is None else total + logits
        blocks.append(total)
    return torch.cat([b for b in blocks if b is not None], dim=1)


# ---------------------------------------------------------------------- cases


@dataclass
class Case:
    row: int
    name: str
    make: Callable[[], Any]
    forms: dict[str, Form]
    reference: Form  # of one set, in float64
    goals: list[Callable[[dict[str, Line]], str]] = field(default_factory=list)
    tolerance: float = 1e-5
    train: bool = False
    launched: tuple[str, ...] = ()  # forms that are not captured
    once: tuple[str, ...] = ()  # forms of many seconds


def verdict(text: str, figure: float, met: bool) -> str:
    return f"{text}: {figure:.2f} {'met' if met else 'NOT MET'}"


def is_torch(name: str) -> bool:
    return not name.startswith((OURS, EASE))


def at_most(bound: float, form: str = OURS, rival: str = "") -> Callable[[dict[str, Line]], str]:
    """The time of a form is at most `bound` times that of a rival; "": of the best torch form in the same precision."""

    def goal(lines: dict[str, Line]) -> str:
        fast = form.endswith(FAST)
        names = [rival] if rival else [n for n in lines if is_torch(n) and n.endswith(FAST) == fast]
        times = [lines[n]["gpu_us"] for n in names if n in lines and "gpu_us" in lines[n]]
        if not times or "gpu_us" not in lines.get(form, {}):
            return f"{form} ≤ {bound} × {rival or 'best torch'}: not measured"
        ratio = lines[form]["gpu_us"] / min(times)
        return verdict(f"{form} ≤ {bound} × {rival or 'best torch'}", ratio, ratio <= bound)

    return goal


def at_least(gain: float, rival: str) -> Callable[[dict[str, Line]], str]:
    """Wall time of a rival over ours."""

    def goal(lines: dict[str, Line]) -> str:
        if "wall_us" not in lines.get(rival, {}):
            return f"{rival} ≥ {gain:.0f} ×: not measured"
        ratio = lines[rival]["wall_us"] / lines[OURS]["wall_us"]
        return verdict(f"{rival} ≥ {gain:.0f} × (wall)", ratio, ratio >= gain)

    return goal


def within(microseconds: float) -> Callable[[dict[str, Line]], str]:
    def goal(lines: dict[str, Line]) -> str:
        return verdict(f"≤ {microseconds:.0f} µs", lines[OURS]["gpu_us"], lines[OURS]["gpu_us"] <= microseconds)

    return goal


def memory(form: str, megabytes: float) -> Callable[[dict[str, Line]], str]:
    def goal(lines: dict[str, Line]) -> str:
        extra = lines.get(form, {}).get("extra_MB")
        if extra is None:
            return f"{form} ≤ {megabytes:.0f} MB extra: not measured"
        return verdict(f"{form} ≤ {megabytes:.0f} MB extra", extra, extra <= megabytes)

    return goal


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(grad)


def class_sums(C: int, dtype: torch.dtype, bandwidth: float, goal: bool) -> Case:
    N = 50_000

    def make() -> Any:
        labels = torch.randint(0, C, (N,), device=DEVICE)
        return SimpleNamespace(features=randn(N, D, dtype=dtype), labels=labels, classes=C)

    def share(lines: dict[str, Line]) -> str:
        achieved = N * D * dtype.itemsize / (lines[OURS]["gpu_us"] * 1e-6) / bandwidth
        return verdict("≥ 0.85 of copy bandwidth", achieved, achieved >= 0.85) if goal else f"{achieved:.2f} of copy"

    forms: dict[str, Form] = {
        OURS: lambda p: ops.class_sums(p.features, p.labels, C)[0],
        "index_add_": lambda p: reference.class_sums(p.features, p.labels, C)[0],
        "one-hot product": one_hot_product,
        "sort, segment_reduce": sorted_segments,
    }
    name = f"class_sums, {N:,} x {D}, {C} classes, {str(dtype).removeprefix('torch.')}"
    reference_form = lambda p: one_hot_product(SimpleNamespace(**{**vars(p), "features": p.features.double()}))  # noqa: E731
    return Case(1, name, make, forms, reference_form, [share], tolerance=1e-5 if dtype.itemsize == 4 else 1e-2)


def reconstruct(
    Co: int, Cn: int, mode: str = "complement", train: bool = False, fast: bool = False, **more: Any
) -> Case:
    def make() -> Any:
        old, new, values = (randn(n, D, grad=train) for n in (Co, Cn, Cn))
        return SimpleNamespace(old=old, new=new, values=values, grad=randn(Co, D))

    def form(module: Any) -> Form:
        forward = lambda p: module.reconstruct_prototypes(p.old, p.new, p.values, mode=mode)  # noqa: E731
        return Step(forward, "old new values") if train else forward

    forms: dict[str, Form] = {OURS: form(ops), "plain torch": form(reference)}
    if mode == "complement":
        forms["attention"] = Step(attention, "old new values") if train else attention
    if fast:
        forms |= {name + FAST: with_tf32(f) for name, f in forms.items()}

    def exact(p: Any) -> Any:
        leaves = {n: t.detach().double().requires_grad_(train) for n, t in vars(p).items()}
        return form(reference)(SimpleNamespace(**leaves))

    name = f"reconstruct_prototypes, {mode}, {Co:,} x {Cn:,}{', forward and backward' if train else ''}"
    return Case(2, name, make, forms, exact, train=train, tolerance=5e-3 if fast else 1e-5, **more)


def complete(C: int, T: int, quick: bool, train: bool = False, **more: Any) -> Case:
    def make() -> Any:
        tasks = torch.arange(C, device=DEVICE) * T // C
        return SimpleNamespace(bank=randn(C, T, D, grad=train), tasks=tasks, grad=randn(C, T, D))

    def form(forward: Form) -> Form:
        return Step(forward, "bank") if train else forward

    forms: dict[str, Form] = {
        OURS: form(lambda p: ops.complete_prototypes(p.bank, p.tasks)),
        "torch, all pairs at once": form(all_pairs),
        "torch, pair by pair": form(pair_by_pair),
    }
    if not train and not quick:
        forms[f"{EASE}, loops"] = ease_completion

    def exact(p: Any) -> Any:
        wide = SimpleNamespace(bank=p.bank.detach().double().requires_grad_(train), tasks=p.tasks, grad=p.grad.double())
        return form(pair_by_pair)(wide)

    name = f"complete_prototypes, C={C}, T={T}{', forward and backward' if train else ''}"
    return Case(3, name, make, forms, exact, train=train, once=(EASE,), **more)


def head(B: int, C: int, T: int, train: bool = False, **more: Any) -> Case:
    def make() -> Any:
        weights = ops.own_other_weights(torch.arange(C, device=DEVICE) * T // C, T, ALPHA)
        features, prototypes = randn(B, T, D, grad=train), randn(C, T, D, grad=train)
        return SimpleNamespace(features=features, prototypes=prototypes, weights=weights, grad=randn(B, C))

    def form(forward: Form) -> Form:
        return Step(forward, "features prototypes") if train else forward

    forms: dict[str, Form] = {
        OURS: form(lambda p: ops.subspace_logits(p.features, p.prototypes, p.weights)),
        "einsum": form(einsum),
        "plain torch": form(lambda p: reference.subspace_logits(p.features, p.prototypes, p.weights)),
    }
    if not train:
        forms[f"{EASE}, forward_reweight"] = ease_head

    def exact(p: Any) -> Any:
        leaves = {n: t.detach().double().requires_grad_(train and n != "weights") for n, t in vars(p).items()}
        return form(einsum)(SimpleNamespace(**leaves))

    name = f"subspace_logits, T={T}, B={B}, C={C}{', forward and backward' if train else ''}"
    return Case(4, name, make, forms, exact, train=train, launched=(EASE,), **more)


def cases(rows: list[int], quick: bool, bandwidth: float) -> list[Callable[[], Case]]:
    b16, f32 = torch.bfloat16, torch.float32
    score = 20_000 * 1_000 * 4 / 1e6  # megabytes
    found: list[tuple[int, Callable[[], Case]]] = [
        (1, lambda: class_sums(100, f32, bandwidth, True)),
        (1, lambda: class_sums(100, b16, bandwidth, False)),
        (1, lambda: class_sums(10, f32, bandwidth, False)),
        (2, lambda: reconstruct(95, 5)),
        (2, lambda: reconstruct(500, 50)),
        (2, lambda: reconstruct(900, 100, goals=[within(25)])),
        (2, lambda: reconstruct(900, 100, "shift")),
        (2, lambda: reconstruct(900, 100, train=True, goals=[at_most(1)])),
        (2, lambda: reconstruct(500, 5000)),
        (
            2,
            lambda: reconstruct(
                20_000, 1_000, fast=True,
                goals=[at_most(0.85), at_most(0.35, OURS + FAST, "plain torch"), at_most(0.35, OURS + FAST),
                       memory(OURS, 0.05 * score), memory(OURS + FAST, 0.05 * score)],
            ),
        ),
        (2, lambda: reconstruct(20_000, 1_000, "shift")),
        (2, lambda: reconstruct(20_000, 1_000, train=True, goals=[at_most(1)])),
        (3, lambda: complete(100, 20, quick, goals=[at_most(0.2), at_least(1000, f"{EASE}, loops")])),
        (3, lambda: complete(200, 40, quick, goals=[at_most(0.2), at_least(1000, f"{EASE}, loops")])),
        (3, lambda: complete(100, 20, quick, train=True, goals=[at_most(1)])),
        (4, lambda: head(128, 100, 20, goals=[at_most(1), at_least(100, f"{EASE}, forward_reweight")])),
        (4, lambda: head(16, 100, 20)),
        (4, lambda: head(1024, 1000, 20)),
        (4, lambda: head(128, 100, 20, train=True, goals=[at_most(1)])),
    ]  # fmt: skip
    return [make for row, make in found if row in rows]


# ---------------------------------------------------------------------- measuring


def extra_megabytes(form: Form, p: Any) -> float:
    """Peak of allocated memory over what is there before, less the outputs."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = as_tuple(form(p))
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - sum(o.nbytes for o in outputs)) / 1e6


def measure(case: Case, rounds: int, compiled: bool) -> list[Line]:
    torch.manual_seed(0)
    torch.set_grad_enabled(case.train)
    first = case.make()
    expected = as_tuple(case.reference(first))
    size = sum(t.nbytes for t in vars(first).values() if isinstance(t, Tensor))
    sets = [first, *(case.make() for _ in range(max(3, min(24, math.ceil(FOOTPRINT / size))) - 1))]
    lines: dict[str, Line] = {}
    runs: dict[str, Run] = {}

    def add(name: str, form: Form) -> None:
        line = lines[name] = {"row": case.row, "case": case.name, "form": name}
        try:
            start = time.perf_counter()
            line["error"] = error_of(form(first), expected)
            if not line["error"] <= case.tolerance:
                line["note"] = "WRONG"
            if case.once and name.startswith(case.once):
                line["wall_us"] = 1e6 * (time.perf_counter() - start)
                line.setdefault("note", "called once")
                return
            line["extra_MB"] = extra_megabytes(form, first)
            launched = bool(case.launched) and name.startswith(case.launched)
            runs[name] = prepare(form, sets[:3] if launched else sets, captured=not launched)
            if not runs[name].graph:
                line.setdefault("note", "not captured")
        except Exception as error:
            line["note"] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:150]

    for name, form in case.forms.items():
        add(name, form)
    rivals = {n: run for n, run in runs.items() if is_torch(n) and not n.endswith(FAST)}
    if compiled and rivals:
        quick = gpu_times(rivals, 3)
        best = min(quick, key=lambda n: statistics.median(quick[n]))
        form = case.forms[best]
        forward = torch.compile(form.forward if isinstance(form, Step) else form, dynamic=False)
        add(f"{COMPILED}({best})", Step(forward, form.leaves) if isinstance(form, Step) else forward)

    walls = wall_times(runs, max(3, rounds // 3))
    for name, values in gpu_times(runs, rounds).items():
        low, middle, high = statistics.quantiles(values, n=4)
        lines[name] |= {"gpu_us": middle, "gpu_iqr_us": high - low, "wall_us": statistics.median(walls[name])}
    if OURS in runs:
        right = {n: line for n, line in lines.items() if line.get("note") != "WRONG"}
        for line in right.values():
            if "gpu_us" in line:
                line["over_ours"] = line["gpu_us"] / lines[OURS]["gpu_us"]
        lines[OURS]["goals"] = "; ".join(goal(right) for goal in case.goals)
    return list(lines.values())


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
        line["goals"] = verdict("≤ 1000 MB extra", extra, extra <= 1000)
        lines.append(line)
    return lines


# ---------------------------------------------------------------------- the report


def cells(line: Line, *names: str) -> list[str]:
    return [format(line[name], FIELDS[name]) if line.get(name) not in (None, "") else "–" for name in names]


def summary(lines: list[Line]) -> str:
    table = []
    for case in dict.fromkeys(line["case"] for line in lines):
        own = {line["form"]: line for line in lines if line["case"] == case}
        rivals = [r for n, r in own.items() if is_torch(n) and "over_ours" in r and not n.endswith(FAST)]
        best = min(rivals, key=lambda r: r["over_ours"], default={})
        ease = next((r for n, r in own.items() if n.startswith(EASE)), {})
        table.append([
            *cells(own[OURS], "row", "case", "gpu_us", "wall_us"), *cells(best, "form", "gpu_us", "over_ours"),
            *cells(ease, "wall_us"), *cells(own[OURS], "extra_MB", "error", "goals"),
        ])  # fmt: skip
    columns = "row | case | ours µs | wall µs | best torch form | its µs | / ours | EASE wall µs | extra MB | error"
    return markdown(columns + " | goals", table)


def write(out: Path, lines: list[Line], where: dict[str, str]) -> None:
    """OUT.csv and OUT.md, each whole or not at all."""
    columns = [name for name in FIELDS if name != "goals"]
    forms = markdown(" | ".join(columns), [cells(line, *columns) for line in lines])
    head = ", ".join(f"{key} {value}" for key, value in where.items())
    text = f"{head}\n\n{summary(lines)}\n## All forms\n\n{forms}"
    record.write(out, [*FIELDS, *where], ({**line, **where} for line in lines), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4], help="some of the rows 1 to 4")
    parser.add_argument("--quick", action="store_true", help="few rounds, and not EASE's loops")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cuda_prototypes")
    parser.add_argument("--commit", help="what to call the version measured, where this is no git checkout")
    args = parser.parse_args()
    if "cuda" not in libraries.loaded:
        raise SystemExit(f"the CUDA kernels are not loaded: {libraries.missing}")
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth, _ = ceilings()
    where = {
        "GPU": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        **record.origin(args.commit),
        "copy TB/s": f"{bandwidth / 1e12:.2f}",
    }
    lines: list[Line] = []
    start = time.monotonic()
    rounds, compiled = 5 if args.quick else 21, not args.no_compile
    found = [functools.partial(measure, make(), rounds, compiled) for make in cases(args.rows, args.quick, bandwidth)]
    for run in [*found, *([hundred_thousand] if 2 in args.rows else [])]:
        new = run()
        lines += new
        write(args.out, lines, where)
        print(f"[{time.monotonic() - start:.0f} s] {new[0]['case']}", file=sys.stderr)
        for line in new:
            print("   ", " | ".join(cells(line, *list(FIELDS)[2:])), file=sys.stderr, flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(summary(lines))


if __name__ == "__main__":
    main()
