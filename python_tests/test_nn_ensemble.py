"""The forward of an ensemble: against one adapter after the other, what it runs how often, and what it may take."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.memory import PeakMemory, free_memory
from plora_ext.nn import Adapters, Ensemble, inject
from plora_ext.nn.ensemble import _cuts


def vit(targets: Sequence[str] = ("q", "v"), T: int = 4, ragged: bool = True, **keywords) -> Adapters:
    """A tiny ViT (17 tokens) with T adapters of different ranks."""
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    return adapted(VisionTransformer(**{**size, **keywords}), targets, T, ragged)


def adapted(model: nn.Module, targets: Sequence[str], T: int = 4, ragged: bool = True) -> Adapters:
    adapters = inject(model.eval(), targets, r=2)
    for t in range(T):
        adapters.add_adapter(f"t{t}", r=2 + t % 3 if ragged else 2)
        for parameter in adapters.parameters(f"t{t}"):
            nn.init.normal_(parameter, std=0.3)
    adapters.train_adapter(None)
    return adapters


@torch.no_grad()
def one_by_one(adapters: Adapters, images: Tensor, names: Sequence[str] | None = None) -> Tensor:
    features, active = [], adapters.active
    for name in adapters.names if names is None else names:
        adapters.set_adapter(None if name == "__base__" else name)
        features.append(adapters.model(images))
    adapters.set_adapter(active)
    return torch.stack(features)


def agree(adapters: Adapters, images: Tensor, ours: Tensor, names: Sequence[str] | None = None) -> None:
    """Within twice the error of the loop, both against float64."""
    loop = one_by_one(adapters, images, names)
    dtype = next(adapters.model.parameters()).dtype
    exact = one_by_one(Adapters(adapters.model.double()), images.double(), names)
    adapters.model.to(dtype)
    assert ours.shape == exact.shape and ours.dtype == loop.dtype
    floor = 4 * torch.finfo(ours.dtype).eps * exact.norm()
    assert (ours.double() - exact).norm() <= 2 * (loop.double() - exact).norm() + floor
    assert not torch.allclose(ours[0], ours[-1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [["q", "v"], ["qkv", "proj"], ["fc1", "fc2"], "blocks.1.attn.qkv"])
def test_equals_one_adapter_after_the_other(device: torch.device, dtype: torch.dtype, targets: Sequence[str]) -> None:
    adapters = vit(targets)
    adapters.model.to(device, dtype)
    images = torch.randn(5, 3, 16, 16).to(device, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = Ensemble(adapters)(images)
    agree(adapters, images, ours)
    assert adapters.active == ["t3"]  # nothing of the handle has changed


def test_any_names_in_any_order_and_the_base(device: torch.device) -> None:
    adapters = vit()
    adapters.model.to(device)
    images = torch.randn(3, 3, 16, 16).to(device)
    ensemble = Ensemble(adapters)
    for names in (["t2"], ["t3", "t1"], ["t1", "__base__", "t0"], ["t1", "t1"], ["__base__"]):
        assert torch.allclose(ensemble(images, names), one_by_one(adapters, images, names), rtol=1e-4, atol=1e-5)
    assert torch.equal(ensemble(images, "t2"), ensemble(images, ["t2"]))
    adapters.delete_adapter("t1")
    adapters.add_adapter("late", init_from="t2")
    torch.testing.assert_close(ensemble(images, ["late"]), ensemble(images, ["t2"]))
    assert ensemble(images).shape == (4, 3, 32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_autocast_and_grad_modes(mode, device: torch.device) -> None:
    adapters = vit(ragged=False)
    adapters.model.to(device)
    adapters.train_adapter("t1")
    images = torch.randn(4, 3, 16, 16).to(device)
    ensemble = Ensemble(adapters)
    with mode():
        plain = ensemble(images)
        with torch.autocast(device.type, torch.bfloat16):
            cast, loop = ensemble(images), one_by_one(adapters, images)
    assert not plain.requires_grad
    exact = one_by_one(adapters, images)
    torch.testing.assert_close(plain, exact, rtol=1e-4, atol=1e-5)
    assert cast.dtype == loop.dtype
    assert (cast - exact).norm() <= 2 * (loop - exact).norm() + 1e-2 * exact.norm()


class Count(nn.Module):
    """Counts the samples that go through a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.samples = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.inner(x)


@pytest.mark.parametrize("layer", ["blocks.0.attn.qkv", "blocks.2.attn.qkv"])
def test_what_comes_before_the_first_adapted_layer_runs_once(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    model.patch_embed = Count(model.patch_embed)
    for block in model.blocks:
        block.mlp = Count(block.mlp)
    adapters = adapted(model, layer + "|blocks.2.mlp.inner.fc1")
    ensemble, images = Ensemble(adapters), torch.randn(5, 3, 16, 16)
    ensemble(images)  # tries where to repeat
    counts = [model.patch_embed, *(block.mlp for block in model.blocks)]
    for count in counts:
        count.samples = 0
    rows: dict[str, int] = {"lora_all": 0, "lora_indexed": 0}
    for name in rows:
        original = getattr(ops, name)

        def spy(x: Tensor, *args, name: str = name, original=original, **keywords) -> Tensor:
            rows[name] += x.shape[:-1].numel()
            return original(x, *args, **keywords)

        monkeypatch.setattr(ops, name, spy)
    ensemble(images)
    first = int(layer[7])
    assert [count.samples for count in counts] == [5] + [5] * first + [20] * (3 - first)
    assert rows == {"lora_all": 5 * 17, "lora_indexed": 20 * 17}


@pytest.mark.parametrize("targets", [["q", "v"], ["qkv", "proj"]])
def test_cuts_give_the_same_bits_and_keep_to_the_memory(targets: list[str]) -> None:
    adapters, images = vit(targets), torch.randn(7, 3, 16, 16)
    whole = Ensemble(adapters)
    expected = whole(images)
    plan = next(iter(whole._plans.values()))
    for slabs in (1, 3, 5, 9, 28):
        ensemble = Ensemble(adapters, memory=plan.fixed + slabs * plan.slab)
        ensemble(images[:1])  # tries where to repeat
        with PeakMemory() as memory:
            result = ensemble(images)
        assert torch.equal(result, expected), slabs
        factors = sum(t.nbytes for layer in adapters.layers.values() for t in layer.operands(tuple(layer.r))[:2])
        assert memory.peak <= plan.fixed + slabs * plan.slab + result.nbytes + 4 * factors, slabs


@pytest.mark.cuda
def test_memory_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    adapters = vit(T=8, embed_dim=128)
    adapters.model.cuda()
    images = torch.randn(64, 3, 16, 16, device="cuda")
    whole = Ensemble(adapters)
    expected = whole(images)
    plan = next(iter(whole._plans.values()))
    for slabs in (16, 100):
        ensemble = Ensemble(adapters, memory=plan.fixed + slabs * plan.slab)
        ensemble(images[:2])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = ensemble(images)
        peak = torch.cuda.max_memory_allocated() - before - result.nbytes
        assert peak <= 1.25 * (plan.fixed + slabs * plan.slab) + 2**20
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_cuts_are_even_and_within_the_limit() -> None:
    for T, B, slabs in ((1, 1, 1), (20, 128, 2560), (20, 128, 100), (20, 7, 19), (3, 5, 1), (4, 10, 2**62)):
        seen = torch.zeros(T, B, dtype=torch.int64)
        for t, b in _cuts(T, B, slabs):
            assert seen[t, b].numel() <= slabs
            seen[t, b] += 1
        assert seen.eq(1).all()
    assert [b.stop - b.start for _, b in _cuts(4, 10, 16)] == [3, 3, 4]  # not 4, 4, 2


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x)) + x


class Skip(nn.Module):
    """A skip connection around the adapted module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


class SequenceFirst(Skip):
    """The adapted layers see the samples second."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Pair(nn.Module):
    """A block that is called twice and takes keyword arguments only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x=self.inner(x=x))


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("model", "targets", "split"),
    [
        (layers(), ["2", "4"], "2"),
        (layers(), ["0"], "0"),
        (nn.Sequential(nn.Linear(8, 8), Residual(), Residual()), ["q", "k"], "1"),
        (nn.Sequential(nn.Linear(8, 8), Skip()), ["q", "k", "o"], "1"),
        (nn.Sequential(nn.Linear(8, 8), Pair()), ["k"], "1"),
    ],
)
def test_any_structure_finds_its_place(model: nn.Module, targets: list[str], split: str) -> None:
    torch.manual_seed(0)
    adapters, images = adapted(model, targets, ragged=False), torch.randn(5, 8)
    ensemble = Ensemble(adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(adapters, images, ensemble(images))
    assert next(iter(ensemble._plans.values())).split is model.get_submodule(split)


def test_what_cannot_be_shared_is_repeated_and_said_once() -> None:
    model = Skip()
    adapters, images = adapted(model, ["q", "k"], ragged=False), torch.randn(5, 6, 8)
    ensemble = Ensemble(adapters)
    with pytest.warns(UserWarning, match="plain repetition of the images: RuntimeError: The size of tensor") as said:
        agree(adapters, images, ensemble(images))
        ensemble(images[:, :4])  # another shape of image
    assert len(said) == 1
    assert next(iter(ensemble._plans.values())).split is model


def test_models_that_see_the_batch_elsewhere_take_turns() -> None:
    for size in (6, 4):  # the second dimension is a multiple of all samples
        adapters, images = adapted(SequenceFirst(), ["q"], ragged=False), torch.randn(2, size, 8)
        with pytest.warns(UserWarning, match="one adapter after the other"):
            result = Ensemble(adapters)(images)
        torch.testing.assert_close(result, one_by_one(adapters, images))


class ReadsWeight(nn.Module):
    """Computes with `layer.weight` itself, as timm's BEiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.q.weight, self.q.bias)


def test_models_that_read_the_weight_take_turns() -> None:
    adapters, images = adapted(ReadsWeight(), ["q"], ragged=False), torch.randn(3, 8)
    ensemble = Ensemble(adapters, memory=3000)
    with pytest.warns(UserWarning, match=r"one adapter after the other: RuntimeError: this model reads layer\.weight"):
        result = ensemble(images)
    torch.testing.assert_close(result, one_by_one(adapters, images))


def test_layer_scale_hides_no_structure() -> None:
    """Adapted layers that hardly change the features, and 16 bits: the trial must not fail for noise."""
    adapters = vit(init_values=1e-5, T=2)
    adapters.model.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ensemble(adapters)(torch.randn(2, 3, 16, 16).bfloat16())


def test_changed_adapters_are_followed() -> None:
    adapters, images = vit(ragged=False), torch.randn(3, 3, 16, 16)
    ensemble = Ensemble(adapters)
    before = ensemble(images)
    with torch.no_grad():
        adapters.parameters("t2")[0].add_(1)
    after = ensemble(images)
    assert [bool(torch.equal(a, b)) for a, b in zip(before, after)] == [True, True, False, True]


def test_no_images_and_bad_input() -> None:
    adapters = vit()
    ensemble, images = Ensemble(adapters), torch.randn(2, 3, 16, 16)
    assert ensemble(images[:0]).shape == (4, 0, 32)
    with pytest.raises(KeyError, match="unknown adapter 't9'"):
        ensemble(images, ["t9"])
    with pytest.raises(TypeError, match="names must be in the order of the features, got a set"):
        ensemble(images, {"t0", "t1"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names must hold at least one adapter"):
        ensemble(images, [])
    with pytest.raises(ValueError, match="memory must be a positive number of bytes, got 0"):
        Ensemble(adapters, memory=0)
    with pytest.raises(
        ValueError, match=r"memory \(.*\) must be at least .* MiB, what one image under one adapter takes"
    ):
        Ensemble(adapters, memory=1)(images)
    adapters.model.train()
    with pytest.raises(RuntimeError, match=r"eval mode: call model\.eval\(\) first"):
        ensemble(images)
    adapters.model.eval()
    adapters.merge()
    with pytest.raises(RuntimeError, match="adapters are merged"):
        ensemble(images)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.q(x), x

    with (
        pytest.warns(UserWarning, match="must return one tensor, got tuple"),
        pytest.raises(TypeError, match="must return one tensor, got tuple"),
    ):
        Ensemble(adapted(Two(), ["q"], ragged=False))(torch.randn(2, 8))


def test_an_error_inside_leaves_the_layers_as_they_were() -> None:
    adapters, images = vit(), torch.randn(2, 3, 16, 16)
    ensemble = Ensemble(adapters)
    expected = ensemble(images)
    handle = adapters.model.norm.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensemble(images)
    handle.remove()
    assert adapters._state.current.ensemble is None
    assert not any(module._forward_pre_hooks for module in adapters.model.modules())
    assert torch.equal(ensemble(images), expected)


def test_free_memory() -> None:
    assert free_memory(torch.device("cpu")) > 2**20


@pytest.mark.cuda
def test_nothing_waits_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    adapters = vit()
    adapters.model.cuda()
    images = torch.randn(4, 3, 16, 16, device="cuda")
    ensemble = Ensemble(adapters, memory=2**30)
    ensemble(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ensemble(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = ensemble(images)
    graph.replay()
    torch.testing.assert_close(captured, ensemble(images))
