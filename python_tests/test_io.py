"""Adapters in PEFT's files: bit for bit between here and peft in both directions, and clear errors."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext.io import load_adapter, save_adapter
from plora_ext.nn import Adapters, inject

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QKV = "base_model.model.blocks.0.attn.qkv"


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0).eval()


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make(targets=("qkv", "attn.proj"), dtype: torch.dtype = torch.float32) -> Adapters:
    """Adapters "a" (r 4, alpha 6), "b" (r 3, alpha 6) and their fusion."""
    adapters = inject(vit().to(dtype), targets, r=4, lora_alpha=6)
    adapters.add_adapter("a")
    adapters.add_adapter("b", r=3)
    torch.manual_seed(2)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    adapters.train_adapter(None)
    adapters.fuse(["a", "b"], [0.3, 0.7])
    return adapters


def same_parameters(left: Adapters, name: str, right: Adapters, other: str) -> None:
    for a, b in zip(left.parameters(name), right.parameters(other), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    for a, b in zip(left.layers.values(), right.layers.values(), strict=True):
        assert a.r[name] == b.r[other]
        assert a.lora_alpha[name] / a.r[name] == b.lora_alpha[other] / b.r[other]


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [("qkv", "attn.proj"), ("q", "v"), ("q", "v", "fc1"), ("k",)], ids="-".join)
def test_save_and_load(targets, dtype, tmp_path: Path) -> None:
    adapters, fresh = make(targets, dtype), inject(vit().to(dtype), targets, r=4)
    for name in adapters.names:
        save_adapter(adapters, tmp_path / name, name)
        assert sorted(os.listdir(tmp_path / name)) == [CONFIG, WEIGHTS]
        load_adapter(fresh, tmp_path / name, name)
        same_parameters(adapters, name, fresh, name)
        assert fresh.active == [] and not any(p.requires_grad for p in fresh.parameters())
        for handle in (adapters, fresh):
            handle.set_adapter(name)
        assert torch.equal(fresh.model(images().to(dtype)), adapters.model(images().to(dtype)))
        fresh.set_adapter(None)


@pytest.mark.parametrize("targets", [("qkv", "attn.proj"), ("q", "v"), ("v", "q", "fc1")], ids="-".join)
def test_ours_in_peft_and_back(targets, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters = make(targets)
    for name in adapters.names:
        save_adapter(adapters, tmp_path / name, name)
        adapters.set_adapter(name)
        theirs = peft.PeftModel.from_pretrained(vit(), str(tmp_path / name)).eval()
        ours = load_file(tmp_path / name / WEIGHTS)
        state = peft.get_peft_model_state_dict(theirs)
        assert state.keys() == ours.keys() and all(torch.equal(state[k], ours[k]) for k in ours)
        with torch.no_grad():
            torch.testing.assert_close(adapters.model(images()), theirs(images()), rtol=1e-4, atol=1e-5)
        theirs.save_pretrained(tmp_path / f"{name}-peft")
        fresh = inject(vit(), targets, r=4)
        load_adapter(fresh, tmp_path / f"{name}-peft", "x")
        same_parameters(adapters, name, fresh, "x")


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_an_adapter_trained_by_peft_loads_bit_for_bit(rslora, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["qkv", "fc2"],
        use_rslora=rslora,
        rank_pattern={"fc2": 2, "blocks.1.attn.qkv": 7},
        alpha_pattern={r"blocks\.1\..*fc2": 5},
        lora_dropout=0.1,
    )
    theirs = peft.get_peft_model(vit(), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        theirs(images()).square().sum().backward()
        optimizer.step()
    theirs.eval().save_pretrained(tmp_path)

    adapters = inject(vit(), ["qkv", "fc2"], r=1)
    load_adapter(adapters, tmp_path, "theirs")
    state = peft.get_peft_model_state_dict(theirs)
    for key, layer in adapters.layers.items():
        A, B = layer.pairs("theirs")[0]
        assert torch.equal(A, state[f"base_model.model.{key}.lora_A.weight"])
        assert torch.equal(B, state[f"base_model.model.{key}.lora_B.weight"])
    assert adapters.layers["blocks.1.mlp.fc2"].r["theirs"] == 2
    scale = 5 / math.sqrt(2) if rslora else 5 / 2
    assert adapters.layers["blocks.1.mlp.fc2"].lora_alpha["theirs"] / 2 == pytest.approx(scale)
    adapters.set_adapter("theirs")
    with torch.no_grad():
        torch.testing.assert_close(adapters.model(images()), theirs(images()), rtol=1e-4, atol=1e-5)

    save_adapter(adapters, tmp_path / "again", "theirs")
    again = peft.PeftModel.from_pretrained(vit(), str(tmp_path / "again"))
    assert all(torch.equal(v, state[k]) for k, v in peft.get_peft_model_state_dict(again).items())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images()), theirs(images()), rtol=1e-4, atol=1e-5)


def test_names_that_end_like_others_are_told_apart(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

    adapters = inject(Model(), "proj", r=2)
    adapters.add_adapter("a")
    save_adapter(adapters, tmp_path, "a")
    theirs = peft.PeftModel.from_pretrained(Model(), str(tmp_path))
    assert len(peft.get_peft_model_state_dict(theirs)) == 2


class Named(nn.Module):
    """Linear layers [4, 4] of any names, dots included, one after the other."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        torch.manual_seed(3)
        for name in names:
            at: nn.Module = self
            *parents, last = name.split(".")
            for part in parents:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at._modules[part]  # type: ignore[assignment]
            at.add_module(last, nn.Linear(4, 4))
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x


NESTED = ["fc", "block.fc", "head.block.fc"]
SPECIAL = ["h_0.fc", "h.0.fc", "a+b", "x.a+b", "aab", "n(1)[2]", "x.n(1)[2]", "a|b", "^c$", "d*", "e\\d", "e5"]


@pytest.mark.parametrize("names", [NESTED, NESTED[::-1], [NESTED[1], NESTED[0], NESTED[2]], SPECIAL, SPECIAL[::-1]])
@pytest.mark.parametrize("adapted", ["all", "but the last"])
def test_every_layer_keeps_its_rank_and_alpha(names: list[str], adapted: str, tmp_path: Path) -> None:
    """Names that end like others, and names that are other expressions: read by this package and by PEFT alike."""
    peft = pytest.importorskip("peft")
    ours = names if adapted == "all" else names[:-1]
    targets = "|".join(map(re.escape, ours))
    adapters = inject(Named(names), targets, r=1)
    pairs = {n: (1 + i % 3, 2.0 + i) for i, n in enumerate(ours)}  # r, alpha
    for name, layer in adapters.layers.items():
        r, alpha = pairs[name]
        layer.add_adapter("a", [(torch.randn(r, 4), torch.randn(4, r))], alpha)
    adapters.set_adapter("a")
    x = torch.randn(5, 4)
    expected = adapters.model(x)
    save_adapter(adapters, tmp_path, "a")

    fresh = inject(Named(names), targets, r=1)
    load_adapter(fresh, tmp_path, "b")
    assert {n: (layer.r["b"], layer.lora_alpha["b"]) for n, layer in fresh.layers.items()} == pairs
    fresh.set_adapter("b")
    torch.testing.assert_close(fresh.model(x), expected, rtol=0, atol=1e-6)

    theirs = peft.PeftModel.from_pretrained(Named(names), str(tmp_path))
    assert len(peft.get_peft_model_state_dict(theirs)) == 2 * len(ours)
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5)

    config = json.loads((tmp_path / CONFIG).read_text())
    for name in ours:  # PEFT up to 0.13: one expression for both, or the name itself
        both = [*config["rank_pattern"], *config["alpha_pattern"]]
        key = next((key for key in both if re.match(rf".*\.{key}$", name)), name)
        found = config["rank_pattern"].get(key, config["r"]), config["alpha_pattern"].get(key, config["lora_alpha"])
        assert found == pairs[name], name


@pytest.mark.parametrize(
    "pattern",
    [
        {"block.fc": 8},
        {"^fc": 8},
        {"fc": 8, "block.fc": 4},
        {"block.fc": 8, "head.*": 4},
        {".*fc": 3, "head.block.fc": 8},  # the first one counts, for all three
        {"head.block.fc": 3, "block.fc": 8},
        {"(head|block).*": 5},
        {"head.block": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["rank_pattern", "alpha_pattern"])
def test_patterns_are_read_as_peft_reads_them(which: str, pattern: dict[str, int], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.15", reason="PEFT had another rule before 0.15")
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["fc"], init_lora_weights=False, use_rslora=True, **{which: pattern}
    )
    peft.get_peft_model(Named(NESTED), config).save_pretrained(tmp_path / "theirs")  # sorts the patterns by their keys
    adapters, x = inject(Named(NESTED), ["fc"], r=2), torch.randn(3, 4)
    try:
        theirs = peft.PeftModel.from_pretrained(Named(NESTED), str(tmp_path / "theirs")).eval()
    except RuntimeError as error:
        assert "size mismatch" in str(error)  # sorted, the ranks are others: PEFT cannot read it again either
        with pytest.raises(ValueError, match="weight must be"):
            load_adapter(adapters, tmp_path / "theirs", "a")
        return
    load_adapter(adapters, tmp_path / "theirs", "a")
    save_adapter(adapters, tmp_path / "again", "a")
    adapters.set_adapter("a")
    torch.testing.assert_close(adapters.model(x), theirs(x), rtol=0, atol=1e-5)
    again = peft.PeftModel.from_pretrained(Named(NESTED), str(tmp_path / "again"))
    torch.testing.assert_close(again(x), theirs(x), rtol=0, atol=1e-5)


def test_a_name_that_is_no_expression_counts_as_a_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["a+b", "fc"], init_lora_weights=False, alpha_pattern={"a+b": 8}
    )
    theirs, x = peft.get_peft_model(Named(["a+b", "fc"]), config).eval(), torch.randn(3, 4)
    theirs.save_pretrained(tmp_path)
    adapters = inject(Named(["a+b", "fc"]), ["a+b", "fc"], r=2)
    load_adapter(adapters, tmp_path, "a")
    assert [layer.lora_alpha["a"] for layer in adapters.layers.values()] == [8, 2]
    adapters.set_adapter("a")
    torch.testing.assert_close(adapters.model(x), theirs(x), rtol=0, atol=1e-5)


def test_an_expression_that_is_none(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**config, "alpha_pattern": {"(fc": 2}}))
    refused(saved, r"adapter_config\.json: alpha_pattern has '\(fc', no regular expression")
    (saved / CONFIG).write_text(json.dumps({**config, "rank_pattern": ["fc"]}))
    refused(saved, r"rank_pattern must be an object of expressions and numbers, got \['fc'\]")


def test_a_model_whose_own_names_begin_like_peft_s(tmp_path: Path) -> None:
    names = ["fc", "base_model.model.fc"]
    adapters = inject(Named(names), ["fc"], r=2)
    adapters.add_adapter("a")
    torch.manual_seed(2)
    for parameter in adapters.parameters("a"):
        nn.init.normal_(parameter)
    save_adapter(adapters, tmp_path, "a")
    for keys in ("PEFT's", "without the prefix"):
        if keys != "PEFT's":
            state = load_file(tmp_path / WEIGHTS)
            save_file({k.removeprefix("base_model.model."): v for k, v in state.items()}, tmp_path / WEIGHTS)
        load_adapter(adapters, tmp_path, "b")
        same_parameters(adapters, "a", adapters, "b")
        adapters.delete_adapter("b")


def test_a_module_named_base_layer_is_told_apart(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    names = ["base_layer", "block.base_layer"]
    adapters = inject(Named(names), "base_layer", r=2)
    adapters.add_adapter("a")
    save_adapter(adapters, tmp_path, "a")
    theirs = peft.PeftModel.from_pretrained(Named(names), str(tmp_path))
    assert len(peft.get_peft_model_state_dict(theirs)) == 2


def test_keys_without_peft_s_prefix(tmp_path: Path) -> None:
    adapters = make()
    save_adapter(adapters, tmp_path, "a")
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k.removeprefix("base_model.model."): v for k, v in tensors.items()}, tmp_path / WEIGHTS)
    load_adapter(adapters, tmp_path, "again")
    same_parameters(adapters, "a", adapters, "again")


def test_a_compiled_model_s_files_are_those_of_the_model(tmp_path: Path) -> None:
    """torch.compile puts `_orig_mod.` into the names: whole models, and blocks of their own."""
    adapters = make()
    model: Any = torch.compile(adapters.model)
    model.blocks[1] = torch.compile(model.blocks[1])
    compiled = Adapters(model)
    assert "_orig_mod.blocks.1._orig_mod.attn.qkv" in compiled.layers
    save_adapter(compiled, tmp_path, "a")
    plain = make()
    load_adapter(plain, tmp_path, "again")
    load_adapter(compiled, tmp_path, "again")
    same_parameters(plain, "a", plain, "again")
    same_parameters(compiled, "a", compiled, "again")
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == list(plain.layers)


# ---------------------------------------------------------------------- writing


def test_a_failed_write_leaves_no_mixed_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = make()
    save_adapter(adapters, tmp_path, "a")
    save_adapter(adapters, tmp_path, "b")  # replaces the pair
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 3
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == CONFIG:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(adapters, tmp_path, "a")
    assert os.listdir(tmp_path) == [WEIGHTS]  # no temporary file, no configuration of the other adapter
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_adapter(adapters, tmp_path, "x")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_adapter(make(), tmp_path / "file", "a")
    with pytest.raises(KeyError, match="unknown adapter 'z'"):
        save_adapter(make(), tmp_path / "new", "z")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------- bad files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(make(), tmp_path, "a")
    return tmp_path


def rewrite(folder: Path, drop: str | None = None, **tensors: Tensor) -> None:
    state = load_file(folder / WEIGHTS)
    state.pop(drop, None)
    save_file({**state, **tensors}, folder / WEIGHTS)


def refused(folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    adapters = make()
    keys = list(adapters.model.state_dict())
    with pytest.raises(error, match=message):
        load_adapter(adapters, folder, "x")
    assert list(adapters.model.state_dict()) == keys and adapters.names == ["a", "b", "fused"]


@pytest.mark.parametrize(
    "field",
    [
        {"peft_type": "LOHA"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["head"]},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "olora"},
        {"arrow_config": {"top_k": 2}},
        {"alora_invocation_tokens": [3]},
        {"target_parameters": ["fc.weight"]},
        {"layer_replication": [[0, 2]]},
        {"use_bdlora": {"nblocks": 2}},
        {"use_something_of_tomorrow": True},
        {"something_of_tomorrow": {"scale": 2.0}},
    ],
    ids=str,
)
def test_more_than_plain_lora_is_refused(field, saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**config, **field}))
    refused(saved, rf"adapter_config\.json asks for more than plain LoRA on linear layers: .*{next(iter(field))}")


def test_configuration_that_is_none(saved: Path) -> None:
    for text, message in (
        ("{", "is not valid JSON"),
        ("[1]", "lacks"),
        ('{"r": 4}', r"lacks \['peft_type', 'lora_alpha'\]"),
    ):
        (saved / CONFIG).write_text(text)
        refused(saved, rf"adapter_config\.json {message}")


def test_an_alpha_that_is_no_number(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    for value, text in (("8", "'8'"), (float("nan"), "nan"), (float("inf"), "inf")):
        (saved / CONFIG).write_text(json.dumps({**config, "alpha_pattern": {"proj": value}}))
        refused(saved, rf"lora_alpha must be a number, got {text} for blocks\.0\.attn\.proj")


def test_what_later_versions_may_add_and_leave_off(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    off = {"use_something_of_tomorrow": False, "something": None, "list_of_tomorrow": []}
    (saved / CONFIG).write_text(json.dumps({**config, **off, "peft_version": "9.0"}))
    adapters = make()
    load_adapter(adapters, saved, "again")
    same_parameters(adapters, "a", adapters, "again")


def test_missing_files(saved: Path) -> None:
    refused(saved / "nowhere", r"nowhere.adapter_config\.json is missing", FileNotFoundError)
    (saved / WEIGHTS).unlink()
    refused(saved, r"adapter_model\.safetensors is missing", FileNotFoundError)


def test_weights_that_do_not_fit(saved: Path) -> None:
    key = f"{QKV}.lora_A.weight"
    rewrite(saved, drop=key)
    refused(saved, r"lacks 1 keys \(blocks\.0\.attn\.qkv\.lora_A\.weight\)")
    rewrite(saved, **{key: torch.ones(5, 64)})
    refused(saved, r"blocks\.0\.attn\.qkv\.lora_A\.weight must be \[4, 64\], got \[5, 64\]")
    rewrite(saved, **{key: torch.ones(4, 64), f"{QKV}.lora_magnitude_vector": torch.ones(4)})
    refused(saved, r"it has 1 keys \(base_model.*lora_magnitude_vector \[4\]\) that no adapted layer takes")
    (saved / WEIGHTS).write_bytes(b"not this")
    refused(saved, r"adapter_model\.safetensors is not a safetensors file")


def test_convolutions_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(vit(), peft.LoraConfig(r=4, target_modules=["qkv", "proj"]))
    theirs.save_pretrained(tmp_path)  # "proj" is the patch embedding too
    refused(tmp_path, r"patch_embed\.proj\.lora_[AB]\.weight \[.*\]\).*inject the model with the target_modules")


def test_an_adapter_of_the_whole_qkv_does_not_fit_slices(saved: Path) -> None:
    adapters = inject(vit(), ["q", "v", "attn.proj"], r=4)
    with pytest.raises(ValueError, match=r"must be block-wise.*slice \['q', 'v'\].*inject the model with 'qkv'"):
        load_adapter(adapters, saved, "x")
    assert adapters.names == []


def test_a_name_that_is_taken(saved: Path) -> None:
    with pytest.raises(ValueError, match="adapter 'a' exists already"):
        load_adapter(make(), saved, "a")


def test_a_layer_in_several_places_is_said_to_be_another_one_to_peft(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    whole = nn.Sequential(block := nn.Sequential(nn.Linear(4, 4)), block)  # which PEFT adapts wherever it is
    for shared, target, warns in ((model, ["0"], 1), (whole, ["0.0"], 0)):
        adapters = inject(shared, target, r=2)
        adapters.add_adapter("a")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save_adapter(adapters, tmp_path, "a")
            load_adapter(adapters, tmp_path, "b")
        assert ["in several places" in str(warning.message) for warning in caught] == [True] * 2 * warns
