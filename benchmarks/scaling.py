"""The cost model of docs/scaling.md: fitted to the committed result files and carried on to more classes, tasks, GPUs.

    python benchmarks/scaling.py            # writes the tables into docs/scaling.md
    python benchmarks/scaling.py --check    # exit code 1 if the page does not show what the files say

Every number comes from a file in benchmarks/results or is an assumption that the page names. Fits are least squares of
a + b x over all tasks but the first; files `many_tasks*.csv` are taken as they come, those measured on a GPU included.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "scaling.md"
PHASES = {  # of a task: its name, what it is fitted against, unit of a, the smaller one of b, what one more is
    "train": ("train", "task", "ms", "µs", "task"),
    "prototypes": ("prototypes", "task", "ms", "µs", "task"),
    "align": ("align", "classes_seen", "ms", "µs", "class"),
    "checkpoint": ("checkpoint, time", "task", "ms", "µs", "task"),
    "eval": ("eval", "test_images", "ms", "µs", "test image"),
    "live_mb": ("memory of tensors", "task", "MiB", "KiB", "task"),
    "checkpoint_kib": ("checkpoint, size a task", "task", "KiB", "B", "task"),
}
SMALLER = {"ms": 1e3, "MiB": 2**10, "KiB": 2**10}  # of the smaller unit in one
# ViT-B/16 with the default adapters: r = 16 on qkv and proj of 12 blocks, float32.
WIDTH, BLOCKS, RANK, BATCH = 768, 12, 16, 128
PARAMETERS = 85_798_656
ADAPTER = 4 * BLOCKS * RANK * ((WIDTH + 3 * WIDTH) + (WIDTH + WIDTH))
MERGED = 4 * BLOCKS * 4 * WIDTH * WIDTH
FEATURES, LOGITS = 2**18, 2**22  # plora_ext.cil.evaluate
BANDWIDTH = {1: math.inf, 8: 300e9, 64: 25e9}  # bytes/s of an all-reduce, assumed: inside a host, between hosts


class Scenario(NamedTuple):
    """T tasks of c classes, n training and m test images a class, E epochs."""

    name: str
    T: int
    c: int
    n: int
    m: int
    E: int


SCENARIOS = (
    Scenario("100 classes, 10 tasks (CIFAR-100's numbers)", 10, 10, 500, 100, 20),
    Scenario("1,000 classes, 100 tasks", 100, 10, 500, 50, 20),
    Scenario("100,000 classes, 1,000 tasks", 1000, 100, 100, 10, 20),
)


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------- what was measured


class Fit(NamedTuple):
    """y = a + b x over tasks of one file; `growth` is the median of the last ten over that of the first ten."""

    method: str
    phase: str
    a: float
    b: float
    growth: float
    last: dict[str, str]  # row of the file


def fits() -> Iterator[Fit]:
    for path in sorted(RESULTS.glob("many_tasks*.csv")):
        rows = read(path.name)
        for method in dict.fromkeys(r["method"] for r in rows):
            own = [r for r in rows if r["method"] == method][1:]
            for phase, (_, against, *_) in PHASES.items():
                x, y = (np.array([float(r[name]) for r in own]) for name in (against, phase))
                b, a = np.polyfit(x, y, 1)
                first, last = np.median(y[:10]), np.median(y[-10:])
                yield Fit(method, phase, a, b, float(last / first) if first else math.nan, own[-1])


def step_and_forward() -> tuple[float, float]:
    """Seconds per image of a training step and of a forward pass: ViT-B/16 on one H200, bfloat16, 128 images."""
    rows = [r for r in read("cuda_lora_vit.csv") if r["case"].startswith("ViT-B/16, r=16 on all linears, B=128")]
    us = {("step" if "step" in r["case"] else "forward"): float(r["gpu_us"]) for r in rows if r["form"] == "plora_ext"}
    return us["step"] / BATCH / 1e6, us["forward"] / BATCH / 1e6


def seconds_per_pair() -> float:
    """Seconds of `reconstruct_prototypes` per pair of an old and a new class, one H200, float32, D = 768."""
    case = "reconstruct_prototypes, complement, 20,000 x 1,000"
    (row,) = (r for r in read("cuda_prototypes.csv") if r["case"] == case and r["form"] == "plora_ext")
    return float(row["gpu_us"]) / 1e6 / (20_000 * 1_000)


def seconds_per_merge() -> float:
    """Seconds to merge one more adapter, r = 16, into a weight of 768 x 768: one H200, bfloat16, T = 10 to 50."""
    form, case = "merge (lora_merge), then linear", "sum, T={}, r=16, 768→768, inference"
    us = {(r["case"], r["form"]): float(r["gpu_us"] or 0) for r in read("cuda_lora.csv")}
    return (us[case.format(50), form] - us[case.format(10), form]) / 40 / 1e6


# ---------------------------------------------------------------------- what follows


def project(s: Scenario, gpus: int) -> dict[str, float]:
    """Hours and bytes of a whole run of `plora` on ViT-B/16."""
    step, forward = step_and_forward()
    images = s.c * s.n
    steps = math.ceil(images / (BATCH * gpus)) * s.E * s.T  # a step that is not full costs a whole one
    reduced = 2 * (gpus - 1) / gpus * (ADAPTER + 4 * s.c * WIDTH)
    tested = s.c * s.m * s.T * (s.T + 1) / 2
    merged = s.T * s.T * 4 * BLOCKS * seconds_per_merge()
    pairs = s.c * s.c * s.T * (s.T - 1) / 2
    return {
        "train": steps * BATCH * step / 3600,
        "network": steps * reduced / BANDWIDTH[gpus] / 3600,
        "features": (3 * images * s.T * forward / gpus + merged) / 3600,
        "merge": merged / 3600,
        "align": pairs * seconds_per_pair() / 3600,
        "eval": tested * forward / gpus / 3600,
        "full": images / (BATCH * gpus) / math.ceil(images / (BATCH * gpus)),
        "bytes": steps * reduced,
        "adapters": s.T * ADAPTER,
    }


def blocks() -> dict[str, str]:
    """The generated parts of the page."""
    made = {"fits": _fits(), "inputs": _inputs(), "projection": _projection(), "memory": _memory()}
    return {name: block.rstrip() for name, block in made.items()}


def _inputs() -> str:
    step, forward = step_and_forward()
    merge, pair = seconds_per_merge(), seconds_per_pair()
    rows = (
        ("a_s, ViT-B/16", f"{1e6 * step:.0f} µs",
         "`cuda_lora_vit.csv`: one H200, bfloat16, B = 128, r = 16 on all linear layers"),
        ("a_f", f"{1e6 * forward:.0f} µs", "the same; adapters not merged"),
        ("reconstruction, a pair of classes", f"{1e12 * pair:.0f} ps",
         "`cuda_prototypes.csv`, 20,000 x 1,000, float32"),
        ("merging an adapter into 768 x 768", f"{1e6 * merge:.2f} µs", "`cuda_lora.csv`, row 7: T = 50 less T = 10"),
        ("P", f"{ADAPTER / 1e6:.2f} MB", "r = 16 on qkv and proj of 12 blocks, float32"),
        ("4 D", f"{4 * WIDTH / 1e3:.1f} kB", "D = 768"),
    )  # fmt: skip
    return harness.table(("quantity", "value", "from"), rows)


def _fits() -> str:
    rows = []
    for f in fits():
        name, _, unit, small, one = PHASES[f.phase]
        a, b = (1e3 * f.a, 1e3 * f.b) if unit == "ms" else (f.a, f.b)
        tiny = SMALLER[unit] * b
        slope = f"{b:+.3g} {unit}" if abs(tiny) >= 1000 else f"{tiny:+.3g} {small}"
        growth = "–" if f.phase == "eval" else f"{f.growth:.2f}"
        where = f"{f.last['task']} tasks, {f.last['model']}, {f.last['device'].split(',')[0]}"
        rows.append((f"{f.method}, {name}", f"{a:.4g} {unit}", f"{slope} a {one}", growth, where))
    return harness.table(("a task's", "a", "b", "last ten / first ten", "measured"), rows)


def _projection() -> str:
    rows = []
    for s in SCENARIOS:
        for gpus in BANDWIDTH:
            p = project(s, gpus)
            hours = [p[k] for k in ("train", "features", "align", "eval", "network")]
            times = (_hours(h) for h in (*hours, sum(hours)))
            name = f"{s.name}, {gpus} GPU{'s' * (gpus > 1)}"
            rows.append((name, *times, f"{100 * p['full']:.0f} %", _bytes(p["bytes"])))
    head = (
        "",
        "training",
        "features",
        "alignment `semantic`",
        "evaluation",
        "all-reduce",
        "sum",
        "steps filled",
        "bytes a GPU",
    )
    return harness.table(head, rows)


def _memory() -> str:
    sizes: dict[str, Callable[[Scenario], float]] = {
        "weights, merged layers before and after": lambda s: 4 * PARAMETERS + 2 * MERGED,
        "adapters": lambda s: project(s, 1)["adapters"],
        "prototypes": lambda s: 4 * s.T * s.c * WIDTH,
        "sums of the linear drift": lambda s: 16 * WIDTH**2,
        "features and logits of an evaluation": lambda s: (
            4 * (min(FEATURES, s.T * s.c * s.m) * WIDTH + min(LOGITS, (s.T * s.c) ** 2 * s.m))
        ),
        "written to checkpoints in a run": lambda s: (
            s.T * ADAPTER + 4 * WIDTH * s.c * s.T * (s.T + 1) / 2 + 3 * ADAPTER * s.E * s.T
        ),
        "head `gaussian`: covariances": lambda s: 4 * WIDTH**2 * s.T * s.c,
        "the same, `covariance_rank: 16`": lambda s: 4 * WIDTH * (WIDTH + 16 * s.T * s.c),
        "head `ranpac`, M = 10,000: G and Q": lambda s: 4 * (10_000**2 + 10_000 * s.T * s.c),
        "`plora-ensemble`: prototypes": lambda s: 4 * WIDTH * s.T * s.T * s.c,
        "all logits at once (not done)": lambda s: 4 * s.m * (s.T * s.c) ** 2,
    }
    rows = ((name, *(_bytes(size(s)) for s in SCENARIOS)) for name, size in sizes.items())
    return harness.table(("", *(s.name.split(" (")[0] for s in SCENARIOS)), rows)


def _hours(hours: float) -> str:
    if hours >= 0.95:
        return f"{hours:.3g} h"
    if hours >= 1 / 60:
        return f"{60 * hours:.2g} min"
    return f"{3600 * hours:.2g} s" if 3600 * hours >= 0.1 else "< 0.1 s" if hours else "0"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB" if number else "0"


def filled(text: str) -> str:
    """The page with its generated parts as the files say."""
    for name, block in blocks().items():
        start, end = f"<!-- scaling.py: {name} -->", "<!-- end -->"
        if text.count(start) != 1:
            sys.exit(f"{PAGE} must hold `{start}` … `{end}` once")
        head, tail = text.split(start)
        text = f"{head}{start}\n{block}\n{end}{tail.split(end, 1)[1]}"
    return text


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if args.check:
        sys.exit(f"{PAGE} is not what the files say: run benchmarks/scaling.py" if before != after else 0)
    PAGE.write_text(after, encoding="utf-8")
    print("\n\n".join(blocks().values()))


if __name__ == "__main__":
    main()
