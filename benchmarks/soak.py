"""Many launches of the CUDA low-rank operators with random arguments, against their float64 twins.

    python benchmarks/soak.py --launches 10000

A launch is one operator, most often with its backward: of a random family, shape, dtype, options, adapters of the rows
(some ids corrupted, which count as -1) and path (`PLORA_CUDA_PATH`). A few are in flight at a time, each on two random
streams, whose results must be the same bits; what nobody writes is NaN. Prints how often what was tried and the worst
error as a share of what is allowed, and stops at the first failure with the command that repeats it.
"""

from __future__ import annotations

import os
import random
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import need_cuda, options
from torch import Tensor

from plora_ext import ops, reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))

from oracle import rounding, run, widen
from test_cuda_lora import FAMILIES, PATHS, problem

IN_FLIGHT = 4
RANKS = (1, 3, 4, 8, 12, 16, 16, 17, 24, 32, 48, 64, 100, 128)
WIDTHS = (1, 7, 8, 13, 33, 64, 64, 72, 136, 192, 200, 264, 384, 576, 768, 960, 1280)
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
CORRUPTED = (10**12, -7, 2**31, 2**32, 2**32 + 1, -(2**63), 2**63 - 1)


@dataclass
class Case:
    """One launch: what the operator gets, and the twin; `words` describe it."""

    words: dict[str, Any]
    given: list[Any]
    args: list[Any]
    kwargs: dict[str, Any]
    cotangent: Tensor | None
    results: list[list[Tensor | None]] = field(default_factory=list)


def draw(rng: random.Random) -> Case:
    family, r = rng.choice(FAMILIES), rng.choice(RANKS)
    few = (rng.randint(0, 300), rng.randint(400, 1500), rng.choice((127, 128, 129, 511, 512, 513)))
    M = rng.choice((*few, rng.randint(1500, 40_000) if rng.random() < 0.2 else rng.randint(0, 300)))
    frozen = rng.choice(("", "weight", "weight bias", "weight bias"))
    extras = [name for name in ("base", "bias_A", "bias_B", "relu", "ranks") if rng.random() < 0.25]
    shape: dict[str, Any] = {
        "family": family, "M": M, "n_in": rng.choice(WIDTHS), "out": rng.choice(WIDTHS), "r": r,
        "T": rng.choice((1, 2, 3, 5, 10, 10, rng.randint(11, 50), 300 if M * r < 4000 else 10)),
        "dtype": rng.choice(DTYPES), "options": " ".join((frozen, *extras)).strip(),
        "ids": rng.choice(("none", "one", "segments", "tiles", "random")),
    }  # fmt: skip
    words = {
        **shape, "path": rng.choice(PATHS), "corrupted": family == "lora_indexed" and rng.random() < 0.2,
        "asking": rng.choice((0, 0.3, 0.7, 1)), "trainable": None,
    }  # fmt: skip
    args, kwargs, cotangent = problem(**shape)
    for t in (*args, *kwargs.values()):
        if isinstance(t, Tensor) and t.is_floating_point():
            t.requires_grad_(rng.random() < words["asking"])
    if rng.random() < 0.3:
        words["trainable"] = kwargs["trainable"] = rng.sample(range(shape["T"]), min(shape["T"], rng.randint(0, 3)))
    given = list(args)
    if words["corrupted"]:
        bad = torch.tensor(CORRUPTED, device=given[1].device)
        given[1] = torch.where(args[1] < 0, bad[torch.arange(M, device=bad.device) % len(bad)], args[1])
    return Case(words, given, args, kwargs, cotangent if words["asking"] else None)


def launch(case: Case, streams: list[torch.cuda.Stream]) -> None:
    os.environ["PLORA_CUDA_PATH"] = case.words["path"]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            case.results.append(run(getattr(ops, case.words["family"]), case.given, case.kwargs, case.cotangent))


def worst_error(case: Case) -> float:
    """As a share of what is allowed, by the rule of python_tests/oracle.py.

    Where few numbers make up a norm, chance decides which of two is twice the other: they are allowed more.
    """
    twin, cotangent = getattr(reference, case.words["family"]), case.cotangent
    exact = run(twin, [widen(a) for a in case.args], {k: widen(v) for k, v in case.kwargs.items()}, widen(cotangent))
    plain = run(twin, case.args, case.kwargs, cotangent)
    worst = 0.0
    for i, (e, p, ours, again) in enumerate(zip(exact, plain, *case.results, strict=True)):
        if e is None or ours is None:
            assert not any(t is not None and t.count_nonzero() for t in (e, ours)), f"result {i} is zero for one of two"
            continue
        assert torch.equal(ours, again), f"result {i} differs between two streams"
        if (n := e.numel()) and e.abs().max() <= torch.finfo(ours.dtype).max:  # float16 has no larger numbers
            allowed = (2 + 32 / n) * (p.double() - e).norm() + rounding(
                i, e, ours.dtype, exact[0], plain[0].dtype, cotangent
            )
            share = ((ours.double() - e).norm() / allowed.clamp(min=1e-30)).item()
            assert share <= 1, f"the error of result {i} is {share:.2f} of what is allowed"  # NaN is not <= 1
            worst = max(worst, share)
    return worst


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--launches", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first launch")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    args = parser.parse_args()
    need_cuda()
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    streams, started, counts, worst = [torch.cuda.Stream() for _ in range(6)], time.monotonic(), Counter[str](), 0.0

    for start in range(args.first, args.first + args.launches, IN_FLIGHT):
        if time.monotonic() - started > args.seconds:
            break
        rng, cases = random.Random(f"{args.seed} {start}"), []
        torch.manual_seed(rng.getrandbits(60))
        try:
            cases = [draw(rng) for _ in range(IN_FLIGHT)]
            for case in cases:
                launch(case, rng.sample(streams, 2))
            torch.cuda.synchronize()
            for case in cases:
                worst = max(worst, worst_error(case))
                counts["launches"] += 1
                counts.update(f"{k} {case.words[k]}" for k in ("family", "dtype", "path", "ids", "asking", "corrupted"))
                counts.update(f"with {option}" for option in case.words["options"].split())
        except (AssertionError, RuntimeError) as error:
            print(f"FAILED: {error}\n", *(f"{c.words}\n" for c in cases))
            print(f"{counts['launches']} launches were right; worst error {worst:.2f} of what is allowed. To repeat:")
            sys.exit(f"python benchmarks/soak.py --seed {args.seed} --first {start} --launches {IN_FLIGHT}")
    print(*(f"{n:7d} {what}" for what, n in sorted(counts.items())), sep="\n")
    print(f"all right in {time.monotonic() - started:.0f} s; worst error {worst:.2f} of what is allowed")


if __name__ == "__main__":
    main()
