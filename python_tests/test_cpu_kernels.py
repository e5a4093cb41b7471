"""What only the CPU kernels have: makers of the frozen product, instruction sets, bits for any number of threads."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import check, run
from torch import Tensor

from plora_ext import libraries, ops, reference

FAMILIES = ("lora_indexed", "lora_sum", "lora_all")
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
    pytest.mark.skipif(libraries.backend() != "native", reason="about the compiled operators"),
]


def problem(
    family: str, M: int, n_in: int, out: int, T: int = 3, r: int = 5, grad: bool = True
) -> tuple[list[Any], dict[str, Any], Tensor]:
    """Arguments with the frozen layer, keyword arguments and a cotangent; ids unsorted, some without an adapter."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_(grad)

    args: list[Any] = [draw(M, n_in), draw(T, r, n_in), draw(T, out, r), draw(T)]
    if family == "lora_indexed":
        args.insert(1, torch.randint(-1, T, (M,)))
    y_shape = (T, M, out) if family == "lora_all" else (M, out)
    return args, {"weight": draw(out, n_in), "bias": draw(out)}, torch.randn(y_shape)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("maker", ["own", "torch"])
@pytest.mark.parametrize("sizes", [(700, 70, 50), (150, 512, 33), (20, 40, 96)], ids=str)
def test_frozen_product(family: str, maker: str, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks of backward, rows that many bytes of a power of two apart, and sums that are merged or not."""
    monkeypatch.setenv("PLORA_CPU_BASE", maker)
    args, kwargs, cotangent = problem(family, *sizes)
    check(getattr(ops, family), getattr(reference, family), args, kwargs, cotangent)
    kwargs["base"] = torch.randn(sizes[0], sizes[2])
    kwargs["trainable"] = [1]
    check(getattr(ops, family), getattr(reference, family), args, kwargs, cotangent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("given", ["", "base", "weight", "base weight"])
def test_all_into_given_memory(dtype: torch.dtype, given: str) -> None:
    x, lora_A, lora_B = (
        torch.randn(2, 9, 13, dtype=dtype),
        torch.randn(3, 4, 13).to(dtype),
        torch.randn(3, 7, 4).to(dtype),
    )
    kwargs = {"base": torch.randn(2, 9, 7).to(dtype), "weight": torch.randn(7, 13).to(dtype)}
    kwargs = {name: kwargs[name] for name in given.split()}
    expected = ops.lora_all(x, lora_A, lora_B, **kwargs)
    wide = torch.full((3, 2, 9, 9), torch.nan, dtype=dtype)
    for out in (torch.full_like(expected, torch.nan), wide[..., 1:8]):
        assert ops.lora_all(x, lora_A, lora_B, **kwargs, out=out) is out
        assert torch.equal(out, expected)
    assert wide[..., 0].isnan().all() and wide[..., 8].isnan().all()
    with pytest.raises(ValueError, match="lora_all: out must have the shape"):
        ops.lora_all(x, lora_A, lora_B, **kwargs, out=expected[:2])
    with pytest.raises(ValueError, match="out= records no gradients"):
        ops.lora_all(x.requires_grad_(), lora_A, lora_B, **kwargs, out=torch.empty_like(expected))


def test_large_outputs_past_the_caches() -> None:
    """32 MB and more are written with streaming stores."""
    check(ops.lora_all, reference.lora_all, [torch.randn(300, 40), torch.randn(29, 4, 40), torch.randn(29, 1008, 4)])


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_without_ranks(family: str) -> None:
    """They share their place among the packed ranks with the adapter that follows."""
    args, _, cotangent = problem(family, 40, 6, 7, T=5, r=2)
    kwargs = {"ranks": torch.tensor([0, 2, 0, 0, 1])}
    check(getattr(ops, family), getattr(reference, family), args, kwargs, cotangent)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_without_width(family: str) -> None:
    args, kwargs, cotangent = problem(family, 3, 0, 0)
    y = getattr(ops, family)(*args, **kwargs)
    assert y.shape == cotangent.shape
    y.backward(cotangent)
    assert args[0].grad.shape == (3, 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (15, 33, 31), (17, 70, 50), (131, 1024, 130)], ids=str)
@pytest.mark.parametrize("r", [1, 16, 33])
def test_bfloat16(family: str, sizes: tuple[int, int, int], r: int) -> None:
    """Sizes around those of matrix registers, with everything that may be given; torch's products beside stay right."""
    args, kwargs, cotangent = problem(family, *sizes, r=r)
    T, out = 3, sizes[2]
    kwargs |= {"bias_A": torch.randn(T, r).requires_grad_(), "bias_B": torch.randn(T, out).requires_grad_()}
    scaling = torch.rand(T).requires_grad_()
    args = [a.detach().bfloat16().requires_grad_() if a.is_floating_point() else a for a in args[:-1]] + [scaling]
    kwargs = {name: t.detach().bfloat16().requires_grad_() for name, t in kwargs.items()}
    left, right = torch.randn(40, 96).bfloat16(), torch.randn(96, 40).bfloat16()
    expected = left @ right
    for given in ([], ["bias_A", "bias_B"], ["weight", "bias"]):
        some: dict[str, Any] = {name: kwargs[name] for name in given}
        base, ranks = torch.randn(sizes[0], out).bfloat16(), torch.tensor([r, 0, (r + 1) // 2])
        for more in ({}, {"base": base, "ranks": ranks, "activation": "relu"}):
            check(getattr(ops, family), getattr(reference, family), args, some | more, cotangent.bfloat16())
        assert torch.equal(left @ right, expected)


def test_unknown_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_CPU_BASE", "mkl")
    args, kwargs, _ = problem("lora_sum", 9, 8, 8, grad=False)
    with pytest.raises(RuntimeError, match="PLORA_CPU_BASE must be own or torch, got mkl"):
        ops.lora_sum(*args, **kwargs)


def same_bits(function: Callable[[], list[Tensor]]) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_bits_for_any_number_of_threads(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_CPU_BASE", "own")
    args, kwargs, cotangent = problem(family, 997, 72, 56)
    kwargs = {k: v.detach() for k, v in kwargs.items()}  # the gradient of a weight is torch's
    if dtype != torch.float32:  # their frozen product is torch's
        kwargs = {}
        args = [a.detach().to(dtype).requires_grad_() if a.is_floating_point() else a for a in args[:-1]]
        args.append(torch.rand(3).requires_grad_())
    same_bits(lambda: run(getattr(ops, family), args, kwargs, cotangent.to(dtype)))


def test_bits_of_the_others_for_any_number_of_threads() -> None:
    args, kwargs, _ = problem("lora_sum", 1, 72, 56, grad=False)
    prototypes, task_of_class = torch.randn(30, 4, 40), torch.randint(0, 4, (30,))
    features, labels = torch.randn(200, 70), torch.randint(-1, 9, (200,))
    old, new = torch.randn(300, 40), torch.randn(150, 40)

    def others() -> list[Tensor]:
        return [
            ops.lora_merge(kwargs["weight"], *args[1:]),
            *ops.class_sums(features, labels, 9),
            ops.complete_prototypes(prototypes, task_of_class),
            ops.reconstruct_prototypes(old, new, new),
            ops.subspace_logits(prototypes, prototypes, torch.ones(30, 4)),
        ]

    same_bits(others)


def in_processes(code: str, threads: Sequence[int], folder: Path) -> list[str]:
    """What `code` prints in a process of the default environment for each number of threads."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PLORA_", "OMP_"))}
    results = []
    for n in threads:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"OMP_NUM_THREADS": str(n)},
            cwd=folder,
            capture_output=True,
            check=True,
            text=True,
        )
        results.append(done.stdout)
    return results


@pytest.mark.skipif(libraries.backend() == "reference", reason="PLORA_BACKEND=reference")
def test_frozen_layers_repeat_from_process_to_process(tmp_path: Path) -> None:
    """At widths of ViTs; where the frozen product is the kernels', for any number of threads."""
    code = """
import hashlib, torch
import plora_ext._C as _C
from plora_ext import ops
digest = hashlib.sha256()
for M, n_in, out in ((512, 192, 576), (197, 384, 1152)):
    torch.manual_seed(0)
    x, W = torch.randn(M, n_in, requires_grad=True), torch.randn(out, n_in)
    A, B = torch.randn(2, 8, n_in, requires_grad=True), torch.randn(2, out, 8, requires_grad=True)
    for y in (ops.lora_sum(x, A, B, weight=W), ops.lora_indexed(x, torch.arange(M) % 2, A, B, weight=W)):
        for t in (y, *torch.autograd.grad(y, (x, A, B), torch.ones_like(y))):
            digest.update(t.detach().numpy().tobytes())
print(digest.hexdigest())
"""
    _C = pytest.importorskip("plora_ext._C")
    own = _C.cpu_makes_base(512, 192, 576) and _C.cpu_makes_base(197, 384, 1152)
    assert own == (_C.cpu_isa() != "default")
    assert len(set(in_processes(code, [1, 2, 3, 2] if own else [2, 2, 2], tmp_path))) == 1


def test_a_run_repeats_from_process_to_process(tmp_path: Path) -> None:
    """Four classes in two tasks with the embedded backbone: the same files, which checkpoints name by their content."""
    labels = torch.arange(32) % 4
    images = (torch.rand(32, 32, 32, 3) * 60 + 40 * labels[:, None, None, None]).to(torch.uint8)
    split = {"images": images.numpy(), "labels": labels.numpy()}
    arrays = {f"{name}_{part}": array for name in ("train", "test") for part, array in split.items()}
    np.savez(tmp_path / "toy.npz", **arrays)
    code = """
import tempfile, sys
from pathlib import Path
from plora_ext.cli import main
with tempfile.TemporaryDirectory() as out:
    options = "--method plora --data toy.npz --increment 2 --epochs 2 --device cpu --workers 0".split()
    assert main(["train", *options, "--out", out]) == 0
    names = sorted(path.name for path in Path(out, "checkpoint").rglob("*"))
print("files", len(names), *names)
"""
    first, second = (text.splitlines()[-1] for text in in_processes(code, [2, 2], tmp_path))
    assert first.startswith("files") and int(first.split()[1]) > 4
    assert first == second


# Several operators, in float32 and bfloat16, with enough rows for several threads: a digest of their results.
SEVERAL = """
import hashlib, os, torch
os.environ["PLORA_CPU_BASE"] = "own"
from plora_ext import ops

def several():
    g = torch.Generator().manual_seed(0)
    x, A, B, W = (torch.randn(n, generator=g) for n in ((700, 72), (2, 5, 72), (2, 56, 5), (56, 72)))
    p = torch.randn(12, 3, 20, generator=g)
    with torch.no_grad():
        results = [ops.lora_sum(x, A, B, weight=W), ops.lora_indexed(x, torch.arange(700) % 3 - 1, A, B, weight=W)]
        results += [ops.lora_all(*(t.bfloat16() for t in (x, A, B))).float()]
        results += ops.class_sums(x, torch.arange(700) % 9, 9)
        results += [ops.complete_prototypes(p, torch.arange(12) // 4), ops.lora_merge(W, A, B)]
    digest = hashlib.sha256()
    for t in results:
        digest.update(t.numpy().tobytes())
    return digest.hexdigest()
"""


def test_forked_data_workers(tmp_path: Path) -> None:
    """Workers that are forked after the operators ran here on several threads get the same bits, and end."""
    code = f"""
{SEVERAL}
from torch.utils.data import DataLoader, Dataset
class Digests(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return several()
torch.set_num_threads(2)
print(several(), *DataLoader(Digests(), None, num_workers=2, multiprocessing_context="fork", timeout=60))
"""
    digests = in_processes(code, [2], tmp_path)[0].split()
    assert len(digests) == 5 and len(set(digests)) == 1


def test_first_use_from_several_threads(tmp_path: Path) -> None:
    """Whatever is made at the first call is made once, and whole."""
    code = f"""
{SEVERAL}
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
barrier = Barrier(4)
with ThreadPoolExecutor(4) as pool:
    digests = list(pool.map(lambda _: (barrier.wait(), several())[1], range(4)))
print(several(), *digests)
"""
    digests = in_processes(code, [2], tmp_path)[0].split()
    assert len(digests) == 5 and len(set(digests)) == 1


@pytest.mark.parametrize("tau", [0.002, 0.02])
def test_small_temperatures(tau: float) -> None:
    """exp((cos - 1) / tau) may be far below what a float holds; its softmax is not."""
    grad = tau > 0.01  # which magnifies every rounding by 1 / tau
    old, new, values = (torch.randn(n, 20).requires_grad_(grad) for n in (7, 200, 200))
    kwargs = {"tau": tau}
    check(ops.reconstruct_prototypes, reference.reconstruct_prototypes, [old, new, values], kwargs, torch.randn(7, 20))
    args = [torch.randn(12, 3, 20).requires_grad_(grad), torch.arange(12) // 4]
    check(ops.complete_prototypes, reference.complete_prototypes, args, kwargs, torch.randn(12, 3, 20))


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_other_instruction_sets(isa: str, tmp_path: Path) -> None:
    """The same operators in a process that is held to fewer instructions: near this process's results."""
    code = """
import torch
from plora_ext import ops
torch.manual_seed(0)
x, A, B, W = torch.randn(130, 70), torch.randn(2, 5, 70), torch.randn(2, 33, 5), torch.randn(33, 70)
A.requires_grad_(), B.requires_grad_(), x.requires_grad_()
y = ops.lora_sum(x, A, B, weight=W)
y.backward(torch.ones_like(y))
p = torch.randn(12, 3, 20)
result = [y, x.grad, A.grad, B.grad, ops.complete_prototypes(p, torch.arange(12) // 4)]
x, A, B = (t.detach().bfloat16().requires_grad_() for t in (x, A, B))
y = ops.lora_indexed(x, torch.arange(130) % 3 - 1, A, B)
result += [y, *torch.autograd.grad(y, (x, A, B), torch.ones_like(y))]
"""
    here: dict[str, Any] = {}
    exec(code, here)
    script = code + "import sys; torch.save([t.detach() for t in result], sys.stdout.buffer)"
    environment = {**os.environ, "PLORA_CPU_ISA": isa}
    # not in a checkout, whose plora_ext folder would come before the installed one
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True)
    for a, b in zip(here["result"], torch.load(io.BytesIO(done.stdout), weights_only=True), strict=True):
        narrow = a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 if not narrow else 0.01 * float(b.abs().max()))
