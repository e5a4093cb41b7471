"""The CUDA kernels of the prototype operators at the sizes where their paths part: a grid for one GPU and one minute.

Everything runs in memory filled with NaN, against the float64 twin (`oracle.check`). test_ops_prototypes.py holds what
is so on every device. For compute-sanitizer: `pytest -k sanitize`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import check, opcheck, run
from torch import Tensor

from plora_ext import libraries, ops, reference

DEVICE = torch.device("cuda")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = ("class_sums", "reconstruct_prototypes", "complete_prototypes", "subspace_logits")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif("cuda" not in libraries.loaded, reason="no compiled CUDA operators"),
    pytest.mark.usefixtures("poisoned", "float32_is_float32"),
    pytest.mark.filterwarnings("ignore:.*(deterministic|Synchronization debug mode).*:UserWarning"),
]
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def float32_is_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def draw(*shape: int, dtype: torch.dtype = FP32, device: torch.device | str = DEVICE, grad: bool = True) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def off_by_one(t: Tensor) -> Tensor:
    """Contiguous, and no vector of it is aligned."""
    moved = t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t.detach())
    return moved.requires_grad_(t.requires_grad)


def every_other(t: Tensor) -> Tensor:
    strided = t.new_empty(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t.detach())
    return strided.requires_grad_(t.requires_grad)


def transposed(t: Tensor) -> Tensor:
    return t.detach().mT.contiguous().mT.requires_grad_(t.requires_grad)


# ---------------------------------------------------------------------- problems


def problem(
    name: str, dtype: torch.dtype = FP32, device: torch.device | str = DEVICE, grad: bool = True
) -> tuple[list[Any], dict[str, Any], Tensor]:
    """Arguments, keyword arguments and a cotangent of a middle size."""
    options: dict[str, Any] = {"dtype": dtype, "device": device, "grad": grad}
    cotangent: Any = {**options, "grad": False}
    if name == "class_sums":
        labels = torch.randint(-1, 70, (3000,), device=device)
        return [draw(3000, 768, **options), labels, 70], {}, draw(70, 768, **cotangent).to(FP32)
    if name == "reconstruct_prototypes":
        args: list[Any] = [draw(n, 768, **options) for n in (300, 140, 140)]
        return args, {"tau": 0.5, "mode": "shift"}, draw(300, 768, **cotangent)
    if name == "complete_prototypes":
        tasks = torch.randint(0, 6, (60,), device=device)
        return [draw(60, 6, 200, **options), tasks], {"tau": 0.5}, draw(60, 6, 200, **cotangent)
    weights = torch.rand(50, 8, device=device).requires_grad_(grad)
    args = [draw(70, 8, 200, **options), draw(50, 8, 200, **options), weights]
    return args, {}, draw(70, 50, **cotangent)


def ours(name: str) -> Callable[..., Tensor]:
    def function(*args: Any, **kwargs: Any) -> Tensor:
        result = getattr(ops, name)(*args, **kwargs)
        return result if isinstance(result, Tensor) else result[0]

    return function


def twin(name: str) -> Callable[..., Tensor]:
    def function(*args: Any, **kwargs: Any) -> Tensor:
        result = getattr(reference, name)(*args, **kwargs)
        return result if isinstance(result, Tensor) else result[0]

    return function


def verify(name: str, args: list[Any], kwargs: dict[str, Any] | None = None, cotangent: Tensor | None = None) -> None:
    check(ours(name), twin(name), args, kwargs, cotangent)


def bits(name: str, args: list[Any], kwargs: dict[str, Any], cotangent: Tensor | None) -> list[Tensor]:
    """The output and every gradient."""
    return run(ours(name), args, kwargs, cotangent)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_the_kernels_are_there() -> None:
    """Without them the operators would quietly run as their own twins."""
    assert all(libraries.has_kernel(name, "cuda") for name in (*NAMES, "class_sums_"))


@every
def test_sanitize(name: str) -> None:
    """One small run of each kernel, all paths of it that a small size has: for compute-sanitizer."""
    if name == "class_sums":
        for N, D, C in ((300, 33, 5), (520, 128, 400)):
            verify(name, [draw(N, D), torch.randint(-1, C, (N,), device=DEVICE), C])
    elif name == "reconstruct_prototypes":
        for Co, Cn, D, tau in ((17, 130, 36, 0.5), (5, 1100, 33, 0.02)):
            verify(name, [draw(Co, D), draw(Cn, D), draw(Cn, D)], {"tau": tau, "mode": "shift"})
    elif name == "complete_prototypes":
        for D, tau in ((36, 0.5), (33, 0.02)):
            verify(name, [draw(40, 4, D), torch.randint(0, 4, (40,), device=DEVICE)], {"tau": tau})
    else:
        for D in (36, 33):
            verify(name, [draw(33, 3, D), draw(20, 3, D), torch.rand(20, 3, device=DEVICE)])


# ---------------------------------------------------------------------- class_sums


def labels_of(kind: str, N: int, C: int) -> Tensor:
    if kind == "one class":
        return torch.full((N,), C - 1)
    if kind == "none":
        return torch.full((N,), -1)
    if kind == "sorted":
        return torch.arange(N) * C // max(N, 1)
    return torch.randint(-1, C, (N,))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize(
    ("N", "D", "C"),
    [(0, 8, 3), (1, 1, 1), (255, 7, 2), (257, 128, 400), (513, 132, 400), (2000, 768, 100), (70_000, 4, 3), (9, 0, 2)],
)
def test_class_sums_have_the_bits_of_the_cpu(dtype: torch.dtype, N: int, D: int, C: int) -> None:
    for kind in ("random", "one class", "none", "sorted"):
        features, labels = draw(N, D, dtype=dtype, grad=False), labels_of(kind, N, C)
        sums, counts = ops.class_sums(features, labels.cuda(), C)
        expected, numbers = ops.class_sums(features.cpu(), labels, C)
        assert torch.equal(sums.cpu(), expected) and torch.equal(counts.cpu(), numbers)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_class_sums_have_the_same_bits_however_they_are_batched(dtype: torch.dtype) -> None:
    features, labels = draw(50_000, 768, dtype=dtype, grad=False), torch.randint(0, 100, (50_000,), device=DEVICE)
    whole, counts = ops.class_sums(features, labels, 100)
    for size in (48, 1000, 33_333):
        sums, total = torch.zeros_like(whole), torch.zeros_like(counts)
        for rows, classes in zip(features.split(size), labels.split(size), strict=True):
            ops.class_sums(rows, classes, 100, sums=sums, counts=total)
        assert torch.equal(sums, whole) and torch.equal(total, counts)
    torch.testing.assert_close(counts.sum(), torch.tensor(50_000, device=DEVICE))


@pytest.mark.parametrize("layout", [off_by_one, every_other, transposed])
def test_class_sums_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    args, kwargs, cotangent = problem("class_sums")
    verify("class_sums", [layout(args[0]), *args[1:]], kwargs, cotangent)


# ---------------------------------------------------------------------- reconstruct_prototypes


def reconstruct(Co: int, Cn: int, D: int, Dv: int | None = None, dtype: torch.dtype = FP32, **options: Any) -> None:
    args = [draw(Co, D, dtype=dtype), draw(Cn, D, dtype=dtype), draw(Cn, Dv or D, dtype=dtype)]
    verify("reconstruct_prototypes", args, options, draw(Co, Dv or D, dtype=dtype, grad=False))


@pytest.mark.parametrize("Co", [0, 1, 15, 17, 32, 900, 3000, 8500])
def test_reconstruct_old_classes(Co: int) -> None:
    """Three tiles by the number of old classes; few of them are split over the new ones."""
    for mode in ("complement", "shift"):
        reconstruct(Co, 100, 64, tau=0.5, mode=mode)


@pytest.mark.parametrize("Cn", [1, 16, 31, 127, 128, 129, 257, 1023, 1025, 5000])
def test_reconstruct_new_classes(Cn: int) -> None:
    for Co in (20, 8500) if Cn < 2000 else (20,):
        reconstruct(Co, Cn, 36, 40, tau=0.3)


@pytest.mark.parametrize(
    ("D", "Dv"), [(1, 1), (7, 13), (8, 130), (33, 4), (130, 259), (768, 768), (770, 1300), (4100, 40)]
)
def test_reconstruct_widths(D: int, Dv: int) -> None:
    for Co in (40, 8500) if D < 300 else (40,):
        reconstruct(Co, 70, D, Dv)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("tau", [1.0, 0.05, 0.01])
def test_reconstruct_dtypes_and_temperatures(dtype: torch.dtype, tau: float) -> None:
    for Co, Cn in ((70, 150), (10, 1500)):
        for mode in ("complement", "shift"):
            reconstruct(Co, Cn, 96, dtype=dtype, tau=tau, mode=mode)


@pytest.mark.parametrize("layout", [off_by_one, every_other, transposed])
def test_reconstruct_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    args, kwargs, cotangent = problem("reconstruct_prototypes")
    verify("reconstruct_prototypes", [layout(a) for a in args], kwargs, layout(cotangent))
    verify("reconstruct_prototypes", args, kwargs, cotangent[:1].expand_as(cotangent))


def test_reconstruct_follows_the_precision_of_products() -> None:
    """Ten bits instead of 23 where torch's own products have no more; otherwise float32, also when compiled."""
    torch._dynamo.reset()
    args = [draw(n, 768, grad=False) for n in (900, 100, 100)]
    exact = reference.reconstruct_prototypes(*[a.double() for a in args], tau=0.05)
    compiled = torch.compile(ops.reconstruct_prototypes, fullgraph=True)

    def errors() -> list[float]:
        return [
            float((f(*args, tau=0.05) - exact).norm() / exact.norm()) for f in (ops.reconstruct_prototypes, compiled)
        ]

    assert max(errors()) < 3e-6
    torch.backends.cuda.matmul.allow_tf32 = True
    assert min(errors()) > 1e-5 and max(errors()) < 3e-3
    torch.backends.cuda.matmul.allow_tf32 = False
    assert max(errors()) < 3e-6


@pytest.mark.parametrize(
    ("Cn", "D", "Dv"), [(1, 4, 4), (31, 36, 260), (256, 64, 256), (300, 768, 768), (1030, 100, 40)]
)
def test_reconstruct_many_old_classes_in_tf32(Cn: int, D: int, Dv: int) -> None:
    """Hopper has a kernel of its own for these; a NaN of the values stays in its column, one of a row in its row."""
    torch.backends.cuda.matmul.allow_tf32 = True
    old, new, values = draw(8500, D, grad=False), draw(Cn, D, grad=False), draw(Cn, Dv, grad=False)
    old[5] = 0
    for mode in ("complement", "shift") if Dv == D else ("complement",):
        expected = reference.reconstruct_prototypes(old.double(), new.double(), values.double(), tau=0.1, mode=mode)
        result = ops.reconstruct_prototypes(old, new, values, tau=0.1, mode=mode)
        assert (result - expected).norm() < 3e-3 * expected.norm()
    old[7, 1] = values[-1, 2] = float("nan")
    result = ops.reconstruct_prototypes(old, new, values, tau=0.1)
    assert result.isnan().sum() == len(old) + Dv - 1


@pytest.mark.parametrize(
    ("Co", "Cn", "D", "Dv"),
    [(8500, 64, 4, 4), (8449, 129, 36, 260), (17_001, 257, 64, 64), (20_000, 300, 768, 768), (8600, 1030, 100, 40)],
)
def test_reconstruct_many_old_classes_in_float32(Co: int, Cn: int, D: int, Dv: int) -> None:
    """Hopper has a kernel of its own for these, too: as exact as torch's float32 at any temperature."""
    old, new, values = draw(Co, D, grad=False), draw(Cn, D, grad=False), draw(Cn, Dv, grad=False)
    old[5] = 0
    for tau, mode in ((1.0, "complement"), (0.1, "shift"), (0.03, "complement")):
        if mode == "complement" or Dv == D:
            verify("reconstruct_prototypes", [old, new, values], {"tau": tau, "mode": mode})
    first = ops.reconstruct_prototypes(old, new, values, tau=0.1)
    for _ in range(3):
        assert torch.equal(ops.reconstruct_prototypes(old, new, values, tau=0.1), first)
    old[7, 1] = values[-1, 2] = float("nan")
    result = ops.reconstruct_prototypes(old, new, values, tau=0.1)
    assert result.isnan().sum() == Co + Dv - 1


def test_reconstruct_many_old_classes_without_their_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no vector fits, and PLORA_CUDA_PATH=mma, take the path of other GPUs and tell the same."""
    args = [draw(8500, 100, grad=False), draw(140, 100, grad=False), draw(140, 100, grad=False)]
    result = ops.reconstruct_prototypes(*args, tau=0.1)
    for i in range(3):
        moved = [off_by_one(a) if i == j else a for j, a in enumerate(args)]
        verify("reconstruct_prototypes", moved, {"tau": 0.1})
        torch.testing.assert_close(ops.reconstruct_prototypes(*moved, tau=0.1), result, rtol=1e-4, atol=2e-6)
    monkeypatch.setenv("PLORA_CUDA_PATH", "mma")
    verify("reconstruct_prototypes", args, {"tau": 0.1})


@pytest.mark.parametrize("tau", [1.0, 0.02, 1e-4])
def test_zero_rows_and_any_temperature_give_no_nan(tau: float) -> None:
    old, new, values = (draw(n, 50, grad=False) for n in (40, 30, 30))
    old[3], new[5] = 0, 0
    result = ops.reconstruct_prototypes(old, new, values, tau=tau)
    torch.testing.assert_close(
        result, reference.reconstruct_prototypes(old, new, values, tau=tau), rtol=1e-2, atol=1e-3
    )
    torch.testing.assert_close(result[3], values.mean(0))
    bank, tasks = draw(30, 3, 50, grad=False), torch.arange(30, device=DEVICE) // 10
    bank[::7] = 0
    assert torch.isfinite(ops.complete_prototypes(bank, tasks, tau=tau)).all()
    assert not ops.subspace_logits(bank[:7] * 0, bank, torch.ones(30, 3, device=DEVICE)).any()


def test_opposite_rows_at_a_low_temperature() -> None:
    """All weights exp((cos - 1) / tau) of a row would vanish."""
    old = draw(30, 64, grad=False)
    values = draw(1500, 64, grad=False)
    new = -old.mean(0) - old[:1] + 0.1 * draw(1500, 64, grad=False)
    result = ops.reconstruct_prototypes(old, new, values, tau=0.01)
    expected = reference.reconstruct_prototypes(old.double(), new.double(), values.double(), tau=0.01)
    assert (result - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("Co", [20_000, 300])
def test_reconstruct_does_not_hold_the_scores(Co: int) -> None:
    """20,000 x 20,000 of them would take 1.6 GB."""
    old, new = draw(Co, 8, grad=False), draw(20_000, 8, grad=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert torch.isfinite(ops.reconstruct_prototypes(old, new, new)).all()
    assert torch.cuda.max_memory_allocated() - before < 20 << 20
    torch.cuda.reset_peak_memory_stats()
    leaf = old.requires_grad_()
    (grad,) = torch.autograd.grad(ops.reconstruct_prototypes(leaf, new, new).sum(), leaf)
    assert torch.isfinite(grad).all()
    assert torch.cuda.max_memory_allocated() - before < 200 << 20


# ---------------------------------------------------------------------- complete_prototypes


@pytest.mark.parametrize("mode", ["reset", "last"])
@pytest.mark.parametrize(
    ("C", "T", "D"), [(1, 1, 4), (2, 2, 1), (40, 5, 33), (33, 3, 130), (10, 12, 8), (100, 20, 768), (700, 3, 36)]
)
def test_complete(mode: str, C: int, T: int, D: int) -> None:
    for tau in (1.0, 0.05):
        for tasks in (torch.randint(0, T, (C,)), torch.arange(C) * T // C, torch.full((C,), T - 1)):
            args = [draw(C, T, D), tasks.to(DEVICE, torch.int32)]
            verify("complete_prototypes", args, {"tau": tau, "mode": mode}, draw(C, T, D, grad=False))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=str)
def test_complete_dtypes_and_layouts(dtype: torch.dtype) -> None:
    args, kwargs, cotangent = problem("complete_prototypes", dtype)
    verify("complete_prototypes", args, kwargs, cotangent)
    args, kwargs, cotangent = problem("complete_prototypes")
    for layout in (off_by_one, every_other, transposed):
        verify("complete_prototypes", [layout(args[0]), args[1]], kwargs, layout(cotangent))


def test_complete_leaves_what_is_real_alone() -> None:
    args, kwargs, _ = problem("complete_prototypes", grad=False)
    bank, tasks = args
    seen = tasks[:, None] >= torch.arange(6, device=DEVICE)
    expected = bank.clone()
    bank[~seen] = float("nan")  # never read
    completed = ops.complete_prototypes(bank, tasks, **kwargs)
    assert torch.isfinite(completed).all()
    assert torch.equal(completed[seen], expected[seen])


# ---------------------------------------------------------------------- subspace_logits


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize(
    ("B", "C", "T", "D"),
    [
        (1, 1, 1, 1),
        (33, 130, 4, 65),
        (128, 100, 20, 768),
        (0, 3, 2, 4),
        (4, 0, 2, 4),
        (4, 3, 0, 5),
        (300, 700, 3, 36),
        (530, 1030, 3, 36),
    ],
)
def test_subspace_logits(dtype: torch.dtype, B: int, C: int, T: int, D: int) -> None:
    weights = torch.rand(C, T, device=DEVICE).to(torch.promote_types(dtype, FP32)).requires_grad_()
    args = [draw(B, T, D, dtype=dtype), draw(C, T, D, dtype=dtype), weights]
    verify("subspace_logits", args, {}, draw(B, C, dtype=dtype, grad=False))


@pytest.mark.parametrize("layout", [off_by_one, every_other, transposed])
def test_subspace_logits_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    args, kwargs, cotangent = problem("subspace_logits")
    verify("subspace_logits", [layout(a) for a in args], kwargs, layout(cotangent))


# ---------------------------------------------------------------------- bits, streams, graphs


@every
def test_same_bits_from_run_to_run_and_on_any_stream(name: str) -> None:
    arguments = problem(name)
    expected = bits(name, *arguments)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = bits(name, *arguments)
        torch.cuda.synchronize()
        assert same(again, expected)


@every
def test_kernels_follow_the_current_stream(name: str) -> None:
    """The first argument arrives late on a stream of its own: a kernel on any other would meet NaN."""
    args, kwargs, cotangent = problem(name)
    expected, x, stream = bits(name, args, kwargs, cotangent), args[0].detach(), torch.cuda.Stream()
    late = torch.full_like(x, float("nan"))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        bits(name, args, kwargs, cotangent)  # for memory that the next run can take without waiting
        torch.cuda._sleep(50_000_000)
        args[0] = late.copy_(x).requires_grad_()
        result = bits(name, args, kwargs, cotangent)
    torch.cuda.synchronize()
    assert same(result, expected)


@every
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward and backward"])
def test_graph(name: str, grad: bool) -> None:
    """Captured once, then replayed on other inputs."""
    args, kwargs, cotangent = problem(name, grad=grad)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        bits(name, args, kwargs, cotangent)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bits(name, args, kwargs, cotangent)
    for _ in range(3):
        with torch.no_grad():
            for t in (*args, cotangent):
                if isinstance(t, Tensor):
                    t.copy_(t.roll(1, 0))
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, bits(name, args, kwargs, cotangent))


@every
def test_no_host_synchronisation(name: str) -> None:
    arguments = problem(name)
    expected = bits(name, *arguments)  # libraries load on their first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = bits(name, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(again, expected)


@every
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device(name: str) -> None:
    assert torch.cuda.current_device() == 0
    args, kwargs, cotangent = problem(name, device="cuda:1")
    verify(name, args, kwargs, cotangent)


# ---------------------------------------------------------------------- torch's own machinery


@every
def test_compile_fullgraph(name: str) -> None:
    torch._dynamo.reset()
    args, kwargs, cotangent = problem(name)
    check(torch.compile(ours(name), fullgraph=True), twin(name), args, kwargs, cotangent)


@every
def test_opcheck(name: str) -> None:
    args, _, _ = problem(name)
    more: list[Any] = {
        "class_sums": [],
        "reconstruct_prototypes": [0.5, True, False],
        "complete_prototypes": [0.5, False],
        "subspace_logits": [False],
    }[name]
    opcheck(getattr(torch.ops.plora_ext, name).default, [*args, *more])
    if name == "class_sums":
        totals = torch.zeros(70, 768, device=DEVICE), torch.zeros(70, dtype=torch.int64, device=DEVICE)
        opcheck(torch.ops.plora_ext.class_sums_.default, [*totals, args[0].detach(), args[1]])


# ---------------------------------------------------------------------- bad input


def test_bad_input() -> None:
    a = draw(4, 3, dtype=FP64, grad=False)
    with pytest.raises(RuntimeError, match="old must be float32, bfloat16 or float16 on CUDA, got Double"):
        torch.ops.plora_ext.reconstruct_prototypes(a, a, a, 1.0, False, False)
    with pytest.raises(RuntimeError, match="tau must be positive, got 0"):
        torch.ops.plora_ext.reconstruct_prototypes(a.float(), a.float(), a.float(), 0.0, False, False)
    with pytest.raises(ValueError, match="new must hold at least one class"):
        ops.reconstruct_prototypes(a.float(), a[:0].float(), a[:0].float())
    with pytest.raises(ValueError, match="new must be on cuda:0, as the first argument, got cpu"):
        ops.reconstruct_prototypes(a.float(), a.float().cpu(), a.float())
    with pytest.raises(ValueError, match=r"prototypes must have the shape \[C, 2, 5\], got \[4, 3, 5\]"):
        ops.subspace_logits(draw(1, 2, 5), draw(4, 3, 5), torch.ones(4, 3, device=DEVICE))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("ops.class_sums(torch.ones(9, 4).cuda(), torch.tensor([0, 3] + 7 * [1]).cuda(), 3)",
         "labels must be between -1 and 2, got 3 at position 1"),
        ("ops.complete_prototypes(torch.ones(3, 2, 4).cuda(), torch.tensor([0, 1, 2]).cuda())",
         "task_of_class must be between 0 and 1, got 2 for class 2"),
    ],
)  # fmt: skip
def test_indices_out_of_range_stop_the_kernel(call: str, message: str) -> None:
    """In a process of its own, as the device is lost to it."""
    code = f"import torch; from plora_ext import ops; {call}; torch.cuda.synchronize()"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
