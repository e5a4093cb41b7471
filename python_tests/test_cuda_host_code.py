"""The host code of the CUDA operators without a GPU: csrc/cuda/lora/lora.cpp on CPU tensors, its kernels plain loops.

Which kernels are called, with which factors, strides and memory, is the same code on a GPU. What the kernels themselves
compute is tested there (test_cuda_lora.py).
"""

from __future__ import annotations

import ctypes
import itertools
import math
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext import libraries

pytestmark = pytest.mark.skipif(not libraries.has_kernel("lora_sum", "cpu"), reason="nothing is compiled")
HALF = (torch.bfloat16, torch.float16)
NEEDS = ("x", "lora_A", "lora_B", "scaling", "bias_A", "bias_B")


@pytest.fixture(scope="module")
def host(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Builds and loads the operators `plora_host`."""
    if not (compiler := shutil.which("g++") or shutil.which("c++")):
        pytest.skip("no C++ compiler here")
    torch_root, library = Path(torch.__path__[0]), tmp_path_factory.mktemp("host") / "libplora_host.so"
    made = subprocess.run(
        [compiler, "-std=c++17", "-O2", "-Wno-attributes", "-fPIC", "-shared", "-DUSE_CUDA",
         "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000",
         f"-I{repository / 'csrc/tests/host'}", f"-I{repository / 'csrc'}",
         "-isystem", torch_root / "include", repository / "csrc/tests/host/lora_host.cpp", "-o", library,
         "-Wl,-Bsymbolic", f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


@pytest.fixture
def calls(host: ctypes.CDLL) -> Iterator[Callable[[], list[str]]]:
    """A function that tells which kernels were called since it was called."""
    host.calls.restype = ctypes.c_char_p
    yield lambda: host.calls().decode().split()
    host.capture(0)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str, factor: int = 1) -> None:
    tolerance = factor * {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    error = (got.double() - expected.double()).abs().max() / (expected.abs().max() + 1) if got.numel() else 0.0
    assert got.shape == expected.shape and float(error) <= tolerance, (what, float(error))


class Case:
    """Random arguments of an operator; `slice` of rows that are longer than y, `addresses` not on 16 bytes."""

    def __init__(self, draw: random.Random) -> None:
        choose = draw.choice

        def one_in(n: int) -> bool:
            return draw.randrange(n) == 0

        self.family, self.dtype = choose(("indexed", "indexed", "sum", "sum", "all")), choose((*HALF, torch.float32))
        self.T, self.r = choose((1, 1, 2, 3, 5, 13)), choose((0, 1, 3, 8, 8, 16, 16, 17, 24, 64, 65))
        self.n_in, self.out = choose((8, 16, 20, 40, 64)), choose((8, 16, 30, 48, 200))
        self.M = choose((1, 5, 64, 128, 130, 520, 591, 640))
        if one_in(8):  # so many bytes that adding is for Hopper's kernels
            self.T, (self.n_in, self.out, self.M) = choose((1, 2)), (16, 512, 3200)
        elif one_in(10):
            self.T, self.r = choose((40, 100)), 16
        if one_in(3):  # a slot for the fused product to make, or two that are given
            self.family, self.T, self.r, self.dtype = "indexed", 1, choose((16, 24)), choose(HALF)
            self.M, self.n_in, self.out = choose((520, 1100, 1100)), choose((16, 64)), choose((48, 200))
        elif self.family == "all" and one_in(2):  # as many tiles as the frozen product wants to make all outputs
            self.T, self.n_in, self.out, self.M = choose((1, 2, 13)), 16, 8, 11300
            self.r, self.dtype = choose((8, 16, 17)), choose(HALF)
        elif one_in(3):  # few rows, with the frozen layer where there is one
            self.family, self.dtype = choose(("indexed", "indexed", "sum")), choose(HALF)
            self.r, self.M = choose((4, 8, 16)), choose((1, 9, 20, 64))
            self.n_in, self.out = choose((16, 40)), choose((48, 200))
        groups = choose([1, self.M, *(g for g in (2, 3, 5) if self.M % g == 0)])
        self.odd, self.path = one_in(12), choose(("auto", "auto", "auto", "mma"))
        self.keep, self.kept, self.relu = one_in(2), not one_in(4), one_in(5)
        x, A, B = self.of(self.M, self.n_in), self.of(self.T, self.r, self.n_in), self.of(self.T, self.out, self.r)
        ids = torch.randint(-1, self.T, (groups,))
        self.front = [x, *([ids.sort().values if one_in(3) else ids] if self.family == "indexed" else []), A, B]
        self.front.append(torch.rand(self.T) + 0.5)
        self.times = torch.rand(self.T) + 0.5 if self.family == "sum" and one_in(2) else None
        self.base = self.of(self.M, self.out) if one_in(3) else None
        self.weight = self.of(self.out, self.n_in) if not one_in(3) else None
        self.bias = self.of(self.out) if self.weight is not None and one_in(2) else None
        self.bias_A = self.of(self.T, self.r) if one_in(5) else None
        self.bias_B = self.of(self.T, self.out) if one_in(5) else None
        self.ranks = torch.randint(0, self.r + 1, (self.T,)) if self.r and one_in(4) else None
        self.wider = choose((0, 0, 3, 8)) if self.family != "all" else 0
        self.needs = draw.randrange(1, 64) | one_in(2)  # x is what most plans differ in
        self.trainable = sorted(draw.sample(range(self.T), draw.randrange(self.T + 1))) if one_in(3) else None
        self.slices = None
        if self.r and self.r % 2 == 0 and self.family != "all" and self.ranks is None and one_in(6):
            cut = self.out // 2
            B[:, cut:, : self.r // 2] = 0
            B[:, :cut, self.r // 2 :] = 0
            self.slices = [0, cut, cut, self.out]

    def of(self, *sizes: int) -> Tensor:
        t = 0.3 * torch.randn(sizes)
        return torch.cat([t.new_zeros(1), t.flatten()]).to(self.dtype)[1:].view(sizes) if self.odd else t.to(self.dtype)

    def __repr__(self) -> str:
        return ", ".join(
            f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in vars(self).items() if k != "front"
        )


def check(case: Case, calls: Callable[[], list[str]]) -> list[str]:
    """Runs all operators of a case beside the CPU's; returns the kernels that were called."""
    host, cpu, name, c = torch.ops.plora_host, torch.ops.plora_ext, f"lora_{case.family}", case
    options = (c.base, c.weight, c.bias, c.bias_A, c.bias_B, c.ranks, c.relu)
    weighted, times = ("lora_weighted", [c.times]) if c.times is not None else (name, [])
    scaled = [*c.front[:-1], c.front[-1] if c.times is None else c.front[-1] * c.times]
    seen: list[str] = []

    y, kept = getattr(host, weighted)(*c.front, *options, None, c.slices, c.keep, *times)
    expected, _ = getattr(cpu, name)(*scaled, *options, None, None, False)
    seen += calls()
    close(y, expected, c.dtype, f"y of {c}")
    if c.family == "all":
        out = torch.full_like(y, float("nan"))
        host.lora_all_out(out, *c.front, *options)
        seen += calls()
        close(out, expected, c.dtype, f"out of {c}")

    start = c.of(*y.shape[:-1], c.out + c.wider)[..., : c.out]
    added, summed = start.clone() if not c.wider else start, start.clone()
    getattr(host, f"{name}_")(added, *c.front, c.bias_A, c.bias_B, c.ranks, c.relu)
    getattr(cpu, f"{name}_")(summed, *c.front, c.bias_A, c.bias_B, c.ranks, c.relu)
    seen += calls()
    close(added, summed, c.dtype, f"y += of {c}")

    if not c.relu or c.dtype == torch.float32:  # else roundings decide where the gradient is cut
        back = [c.weight, c.bias_A, c.bias_B, c.ranks]
        kept_or_not = kept if c.keep and c.kept else None
        grads = getattr(host, f"{weighted}_backward")(
            g := c.of(*y.shape), *c.front, *back, kept_or_not, c.relu, c.trainable, c.needs, *times
        )
        seen += calls()

        def wide(t: Any) -> Any:
            return t.float() if isinstance(t, Tensor) and t.is_floating_point() else t

        expected_grads = list(
            getattr(cpu, f"{name}_backward")(
                wide(g), *map(wide, scaled), *map(wide, back), None, c.relu, c.trainable, c.needs
            )
        )
        if times and expected_grads[3].numel():
            expected_grads[3] *= c.times
        for grad, expected, of in zip(grads, expected_grads, NEEDS, strict=True):
            close(grad, expected, c.dtype, f"gradient of {of} of {c}", 2 if of == "scaling" else 1)  # it cancels
    return seen


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(3))
def test_random_calls(
    seed: int, host: ctypes.CDLL, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    draw, seen = random.Random(seed), set()
    for _ in range(120):
        case = Case(draw)
        monkeypatch.setenv("PLORA_CUDA_PATH", case.path)
        host.capture(draw.randrange(2))
        seen |= set(check(case, calls))
    assert seen >= {
        "low_rank", "low_rank_down", "few_rows", "few_fused", "few_fused_transposed", "fork", "rows", "rows_transposed",
        "in_loop", "in_loop_transposed", "fused*", "fused_transposed*", "add", "expand", "lora_grads", "few_rows_grads",
        "lora_grads_sm90", "dense_grads",
    }  # fmt: skip
    assert seen & {"all", "all*"}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trainable", [None, [1], [0, 2]], ids=str)
@pytest.mark.parametrize(("T", "r"), [(5, 16), (5, 64), (3, 8)])  # by lora_merge, by torch's product, not merged
def test_weighted_scales_of_a_sum(
    T: int, r: int, trainable: list[int] | None, host: ctypes.CDLL, calls: Callable[[], list[str]]
) -> None:
    """As of their products: forward, and each gradient with and without what forward kept."""
    n_in, out, operators, dtype = 16, 48, torch.ops.plora_host, torch.bfloat16
    host.capture(0)
    x, A, B, W = (0.3 * torch.randn(sizes) for sizes in ((600, n_in), (T, r, n_in), (T, out, r), (out, n_in)))
    x, A, B, W, s, times = x.to(dtype), A.to(dtype), B.to(dtype), W.to(dtype), torch.rand(T) + 0.5, torch.rand(T) + 0.5
    grad, rest = torch.randn(600, out).to(dtype), (None, W, *[None] * 4, False, trainable, None)
    for keep in (False, True):
        calls()
        y, kept = operators.lora_weighted(x, A, B, s, *rest, keep, times)
        assert ("merge_weighted" in calls()) == (T * r == 80)
        expected, other = operators.lora_sum(x, A, B, s * times, *rest, keep)
        assert torch.equal(y, expected) and torch.equal(kept, other)
        for needs in (1, 2, 4, 8, 15):
            args = (W, None, None, None, kept if keep else None, False, trainable, needs)
            found = operators.lora_weighted_backward(grad, x, A, B, s, *args, times)
            wanted = operators.lora_sum_backward(grad, x, A, B, s * times, *args)
            own = needs == 8 or (needs > 1 and trainable == [1])  # few ranks ask, in a row
            assert ("dense_grads_sm90" in calls()) == (own and r != 8)
            for i in range(3):
                assert torch.equal(found[i], wanted[i]), (needs, i)
            torch.testing.assert_close(found[3], wanted[3] * times if needs & 8 else wanted[3])
    calls()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("lead", "r", "dtype"),
    [
        ((520,), 16, torch.bfloat16), ((2, 4, 130), 16, torch.bfloat16), ((4, 260), 24, torch.float16),
        ((197,), 16, torch.bfloat16), ((2, 3), 8, torch.bfloat16), ((), 8, torch.float16),
        ((2, 300), 17, torch.float32), ((3, 100), 200, torch.bfloat16), ((2, 0), 8, torch.float32),
        ((1, 300), 65, torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_one_adapter_is_a_sum_of_one(
    lead: tuple[int, ...], r: int, dtype: torch.dtype, host: ctypes.CDLL, calls: Callable[[], list[str]]
) -> None:
    """`lora_one` takes rows in any shape, which may begin anywhere in memory, and factors without a first dimension."""
    n_in, out, operators = 16, 48, torch.ops.plora_host
    x = (0.3 * torch.randn(8 + math.prod(lead) * n_in)).to(dtype)[8:].view(*lead, n_in)
    A, B, W, b = (0.3 * torch.randn(sizes) for sizes in ((r, n_in), (out, r), (out, n_in), (out,)))
    A, B, W, b, s = A.to(dtype), B.to(dtype), W.to(dtype), b.to(dtype), torch.full((1,), 1.5)
    rows, grad = x.reshape(-1, n_in), torch.randn(*lead, out).to(dtype).mT.contiguous().mT if lead else torch.randn(out)
    grad = grad.to(dtype)
    for capture, keep in itertools.product((0, 1), (False, True)):
        host.capture(capture)
        y, kept = operators.lora_one(x, A, B, s, W, b, keep)
        one = calls()
        expected, other = operators.lora_sum(
            rows, A[None], B[None], s, None, W, b, *[None] * 3, False, None, None, keep
        )
        assert one == calls()
        assert y.shape == (*lead, out) and y.is_contiguous() and y._base is None
        assert torch.equal(y.view(-1, out), expected) and torch.equal(kept, other)
        for needs in range(8):
            found = operators.lora_one_backward(grad, x, A, B, s, W, kept, needs)
            one = calls()
            dx, dA, dB, *_ = operators.lora_sum_backward(
                grad.reshape(-1, out), rows, A[None], B[None], s, W, *[None] * 3, other, False, None, needs
            )
            assert one == calls()
            for bit, (d, expected, like) in enumerate(zip(found, (dx, dA, dB), (x, A, B), strict=True)):
                assert d.shape == (like.shape if needs >> bit & 1 else (0,)) and d._base is None
                assert torch.equal(d.flatten(), expected.flatten()), (bit, needs)


def test_memory_lives_until_the_kernels_that_use_it(calls: Callable[[], list[str]]) -> None:
    x, A, B, s = torch.randn(520, 8), torch.randn(40, 16, 8), torch.randn(40, 48, 16), torch.ones(40)
    for _ in range(5):  # 640 ranks: low_rank wants memory for h, which once was given back before it ran
        y = torch.randn(520, 48)
        expected = y + x @ A.flatten(0, 1).T @ B.transpose(0, 1).flatten(1).T
        torch.ops.plora_host.lora_sum_(y, x, A, B, s, None, None, None, False)
        assert calls() == ["low_rank"]
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("operators", ["plora_host", "plora_ext"])
def test_out_may_hold_the_frozen_layer(operators: str, activation: bool, calls: Callable[[], list[str]]) -> None:
    """Of so many rows one kernel makes its product while it writes."""
    x, A, B = (torch.randn(sizes).bfloat16() for sizes in ((11300, 16), (2, 8, 16), (2, 16, 8)))
    weight, bias, out = torch.randn(16, 16).bfloat16(), torch.randn(16).bfloat16(), torch.empty(2, 11300, 16).bfloat16()
    frozen = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    h = x.float() @ A.float().mT
    expected = frozen + (h.relu() if activation else h) @ B.float().mT
    out[0, :16], out[1, 3] = weight, bias
    rest = (torch.ones(2), None, out[0, :16], out[1, 3], None, None, None, activation)
    getattr(torch.ops, operators).lora_all_out(out, x, A, B, *rest)
    close(out, expected, torch.bfloat16, "out")
    assert calls() == ([] if operators == "plora_ext" else ["rows", "all*"] if activation else ["all"])


@pytest.mark.parametrize("operators", ["plora_host", "plora_ext"])
@pytest.mark.usefixtures("calls")
def test_out_may_be_what_is_read(operators: str) -> None:
    lora_all_out = getattr(torch.ops, operators).lora_all_out
    x, A, B = torch.randn(6, 16), torch.randn(2, 4, 16), torch.randn(2, 16, 4)
    expected = torch.stack([base := torch.randn(6, 16)] * 2) + (x @ A.mT @ B.mT)
    for i in range(2):
        out = torch.stack([x, base])
        shared = (out[0], base) if i == 0 else (x, out[1])
        lora_all_out(out, shared[0], A, B, torch.ones(2), shared[1], None, None, None, None, None, False)
        torch.testing.assert_close(out, expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["", "float32"])
@pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 5, 0, 3], [1]], ids=str)
def test_factors_that_lie_one_by_one_are_stacked(
    dtype: torch.dtype, wide: bool, ranks: list[int], host: ctypes.CDLL, calls: Callable[[], list[str]]
) -> None:
    n_in, out, r, x = 6, 7, max(ranks), torch.empty(0, dtype=dtype)
    A = [torch.randn(n_in, own).to(torch.float32 if wide else dtype).T for own in ranks]
    B, scaling = [torch.randn(out, own).to(A[0].dtype) for own in ranks], [0.1 * (t + 1) for t in range(len(ranks))]
    calls()
    found = torch.ops.plora_host.lora_stack(x, A, B, scaling)
    assert calls() == ["stack"]
    for got, expected in zip(
        found,
        (
            torch.stack([F.pad(a, (0, 0, 0, r - len(a))) for a in A]).to(dtype),
            torch.stack([F.pad(b, (0, r - b.shape[1])) for b in B]).to(dtype),
            torch.tensor(scaling),
        ),
        strict=True,
    ):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_factors_that_cannot_be_stacked_are_named(host: ctypes.CDLL) -> None:
    A, B, s, stack = [torch.zeros(4, 8)] * 2, [torch.zeros(6, 4)] * 2, [1.0, 1.0], torch.ops.plora_host.lora_stack
    for match, args in {
        "as many, at least one, got 0, 2 and 2": ([], B, s),
        "as many, at least one, got 2, 1 and 2": (A, B[:1], s),
        "as many, at least one, got 2, 2 and 1": (A, B, s[:1]),
        r"lora_A must be \[r, in\] and lora_B \[out, r\], got \[1, 4, 8\]": ([A[0][None], A[1]], B, s),
        r"lora_A must have the shape \[4, 8\], got \[4, 7\]": ([A[0], A[1][:, 1:]], B, s),
        r"lora_B must have the shape \[6, 4\], got \[6, 3\]": (A, [B[0], B[1][:, 1:]], s),
        "lora_A must be Float, got BFloat16": ([A[0], A[1].bfloat16()], B, s),
        "must be float32 or of the dtype of x": ([a.half() for a in A], B, s),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            stack(torch.empty(0, dtype=torch.bfloat16), *args)
