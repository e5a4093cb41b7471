"""PEFT with and without the patch: the same results, its own errors, its own functions back afterwards."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plora_ext import ops
from plora_ext.integrations import _layers
from plora_ext.integrations import peft as integration

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'plora_ext[integrations]'")
lora = pytest.importorskip("peft.tuners.lora")

MIXED = ["one", "two", "__base__", "three", "two", "one"]


def net(width: int = 24, **config: Any) -> Any:
    """Two adapted layers with the adapters one and two of rank 4 and three of rank 3, all of them random."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width, bias=False))
    settings = {"lora_alpha": 6, "target_modules": ["0", "2"], "init_lora_weights": False, **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings), adapter_name="one")
    for name, r in (("two", 4), ("three", 3)):
        wrapped.add_adapter(name, peft.LoraConfig(r=r, **settings))
    return wrapped.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def both(model: Any, call: Callable[[Any], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of every parameter that gets one, of PEFT and of ours, from the same random state."""
    results = []
    for patched in (False, True):
        twin = copy.deepcopy(model)
        torch.manual_seed(7)
        if patched:
            with integration.patch():
                y = call(twin)
        else:
            y = call(twin)
        gradients = []
        if y.requires_grad:
            y.float().pow(2).mean().backward()
            gradients = [p.grad for p in twin.parameters() if p.grad is not None]
        results.append([y.detach(), *gradients])
    return results[0], results[1]


def same(theirs: list[Tensor], ours: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours):
        assert a.dtype == b.dtype and a.shape == b.shape
        size = max([1.0, *a.double().abs().flatten().tolist()])
        torch.testing.assert_close(b, a, rtol=0, atol=tolerance * size)


@pytest.fixture(params=["lora_sum", "_plainly"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the operator and with the plain products, whatever would take less time."""
    monkeypatch.setattr(integration, "_pays", lambda *_: request.param == "lora_sum")
    monkeypatch.setattr(
        integration, "_are_few", lambda x, pairs: request.param == "_plainly" and x.dtype == pairs[0][0].dtype
    )
    name: str = request.param
    return name


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of ours ran: a test that the host's own forward would pass as well shows nothing."""
    calls = {"lora_sum": 0, "lora_indexed": 0, "_plainly": 0, "_each": 0}

    def counting(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            y = op(*args, **kwargs)
            calls[name] += 1
            return y

        return call

    def short(*args: Any) -> Tensor | None:
        y = run_beside(*args)  # which leaves to the operators what it does not serve
        ids = args[8] if len(args) > 8 else None
        calls["lora_sum" if ids is None else "lora_indexed"] += y is not None
        return y

    for name in calls:
        owner: Any = integration if name.startswith("_") else ops
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))
    run_beside = integration.run_beside
    monkeypatch.setattr(integration, "run_beside", short)
    return calls


@pytest.mark.parametrize("shape", [(6, 5, 24), (6, 24), (0, 24), (2, 3, 4, 24)])
def test_one_adapter(shape: tuple[int, ...], counted: dict[str, int], way: str) -> None:
    same(*both(net(), lambda model: model(images(*shape))))
    assert counted[way] == sum(counted.values()) == 2


@pytest.mark.parametrize("shape", [(2, 0, 24), (0, 5, 24), (0, 3, 5, 24), (0, 24), (2, 0, 0, 24), (24,), (1, 1, 24)])
@pytest.mark.parametrize("names", [["one"], ["one", "three"]])
def test_empty_and_one_dimensional_inputs(shape: tuple[int, ...], names: list[str], counted: dict[str, int]) -> None:
    model = net()
    model.base_model.set_adapter(names)
    same(*both(model, lambda m: m(images(*shape))))
    assert sum(counted.values()) == 2
    if len(shape) > 1:
        mixed = ["two", "one", "__base__"][: shape[0]] if shape[0] else []
        same(*both(model, lambda m: m(images(*shape), adapter_names=mixed)))


@pytest.mark.parametrize("width, out", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("shape", [(2, 4), (4,), (5, 0), ()])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_inputs_or_outputs(width: int, out: int, shape: tuple[int, ...]) -> None:
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(width, out)), config)
    same(*both(model, lambda m: m(images(*shape, width))))


def test_inputs_that_are_not_contiguous() -> None:
    whole = images(24, 12, 5)
    for x in (whole.permute(1, 2, 0), whole[:, ::2].permute(1, 2, 0), whole[:, :1, 0].T.expand(6, 24), whole.T[..., :]):
        same(*both(net(), lambda m: m(x)))  # noqa: B023
        if len(x) == 6:
            same(*both(net(), lambda m: m(x, adapter_names=MIXED)))  # noqa: B023


def test_wrong_inputs_get_peft_s_own_errors() -> None:
    for x in (images(3, 23), torch.tensor(1.0), images(24).to("meta"), images(3, 24).double()):
        messages = []
        for patched in (False, True):
            with integration.patch() as patch:
                if not patched:
                    patch.restore()
                try:
                    messages.append(str(net()(x).shape))
                except RuntimeError as error:
                    messages.append(str(error))
        assert messages[0] == messages[1]


class Wrapped(torch.Tensor):
    """A weight of a class of its own, as quantized ones are: known to `F.linear` alone, which notes its inputs."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.as_subclass(Tensor) if isinstance(a, Wrapped) else a for a in args]
        if func is nn.functional.linear:
            cls.seen.append(tuple(plain[0].shape))
        elif func.__name__ not in ("__get__", "dim", "size", "as_subclass"):
            raise NotImplementedError(f"a wrapped weight knows no {func}")
        return func(*plain, **(kwargs or {}))


@pytest.mark.parametrize("names", [None, MIXED, ["two"] * 6])
def test_a_frozen_layer_of_another_kind_is_called_as_peft_calls_it(names: list[str] | None) -> None:
    keywords = {} if names is None else {"adapter_names": names}

    def call(model: Any) -> Tensor:
        base = model.base_model.model[0].base_layer
        base._parameters["weight"] = base.weight.data.as_subclass(Wrapped)
        y: Tensor = model(images(6, 5, 24), **keywords)
        return y

    Wrapped.seen.clear()
    same(*both(net(), call))
    assert Wrapped.seen == [(6, 5, 24)] * 2


@pytest.mark.parametrize("names", [None, MIXED])
@pytest.mark.parametrize("hook", ["wider", "narrower", "of another class", "broadcast"])
def test_what_hooks_make_of_the_frozen_layer_s_output(hook: str, names: list[str] | None) -> None:
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "wider": lambda y: y.double(),
        "narrower": lambda y: y.bfloat16(),
        "of another class": lambda y: y.as_subclass(Noted),
        "broadcast": lambda y: y[:, :1],
    }
    if hook == "broadcast" and names:
        pytest.skip("PEFT writes into the rows that are there")
    keywords = {} if names is None else {"adapter_names": names}

    def call(model: Any) -> Tensor:
        model.base_model.model[2].base_layer.register_forward_hook(lambda module, inputs, y: changes[hook](y))
        y: Tensor = model(images(6, 5, 24), **keywords)
        assert isinstance(y, Noted) == (hook == "of another class")
        return y.as_subclass(Tensor)

    same(*both(net(), call), 0.02 if hook == "narrower" else 1e-5)


class Noted(torch.Tensor):
    """A tensor of a class of its own that does all that tensors do."""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_inputs_are_peft_s(counted: dict[str, int]) -> None:
    x = torch.nested.nested_tensor([images(3, 24), images(5, 24)])
    model = net()
    with torch.no_grad():
        theirs = model(x)
        with integration.patch():
            ours = model(x)
    assert not sum(counted.values())
    for a, b in zip(theirs.unbind(), ours.unbind(), strict=True):
        torch.testing.assert_close(b, a)


def test_a_sparse_frozen_weight() -> None:
    def call(model: Any) -> Tensor:
        base = model.base_model.model[0].base_layer
        base._parameters["weight"] = nn.Parameter(base.weight.data.to_sparse_csr(), requires_grad=False)
        y: Tensor = model(images(6, 24))
        return y

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR")
        same(*both(net(), call))


def test_a_scale_that_is_a_tensor_is_peft_s(counted: dict[str, int]) -> None:
    model = net(target_modules=["0"])
    model.base_model.model[0].scaling["one"] = nn.Parameter(torch.tensor(2.0))
    with integration.patch():
        assert "no number" in integration.report(model).left["base_model.model.0"]
        model(images(3, 24)).sum().backward()
    assert model.base_model.model[0].scaling["one"].grad is not None and not sum(counted.values())


# ---------------------------------------------------------------------- derivatives of derivatives

ROWS = [1, 5, 48]  # on both sides of what decides between the operator and the plain products


def double(rows: int, width: int = 24) -> tuple[Any, Tensor]:
    return net(width).double().train(), images(rows, width).double().requires_grad_()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", ["one", "two", "mixed", "frozen layer too"])
def test_second_derivatives(rows: int, case: str) -> None:
    model, x = double(rows)
    model.base_model.set_adapter(["one", "three"] if case == "two" else ["one"])
    if case == "mixed":
        model.base_model.set_adapter(["one", "two", "three"])
        model.eval()
    names = {"adapter_names": [MIXED[i % 6] for i in range(rows)]} if case == "mixed" else {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or case == "frozen layer too")
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]

    def second() -> list[Tensor]:
        y = model(x, **names).pow(3).sum()
        first = torch.autograd.grad(y, parameters, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in first if g is not None)
        found = torch.autograd.grad(total, parameters, allow_unused=True)  # type: ignore[arg-type]
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]

    theirs = second()
    assert sum(bool(g.abs().max() > 1e-3) for g in theirs) > 3
    with integration.patch():
        same(theirs, second(), 1e-9)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("names", [["one"], ["one", "three"]])
def test_forward_mode(rows: int, train: bool, names: list[str]) -> None:
    model, x = double(rows)
    model.base_model.set_adapter(names)
    model.requires_grad_(train)
    direction = torch.randn_like(x)

    def derivative() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x.detach(), direction))
            tangent: Tensor = torch.autograd.forward_ad.unpack_dual(y).tangent
            return tangent.detach()

    theirs = derivative()
    assert theirs.abs().max() > 0.1
    with integration.patch():
        same([theirs], [derivative()], 1e-9)
        same([theirs], [torch.func.jvp(lambda x: model(x), (x.detach(),), (direction,))[1].detach()], 1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("names", [MIXED, ["two"] * 6])
def test_a_checkpointed_mixed_batch_is_not_computed_again_as_another(names: list[str], reentrant: bool) -> None:
    model, x = net().train(), images(6, 5, 24).requires_grad_()
    inner = model.base_model.model
    inner.forward = lambda x: checkpoint(lambda x: nn.Sequential.forward(inner, x), x, use_reentrant=reentrant)
    error = "train a mixed batch without it" if reentrant else "number of tensors|Recomputed"
    with integration.patch():
        y = model(x, adapter_names=names)
        with pytest.raises(RuntimeError, match=error):
            y.sum().backward()
        model(x).sum().backward()


@pytest.mark.parametrize("train", [False, True])
def test_several_active_adapters_are_summed(train: bool, counted: dict[str, int], way: str) -> None:
    model = net()
    model.base_model.set_adapter(["one", "three", "two"])
    same(*both(model.train(train), lambda model: model(images(4, 5, 24))))
    assert counted[way] == 2


def test_the_input_gets_its_gradient() -> None:
    x = images(3, 24).requires_grad_()
    model = net()
    (theirs,) = torch.autograd.grad(model(x).sum(), x)
    with integration.patch():
        (ours,) = torch.autograd.grad(model(x).sum(), x)
    same([theirs], [ours])


@pytest.mark.parametrize("shape", [(6, 5, 24), (6, 24)])
def test_mixed_batch(shape: tuple[int, ...], counted: dict[str, int], way: str) -> None:
    same(*both(net(), lambda model: model(images(*shape), adapter_names=MIXED)))
    assert counted["_each" if way == "_plainly" else "lora_indexed"] == sum(counted.values()) == 2
    same(*both(net(), lambda model: model(images(*shape), adapter_names=["two"] * 6)))
    assert counted[way] == 2
    base_only = both(net(), lambda model: model(images(*shape), adapter_names=["__base__"] * 6))
    same(*base_only)


def test_a_mixed_batch_trains_each_sample_its_own_adapter() -> None:
    model, x = net().train(), images(6, 5, 24)
    model.base_model.set_adapter(["one", "two", "three"])
    with pytest.raises(ValueError, match="training mode"):
        model(x, adapter_names=MIXED)
    with integration.patch():
        y = model(x, adapter_names=MIXED)
    assert model.base_model.training
    y.square().sum().backward()
    for name in ("one", "two", "three"):  # what a batch of that adapter alone would give
        alone = net().train()
        alone.base_model.set_adapter(name)
        rows = [i for i, other in enumerate(MIXED) if other == name]
        alone(x[rows]).square().sum().backward()
        for layer, other in zip(model.base_model.model[::2], alone.base_model.model[::2]):
            for mine, its in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
                torch.testing.assert_close(mine[name].weight.grad, its[name].weight.grad, rtol=1e-4, atol=1e-5)
    with integration.patch():
        integration.unpatch()
        with integration.patch(train_mixed_batches=False), pytest.raises(ValueError, match="training mode"):
            model(x, adapter_names=MIXED)


@pytest.mark.parametrize("train", [False, True])
def test_a_mixed_batch_that_fails_leaves_no_names_behind(train: bool) -> None:
    model, x = net().train(train), images(6, 24)
    expected = model(x)

    def fail(*_: Any) -> None:
        raise MemoryError

    with integration.patch():
        hook = model.base_model.model[1].register_forward_hook(fail)
        with pytest.raises(MemoryError):
            model(x, adapter_names=["__base__"] * 6)
        hook.remove()
        assert model.base_model.training == train
        torch.testing.assert_close(model(x), expected)


def test_peft_s_own_errors() -> None:
    def errors() -> list[str]:
        model, x, messages = net(), images(6, 24), []
        for names, merged in ((["one"] * 5 + ["nine"], False), (["one"], False), (MIXED, True)):
            if merged:
                model.merge_adapter(["one"])
            try:
                model(x, adapter_names=names)
            except ValueError as error:
                messages.append(str(error))
        return messages

    theirs = errors()
    with integration.patch():
        assert errors() == theirs
    assert "merged adapters" in theirs[-1] and "same as the number of inputs" in theirs[-2]
    if len(theirs) == 3:  # PEFT before 0.14 takes an unknown name for the base model
        assert "nine" in theirs[0]


def test_dropout_drops_what_peft_drops() -> None:
    model = net(lora_dropout=0.5).train()
    same(*both(model, lambda model: model(images(6, 24))))
    model.base_model.set_adapter(["one", "two"])  # each its own mask
    same(*both(model, lambda model: model(images(6, 24))))
    same(*both(model.eval(), lambda model: model(images(6, 24))))
    model.add_adapter("new", peft.LoraConfig(r=4, target_modules=["0", "2"], lora_dropout=0.5, init_lora_weights=False))
    names = ["one", "one", "new", "one", "new", "one"]  # of a model in eval mode: PEFT leaves its dropout in training
    same(*both(model, lambda model: model(images(6, 24), adapter_names=names)))
    with integration.patch():  # in a mixed batch the frozen layer sees x itself, dropped rows are the adapters'
        x, model = images(6, 24), net(lora_dropout=0.999999).train()
        with model.disable_adapter():
            base = model(x)
        torch.testing.assert_close(model(x, adapter_names=MIXED), base)


@pytest.mark.parametrize(
    ("weights", "adapters", "autocast", "tolerance"),
    [
        (torch.bfloat16, torch.bfloat16, False, 0.02),
        (torch.bfloat16, torch.float32, False, 0.01),  # PEFT's default: adapters are kept in float32
        (torch.float32, torch.float32, True, 0.02),
        (torch.float64, torch.float64, False, 1e-12),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_dtypes(
    weights: torch.dtype, adapters: torch.dtype, autocast: bool, tolerance: float, mixed: bool, counted: dict[str, int]
) -> None:
    model = net().to(weights)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)

    def call(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y: Tensor = (
                model(images(6, 5, 24).to(weights), adapter_names=MIXED)
                if mixed
                else model(images(6, 5, 24).to(weights))
            )
        return y

    same(*both(model, call), tolerance)
    assert sum(counted.values()) == 2


@pytest.mark.parametrize("names", [None, MIXED])
def test_a_wide_model_with_narrow_adapters_keeps_its_bits(names: list[str] | None) -> None:
    model = net().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (parameter.data * ("lora_A" in name)).to(torch.bfloat16)
    keywords = {} if names is None else {"adapter_names": names}
    same(*both(model, lambda model: model(images(6, 24), **keywords)))


def test_the_operator_runs_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for rows, adapters, dtype, pays in (
        (1023, 1, torch.float32, False), (1024, 1, torch.float32, True), (256, 4, torch.float32, True),
        (4096, 3, torch.bfloat16, False), (1, 4, torch.bfloat16, True),
    ):  # fmt: skip
        pairs = [(torch.zeros(2, 8, dtype=dtype), torch.zeros(8, 2, dtype=dtype), None, 1.0)] * adapters
        x = torch.zeros(rows, 8, dtype=dtype)
        assert integration._pays(x, pairs, autocast=False) is pays, (rows, adapters, dtype)
        assert integration._are_few(x, pairs) is False
    pairs = [(torch.zeros(2, 8), torch.zeros(8, 2), None, 1.0)] * 8
    assert integration._are_few(torch.zeros(127, 8), pairs)
    assert not integration._are_few(torch.zeros(127, 8), pairs + pairs[:1])
    for rows, pays in ((682, False), (683, True)):  # 2^20 elements of x and y
        x, A, B = (torch.zeros(*shape, device="meta") for shape in ((rows, 768), (16, 768), (768, 16)))
        assert integration._pays(x, [(A, B, None, 1.0)], autocast=False) is pays


def test_biases_and_scales() -> None:
    if not hasattr(peft.LoraConfig(), "lora_bias"):
        pytest.skip("this PEFT has no lora_bias")
    model = net(lora_bias=True, use_rslora=True, target_modules=["0"])
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for call in (lambda m: m(images(6, 24)), lambda m: m(images(6, 24), adapter_names=MIXED)):
        same(*both(model, call), 1e-4)
        model.base_model.model[0].set_scale("one", 3.0)  # a scale that changes is seen


def test_disable_merge_unmerge() -> None:
    model, x = net(), images(6, 24)
    plain = model(x)
    with integration.patch():
        with model.disable_adapter():
            base = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():  # PEFT unmerges here
            torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)


def test_save_pretrained_writes_the_same_files(tmp_path: Path) -> None:
    model = net()
    model.save_pretrained(tmp_path / "theirs")
    with integration.patch():
        model(images(2, 24))
        model.save_pretrained(tmp_path / "ours")
    files = sorted(path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*") if path.is_file())
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        assert (tmp_path / "theirs" / path).read_bytes() == (tmp_path / "ours" / path).read_bytes()


def test_hooks_on_the_frozen_layer_and_on_the_factors_run(counted: dict[str, int], way: str) -> None:
    model, seen = net(), []
    model.base_model.model[0].base_layer.register_forward_hook(lambda *_: seen.append("base"))
    same(*both(model, lambda m: m(images(6, 24))))
    assert seen.count("base") == 2 and counted[way] == 2
    model.base_model.model[2].lora_A["one"].register_forward_hook(lambda *_: seen.append("A"))
    same(*both(model, lambda m: m(images(6, 24))))
    assert seen.count("A") == 2 and counted[way] == 3  # the second layer is PEFT's now


def test_dora_stays_peft_s(counted: dict[str, int]) -> None:
    model = net(use_dora=True)
    same(*both(model, lambda m: m(images(6, 24))), 0.0)
    assert not sum(counted.values())
    with integration.patch():
        report = integration.report(model)
        with pytest.raises(ValueError, match="DoRA"):
            model(images(6, 24), adapter_names=MIXED)
    assert not report.replaced and "variant" in report.left["base_model.model.0"]


def test_a_report_names_layers_of_other_kinds() -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0", "1"])
    )
    tokens = torch.tensor([[1, 2]])
    with integration.patch() as patch:
        report = integration.report(model)
        model(tokens)
    assert report.replaced == ["base_model.model.1"]
    assert "Embedding" in report.left["base_model.model.0"] and "DoRA" in str(patch)


def test_compiled_models_are_peft_s(counted: dict[str, int], way: str) -> None:
    model = net()
    with integration.patch():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(images(6, 24)), model(images(6, 24)), rtol=1e-4, atol=1e-5)
    assert counted[way] == 2  # those of the eager model


def test_patch_and_unpatch() -> None:
    theirs = lora.Linear.forward, lora.LoraModel._enable_peft_forward_hooks
    first = integration.patch()
    ours = lora.Linear.forward
    assert ours is not theirs[0]
    with integration.patch() as second:  # nothing more, and nothing less at the end
        assert lora.Linear.forward is ours and second.report is first.report
    assert lora.Linear.forward is ours
    integration.unpatch()
    assert (lora.Linear.forward, lora.LoraModel._enable_peft_forward_hooks) == theirs
    integration.unpatch()
    with pytest.raises(RuntimeError, match="inside"), integration.patch():
        raise RuntimeError("inside")
    assert (lora.Linear.forward, lora.LoraModel._enable_peft_forward_hooks) == theirs


def test_a_version_without_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(lora.LoraModel, "_enable_peft_forward_hooks")
    with pytest.warns(UserWarning, match="_enable_peft_forward_hooks") as caught, integration.patch() as patch:
        assert patch.report.replaced == ["peft.tuners.lora.layer:Linear.forward"]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integration.unpatch()


@pytest.mark.parametrize(
    "version, warns", [("0.11.1", 1), ("0.12.0", 0), ("0.21.9", 0), ("0.22.0.dev0", 1), ("1.0", 1)]
)
def test_a_version_that_was_not_tested(version: str, warns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with integration.patch(), integration.patch():
            pass
    assert len(caught) == warns
    for warning in caught:
        assert f"tested with peft 0.12 to 0.21, this is {version}" in str(warning.message)
        assert warning.filename == __file__


def test_a_version_whose_functions_take_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor, scale: float, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def hooks(self: Any, names: Any, **kwargs: Any) -> Any:
        return None

    theirs = lora.Linear.forward
    with monkeypatch.context() as patched:
        patched.setattr(lora.Linear, "forward", forward)
        message = r"\(self, x, scale, \*args, \*\*kwargs\) here, .* for \(self, x, \*args, \*\*kwargs\).*0\.12 to 0\.21"
        with pytest.raises(TypeError, match=f"forward takes {message}"):
            integration.patch()
    monkeypatch.setattr(lora.LoraModel, "_enable_peft_forward_hooks", hooks)
    with pytest.raises(TypeError, match="_enable_peft_forward_hooks takes"):
        integration.patch()
    assert lora.Linear.forward is theirs  # nothing is half patched
    monkeypatch.undo()
    with integration.patch() as patch:
        assert len(patch.report.replaced) == 2


def test_unpatching_below_somebody_else_s_patch() -> None:
    theirs = lora.Linear.forward, lora.LoraModel._enable_peft_forward_hooks
    model, x = net(), images(6, 24)
    expected = model(x)
    integration.patch()
    ours = lora.Linear.forward

    def doubled(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * ours(self, x, *args, **kwargs)

    lora.Linear.forward = doubled
    twice = model(x)
    assert (twice - expected).abs().max() > 0.1
    with pytest.warns(UserWarning, match=r"Linear\.forward was replaced again after peft .* undo that first") as caught:
        integration.unpatch()
    assert len(caught) == 1 and lora.Linear.forward is doubled and torch.equal(model(x), twice)
    assert lora.LoraModel._enable_peft_forward_hooks is not theirs[1]  # all or nothing
    lora.Linear.forward = ours
    integration.unpatch()
    assert (lora.Linear.forward, lora.LoraModel._enable_peft_forward_hooks) == theirs
    assert torch.equal(model(x), expected)


def test_values_of_a_captured_graph_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing, made = [False], []
    monkeypatch.setattr(_layers, "_is_capturing", lambda device: capturing[0])

    @_layers.kept_on_device
    def squares(n: int, device: torch.device) -> Tensor:
        made.append(n)
        return torch.arange(n, device=device) ** 2

    cpu = torch.device("cpu")
    first = squares(3, cpu)
    assert first.tolist() == [0, 1, 4] and squares(3, cpu) is first and made == [3]
    capturing[0] = True
    assert squares(3, cpu) is first
    with pytest.raises(RuntimeError, match=r"squares\(4,\) is not on cpu yet.*call the model once"):
        squares(4, cpu)
    capturing[0] = False
    address = first.data_ptr()
    del first
    for n in range(10, 5010):  # more than are remembered
        squares(n % 4500 + 5, cpu)
    assert made.count(3) == 1
    kept = [t for t in gc.get_objects() if type(t) is Tensor and t.data_ptr() == address]
    assert len(kept) == 1 and kept[0].tolist() == [0, 1, 4]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("names", [None, MIXED])
def test_a_captured_graph(names: list[str] | None) -> None:
    model, keywords = net().cuda(), {} if names is None else {"adapter_names": names}
    x = images(6, 24).cuda()
    with torch.no_grad(), integration.patch():
        graph = torch.cuda.CUDAGraph()
        model(x, **keywords)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = model(x, **keywords)
        x.copy_(images(6, 24).flip(0))
        graph.replay()
        torch.testing.assert_close(y, model(x, **keywords))
