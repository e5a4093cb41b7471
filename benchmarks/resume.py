"""Kills a run with SIGKILL at random moments, resumes it each time, and compares it with an undisturbed one.

    python benchmarks/resume.py --kills 20 -- --method plora --epochs 3 --device cpu

What follows `--` are options of `plora-ext train`. Prints a line for each kill, then whether metrics and files agree;
the exit code is 0 if they do. A run too short for all kills ends early and is told so.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAME = ("curve", "matrix", "passes", "classes_seen", "class_order", "num_train", "num_test")


def start(out: Path, options: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "plora_ext", "train", *options, "--resume", "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait(process: subprocess.Popen[str]) -> None:
    process.communicate()
    if process.returncode:
        sys.exit(f"the run failed with exit code {process.returncode}")


def metrics(out: Path) -> dict[str, object]:
    run = json.loads((out / "metrics.json").read_text("utf-8"))["runs"][0]
    return {name: run[name] for name in SAME}


def files(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))


def where(out: Path) -> str:
    """How far the checkpoint has come, for the log."""
    try:
        manifest = json.loads((out / "checkpoint" / "checkpoint.json").read_text("utf-8"))["manifest"]
    except FileNotFoundError:
        return "nothing saved yet"
    fit = manifest["parts"].get("fit")
    epochs = f", {fit['tree']['dict']['epochs']['value']} epochs of the next" if fit else ""
    return f"{len(manifest['run']['curve'])} tasks{epochs} saved"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("options", nargs="*", help="of plora-ext train, after --")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    work = Path(tempfile.mkdtemp(prefix="plora-resume-"))
    try:
        whole = start(work / "whole", args.options)
        assert whole.stdout is not None
        whole.stdout.readline()  # data and settings are read: the run begins
        begun = time.perf_counter()
        wait(whole)
        seconds = time.perf_counter() - begun
        print(f"undisturbed: {seconds:.1f} s")

        landed = 0
        while landed < args.kills:
            process = start(work / "cut", args.options)
            assert process.stdout is not None
            process.stdout.readline()
            try:
                # More than the even share on average, for what was not saved is done again.
                process.communicate(timeout=moments.uniform(0, 3 * seconds / args.kills))
                print(f"the run was over after {landed} kills: choose a longer one")
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                landed += 1
                left = [name for name in files(work / "cut") if Path(name).name.startswith(".")]
                print(f"kill {landed}: {where(work / 'cut')}" + (f"; half-written: {', '.join(left)}" if left else ""))
        wait(start(work / "cut", args.options))
        same = metrics(work / "whole") == metrics(work / "cut"), files(work / "whole") == files(work / "cut")
        print(
            f"metrics are {'the same' if same[0] else 'DIFFERENT'}; files are {'the same' if same[1] else 'DIFFERENT'}"
        )
        print(f"({len(files(work / 'cut'))} of them, those of the checkpoint named by the hash of their content)")
        sys.exit(not (all(same) and landed == args.kills))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
