"""PEFT with and without the patch: the same results, its own errors, its own functions back afterwards."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plora_ext import ops
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
        integration, "_are_few", lambda x, factors: request.param == "_plainly" and x.dtype == factors[0].dtype
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
            calls[name] += y is not None  # `run_one` leaves to `lora_sum` what it does not serve
            return y

        return call

    for name in calls:
        owner: Any = integration if name.startswith("_") else ops
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))
    monkeypatch.setattr(integration, "run_one", counting("lora_sum", integration.run_one))
    return calls


@pytest.mark.parametrize("shape", [(6, 5, 24), (6, 24), (0, 24), (2, 3, 4, 24)])
def test_one_adapter(shape: tuple[int, ...], counted: dict[str, int], way: str) -> None:
    same(*both(net(), lambda model: model(images(*shape))))
    assert counted[way] == sum(counted.values()) == 2


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
        factors = [torch.zeros(2, 8, dtype=dtype), torch.zeros(8, 2, dtype=dtype)] * adapters
        x = torch.zeros(rows, 8, dtype=dtype)
        assert integration._pays(x, factors, autocast=False) is pays, (rows, adapters, dtype)
        assert integration._are_few(x, factors) is False
    factors = [torch.zeros(2, 8), torch.zeros(8, 2)] * 8
    assert integration._are_few(torch.zeros(127, 8), factors)
    assert not integration._are_few(torch.zeros(127, 8), factors + factors[:2])
    for rows, pays in ((682, False), (683, True)):  # 2^20 elements of x and y
        x, A, B = (torch.zeros(*shape, device="meta") for shape in ((rows, 768), (16, 768), (768, 16)))
        assert integration._pays(x, [A, B], autocast=False) is pays


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
