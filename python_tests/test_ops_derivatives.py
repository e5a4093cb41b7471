"""Derivatives of derivatives, and forward mode, through every operator: right values, never silence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from plora_ext import ops, reference
from plora_ext.nn import inject

F64 = {"dtype": torch.float64}
T, M, IN, OUT, R = 3, 5, 4, 6, 2


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, **F64, requires_grad=True)


def low_rank(name: str, **changes: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of leaves, and leaves."""
    torch.manual_seed(0)
    x, A, B, s = leaf(M, IN), leaf(T, R, IN), leaf(T, OUT, R), leaf(T)
    ids = (torch.tensor([0, 2, -1, 1, 2]),) if name == "lora_indexed" else ()
    kind = {
        "weight": leaf(OUT, IN),
        "bias": leaf(OUT),
        "base": leaf(M, OUT),
        "bias_A": leaf(T, R),
        "bias_B": leaf(T, OUT),
    }
    extra = {key: kind[key] for key in changes.pop("extra", ())}

    def call(x: Tensor, A: Tensor, B: Tensor, s: Tensor, *rest: Tensor) -> Tensor:
        return getattr(ops, name)(x, *ids, A, B, s, **dict(zip(extra, rest, strict=True)), **changes)

    return call, [x, A, B, s, *extra.values()]


LOW_RANK = pytest.mark.parametrize("name", ["lora_indexed", "lora_sum", "lora_all"])
FORMS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"extra": ("weight", "bias")},
        {"extra": ("base", "bias_A", "bias_B"), "activation": "relu"},
        {"extra": ("weight",), "ranks": torch.tensor([2, 1, 2])},
    ],
    ids=["plain", "layer", "biases", "ranks"],
)


@LOW_RANK
@FORMS
def test_second_derivatives_of_the_low_rank_operators(name: str, changes: dict[str, Any]) -> None:
    call, leaves = low_rank(name, **changes)
    assert torch.autograd.gradgradcheck(call, leaves)
    x, *rest = leaves
    assert torch.autograd.gradgradcheck(lambda x: call(x, *rest), (x,))


def test_second_derivatives_where_some_adapters_are_frozen() -> None:
    call, leaves = low_rank("lora_sum", extra=("weight",), trainable=[1])
    first = torch.autograd.grad(call(*leaves).pow(3).sum(), leaves[1], create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), leaves[1])[0]
    assert second[1].abs().max() > 0 and not second[0].any() and not second[2].any()


PROTOTYPES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "merge": (lambda w, A, B, s: ops.lora_merge(w, A, B, s), [(OUT, IN), (T, R, IN), (T, OUT, R), (T,)]),
    "sums": (lambda f: ops.class_sums(f, torch.tensor([0, 2, -1, 2]), 3)[0].square(), [(4, 3)]),
    "complement": (lambda o, n, v: ops.reconstruct_prototypes(o, n, v, tau=0.5), [(3, 4), (2, 4), (2, 5)]),
    "shift": (lambda o, n, v: ops.reconstruct_prototypes(o, n, v, tau=0.5, mode="shift"), [(3, 4), (2, 4), (2, 4)]),
    "complete": (lambda p: ops.complete_prototypes(p, torch.tensor([0, 0, 1, 2]), tau=0.5), [(4, 3, 5)]),
    "logits": (ops.subspace_logits, [(3, 2, 4), (5, 2, 4), (5, 2)]),
}


@pytest.mark.parametrize("name", PROTOTYPES)
def test_second_derivatives_and_forward_mode_of_the_others(name: str) -> None:
    torch.manual_seed(0)
    call, shapes = PROTOTYPES[name]
    leaves = [leaf(*shape) for shape in shapes]
    assert torch.autograd.gradgradcheck(call, leaves)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)


@LOW_RANK
@pytest.mark.parametrize("asks", [True, False], ids=["also backward", "forward alone"])
def test_forward_mode(name: str, asks: bool) -> None:
    call, leaves = low_rank(name, extra=("weight", "bias"))
    points, tangents = [t.detach() for t in leaves], [torch.randn_like(t) for t in leaves]
    step = 1e-6
    ahead = call(*[p + step * t for p, t in zip(points, tangents, strict=True)])
    behind = call(*[p - step * t for p, t in zip(points, tangents, strict=True)])
    wanted = (ahead - behind) / (2 * step)
    got = torch.func.jvp(call, tuple(points), tuple(tangents))[1]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    with forward_ad.dual_level(), torch.set_grad_enabled(asks):
        duals = [forward_ad.make_dual(p, t) for p, t in zip(leaves if asks else points, tangents, strict=True)]
        got = forward_ad.unpack_dual(call(*duals)).tangent
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_functional_derivatives_of_a_model() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(IN, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    adapters = inject(model, ["0", "2"], r=1)
    for name in ("a", "b"):
        adapters.add_adapter(name)
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter)
    adapters.set_adapter(["a", "b"])
    adapters.train_adapter(["a", "b"])
    x, own = torch.randn(3, IN, **F64), dict(model.named_parameters())
    values = {key: value.detach() for key, value in own.items() if "lora" in key}

    def loss(changed: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, changed, x).square().sum()

    expected = torch.autograd.grad(loss({key: own[key] for key in values}), [own[key] for key in values])
    for got, wanted in zip(torch.func.grad(loss)(values).values(), expected, strict=True):
        torch.testing.assert_close(got, wanted)

    # a product with the Hessian against finite differences of gradients
    parameters = tuple(own[key] for key in values)
    direction = tuple(torch.randn_like(p) for p in parameters)

    def of(*changed: Tensor) -> Tensor:
        return loss(dict(zip(values, changed, strict=True)))

    _, products = torch.autograd.functional.hvp(of, tuple(p.detach() for p in parameters), direction)
    gradient = torch.func.grad(loss)
    ahead, behind = (
        gradient({key: v + step * d for (key, v), d in zip(values.items(), direction, strict=True)})
        for step in (1e-6, -1e-6)
    )
    for product, key in zip(products, values, strict=True):
        torch.testing.assert_close(product, (ahead[key] - behind[key]) / 2e-6, rtol=1e-5, atol=1e-5)


@LOW_RANK
def test_tensors_elsewhere_are_named(name: str) -> None:
    call, leaves = low_rank(name, extra=("weight", "bias", "bias_A", "bias_B"))
    for i, argument in enumerate(["lora_A", "lora_B", "scaling", "weight", "bias", "bias_A", "bias_B"], start=1):
        changed = [t.to("meta") if k == i else t for k, t in enumerate(leaves)]
        with pytest.raises(ValueError, match=f"{name}: {argument} must be on cpu, as the first argument, got meta"):
            call(*changed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapters = inject(model, ["0"], r=2)
    adapters.add_adapter("a")
    model[0]._scaling["a"] = torch.ones(1, device="meta")
    with pytest.raises(ValueError, match="lora_sum: scaling must be on cpu"):
        model(torch.randn(3, 4))


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN), (0, 5, IN), (0, 3, 5, IN), (IN,)], ids=str)
def test_empty_inputs_keep_their_shape(shape: tuple[int, ...]) -> None:
    x, A, B = torch.randn(shape, requires_grad=True), torch.randn(T, R, IN, requires_grad=True), torch.randn(T, OUT, R)
    y = ops.lora_sum(x, A, B, weight=torch.randn(OUT, IN))
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape and A.grad is not None
    assert ops.lora_all(x, A, B).shape == (T, *shape[:-1], OUT)
    empty = ops.lora_sum(torch.randn(3, 0, requires_grad=True), torch.randn(1, 2, 0), torch.randn(1, 0, 2),
                         weight=torch.randn(0, 0))  # fmt: skip
    assert empty.shape == (3, 0)
    empty.sum().backward()


@pytest.mark.parametrize("bad", [-2, 3])
def test_values_out_of_range_are_refused_by_the_twins_too(bad: int) -> None:
    x, A, B, ranks = torch.randn(2, IN), torch.randn(3, R, IN), torch.randn(3, OUT, R), torch.tensor([R, R, R])
    ranks[0] = bad if bad < 0 else R + 1
    index, prototypes = torch.tensor([0, bad]), torch.randn(2, 3, 4)
    cases: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
        ("ids must be between -1 and 2", lambda x: ops.lora_indexed(x, index, A, B)),
        (f"ranks must be between 0 and {R}", lambda x: ops.lora_sum(x, A, B, ranks=ranks)),
        ("labels must be between -1 and 2", lambda x: ops.class_sums(x, index, 3)[0]),
        ("task_of_class must be between 0 and 2", lambda x: ops.complete_prototypes(prototypes * x[0, 0], index)),
    ]
    for message, call in cases:
        with pytest.raises(RuntimeError, match=message):
            torch.func.grad(lambda x, call=call: call(x).sum())(x)
    with pytest.raises(RuntimeError, match="task_of_class must be between 0 and 2"):
        ops.complete_prototypes(prototypes, index, tau=0.01)  # which the CPU's kernel does not serve


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("bad", [-2, 3])
def test_values_out_of_range_are_refused_where_they_are_mapped_or_traced(bad: int) -> None:
    x, A, B, prototypes = torch.randn(2, IN), torch.randn(3, R, IN), torch.randn(3, OUT, R), torch.randn(2, 3, 4)
    weight, index = torch.zeros(OUT, IN), torch.tensor([[0, 1], [0, bad]])
    ranks = torch.tensor([[R, R, R], [R, bad if bad < 0 else R + 1, R]])

    def derived(call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda values: torch.func.grad(lambda x: call(x, values).sum())(x)

    cases: list[tuple[str, torch.Tensor, Callable[[torch.Tensor], Any]]] = [
        ("ids must be between -1 and 2", index, derived(lambda x, ids: ops.lora_indexed(x, ids, A, B))),
        ("ranks must be between 0", ranks, derived(lambda x, ranks: ops.lora_sum(x, A, B, ranks=ranks))),
        (r"ranks(\[1\])? must be between 0", ranks, lambda ranks: ops.lora_merge(weight, A, B, ranks=ranks)),
        ("labels must be between -1 and 2", index, derived(lambda x, labels: ops.class_sums(x, labels, 3)[0])),
        ("task_of_class must be between 0 and 2", index, lambda t: ops.complete_prototypes(prototypes, t, tau=0.01)),
        ("task_of_class must be between 0 and 2", index, lambda t: ops.own_other_weights(t, 3, 0.1)),
    ]
    for message, values, call in cases:
        with pytest.raises(RuntimeError, match=message):
            torch.vmap(call)(values)
        with pytest.raises(RuntimeError, match=message):
            torch.vmap(torch.vmap(call))(torch.stack([values, values]))
    for message, values, call in (cases[2], cases[4], cases[5]):
        with pytest.raises(RuntimeError, match=message):
            torch.jit.trace(call, (values[1],))


@pytest.mark.parametrize("name", ["lora_indexed", "lora_sum", "lora_all"])
def test_no_inputs_or_outputs(name: str) -> None:
    ids = (torch.tensor([0, -1, 1]),) if name == "lora_indexed" else ()
    A, B, bias_A = torch.randn(T, R, 0), torch.randn(T, OUT, R), torch.randn(T, R)

    def run(B: torch.Tensor) -> torch.Tensor:
        return getattr(ops, name)(torch.randn(3, 0), *ids, A, B, bias_A=bias_A)

    tangent = torch.randn_like(B)  # of a y that is linear in B
    y, dy = torch.func.jvp(run, (B,), (tangent,))
    torch.testing.assert_close(y, run(B))
    torch.testing.assert_close(dy, run(tangent))
    for count, out in ((T, 0), (0, OUT)):
        y = torch.empty(count, 5, out)
        x, A, B = torch.randn(5, IN), torch.randn(count, R, IN), torch.randn(count, out, R)
        assert ops.lora_all(x, A, B, out=y) is y


def test_views_with_bits_set_and_tensors_of_other_kinds() -> None:
    x, A, B = torch.randn(M, IN), torch.randn(T, R, IN), torch.randn(T, OUT, R)
    negative = torch._neg_view(x)
    torch.testing.assert_close(ops.lora_sum(negative, A, B), ops.lora_sum(-x, A, B))
    for bad in (x.to_sparse(), torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), torch.complex(x, x)):
        with pytest.raises((TypeError, RuntimeError, NotImplementedError, ValueError)):
            ops.lora_sum(bad, A, B)
    with pytest.raises(TypeError, match=r"ids must be integers, got \[True, False\]"):
        ops.AdapterBatch([True, False], 2)
    assert ops.AdapterBatch(torch.tensor([0, 2], dtype=torch.uint16), 3).ids.tolist() == [0, 2]
    with pytest.raises(IndexError, match="between -1"):
        ops.AdapterBatch(torch.tensor([0, 3], dtype=torch.uint32), 3)


def test_y_may_be_x() -> None:
    for rows in (1, 197, 1024):
        x, A, B = torch.randn(rows, IN), torch.randn(T, R, IN), torch.randn(T, IN, R)
        y = x.clone()
        ops.lora_sum_(y, y, A, B)
        torch.testing.assert_close(y, x + reference.lora_sum(x, A, B, torch.ones(T)), rtol=1e-4, atol=1e-4)
        buffer = torch.randn(rows + 1, IN)
        before = buffer.clone()
        ops.lora_sum_(buffer[1:], buffer[:-1], A, B)
        wanted = before[1:] + reference.lora_sum(before[:-1], A, B, torch.ones(T))
        torch.testing.assert_close(buffer[1:], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "keep", ["", "_dispatch_get_registrations_for_dispatch_key"], ids=["none", "kernels are known"]
)
def test_everything_works_without_torchs_private_names(keep: str) -> None:
    """As under a torch that has moved them."""
    script = """
import torch
import torch._dynamo
names = ("_len_torch_dispatch_stack", "_len_torch_function_stack", "_get_tracing_state", "_any_requires_grad",
         "_current_graph_task_id", "_ExcludeDispatchKeyGuard", "_dispatch_get_registrations_for_dispatch_key")
hidden = {(torch._C, name): getattr(torch._C, name) for name in names if name not in KEEP}
for owner, name in ((torch.utils._python_dispatch, "TorchDispatchMode"), (torch.utils._pytree, "tree_map_only")):
    hidden[owner, name] = getattr(owner, name)
for owner, name in hidden:
    delattr(owner, name)
from plora_ext import torch_private
assert not torch_private.is_plain(torch.zeros(1))
import plora_ext.nn
for (owner, name), value in hidden.items():  # torch itself needs them
    setattr(owner, name, value)
from plora_ext import ops, reference
x, A, B = torch.randn(5, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 6, 3)
y = ops.lora_sum(x, A, B, weight=torch.randn(6, 4))
y.sum().backward()
assert x.grad.abs().max() > 0 and A.grad.abs().max() > 0
torch.testing.assert_close(ops.lora_sum(x, A, B), reference.lora_sum(x, A, B, torch.ones(2)), rtol=1e-4, atol=1e-4)
model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
adapters = plora_ext.nn.inject(model, ["0"], r=2)
for name in "ab":
    adapters.add_adapter(name)
assert plora_ext.nn.Ensemble(adapters)(torch.ones(3, 4)).shape == (2, 3, 4)
"""
    done = subprocess.run(
        [sys.executable, "-c", script.replace("KEEP", repr([keep]))], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
