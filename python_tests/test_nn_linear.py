"""MultiLoRALinear: its outputs and gradients are those of the plain formula on the parameters as they are."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import plora_ext
from plora_ext import libraries, ops
from plora_ext.nn import Adapters, MultiLoRALinear, inject, linear
from plora_ext.ops import compiled

IN, OUT, SCALE = 12, 18, 1.5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.2}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


def make(
    targets: tuple[str, ...] = ("qkv",),
    ranks: tuple[int, ...] = (4, 4, 4),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    dropout: float = 0.0,
) -> Adapters:
    """Adapters t0, t1, ... of random factors, frozen, none active, scale 1.5."""
    adapters = inject(Model().to(device, dtype), targets, r=4, lora_dropout=dropout)
    for i, r in enumerate(ranks):
        adapters.add_adapter(f"t{i}", r=r, lora_alpha=SCALE * r)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.3)
    adapters.set_adapter(None)
    adapters.train_adapter(None)
    return adapters


def delta(adapters: Adapters, name: str) -> Tensor:
    """s B A of one adapter as a full matrix, from the parameters of its slices."""
    layer = adapters.layers["qkv"]
    rows = [(0, OUT)] if layer.slices is None else layer.slices.values()
    parts = [F.pad(B @ A, (0, 0, a, OUT - z)) for (A, B), (a, z) in zip(layer.pairs(name), rows, strict=True)]
    return SCALE * torch.stack(parts).sum(0)


def formula(adapters: Adapters, x: Tensor, names: list[str], c: Tensor | list[float] | None = None) -> Tensor:
    base = adapters.layers["qkv"].base_layer
    weights = [1.0] * len(names) if c is None else c
    return F.linear(
        x,
        (base.weight + sum(w * delta(adapters, n) for w, n in zip(weights, names, strict=True))).to(base.weight),
        base.bias,
    )


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


TARGETS = pytest.mark.parametrize("targets", [("qkv",), ("q", "v"), ("k",)], ids="-".join)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
RANKS = pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 5, 3)], ids=["even", "ragged"])


@TARGETS
@RANKS
@DTYPES
def test_sum_and_its_gradients_are_those_of_the_formula(targets, ranks, dtype, device) -> None:
    adapters = make(targets, ranks, dtype, device)
    x = torch.randn(5, 7, IN, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(5, 7, OUT, dtype=dtype, device=device)
    coeff = torch.tensor([0.5, -2.0, 0.25], device=device)
    names = adapters.names
    for train in ([], ["t1"], ["t0", "t2"], names):
        adapters.train_adapter(train)
        for c in (None, coeff, coeff.clone().requires_grad_()):
            wrt = [x, *[p for n in train for p in adapters.parameters(n)]]
            wrt += [c] if c is not None and c.requires_grad else []
            adapters.set_adapter(names, c)
            y, expected = adapters.model(x), formula(adapters, x, names, c)
            close(y, expected)
            actual = torch.autograd.grad((y * weight).sum(), wrt)
            wanted = torch.autograd.grad((expected * weight).sum(), wrt)
            for a, b in zip(actual, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-6, atol=1e-4)
    assert all(p.grad is None for p in adapters.layers["qkv"].base_layer.parameters())


@pytest.mark.parametrize("shape", [(600, IN), (600, 2, IN)])
def test_many_samples_in_any_order(shape, device, monkeypatch) -> None:
    """A layer's kernels get them sorted where that pays (here: wherever they are)."""
    monkeypatch.setattr(ops.AdapterBatch, "_pays", lambda batch, x, lora_A: True)
    seen, short = [], linear.run_beside

    def spy(*args: Any) -> Tensor | None:
        seen.append(args[8])
        return short(*args)

    monkeypatch.setattr(linear, "run_beside", spy)
    adapters = make(("qkv",), (4, 4, 4), torch.float32, device)
    adapters.train_adapter(adapters.names)
    x = torch.randn(shape, device=device, requires_grad=True)
    ids = torch.randint(-1, 3, shape[:1], device=device)
    with adapters.batch(ids):
        y = adapters.model(x)
    weights = [adapters.layers["qkv"].base_layer.weight + delta(adapters, name) for name in adapters.names]
    weights.append(adapters.layers["qkv"].base_layer.weight)  # of -1
    each = [F.linear(x, weight, adapters.layers["qkv"].base_layer.bias) for weight in weights]
    expected = torch.stack(each)[ids, torch.arange(len(ids), device=device)]
    close(y, expected)
    wrt = [x, *(p for name in adapters.names for p in adapters.parameters(name))]
    wanted = torch.autograd.grad(expected.square().sum(), wrt)
    for got, want in zip(torch.autograd.grad(y.square().sum(), wrt), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)
    assert len(seen) == 1 and torch.equal(seen[0], ids.sort().values)


@TARGETS
@RANKS
@DTYPES
def test_every_sample_has_its_own_adapter(targets, ranks, dtype, device) -> None:
    adapters = make(targets, ranks, dtype, device)
    x = torch.randn(6, 7, IN, dtype=dtype, device=device)
    names = ["t2", "__base__", "t0", "t0", "t1", "t2"]
    expected = torch.cat([formula(adapters, x[i : i + 1], [n][: n != "__base__"]) for i, n in enumerate(names)])
    ids = torch.tensor([2, -1, 0, 0, 1, 2])
    for batch in (names, ids, ids.tolist(), ids.to(device), ops.AdapterBatch(ids, 3)):
        with adapters.batch(batch), torch.no_grad():
            close(adapters.model(x), expected)
    close(adapters.model(x), formula(adapters, x, []))  # the set before is back

    adapters.train_adapter(["t0", "t2"])
    trained = adapters.parameters("t0") + adapters.parameters("t2")
    with adapters.batch(ids):
        actual = torch.autograd.grad(adapters.model(x).square().sum(), trained)
    expected = torch.cat([formula(adapters, x[i : i + 1], [n][: n != "__base__"]) for i, n in enumerate(names)])
    for a, b in zip(actual, torch.autograd.grad(expected.square().sum(), trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_slices_equal_separate_linear_layers() -> None:
    adapters = make(("q", "v"), (4,))
    base, x = adapters.layers["qkv"].base_layer, torch.randn(3, IN)
    adapters.set_adapter("t0")
    (A_q, B_q), (A_v, B_v) = adapters.layers["qkv"].pairs("t0")
    q, k, v = base(x).chunk(3, dim=-1)
    expected = torch.cat([q + SCALE * x @ A_q.T @ B_q.T, k, v + SCALE * x @ A_v.T @ B_v.T], dim=-1)
    for train in ("t0", None):
        adapters.train_adapter(train)
        close(adapters.model(x), expected)


def test_operators_get_views_of_one_adapter_and_the_rows_of_its_slices(monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr(linear, "run_beside", lambda *args: None)
    monkeypatch.setattr(ops, "lora_sum", lambda x, *args, **kwargs: seen.update(args=args, **kwargs) or x)
    adapters = make()
    adapters.set_adapter("t1", [0.5])
    adapters.model(torch.randn(3, IN))
    for factor, parameter in zip(seen["args"], adapters.parameters("t1"), strict=False):
        assert factor.data_ptr() == parameter.data_ptr() and factor.shape == (1, *parameter.shape)
    adapters.train_adapter("t1")
    adapters.set_adapter(["t0", "t1"])
    adapters.model(torch.randn(3, IN))
    assert seen["trainable"] == [1]
    assert seen["slices"] is None
    for ranks in ((4, 4), (1, 5)):
        adapters = make(("q", "v"), ranks)
        adapters.train_adapter(adapters.names)
        adapters.set_adapter(adapters.names)
        adapters.model(torch.randn(3, IN))
        assert seen["slices"] == [(0, 6), (12, 18)] and not torch.count_nonzero(seen["args"][1][:, 6:12])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_slices_where_functions_are_transformed() -> None:
    """Several models with an A and a B of their own, mapped over."""
    adapters, n = make(("q", "v"), (4, 2)), 3
    adapters.set_adapter(["t0", "t1"])
    adapters.train_adapter(["t0", "t1"])
    stacked = {name: torch.randn(n, *p.shape) for name, p in adapters.model.named_parameters() if "lora" in name}
    x = torch.randn(5, IN)

    def call(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(adapters.model, parameters, x)

    mapped = torch.vmap(call)(stacked)
    for i in range(n):
        close(mapped[i], call({name: value[i] for name, value in stacked.items()}))


def test_only_what_trains_gets_gradients() -> None:
    adapters = make()
    adapters.set_adapter(["t0", "t1"], [0.5, 0.5])
    adapters.train_adapter("t1")
    adapters.model(torch.randn(3, IN)).sum().backward()
    assert all(p.grad is not None for p in adapters.parameters("t1"))
    assert all(p.grad is None for n in ("t0", "t2") for p in adapters.parameters(n))


def test_coefficients_may_be_a_parameter_and_stay_their_owners() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    adapters = inject(model, ["0"], r=2)
    for name in ("a", "b"):
        adapters.add_adapter(name)
        nn.init.normal_(model[0].lora_B[name])
    coefficients = nn.Parameter(torch.tensor([0.5, 2.0]))
    for _ in range(2):
        adapters.set_adapter(["a", "b"], coefficients)
    model(torch.randn(3, 8)).sum().backward()
    assert coefficients.grad is not None and bool((coefficients.grad != 0).all())
    assert not any("coefficients" in name for name, _ in model.named_parameters())


def test_dropout_is_before_the_adapters_alone_and_off_in_eval() -> None:
    adapters = make(dropout=0.5)
    x = torch.randn(400, IN)
    adapters.train_adapter("t0")
    adapters.set_adapter("t0")
    layer = adapters.layers["qkv"]
    torch.manual_seed(3)
    y = adapters.model(x)
    torch.manual_seed(3)
    close(y, layer.base_layer(x) + F.dropout(x, 0.5) @ delta(adapters, "t0").T)
    adapters.model.eval()
    close(adapters.model(x), formula(adapters, x, ["t0"]))
    adapters.model.train()
    with adapters.batch(torch.zeros(400, dtype=torch.int64)):
        torch.manual_seed(3)
        close(adapters.model(x), y)


@pytest.mark.parametrize("train", ["t1", None])
def test_autocast(train) -> None:
    adapters, x = make(), torch.randn(8, IN)
    adapters.set_adapter(["t0", "t1"])
    adapters.train_adapter(train)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapters.model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), formula(adapters, x, ["t0", "t1"]), rtol=5e-2, atol=1e-1)
    if train:
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in adapters.parameters("t1"))


# ---------------------------------------------------------------------- nothing is out of date


def check_now(adapters: Adapters, names: list[str], c: Tensor | list[float] | None = None, **kwargs) -> None:
    """All forms agree with the formula of this moment: frozen sum, frozen part beside a trained one, batch, merged."""
    layer = adapters.layers["qkv"]
    x = torch.randn(4, IN).to(layer.base_layer.weight)
    for _ in range(2):
        with torch.no_grad():
            close(adapters.model(x), formula(adapters, x, names, c))
            with adapters.merged():
                y = adapters.model(x)
            close(y, formula(adapters, x, names, c))
            with adapters.batch([0, 1, 2, -1]):
                y = adapters.model(x)
            for i, name in enumerate(adapters.names):
                close(y[i], formula(adapters, x[i], [name]))
        close(adapters.model(x), formula(adapters, x, names, c))


@TARGETS
@pytest.mark.parametrize("train", [[], ["t1"]], ids=["frozen", "training"])
def test_every_forward_follows_the_parameters(targets, train) -> None:
    adapters = make(targets)
    names = ["t0", "t1"]
    coeff = torch.tensor([0.5, 0.5])
    adapters.set_adapter(names, coeff)
    adapters.train_adapter(train)
    layer = adapters.layers["qkv"]

    def check() -> None:
        check_now(adapters, adapters.active, coeff if adapters.active == names else None)

    check()
    for parameter in adapters.parameters():
        parameter.requires_grad_()
        parameter.grad = torch.ones_like(parameter)
    for step in (
        torch.optim.SGD(adapters.parameters(), lr=0.1, fused=True),  # fused steps are not counted by torch
        torch.optim.AdamW(adapters.parameters(), lr=0.1, fused=True),
        torch.optim.Adagrad(adapters.parameters(), lr=0.1, fused=True),
        torch.optim.AdamW([{"params": adapters.parameters("t0")}], lr=0.1, foreach=True),
    ):
        step.step()
        check()
    adapters.train_adapter(train)
    adapters.model.eval()
    check()
    for parameter in adapters.parameters():  # how averages of weights are swapped in: not counted either
        parameter.data.copy_(0.5 * parameter)
    check()
    layer.base_layer.weight.data.mul_(2)
    check()
    coeff.mul_(3)
    check()
    state = {key: value if "alpha" in key else torch.randn_like(value) for key, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    check()
    layer.load_state_dict({k: v if "alpha" in k else torch.randn_like(v) for k, v in state.items()}, assign=True)
    adapters.train_adapter(train)
    check()
    with torch.no_grad():
        adapters.parameters("t0")[0].zero_()
        check()
    adapters.parameters("t1")[0].data = torch.randn_like(adapters.parameters("t1")[0])
    check()
    adapters.parameters("t1")[1].detach().numpy()[:] = 1  # memory that others write to
    check()
    for table in layer._dicts():
        table["t1"] = nn.Parameter(torch.randn_like(table["t1"]), requires_grad=bool(train))
    check()
    adapters.set_adapter(["t1", "t2"])
    check()
    adapters.model.double()
    check()
    adapters.model.bfloat16()
    check()


def test_inference_mode_and_training_afterwards() -> None:
    adapters, x = make(), torch.randn(4, IN)
    adapters.set_adapter(["t0", "t1"])
    with torch.inference_mode():
        adapters.model(x)
    adapters.train_adapter("t1")
    adapters.model(x.requires_grad_()).sum().backward()
    with torch.inference_mode():
        adapters.add_adapter("t3", init_from="t0")
        adapters.fuse(["t0", "t1"], [0.5, 2.0])
    adapters.set_adapter(["t3", "fused"])
    adapters.train_adapter(["t3", "fused"])
    adapters.model(x).sum().backward()
    assert all(p.grad is not None for name in ("t3", "fused") for p in adapters.parameters(name))
    with torch.inference_mode():  # parameters made here carry no version
        inside = make()
        inside.set_adapter(["t0", "t1"])
        for _ in range(2):
            close(inside.model(x), formula(inside, x, ["t0", "t1"]))
            for parameter in inside.parameters():
                parameter.mul_(2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_graph_follows_the_parameters() -> None:
    adapters, x = make(device="cuda"), torch.randn(4, IN, device="cuda")
    adapters.set_adapter(["t0", "t1"])
    with torch.no_grad():
        adapters.model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = adapters.model(x)
        for parameter in adapters.parameters():
            parameter.mul_(2)
        adapters.model.eval()
        graph.replay()
        torch.cuda.synchronize()
        close(y, formula(adapters, x, ["t0", "t1"]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("change", [lambda m: m.load_state_dict(m.state_dict()), nn.Module.cuda, nn.Module.float])
def test_a_captured_graph_goes_on_after(change: Callable[[nn.Module], Any]) -> None:
    adapters, x = make(device="cuda"), torch.randn(4, IN, device="cuda")
    adapters.set_adapter("t0")
    with torch.no_grad():
        adapters.model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = adapters.model(x)
        change(adapters.model)
        _kept = [torch.full((1,), 9.0, device="cuda") for _ in range(64)]  # where a scale was that is given back
        graph.replay()
        torch.cuda.synchronize()
        close(y, formula(adapters, x, ["t0"]))


@TARGETS
def test_constants_stay_where_a_captured_graph_reads_them(targets: tuple[str, ...]) -> None:
    adapters = make(targets, (4, 2))
    (layer,) = adapters.layers.values()
    before = [*layer._scaling.values(), *layer._ranks.values()]
    state = adapters.model.state_dict()
    key = next(key for key in state if key.endswith("lora_alpha.t1"))
    adapters.model.load_state_dict({**state, key: state[key] * 2})
    adapters.model.float().to("cpu")
    assert all(a is b for a, b in zip(before, [*layer._scaling.values(), *layer._ranks.values()], strict=True))
    assert [t.item() for t in before] == [SCALE, 2 * SCALE, 4, 2]
    assert adapters.model.double() and layer._scaling["t1"].dtype == torch.float64 and before[1].dtype == torch.float32


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how) -> None:
    adapters, x = make(("q", "v"), (4, 2)), torch.randn(4, IN)
    coeff = torch.softmax(torch.randn(2, requires_grad=True), 0)  # not a leaf: torch would refuse to copy it
    adapters.set_adapter(["t0", "t1"], coeff)
    with torch.no_grad():
        y = adapters.model(x)
    if how == "deepcopy":
        model = copy.deepcopy(adapters.model)
    else:
        file = io.BytesIO()
        torch.save(adapters.model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    assert Adapters(model).active == ["t0", "t1"]
    with torch.no_grad():
        assert torch.equal(model(x), y)
        for parameter in Adapters(model).parameters():
            parameter.zero_()
        close(model(x), model.qkv.base_layer(x))
        assert torch.equal(adapters.model(x), y)


# ---------------------------------------------------------------------- merge


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_changes_the_weight_and_unmerge_restores_its_bits(targets, dtype) -> None:
    adapters, x = make(targets, dtype=dtype), torch.randn(4, IN, dtype=dtype)
    weight = adapters.layers["qkv"].base_layer.weight
    before, names = weight.clone(), ["t0", "t2"]
    adapters.set_adapter(names, [0.3, 0.7])
    y = adapters.model(x)
    adapters.merge()
    assert weight is adapters.layers["qkv"].base_layer.weight and not torch.equal(weight, before)
    close(adapters.model(x), y)
    for change in (adapters.merge, lambda: adapters.set_adapter("t1"), lambda: adapters.add_adapter("new")):
        with pytest.raises(RuntimeError, match=r"merged into the base weight: call unmerge\(\) first"):
            change()
    for context in (adapters.batch([0]), adapters.disabled()):
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) first"), context:
            pass
    adapters.unmerge()
    assert torch.equal(weight, before)
    assert torch.equal(adapters.model(x), y)
    with pytest.raises(RuntimeError, match="call merge first"):
        adapters.unmerge()


def test_effective_weight_for_models_that_do_not_call_the_layer() -> None:
    adapters, x = make(), torch.randn(4, IN)
    layer = adapters.layers["qkv"]
    assert layer.weight is layer.base_layer.weight
    adapters.set_adapter(["t0", "t1"], [2.0, 1.0])
    adapters.train_adapter("t1")
    y = F.linear(x, layer.weight, layer.bias)
    close(y, formula(adapters, x, ["t0", "t1"], [2.0, 1.0]))
    y.sum().backward()
    assert all(p.grad is not None for p in adapters.parameters("t1"))
    with adapters.batch([0]), pytest.raises(RuntimeError, match=r"reads layer\.weight"):
        layer.weight  # noqa: B018
    layer.lora_dropout = 0.5
    assert layer.eval().weight is not None
    with pytest.warns(UserWarning, match="lora_dropout drops nothing there"):
        layer.train().weight  # noqa: B018


# ---------------------------------------------------------------------- edges


def test_empty_batches_and_no_adapters() -> None:
    adapters = make(ranks=())
    x = torch.randn(4, IN)
    with adapters.batch([-1] * 4):
        close(adapters.model(x), formula(adapters, x, []))
    adapters = make()
    for train in (None, "t0"):
        adapters.train_adapter(train)
        adapters.set_adapter(["t0", "t1"])
        assert adapters.model(torch.randn(0, 3, IN)).shape == (0, 3, OUT)
        with adapters.batch([]):
            assert adapters.model(torch.randn(0, 3, IN)).shape == (0, 3, OUT)


def test_refuses_what_is_not_a_plain_linear() -> None:
    with pytest.raises(TypeError, match=r"plain torch\.nn\.Linear, got torch.*NonDynamicallyQuantizableLinear"):
        MultiLoRALinear(nn.MultiheadAttention(8, 2).out_proj)
    with pytest.raises(TypeError, match="plain"):
        MultiLoRALinear(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"slice 'q' must be rows within \[0, 6\), got \(4, 7\)"):
        MultiLoRALinear(nn.Linear(4, 6), {"q": (4, 7)})
    with pytest.raises(ValueError, match=r"lora_dropout must lie in \[0, 1\), got 1"):
        MultiLoRALinear(nn.Linear(4, 6), lora_dropout=1)


def test_a_layer_of_its_own_names_what_is_wrong() -> None:
    """Names were letters, and shapes showed in the forward, as those of an operator's arguments."""
    layer, x = MultiLoRALinear(nn.Linear(4, 6)), torch.randn(3, 4)
    layer.add_adapter("ab", [(torch.randn(2, 4), torch.randn(6, 2))], 4)
    for a, b in (((2, 5), (6, 2)), ((2, 4), (6, 3)), ((2, 4), (5, 2)), ((0, 4), (6, 0))):
        with pytest.raises(ValueError, match=r"pairs must have the shapes .* of A and B, got "):
            layer.add_adapter("new", [(torch.randn(a), torch.randn(b))], 4)
    with pytest.raises(ValueError, match="adapter 'ab' exists already"):
        layer.add_adapter("ab", layer.pairs("ab"), 4)
    layer.set_adapter("ab", [0.5])
    (lora_A, lora_B), base = layer.pairs("ab")[0], layer.base_layer(x)
    torch.testing.assert_close(layer(x), base + 0.5 * 2 * x @ lora_A.T @ lora_B.T)
    for call in (layer.pairs, layer.set_adapter, layer.delete_adapter):
        with pytest.raises(KeyError, match=r"unknown adapter 'no', known ones are \['ab'\]"):
            call("no")
    assert layer.adapter_names == layer.active_adapters == ["ab"]
    with pytest.raises(TypeError, match="does not support item assignment"):
        layer.lora_alpha["ab"] = 8  # type: ignore[index]  # files had it, and the forward not


# --- the short way of one adapter that trains ------------------------------------------------------------------------

native = pytest.mark.skipif(libraries.backend() != "native", reason="needs the compiled operators")


def one(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **options: Any) -> Adapters:
    adapters = make(ranks=(4,), dtype=dtype, device=device, **options)
    adapters.train_adapter("t0")
    adapters.set_adapter("t0")
    return adapters


def ways(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> tuple[list[str], Any]:
    """Which of the two ways the calls of a layer's forward took, and what came out."""
    taken: list[str] = []
    short = linear.run_beside

    def short_spy(*args: Any) -> Any:
        y = short(*args)
        taken.extend(["short"] if y is not None else [])
        return y

    with monkeypatch.context() as patch:
        patch.setattr(linear, "run_beside", short_spy)
        for name in ("lora_sum", "lora_indexed"):
            general = getattr(ops, name)
            patch.setattr(ops, name, lambda *a, general=general, **k: taken.append("general") or general(*a, **k))
        return taken, call()


AUTOCAST = pytest.mark.parametrize("amp", [False, True], ids=["", "autocast"])


def autocast(device: Any, amp: bool) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp)


@native
@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,), (2, 0), (), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("asks", ["x A B", "A", "B", "x B"])
@AUTOCAST
def test_the_short_way_gives_the_same_bits(lead, asks, amp, device, monkeypatch) -> None:
    adapters = one(device=device)
    layer = adapters.layers["qkv"]
    x = torch.randn(*lead, IN, device=device)
    A, B = layer.pairs("t0")[0]
    named = {"x": x, "A": A, "B": B}
    for name, leaf in named.items():
        leaf.requires_grad_(name in asks.split())
    cotangent = torch.randn(*lead, OUT, device=device, dtype=torch.bfloat16 if amp else torch.float32)

    def bits() -> list[Tensor]:
        with autocast(device, amp):
            y = layer(x)
        return [y, *torch.autograd.grad(y, [named[name] for name in asks.split()], cotangent)]

    taken, short = ways(monkeypatch, bits)
    assert taken == ["short"]
    monkeypatch.setattr(linear, "run_beside", lambda *args: None)
    for a, b in zip(short, bits(), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@native
def test_the_short_way_hands_tensors_on_as_they_are(device, monkeypatch) -> None:
    """A view, or a copy, would cost the host as much as a small launch."""
    seen: dict[str, tuple[Any, ...]] = {}
    for name in ("lora_one", "lora_one_backward"):
        spied = lambda *args, name=name, operator=compiled.eager_op[name]: seen.update({name: args}) or operator(*args)  # noqa: E731
        monkeypatch.setitem(compiled.eager_op, name, spied)
    layer = one(device=device).layers["qkv"]
    x = torch.randn(2, 3, IN, device=device, requires_grad=True)
    given = [x, *layer.pairs("t0")[0]]
    layer(x).backward(cotangent := torch.randn(2, 3, OUT, device=device))
    for args, tensors in ((seen["lora_one"], given), (seen["lora_one_backward"], [cotangent, *given])):
        for arg, t in zip(args, tensors, strict=False):
            assert arg.shape == t.shape and arg.data_ptr() == t.data_ptr()
    assert all(t.grad is not None and t.grad.is_contiguous() and t.grad._base is None for t in given)


@native
@pytest.mark.parametrize("lead", [(5,), (2, 3)], ids=str)
def test_wide_factors_are_narrowed_on_the_short_way(lead, device, monkeypatch) -> None:
    layer = one(torch.bfloat16, device).layers["qkv"]
    x, cotangent = (torch.randn(*lead, n, device=device, dtype=torch.bfloat16) for n in (IN, OUT))
    leaves = [x.requires_grad_(), *layer.pairs("t0")[0]]

    def derivatives() -> list[Tensor]:
        y = layer(x)
        first = torch.autograd.grad(y, leaves, cotangent, retain_graph=True)
        again = torch.autograd.grad(y, leaves, cotangent, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.float().square().sum() for g in again), leaves)]

    taken, short = ways(monkeypatch, derivatives)
    assert taken == ["short"] and [leaf.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]
    monkeypatch.setattr(linear, "run_beside", lambda *args: None)
    for a, b in zip(short, derivatives(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def counted(call: Callable[[Tensor], Any], x: Tensor) -> tuple[list[str], Any]:
    """The functions of this package that a call enters, and what it gives."""
    names: list[str] = []
    package = str(Path(plora_ext.__file__).parent)

    def note(frame: FrameType, event: str, _: Any) -> None:  # torch's own functions differ between its versions
        if event == "call" and frame.f_code.co_filename.startswith(package):
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        return names, call(x)
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("train", [None, "t1"], ids=["frozen", "training"])
@TARGETS
def test_more_adapters_enter_no_more_functions(targets, train) -> None:
    numbers = []
    for T in (3, 30):
        adapters = make(targets, ranks=(4,) * T)
        adapters.set_adapter(adapters.names)
        adapters.train_adapter(train)
        with torch.set_grad_enabled(train is not None):
            for _ in range(2):  # once to look up what is kept
                names, _ = counted(adapters.layers["qkv"], torch.randn(3, IN))
        numbers.append(len(names))
    assert numbers[0] == numbers[1]


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_of_one_adapter_is_few_functions(dtype) -> None:
    layer = one(dtype).layers["qkv"]
    x = torch.randn(3, IN, dtype=dtype, requires_grad=True)
    leaves = [x, *layer.pairs("t0")[0]]
    for _ in range(2):  # once to look up what is kept
        forward_calls, y = counted(layer, x)
        with torch.no_grad():
            calls = [forward_calls, counted(y.grad_fn.apply, torch.ones_like(y))[0], counted(layer, x)[0]]
    print(*(f"{len(names)} functions: {', '.join(names)}" for names in calls), sep="\n")
    forward, backward, without = map(len, calls)
    assert forward <= 10 and backward <= 3 and without <= 10
    # nothing between the layer and its leaves: every cast there would be a node more, there and back
    inputs = [getattr(node, "variable", None) for node, _ in y.grad_fn.next_functions]
    assert [any(leaf is found for found in inputs) for leaf in leaves] == [True] * 3


@native
@TARGETS
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 3)], ids=["one rank", "ranks"])
@pytest.mark.parametrize("coefficients", [None, [0.5, -1.0, 2.0]], ids=["ones", "coefficients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@AUTOCAST
def test_a_set_without_gradients_takes_the_short_way(
    targets, ranks, coefficients, dtype, amp, device, monkeypatch
) -> None:
    adapters = make(targets, ranks, dtype=dtype, device=device)
    adapters.set_adapter(adapters.names, coefficients)
    x = torch.randn(2, 3, IN, dtype=dtype, device=device)
    with torch.no_grad(), autocast(device, amp):
        taken, short = ways(monkeypatch, lambda: adapters.model(x))
        monkeypatch.setattr(linear, "run_beside", lambda *args: None)
        assert taken == ["short"] and torch.equal(short, adapters.model(x))


@native
@TARGETS
@pytest.mark.filterwarnings("ignore:of the adapters of this batch:UserWarning")
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 3), (4,)], ids=["one rank", "ranks", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@AUTOCAST
def test_a_batch_without_gradients_takes_the_short_way(targets, ranks, dtype, amp, device, monkeypatch) -> None:
    adapters = make(targets, ranks, dtype=dtype, device=device)
    x = torch.randn(5, 3, IN, dtype=dtype, device=device)
    ids = [0, -1, len(ranks) - 1, 0, -1]

    def forward(x: Tensor = x, ids: Any = ids) -> Tensor:
        with adapters.batch(ids), autocast(device, amp):
            return adapters.model(x)

    adapters.train_adapter(None)
    for grad in (False, True):  # where nothing trains, gradients may be on
        with torch.set_grad_enabled(grad):
            taken, short = ways(monkeypatch, forward)
            assert taken == ["short"]
            with monkeypatch.context() as patch:
                patch.setattr(linear, "run_beside", lambda *args: None)
                assert torch.equal(short, forward())
    with torch.no_grad(), pytest.raises(ValueError, match="was given 4 adapters, but a layer sees 5 samples"):
        forward(ids=ids[:4])
    with torch.no_grad(), pytest.raises(IndexError, match="must be between -1"):
        forward(ids=[len(ranks)] * 5)


@native
@pytest.mark.filterwarnings("ignore:of the adapters of this batch:UserWarning")
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 3), (4,) * 17], ids=["one rank", "ranks", "dense"])
@pytest.mark.parametrize("asks", ["x", "t2", "x t2", "x t0 t1 t2", "t0 B"])
@pytest.mark.parametrize("kind", ["sum", "coefficients", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@AUTOCAST
def test_several_adapters_train_the_short_way(ranks, asks, kind, dtype, amp, device, monkeypatch) -> None:
    """To the same bits, and no factor without a gradient gets one."""
    adapters = make(ranks=ranks, dtype=dtype, device=device)
    coefficients = [0.5 - i for i in range(len(ranks))]
    adapters.set_adapter(adapters.names, coefficients if kind == "coefficients" else None)
    adapters.train_adapter([name for name in asks.split() if name in adapters.names])
    for layer in adapters.layers.values():
        layer.pairs("t0")[0][0].requires_grad_("t0" in asks and "B" not in asks)
    x = torch.randn(5, 3, IN, dtype=dtype, device=device, requires_grad="x" in asks)
    leaves = [p for p in adapters.parameters() if p.requires_grad] + [x] * x.requires_grad

    def bits() -> list[Tensor]:
        with adapters.batch([0, 2, 2, -1, 1]) if kind == "batch" else nullcontext():
            with autocast(device, amp):
                y = adapters.model(x)
            return [y, *torch.autograd.grad((y * y.detach().sin()).sum(), leaves)]

    taken, short = ways(monkeypatch, bits)
    assert taken == ["short"]
    monkeypatch.setattr(linear, "run_beside", lambda *args: None)
    taken, general = ways(monkeypatch, bits)
    assert taken == ["general"]
    for leaf, a, b in zip([None, *leaves], short, general, strict=True):
        assert torch.equal(a, b) and (leaf is None or a.dtype == leaf.dtype)


@native
@pytest.mark.filterwarnings("ignore:of the adapters of this batch:UserWarning")
@pytest.mark.parametrize("kind", ["sum", "batch"])
def test_several_adapters_are_differentiated_twice_the_short_way(kind, device, monkeypatch) -> None:
    adapters = make(ranks=(4, 2, 3), device=device)
    adapters.set_adapter(adapters.names)
    adapters.train_adapter(["t0", "t2"])
    x = torch.randn(4, IN, device=device, requires_grad=True)
    leaves = [x, *adapters.parameters("t0"), *adapters.parameters("t2")]

    def second() -> tuple[Tensor, ...]:
        with adapters.batch([0, 2, 1, -1]) if kind == "batch" else nullcontext():
            first = torch.autograd.grad(adapters.model(x).pow(3).sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    taken, short = ways(monkeypatch, second)
    assert taken == ["short"]
    monkeypatch.setattr(linear, "run_beside", lambda *args: None)
    for a, b in zip(short, second(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@native
def test_who_looks_at_what_several_adapters_save_takes_the_general_way(device, monkeypatch) -> None:
    adapters = make(ranks=(4, 4), device=device)
    adapters.set_adapter(adapters.names)
    adapters.train_adapter("t1")
    x = torch.randn(4, IN, device=device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert ways(monkeypatch, lambda: adapters.model(x))[0] == ["general"]
    coefficients = torch.ones(2, device=device, requires_grad=True)
    adapters.set_adapter(adapters.names, coefficients)
    taken, y = ways(monkeypatch, lambda: adapters.model(x))
    assert taken == ["general"] and torch.autograd.grad(y.sum(), coefficients)[0].abs().sum() > 0


def test_a_forward_of_many_adapters_is_few_calls_of_torch() -> None:
    adapters = make(ranks=(4,) * 50)
    adapters.set_adapter(adapters.names)
    layer, x = adapters.layers["qkv"], torch.randn(3, IN)
    with torch.no_grad():
        layer(x)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            layer(x)
    calls = [event.name for event in seen.events()]
    print(calls)
    # the A and the B each in one call, without one for every adapter; the scales are kept
    assert calls.count("aten::cat") == 2 and len(calls) < 25


def a_fused_step(adapters: Adapters) -> None:
    adapters.train_adapter("t1")
    leaves = adapters.parameters("t1")
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    torch.optim.AdamW(leaves, lr=0.1, fused=True).step()


CHANGES: dict[str, Callable[[Adapters], Any]] = {
    "in place": lambda a: a.parameters("t1")[0].detach().mul_(2),
    "data": lambda a: a.parameters("t1")[1].data.mul_(2),
    "other data": lambda a: setattr(a.parameters("t1")[0], "data", torch.randn(4, IN)),
    "a fused optimizer": a_fused_step,
    "load_state_dict": lambda a: a.model.load_state_dict({
        k: v * 2 for k, v in a.model.state_dict().items() if "lora_alpha" in k or "lora_B" in k
    }, strict=False),
    "set_adapter": lambda a: a.set_adapter(["t2", "t0"]),
    "coefficients": lambda a: a._state.common.coefficients.mul_(2),
    "double": lambda a: a.model.double(),
    "deletion": lambda a: a.delete_adapter("t1"),
    "another of the name": lambda a: (
        a.delete_adapter("t1"), a.add_adapter("t1", r=4, lora_alpha=1.0), a.set_adapter(["t0", "t1", "t2"])
    ),
    "renaming": lambda a: (
        a._rename("t0", "x"), a._rename("t1", "t0"), a._rename("x", "t1"), a.set_adapter(["t0", "t1", "t2"])
    ),
    "a copy": lambda a: a.__init__(pickle.loads(pickle.dumps(a.model))),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen_by_the_next_forward(change: Callable[[Adapters], Any]) -> None:
    adapters = make(ranks=(4, 4, 4))
    for i, name in enumerate(adapters.names):  # scales of their own
        adapters.layers["qkv"]._alpha[name] = 2.0 + i
    adapters.layers["qkv"]._set_constants(*adapters.names)
    adapters.set_adapter(["t0", "t1", "t2"], torch.tensor([1.0, 0.5, 2.0]))
    x = torch.randn(3, IN)
    with torch.no_grad():
        for _ in range(2):
            adapters.model(x)
        with torch.enable_grad():
            change(adapters)
        layer, active = adapters.layers["qkv"], adapters._state.common
        x = x.to(layer.base_layer.weight.dtype)
        ones = torch.ones(len(active.names))
        expected = layer.base_layer(x)
        for name, c in zip(active.names, ones if active.coefficients is None else active.coefficients, strict=True):
            A, B = layer.pairs(name)[0]
            expected = expected + c * (layer.lora_alpha[name] / layer.r[name]) * (x @ A.T @ B.T)
        close(adapters.model(x), expected)


@native
def test_whatever_is_unusual_takes_the_general_way(monkeypatch) -> None:
    class Sub(Tensor):
        pass

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, IN)

    def taken(call: Callable[[Adapters], Any], **options: Any) -> list[str]:
        adapters = one(**options)
        return ways(monkeypatch, lambda: call(adapters))[0]

    def within(context: Any, x: Tensor = x) -> Callable[[Adapters], Any]:
        def call(adapters: Adapters) -> None:
            with context:
                adapters.model(x)

        return call

    assert taken(within(contextlib.nullcontext())) == ["short"]
    assert taken(within(torch.autocast("cpu", torch.bfloat16))) == ["short"]
    assert taken(within(contextlib.nullcontext(), x.as_subclass(Sub))) == ["general"]
    assert taken(within(Functions())) == ["general"]
    assert taken(within(Dispatches())) == ["general"]
    assert taken(within(torch.no_grad())) == ["short"]
    assert taken(lambda a: torch.vmap(a.model)(x[None])) == ["general"]
    assert taken(lambda a: a.set_adapter("t0", [0.5]) or a.model(x)) == ["short"]
    assert taken(lambda a: a.train_adapter(None) or a.model(x)) == ["short"]
    assert taken(lambda a: a.merge() or a.model(x)) == []
    assert taken(lambda a: a.layers["qkv"].base_layer.requires_grad_() and a.model(x)) == ["general"]
    assert taken(lambda a: a.layers["qkv"].base_layer.requires_grad_() and within(torch.no_grad())(a)) == ["short"]
    assert taken(lambda a: a.model.train()(x), dropout=0.5) == ["general"]
    assert taken(lambda a: a.model.eval()(x), dropout=0.5) == ["short"]
    assert taken(lambda a: a.add_adapter("new") or a.set_adapter(["t0", "new"]) or a.model(x)) == ["short"]
    assert taken(lambda a: torch.nn.utils.parametrizations.weight_norm(a.layers["qkv"].base_layer) and a.model(x)) == [
        "general"
    ]


@native
def test_bad_input_of_a_layer_is_named_on_either_way() -> None:
    model = one().model
    for x, error in ((torch.randn(3, IN + 1), ValueError), (torch.randn(3, IN).double(), TypeError)):
        with pytest.raises(error, match=r"lora_sum: lora_A must"):
            model(x)
    with pytest.raises(ValueError, match=r"lora_sum: x must be"):
        model(torch.tensor(1.0))
    wrong = one()
    wrong.layers["qkv"].base_layer.bias.data = torch.zeros(OUT + 1)
    with pytest.raises(RuntimeError, match=r"lora_sum: bias must have the shape \[18\], got \[19\]"):
        wrong.model(torch.randn(3, IN))


@native
def test_the_short_way_under_checkpointing_hooks_and_writes() -> None:
    adapters = one()
    layer, x = adapters.layers["qkv"], torch.randn(2, 3, IN, requires_grad=True)
    leaves = [x, *adapters.parameters("t0")]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y.square().sum(), leaves)

    expected = gradients(layer(x))

    def deep(x: Tensor) -> Tensor:
        return layer(torch.tanh(layer(x))[..., :IN])

    def equal(actual: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))

    again = torch.utils.checkpoint.checkpoint(deep, x, use_reentrant=False)  # within the backward, and with autograd
    assert equal(gradients(again), gradients(deep(x)))
    with torch.autograd.graph.save_on_cpu():
        assert equal(gradients(layer(x)), expected)

    y = layer(x).mul_(2)  # the output is no view
    assert all(torch.allclose(a, 4 * b) for a, b in zip(gradients(y), expected, strict=True))
    z = x.detach().clone()
    y = layer(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

    seen: list[str] = []
    layer.register_forward_hook(lambda *args: seen.append("forward"))
    layer.register_full_backward_hook(lambda *args: seen.append("backward"))
    gradients(layer(x))
    assert seen == ["forward", "backward"]
    first = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), leaves)
    by_hand = torch.autograd.grad(formula(adapters, x, ["t0"]).square().sum(), x, create_graph=True)[0]
    for got, wanted in zip(second, torch.autograd.grad(by_hand.square().sum(), leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_a_frozen_adapter_that_is_written_to_before_the_backward_is_an_error() -> None:
    adapters = make()
    x = torch.randn(3, IN, requires_grad=True)
    lora_A = adapters.parameters("t0")[0]
    for choose in (lambda: adapters.set_adapter("t0", [0.5]), lambda: adapters.set_adapter("t0")):
        choose()
        y = adapters.model(x)
        lora_A.mul_(5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    adapters.set_adapter(["t0", "t1"])  # stacked: the gradient is that of the forward that ran
    y, expected = adapters.model(x), formula(adapters, x, ["t0", "t1"])
    expected = torch.autograd.grad(expected.sum(), x)[0]
    lora_A.mul_(5)
    close(torch.autograd.grad(y.sum(), x)[0], expected)


def test_gradients_of_adapters_of_several_dtypes_are_not_rounded() -> None:
    adapters = make(ranks=(4, 3, 4), dtype=torch.float64)
    for parameter in adapters.parameters("t0"):
        parameter.data = parameter.data.float()
    adapters.train_adapter(adapters.names)
    adapters.set_adapter(adapters.names)
    x = torch.randn(5, IN, dtype=torch.float64)
    wide = Adapters(copy.deepcopy(adapters.model).double())
    adapters.model(x).square().sum().backward()
    formula(wide, x, wide.names).square().sum().backward()
    for name, tolerance in (("t0", 1e-6), ("t1", 1e-12), ("t2", 1e-12)):
        for got, wanted in zip(adapters.parameters(name), wide.parameters(name), strict=True):
            expected = wanted.grad.to(got.dtype)
            torch.testing.assert_close(got.grad, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("names", [["t0", "t1", "t2"], ["t0", "t2"]])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 3, 4)])
def test_gradients_of_several_adapters_may_be_written_to(ranks, names) -> None:
    adapters = make(ranks=ranks)
    adapters.train_adapter(names)
    adapters.set_adapter(adapters.names)
    asks = [p for p in adapters.parameters() if p.requires_grad]
    x, rate = torch.randn(5, IN), torch.tensor(0.1, requires_grad=True)
    expected = torch.autograd.grad(formula(adapters, x, adapters.names).square().sum(), asks)
    for again in (False, True):
        found = torch.autograd.grad(adapters.model(x).square().sum(), asks, create_graph=again)
        for a, b in zip([g.mul_(rate) for g in found], expected, strict=True):
            torch.testing.assert_close(a, 0.1 * b, rtol=1e-4, atol=1e-4)
    adapters.model(x).square().sum().backward()
    loss = (asks[0] * asks[0].grad).sum()
    for parameter in asks[1:]:
        parameter.grad.zero_()  # which is not to the first's
    torch.testing.assert_close(torch.autograd.grad(loss, asks[0])[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [["t0"], ["t0", "t1"]])
def test_factors_narrower_than_the_layer_was(names) -> None:
    adapters = make(dtype=torch.float64)
    adapters.set_adapter(names)
    x = torch.randn(3, IN)
    narrow = {name: p.float() for name, p in adapters.model.named_parameters()}
    y = functional_call(adapters.model, narrow, (x,))
    torch.testing.assert_close(y, formula(adapters, x.double(), names).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ids", [[0, 2, 1], [0, 0, 1]])
def test_a_batch_of_more_adapters_than_the_layer_has_is_refused(ids) -> None:
    adapters = make()
    with adapters.batch(ids):
        adapters.layers["qkv"].delete_adapter("t2")
        with pytest.raises(IndexError, match="ids were checked for 3 adapters, lora_A holds 2"):
            adapters.model(torch.randn(3, IN))


@pytest.mark.parametrize("targets", [("qkv",), ("q", "v")], ids="-".join)
def test_a_parametrization_may_differentiate_without_gradients(targets) -> None:
    class Slope(nn.Module):
        def forward(self, factor: Tensor) -> Tensor:  # of its squares: twice the factor
            with torch.enable_grad():
                leaf = factor.detach().requires_grad_()
                return torch.autograd.grad(leaf.square().sum(), leaf)[0]

    adapters, x = make(targets), torch.randn(3, IN)
    doubled = Adapters(copy.deepcopy(adapters.model))
    for handle in (adapters, doubled):
        handle.set_adapter(["t0", "t1"])
    lora_A = adapters.layers["qkv"].lora_A
    parametrize.register_parametrization(lora_A if "qkv" in targets else lora_A["q"], "t1", Slope())
    doubled.parameters("t1")[0].mul_(2)
    with torch.no_grad():
        close(adapters.model(x), doubled.model(x))
