"""How much slower a short training run gets beside other busy processes, by how OpenMP's threads wait.

    python benchmarks/busy.py --neighbours 0 1 2 --out benchmarks/results/busy.md
    python benchmarks/busy.py OMP_WAIT_POLICY=active "GOMP_SPINCOUNT=1000 OMP_NUM_THREADS=1"

Each argument is an environment for `plora-ext train`, variables in one word each; "" is the command's own. Prints the
images per second of the training epochs; the neighbours are processes that count. On a machine where nothing else runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import torch

from plora_ext.info import environment
from plora_ext.variables import WAITING

ENVIRONMENTS = ("", "OMP_WAIT_POLICY=active", "OMP_NUM_THREADS=1", "PLORA_BACKEND=reference")
TRAIN = "train --method lora-sequential --increment 50 --epochs 1 --device cpu --workers 0".split()


def images_per_second(variables: str, neighbours: int) -> float:
    clean = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
    chosen = dict(word.split("=", 1) for word in variables.split())
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    try:
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-m", "plora_ext", *TRAIN, "--out", out]
            subprocess.run(command, env=clean | chosen, check=True, stdout=subprocess.DEVNULL)
            run = json.loads(Path(out, "metrics.json").read_text(encoding="utf-8"))["runs"][0]
    finally:
        for other in others:
            other.kill()
            other.wait()
    return run["num_train"] * run["passes"] / run["seconds"]["train"]


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("environments", nargs="*", default=ENVIRONMENTS, metavar="ENVIRONMENT")
    parser.add_argument("--neighbours", type=int, nargs="+", default=(0, 1, 2), help="how many busy processes")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median counts")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    here = environment(torch.device("cpu"))
    rows = []
    for variables in args.environments:
        rates = [[images_per_second(variables, n) for _ in range(args.repeats)] for n in args.neighbours]
        name = f"`{variables}`" if variables else "default of the command"
        rows.append([name, *(f"{statistics.median(rate):.0f}" for rate in rates)])
    columns = ["images/s", *(f"{n} busy" for n in args.neighbours)]
    where = {name: here[name] for name in ("device", "torch", "plora_ext")}
    text = f"{harness.said(where)}\n\n{harness.table(columns, rows)}"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
