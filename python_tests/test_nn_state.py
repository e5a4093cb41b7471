"""What adapted layers share and stand beside: threads, recomputation, hooks of the frozen layer, dtypes, state."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from plora_ext.io import load_adapter, save_adapter
from plora_ext.nn import Adapters, CosineHead, Ensemble, MultiLoRALinear, PrototypeBank, SubspaceHead, inject


def make(names: str = "ab", dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> Adapters:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).to(device, dtype)
    adapters = inject(model, ["0", "2"], r=2, **options)
    for name in names:
        adapters.add_adapter(name)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(0, 0.3)
    return adapters


def formula(adapters: Adapters, x: Tensor, coefficients: dict[str, float]) -> Tensor:
    for i, layer in enumerate(adapters.layers.values()):
        y = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
        for name, c in coefficients.items():
            s = c * layer.lora_alpha[name] / layer.r[name]
            y = y + s * (x @ layer.lora_A[name].T.to(x)) @ layer.lora_B[name].T.to(x)
        x = y if i else torch.tanh(y)
    return x


# ---------------------------------------------------------------------- threads


def test_threads_keep_to_their_own_batch() -> None:
    adapters, x = make(), torch.randn(3, 6)
    expected = {name: formula(adapters, x, {name: 1.0}) for name in "ab"} | {"off": formula(adapters, x, {})}
    common, barrier = formula(adapters, x, {"b": 1.0}), threading.Barrier(4)
    adapters.set_adapter("b")
    adapters.model.eval()
    ensemble = Ensemble(adapters)
    ensemble(x)
    both = torch.stack([expected["a"], expected["b"]])

    @torch.no_grad()
    def within(name: str) -> int:
        good = 0
        for _ in range(50):
            barrier.wait()
            if name == "both":
                good += torch.allclose(ensemble(x), both, atol=1e-5)
                continue
            with adapters.disabled() if name == "off" else adapters.batch([name] * 3):
                good += torch.allclose(adapters.model(x), expected[name], atol=1e-5)
            good += torch.allclose(adapters.model(x), common, atol=1e-5)
        return good

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(within, ["a", "b", "off", "both"])) == [100, 100, 100, 50]
    assert adapters.active == ["b"] and torch.allclose(adapters.model(x), common, atol=1e-5)


def test_a_thread_outside_of_the_block_sees_the_common_set() -> None:
    adapters, x = make(), torch.randn(3, 6)
    before = adapters.frozen()
    with adapters.batch(["a"] * 3), ThreadPoolExecutor(1) as pool:
        assert torch.allclose(pool.submit(adapters.model, x).result(), formula(adapters, x, {"b": 1.0}), atol=1e-6)
        assert torch.allclose(pool.submit(before, x).result(), formula(adapters, x, {"b": 1.0}), atol=1e-6)
        assert torch.allclose(adapters.model(x), formula(adapters, x, {"a": 1.0}), atol=1e-6)
        with pytest.raises(RuntimeError, match=r"cannot be merged inside of Adapters\.batch or disabled"):
            adapters.merge()


def test_a_handle_on_a_part_leaves_what_was_frozen_as_it_was() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))), torch.randn(3, 6)
    adapters = inject(model, ["0"], r=2)  # both layers
    adapters.add_adapter("a")
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    before = adapters.frozen()
    y = before(x)
    Adapters(model[1]).set_adapter(None)
    assert torch.equal(before(x), y)
    parts = nn.ModuleDict({name: nn.Sequential(nn.Linear(6, 6)) for name in "pq"})
    for part in parts.values():
        inject(part, ["0"], r=2).add_adapter("a")
    whole = Adapters(parts)
    assert len({layer._number for layer in whole.layers.values()}) == 2
    whole.set_adapter(None)
    assert not parts["q"][0]._state.current.names


def test_a_handle_on_a_part_does_not_change_what_the_whole_has() -> None:
    """It merged its own layers alone and left the others without adapters, or gave layers other adapters by one id."""
    adapters, x = make(), torch.randn(3, 6)
    y, part = adapters.model(x).detach(), Adapters(adapters.model[2])
    for call in (
        lambda: part.merge(),
        lambda: part.merged().__enter__(),
        lambda: part.add_adapter("new"),
        lambda: part.fuse(["a", "b"]),
        lambda: part.delete_adapter("a"),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match="on 1 of the 2 layers that share their adapters"):
            call()
    assert torch.equal(adapters.model(x), y)
    adapters.merge()
    for call in (part.unmerge, lambda: part.unload(merge=False)):  # the others' adapters would count twice
        with pytest.raises(RuntimeError, match="on 1 of the 2 layers that share their adapters"):
            call()
    torch.testing.assert_close(adapters.model(x), y)
    adapters.unmerge()
    assert torch.equal(adapters.model(x), y)
    with torch.no_grad():
        adapters.layers["0"].pairs("a")[0][0].fill_(torch.nan)
    adapters.train_adapter(None)
    adapters._state.unchecked.add("a")
    for handle in (part, adapters):  # a look at the part found it finite, for the whole too
        with pytest.raises(ValueError, match="adapter 'a' holds inf or NaN"), handle.batch(["a", "b", "a"]):
            pass
    for copied in (copy.deepcopy(adapters.model[2]), pickle.loads(pickle.dumps(adapters.model))):
        whole = Adapters(copied)
        whole.merge()
        whole.unmerge()
    parts = nn.ModuleDict({name: nn.Sequential(nn.Linear(6, 6)) for name in "pq"})
    handles = {name: inject(part, ["0"], r=2) for name, part in parts.items()}
    for name, names in (("p", "ab"), ("q", "ba")):
        for adapter in names:
            handles[name].add_adapter(adapter)
    with pytest.raises(ValueError, match=r"same order, got \['a', 'b'\] in 'p.0' and \['b', 'a'\] in 'q.0'"):
        Adapters(parts)
    handles["q"].delete_adapter("b")
    handles["q"].add_adapter("b")
    whole = Adapters(parts)
    handles["q"].set_adapter(["a", "b"])  # the handle of before
    assert whole.active == parts["q"][0].active_adapters == ["a", "b"]


def test_an_adapter_is_in_all_layers_or_in_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory ran out, it was in some, neither to be used nor to be added or deleted."""
    adapters, x = make(), torch.randn(3, 6)
    save_adapter(adapters, tmp_path, "a")
    y, state = adapters.model(x), set(adapters.model.state_dict())
    add = MultiLoRALinear.add_adapter

    def fail(self: MultiLoRALinear, name: str, pairs: Any, lora_alpha: float) -> None:
        if self is adapters.layers["2"]:
            self.lora_A[name] = nn.Parameter(pairs[0][0])
            raise torch.OutOfMemoryError
        add(self, name, pairs, lora_alpha)

    for call in (
        lambda: adapters.add_adapter("new"),
        lambda: adapters.add_adapter("new", init_from="a"),
        lambda: adapters.fuse(["a", "b"], name="new"),
        lambda: load_adapter(adapters, tmp_path, "new"),
    ):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(MultiLoRALinear, "add_adapter", fail)
            call()
        assert adapters.names == ["a", "b"] and set(adapters.model.state_dict()) == state
        call()
        adapters.delete_adapter("new")
    adapters.set_adapter("b")
    assert torch.equal(adapters.model(x), y)


def test_asyncio_tasks_keep_to_their_own_batch() -> None:
    adapters, x = make(), torch.randn(3, 6)

    async def serve(name: str) -> bool:
        with adapters.batch([name] * 3):
            await asyncio.sleep(0.01 if name == "a" else 0.02)
            return torch.allclose(adapters.model(x), formula(adapters, x, {name: 1.0}), atol=1e-6)

    async def all_at_once() -> list[bool]:
        return await asyncio.gather(*[serve(name) for name in "abab"])

    assert asyncio.run(all_at_once()) == [True] * 4


def test_a_choice_made_inside_of_a_block_holds_after_it() -> None:
    adapters, x = make(), torch.randn(3, 6)
    with adapters.batch([0, 0, 1]):
        adapters.set_adapter("a")
        assert torch.allclose(adapters.model(x)[2], formula(adapters, x, {"b": 1.0})[2], atol=1e-6)
    assert torch.allclose(adapters.model(x), formula(adapters, x, {"a": 1.0}), atol=1e-6)


def test_data_parallel_is_refused() -> None:
    adapters = make()
    replica = adapters.model[0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(torch.randn(3, 6))


def test_adapters_that_a_distributed_model_does_not_know_are_said(tmp_path: Path) -> None:
    """Each process trained them by itself, without a word."""
    adapters = make("a")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        handle = Adapters(nn.parallel.DistributedDataParallel(adapters.model))
        for change in (lambda: handle.add_adapter("b"), lambda: handle.train_adapter("a")):
            with pytest.warns(UserWarning, match="wrap the model anew, now that"):
                change()
        handle.train_adapter(None)
    finally:
        torch.distributed.destroy_process_group()


def test_parts_that_were_injected_apart_keep_what_they_compute() -> None:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(6, 6)) for _ in range(2)]
    model, x = nn.Sequential(*parts), torch.randn(3, 6)
    first, second = (inject(part, ["0"], r=2) for part in parts)
    for part in (first, second):
        part.add_adapter("a")
        for parameter in part.parameters():
            nn.init.normal_(parameter)
    second.set_adapter("a", [0.5])
    y = model(x)
    with pytest.raises(ValueError, match=r"the same active set, got \['a'\] and \['a'\]"):
        Adapters(model)
    first.set_adapter("a", [0.5])
    y = model(x)
    for part in (first, second):
        part.merge()
        with pytest.raises(RuntimeError, match=r"injected apart are merged: unmerge\(\) each"):
            Adapters(model)
        part.unmerge()
    with torch.no_grad():
        second.parameters()[0].fill_(torch.nan)
    first._state.unchecked.clear()
    adapters = Adapters(model)
    with pytest.raises(ValueError, match="holds inf or NaN"), torch.no_grad(), adapters.batch([0, -1, 0]):
        pass
    with torch.no_grad():
        second.parameters()[0].normal_()
    assert adapters.active == ["a"] and second._state is first._state and y.shape == model(x).shape


def test_coefficients_that_train_may_be_on_another_device() -> None:
    model = nn.Sequential(nn.Linear(6, 6)).to("meta")
    adapters, c = inject(model, ["0"], r=2), nn.Parameter(torch.ones(1))
    adapters.add_adapter("a")
    adapters.set_adapter("a", c)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        c.fill_(3.0)  # as an optimizer does
    x, (A, B), base = torch.randn(4, 6), model[0].pairs("a")[0], model[0].base_layer
    torch.testing.assert_close(model(x), base(x) + 3 * (x @ A.T) @ B.T)
    assert torch.autograd.grad(model(x).sum(), c)[0] != 0


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_adapters_narrower_than_the_weight_do_not_round_it(narrow: torch.dtype) -> None:
    adapters = make("a")
    for parameter in adapters.parameters():
        parameter.data = parameter.data.to(narrow)
    for layer in adapters.layers.values():
        ((A, B),) = layer.pairs("a")
        expected = layer.base_layer.weight.double() + B.double() @ A.double()
        torch.testing.assert_close(layer.weight, expected.float())


def test_a_state_that_was_saved_merged_is_loaded_with_a_warning() -> None:
    adapters, x = make(), torch.randn(3, 6)
    other, y = make(), adapters.model(x)
    adapters.merge()
    state = copy.deepcopy(adapters.model.state_dict())
    adapters.unmerge()
    with pytest.warns(UserWarning, match="would count twice"):
        other.model.load_state_dict(state)
    assert not torch.allclose(other.model(x), y, atol=1e-3)
    other.set_adapter(None)
    torch.testing.assert_close(other.model(x), y)
    other.model.load_state_dict(adapters.model.state_dict())  # without one


# ---------------------------------------------------------------------- activation checkpointing

Change = Callable[[Adapters], Any]


def gradients(adapters: Adapters, changes: list[Change], **how: Any) -> list[Tensor]:
    """Of a loss of one forward after each change, the backward pass after the last one."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = torch.zeros(())
    for change in changes:
        change(adapters)
        y = checkpoint(adapters.model, x, **how) if how else adapters.model(x)
        loss = loss + y.square().sum()
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in adapters.parameters()]
    for parameter in adapters.parameters():
        parameter.grad = None
    return grads


def choose(*args: Any) -> Change:
    return lambda adapters: adapters.set_adapter(*args)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        [choose("a"), choose("b")],
        [choose(["a", "b"]), choose(["a", "b"], [0.2, 0.2])],
        [choose(["a", "b"], [1.0, 0.1]), choose(["b", "a"], [1.0, 0.1])],
        [choose(["a", "b"], torch.tensor([1.0, 0.1])), choose(["a", "b"], torch.tensor([0.1, 1.0]))],
        [choose("a"), choose(None)],
        [choose(None), choose("a")],
    ],
    ids=["names", "coefficients", "order", "tensors", "to none", "from none"],
)
def test_other_adapters_at_recomputation_are_an_error(reentrant, changes) -> None:
    adapters = make()
    adapters.train_adapter(["a", "b"])
    error = "use_reentrant=False" if reentrant else "Recomputed values|different number of tensors"
    with pytest.raises(RuntimeError, match=error):
        gradients(adapters, changes, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_same_adapters_at_recomputation_are_right(reentrant) -> None:
    adapters = make()
    adapters.train_adapter(["a", "b"])
    for changes in ([choose("a")], [choose(["a", "b"], [0.5, 2.0])] * 2, [choose("b")]):
        expected = gradients(adapters, changes)
        for a, b in zip(gradients(adapters, changes, use_reentrant=reentrant), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_was_frozen_is_not_computed_again_from_the_base_alone(reentrant) -> None:
    adapters, x = make(), torch.randn(4, 6, requires_grad=True)
    model = nn.Sequential(adapters.model)
    model.forward = lambda x: checkpoint(model[0], x, use_reentrant=reentrant)
    frozen = Adapters(model).frozen()
    adapters.set_adapter(None)
    y = frozen(x)
    with pytest.raises(RuntimeError, match="use_reentrant=False" if reentrant else "different number of tensors"):
        y.sum().backward()


def test_a_checkpointed_pass_without_gradients_may_have_other_adapters() -> None:
    adapters, x = make(), torch.randn(4, 6, requires_grad=True)
    for change in (choose(None), choose("a")):
        change(adapters)
        with torch.no_grad():
            checkpoint(adapters.model, x, use_reentrant=True)
    expected = gradients(adapters, [choose("b")])
    for got, wanted in zip(gradients(adapters, [choose("b")], use_reentrant=True), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_nested_checkpoints_compare_with_the_outermost_forward() -> None:
    adapters, x = make(), torch.randn(4, 6, requires_grad=True)
    inner = lambda x: checkpoint(adapters.model, x, use_reentrant=True)  # noqa: E731
    expected = torch.autograd.grad(adapters.model(x).sum(), x)[0]
    checkpoint(inner, x, use_reentrant=True).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    y = checkpoint(inner, x, use_reentrant=True)
    adapters.set_adapter("a")
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()


def test_adapters_switched_off_at_recomputation_are_an_error() -> None:
    adapters = make()
    y = checkpoint(adapters.model, torch.randn(4, 6, requires_grad=True), use_reentrant=False)
    with adapters.disabled(), pytest.raises(RuntimeError, match="Recomputed|different number of tensors"):
        y.sum().backward()
    with adapters.batch([0, 1, 1, -1]):
        y = checkpoint(adapters.model, torch.randn(4, 6, requires_grad=True), use_reentrant=False)
    with adapters.batch([1, 1, 1, -1]), pytest.raises(RuntimeError, match="Recomputed"):
        y.sum().backward()


def test_a_checkpointed_layer_may_be_written_to() -> None:
    adapters = make()
    model = nn.Sequential(adapters.model, nn.ReLU(inplace=True))
    x = torch.randn(4, 6, requires_grad=True)
    got = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(model(x).sum(), x)[0])


# ---------------------------------------------------------------------- a frozen layer that is not plain is called


def one(**options: Any) -> tuple[nn.Sequential, Callable[[], Adapters]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))

    def adapt() -> Adapters:
        adapters = inject(model, ["0"], r=2, **options)
        adapters.add_adapter("a")
        return adapters

    return model, adapt


def add_forward(layer: nn.Module) -> None:
    before = layer.forward
    layer.forward = lambda x: before(x) + 1


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(lambda module, args, y: y + 1),
    "forward pre": lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "instance forward": add_forward,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_the_frozen_layer_run(kind, when) -> None:
    model, adapt = one()
    x, plain = torch.randn(5, 4), copy.deepcopy(model)
    HOOKS[kind](plain[0])
    if when == "before":
        HOOKS[kind](model[0])
    adapters = adapt()
    if when == "after":
        HOOKS[kind](model[0].base_layer)
    expected = plain(x)
    for use in (lambda: model(x), lambda: Ensemble(adapters)(x)[0], lambda: adapters.frozen()(x)):
        for train in ("a", None):  # B is zero: the adapter changes nothing
            adapters.train_adapter(train)
            for training in (True, False):
                adapters.model.train(training)
                if training and use.__code__.co_names[:1] == ("Ensemble",):
                    continue
                torch.testing.assert_close(use(), expected)
    with adapters.batch([0, -1, 0, 0, 0]):
        torch.testing.assert_close(model(x), expected)
    with adapters.disabled():
        torch.testing.assert_close(model(x), expected)
    nn.init.normal_(adapters.parameters("a")[1])
    difference = (x @ adapters.parameters("a")[0].T) @ adapters.parameters("a")[1].T
    torch.testing.assert_close(model(x), expected + difference)
    adapters.merge()
    twice = 2 if kind == "forward pre" else 1
    torch.testing.assert_close(model(x), expected + twice * difference)


def test_backward_and_global_hooks_run() -> None:
    model, adapt = one()
    seen: list[str] = []
    model[0].register_full_backward_hook(lambda *args: seen.append("backward"))
    adapt()
    model(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert seen == ["backward"]
    model, adapt = one()
    adapt()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.append("Linear") if type(module) is nn.Linear else None
    )
    try:
        model(torch.randn(3, 4))
    finally:
        handle.remove()
    assert seen == ["backward", "Linear"]


def test_a_weight_that_is_a_tensor_of_another_kind_is_left_to_its_layer() -> None:
    class Kind(Tensor):
        pass

    model, adapt = one()
    adapters = adapt()
    nn.init.normal_(adapters.parameters("a")[1])
    x = torch.randn(3, 4)
    expected = model(x)
    weight = model[0].base_layer.weight
    model[0].base_layer.weight = nn.Parameter(weight.detach().as_subclass(Kind), requires_grad=False)
    torch.testing.assert_close(Tensor.as_subclass(model(x), Tensor), expected)
    with pytest.raises(RuntimeError, match=r"sharded, quantised or offloaded \(it is (Kind|Parameter)"):
        adapters.merge()
    assert not model[0].merged and adapters._state.merged is None


@pytest.mark.parametrize("change", [prune.random_unstructured, spectral_norm])
def test_a_weight_that_is_computed_at_every_forward_is_not_merged_into(change: Callable[..., nn.Module]) -> None:
    """What was written there was gone with the next forward, and the model without its adapters."""
    adapters, x = make(), torch.randn(3, 6)
    base = adapters.layers["0"].base_layer
    change(base, "weight", **({"amount": 0.5} if change is prune.random_unstructured else {}))
    adapters.model.eval()
    y = adapters.model(x)
    torch.testing.assert_close(y, formula(adapters, x, {"b": 1.0}))
    for call in (adapters.merge, lambda: adapters.merged().__enter__(), adapters.frozen, adapters.unload):
        with torch.no_grad(), pytest.raises(RuntimeError, match="that a hook or a parametrization computes"):
            call()
        assert torch.equal(adapters.model(x), y)
    if change is prune.random_unstructured:
        prune.remove(base, "weight")
        torch.testing.assert_close(adapters.unload()(x), y)


def test_a_frozen_model_of_one_dtype_has_weights_of_its_own() -> None:
    adapters, x = make(dtype=torch.bfloat16), torch.randn(3, 6, dtype=torch.bfloat16)
    adapters.set_adapter(None)
    with torch.no_grad(), torch.autocast("cpu"):
        before = adapters.frozen()
        y = before(x)
        adapters.set_adapter("a")
        with adapters.merged():
            assert torch.equal(before(x), y) and not torch.equal(adapters.model(x), y)


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_of_a_16_bit_layer_train_in_float32(dtype) -> None:
    adapters = make("a", dtype)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    x, target = torch.randn(32, 6).to(dtype), torch.randn(32, 6)
    before = [p.detach().clone() for p in adapters.parameters()]
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4, weight_decay=0)
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(adapters.model(x).float(), target).backward()
        optimizer.step()
    for old, new in zip(before, adapters.parameters(), strict=True):
        assert new.isfinite().all() and (new != old).float().mean() > 0.9
    y = adapters.model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, formula(adapters, x, {"a": 1.0}), rtol=2e-2, atol=2e-2)
    with adapters.batch([0] * 32):
        torch.testing.assert_close(adapters.model(x), y, rtol=2e-2, atol=2e-2)
    with torch.no_grad(), adapters.merged():
        torch.testing.assert_close(adapters.model(x), y, rtol=2e-2, atol=2e-2)
    assert {p.dtype for p in make("a", dtype, autocast_adapter_dtype=False).parameters()} == {dtype}


def test_dtypes_are_those_of_the_layer_whatever_torchs_default_is() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        adapters = make("ab")
        adapters.set_adapter(["a", "b"], [0.5, 2.0])
        adapters.model(torch.randn(3, 6, dtype=torch.float32))
        assert SubspaceHead().weights.dtype == CosineHead().scale.dtype == torch.float32
        assert PrototypeBank(4).prototypes.dtype == torch.float32
        assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------- what is saved and loaded


def test_the_scale_is_part_of_the_state() -> None:
    a, b, x = make("a", lora_alpha=16.0), make("a"), torch.randn(3, 6)
    b.model.load_state_dict(a.model.state_dict())
    assert torch.equal(a.model(x), b.model(x))
    assert b.model[0].lora_alpha == {"a": 16.0}
    old = {key: value for key, value in a.model.state_dict().items() if "lora_alpha" not in key}
    c = make("a", lora_alpha=16.0)
    c.model.load_state_dict(old)  # as it was written before
    assert torch.equal(a.model(x), c.model(x))
    head = SubspaceHead(alpha=0.5)
    head.assign([0, 1, 1])
    loaded = SubspaceHead()
    loaded.load_state_dict(head.state_dict())
    assert loaded.alpha == 0.5 and torch.equal(loaded.weights, head.weights)
    loaded.load_state_dict({"task_of_class": torch.tensor([0, 1])})  # as it was written before
    with pytest.raises(RuntimeError, match="Unexpected key.*lora_alpha.b"):
        make("a").model.load_state_dict(make("ab").model.state_dict())


@pytest.mark.parametrize("targets", [["qkv"], ["q", "v"]], ids="-".join)
@pytest.mark.parametrize("train", ["a", None])
def test_a_model_made_on_meta_and_filled_by_assignment(targets, train) -> None:
    def build() -> Adapters:
        adapters = inject(nn.ModuleDict({"qkv": nn.Linear(6, 9)}), targets, r=2, lora_alpha=3.0)
        adapters.add_adapter("a")
        adapters.train_adapter(train)
        return adapters

    source = build()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    with torch.device("meta"):
        target = build()
    target.model.load_state_dict(source.model.state_dict(), assign=True)
    target.train_adapter(train)
    x = torch.randn(2, 6)
    torch.testing.assert_close(target.model["qkv"](x), source.model["qkv"](x))


def test_a_state_is_not_loaded_under_merged_weights() -> None:
    adapters, x = make(), torch.randn(3, 6)
    other = make()
    nn.init.normal_(other.model[0].base_layer.weight)
    adapters.merge()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) first"):
        adapters.model.load_state_dict(other.model.state_dict())
    adapters.unmerge()
    adapters.model.load_state_dict(other.model.state_dict())
    assert torch.equal(adapters.model(x), other.model(x))


# ---------------------------------------------------------------------- adapters that are not finite


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_adapter_that_is_not_finite_does_not_share_a_batch(bad: float) -> None:
    adapters, x = make("abc"), torch.randn(3, 6)
    adapters.model.eval()

    def uses() -> list[Callable[[], Any]]:
        return [lambda: adapters.batch([0, 1, -1]).__enter__(), lambda: Ensemble(adapters)(x)]

    with torch.no_grad():
        adapters.parameters("c")[-1][0, 0] = bad  # in training: c is the newest
        for use in uses():
            with pytest.raises(
                ValueError, match="adapter 'c' holds inf or NaN and would spoil samples of other adapters"
            ):
                use()
    with adapters.batch([2, 0, 0]):  # where it trains, the loss shows it
        assert not adapters.model(x)[0].isfinite().all()
    adapters.train_adapter(None)
    for use in uses():
        with pytest.raises(ValueError, match="adapter 'c' holds inf or NaN"):
            use()
    state = adapters.model.state_dict()
    adapters.delete_adapter("c")
    with adapters.batch([0, 1, -1]):
        assert adapters.model(x).isfinite().all()
    assert not adapters._state.unchecked
    other = make("abc")
    other.train_adapter(None)
    with other.batch([0, 1, 2]):
        other.model(x)
    other.model.load_state_dict(state)
    with pytest.raises(ValueError, match="adapter 'c' holds inf or NaN"), other.batch([0, 1, 0]):
        pass


def test_adapters_of_another_16_bit_dtype_than_autocasts_are_found_finite() -> None:
    adapters = make("ab", dtype=torch.float16, autocast_adapter_dtype=False)
    adapters.train_adapter(None)
    with torch.autocast("cpu", torch.bfloat16), adapters.batch([0, 1]):
        assert not adapters._state.unchecked


# ---------------------------------------------------------------------- merged for a while


def test_merged_for_a_while_is_the_same_function() -> None:
    adapters, x = make("abc"), torch.randn(3, 6)
    weights = [layer.base_layer.weight.clone() for layer in adapters.layers.values()]
    adapters.set_adapter(["a", "b", "c"], [0.5, 2.0, -1.0])
    adapters.train_adapter("b")
    expected = formula(adapters, x, {"a": 0.5, "b": 2.0, "c": -1.0})
    wanted = torch.autograd.grad(expected.sum(), adapters.parameters("b"))
    with adapters.merged():
        assert adapters.active == ["a", "b", "c"]
        y = adapters.model(x)
        torch.testing.assert_close(y, expected)
        for a, b in zip(torch.autograd.grad(y.sum(), adapters.parameters("b")), wanted, strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) first"):
            adapters.set_adapter("a")
    with torch.no_grad(), adapters.merged():
        torch.testing.assert_close(adapters.model(x), expected)
        assert not adapters._state.current.names
    for layer, weight in zip(adapters.layers.values(), weights, strict=True):
        assert torch.equal(layer.base_layer.weight, weight)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), adapters.merged():
        _ = 1 / 0
    torch.testing.assert_close(adapters.model(x), expected)
    coefficients = torch.ones(3, requires_grad=True)
    adapters.set_adapter(["a", "b", "c"], coefficients)
    with adapters.merged():  # all of it learns
        adapters.model(x).sum().backward()
    assert coefficients.grad is not None and coefficients.grad.all()
    weight = next(iter(adapters.layers.values())).base_layer.weight.requires_grad_()
    before = weight.detach().clone()
    adapters.set_adapter("a")
    adapters.train_adapter(None)
    with adapters.merged():  # the end of the block would take back what a base weight has learned
        adapters.model(x).sum().backward()
        torch.optim.SGD([weight], 1.0).step()
    assert weight.grad is not None and torch.equal(weight, before - weight.grad)
