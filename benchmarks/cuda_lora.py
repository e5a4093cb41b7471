"""The CUDA low-rank operators beside every other way to compute the same, on one GPU: one table, with its goals.

    python benchmarks/cuda_lora.py [--rows 1 2] [--quick] [--no-compile] [--rivals FILE.py] [--out FOLDER/NAME]

GPU time: calls in one CUDA graph that walk through sets of inputs and outputs larger than the L2 cache; CUDA events
around a replay. Wall time: the same calls launched one by one, to the end of the last. Rounds visit every form in turn,
figures are medians over rounds. A form is first compared with float64: one that is wrong is marked and not ranked. The
best torch form joins in once more under torch.compile. A whole ViT is launched call by call in both timings.

--rivals FILE.py adds forms: its function `rivals(case)` returns {name: callable}, and each callable takes one of
`case.sets` and returns what the case's other forms return. Writes NAME.csv, a line for each form, and NAME.md.
"""

from __future__ import annotations

import functools
import runpy
from pathlib import Path

from cuda_cases import cases
from harness import BASE, Line, ceilings, cells, gpu_facts, gpu_options, measure, need_cuda, report
from lora_forms import MERGE

from plora_ext.bench import OURS

FIELDS = {
    "row": "", "case": "", "form": "", "gpu_us": ".1f", "gpu_iqr_us": ".2f", "wall_us": ".1f", "error": ".1e",
    "ratios_of": "", "over_base": ".2f", "over_ours": ".2f", "goals": "", "note": "",
}  # fmt: skip


HEADS = "row | case | base µs | ours µs | / base | best unmerged rival | its µs | / ours | ours wall µs | error | goals"


def shown(own: dict[str, Line]) -> list[str]:
    """Of a case: the frozen layer, ours, the fastest right rival, and the goals."""
    rivals = [r for n, r in own.items() if "over_ours" in r and not n.startswith((OURS, BASE, MERGE))]
    best = min(rivals, key=lambda r: r["over_ours"], default={})
    ours, show = own[OURS], functools.partial(cells, FIELDS)
    time_ = ours["ratios_of"]
    return [
        *show(ours, "row", "case"), *show(own.get(BASE, {}), time_), *show(ours, time_, "over_base"),
        *show(best, "form", time_, "over_ours"), *show(ours, "wall_us", "error", "goals"),
    ]  # fmt: skip


def main() -> None:
    parser = gpu_options(__doc__, "cuda_lora", 15)
    parser.add_argument("--quick", action="store_true", help="few rounds, and of the four layers only 768→768")
    parser.add_argument("--rivals", type=Path, help="Python file that adds forms")
    args = parser.parse_args()
    need_cuda()
    more = runpy.run_path(str(args.rivals))["rivals"] if args.rivals else lambda case: {}
    compiled, rounds = not args.no_compile, 5 if args.quick else 21
    bandwidth, rate = ceilings()
    where = gpu_facts(args.commit, **{"copy TB/s": f"{bandwidth / 1e12:.2f}", "bf16 TFLOP/s": f"{rate / 1e12:.0f}"})
    found = cases(args.rows, args.quick, compiled, bandwidth)
    report(args.out, FIELDS, HEADS, shown, where, (measure(case, rounds, compiled, more) for case in found))


if __name__ == "__main__":
    main()
