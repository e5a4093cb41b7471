"""Kills a run with SIGKILL at random moments, resumes it each time, and compares it with an undisturbed one.

    python benchmarks/resume.py --kills 20 -- --method plora --epochs 3 --device cpu

What follows `--` are options of `plora-ext train`. Prints a line for each kill, then whether metrics and files agree;
the exit code is 0 if they do. A run too short for all kills ends early and is told so.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import options

SAME = ("curve", "matrix", "passes", "classes_seen", "class_order", "num_train", "num_test")


def start(out: Path, options: list[str]) -> subprocess.Popen[str]:
    """A run that has begun: its data and settings are read."""
    command = [sys.executable, "-m", "plora_ext", "train", *options, "--resume", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def wait(process: subprocess.Popen[str]) -> None:
    process.communicate()
    if process.returncode:
        sys.exit(f"the run failed with exit code {process.returncode}")


def metrics(out: Path) -> dict[str, object]:
    run = json.loads((out / "metrics.json").read_text("utf-8"))["runs"][0]
    return {name: run[name] for name in SAME}


def files(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))


def progress(out: Path) -> tuple[float, str]:
    """How far the checkpoint has come: its share of the run, and in words."""
    try:
        manifest = json.loads((out / "checkpoint" / "checkpoint.json").read_text("utf-8"))["manifest"]
    except FileNotFoundError:
        return 0.0, "nothing saved yet"
    fit, run = manifest["parts"].get("fit"), manifest["run"]
    epochs = fit["tree"]["dict"]["epochs"]["value"] if fit else 0
    share = (len(run["curve"]) + epochs / manifest["settings"]["epochs"]) / run["tasks"]
    return share, f"{len(run['curve'])} of {run['tasks']} tasks and {epochs} epochs of the next saved"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("options", nargs="*", help="of plora-ext train, after --")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="plora-resume-", ignore_cleanup_errors=True) as work:
        whole, cut = Path(work, "whole"), Path(work, "cut")
        process, begun = start(whole, args.options), time.perf_counter()
        wait(process)
        seconds = time.perf_counter() - begun
        print(f"undisturbed: {seconds:.1f} s")

        landed = 0
        while landed < args.kills:
            process = start(cut, args.options)
            # The even share of what remains, on average.
            span = min(2 / (args.kills - landed), 0.8) * (1 - progress(cut)[0]) * seconds
            try:
                process.communicate(timeout=moments.uniform(0, span))
                print(f"the run was over after {landed} kills: choose a longer one")
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            landed += 1
            left = ", ".join(name for name in files(cut) if Path(name).name.startswith("."))
            print(f"kill {landed}: {progress(cut)[1]}" + (f"; half-written: {left}" if left else ""))
        wait(start(cut, args.options))
        same = metrics(whole) == metrics(cut), files(whole) == files(cut)
        said = ["the same" if alike else "DIFFERENT" for alike in same]
        print(f"metrics are {said[0]}; files are {said[1]}")
        print(f"({len(files(cut))} of them, those of the checkpoint named by the hash of their content)")
        sys.exit(not (all(same) and landed == args.kills))


if __name__ == "__main__":
    main()
