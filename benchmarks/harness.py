"""What the benchmarks share: options, the facts of the machine, tables, files, and GPU time under CUDA graphs.

`plora_ext.bench` has the rest: the operators, and rounds in which all forms take turns.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import functools
import gc
import io
import math
import shlex
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import plora_ext
from plora_ext import libraries
from plora_ext.bench import OURS, fault, in_turn, synchronize, timed
from plora_ext.cil.files import write_whole
from plora_ext.info import environment

Form = Callable[[Any], Any]
Line = dict[str, Any]


# ---------------------------------------------------------------------- options, facts, tables, files


def options(doc: str | None, name: str = "") -> argparse.ArgumentParser:
    """A parser; with `name`, of what the results are called, it has --out and --commit."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if name:
        default = Path(__file__).parent / "results" / name
        parser.add_argument("--out", type=Path, default=default, help="path of the results without its suffix")
        parser.add_argument("--commit", help="what to call the version measured, where this is no git checkout")
    return parser


def commit() -> str:
    try:
        where = Path(__file__).resolve().parent
        return subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=where, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def origin(given: str | None = None) -> dict[str, str]:
    """Version, commit (`given` where this is no git checkout), date and command of this process."""
    command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *(Path(a).name for a in sys.argv[1:])]
    return {
        "plora_ext": plora_ext.__version__,
        "commit": given or commit(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(command),
    }


def facts(device: torch.device, given: str | None = None, **more: Any) -> dict[str, Any]:
    """Where figures are from: the device, `more`, torch and `origin`."""
    return {"device": environment(device)["device"], **more, "torch": torch.__version__, **origin(given)}


def said(where: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in where.items())


def number(value: Any, spec: str = "", missing: str = "–") -> str:
    """A figure as text; `missing` where there is none."""
    return missing if value is None or value == "" or value != value else format(value, spec)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], texts: int = 1, notes: int = 0) -> str:
    """A Markdown table; the first `texts` and the last `notes` columns are text, the others figures."""
    rules = ["---"] * texts + ["---:"] * (len(columns) - texts - notes) + ["---"] * notes
    lines = [f"| {' | '.join(map(str, row))} |" for row in (columns, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]]) + "\n"


def write(
    out: Path, fields: Iterable[str], rows: Iterable[Mapping[str, Any]], text: str, where: Mapping[str, Any] = {}
) -> None:
    """OUT.csv, every row with `where`, and OUT.md, headed by it; each whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, dict.fromkeys([*fields, *where]), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **where} for row in rows)
    for suffix, content in ((".csv", sheet.getvalue()), (".md", f"{said(where)}\n\n{text}" if where else text)):
        write_whole(out.with_name(out.name + suffix), content.encode())


# ---------------------------------------------------------------------- a call, to its end on the device


def now(device: torch.device) -> float:
    """Seconds on the wall clock, once the device has done what it was given."""
    synchronize(device)
    return time.perf_counter()


class Costs(NamedTuple):
    """Of a call; NaN where there is no GPU. Its peak of allocated memory is above what was there before."""

    gpu_ms: float
    wall_ms: float
    peak_mb: float


def costs(call: Callable[[], Any], device: torch.device) -> Costs:
    if device.type != "cuda":
        return Costs(math.nan, timed(call, device), math.nan)
    there = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = now(device)
    before.record()
    call()
    after.record()
    wall = 1e3 * (now(device) - start)
    return Costs(before.elapsed_time(after), wall, (torch.cuda.max_memory_allocated() - there) / 2**20)


# ---------------------------------------------------------------------- GPU time under CUDA graphs
# Calls captured into one CUDA graph, which walk through sets of inputs and outputs that are together larger than the
# L2 cache, so that each call reads and writes DRAM; CUDA events around a replay.

DEVICE, BASE = "cuda", "base layer alone"
GPU = torch.device(DEVICE)
FOOTPRINT = 160e6  # bytes that the sets of a case take together; the L2 cache of an H200 holds about 50 MB
CALLS, SECONDS = 24, 0.03  # captured into one graph: so many calls, fewer where they take longer than this
SIDE_STREAM = functools.cache(torch.cuda.Stream)


class Step:
    """A training step: forward, then the gradients of `leaves`, given by their names or by a function."""

    def __init__(self, forward: Form, leaves: str | Callable[[Any], list[Tensor]]) -> None:
        self.forward, self.leaves = forward, leaves

    def __call__(self, p: Any) -> tuple[Tensor, ...]:
        chosen = self.leaves
        leaves = [getattr(p, name) for name in chosen.split()] if isinstance(chosen, str) else chosen(p)
        return torch.autograd.grad(self.forward(p), leaves, p.grad)


def doubled(p: Any) -> Any:
    """The same inputs in float64."""
    twin = copy.copy(p)
    for name, t in vars(p).items():
        if isinstance(t, Tensor) and t.is_floating_point():
            setattr(twin, name, t.detach().double().requires_grad_(t.requires_grad))
    return twin


@dataclass
class GPUCase(ABC):
    """Forms of one computation on a GPU, ours among them; what a kind of case asks of them, its class says."""

    eager_sets = None  # through how many sets a form walks that is not captured (None: all)
    memory = False  # whether memory is measured

    row: int
    name: str
    make: Callable[[], Any]  # one set of inputs
    forms: dict[str, Form]
    reference: Form  # of one set, in float64
    _: KW_ONLY
    eager: tuple[str, ...] = ()  # how names begin of forms that no CUDA graph captures
    once: tuple[str, ...] = ()  # and of those that take many seconds
    train: bool = False
    compile: bool = False  # the best form in torch joins in once more, under torch.compile
    judged: str = "gpu_us"
    tolerance: float = 0.02
    sets: list[Any] = field(default_factory=list)

    def size(self, first: Any, expected: tuple[Tensor, ...]) -> float:
        """Bytes of one set."""
        return sum(t.nbytes for t in vars(first).values() if isinstance(t, Tensor))

    @abstractmethod
    def to_compile(self, name: str) -> bool:
        """Whether a form joins the choice of the best one in torch."""

    @abstractmethod
    def judge(self, lines: dict[str, Line]) -> list[str]:
        """Each goal, its figure, and whether it is met, from the lines of forms that are right."""


@dataclass
class Run:
    """Calls of one form in a row: replayed from a CUDA graph, or launched one by one."""

    call: Form
    order: list[Any]
    graph: torch.cuda.CUDAGraph | None = None

    def go(self) -> None:
        (self.graph.replay if self.graph else self.launch)()

    def launch(self) -> None:
        outputs = deque[Any](maxlen=len({id(p) for p in self.order}))  # an output lives until its set is used again
        for p in self.order:
            outputs.append(self.call(p))

    def seconds(self) -> float:
        """Of calls launched one by one, to the end of the last."""
        start = now(GPU)
        self.launch()
        return now(GPU) - start

    def wall(self) -> float:
        """Microseconds a call, launched one by one."""
        return 1e6 * self.seconds() / len(self.order)


def prepare(call: Form, sets: list[Any], captured: bool = True) -> Run:
    """Warm up and capture."""
    stream = SIDE_STREAM()  # the one captured, so that autograd and cuBLAS get ready for it
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        seconds = [Run(call, sets).seconds() for _ in range(2)][-1]
    passes = min(math.ceil(CALLS / len(sets)), int(SECONDS / seconds))
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


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def error_of(outputs: Any, expected: Any) -> float:
    """The largest relative error, NaN if there is one; of a gradient of all adapters the last, where only it trains."""
    errors = []
    for out, truth in zip(as_tuple(outputs), expected, strict=True):
        out = out[-1] if out.numel() > truth.numel() else out
        errors.append((out.double().reshape(truth.shape) - truth).norm() / truth.norm())
    return float(torch.stack(errors).max())


def extra_megabytes(form: Form, p: Any) -> float:
    """Peak of allocated memory over what is there before, less the outputs."""
    gc.collect()
    outputs: list[Any] = []
    peak = costs(lambda: outputs.append(as_tuple(form(p))), GPU).peak_mb * 2**20
    return (peak - sum(o.nbytes for o in outputs[0])) / 1e6


def measure(
    case: GPUCase, rounds: int, compiled: bool, more: Callable[[Any], dict[str, Form]] = lambda case: {}
) -> list[Line]:
    """A line for each form of the case, and for those that `more` makes of the case once it has its sets."""
    torch.manual_seed(0)
    torch.set_grad_enabled(case.train)
    first = case.make()
    expected = as_tuple(case.reference(first))
    count = max(3, min(24, math.ceil(FOOTPRINT / case.size(first, expected))))
    case.sets = [first, *(case.make() for _ in range(count - 1))]
    given = first.y.clone() if hasattr(first, "y") else None  # what is added to in place
    lines: dict[str, Line] = {}
    runs: dict[str, Run] = {}

    def add(name: str, form: Form) -> None:
        line = lines[name] = {"row": case.row, "case": case.name, "form": name, "ratios_of": case.judged}
        try:
            probe = copy.copy(first)
            if given is not None:
                probe.y = given.clone()
            start = time.perf_counter()
            out = form(probe)
            if name != BASE:
                line["error"] = error_of(out, expected)
                if not line["error"] <= case.tolerance:
                    line["note"] = "WRONG"
            if name.startswith(case.once):
                line["wall_us"] = 1e6 * (time.perf_counter() - start)
                line.setdefault("note", "called once")
                return
            if case.memory:
                line["extra_MB"] = extra_megabytes(form, first)
            captured = not name.startswith(case.eager)
            runs[name] = prepare(form, case.sets if captured else case.sets[: case.eager_sets], captured)
            if not captured:
                line.setdefault("note", "not captured")
        except Exception as error:
            line["note"] = fault(error, f"{case.name}: {name}")

    for name, form in (case.forms | more(case)).items():
        add(name, form)
    rivals = {n: run for n, run in runs.items() if n in case.forms and case.to_compile(n)}
    if compiled and case.compile and rivals:
        quick = gpu_times(rivals, 3)
        best = min(quick, key=lambda n: statistics.median(quick[n]))
        form = case.forms[best]
        forward = torch.compile(form.forward if isinstance(form, Step) else form, dynamic=False)
        add(f"torch.compile({best})", Step(forward, form.leaves) if isinstance(form, Step) else forward)

    walls = in_turn({name: run.wall for name, run in runs.items()}, max(3, rounds // 3))
    for name, values in gpu_times(runs, rounds).items():
        low, middle, high = statistics.quantiles(values, n=4)
        lines[name] |= {"gpu_us": middle, "gpu_iqr_us": high - low, "wall_us": statistics.median(walls[name])}
    right = {name: line for name, line in lines.items() if line.get("note") != "WRONG"}
    times = {name: right[name][case.judged] for name in runs if name in right}
    for name, t in times.items():
        lines[name] |= {f"over_{key}": t / times[n] for key, n in (("base", BASE), ("ours", OURS)) if n in times}
    if OURS in times:
        lines[OURS]["goals"] = "; ".join(case.judge(right))
    case.sets.clear()  # before the next case makes its own
    return list(lines.values())


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copying kernel, read and written; floating-point operations a second of a bf16 product."""
    source, target = (torch.empty(1 << 29, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    runs = {"copy": prepare(lambda _: torch.neg(source, out=target), [0]), "product": prepare(lambda _: a @ b, [0])}
    copied, product = (statistics.median(times) / 1e6 for times in gpu_times(runs, 10).values())
    return 2 * source.nbytes / copied, 2 * 8192**3 / product


def gpu_options(doc: str | None, name: str, rows: int) -> argparse.ArgumentParser:
    parser = options(doc, name)
    every = list(range(1, rows + 1))
    parser.add_argument("--rows", type=int, nargs="+", default=every, help=f"some of the rows 1 to {rows}")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser


def gpu_facts(given: str | None, **more: str) -> dict[str, str]:
    where = {"GPU": torch.cuda.get_device_name(), "torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    return {**where, **origin(given), **more}


def need_cuda() -> None:
    if "cuda" not in libraries.loaded:
        raise SystemExit(f"the CUDA kernels are not loaded: {libraries.missing}")


def verdict(text: str, figure: float | None, at_most: float = math.inf, at_least: float = -math.inf) -> str:
    """A goal, its figure, and whether it is met."""
    if figure is None:
        return f"{text}: not measured"
    return f"{text}: {figure:.2f} {'met' if at_least <= figure <= at_most else 'NOT MET'}"


def cells(fields: Mapping[str, str], line: Line, *names: str) -> list[str]:
    return [number(line.get(name), fields[name]) for name in names]


def report(
    out: Path, fields: Mapping[str, str], heads: str, shown: Callable[[dict[str, Line]], list[str]],
    where: Mapping[str, str], found: Iterable[list[Line]],
) -> None:  # fmt: skip
    """Writes what is found after every case, a line for each form; `fields` with their formats.

    Before it stands a table with one row a case: what `shown` makes of its lines by form, under `heads`.
    """
    lines: list[Line] = []
    rows: list[list[str]] = []
    start = time.monotonic()
    columns = [name for name in fields if name not in ("ratios_of", "goals")]
    for new in found:
        lines += new
        rows.append(shown({line["form"]: line for line in new}))
        summary = table(heads.split(" | "), rows, len(rows[0]))
        forms = table(columns, (cells(fields, line, *columns) for line in lines), len(columns))
        write(out, fields, lines, f"{summary}\n## All forms\n\n{forms}", where)
        print(f"[{time.monotonic() - start:.0f} s] row {new[0]['row']}: {new[0]['case']}", file=sys.stderr)
        for line in new:
            print("   ", " | ".join(cells(fields, line, *list(fields)[2:])), file=sys.stderr, flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(summary)
