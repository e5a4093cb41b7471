"""The CUDA low-rank operators beside every other way to compute the same, on one GPU: one table, with its goals.

    python benchmarks/cuda_lora.py [--rows 1 2] [--quick] [--no-compile] [--rivals FILE.py] [--out FOLDER/NAME]

GPU time: calls captured into one CUDA graph, which walk through sets of weights, inputs and outputs that are together
larger than the L2 cache, so that each call reads and writes DRAM; CUDA events around a replay. Wall time: the same
calls launched one by one, to the end of the last. Rounds visit every form in turn (A B C A B C ...), so that all see
the same clocks; figures are medians over rounds. Before it is timed, a form is compared with float64: one that is
wrong is marked and not ranked, one that fails is listed with its error. The best torch form of a case joins in once
more under torch.compile. A whole ViT is too long for a graph: its calls are launched one by one in both timings.

--rivals FILE.py adds forms: its function `rivals(case)` returns {name: callable}, and each callable takes one of
`case.sets` and returns what the case's other forms return. Writes NAME.csv, a line for each form, and NAME.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.util
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from cuda_cases import BASE, DEVICE, DTYPE, MERGE, OURS, Case, Form, Step, cases

from plora_ext import libraries

FOOTPRINT = 160e6  # bytes that the sets of a case take together; the L2 cache of an H200 holds about 50 MB
CALLS, SECONDS = 24, 0.03  # captured into one graph: so many calls, fewer where they take longer than this
FIELDS = {
    "row": "", "case": "", "form": "", "gpu_us": ".1f", "gpu_iqr_us": ".2f", "wall_us": ".1f", "error": ".1e",
    "ratios_of": "", "over_base": ".2f", "over_ours": ".2f", "goals": "", "note": "",
}  # fmt: skip
Line = dict[str, Any]


# ---------------------------------------------------------------------- measuring


@dataclass
class Run:
    """Calls of one form in a row: replayed from a CUDA graph, or launched one by one."""

    call: Form
    order: list[Any]
    graph: torch.cuda.CUDAGraph | None = None

    def go(self) -> None:
        if self.graph:
            self.graph.replay()
        else:
            self.launch()

    def launch(self) -> None:
        outputs = deque[Any](maxlen=len({id(p) for p in self.order}))  # an output lives until its set is used again
        for p in self.order:
            outputs.append(self.call(p))


@functools.cache
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def prepare(call: Form, sets: list[Any], captured: bool = True) -> Run:
    """Warm up and capture."""
    stream = side_stream()  # the one captured, so that autograd and cuBLAS get ready for it
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            Run(call, sets).launch()
            torch.cuda.synchronize()
    passes = min(math.ceil(CALLS / len(sets)), int(SECONDS / (time.perf_counter() - start)))
    run = Run(call, sets * max(1, passes))
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run.launch()
        run.graph = graph
    return run


def gpu_times(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Microseconds a call, round by round; graphs first, since what is launched one by one leaves gaps."""
    marks: dict[str, list[list[torch.cuda.Event]]] = {name: [] for name in runs}
    for graphs in (True, False):
        for _ in range(rounds + 1):
            for name in (n for n, run in runs.items() if bool(run.graph) == graphs):
                before, after = pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                before.record()
                runs[name].go()
                after.record()
                marks[name].append(pair)
        torch.cuda.synchronize()
    return {n: [1e3 * a.elapsed_time(b) / len(runs[n].order) for a, b in pairs[1:]] for n, pairs in marks.items()}


def wall_times(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            run.launch()
            torch.cuda.synchronize()
            times[name].append(1e6 * (time.perf_counter() - start) / len(run.order))
    return times


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def error_of(outputs: Any, expected: Any) -> float:
    """The largest relative error, NaN if there is one; of a gradient of all adapters the last, where only it trains."""
    errors = []
    for out, truth in zip(as_tuple(outputs), expected, strict=True):
        out = out[-1] if out.numel() > truth.numel() else out
        errors.append((out.double().reshape(truth.shape) - truth).norm() / truth.norm())
    return float(torch.stack(errors).max())


def make_sets(case: Case, expected: tuple[torch.Tensor, ...], first: Any) -> list[Any]:
    named = (getattr(first, name, None) for name in ("x", "weight", "A", "B"))
    size = sum(t.nbytes for t in named if t is not None) + sum(t.numel() * DTYPE.itemsize for t in expected)
    return [first, *(case.make() for _ in range(max(3, min(24, math.ceil(FOOTPRINT / size))) - 1))]


def measure(case: Case, rounds: int, compiled: bool, more: Callable[[Case], dict[str, Form]]) -> list[Line]:
    """A line for each form of the case."""
    torch.manual_seed(0)
    torch.set_grad_enabled(case.train)
    first = case.make()
    expected = as_tuple(case.reference(first))
    case.sets = make_sets(case, expected, first)
    given = first.y.clone()  # what is added to in place
    lines: dict[str, Line] = {}
    runs: dict[str, Run] = {}

    def add(name: str, form: Form) -> None:
        line = lines[name] = {"row": case.row, "case": case.name, "form": name, "ratios_of": case.judged}
        try:
            probe = copy.copy(first)
            probe.y = given.clone()
            out = form(probe)
            if name != BASE:
                line["error"] = error_of(out, expected)
                if not line["error"] <= case.tolerance:
                    line["note"] = "WRONG"
            runs[name] = prepare(form, case.sets, captured=not name.startswith(case.eager))
            if not runs[name].graph:
                line.setdefault("note", "not captured")
        except Exception as error:
            line["note"] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:150]

    for name, form in (case.forms | more(case)).items():
        add(name, form)
    if compiled and case.compile:
        torch_forms = {n: run for n, run in runs.items() if n in case.forms and case.to_compile(n)}
        quick = gpu_times(torch_forms, 3)
        best = min(quick, key=lambda n: statistics.median(quick[n]))
        form = case.forms[best]
        forward = torch.compile(form.forward if isinstance(form, Step) else form, dynamic=False)
        add(f"torch.compile({best})", Step(forward, form.leaves) if isinstance(form, Step) else forward)

    walls = wall_times(runs, max(3, rounds // 3))
    for name, values in gpu_times(runs, rounds).items():
        low, middle, high = statistics.quantiles(values, n=4)
        lines[name] |= {"gpu_us": middle, "gpu_iqr_us": high - low, "wall_us": statistics.median(walls[name])}
    times = {name: lines[name][case.judged] for name in runs if lines[name].get("note") != "WRONG"}
    for name, t in times.items():
        lines[name] |= {f"over_{key}": t / times[n] for key, n in (("base", BASE), ("ours", OURS)) if n in times}
    lines[OURS]["goals"] = "; ".join(case.judge(times))
    return list(lines.values())


# ---------------------------------------------------------------------- the report


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copying kernel, read and written; floating-point operations a second of a bf16 product."""
    source, target = (torch.empty(1 << 29, device=DEVICE, dtype=DTYPE) for _ in range(2))
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    runs = {"copy": prepare(lambda _: torch.neg(source, out=target), [0]), "product": prepare(lambda _: a @ b, [0])}
    copied, product = (statistics.median(times) / 1e6 for times in gpu_times(runs, 10).values())
    return 2 * source.nbytes / copied, 2 * 8192**3 / product


def cells(line: Line, *names: str) -> list[str]:
    return [format(line[name], FIELDS[name]) if line.get(name) not in (None, "") else "–" for name in names]


def markdown(columns: str, table: list[list[str]]) -> str:
    head = columns.split(" | ")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *table]) + "\n"


def summary(lines: list[Line]) -> str:
    """The printed table: for each case the frozen layer, ours, the fastest right rival, and the goals."""
    table = []
    for case in dict.fromkeys(line["case"] for line in lines):
        own = {line["form"]: line for line in lines if line["case"] == case}
        rivals = [r for n, r in own.items() if "over_ours" in r and not n.startswith((OURS, BASE, MERGE))]
        best = min(rivals, key=lambda r: r["over_ours"], default={})
        ours = own[OURS]
        time_ = ours["ratios_of"]
        table.append([
            *cells(ours, "row", "case"), *cells(own.get(BASE, {}), time_), *cells(ours, time_, "over_base"),
            *cells(best, "form", time_, "over_ours"), *cells(ours, "wall_us", "error", "goals"),
        ])  # fmt: skip
    columns = "row | case | base µs | ours µs | / base | best unmerged rival | its µs | / ours | ours wall µs | error"
    return markdown(columns + " | goals", table)


def write(out: Path, lines: list[Line], where: dict[str, str]) -> None:
    """OUT.csv and OUT.md, each whole or not at all."""
    columns = [name for name in FIELDS if name not in ("ratios_of", "goals")]
    forms = markdown(" | ".join(columns), [cells(line, *columns) for line in lines])
    head = ", ".join(f"{key} {value}" for key, value in where.items())
    text = f"{head}\n\n{summary(lines)}\n## All forms\n\n{forms}"
    record.write(out, [*FIELDS, *where], ({**line, **where} for line in lines), text)


def load_rivals(file: Path | None) -> Callable[[Case], dict[str, Form]]:
    if file is None:
        return lambda case: {}
    spec = importlib.util.spec_from_file_location("rivals", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rivals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(1, 11)), help="some of the rows 1 to 10")
    parser.add_argument("--quick", action="store_true", help="few rounds, and of the four layers only 768→768")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rivals", type=Path, help="Python file that adds forms")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cuda_lora")
    parser.add_argument("--commit", help="what to call the version measured, where this is no git checkout")
    args = parser.parse_args()
    if "cuda" not in libraries.loaded:
        raise SystemExit(f"the CUDA kernels are not loaded: {libraries.missing}")
    more, compiled = load_rivals(args.rivals), not args.no_compile
    bandwidth, rate = ceilings()
    where = {
        "GPU": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        **record.origin(args.commit),
        "copy TB/s": f"{bandwidth / 1e12:.2f}",
        "bf16 TFLOP/s": f"{rate / 1e12:.0f}",
    }
    lines: list[Line] = []
    start = time.monotonic()
    for case in cases(args.rows, args.quick, compiled, bandwidth):
        new = measure(case, 5 if args.quick else 21, compiled, more)
        lines += new
        write(args.out, lines, where)
        print(f"[{time.monotonic() - start:.0f} s] row {case.row}: {case.name}", file=sys.stderr)
        for line in new:
            print("   ", " | ".join(cells(line, *list(FIELDS)[2:])), file=sys.stderr, flush=True)
        case.sets.clear()  # before the next case makes its own
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(summary(lines))


if __name__ == "__main__":
    main()
