"""The CUDA kernels of the low-rank operators at the sizes where their paths part: a grid for one GPU and two minutes.

Everything runs on both paths, the one that the plan chooses and the one for other GPUs (`PLORA_CUDA_PATH`), in memory
filled with NaN, against the float64 twin (`oracle.check`). test_ops_lora.py holds what is so on every device.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check, opcheck, run
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext import libraries, ops, reference
from plora_ext.nn import Adapters, MultiLoRALinear, inject

DEVICE = torch.device("cuda")
FAMILIES = ("lora_indexed", "lora_sum", "lora_all")
PATHS = ("auto", "mma")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif("cuda" not in libraries.loaded, reason="no compiled CUDA operators"),
    pytest.mark.usefixtures("poisoned", "float32_is_float32"),
    pytest.mark.filterwarnings("ignore:.*(deterministic|Synchronization debug mode).*:UserWarning"),
]
families = pytest.mark.parametrize("family", FAMILIES)
both_paths = pytest.mark.usefixtures("path")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_CUDA_PATH", request.param)


@pytest.fixture
def float32_is_float32() -> Iterator[None]:
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, allowed in zip(switches, before):
        switch.allow_tf32 = allowed


# ---------------------------------------------------------------------- problems


def row_ids(kind: str, M: int, T: int) -> Tensor:
    """-1 or an adapter for each of M rows."""
    m = torch.arange(M)
    if kind == "none":
        return torch.full((M,), -1)
    if kind == "one":
        return torch.full((M,), T - 1)
    if kind == "segments":  # sorted, of any length; the first holds one row and the second none
        cuts = torch.randint(0, M + 1, (T - 1,))
        cuts[:2] = min(1, M)
        return (cuts <= m[:, None]).sum(1)
    if kind == "tiles":  # in each block of 128 rows as many adapters as the list says
        block, counts = m // 128, torch.tensor([1, 2, 3, 4, 5, 0, 10, 128])
        count = counts[block % len(counts)]
        return torch.where(count > 0, (m % count.clamp(min=1) + 3 * block) % T, -1)
    assert kind == "random", kind
    return torch.randint(-1, T, (M,))


def problem(
    family: str,
    M: int | tuple[int, ...] = 520,
    n_in: int = 72,
    out: int = 136,
    r: int = 16,
    T: int = 5,
    *,
    options: str = "weight bias",
    ids: str = "random",
    dtype: torch.dtype = BF16,
    device: torch.device | str = DEVICE,
    grad: bool = True,
) -> tuple[list[Any], dict[str, Any], Tensor]:
    """Arguments, keyword arguments, a cotangent; `options` names any of base weight bias bias_A bias_B relu ranks.

    The frozen and the low-rank part of y are of size one. Scales are short binary fractions, which no dtype rounds. The
    cotangent leans on y, as that of a loss does: the gradient of a scale, one sum over all of y, would otherwise cancel
    down to what rounding leaves, of which no run is twice as good as another.
    """
    rows, chosen = (M,) if isinstance(M, int) else M, options.split()
    terms = T * r if family == "lora_sum" else r
    x, A = torch.randn(*rows, n_in, device=device), torch.randn(T, r, n_in, device=device) / n_in**0.5
    bias_A = torch.randn(T, r, device=device) / 2
    if "relu" in chosen:
        # h is a multiple of 1/512 that every dtype and order of summation gets right, so that all cut the same elements
        x, A, bias_A = (x * 4).round() / 4, (A * 64).round() / 64, bias_A.sign() * 129 / 512
    named = {
        "base": torch.randn(*rows, out, device=device),
        "weight": torch.randn(out, n_in, device=device) / n_in**0.5,
        "bias": torch.randn(out, device=device),
        "bias_A": bias_A,
        "bias_B": torch.randn(T, out, device=device) / terms**0.5,
    }
    B = torch.randn(T, out, r, device=device) / terms**0.5
    scaling = torch.randint(2, 12, (T,), device=device) / 8

    def leaf(t: Tensor, to: torch.dtype) -> Tensor:
        return t.to(to).requires_grad_(grad)

    args: list[Any] = [leaf(x, dtype), leaf(A, dtype), leaf(B, dtype), leaf(scaling, torch.promote_types(dtype, FP32))]
    if family == "lora_indexed":
        args.insert(1, row_ids(ids, args[0][..., 0].numel(), T).reshape(rows).to(device))
    kwargs: dict[str, Any] = {name: leaf(t, dtype) for name, t in named.items() if name in chosen}
    if "relu" in chosen:
        kwargs["activation"] = "relu"
    if "ranks" in chosen:
        kwargs["ranks"] = torch.randint(0, r + 1, (T,)).to(device)
    with torch.no_grad():
        y = getattr(reference, family)(*args, **kwargs)
    return args, kwargs, (y + torch.randn_like(y)) / 8


def verify(family: str, args: list[Any], kwargs: dict[str, Any], cotangent: Tensor) -> None:
    """With gradients, and without, where other plans apply and nothing is kept for backward."""
    check(getattr(ops, family), getattr(reference, family), args, kwargs, cotangent)
    with torch.no_grad():
        check(getattr(ops, family), getattr(reference, family), args, kwargs)


def bits(family: str, args: list[Any], kwargs: dict[str, Any], cotangent: Tensor | None) -> list[Tensor]:
    """The output and every gradient."""
    return [t for t in run(getattr(ops, family), args, kwargs, cotangent) if t is not None]


def same(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def leaves(args: list[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    return [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]


# ---------------------------------------------------------------------- sizes


def test_the_kernels_are_there() -> None:
    """Without them the operators would quietly run as their own twins."""
    names = [family + form for family in FAMILIES for form in ("", "_", "_backward")]
    assert all(libraries.has_kernel(name, "cuda") for name in (*names, "lora_merge"))


@both_paths
@families
@pytest.mark.parametrize(("n_in", "out"), [(768, 768), (768, 2304), (768, 3072), (3072, 768)])
def test_layers(family: str, n_in: int, out: int) -> None:
    for T in (1, 10):
        verify(family, *problem(family, 1027, n_in, out, T=T, ids="segments"))


@both_paths
@pytest.mark.parametrize(
    ("family", "T", "r"),
    [("lora_indexed", 10, 16), ("lora_sum", 1, 16), ("lora_sum", 1, 64), ("lora_sum", 10, 16), ("lora_all", 10, 16)],
)
def test_full_size(family: str, T: int, r: int) -> None:
    verify(family, *problem(family, 12608, 768, 768, r, T))


@both_paths
@families
@pytest.mark.parametrize(
    ("n_in", "out"),
    [(72, 200), (200, 72), (1032, 264), (264, 1032), (8, 8), (136, 1000), (7, 13), (13, 33), (33, 7), (72, 33)],
)
def test_widths(family: str, n_in: int, out: int) -> None:
    verify(family, *problem(family, 600, n_in, out))


@both_paths
@families
@pytest.mark.parametrize("M", [0, 1, 127, 128, 129, 512, 513])
def test_rows(family: str, M: int) -> None:
    verify(family, *problem(family, M, r=24))


@both_paths
@families
@pytest.mark.parametrize("r", [1, 3, 8, 16, 17, 24, 32, 48, 64, 100, 128, 272])
def test_ranks(family: str, r: int) -> None:
    """Fused adapters have the ranks of all that were fused."""
    for options in ("weight", "weight ranks"):
        verify(family, *problem(family, 600, 136, 200, r, options=options))


@both_paths
@families
@pytest.mark.parametrize("T", [1, 2, 10, 100, 1000])
def test_adapters(family: str, T: int) -> None:
    """With 1,000 most are selected by few rows or none."""
    verify(family, *problem(family, 600, r=8, T=T))


@both_paths
@pytest.mark.parametrize("r", [16, 32, 64])
@pytest.mark.parametrize("kind", ["none", "one", "segments", "tiles"])
def test_ids(kind: str, r: int) -> None:
    verify("lora_indexed", *problem("lora_indexed", 9 * 128 + 5, 136, 200, r, T=150, ids=kind))


@both_paths
@pytest.mark.parametrize(("r", "T"), [(16, 3), (24, 40), (64, 5), (272, 2)])
@pytest.mark.parametrize("options", ["weight bias", "weight bias_A bias_B relu"])
@pytest.mark.parametrize("kind", ["segments", "tiles", "random"])
def test_ids_of_many_rows(kind: str, options: str, r: int, T: int) -> None:
    """More blocks of 64 rows than multiprocessors; they meet any number of ranks, up to more than one pass takes."""
    verify("lora_indexed", *problem("lora_indexed", 17029, 72, 136, r, T, options=options, ids=kind))


def test_backward_is_the_first_to_use_its_thread() -> None:
    """A process of its own, as autograd's thread keeps what the calls before it set up."""
    script = """
import torch
from plora_ext import ops
shapes = (520, 64), (1, 64, 64), (1, 64, 64), (64, 64)
x, A, B, W = (torch.ones(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
y = ops.lora_sum(x.requires_grad_(), A, B, torch.ones(1, device="cuda"), weight=W)
print(torch.autograd.grad(y.sum(), x)[0].unique().tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == str([64.0 + 64 * 64]), done.stderr


@both_paths
@families
def test_samples(family: str) -> None:
    verify(family, *problem(family, (8, 197), 768, 768, options="weight bias base"))


@pytest.mark.parametrize(("samples", "rows"), [(21, 32), (9, 64), (11, 65), (64, 197), (3, 300), (700, 33), (2049, 32)])
@pytest.mark.parametrize(("T", "r"), [(1, 16), (3, 64), (10, 16), (12, 5), (40, 24), (70, 40)])
def test_gradients_of_samples(samples: int, rows: int, T: int, r: int) -> None:
    """On Hopper a cluster for each adapter; some have no sample, or do not ask."""
    args, kwargs, cotangent = problem("lora_indexed", (samples, rows), 136, 200, r, T, options="weight bias")
    args[1] = row_ids("random", samples, T).to(DEVICE)
    kwargs["trainable"] = list(range(0, T, 2)) if samples % 2 else None
    verify("lora_indexed", args, kwargs, cotangent)


@both_paths
@pytest.mark.parametrize("lead", [(8, 197), (5, 128), (3, 256), (20, 32), (7, 100)])
def test_an_id_for_each_sample(lead: tuple[int, int]) -> None:
    """Of any integer dtype."""
    args, kwargs, cotangent = problem("lora_indexed", lead, 192, 200, options="weight bias base")
    args[1] = row_ids("random", lead[0], 5).to(DEVICE, torch.int32)
    verify("lora_indexed", args, kwargs, cotangent)


# ---------------------------------------------------------------------- few rows


@pytest.mark.parametrize("M", [1, 2, 7, 20, 33, 64, 128, 257, 512])
@pytest.mark.parametrize(
    ("n_in", "out"), [(64, 4104), (100, 768), (768, 100), (4096, 4096), (4104, 64), (768, 768), (33, 13), (520, 1031)]
)
def test_few_rows(n_in: int, out: int, M: int) -> None:
    """Ranks, dtypes, options and ids take turns."""
    turns = zip(
        itertools.cycle((16, 1, 24, 128, 5, 8, 100)),
        itertools.cycle(("weight bias", "base ranks", "weight bias_A bias_B relu", "", "weight bias base ranks relu")),
        itertools.cycle(("random", "segments", "one", "none")),
        itertools.cycle((BF16, FP16, FP32)),
    )
    for _ in range(M % 7):
        next(turns)
    for (family, T), (r, options, ids, dtype) in zip(
        itertools.product(("lora_indexed", "lora_sum"), (1, 4, 64, 100)), turns, strict=False
    ):
        r = min(r, 8) if family == "lora_sum" and T > 4 else r
        arguments = problem(family, M, n_in, out, r, T, options=options, ids=ids if T > 3 else "random", dtype=dtype)
        verify(family, *arguments)
        assert same(bits(family, *arguments), bits(family, *arguments))


@pytest.mark.parametrize("M", [1, 8, 9, 16, 32, 33, 64])
@pytest.mark.parametrize(("n_in", "out"), [(8, 40), (72, 264), (264, 72), (4104, 264)])
def test_few_rows_with_the_frozen_layer(n_in: int, out: int, M: int) -> None:
    """Warps with many rows, among them some without an adapter, and with many chunks of ranks, whole and not."""
    for family, r, options, ids, dtype in (
        ("lora_indexed", 8, "weight bias", "random", BF16),
        ("lora_indexed", 16, "weight base ranks", "segments", FP16),
        ("lora_indexed", 24, "weight bias_A bias_B relu", "random", BF16),
        ("lora_indexed", 64, "weight bias base ranks", "random", FP16),
        ("lora_sum", 24, "weight bias bias_B ranks", "none", BF16),
    ):
        arguments = problem(family, M, n_in, out, r, T=9 if family == "lora_indexed" else 3, options=options, ids=ids,
                            dtype=dtype)  # fmt: skip
        verify(family, *arguments)
        assert same(bits(family, *arguments), bits(family, *arguments))


@pytest.mark.parametrize("M", [1, 64, 65, 128, 197, 520, 1031, 4100, 12608])
@pytest.mark.parametrize(("n_in", "out"), [(8, 24), (72, 264), (768, 768), (328, 2304), (4096, 1024)])
def test_gradients_of_adapters_on_all_rows(n_in: int, out: int, M: int) -> None:
    """Of clusters of one block and of several, of ranks in rows of 16, 32 and 64, behind each kernel that makes g."""
    for T, r, options, frozen, dtype in (
        (1, 1, "weight bias", "", BF16),
        (1, 16, "weight bias", "scaling", BF16),
        (1, 16, "weight", "x scaling", FP16),
        (1, 24, "ranks", "scaling", FP16),
        (3, 8, "weight bias_A bias_B ranks relu", "", BF16),  # whose bias_A gets more than float16 can hold
        (1, 40, "weight ranks", "A", BF16),
        (1, 64, "", "B scaling", FP16),
        (2, 32, "weight bias_A", "x A", BF16),
    ):
        arguments = problem("lora_sum", M, n_in, out, r, T, options=options, dtype=dtype)
        for name, argument in zip(("x", "A", "B", "scaling"), arguments[0], strict=True):
            argument.requires_grad_(name not in frozen.split())
        verify("lora_sum", *arguments)
        assert same(bits("lora_sum", *arguments), bits("lora_sum", *arguments))


def test_a_graph_of_gradients_meets_other_rows() -> None:
    args, kwargs, cotangent = problem("lora_sum", 3000, 768, 768, r=16, T=1)
    bits("lora_sum", args, kwargs, cotangent)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bits("lora_sum", args, kwargs, cotangent)
    for _ in range(3):
        with torch.no_grad():
            args[0].copy_(torch.randn_like(args[0])), cotangent.copy_(torch.randn_like(cotangent))
        for value in captured:
            value.fill_(torch.nan)
        graph.replay()
        assert same(captured, bits("lora_sum", args, kwargs, cotangent))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_few_rows_read_only_what_they_chose(dtype: torch.dtype) -> None:
    """Neither adapters that no row chose nor ranks that an adapter does not have."""
    for M, T, r, n in ((40, 64, 16, 264), (300, 7, 24, 4096), (3, 1000, 5, 33)):
        args, kwargs, _ = problem("lora_indexed", M, n, n, r, T, options="weight ranks bias_A", dtype=dtype, grad=False)
        _, ids, A, B, _ = args
        expected = ops.lora_indexed(*args, **kwargs)
        beyond = torch.arange(r, device=DEVICE) >= kwargs["ranks"][:, None]
        beyond |= (torch.arange(T, device=DEVICE)[:, None] != ids).all(1, keepdim=True)
        A[beyond] = kwargs["bias_A"][beyond] = torch.nan
        B.mT[beyond] = torch.nan
        assert torch.equal(ops.lora_indexed(*args, **kwargs), expected)


@pytest.mark.parametrize(("M", "T"), [(512, 3), (300, 64), (64, 1000), (512, 32768)])
def test_few_rows_in_any_order(M: int, T: int) -> None:
    """A row's bits do not depend on its neighbours; nor where there are as many adapters as may be."""
    (x, ids, A, B, s), _, y = problem("lora_indexed", M, 264, 520, 8, T, options="", grad=False)
    expected, order = ops.lora_indexed_(y.clone(), x, ids, A, B, s), torch.randperm(M, device=DEVICE)
    assert torch.equal(ops.lora_indexed_(y[order], x[order], ids[order], A, B, s), expected[order])
    assert torch.equal(expected[ids < 0], y[ids < 0])


def test_a_graph_of_few_rows_meets_other_adapters() -> None:
    """Forward alone, and with all gradients."""
    for grad in (False, True):
        args, kwargs, cotangent = problem("lora_indexed", 64, 4096, 768, T=64, grad=grad)
        bits("lora_indexed", args, kwargs, cotangent)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = bits("lora_indexed", args, kwargs, cotangent)
        for kind in ("none", "one", "segments", "random"):
            args[1].copy_(row_ids(kind, 64, 64))
            with torch.no_grad():
                args[0].copy_(args[0].roll(1, 0))
                for t in captured:
                    t.fill_(torch.nan)
            graph.replay()
            assert same(captured, bits("lora_indexed", args, kwargs, cotangent))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    ("M", "n_in", "out", "r", "T"),
    [
        (1, 264, 520, 16, 1), (64, 4096, 768, 16, 64), ((8, 25), 33, 13, 5, 100), (512, 520, 1031, 24, 3),
        (512, 264, 256, 130, 2), (7, 1032, 72, 128, 200), ((3, 100), 768, 772, 12, 40), (257, 100, 4104, 1, 9),
    ],
)  # fmt: skip
def test_factors_of_few_rows(M: int | tuple[int, ...], n_in: int, out: int, r: int, T: int, dtype: torch.dtype) -> None:
    """One factor or both, of all adapters, of some that train or of none."""
    rows = M if isinstance(M, int) else M[0]
    turns = itertools.cycle((None, [T - 1], sorted({0, T // 2}), []))
    for options, kind in (("weight", "random"), ("base ranks", "one"), ("weight bias_A bias_B relu", "segments")):
        args, kwargs, cotangent = problem("lora_indexed", M, n_in, out, r, T, options=options, dtype=dtype, grad=False)
        args[1] = row_ids(kind if T > 3 else "random", rows, T).to(DEVICE)
        A, B = args[2:4]
        for asking in ([A], [B], [A, B]):
            for t in asking:
                t.requires_grad_()
            arguments = args, {**kwargs, "trainable": next(turns)}, cotangent
            verify("lora_indexed", *arguments)
            assert same(bits("lora_indexed", *arguments), bits("lora_indexed", *arguments))
            for t in asking:
                t.requires_grad_(False)


@pytest.mark.parametrize(("M", "n_in", "out", "r"), [(300, 264, 520, 24), (512, 4096, 768, 16), (40, 33, 13, 5)])
def test_factors_know_their_own_rows_alone(M: int, n_in: int, out: int, r: int) -> None:
    """To the bit, whatever the others hold."""
    args, kwargs, cotangent = problem("lora_indexed", M, n_in, out, r, T=7)
    x, ids, A, B, _ = args
    together = torch.autograd.grad(ops.lora_indexed(*args, **kwargs), (A, B), cotangent)
    for t in range(7):
        own = ids == t
        args[:2] = torch.where(own[:, None], x, torch.inf), torch.where(own, ids, -1)
        dy = torch.where(own[:, None], cotangent, torch.nan)
        for alone, of_all in zip(torch.autograd.grad(ops.lora_indexed(*args, **kwargs), (A, B), dy), together):
            assert torch.equal(alone[t], of_all[t])
            assert alone.count_nonzero() == alone[t].count_nonzero()


# ---------------------------------------------------------------------- options and dtypes


@both_paths
@families
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    "options",
    ["", "base", "weight", "weight bias base", "weight bias bias_A bias_B", "weight bias bias_A bias_B relu",
     "base bias_A bias_B relu ranks", "weight relu"],
)  # fmt: skip
def test_options(family: str, dtype: torch.dtype, options: str) -> None:
    for M in (200, 520):  # by the kernels for few rows, and by the others
        verify(family, *problem(family, M, dtype=dtype, options=options, ids="tiles"))


@families
@pytest.mark.parametrize(("n_in", "out", "r"), [(768, 768, 16), (200, 33, 100), (13, 72, 3)])
def test_float32(family: str, n_in: int, out: int, r: int) -> None:
    verify(family, *problem(family, 1027, n_in, out, r, dtype=FP32, options="weight bias base ranks"))


@families
def test_tf32_where_torch_allows_it(family: str) -> None:
    """Ten bits instead of 23 in every product, so three digits in the output and in every gradient."""
    torch.backends.cuda.matmul.allow_tf32 = True
    args, kwargs, cotangent = problem(family, 1027, 768, 768, dtype=FP32)
    exact = run(
        getattr(reference, family),
        [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args],
        {k: v.detach().double().requires_grad_() for k, v in kwargs.items()},
        cotangent.double(),
    )
    for ours, e in zip(bits(family, args, kwargs, cotangent), exact, strict=True):
        assert (ours - e).norm() < 3e-3 * e.norm()


@families
def test_float64(family: str) -> None:
    verify(family, *problem(family, 130, dtype=torch.float64, options="weight bias base bias_A bias_B relu ranks"))


@both_paths
@families
@pytest.mark.parametrize("options", ["base weight bias", "weight bias bias_A bias_B relu"])
def test_only_what_asks_gets_a_gradient(family: str, options: str) -> None:
    """Each argument alone, the usual pairs, and the factors of some adapters alone."""
    args, kwargs, cotangent = problem(family, options=options, grad=False)
    tensors = leaves(args, kwargs)
    x, A, B, s = tensors[:4]
    for asking in (*([t] for t in tensors), [A, B], [x, A, B], [x, s]):
        for t in asking:
            t.requires_grad_()
        verify(family, args, kwargs, cotangent)
        for t in asking:
            t.requires_grad_(False)
    for t in tensors:
        t.requires_grad_()
    for trainable in ([], [4], [0, 2]):
        verify(family, args, {**kwargs, "trainable": trainable}, cotangent)


@both_paths
@families
@pytest.mark.parametrize("options", ["weight bias", "weight bias_A bias_B relu"])
@pytest.mark.parametrize("width", [5, 8, 12, 16, 32])
def test_slices(family: str, width: int, options: str) -> None:
    """The rows of v and q in a fused qkv, in this order; a block of ranks may end within a slot of the kernels."""
    slices = [(384, 576), (0, 192)]
    args, kwargs, cotangent = problem(family, 1027, 192, 576, 2 * width, T=3, options=options)
    blocks = args[-2].detach().unflatten(-1, (2, width))  # of lora_B
    for block, (start, stop) in zip(blocks.unbind(-2), slices):
        block[:, :start] = 0
        block[:, stop:] = 0
    verify(family, args, {**kwargs, "slices": slices}, cotangent)


@both_paths
@pytest.mark.parametrize("count", [2, 8, 9])
def test_slices_of_one_adapter(count: int) -> None:
    """A slice for every 192 columns, which is a tile of the fused product; it tells up to eight apart."""
    slices = [(192 * i, 192 * (i + 1)) for i in range(count)]
    args, kwargs, cotangent = problem("lora_sum", 1027, 192, 192 * count, 16 * count, T=1, options="weight bias")
    blocks = args[-2].detach().unflatten(-1, (count, 16))  # of lora_B
    for block, (start, stop) in zip(blocks.unbind(-2), slices):
        block[:, :start] = 0
        block[:, stop:] = 0
    verify("lora_sum", args, {**kwargs, "slices": slices}, cotangent)


# ---------------------------------------------------------------------- layouts


def every_other(t: Tensor) -> Tensor:
    return t.new_empty(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)


def in_wider_rows(t: Tensor) -> Tensor:
    return t.new_empty(*t.shape[:-1], t.shape[-1] + 8)[..., :-8].copy_(t)


def off_by_one(t: Tensor) -> Tensor:
    """Neither the pointer nor the rows are aligned."""
    return t.new_empty(*t.shape[:-1], t.shape[-1] + 1)[..., 1:].copy_(t)


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


@both_paths
@families
@pytest.mark.parametrize("layout", [every_other, in_wider_rows, off_by_one, transposed])
def test_layouts(family: str, layout: Callable[[Tensor], Tensor]) -> None:
    def strided(v: Any) -> Any:
        return layout(v).requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1 else v

    for M in (200, 520):
        args, kwargs, cotangent = problem(family, M, options="weight bias base bias_A bias_B", grad=False)
        verify(family, [strided(a) for a in args], {k: strided(v) for k, v in kwargs.items()}, layout(cotangent))


@both_paths
@families
def test_expanded_gradients(family: str) -> None:
    args, kwargs, cotangent = problem(family)
    args[-1].requires_grad_(False)
    verify(family, args, kwargs, cotangent.new_ones(()).expand_as(cotangent))
    verify(family, args, kwargs, cotangent[..., :1, :].expand_as(cotangent))


# ---------------------------------------------------------------------- sums and merges


@both_paths
@pytest.mark.parametrize(
    ("T", "r"), [(7, 8), (8, 8), (9, 8), (1, 65), (23, 8), (24, 8), (25, 8), (1, 128), (2, 128), (193, 1), (50, 16)]
)
def test_sum_on_both_sides_of_its_rules(T: int, r: int) -> None:
    """T r around 64 and 192, M around 256: concatenation, the merged weight and the dense gradient take turns."""
    args, kwargs, cotangent = problem("lora_sum", 600, 136, 200, r, T)
    coeff = (torch.randint(2, 12, (T,), device=DEVICE) / 8).requires_grad_()
    verify("lora_sum", args, {**kwargs, "coeff": coeff}, cotangent)
    verify("lora_sum", args, {**kwargs, "coeff": coeff, "trainable": [T - 1]}, cotangent)
    for options in ("base", "weight ranks", "weight bias_A bias_B relu"):
        verify("lora_sum", *problem("lora_sum", 600, 136, 200, r, T, options=options))
    for M in (255, 256):
        verify("lora_sum", *problem("lora_sum", M, 136, 200, r, T))


@both_paths
def test_sum_trains_its_newest_adapter_and_the_coefficients() -> None:
    """The other scales, the frozen layer and x ask for nothing."""
    for M, T in ((600, 10), (1027, 50)):
        args, kwargs, cotangent = problem("lora_sum", M, 768, 768, T=T, grad=False)
        for factor in args[1:3]:
            factor.requires_grad_()
        coeff = (torch.randint(2, 12, (T,), device=DEVICE) / 8).requires_grad_()
        verify("lora_sum", args, {**kwargs, "coeff": coeff, "trainable": [T - 1]}, cotangent)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    ("M", "n_in", "out", "r", "T", "trainable"),
    [
        (300, 136, 200, 16, 10, [1, 2, 5, 9]),
        (300, 136, 200, 16, 10, [9]),
        (300, 33, 13, 5, 23, [3, 7]),
        (300, 72, 40, 8, 1200, [0, 1, 5, 1023, 1024, 1199]),
        (300, 768, 72, 200, 3, [1]),  # a scale's gradient in two parts
        # in a row, of up to 64 ranks: by Hopper's kernel, a tile in one share or several, some of them empty
        (1, 200, 136, 16, 7, [2]),
        (65, 8, 8, 16, 5, [4]),
        (300, 264, 136, 64, 3, [1]),
        (300, 200, 264, 128, 2, []),
        (700, 1000, 520, 10, 10, [3, 4, 5]),
        (4100, 384, 640, 32, 40, [38, 39]),
        (2500, 768, 768, 16, 100, [0, 1, 2, 3]),
    ],
)
def test_some_adapters_of_a_dense_sum(
    M: int, n_in: int, out: int, r: int, T: int, trainable: list[int], dtype: torch.dtype
) -> None:
    """With gaps between them; also one factor, both or the scales alone."""
    for options in ("weight", "weight ranks"):
        args, kwargs, cotangent = problem("lora_sum", M, n_in, out, r, T, dtype=dtype, options=options, grad=False)
        _, A, B, s = args
        for asking in ([A], [B], [A, B], [s], [A, B, s]):
            for t in asking:
                t.requires_grad_()
            verify("lora_sum", args, {**kwargs, "trainable": trainable}, cotangent)
            for t in asking:
                t.requires_grad_(False)
    for t in (A, B, s):
        t.requires_grad_()
    arguments = args, {**kwargs, "trainable": trainable}, cotangent
    assert same(bits("lora_sum", *arguments), bits("lora_sum", *arguments))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    ("n_in", "out", "r", "T"),
    [(768, 2304, 16, 10), (3072, 768, 16, 50), (72, 200, 128, 3), (33, 13, 5, 7), (24, 16, 0, 3)],
)
def test_merge(dtype: torch.dtype, n_in: int, out: int, r: int, T: int) -> None:
    (_, *factors), kwargs, _ = problem("lora_sum", 1, n_in, out, r, T, dtype=dtype, options="weight ranks")
    args, cotangent = [kwargs.pop("weight"), *factors], torch.randn(out, n_in, device=DEVICE).to(dtype)
    check(ops.lora_merge, reference.lora_merge, args, kwargs, cotangent)
    coeff = (torch.randint(2, 12, (T,), device=DEVICE) / 8).requires_grad_()
    check(ops.lora_merge, reference.lora_merge, args, {"coeff": coeff}, cotangent)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("n_in", "out", "r", "T"),
    [
        (768, 768, 16, 10),
        (328, 200, 8, 3),
        (776, 1000, 48, 5),
        (3072, 768, 64, 1),
        (8, 1, 16, 70),
        (200, 72, 272, 2),
    ],
)
@pytest.mark.parametrize("equal", [False, True], ids=["", "equal"])
def test_merge_of_whole_slices(dtype: torch.dtype, n_in: int, out: int, r: int, T: int, equal: bool) -> None:
    """Of 8 or 16 n ranks that all count, by Hopper's copy engine; adapters that have the same scale are one product."""
    (_, A, B, s), kwargs, _ = problem("lora_sum", 1, n_in, out, r, T, dtype=dtype, options="weight", grad=False)
    if equal:
        s = s[:1].repeat_interleave(T) * (torch.arange(T, device=DEVICE) % 9 > 3).add(1)  # runs of some adapters
    args, cotangent = [kwargs.pop("weight"), A, B, s], torch.randn(out, n_in, device=DEVICE).to(dtype)
    check(ops.lora_merge, reference.lora_merge, args, kwargs, cotangent)
    assert torch.equal(ops.lora_merge(*args), ops.lora_merge(*args))


def factors_one_by_one(
    dtype: torch.dtype, n_in: int, out: int, ranks: Sequence[int], left: int = 0
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """A, B and scaling of each adapter; `left` elements away from where its memory begins."""

    def of(*sizes: int) -> Tensor:
        return torch.randn(left + math.prod(sizes), device=DEVICE).to(dtype)[left:].view(sizes)

    A, B = [of(r, n_in) for r in ranks], [of(out, r) for r in ranks]
    return A, B, torch.rand(len(ranks), dtype=torch.float64).tolist()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["", "float32"])
@pytest.mark.parametrize(
    ("n_in", "out", "ranks", "left"),
    [
        (768, 2304, [16] * 10, 0), (768, 2304, [16] * 10, 3), (3072, 768, [8, 16, 64, 24], 0), (33, 13, [5, 1, 7], 0),
        (72, 200, [128], 0), (24, 16, [4] * 64, 0), (24, 40, [4, 8] * 70, 1), (16, 40, [3] * 65, 0), (16, 9, [8, 8], 0),
        (40, 8, [0, 2], 0), (40, 8, [0, 0], 0),
    ],
    ids=str,
)  # fmt: skip
def test_stack(dtype: torch.dtype, wide: bool, n_in: int, out: int, ranks: list[int], left: int) -> None:
    """Bit for bit what padding, stacking and casting make, in memory full of NaN, also where factors are views."""
    A, B, s = factors_one_by_one(FP32 if wide else dtype, n_in, out, ranks, left)
    x, r, stack = torch.empty(0, dtype=dtype, device=DEVICE), max(ranks), torch.ops.plora_ext.lora_stack
    expected = [
        torch.stack([F.pad(a, (0, 0, 0, r - len(a))) for a in A]).to(dtype),
        torch.stack([F.pad(b, (0, r - b.shape[1])) for b in B]).to(dtype),
        torch.tensor(s, device=DEVICE),
    ]
    assert same(list(stack(x, A, B, s)), expected)
    columns = [b.T.contiguous().T for b in B]
    assert same(list(stack(x, [a.repeat(1, 2)[:, :n_in] for a in A], columns, s)), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stack(x, A, B, s)
    A[-1].fill_(2), B[-1].fill_(3)
    expected[0][-1, : ranks[-1]], expected[1][-1, :, : ranks[-1]] = 2, 3
    graph.replay()
    assert same(list(captured), expected)


def test_stack_is_known_to_torch() -> None:
    A, B, s = factors_one_by_one(FP32, 8, 6, [4, 2])
    opcheck(torch.ops.plora_ext.lora_stack.default, [torch.empty(0, dtype=BF16, device=DEVICE), A, B, s])


# ---------------------------------------------------------------------- in place


def inside(y: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """A copy of y as a slice, `left` columns in, of a larger tensor of NaN; and that tensor."""
    wide = y.new_full((*y.shape[:-2], y.shape[-2] + 2, y.shape[-1] + left + 8), float("nan"))
    target = wide[..., 1:-1, left : left + y.shape[-1]]
    return target.copy_(y), wide


@both_paths
@families
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("n_in", "out", "left"), [(72, 136, 8), (136, 72, 3), (33, 13, 5)])
def test_in_place(family: str, dtype: torch.dtype, n_in: int, out: int, left: int) -> None:
    for options, M in itertools.product(("", "ranks bias_A bias_B relu"), (200, 600)):
        args, kwargs, y0 = problem(family, M, n_in, out, dtype=dtype, options=options, grad=False, ids="tiles")

        def added(y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            target, wide = inside(y, left)
            assert getattr(ops, family + "_")(target, *args, **kwargs) is target
            assert wide.isnan().sum() == wide.numel() - y.numel()
            return target

        def twin(y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return getattr(reference, family + "_")(y.clone(), *args, **kwargs)

        check(added, twin, [y0, *args], kwargs)


@both_paths
@families
def test_in_place_on_contiguous_samples(family: str) -> None:
    args, kwargs, y0 = problem(family, (4, 197), 768, 768, options="", grad=False)

    def added(y: Tensor, *args: Any) -> Tensor:
        return getattr(ops, family + "_")(y.clone(), *args)

    def twin(y: Tensor, *args: Any) -> Tensor:
        return getattr(reference, family + "_")(y.clone(), *args)

    check(added, twin, [y0, *args], kwargs)


@both_paths
@pytest.mark.parametrize("options", ["", "base bias_A bias_B relu ranks", "weight bias"])
@pytest.mark.parametrize(
    ("family", "ids", "T", "r"),
    [
        ("lora_indexed", "segments", 10, 16),
        ("lora_indexed", "tiles", 100, 16),
        ("lora_indexed", "random", 16, 128),  # beside a weight, too, where it is cheaper than in its product
        ("lora_indexed", "none", 3, 24),
        ("lora_sum", "", 1, 16),
        ("lora_sum", "", 3, 40),
    ],
)
def test_added_to_many_rows(family: str, ids: str, T: int, r: int, options: str) -> None:
    """Enough bytes for Hopper's two kernels; neither width is a whole number of tiles."""
    args, kwargs, y0 = problem(family, 4001, 776, 784, r, T, options=options, ids=ids)
    verify(family, args, kwargs, y0)
    added = {k: v for k, v in kwargs.items() if k not in ("base", "weight", "bias")}

    def ours(y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target, wide = inside(y, 8)
        getattr(ops, family + "_")(target, *args, **kwargs)
        assert wide.isnan().sum() == wide.numel() - y.numel()
        return target

    def twin(y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(reference, family + "_")(y.clone(), *args, **kwargs)

    with torch.no_grad():
        check(ours, twin, [y0, *args], added)
        assert torch.equal(ours(y0, *args, **added), ours(y0, *args, **added))


# ---------------------------------------------------------------------- tiles in thirds, strips and pairs


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("options", ["weight", "weight bias base bias_A bias_B relu ranks"])
@pytest.mark.parametrize(
    ("family", "rows", "n_in", "out", "r", "T"),
    [
        ("lora_indexed", (5, 127), 72, 384, 16, 3),  # samples that a tile meets two of
        ("lora_indexed", (13, 197), 768, 768, 8, 10),
        ("lora_indexed", (64, 197), 768, 768, 16, 10),  # three tiles a block
        ("lora_indexed", (9, 600), 64, 712, 13, 4),  # a ragged last column
        ("lora_indexed", (21, 64), 200, 2304, 16, 30),
        ("lora_indexed", (3000,), 136, 768, 16, 2),  # every row one of two
        ("lora_sum", (2500,), 136, 768, 16, 2),
        ("lora_sum", (12_608,), 768, 384, 9, 2),
        ("lora_sum", (1300,), 328, 1096, 32, 1),  # two slots of one adapter
        ("lora_sum", (2500,), 768, 768, 24, 1),
        # Thirds: alone, after whole tiles, of ranks that are given, of a deep product, beyond the last column.
        ("lora_sum", (700,), 136, 712, 16, 1),
        ("lora_sum", (4352,), 64, 768, 16, 1),
        ("lora_sum", (4500,), 768, 712, 64, 1),
        ("lora_sum", (300,), 3072, 136, 8, 1),
        ("lora_indexed", (23, 197), 72, 768, 16, 1),
        ("lora_indexed", (40, 110), 200, 776, 24, 2),
        # Strips: after whole tiles, either way; beside thirds; alone; of given ranks; of pairs, which have none.
        ("lora_sum", (12_608,), 200, 1024, 16, 1),
        ("lora_sum", (4500,), 1024, 256, 16, 1),
        ("lora_indexed", (5, 197), 1024, 832, 16, 1),
        ("lora_sum", (20_000,), 24, 64, 16, 1),
        ("lora_indexed", (3000,), 448, 1000, 16, 5),
        ("lora_indexed", (64, 197), 832, 1216, 16, 10),
    ],
)
def test_pairs_thirds_and_strips_of_tiles(
    family: str, rows: tuple[int, ...], n_in: int, out: int, r: int, T: int, options: str, dtype: torch.dtype
) -> None:
    args, kwargs, cotangent = problem(family, rows, n_in, out, r, T, options=options, dtype=dtype)
    if family == "lora_indexed" and len(rows) > 1:
        args[1] = torch.randint(-1, T, rows[:1], device=DEVICE)
    if dtype == FP16:
        cotangent = cotangent / 64  # sums of many rows stay within its range
    verify(family, args, kwargs, cotangent)
    with torch.no_grad():
        first = getattr(ops, family)(*args, **kwargs)
        for _ in range(10):
            assert torch.equal(getattr(ops, family)(*args, **kwargs), first)


def test_pairs_of_tiles_in_a_graph() -> None:
    args, kwargs, _ = problem("lora_indexed", (64, 197), 768, 768, T=10, options="weight bias bias_B", grad=False)
    args[1] = torch.randint(-1, 10, (64,), device=DEVICE)
    ops.lora_indexed(*args, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.lora_indexed(*args, **kwargs)
    for _ in range(3):
        for t in (*args, *kwargs.values()):
            t.copy_(t.roll(1, 0))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, ops.lora_indexed(*args, **kwargs))


# ---------------------------------------------------------------------- all outputs, with the frozen layer


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("options", ["weight", "weight bias base bias_A bias_B relu ranks"])
@pytest.mark.parametrize(
    ("M", "n_in", "out", "r", "T"),
    [
        (11_333, 8, 8, 1, 1),
        (11_333, 72, 136, 16, 3),
        (11_333, 136, 200, 24, 2),
        (11_264, 64, 192, 64, 3),
        (2_817, 768, 776, 8, 10),
        (11_333, 16, 8, 8, 100),
        (1_500, 24, 1_544, 17, 20),
        (25_000, 40, 520, 16, 2),  # more tiles than two rounds of them
    ],
)
def test_all_outputs(M: int, n_in: int, out: int, r: int, T: int, options: str, dtype: torch.dtype) -> None:
    args, kwargs, cotangent = problem("lora_all", M, n_in, out, r, T, options=options, dtype=dtype)
    if dtype == FP16:
        cotangent = cotangent / 64  # sums of 25,000 rows stay within its range
    verify("lora_all", args, kwargs, cotangent)
    with torch.no_grad():
        y, target = ops.lora_all(*args, **kwargs), torch.full((T, M, out), torch.nan, device=DEVICE, dtype=dtype)
        assert ops.lora_all(*args, **kwargs, out=target) is target and torch.equal(target, y)


def test_all_outputs_in_a_graph() -> None:
    args, kwargs, _ = problem("lora_all", 11_333, 72, 136, T=3, options="weight bias base bias_B", grad=False)
    target = torch.empty(3, 11_333, 136, device=DEVICE, dtype=BF16)
    ops.lora_all(*args, **kwargs, out=target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.lora_all(*args, **kwargs, out=target)
    for _ in range(3):
        for t in (*args, *kwargs.values()):
            t.copy_(t.roll(1, 0))
        target.fill_(torch.nan)
        graph.replay()
        assert torch.equal(target, ops.lora_all(*args, **kwargs))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_keeps_what_is_not_finite(value: float) -> None:
    """Also from those that follow it in the same registers."""
    args, kwargs, _ = problem("lora_all", 11_333, 72, 136, T=3, grad=False)
    B, expected = args[-2], ops.lora_all(*args, **kwargs)
    B[1, 5] = value
    y = ops.lora_all(*args, **kwargs)
    assert not y[1, :, 5].isfinite().any()
    y[1, :, 5] = expected[1, :, 5]
    assert torch.equal(y, expected)


# ---------------------------------------------------------------------- what is rare


def test_tiles_keep_their_bias() -> None:
    """Tiles of one step, many of them a block: no column tile gets the bias of another."""
    args, kwargs, _ = problem("lora_indexed", 24_576, 64, 1280, ids="none", grad=False)
    expected = F.linear(args[0], kwargs["weight"], kwargs["bias"])
    first = ops.lora_indexed(*args, **kwargs)
    torch.testing.assert_close(first, expected, rtol=2e-2, atol=2e-2)
    for _ in range(20):
        assert torch.equal(ops.lora_indexed(*args, **kwargs), first)


@both_paths
@families
@pytest.mark.parametrize("M", [1, 127, 128, 200, 2000])
def test_an_adapter_that_is_not_a_number_shows(family: str, M: int) -> None:
    args, kwargs, dy = problem(family, M, 768, 768, T=3, options="weight bias relu", ids="one")
    A, B = args[-3:-1]
    with torch.no_grad():
        A[-1, 0] = torch.nan
    y = getattr(ops, family)(*args, **kwargs)
    own = y[-1] if family == "lora_all" else y
    assert own.isnan().all()
    if family == "lora_all":
        assert y[:-1].isfinite().all()
    (dB,) = torch.autograd.grad(y, B, dy)
    assert dB[-1, :, 0].isnan().all() and (family == "lora_sum" or dB[:-1].isfinite().all())


@both_paths
@pytest.mark.parametrize("M", [1, 197, 1024, 8192])
@pytest.mark.parametrize("n", [72, 768])
def test_y_may_be_x(M: int, n: int) -> None:
    (x, A, B, s), _, _ = problem("lora_sum", M, n, n, T=2, options="", grad=False)
    expected = x.double() + reference.lora_sum(x.double(), A.double(), B.double(), s.double())
    y = x.clone()
    ops.lora_sum_(y, y, A, B, s)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    buffer = torch.cat([x, x[:1]])
    before = buffer.clone()
    ops.lora_sum_(buffer[1:], buffer[:-1], A, B, s)
    apart = before[1:].clone()
    ops.lora_sum_(apart, before[:-1], A, B, s)
    assert torch.equal(buffer[1:], apart)


@both_paths
@pytest.mark.parametrize("family", ["lora_indexed", "lora_all"])
@pytest.mark.parametrize("ids", ["one", "segments", "random"])
@pytest.mark.parametrize(("M", "n"), [(5, 72), (200, 768), (1400, 768), (1400, 33)])
@pytest.mark.parametrize(("scale", "h", "b", "dy"), [(64.0, 1500, 1e-3, 3e-3), (2.0**-14, 1e-2, 1e3, 1e-3)])
def test_scales_beyond_float16(
    family: str, ids: str, M: int, n: int, scale: float, h: float, b: float, dy: float
) -> None:
    """s h and s g are beyond the largest float16, or among those with few digits; y and the gradients are not."""
    for options in ("weight bias", "base", ""):
        args, kwargs, cotangent = problem(family, M, n, n, T=3, options=options, ids=ids, dtype=FP16)
        *_, A, B, s = args
        size = scale * h * b * 4
        with torch.no_grad():
            A *= h
            B *= b / B.std()
            s.copy_(torch.tensor([1.0, -0.75, 1.25]) * scale)
            for t in kwargs.values():
                t *= min(size, 1.0)
            cotangent = torch.randn_like(cotangent) * dy
        s.requires_grad_(False)
        verify(family, args, kwargs, cotangent)


@pytest.mark.parametrize("limits", [{"PLORA_CUDA_PATH": "mma", "PLORA_SMEM_LIMIT": "101376"}, {"PLORA_SM_COUNT": "77"}])
def test_smaller_gpus(limits: dict[str, str]) -> None:
    """The tests whose sizes and counts of ranks reach a limit, with the shared memory or multiprocessors of others."""
    chosen = "test_rows or test_ranks or test_adapters or test_ids or dense_sum or test_same_bits or test_pairs"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, __file__]
    root = ["--rootdir", str(Path(__file__).parent), "-c", str(Path(__file__).parent.parent / "pyproject.toml")]
    done = subprocess.run(command + root, env={**os.environ, **limits}, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize("T", [1025, 1200])
@pytest.mark.parametrize(("family", "options"), [("lora_indexed", "weight"), ("lora_sum", "relu")])
def test_thousands_of_adapters_of_which_one_trains(family: str, options: str, T: int) -> None:
    args, kwargs, dy = problem(family, 300, 64, 64, r=4, T=T, options=options, ids="one")
    y = getattr(ops, family)(*args, **kwargs, trainable=[T - 1])
    dA, dB = torch.autograd.grad(y, args[-3:-1], dy)
    exact = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args]
    of = {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    wanted = torch.autograd.grad(getattr(reference, family)(*exact, **of), exact[-3:-1], dy.double())
    for got, right in zip((dA, dB), wanted, strict=True):
        assert (got[-1].double() - right[-1]).norm() <= 2e-2 * right[-1].norm()
        assert not got[:-1].any()


@pytest.mark.slow
def test_more_rows_than_can_be_counted() -> None:
    x = torch.empty(2**31, 1, dtype=BF16, device=DEVICE)
    A, B = torch.zeros(1, 8, 1, dtype=BF16, device=DEVICE), torch.zeros(1, 1, 8, dtype=BF16, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"lora_sum: at most 2,147,483,390 rows of x on CUDA, got 2147483648"):
        ops.lora_sum(x, A, B)


@pytest.mark.slow
def test_more_elements_than_can_be_counted() -> None:
    """Of y, 2.3e9 of them."""
    M = 3_000_000
    args, kwargs, _ = problem("lora_indexed", 64, 64, 768, T=2, grad=False)
    x, ids = args[0].repeat(M // 64, 1), args[1].repeat(M // 64)
    y = ops.lora_indexed(x, ids, *args[2:], **kwargs)
    few = ops.lora_indexed(x[-6400:], ids[-6400:], *args[2:], **kwargs)
    torch.testing.assert_close(y[-6400:], few, rtol=2e-2, atol=2e-2)


def test_two_threads_are_the_first_to_call() -> None:
    script = """
import threading, torch
from plora_ext import ops
def call(results, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    def randn(*shape): return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)
    with torch.cuda.stream(torch.cuda.Stream()):
        x, A, B, W = randn(4096, 768), randn(2, 16, 768), randn(2, 768, 16), randn(768, 768)
        results[seed] = [ops.lora_sum(x, A, B, weight=W) for _ in range(10)]
        torch.cuda.current_stream().synchronize()
together, alone = {}, {}
threads = [threading.Thread(target=call, args=(together, seed)) for seed in (0, 1)]
for thread in threads: thread.start()
for thread in threads: thread.join()
for seed in (0, 1): call(alone, seed)
assert all(torch.equal(a, b) for seed in (0, 1) for a, b in zip(together[seed], alone[seed]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- corrupted ids


@both_paths
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("options", ["weight bias base", "bias_A bias_B relu"])
@pytest.mark.parametrize(("n_in", "out", "r"), [(72, 136, 16), (33, 13, 5)])
@pytest.mark.parametrize("M", [200, 600])
def test_corrupted_ids_count_as_none(M: int, dtype: torch.dtype, options: str, n_in: int, out: int, r: int) -> None:
    """NaN lies before and behind everything that is read: a read or write out of bounds shows."""
    T = 5
    args, kwargs, cotangent = problem("lora_indexed", M, n_in, out, r, T, dtype=dtype, options=options, grad=False)

    def guarded(v: Any) -> Any:
        if not isinstance(v, Tensor) or not v.is_floating_point():
            return v
        large = v.new_full((v.shape[0] + 2, *v.shape[1:]), float("nan"))
        return large[1:-1].copy_(v).requires_grad_()

    args, kwargs = [guarded(a) for a in args], {k: guarded(v) for k, v in kwargs.items()}
    bad = torch.tensor([10**12, -7, T, T + 5, 2**31, 2**32, 2**32 + 1, -(2**63), 2**63 - 1], device=DEVICE)
    where = torch.rand(M, device=DEVICE) < 0.3
    where[:128] = True  # a whole tile of them
    clean, corrupted = args[1].clone(), args[1].clone()
    clean[where] = -1
    corrupted[where] = bad[torch.arange(M, device=DEVICE) % len(bad)][where]

    args[1] = clean
    verify("lora_indexed", args, kwargs, cotangent)
    expected = bits("lora_indexed", args, kwargs, cotangent)
    args[1] = corrupted
    assert same(bits("lora_indexed", args, kwargs, cotangent), expected)

    low_rank = {k: v for k, v in kwargs.items() if k not in ("base", "weight", "bias")}
    results = []
    with torch.no_grad():
        for args[1] in (clean, corrupted):
            target, wide = inside(cotangent, 8)
            ops.lora_indexed_(target, *args, **low_rank)
            assert wide.isnan().sum() == wide.numel() - target.numel()
            results.append(target)
    assert torch.equal(*results)


# ---------------------------------------------------------------------- bits, streams, graphs


def moderate(
    family: str, dtype: torch.dtype = BF16, M: int = 1027, **keywords: Any
) -> tuple[list[Any], dict[str, Any], Tensor]:
    """The plan takes the sum through the merged weight."""
    return problem(family, M, 768, 768, 24, 10, dtype=dtype, **keywords)


@both_paths
@families
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_same_bits_from_run_to_run_and_on_any_stream(family: str, dtype: torch.dtype) -> None:
    arguments = moderate(family, dtype)
    expected = bits(family, *arguments)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = bits(family, *arguments)
        torch.cuda.synchronize()
        assert same(again, expected)


@both_paths
@families
def test_kernels_follow_the_current_stream(family: str) -> None:
    """x arrives late on a stream of its own: a kernel on any other would meet NaN."""
    args, kwargs, cotangent = moderate(family)
    expected, x, stream = bits(family, args, kwargs, cotangent), args[0].detach(), torch.cuda.Stream()
    late = torch.full_like(x, float("nan"))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        bits(family, args, kwargs, cotangent)  # for memory that the next run can take without waiting
        torch.cuda._sleep(50_000_000)
        args[0] = late.copy_(x).requires_grad_()
        ours = bits(family, args, kwargs, cotangent)
    torch.cuda.synchronize()
    assert same(ours, expected)


@both_paths
@families
@pytest.mark.parametrize("form", ["forward", "forward and backward", "in place"])
@pytest.mark.parametrize("M", [1027, 64])
def test_graph(family: str, form: str, M: int) -> None:
    """Captured once, then replayed on other inputs; of few rows the frozen product then runs beside the first half."""
    args, kwargs, cotangent = moderate(family, M=M, grad=form == "forward and backward")

    def step() -> list[Tensor]:
        if form == "in place":
            return [getattr(ops, family + "_")(cotangent.clone(), *args)]
        return bits(family, args, kwargs, cotangent)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            for t in (*args, *kwargs.values(), cotangent):
                t.copy_(t.roll(1, 0))
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, step())


@pytest.mark.parametrize("M", [1500, 200])
@pytest.mark.parametrize("form", ["lora_indexed base", "lora_indexed weight", "lora_sum weight"])
def test_a_fresh_process_captures(form: str, M: int) -> None:
    """Fifty adapters, two kernels that overlap, or run side by side; nothing was called before."""
    script = f"""
import torch
from plora_ext import ops
family, options = {form!r}.split()
torch.manual_seed(0)
like = dict(device="cuda", dtype=torch.bfloat16)
x, A, B = torch.randn({M}, 768, **like), torch.randn(50, 16, 768, **like) / 28, torch.randn(50, 768, 16, **like) / 4
ids = torch.arange({M}, device="cuda") * 50 // {M}
given = {{options: torch.randn({M} if options == "base" else 768, 768, **like)}}
args = (x, ids, A, B) if family == "lora_indexed" else (x, A, B)
x @ A[0].T  # torch's own product cannot be the first in a capture
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = getattr(ops, family)(*args, **given)
for _ in range(2):
    x.copy_(x.roll(1, 0))
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, getattr(ops, family)(*args, **given))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


@both_paths
@families
def test_no_host_synchronisation(family: str) -> None:
    args, kwargs, cotangent = moderate(family)
    kwargs["ranks"] = torch.full((10,), 9, device=DEVICE)
    arguments = args, {**kwargs, "trainable": [3, 9]}, cotangent
    expected = bits(family, *arguments)  # libraries load on their first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = bits(family, *arguments)
        with torch.no_grad():
            getattr(ops, family + "_")(cotangent.clone(), *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(again, expected)


@both_paths
@families
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device(family: str) -> None:
    assert torch.cuda.current_device() == 0
    verify(family, *problem(family, 1027, 768, 768, device="cuda:1"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_stack_on_a_gpu_that_is_not_the_current_one() -> None:
    A, B, s = factors_one_by_one(FP32, 40, 24, [4, 8])
    expected = torch.ops.plora_ext.lora_stack(torch.empty(0, dtype=BF16, device=DEVICE), A, B, s)
    of = [[t.to("cuda:1") for t in own] for own in (A, B)]
    made = torch.ops.plora_ext.lora_stack(torch.empty(0, dtype=BF16, device="cuda:1"), *of, s)
    assert same([t.cpu() for t in made], [t.cpu() for t in expected])


# ---------------------------------------------------------------------- torch's own machinery


@families
def test_compile_fullgraph(family: str) -> None:
    torch._dynamo.reset()
    args, kwargs, cotangent = problem(family, (4, 197), 192, 576)
    check(torch.compile(getattr(ops, family), fullgraph=True), getattr(reference, family), args, kwargs, cotangent)


@families
@pytest.mark.parametrize(
    ("M", "r", "options", "trainable"),
    [(520, 48, "weight bias base", None), (40, 6, "bias_A bias_B relu ranks base", [1])],
)
def test_opcheck(family: str, M: int, r: int, options: str, trainable: list[int] | None) -> None:
    names = ["x", *(["ids"] if family == "lora_indexed" else []), "lora_A", "lora_B", "scaling"]
    args, kwargs, cotangent = problem(family, M, r=r, options=options)
    relu = kwargs.pop("activation", "none") == "relu"
    values = {**dict(zip(names, args, strict=True)), **kwargs, "relu": relu, "trainable": trainable, "keep": True}

    def arguments(op: Any, **more: Any) -> list[Any]:
        return [{**values, **more}.get(a.name) for a in op._schema.arguments]

    forward, in_place, backward = (getattr(torch.ops.plora_ext, family + f).default for f in ("", "_", "_backward"))
    opcheck(forward, arguments(forward))
    values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}
    opcheck(in_place, arguments(in_place, y=cotangent))
    opcheck(backward, arguments(backward, grad=cotangent, needs=0b001111))
    kept = forward(*arguments(forward))[1]
    opcheck(backward, arguments(backward, grad=cotangent, needs=0b000110, kept=kept))


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    args, _, _ = problem("lora_sum", dtype=torch.float64, grad=False, options="")
    op = torch.ops.plora_ext.lora_sum.default
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16 on CUDA, got Double; the nearest"):
        op(*args, *[None] * 6, False, None, None, False)
    monkeypatch.setenv("PLORA_CUDA_PATH", "hopper")
    with pytest.raises((RuntimeError, ValueError), match="PLORA_CUDA_PATH must be auto or mma, got 'hopper'"):
        ops.lora_sum(*problem("lora_sum", grad=False, options="")[0])


# ---------------------------------------------------------------------- modules


class PlainLoRA(nn.Module):
    """What a `MultiLoRALinear` computes, written out in plain torch: every adapter on its own, on its rows of y."""

    def __init__(self, layer: MultiLoRALinear) -> None:
        super().__init__()
        self.layer = layer
        self.coefficients: Tensor | None = None
        self.ids: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        y = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
        out = y.shape[-1]
        names = layer.active_adapters if self.ids is None else layer.adapter_names
        for i, name in enumerate(names):
            weight = x.new_ones(()) if self.coefficients is None else self.coefficients[i].to(x.dtype)
            if self.ids is not None:
                weight = (self.ids == i).to(x.dtype)[:, None, None]
            for (A, B), (start, stop) in zip(layer.pairs(name), (layer.slices or {"": (0, out)}).values(), strict=True):
                delta = layer.lora_alpha[name] / layer.r[name] * F.linear(F.linear(x, A), B)
                y = y + F.pad(weight * delta, (start, out - stop))
        return y


@pytest.fixture(scope="module")
def adapted_vit() -> Adapters:
    """Three adapters of different ranks on q and v, proj, fc1 and fc2."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0)
    adapters = inject(model.to(DEVICE), ["q", "v", "proj", "fc1", "fc2"], lora_alpha=8)
    for i, r in enumerate((16, 4, 8)):
        adapters.add_adapter(f"t{i}", r=r)
    for p in adapters.parameters():
        nn.init.normal_(p, std=0.05)
    return adapters


@both_paths
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("form", ["one", "newest of three", "all three", "coefficients", "batch"])
def test_a_vit_and_its_gradients(adapted_vit: Adapters, form: str, dtype: torch.dtype) -> None:
    adapters = copy.deepcopy(adapted_vit)
    names, trained = adapters.names, ["t2"] if form in ("one", "newest of three", "coefficients") else adapters.names
    theta = torch.tensor([0.5, 1.25, -0.75], device=DEVICE, requires_grad=True) if form == "coefficients" else None
    ids = torch.randint(-1, 3, (64,)).to(DEVICE) if form == "batch" else None
    adapters.model.to(dtype)
    adapters.set_adapter("t2" if form == "one" else names, theta)
    adapters.train_adapter(trained)

    plain = copy.deepcopy(adapters.model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, MultiLoRALinear):
            plain.set_submodule(name, PlainLoRA(layer))
    asking = [name for name, p in plain.named_parameters() if p.requires_grad]
    parameters = [p for p in adapters.model.parameters() if p.requires_grad]
    assert len(asking) == len(parameters) == 10 * 2 * len(trained)

    def ours(x: Tensor, *_: Tensor) -> Tensor:
        with adapters.batch(ids) if ids is not None else nullcontext():
            return adapters.model(x)

    def twin(x: Tensor, *values: Tensor) -> Tensor:
        for module in plain.modules():
            if isinstance(module, PlainLoRA):
                module.coefficients, module.ids = values[-1] if len(values) > len(asking) else theta, ids
        own = dict(plain.named_parameters()) | dict(plain.named_buffers())  # a state_dict holds scales as well
        state = {name: t.to(x.dtype) for name, t in own.items()}
        return torch.func.functional_call(plain, {**state, **dict(zip(asking, values))}, (x,))

    x = torch.randn(64, 3, 32, 32, device=DEVICE).to(dtype)
    cotangent = torch.randn(64, 192, device=DEVICE).to(dtype)
    few = [theta] if theta is not None and dtype == FP32 else []  # three numbers: too few for the rule in 16 bits
    check(ours, twin, [x, *parameters, *few], {}, cotangent)
