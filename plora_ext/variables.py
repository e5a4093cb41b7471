"""What the environment says, settled before torch is imported: PLORA_* variables, and how OpenMP's threads wait.

At a barrier those threads spin by default. Beside another busy process they spin on the core that it or their fellows
need, and training is many times slower. So where the command (`plora-ext`, `python -m plora_ext`) finds a core at work
for others when it starts, it lets them sleep, unless the user has chosen; the OpenMP runtime reads that when torch
loads it. Elsewhere an import changes nothing.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
import warnings

CHOICES = {
    "PLORA_BACKEND": ("native", "reference"),
    "PLORA_CPU_BASE": ("own", "torch"),
    "PLORA_CPU_ISA": ("default", "avx2", "avx512", "amx"),
    "PLORA_CUDA_PATH": ("auto", "mma"),
}
# of the build; by which tests make a GPU look smaller; checkouts that tests and benchmarks look for
OTHERS = (
    *("FORCE_CPU", "TORCH_DIR", "SM_COUNT", "SMEM_LIMIT"),
    *("PILOT", "MAMMOTH", "INFLORA", "SDLORA", "CLLORA", "TUNA", "ACMAP"),
)
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
QUICK = {"report", "--version", "-h", "--help"}  # what computes nothing with many threads

in_force: dict[str, str] = {}
"""Every PLORA_ variable that is set: its value, or what is wrong with it."""


def command() -> str | None:
    """What this process runs, if that is the package's: "plora-ext" or a module's name."""
    argv = getattr(sys, "argv", [])
    if argv[:1] == ["-m"]:  # the module, which stands before its arguments, is still to be found
        module = sys.orig_argv[-len(argv)].removeprefix("-m")
        return module if module.partition(".")[0] == __package__ else None
    return "plora-ext" if argv and os.path.basename(argv[0]) == "plora-ext" else None


def settle() -> None:
    """Checks the PLORA_ variables and, in the command, sets how threads wait.

    Raises:
        ValueError: a variable has none of its values; the command prints that and ends instead, but for `info`, which
            reports it and goes on without the variable.
    """
    running = command()
    informs = running == f"{__package__}.info" or (running is not None and sys.argv[1:2] == ["info"])
    for name, value in sorted(os.environ.items()):
        if not name.startswith("PLORA_"):
            continue
        in_force[name] = value
        if name in CHOICES and value and value not in CHOICES[name]:
            *some, last = map(repr, CHOICES[name])
            problem = f"{name} must be {', '.join(some)} or {last}, got {value!r}"
            if informs:
                in_force[name] = f"ignored: {problem}"
                del os.environ[name]
            elif running:
                print(f"error: {problem}", file=sys.stderr)
                raise SystemExit(2)
            else:
                raise ValueError(problem)
        elif name not in CHOICES and name.removeprefix("PLORA_") not in OTHERS:
            close = difflib.get_close_matches(name, CHOICES, 1)
            hint = f"did you mean {close[0]}?" if close else f"plora_ext reads {', '.join(CHOICES)}"
            in_force[name] = f"{value} (unknown variable: {hint})"
            if not running:
                warnings.warn(f"unknown environment variable {name}: {hint}", stacklevel=3)
            elif not informs:
                print(f"warning: unknown environment variable {name}: {hint}", file=sys.stderr)
    chosen = os.environ.get("OMP_NUM_THREADS") == "1" or any(name in os.environ for name in WAITING)
    if running and not (informs or chosen or QUICK.intersection(sys.argv[1:])) and others_work():
        os.environ["OMP_WAIT_POLICY"] = "passive"
        print(
            "note: other processes keep a core busy, so threads sleep while they wait for each other: "
            "OMP_WAIT_POLICY=passive (active lets them spin)",
            file=sys.stderr,
        )


def unwatched() -> bool:
    """Whether no one looks at the terminal, as services that test say by CI=true: nothing should move on it."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def others_work(seconds: float = 0.1, stat: str = "/proc/stat") -> bool:
    """Whether one of the cores that this process may use is busy for half of the time while this process sleeps.

    False where the system does not say.
    """

    def look() -> dict[int, list[int]]:
        with open(stat, encoding="ascii") as file:
            lines = [line.split() for line in file if line.startswith("cpu") and not line.startswith("cpu ")]
        return {int(name[3:]): [int(v) for v in values[:8]] for name, *values in lines}  # ticks by what they were for

    try:
        mine = os.sched_getaffinity(0)
        before = look()
        time.sleep(seconds)
        spent = [[b - a for a, b in zip(before[core], ticks)] for core, ticks in look().items() if core in mine]
    except (AttributeError, OSError, ValueError, LookupError):
        return False
    return any(2 * (ticks[3] + ticks[4]) < sum(ticks) for ticks in spent)  # idle, and idle but for the disk
