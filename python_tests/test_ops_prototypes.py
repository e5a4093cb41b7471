"""class_sums, reconstruct_prototypes, complete_prototypes and subspace_logits against their plain-torch twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check, opcheck
from torch import Tensor

from plora_ext import libraries, ops, reference
from plora_ext.ops import formulas

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
]
native = pytest.mark.skipif(libraries.backend() != "native", reason="about the compiled operators")


def draw(
    *shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, grad: bool = True
) -> Tensor:
    return torch.randn(shape).to(device=device, dtype=dtype).requires_grad_(grad)


# --- class_sums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "D", "C"), [(1, 1, 1), (257, 65, 7), (1000, 768, 100), (0, 8, 3), (5, 300, 40), (300, 3, 1)]
)
def test_class_sums(dtype: torch.dtype, N: int, D: int, C: int, device: torch.device) -> None:
    features = draw(N, D, device=device, dtype=dtype)
    labels = torch.randint(-1, C, (N,)).to(device)
    wide = torch.promote_types(dtype, torch.float32)
    cotangent = draw(C, D, device=device, dtype=wide, grad=False)
    check(
        lambda f: ops.class_sums(f, labels, C)[0],
        lambda f: reference.class_sums(f, labels, C)[0],
        [features],
        {},
        cotangent,
    )
    sums, counts = ops.class_sums(features, labels, C)
    assert sums.dtype == wide and counts.dtype == torch.int64
    assert torch.equal(counts, torch.stack([(labels == c).sum() for c in range(C)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_sums_have_the_same_bits_however_they_are_batched(dtype: torch.dtype, device: torch.device) -> None:
    if not libraries.has_kernel("class_sums", device.type):
        pytest.skip("about the compiled operator")
    features = draw(1003, 130, device=device, dtype=dtype, grad=False)
    labels = torch.randint(-1, 9, (1003,)).to(device)
    whole, counts = ops.class_sums(features, labels, 9)
    for size in (1, 64, 500):
        sums, total = torch.zeros_like(whole), torch.zeros_like(counts)
        for rows, classes in zip(features.split(size), labels.split(size), strict=True):
            returned = ops.class_sums(rows, classes, 9, sums=sums, counts=total)
            assert returned[0] is sums and returned[1] is total
        assert torch.equal(sums, whole) and torch.equal(total, counts)


def test_class_sums_non_contiguous_and_int32_labels(device: torch.device) -> None:
    features = draw(40, 24, device=device, grad=False)
    labels = torch.randint(0, 5, (40,), dtype=torch.int32).to(device)
    expected = F.one_hot(labels[::2].long(), 5).T.float() @ features[::2, 1::2]
    torch.testing.assert_close(ops.class_sums(features[::2, 1::2], labels[::2], 5)[0], expected)


def test_class_sums_of_no_classes() -> None:
    features, labels = torch.randn(3, 4, requires_grad=True), torch.full((3,), -1)
    sums, counts = ops.class_sums(features, labels, 0)
    assert sums.shape == (0, 4) and counts.shape == (0,)
    sums.sum().backward()
    zeros = torch.zeros(3, 4)
    torch.testing.assert_close(features.grad, zeros)
    torch.testing.assert_close(torch.func.grad(lambda f: ops.class_sums(f, labels, 0)[0].sum())(zeros), zeros)


def test_class_sums_bad_input() -> None:
    features, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    if libraries.backend() == "native":
        with pytest.raises(RuntimeError, match="labels must be between -1 and 2, got 3 at position 3"):
            ops.class_sums(features, labels, 3)
        sums, counts = torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="labels must be"):
            ops.class_sums(features, labels, 3, sums=sums, counts=counts)
        assert not sums.any() and not counts.any(), "a refused batch must leave the totals as they were"
    with pytest.raises(ValueError, match=r"labels must have the shape \[4\], got \[3\]"):
        ops.class_sums(features, labels[:3], 4)
    with pytest.raises(ValueError, match="sums and counts are one running total"):
        ops.class_sums(features, labels, 4, sums=torch.zeros(4, 3))
    with pytest.raises(TypeError, match="sums must be contiguous torch.float32, got torch.float64"):
        ops.class_sums(features, labels, 4, sums=torch.zeros(4, 3).double(), counts=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="labels must be integers"):
        ops.class_sums(features, labels.float(), 4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_class_sums_under_a_graph_and_on_another_stream() -> None:
    features, labels = draw(5000, 768, device="cuda", grad=False), torch.randint(0, 100, (5000,), device="cuda")
    expected, counts = ops.class_sums(features, labels, 100)
    with torch.cuda.stream(torch.cuda.Stream()):
        other, _ = ops.class_sums(features, labels, 100)
    torch.cuda.synchronize()
    assert torch.equal(other, expected)
    sums, total = torch.zeros_like(expected), torch.zeros_like(counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.class_sums(features, labels, 100, sums=sums, counts=total)
    sums.zero_(), total.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(sums, expected) and torch.equal(total, counts)


# --- reconstruct_prototypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["complement", "shift"])
@pytest.mark.parametrize("tau", [1.0, 0.05])
def test_reconstruct(dtype: torch.dtype, mode: str, tau: float, device: torch.device) -> None:
    for Co, Cn, D in ((1, 1, 8), (7, 5, 16), (70, 300, 33), (0, 4, 8), (33, 129, 130)):
        args = [draw(n, D, device=device, dtype=dtype) for n in (Co, Cn, Cn)]
        cotangent = draw(Co, D, device=device, dtype=dtype, grad=False)
        check(ops.reconstruct_prototypes, reference.reconstruct_prototypes, args, {"tau": tau, "mode": mode}, cotangent)


def test_reconstruct_other_width_scale_and_zero_rows(device: torch.device) -> None:
    """Values of another width; cosines do not see the rows' length, and a zero row has none."""
    old, new, values = (draw(*s, device=device, grad=False) for s in ((9, 12), (6, 12), (6, 20)))
    args = [t.requires_grad_() for t in (old * 1e3, new * 1e-3, values)]
    check(
        ops.reconstruct_prototypes,
        reference.reconstruct_prototypes,
        args,
        {"tau": 0.1},
        draw(9, 20, device=device, grad=False),
    )
    zero = torch.zeros(2, 12, device=device)
    torch.testing.assert_close(ops.reconstruct_prototypes(zero, new, values), values.mean(0).expand(2, 20))


@pytest.mark.parametrize("tau", [0.02, 1e-3])
def test_low_temperatures_give_no_nan(tau: float, device: torch.device) -> None:
    """Where the largest cosine is far below 1, every exp((cos - 1) / tau) is zero in float32."""
    args = [draw(n, 40, device=device) for n in (9, 6, 6)]
    result, expected = (m.reconstruct_prototypes(*args, tau=tau, mode="shift") for m in (ops, reference))
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-3)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(result.square().sum(), args))
    bank, tasks = draw(12, 3, 40, device=device, grad=False), torch.arange(12, device=device) // 4
    expected = reference.complete_prototypes(bank, tasks, tau=tau)
    torch.testing.assert_close(ops.complete_prototypes(bank, tasks, tau=tau), expected, rtol=1e-2, atol=1e-3)


def test_reconstruct_is_ease_by_hand() -> None:
    """EASE's own formula, element by element."""
    old, new, values = draw(3, 4, grad=False), draw(2, 4, grad=False), draw(2, 4, grad=False)
    expected = torch.zeros(3, 4)
    for i in range(3):
        similarity = torch.stack([torch.cosine_similarity(old[i], new[j], dim=0) for j in range(2)])
        for j, weight in enumerate(torch.softmax(similarity, 0)):
            expected[i] += weight * values[j]
    torch.testing.assert_close(ops.reconstruct_prototypes(old, new, values), expected)


def test_reconstruct_does_not_hold_the_scores() -> None:
    """20,000 x 20,000 scores would take 1.6 GB; the operator's own memory stays near that of its inputs."""
    if libraries.backend() != "native":
        pytest.skip("about the compiled operator")
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old, new = torch.randn(20_000, 8), torch.randn(20_000, 8)
    assert torch.isfinite(ops.reconstruct_prototypes(old, new, new)).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


# --- complete_prototypes ----------------------------------------------------------------------------------------------


def ease(prototypes: Tensor, task_of_class: Tensor, tau: float, mode: str) -> Tensor:
    """EASE's loops over (old, new) pairs, class by class."""
    result, T = prototypes.clone(), prototypes.shape[1]
    for c, i in enumerate(task_of_class.tolist()):
        for j in range(i + 1, T):
            keys = [k for k, t in enumerate(task_of_class.tolist()) if t >= j]
            if not keys or (mode == "last" and j != T - 1):
                continue
            similarity = torch.stack([torch.cosine_similarity(prototypes[c, i], prototypes[k, i], dim=0) for k in keys])
            result[c, j] = torch.softmax(similarity / tau, 0) @ prototypes[keys, j]
    return result


@pytest.mark.parametrize("mode", ["reset", "last"])
@pytest.mark.parametrize("tasks", [[0], [0, 0, 1, 1, 2, 2], [2, 0, 1, 1, 0, 2, 2, 2], [0, 0, 0, 1, 3, 3], [1, 1]])
def test_complete_is_ease(mode: str, tasks: list[int], device: torch.device) -> None:
    task_of_class = torch.tensor(tasks, device=device)
    prototypes = draw(len(tasks), max(tasks) + 1, 10, device=device, grad=False)
    before = prototypes.clone()
    completed = ops.complete_prototypes(prototypes, task_of_class, tau=0.7, mode=mode)
    torch.testing.assert_close(completed, ease(prototypes, task_of_class, 0.7, mode), rtol=1e-5, atol=1e-5)
    assert torch.equal(prototypes, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["reset", "last"])
def test_complete_matches_twin(dtype: torch.dtype, mode: str, device: torch.device) -> None:
    for C, T, D in ((1, 1, 4), (40, 5, 33), (200, 3, 16), (10, 12, 8)):
        task_of_class = torch.randint(0, T, (C,)).to(device)
        args = [draw(C, T, D, device=device, dtype=dtype), task_of_class]
        cotangent = draw(C, T, D, device=device, dtype=dtype, grad=False)
        check(ops.complete_prototypes, reference.complete_prototypes, args, {"tau": 0.5, "mode": mode}, cotangent)


# --- subspace_logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "C", "T", "D"), [(1, 1, 1, 1), (5, 7, 3, 16), (33, 100, 10, 65), (0, 3, 2, 4), (4, 0, 2, 4)]
)
def test_subspace_logits(dtype: torch.dtype, B: int, C: int, T: int, D: int, device: torch.device) -> None:
    weights = torch.rand(C, T).to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
    args = [draw(B, T, D, device=device, dtype=dtype), draw(C, T, D, device=device, dtype=dtype), weights]
    check(ops.subspace_logits, reference.subspace_logits, args, {}, draw(B, C, device=device, dtype=dtype, grad=False))


def test_subspace_logits_is_ease(device: torch.device) -> None:
    """forward_reweight: own subspace once, the others alpha / (T - 1), class block by class block."""
    features, prototypes = draw(6, 3, 8, device=device, grad=False), draw(7, 3, 8, device=device, grad=False)
    task_of_class, alpha = torch.tensor([0, 0, 0, 1, 1, 2, 2], device=device), 0.2
    expected = torch.zeros(6, 7, device=device)
    for c, i in enumerate(task_of_class.tolist()):
        for j in range(3):
            cosine = torch.cosine_similarity(features[:, j], prototypes[c, j][None], dim=1)
            expected[:, c] += (1 if i == j else alpha / 2) * cosine
    weights = ops.own_other_weights(task_of_class, 3, alpha)
    torch.testing.assert_close(ops.subspace_logits(features, prototypes, weights), expected)
    assert ops.own_other_weights(torch.tensor([0]), 1, 0.5).tolist() == [[1.0]]
    with pytest.raises(TypeError, match="task_of_class must be integers, got torch.float32"):
        ops.own_other_weights(torch.tensor([0.0, 0.7]), 2, 0.5)  # 0.7 was 0


# --- all of them ------------------------------------------------------------------------------------------------------


def small(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[Any], list[Any]]:
    """Arguments of the public function, and of the compiled operator."""
    tasks = torch.tensor([0, 2, 1, 0, 2])
    if name == "class_sums":
        args: list[Any] = [draw(6, 4, dtype=dtype), torch.tensor([0, 2, -1, 2, 1, 0]), 3]
        return args, args
    if name == "reconstruct_prototypes":
        args = [draw(4, 5, dtype=dtype), draw(3, 5, dtype=dtype), draw(3, 6, dtype=dtype)]
        return args, [*args, 0.5, False, False]
    if name == "complete_prototypes":
        args = [draw(5, 3, 4, dtype=dtype), tasks]
        return args, [*args, 0.5, False]
    args = [draw(4, 3, 5, dtype=dtype), draw(6, 3, 5, dtype=dtype), draw(6, 3, dtype=dtype)]
    return args, [*args, False]


NAMES = ("class_sums", "reconstruct_prototypes", "complete_prototypes", "subspace_logits")


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@native
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_opcheck(name: str) -> None:
    args, native_args = small(name)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    def function(*values: Tensor) -> Tensor:
        new = iter(values)
        swapped = [next(new) if isinstance(a, Tensor) and a.requires_grad else a for a in args]
        return first(getattr(ops, name)(*swapped))

    assert torch.autograd.gradcheck(function, leaves)
    opcheck(getattr(torch.ops.plora_ext, name).default, native_args)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in native_args]
    if name in ("reconstruct_prototypes", "complete_prototypes"):
        grad = torch.randn_like(first(getattr(ops, name)(*args))).detach()
        backward = getattr(torch.ops.plora_ext, name + "_backward").default
        opcheck(backward, [grad, *detached][: len(backward._schema.arguments)])
    if name == "class_sums":
        opcheck(
            torch.ops.plora_ext.class_sums_.default,
            [torch.zeros(3, 4).double(), torch.zeros(3, dtype=torch.int64), *detached[:2]],
        )


@pytest.mark.parametrize("name", [*NAMES, "cold"])
def test_compile_and_vmap(name: str) -> None:
    args, _ = small("complete_prototypes" if name == "cold" else name, torch.float32)
    keywords = {"tau": 0.01} if name == "cold" else {}  # which the CPU's kernel does not serve
    name = "complete_prototypes" if name == "cold" else name
    function = lambda *a: first(getattr(ops, name)(*a, **keywords))  # noqa: E731
    check(
        torch.compile(function, fullgraph=True),
        lambda *a: first(getattr(reference, name)(*a, **keywords)),
        args,
        {},
        torch.randn_like(function(*args)),
    )
    batch = torch.randn(3, *args[0].shape)
    mapped = torch.vmap(lambda x: function(x, *args[1:]))(batch)
    torch.testing.assert_close(mapped, torch.stack([function(x, *args[1:]) for x in batch]))
    if name == "complete_prototypes":
        tasks = torch.stack([args[1], args[1].flip(0)])
        mapped = torch.vmap(lambda t: function(args[0], t))(tasks)
        torch.testing.assert_close(mapped, torch.stack([function(args[0], t) for t in tasks]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("tau", [1.0, 0.01])
def test_a_traced_completion_is_of_any_tasks(tau: float) -> None:
    (prototypes, tasks), _ = small("complete_prototypes")
    traced = torch.jit.trace(lambda p, t: ops.complete_prototypes(p, t, tau=tau), (prototypes.detach(), tasks))
    for other in (tasks.flip(0), torch.tensor([0, 0, 0, 1, 2])):
        expected = reference.complete_prototypes(prototypes, other, tau=tau)
        torch.testing.assert_close(traced(prototypes, other), expected)


@pytest.mark.parametrize("mode", ["reset", "last"])
@pytest.mark.parametrize("tau", [0.5, 0.01])
def test_what_was_never_seen_may_be_anything(tau: float, mode: str, device: torch.device) -> None:
    tasks = torch.tensor([0, 2, 1, 0, 2], device=device)
    bank, cotangent = (draw(5, 3, 4, device=device, grad=False) for _ in range(2))
    unseen = (tasks[:, None] < torch.arange(3, device=device))[..., None]
    if mode == "last":  # what is not filled stays as it is
        unseen = unseen & (torch.arange(3, device=device) == 2)[:, None]
    clear, spoilt = (bank.masked_fill(unseen, value).requires_grad_() for value in (0.0, torch.nan))
    results = [ops.complete_prototypes(p, tasks, tau=tau, mode=mode) for p in (clear, spoilt)]
    torch.testing.assert_close(results[1], results[0])
    for again in (False, True):
        found = [torch.autograd.grad(y, p, cotangent, create_graph=again, retain_graph=True)[0]
                 for y, p in zip(results, (clear, spoilt))]  # fmt: skip
        torch.testing.assert_close(found[1], found[0])
        assert found[1].isfinite().all()
    formula = [formulas.complete_prototypes(cotangent, p.detach(), tasks, tau, mode == "last") for p in (clear, spoilt)]
    torch.testing.assert_close(formula[1], formula[0])
    torch.testing.assert_close(formula[1], found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES[1:])
def test_autocast_keeps_float32(name: str, device: torch.device) -> None:
    args = [a.detach().to(device) if isinstance(a, Tensor) else a for a in small(name, torch.float32)[0]]
    low = [a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = getattr(ops, name)(*low)
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result, getattr(ops, name)(*[a.float() if a is not b else a for a, b in zip(low, args, strict=True)])
    )


@native
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_any_number_of_threads(name: str) -> None:
    C, T, D = 150, 4, 40
    args: list[Any] = {
        "class_sums": [draw(500, 200), torch.randint(0, 9, (500,)), 9],
        "reconstruct_prototypes": [draw(C, D), draw(200, D), draw(200, D)],
        "complete_prototypes": [draw(C, T, D), torch.randint(0, T, (C,))],
        "subspace_logits": [draw(C, T, D), draw(70, T, D), torch.rand(70, T)],
    }[name]

    def bits() -> list[Tensor]:
        y = first(getattr(ops, name)(*args))
        if name == "subspace_logits":  # its backward is torch's own products
            return [y]
        leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = bits()
        torch.set_num_threads(2)
        two = bits()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_bad_input() -> None:
    old, new = torch.randn(4, 5), torch.randn(3, 5)
    slabs, tasks = torch.ones(4, 2, 5, dtype=torch.int64), torch.tensor([0, 1, 1, 1])
    for said, call in (
        ("class_sums: features", lambda: ops.class_sums(old.long(), tasks, 2)),
        ("reconstruct_prototypes: old", lambda: ops.reconstruct_prototypes(old.long(), new, new)),
        ("complete_prototypes: prototypes", lambda: ops.complete_prototypes(slabs, tasks)),
        ("subspace_logits: features", lambda: ops.subspace_logits(slabs, torch.randn(4, 2, 5), torch.ones(4, 2))),
    ):
        with pytest.raises(TypeError, match=f"{said} must be floating point, got torch.int64"):
            call()
    with pytest.raises(ValueError, match=r"features must be \[N, D\], got \[4, 2, 5\]"):
        ops.class_sums(slabs.float(), tasks, 2)
    with pytest.raises(ValueError, match=r"new must have the shape \[Cn, 5\], got \[3, 6\]"):
        ops.reconstruct_prototypes(old, torch.randn(3, 6), new)
    with pytest.raises(ValueError, match=r"values must have the shape \[3, Dv\], got \[4, 5\]"):
        ops.reconstruct_prototypes(old, new, old)
    with pytest.raises(TypeError, match="new must be torch.float32"):
        ops.reconstruct_prototypes(old, new.double(), new)
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        ops.reconstruct_prototypes(old, new, new, tau=0)
    with pytest.raises(ValueError, match=r"tau must be at least 2.94e-39, .* infinite for torch.float32, got 1e-39"):
        ops.reconstruct_prototypes(old, new, new, tau=1e-39)
    with pytest.raises(ValueError, match="tau must be at least 2.94e-39"):
        ops.complete_prototypes(torch.randn(4, 2, 5), torch.tensor([0, 0, 1, 1]), tau=1e-39)
    assert ops.reconstruct_prototypes(old.double(), new.double(), new.double(), tau=1e-300).isfinite().all()
    with pytest.raises(ValueError, match="mode must be 'complement' or 'shift'"):
        ops.reconstruct_prototypes(old, new, new, mode="sdc")
    with pytest.raises(ValueError, match="new must hold at least one class"):
        ops.reconstruct_prototypes(old, new[:0], new[:0])
    with pytest.raises(ValueError, match=r"task_of_class must have the shape \[4\], got \[3\]"):
        ops.complete_prototypes(torch.randn(4, 2, 5), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="mode must be 'reset' or 'last'"):
        ops.complete_prototypes(torch.randn(1, 2, 5), torch.tensor([0]), mode="first")
    if libraries.backend() == "native":
        with pytest.raises(RuntimeError, match="task_of_class must be between 0 and 1, got 2 for class 3"):
            ops.complete_prototypes(torch.randn(4, 2, 5), torch.tensor([0, 1, 1, 2]))
    with pytest.raises(ValueError, match=r"prototypes must have the shape \[C, 2, 5\], got \[4, 3, 5\]"):
        ops.subspace_logits(torch.randn(1, 2, 5), torch.randn(4, 3, 5), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"weights must have the shape \[4, 2\], got \[4, 3\]"):
        ops.subspace_logits(torch.randn(1, 2, 5), torch.randn(4, 2, 5), torch.ones(4, 3))
