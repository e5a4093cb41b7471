"""inject and Adapters on timm ViTs and other models: the right layers, the right numbers, one clear error otherwise."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import prune

from plora_ext import ops
from plora_ext.nn import Adapters, MultiLoRALinear, inject

D = 64


def vit(depth: int = 2) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=D, depth=depth, num_heads=2, num_classes=0)


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make(targets=("qkv", "proj"), ranks=(4, 4, 4), model: nn.Module | None = None) -> Adapters:
    adapters = inject(vit() if model is None else model, targets, r=4)
    for i, r in enumerate(ranks):
        adapters.add_adapter(f"t{i}", r=r)
    torch.manual_seed(2)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    return adapters


# ---------------------------------------------------------------------- which layers


def test_targets_are_matched_as_in_peft() -> None:
    qkv = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert list(make(["qkv"]).layers) == qkv
    assert list(make(["blocks.1.attn.qkv"]).layers) == qkv[1:]
    assert list(make(r"blocks\.\d\.attn\.qkv").layers) == qkv
    # patch_embed.proj is a convolution, and left alone
    assert list(make().layers) == [f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("qkv", "proj")]
    both = make(["v", "proj", "q"]).layers
    assert both["blocks.0.attn.qkv"].slices == {"q": (0, D), "v": (2 * D, 3 * D)}
    assert both["blocks.0.attn.proj"].slices is None
    assert isinstance(vit().blocks[0].attn.qkv, nn.Linear)


def test_q_and_v_are_modules_of_that_name_and_the_rows_of_every_fused_qkv() -> None:
    model = nn.ModuleDict(
        {"q": nn.Linear(4, 4), "qkv": nn.Linear(4, 12), "more": nn.ModuleDict({"qkv": nn.Linear(4, 6)})}
    )
    layers = inject(model, ["q", "v"], r=2).layers
    assert {name: layer.slices for name, layer in layers.items()} == {
        "q": None,
        "qkv": {"q": (0, 4), "v": (8, 12)},
        "more.qkv": {"q": (0, 2), "v": (4, 6)},
    }


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "efficientformer_l1", "gcvit_small"])
def test_rows_of_a_qkv_of_another_order_are_refused(name: str) -> None:
    """Their rows divide by three all the same, so that another head's k was q without a word."""
    with torch.device("meta"):
        model = timm.create_model(name)
    fused = [key for key, module in model.named_modules() if key.endswith("qkv") and isinstance(module, nn.Linear)]
    assert any(model.get_submodule(key).out_features % 3 == 0 for key in fused)
    with pytest.raises(ValueError, match="need a fused qkv whose rows are q, k, v in thirds"):
        inject(model, ["q", "v"], r=2)
    assert len(inject(model, ["qkv"], r=2).layers) == len(fused)


def test_everything_but_the_newest_adapter_is_frozen() -> None:
    adapters = make()
    assert {id(p) for p in adapters.model.parameters() if p.requires_grad} == {id(p) for p in adapters.parameters("t2")}
    assert adapters.active == ["t2"]
    adapters.train_adapter(None)
    assert not any(p.requires_grad for p in adapters.model.parameters())
    adapters.train_adapter(["t0", "t1"])
    assert sum(p.requires_grad for p in adapters.parameters()) == len(adapters.parameters("t0")) * 2


def test_a_new_adapter_changes_nothing_and_a_copy_is_the_same() -> None:
    model, x = vit(), images()
    y = model(x)
    adapters = inject(model, ["qkv", "proj"], r=4, lora_alpha=8)
    adapters.add_adapter("a")
    assert torch.equal(model(x), y)
    A, B = adapters.layers["blocks.0.attn.qkv"].pairs("a")[0]
    assert A.shape == (4, D) and B.shape == (3 * D, 4) and not B.any()
    assert A.abs().max() <= 1 / math.sqrt(D) and A.std() > 0.4 / math.sqrt(D)  # Kaiming-uniform with a = sqrt(5)
    for parameter in adapters.parameters("a"):
        nn.init.normal_(parameter, std=0.1)
    adapters.add_adapter("b", init_from="a")
    for a, b in zip(adapters.parameters("a"), adapters.parameters("b"), strict=True):
        assert torch.equal(a, b) and a is not b and not a.requires_grad and b.requires_grad
    assert adapters.layers["blocks.0.attn.qkv"].lora_alpha == {"a": 8, "b": 8}


def test_shared_modules_are_wrapped_once() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.ModuleDict({"a": shared})["a"], nn.ReLU(), shared)
    adapters = inject(model, ["0", "2"], r=2)
    assert model[0] is model[2] and isinstance(model[0], MultiLoRALinear)
    assert list(adapters.layers) == ["0"]
    adapters.add_adapter("a")
    adapters.unload(merge=False)
    assert model[0] is shared and model[2] is shared


def test_a_shared_module_has_its_adapters_under_every_name() -> None:
    """Where one name alone was a target, the layer kept to itself under the others, until it was merged."""
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"first": nn.Sequential(shared, nn.Tanh()), "again": nn.Sequential(shared)})
    adapters, x = inject(model, ["first.0"], r=2), torch.randn(3, 6)
    adapters.add_adapter("a")
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    y = model["again"](x)
    assert model["again"][0] is model["first"][0] and not torch.allclose(y, F.linear(x, shared.weight, shared.bias))
    adapters.merge_and_unload()
    torch.testing.assert_close(model["again"](x), y)
    assert model["again"][0] is model["first"][0] is shared


# ---------------------------------------------------------------------- numbers in a whole model


@pytest.mark.parametrize("targets", [("qkv", "proj"), ("q", "v", "fc1")], ids="-".join)
def test_vit_equals_one_whose_weights_were_changed_by_hand(targets) -> None:
    adapters, x = make(targets), images()
    coeff = torch.tensor([0.5, 2.0, -1.0])
    plain = vit()
    plain.load_state_dict(vit().state_dict())
    with torch.no_grad():
        for key, layer in adapters.layers.items():
            rows = [(0, layer.out_features)] if layer.slices is None else layer.slices.values()
            for c, name in zip(coeff, adapters.names, strict=True):
                for (A, B), (a, z) in zip(layer.pairs(name), rows, strict=True):
                    plain.get_submodule(key).weight[a:z] += c * B @ A
    expected = plain(x)
    adapters.set_adapter(adapters.names, coeff)
    torch.testing.assert_close(adapters.model(x), expected, rtol=1e-4, atol=1e-4)
    adapters.train_adapter(None)
    torch.testing.assert_close(adapters.model(x), expected, rtol=1e-4, atol=1e-4)
    adapters.merge()
    torch.testing.assert_close(adapters.model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", ["t1", None])
def test_a_model_that_reads_the_weight_instead_of_calling_the_layer(train) -> None:
    def beit() -> Beit:
        torch.manual_seed(0)
        return Beit(img_size=32, patch_size=8, embed_dim=D, depth=1, num_heads=2, num_classes=0, qkv_bias=True).eval()

    model, plain, x = beit(), beit(), images()
    adapters = make(["q", "v"], model=model)
    adapters.set_adapter(["t0", "t1"], [0.5, 2.0])
    adapters.train_adapter(train)
    with torch.no_grad():
        for c, name in ((0.5, "t0"), (2.0, "t1")):
            A, B = adapters.layers["blocks.0.attn.qkv"].factors(name)
            plain.blocks[0].attn.qkv.weight += c * B @ A
    y = model(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
    if train:
        y.square().sum().backward()
        assert all(p.grad.any() for p in adapters.parameters(train))
    with adapters.batch([0, 1, 2]), pytest.raises(RuntimeError, match=r"reads layer\.weight"):
        model(x)


def test_fuse_is_exact_and_averaging_the_factors_is_not() -> None:
    adapters, x = make(["q", "v", "proj"], ranks=(4, 2)), images()
    adapters.add_adapter("t2", lora_alpha=6)
    for parameter in adapters.parameters("t2"):
        nn.init.normal_(parameter, std=0.1)
    names, coeff = ["t0", "t1", "t2"], [0.5, 0.25, 0.25]
    trained = [p.requires_grad for p in adapters.parameters()]
    adapters.fuse(names, coeff)
    assert adapters.active == ["t2"] and adapters.names == [*names, "fused"]
    assert [p.requires_grad for p in adapters.parameters() if p.requires_grad] == [t for t in trained if t]
    adapters.set_adapter(names, coeff)
    y = adapters.model(x)
    adapters.set_adapter("fused")
    torch.testing.assert_close(adapters.model(x), y, rtol=1e-4, atol=1e-4)
    assert adapters.layers["blocks.0.attn.qkv"].r["fused"] == 10

    even = make(["qkv"], ranks=(4, 4))
    even.fuse(["t0", "t1"], [0.5, 0.5])
    for layer in even.layers.values():
        (A0, B0), (A1, B1), (A, B) = (layer.pairs(n)[0] for n in ("t0", "t1", "fused"))
        mean = (B0 @ A0 + B1 @ A1) / 2
        torch.testing.assert_close(B @ A, mean)
        factors = (B0 + B1) / 2 @ ((A0 + A1) / 2)
        assert (factors - mean).norm() > 0.5 * mean.norm()


def test_coefficients_learn_through_every_layer() -> None:
    adapters, x = make(), images()
    adapters.train_adapter(None)
    theta = torch.zeros(3, requires_grad=True)
    adapters.set_adapter(adapters.names, theta.softmax(0))
    adapters.model(x).square().sum().backward()
    assert theta.grad is not None and theta.grad.abs().min() > 0
    step = 1e-3 * torch.tensor([1.0, 0.0, 0.0])
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            adapters.set_adapter(adapters.names, (theta + sign * step).softmax(0))
            values.append(adapters.model.double()(x.double()).square().sum())
    assert (values[0] - values[1]).item() / 2e-3 == pytest.approx(theta.grad[0].item(), rel=1e-2)
    adapters.set_adapter(["t0", "t1"], np.array([0.5, 0.25]))  # an array of several numbers has no truth value
    y = adapters.model(x.double())
    adapters.set_adapter(["t0", "t1"], [0.5, 0.25])
    assert torch.equal(adapters.model(x.double()), y)


def test_batch_in_a_vit_equals_one_model_for_each_sample() -> None:
    adapters, x = make(["q", "v", "proj"], ranks=(4, 1, 3)), images(5)
    adapters.model.eval()
    ids = [1, -1, 0, 2, 1]
    with torch.no_grad():
        with adapters.batch(ids):
            y = adapters.model(x)
        for i, t in enumerate(ids):
            adapters.set_adapter(None if t < 0 else adapters.names[t])
            torch.testing.assert_close(y[i : i + 1], adapters.model(x[i : i + 1]), rtol=1e-4, atol=1e-4)


def test_contexts_restore_what_was_active() -> None:
    adapters, x = make(), images()
    adapters.set_adapter(["t0", "t1"], [0.5, 0.5])
    y = adapters.model(x)
    with adapters.disabled():
        assert torch.equal(adapters.model(x), vit()(x))
        with adapters.batch(["t0"] * 3):
            assert not torch.equal(adapters.model(x), vit()(x))
        assert torch.equal(adapters.model(x), vit()(x))
    with pytest.raises(ZeroDivisionError), adapters.batch([0, 1, 2]):
        _ = 1 / 0
    assert torch.equal(adapters.model(x), y)


@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_stays_what_the_model_was(autocast: bool) -> None:
    adapters, x = make(["q", "v", "proj"], ranks=(4, 1, 3)), images()
    adapters.model.eval()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        for names, coefficients in (["t0", "t2"], [0.5, 0.7]), ("t1", None), (None, None):
            adapters.set_adapter(names, coefficients)
            old = adapters.frozen()
            y = old(x)
            torch.testing.assert_close(y, adapters.model(x), **tolerance)
            for parameter in adapters.parameters():
                parameter.mul_(1.1)
            adapters.set_adapter(adapters.names)
            now = adapters.model(x)
            assert not torch.allclose(now, y, **tolerance)
            assert torch.equal(old(x), y) and torch.equal(adapters.model(x), now)
            assert torch.equal(old(x[:1]), old(x)[:1]) or autocast
    assert adapters.active == adapters.names
    adapters.merge()
    with pytest.raises(RuntimeError, match="merged"):
        adapters.frozen()
    with torch.autocast("cpu", enabled=autocast):
        assert torch.equal(old(x), y)  # it has weights of its own
    assert not old(x).requires_grad
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(old(x)[:, 0].sum(), x)
    assert gradient.abs().sum() > 0
    adapters.unload(merge=False)
    with pytest.raises(RuntimeError, match="unloaded"):
        old(x)


def test_frozen_where_the_model_reads_weights_itself() -> None:
    torch.manual_seed(0)
    model = Beit(img_size=32, patch_size=8, embed_dim=D, depth=1, num_heads=2, num_classes=0).eval()
    adapters, x = make(["qkv"], model=model), images()
    adapters.set_adapter("t1")
    old, y = adapters.frozen(), model(x)
    adapters.set_adapter("t2")
    torch.testing.assert_close(old(x), y)
    assert (model(x) - y).abs().max() > 1e-3


def test_unload() -> None:
    x = images()
    for merge in (True, False):
        for merged_before in (True, False):
            model = vit()
            linears = [block.attn.qkv for block in model.blocks]
            y_base = model(x)
            adapters = make(["qkv"], model=model)
            other = Adapters(model)
            y = model(x)
            if merged_before:
                adapters.merge()
            assert adapters.unload(merge=merge) is model
            assert [block.attn.qkv for block in model.blocks] == linears
            assert not any(isinstance(m, MultiLoRALinear) for m in model.modules())
            if merge:
                torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(model(x), y_base)
            for handle in (adapters, other):  # the other went on to choose what nothing computes with
                with pytest.raises(RuntimeError, match="unloaded"):
                    handle.set_adapter(None)
    model = vit()
    make(["qkv"], model=model)
    Adapters(model).set_adapter(None)
    assert torch.equal(Adapters(model).unload()(x), vit()(x))  # nothing active: nothing to merge


def test_names_of_peft() -> None:
    adapters, x = make(["qkv"]), images()
    y, y_base = adapters.model(x), vit()(x)
    with adapters.disable_adapter():
        assert torch.equal(adapters.model(x), y_base)
    model = adapters.merge_and_unload()
    assert model is adapters.model and not any(isinstance(m, MultiLoRALinear) for m in model.modules())
    assert not torch.allclose(y, y_base, atol=1e-3)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_delete_adapter_leaves_the_rest() -> None:
    adapters, x = make(["q", "proj"]), images()
    adapters.set_adapter(["t0", "t2"], [0.5, 2.0])
    y = adapters.model(x)
    adapters.set_adapter(["t0", "t1", "t2"], [0.5, 7.0, 2.0])
    adapters.delete_adapter("t1")
    assert adapters.names == adapters.active == ["t0", "t2"]
    assert not any("t1" in key for key in adapters.model.state_dict())
    torch.testing.assert_close(adapters.model(x), y)


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("targets", [("qkv",), ("q", "v")], ids="-".join)
def test_state_dict_round_trip(targets) -> None:
    adapters, other = make(targets, ranks=(4, 2)), make(targets, ranks=(4, 2))
    for parameter in other.model.parameters():
        nn.init.zeros_(parameter)
    state = adapters.model.state_dict()
    keys = [k for k in state if k.startswith("blocks.0.attn.qkv.lora_A")]
    middle = [""] if targets == ("qkv",) else ["q.", "v."]
    assert keys == [f"blocks.0.attn.qkv.lora_A.{m}{n}" for m in middle for n in ("t0", "t1")]
    assert not any("cache" in k or "_original" in k for k in state)
    other.model.load_state_dict(state, strict=True)
    for name in ("t0", "t1"):
        adapters.set_adapter(name)
        other.set_adapter(name)
        assert torch.equal(adapters.model(images()), other.model(images()))


def test_a_copied_model_gets_a_handle_of_its_own() -> None:
    adapters, x = make(), images()
    adapters.set_adapter(["t0", "t1"])
    y = adapters.model(x)
    for twin in (
        Adapters(copy.deepcopy(adapters.model)),
        copy.deepcopy(adapters),
        pickle.loads(pickle.dumps(adapters)),
    ):
        assert torch.equal(twin.model(x), y)
        twin.set_adapter("t2")
        assert adapters.active == ["t0", "t1"] and twin.active == ["t2"]
        twin.add_adapter("new")  # of the rank that inject was told
        assert "new" not in adapters.names and set(twin.layers["blocks.0.attn.qkv"].r.values()) == {4}
    assert (Adapters(adapters.model, r=2).r, Adapters(adapters.model, lora_alpha=3).lora_alpha) == (2, 3)
    alone = Adapters(inject(vit(), ["qkv"], r=4, lora_alpha=8).model)
    assert (alone.r, alone.lora_alpha) == (4, 8) and Adapters(alone.model, r=2).lora_alpha is None


def test_moving_the_model_moves_everything(device) -> None:
    adapters, x = make(["q", "proj"], ranks=(4, 2, 3)), images()
    adapters.set_adapter(["t0", "t1"], [0.5, 0.5])
    y = adapters.model(x)
    adapters.model.to(device)
    with torch.no_grad():
        torch.testing.assert_close(adapters.model(x.to(device)).cpu(), y, rtol=1e-3, atol=1e-3)
        with adapters.batch([0, 1, 2]):
            adapters.model(x.to(device))
    adapters.model.half()
    assert {p.dtype for p in adapters.parameters()} == {torch.float16}
    with torch.no_grad():
        half = adapters.model(x.to(device).half())
    torch.testing.assert_close(half.float().cpu(), y, rtol=5e-2, atol=5e-2)


# ---------------------------------------------------------------------- torch.compile


def test_compiled_vit_trains_without_a_graph_break() -> None:
    adapters, x = make(["qkv", "proj"], ranks=(4,), model=vit(depth=1)), images()
    torch._dynamo.reset()
    compiled = torch.compile(adapters.model, fullgraph=True)
    expected = torch.autograd.grad(adapters.model(x).square().sum(), adapters.parameters())
    y = compiled(x)
    torch.testing.assert_close(y, adapters.model(x), rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(y.square().sum(), adapters.parameters()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["frozen beside trained", "frozen", "batch", "coefficients"])
def test_every_form_traces_without_a_graph_break_and_is_not_stale(form) -> None:
    adapters, x = make(["q", "v", "proj"], ranks=(4, 2), model=vit(depth=1)), images()
    theta = torch.ones(2, requires_grad=True) if form == "coefficients" else None
    adapters.set_adapter(["t0", "t1"], theta)
    adapters.train_adapter("t1" if form in ("frozen beside trained", "batch") else None)
    with adapters.batch([0, 1, -1]) if form == "batch" else nullcontext():
        torch._dynamo.reset()
        compiled = torch.compile(adapters.model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            y = compiled(x)
            torch.testing.assert_close(y, adapters.model(x), rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                for parameter in adapters.parameters():
                    parameter.mul_(1.5)
        if y.requires_grad:
            compiled(x).sum().backward()
            learned = adapters.parameters("t1") if theta is None else [theta]
            assert all(p.grad is not None for p in learned)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("r", [0, -1, 65, 2.0, True, "8"])
def test_rank_that_does_not_fit_names_layer_and_limit(r) -> None:
    model = vit()
    message = r"r must be an integer in \[1, 64\] for layer 'blocks\.0\.attn\.qkv' \(64 inputs, 192 outputs\), got "
    with pytest.raises(ValueError, match=message + repr(r)):
        inject(model, ["qkv", "proj"], r=r)
    assert not any(isinstance(m, MultiLoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    adapters = inject(model, ["qkv"], r=4)
    with pytest.raises(ValueError, match=message):
        adapters.add_adapter("a", r=r)
    assert adapters.names == []


def test_rank_that_does_not_fit_a_slice() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(16, 24)})
    with pytest.raises(ValueError, match=r"\[1, 8\] for layer 'qkv', slice 'v' \(16 inputs, 8 outputs\), got 9"):
        inject(model, ["v"], r=9)
    inject(model, ["qkv"], r=9)


def test_a_model_that_is_one_adapted_layer_is_unloaded_to_its_linear_layer() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(3, 4)
    adapters = Adapters(MultiLoRALinear(linear), r=2)
    adapters.add_adapter("a")
    nn.init.normal_(adapters.layers[""].lora_B["a"])
    y = adapters.model(x)
    assert adapters.unload() is adapters.model is linear
    torch.testing.assert_close(linear(x), y)


def test_target_modules_may_be_read_once() -> None:
    assert list(inject(vit(), (name for name in ("qkv", "proj"))).layers) == list(inject(vit()).layers)  # type: ignore[arg-type]


def test_coefficients_in_pieces_that_gradients_would_not_reach() -> None:
    adapters = make()
    pieces = [nn.Parameter(torch.tensor(1.0)), 2.0]
    for call in (adapters.set_adapter, adapters.fuse):
        with pytest.raises(ValueError, match="coefficients that require gradients must be one tensor"):
            call(["t0", "t1"], pieces)


def test_a_model_in_float64_stays_exact() -> None:
    adapters = inject(nn.Sequential(nn.Linear(4, 4, dtype=torch.float64)), ["0"], r=2)
    model, x = adapters.model, torch.randn(3, 4, dtype=torch.float64)
    adapters.add_adapter("a")
    nn.init.normal_(adapters.layers["0"].lora_B["a"])
    adapters.set_adapter(None)
    base = model(x)
    adapters.set_adapter("a")
    expected = base + 0.1 * (model(x) - base)
    adapters.set_adapter("a", [0.1])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is
        torch.testing.assert_close(adapters.frozen()(x), expected, rtol=0, atol=1e-13)
    adapters.fuse(["a"], [0.1])
    adapters.set_adapter("fused")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)


def test_targets_that_match_nothing_name_the_closest() -> None:
    with pytest.raises(ValueError, match=r"'qvk' matches none, closest are \['qkv'"):
        inject(vit(), ["proj", "qvk"])
    with pytest.raises(ValueError, match=r"the expression '\.\*query' matches none, closest are"):
        inject(vit(), ".*query")
    with pytest.raises(ValueError, match=r"'patch_embed\.proj' \(only Conv2d\) matches none"):
        inject(vit(), ["patch_embed.proj"])
    with pytest.raises(ValueError, match=r"target_modules '\(' is no regular expression: missing \)"):
        inject(vit(), "(")
    for bad in ([1], 5):
        with pytest.raises(ValueError, match="target_modules must be names of modules or one regular expression, got "):
            inject(vit(), bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one module"):
        inject(vit(), [])
    with pytest.raises(ValueError, match="either qkv or its slices"):
        inject(vit(), ["qkv", "v"])
    with pytest.raises(ValueError, match=r"rows are q, k, v in thirds; 'qkv' with 10 rows is laid out otherwise"):
        inject(nn.ModuleDict({"qkv": nn.Linear(4, 10)}), ["v"], r=1)
    by_head = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    by_head.head_first = True  # how timm's MaxViT says that its rows are grouped by head
    with pytest.raises(ValueError, match="rows are q, k, v in thirds"):
        inject(by_head, ["v"], r=1)


def test_layers_that_are_read_but_not_called_are_refused() -> None:
    model = nn.TransformerEncoderLayer(16, 2)
    with pytest.raises(ValueError, match=r"'self_attn\.out_proj' belongs to a torch\.nn\.MultiheadAttention"):
        inject(model, ["linear1", "out_proj"], r=2)
    assert isinstance(model.linear1, nn.Linear)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * F.linear(x, self.weight, self.bias)

    with pytest.raises(ValueError, match=r"'0' is a .*Doubled, and only plain torch\.nn\.Linear"):
        inject(nn.Sequential(Doubled(4, 4)), ["0"], r=2)


def test_names_and_coefficients() -> None:
    adapters = make()
    with pytest.raises(ValueError, match="carries adapters: take hold of them with Adapters"):
        inject(adapters.model)
    with pytest.raises(ValueError, match=r"call inject\(model, target_modules\) first"):
        Adapters(vit())
    for call in (
        lambda: adapters.set_adapter("t7"),
        lambda: adapters.set_adapter(["t0", "t7"]),
        lambda: adapters.train_adapter("t7"),
        lambda: adapters.parameters("t7"),
        lambda: adapters.add_adapter("new", init_from="t7"),
        lambda: adapters.fuse(["t7"]),
        lambda: adapters.delete_adapter("t7"),
        lambda: adapters.batch(["t7"]).__enter__(),
    ):
        with pytest.raises(KeyError, match=r"unknown adapter 't7', known ones are \['t0', 't1', 't2'\]"):
            call()
    for call in (
        lambda: adapters.set_adapter({"t0", "t1"}, [0.5, 2.0]),
        lambda: adapters.fuse({"t0", "t1"}, [0.5, 2.0]),
    ):
        with pytest.raises(TypeError, match="names must be in an order"):  # by chance the one's or the other's
            call()
    with pytest.raises(TypeError, match="a name or an id for each sample, got {"):
        adapters.batch({"t0", "t1"}).__enter__()
    others = make()
    others.set_adapter({"t0", "t1"})
    others.train_adapter({"t0", "t1"})
    assert set(others.active) == {"t0", "t1"}
    with pytest.raises(ValueError, match="adapter 't1' exists already"):
        adapters.add_adapter("t1")
    with pytest.raises(ValueError, match="adapter 't1' exists already"):
        adapters.fuse(["t0"], name="t1")
    for name in ("", "a.b", "__base__", "__active__", "values", 3):
        with pytest.raises(ValueError, match="non-empty string without dots"):
            adapters.add_adapter(name)
    with pytest.raises(ValueError, match=r"r must be 4, that of adapter 't0' \(init_from\) .*, got 8"):
        adapters.add_adapter("new", init_from="t0", r=8)
    with pytest.raises(ValueError, match="names must not repeat"):
        adapters.set_adapter(["t0", "t0"])
    for bad in ([0.5], torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"coefficients must be 2 floats, one for each of \['t0', 't1'\], got"):
            adapters.set_adapter(["t0", "t1"], bad)
    with pytest.raises(ValueError, match=r"coefficients must be 1 floats, .* got \(\)"):
        adapters.set_adapter("t0", 0.5)
    with pytest.raises(ValueError, match="at least one adapter to fuse"):
        adapters.fuse([])
    assert adapters.names == ["t0", "t1", "t2"] and adapters.active == ["t2"]


def test_alpha_and_dropout_out_of_range() -> None:
    for alpha in (0, -1.0, float("nan"), float("inf"), "16", np.float32(8)):  # which no JSON holds
        with pytest.raises(ValueError, match=re.escape(f"lora_alpha must be a positive number, got {alpha!r}")):
            inject(vit(), lora_alpha=alpha)
        with pytest.raises(ValueError, match="lora_alpha must be a positive number"):
            make().add_adapter("new", lora_alpha=alpha)
    model = vit()
    for dropout in (1.0, "0.1"):
        with pytest.raises(ValueError, match=rf"lora_dropout must lie in \[0, 1\), got {dropout!r}"):
            inject(model, lora_dropout=dropout)
    assert all(p.requires_grad for p in model.parameters())


def test_ids_out_of_range() -> None:
    adapters = make()
    for ids in ([0, 3], torch.tensor([0, -2])):
        with pytest.raises(IndexError, match="ids must"), adapters.batch(ids):
            pass
    with pytest.raises(IndexError, match="made for 4 adapters"), adapters.batch(ops.AdapterBatch([0], 4)):
        pass
    for ids in ([0.7, 1.2], np.array([0.0, 1.0]), [True, False], [None, 0]):  # 0.7 was 0
        with pytest.raises(TypeError, match="adapters must be names or integer ids, got"), adapters.batch(ids):
            pass
    with pytest.raises(TypeError, match="a name or an id for each sample, got 't0'"), adapters.batch("t0"):
        pass
    with adapters.batch(np.array([0, 1, -1])):
        adapters.model(images(3))
        with pytest.raises(RuntimeError, match="cannot be deleted inside of Adapters.batch"):
            adapters.delete_adapter("t0")  # id 0 would go on as that of t1
    with pytest.raises(ValueError, match="given 2 adapters, but a layer sees 3"), adapters.batch([0, 1]):
        adapters.model(images(3))


def test_merge_refuses_a_weight_that_others_use() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    adapters = inject(model, ["0"], r=2)
    adapters.add_adapter("a")
    with pytest.raises(RuntimeError, match="layer '0' shares its weight with another module"):
        adapters.merge()


def test_all_linear_and_names_that_are_no_expression() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1), nn.Sequential(nn.Linear(4, 2)))
    prune.l1_unstructured(model[0], "weight", 0.5)
    for targets in ("all-linear", ".*"):  # nothing can be put in the place of the model itself
        with pytest.raises(ValueError, match="matches none, it has no torch.nn.Linear"):
            inject(nn.Linear(4, 4), targets, r=2)
    with pytest.raises(ValueError, match="'0' has no weight before its first forward: run the model once"):
        inject(nn.Sequential(nn.LazyLinear(4)), ["0"], r=2)
    with pytest.raises(ValueError, match="'0' has a weight that a hook computes.*prune.remove.*; leave it out"):
        inject(model, ["0"], r=2)
    with pytest.raises(TypeError, match="got torch.nn.modules.linear.Linear whose weight a hook computes"):
        MultiLoRALinear(model[0])
    assert list(inject(model, "all-linear", r=2).layers) == ["2.0"]
    vit = nn.ModuleDict({"qkv": nn.ModuleDict({"qkv": nn.Linear(4, 12)})})
    with pytest.raises(ValueError, match=r"whole names, such as 'qkv.qkv', which 'qkv' does .*the list \['qkv'\]$"):
        inject(vit, "qkv", r=2)
    with pytest.raises(ValueError, match="'qkv' matches none, it has no torch.nn.Linear"):
        inject(nn.Sequential(nn.Conv2d(3, 3, 1)), ["qkv"])


def test_a_training_batch_of_which_some_train() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = inject(model, ["0"], r=2)
    for name in ("a", "b"):
        adapters.add_adapter(name)
    said = r"\['b'\] train and \['a'\] do not: train_adapter\(\['a', 'b'\]\)"
    with pytest.warns(UserWarning, match=said) as seen, adapters.batch(["a", "b", "__base__"]):
        model(torch.randn(3, 4))
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with (
            adapters.batch(["b", "b"]),
            pytest.raises(ValueError, match="given 2 adapters, but a layer sees 6 samples"),
        ):
            model(torch.randn(6, 4))
        model.eval()
        with adapters.batch(["a", "b"]):
            model(torch.randn(2, 4))
        model.train()
        adapters.train_adapter(["a", "b"])
        with adapters.batch(["a", "b"]):
            model(torch.randn(2, 4)).sum().backward()


def test_an_unloaded_copy_is_exported_as_a_plain_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    adapters = inject(model, ["0"], r=2)
    adapters.add_adapter("a")
    nn.init.normal_(adapters.parameters("a")[1])
    x, copied = torch.randn(3, 4), copy.deepcopy(model)
    plain = Adapters(copied).unload()
    targets = [
        {str(node.target).split(".")[0] for node in torch.export.export(of, (x,)).graph.nodes} for of in (model, plain)
    ]
    assert "plora_ext" in targets[0] and "plora_ext" not in targets[1]
    torch.testing.assert_close(plain(x), model(x))
