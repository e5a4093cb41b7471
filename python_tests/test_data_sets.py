"""Data sets in every format, written small by the tests, and how stored images become batches."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torchvision.datasets import CIFAR100

from plora_ext.cil import Settings
from plora_ext.cil.build import load_data
from plora_ext.cil.loop import run
from plora_ext.data import Backbone, ImageFiles, Preparation, View, hold_out, load_images
from plora_ext.data import view as views
from plora_ext.data.images import Images, checked, doubles
from plora_ext.data.inputs import image_paths, read_images, read_labelled, to_pixels
from plora_ext.data.sets import FOLDERS

SPLITS = ("train", "test")


def pixels(number: int, size: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


def write_folders(root: Path, classes: tuple[str, ...] = ("ant", "bee", "cat"), each: int = 2) -> Path:
    for s, split in enumerate(SPLITS):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(pixels(each, seed=10 * s + c)):
                Image.fromarray(image).save(root / split / name / f"{i}.png")
    return root


def write_idx(folder: Path, zipped: bool = True) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = pixels(6)[..., 0], np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)
    for stem in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            path = folder / f"{stem}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return images, labels


def prepared(images: np.ndarray | ImageFiles, **changes) -> View:
    return View(images, Preparation(**{"image_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3, **changes}))


def whole(view: View, batch_size: int = 4) -> torch.Tensor:
    return torch.cat(list(view.split(batch_size)))


def epoch(view: View, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    rows, batches = zip(*view.epoch(torch.randperm(len(view)), 4))
    return torch.cat(rows), torch.cat(batches)


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", [*FOLDERS, None])
def test_class_folders(name: str | None, tmp_path: Path) -> None:
    folder = write_folders(tmp_path / (FOLDERS[name] if name else "mine"))
    data = load_images(name, tmp_path) if name else load_images(str(folder))
    assert data.class_names == ["ant", "bee", "cat"]
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(data.test_images[3], pixels(2, seed=11)[1])


def test_idx_files(tmp_path: Path) -> None:
    images, labels = write_idx(tmp_path / "fashion-mnist")
    data = load_images("fashion-mnist", tmp_path)
    np.testing.assert_array_equal(data.train_images, np.stack([images] * 3, -1))
    np.testing.assert_array_equal(data.test_labels, labels)
    assert data.class_names is not None and len(data.class_names) == 10
    write_idx(tmp_path / "FashionMNIST" / "raw", zipped=False)  # torchvision's layout, and any folder by its path
    for again in (load_images(str(tmp_path / "FashionMNIST" / "raw")), load_images("fashion-mnist", tmp_path)):
        np.testing.assert_array_equal(again.train_images, data.train_images)


def write_cifar100(root: Path, labels: list[int], names: list[str]) -> dict[str, str]:
    """Returns the checksums of the files."""
    folder, number = root / CIFAR100.base_folder, len(labels)
    folder.mkdir()
    flat = pixels(number, 32).transpose(0, 3, 1, 2).reshape(number, -1)
    contents = {name: {"data": flat, "fine_labels": labels} for name in SPLITS}
    sums = {}
    for name, content in {**contents, "meta": {"fine_label_names": names}}.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return sums


def expect(sums: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})


def test_cifar100_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = write_cifar100(tmp_path, [0, 1, 2, 2], ["a", "b", "c"])
    with pytest.raises(FileNotFoundError, match=r"cifar100 is not whole: looked for .*cifar-100-python .*data_root"):
        load_images("cifar100", tmp_path)  # the checksums of the real set: nothing is unpickled
    expect(sums, monkeypatch)
    data = load_images("cifar100", tmp_path)
    np.testing.assert_array_equal(data.train_images, pixels(4, 32))
    assert data.test_labels.tolist() == [0, 1, 2, 2] and data.class_names == ["a", "b", "c"]


def test_settings_name_the_data(tmp_path: Path) -> None:
    write_folders(tmp_path / "cub")
    data = load_data(Settings(data="cub", data_root=str(tmp_path)))
    assert len(data.train_images) == 6
    digest = data.digest()
    assert digest == load_images(str(tmp_path / "cub")).digest()
    (tmp_path / "cub" / "test" / "cat" / "new.png").write_bytes((tmp_path / "cub/test/cat/0.png").read_bytes())
    assert load_images("cub", tmp_path).digest() != digest


# ---------------------------------------------------------------------- held out


def numbered(labels: list[int], groups: list[int] | None = None) -> Images:
    """Training images that hold their own number."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    return Images(
        images,
        np.array(labels),
        images[:0],
        np.zeros(0, np.int64),
        train_groups=None if groups is None else np.array(groups),
    )


def test_a_share_of_every_class_is_held_out() -> None:
    labels = [0] * 10 + [1] * 5 + [2] * 2 + [3] + [0] * 10
    whole = numbered(labels)
    part = hold_out(whole, 0.3)
    assert np.bincount(part.test_labels).tolist() == [6, 2, 1]  # of one image none, of two one
    assert np.bincount(part.train_labels).tolist() == [14, 3, 1, 1]
    for images, own in ((part.train_images, part.train_labels), (part.test_images, part.test_labels)):
        assert [labels[i] for i in images.ravel()[::3]] == own.tolist()
    everything = np.concatenate([part.train_images, part.test_images]).ravel()[::3]
    assert sorted(everything.tolist()) == list(range(28))
    np.random.seed(5)
    np.testing.assert_array_equal(part.test_images, hold_out(whole, 0.3).test_images)
    drawn = np.random.rand()
    np.random.seed(5)
    assert np.random.rand() == drawn  # nobody else has drawn
    other = hold_out(numbered(labels + [3] * 9), 0.3)  # more of another class changes nothing
    np.testing.assert_array_equal(other.test_images[other.test_labels < 3], part.test_images)
    assert hold_out(whole, 0) is whole and hold_out(part, 0.3) is part
    with pytest.raises(ValueError, match="validation is 0.2, but data has 0.3 of its images held out"):
        hold_out(part, 0.2)


def test_sources_are_held_out_whole() -> None:
    groups = np.tile(np.arange(10), 8)
    part = hold_out(numbered([0] * 40 + [1] * 40, groups.tolist()), 0.25)
    held = groups[part.test_images.ravel()[::3]]
    assert len(np.unique(held)) == 2 and len(held) == 16 and not set(held) & set(part.train_groups)
    alone = hold_out(numbered([0, 0, 1, 1, 2], [0, 0, 1, 1, 2]), 0.9)  # each class is of one source
    assert len(alone.test_labels) == 0
    with pytest.raises(ValueError, match="train_groups must hold a number for each of 2 training images, got 1"):
        checked(numbered([0, 1], [3]))


def test_icon100_holds_out_families() -> None:
    data = load_data(Settings(validation=0.2))
    whole = load_images("icon100")
    assert (len(data.train_images), len(data.test_images)) == (6613, 1651) and len(np.unique(whole.train_groups)) == 71
    shares = np.bincount(data.test_labels) / np.bincount(whole.train_labels)
    assert shares.min() > 0.09 and shares.max() < 0.33
    assert data.digest() == load_data(Settings(validation=0.2, seed=1)).digest() != whole.digest()


def test_with_validation_no_test_file_is_opened(tmp_path: Path) -> None:
    write_folders(tmp_path, each=4)
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="is no image that can be decoded"):
        load_data(Settings(data=str(tmp_path)))
    for corrupt in ("error", "skip"):
        data = load_data(Settings(data=str(tmp_path), validation=0.25, corrupt=corrupt))
        assert [path.parent.parent.name for path in data.test_images.paths] == ["train"] * 3
        assert data.test_labels.tolist() == [0, 1, 2] and len(data.train_images) == 9


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DATA = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.name.startswith("icon100")]
METHODS = [None, *sorted((CONFIGS / "methods").glob("*.yaml"))]


@pytest.mark.parametrize(("data", "method"), [(DATA[i % len(DATA)], method) for i, method in enumerate(METHODS)])
def test_configurations_on_a_small_set_of_their_layout(
    data: Path, method: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(DATA) <= len(METHODS)  # every file is used
    changes = {"data_root": str(tmp_path), "epochs": 1, "workers": 0, "device": "cpu", "projections": 50, "r": 2}
    settings = Settings.load([data, *([method] if method else [])], changes)
    classes = 2 * settings.increment + 1
    names = tuple(f"c{i:03}" for i in range(classes))
    if settings.data == "cifar100":
        expect(write_cifar100(tmp_path, list(range(classes)), list(names)), monkeypatch)
    else:
        write_folders(tmp_path / FOLDERS[settings.data], names, each=1)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    result = run(settings, backbone=Backbone(vit.eval(), 16, [0.5] * 3, [0.5] * 3))
    assert result.classes_seen == [settings.increment, 2 * settings.increment, classes]
    assert (result.class_order == list(range(classes))) == (settings.class_order == "sorted")
    assert result.num_train == classes and all(0 <= accuracy <= 100 for accuracy in result.curve)


# ---------------------------------------------------------------------- what is wrong with data


def test_missing_folders_say_where_and_how(tmp_path: Path) -> None:
    expected = rf"no data at {tmp_path}/imagenet-r: expected .*train/<class>/<image> and .*test/<class>.*set data_root"
    with pytest.raises(FileNotFoundError, match=expected):
        load_images("imagenet-r", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="train-images-idx3-ubyte .* is missing: looked for it in .*fashion-mnist"
    ):
        load_images("fashion-mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match="'some/folder' is no folder, looked for at /"):
        load_images("some/folder")
    with pytest.raises(ValueError, match="unknown data 'imagenet-s', and no folder /.*; did you mean 'imagenet-r'?"):
        load_images("imagenet-s")


def test_class_folders_that_differ(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "dog")
    with pytest.raises(ValueError, match="same class folders; only in train: cat; only in test: dog"):
        load_images(str(tmp_path))


def test_idx_files_cut_short(tmp_path: Path) -> None:
    write_idx(tmp_path, zipped=False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte must hold 6 bytes for its shape \[6\], got 5"):
        load_images(str(tmp_path))
    labels.write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="is no IDX file of unsigned bytes, it begins 50 4b"):
        load_images(str(tmp_path))
    labels.write_bytes(b"\0\0\x08\3\0\0")
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is cut short: it ends within its header"):
        load_images(str(tmp_path))
    labels.unlink()
    whole = gzip.compress(b"much" * 9)
    for damaged in (whole[:-4], whole[:10] + b"\xff" * 8 + whole[18:]):
        labels.with_suffix(".gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="cut short or no gzip file"):
            load_images(str(tmp_path))


def write_npz(path: Path, **changes: object) -> Path:
    arrays = {f"{split}_{kind}": pixels(4) if kind == "images" else np.arange(4) % 2
              for split in SPLITS for kind in ("images", "labels")}  # fmt: skip
    np.savez(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_bytes(b""), "is no whole .npz file: it is empty, cut short, or something else"),
        (lambda p: p.write_bytes(p.read_bytes()[:400]), "is no whole .npz file: it is empty, cut short"),
        (lambda p: p.write_text("train_images"), "is no whole .npz file"),
        (lambda p: np.save(p.open("wb"), pixels(2)), "is no whole .npz file"),
        (
            lambda p: p.write_bytes(p.read_bytes().replace(pixels(4).tobytes()[:64], bytes(64), 1)),
            "train_images cannot be",
        ),
        (
            lambda p: write_npz(p, train_labels=np.array([{}] * 4)),
            "train_labels cannot be read: it holds Python objects",
        ),
        (lambda p: write_npz(p, test_images=None), "but lacks test_images"),
        (
            lambda p: write_npz(p, test_images=np.zeros((4, 0, 5, 3), np.uint8)),
            "test_images must be of a height and a width",
        ),
        (
            lambda p: write_npz(p, test_labels=np.arange(3)),
            r"test_labels must be integers of shape \[4\], one an image",
        ),
        (lambda p: write_npz(p, class_names=np.array(["a"])), "class_names must name each of 2 classes, got 1"),
        (lambda p: write_npz(p, class_names=np.array("ab")), r"class_names must be one name a class, got shape \[\]"),
        (
            lambda p: write_npz(p, train_images=pixels(4).astype(np.int32) * 1000),
            r"train_images must hold integers in \[0",
        ),
        (
            lambda p: write_npz(p, train_images=np.full((4, 5, 5, 3), np.nan)),
            r"train_images must hold floats in \[0, 1\]",
        ),
    ],
    ids="empty short text npy bit objects lacks size labels names scalar integers nan".split(),
)
def test_an_npz_file_that_is_not_whole_is_named(spoil, message: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz")
    spoil(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(str(path))
    assert "x.npz" in str(caught.value) and "allow_pickle" not in str(caught.value)


def test_npz_of_other_number_types_and_with_names(tmp_path: Path) -> None:
    wide = pixels(4).astype(np.uint16) * 257
    data = load_images(write_npz(tmp_path / "x.npz", train_images=wide, test_images=pixels(4) / 255.0,
                                 class_names=np.array(["ant", "bee"])))  # fmt: skip
    np.testing.assert_array_equal(data.train_images, pixels(4))
    np.testing.assert_array_equal(data.test_images, pixels(4))
    assert data.class_names == ["ant", "bee"]
    raw = np.array(["é".encode(), b"bee"])
    assert load_images(write_npz(tmp_path / "y.npz", class_names=raw)).class_names == ["é", "bee"]


def test_images_of_more_than_8_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    saved = {
        "u16.png": ramp.astype(np.uint16),
        "i32.tif": ramp.astype(np.int32),
        "f01.tif": (ramp / 65535).astype(np.float32),
        "f255.tif": (ramp / 257).astype(np.float32),
    }
    for name, values in saved.items():
        Image.fromarray(values).save(tmp_path / name)
        image = ImageFiles([tmp_path / name])[0]
        assert image.shape == (8, 8, 3) and np.abs(image[..., 1] - ramp / 257).max() <= 1, name
    for name, values in (("i.tif", ramp.astype(np.int32) * 9), ("f.tif", ramp.astype(np.float32) - 3)):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is no image that can be decoded \(must hold .* scale them to 8"):
            ImageFiles([tmp_path / name])[0]


def test_orientation_and_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(1, 8)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(ImageFiles([tmp_path / "turned.png"])[0], np.rot90(pixels(1, 8)[0], -1))
    clear = np.concatenate([pixels(1, 8)[0], np.zeros((8, 8, 1), np.uint8)], -1)
    clear[0, 0, 3] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    seen = ImageFiles([tmp_path / "clear.png"])[0]
    np.testing.assert_array_equal(seen[0, 0], clear[0, 0, :3])
    assert (seen[1:] == 255).all()
    deep = np.full((8, 8), 257 * 100, np.uint16)
    deep[0] = 0  # what the file has as transparent
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=0)
    seen = ImageFiles([tmp_path / "deep.png"])[0]
    assert (seen[0] == 255).all() and (seen[1:] == 100).all()


def write_png(path: Path, rows: list, depth: int, color: int, *more: tuple[bytes, bytes]) -> Path:
    """A file of values [H, W, channels] with these chunks before them: Pillow does not write all kinds."""
    body = b""
    for row in np.array(rows):
        bits = "".join(format(value, f"0{depth}b") for value in row.ravel())
        body += b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v)) for k, v in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
PLTE = (b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))


@pytest.mark.parametrize(
    ("depth", "color", "row", "more", "wanted"),
    [
        (1, GRAY, [0, 1, 1], [], [0, 255, 255]),
        (1, GRAY, [0, 1, 0], [(b"tRNS", b"\0\0")], [255, 255, 255]),
        (2, GRAY, [0, 1, 2], [(b"tRNS", b"\0\1")], [0, 255, 170]),
        (4, GRAY, [0, 1, 2], [(b"tRNS", b"\0\2")], [0, 17, 255]),
        (8, GRAY, [0, 1, 2], [(b"tRNS", b"\0\1")], [0, 255, 2]),
        (16, GRAY, [257, 514, 514], [(b"tRNS", b"\1\1")], [255, 2, 2]),
        (16, GRAY_ALPHA, [[257, 0], [0x8000, 65535], [65535, 0x8000]], [], [255, 128, 255]),
        (8, RGB, [[0, 1, 2], [1, 2, 3]], [(b"tRNS", b"\0\1\0\2\0\3")], [[0, 1, 2], [255] * 3]),
        (16, RGB, [[257, 514, 771], [0x12FF, 0, 65535]], [], [[1, 2, 3], [0x12, 0, 255]]),
        (8, PALETTE, [0, 1, 2], [PLTE], [[10, 20, 30], [40, 50, 60], [70, 80, 90]]),
        (8, PALETTE, [0, 1, 2], [PLTE, (b"tRNS", b"\0\x80")], [[255] * 3, [147, 152, 157], [70, 80, 90]]),
        (2, PALETTE, [0, 1, 2], [PLTE, (b"tRNS", b"\xff\0")], [[10, 20, 30], [255] * 3, [70, 80, 90]]),
    ],
)
def test_png_files_of_every_kind(depth: int, color: int, row: list, more: list, wanted: list, tmp_path: Path) -> None:
    image = ImageFiles([write_png(tmp_path / "x.png", [row], depth, color, *more)])[0]
    assert image.shape == (1, len(row), 3)
    assert image[0].tolist() == [[value] * 3 if isinstance(value, int) else value for value in wanted]


def test_colours_of_16_bits_of_which_one_is_transparent_are_refused_at_the_start(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for values in ([0x1234, 0x5678, 0x9ABC], [1, 2, 3]):  # Pillow keeps the upper bits of pixels, all bits of the key
        key = (b"tRNS", struct.pack(">HHH", *values))
        write_png(tmp_path / "train" / "ant" / "x.png", [[values, [256, 512, 768]]], 16, RGB, key)
        with pytest.raises(ValueError, match="ant/x.png is no image that can be decoded .its colours have 16 bits and"):
            load_images(tmp_path)
        with pytest.warns(UserWarning, match="left out 1 images that cannot be decoded: .*x.png"):
            assert len(load_images(tmp_path, corrupt="skip").train_images) == 6


def test_jpeg_files_of_every_kind(tmp_path: Path) -> None:
    flat = np.zeros((16, 32, 3), np.uint8)
    flat[:, :16], flat[:, 16:] = [200, 30, 60], [10, 220, 90]
    exif = Image.Exif()
    exif[0x0112] = 8  # a quarter turn to the left
    kinds = {"plain": {}, "progressive": {"progressive": True}, "turned": {"exif": exif}}
    for name, options in kinds.items():
        Image.fromarray(flat).save(tmp_path / f"{name}.jpg", quality=95, subsampling=0, **options)
        image = ImageFiles([tmp_path / f"{name}.jpg"])[0].astype(int)
        assert np.abs(image - (np.rot90(flat) if name == "turned" else flat)).max() <= 2, name
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(ImageFiles([tmp_path / "cmyk.jpg"])[0].astype(int) - flat).max() <= 2


def test_tensors_of_torchvision_are_as_files(tmp_path: Path) -> None:
    """A Dataset may decode by torchvision.io; it knows nothing of what is transparent, so that alpha is refused."""
    io = pytest.importorskip("torchvision.io")
    rows = {GRAY: [[1, 300, 65535], [4863, 22271, 39679]], RGB: [[[1, 300, 65535], [4863, 22271, 39679]]]}
    for depth, color in ((8, GRAY), (16, GRAY), (8, RGB), (16, RGB)):
        path = write_png(tmp_path / "x.png", (np.array(rows[color]) % 2**depth).tolist(), depth, color)
        tensor = io.decode_image(str(path))
        assert tensor.dtype == (torch.uint8 if depth == 8 else torch.uint16)
        off = np.abs(to_pixels(tensor).astype(int) - ImageFiles([path])[0])
        assert off.max() <= (1 if (depth, color) == (16, RGB) else 0)  # of these Pillow reads the upper eight bits
    for color, channels in ((GRAY_ALPHA, 2), (RGB_ALPHA, 4)):
        path = write_png(tmp_path / "x.png", np.full((2, 3, channels), 9).tolist(), 8, color)
        with pytest.raises(ValueError, match=rf"an image must be a PIL image, .*got Tensor \[{channels}, 2, 3\]"):
            to_pixels(io.decode_image(str(path)))


def test_tiff_files_of_16_bits_whose_zero_is_white(tmp_path: Path) -> None:
    Image.fromarray(np.uint16([[10 * 257, 245 * 257]])).save(tmp_path / "x.tif")
    content = bytearray((tmp_path / "x.tif").read_bytes())
    content[content.index(struct.pack("<HHI", 262, 3, 1)) + 8] = 0  # PhotometricInterpretation
    (tmp_path / "x.tif").write_bytes(content)
    assert ImageFiles([tmp_path / "x.tif"])[0][0, :, 0].tolist() == [245, 10]


def test_colours_of_12_bits_in_16_are_said_to_be_dark(tmp_path: Path) -> None:
    write_folders(tmp_path)
    write_png(tmp_path / "train" / "ant" / "0.png", [[[4095, 4000, 0]]], 16, RGB)
    with pytest.warns(UserWarning, match="ant/0.png and 0 images more reach 15 of 255"):
        load_images(tmp_path)


def test_pipes_by_the_name_of_an_image_are_no_images(tmp_path: Path) -> None:
    write_folders(tmp_path)
    pipe = tmp_path / "train" / "ant" / "pipe.png"
    os.mkfifo(pipe)
    (tmp_path / "train" / "ant" / "zero.png").symlink_to("/dev/zero")
    found: list[object] = []

    def look() -> None:
        for read in (load_images, read_labelled):
            folder = tmp_path if read is load_images else tmp_path / "train"
            for corrupt in ("error", "skip"):
                try:
                    found.append(len(read(folder, corrupt=corrupt).train_labels if read is load_images
                                     else read(folder, corrupt)[1]))  # fmt: skip
                except ValueError as error:
                    found.append(str(error))
        try:
            ImageFiles(image_paths([tmp_path / "train" / "ant"]))[2]
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=look, daemon=True)  # opening a pipe waits for its writer
    with pytest.warns(UserWarning, match="left out 2 images that cannot be decoded: .*pipe.png, .*zero.png"):
        thread.start()
        thread.join(60)
    said = f"{pipe} is no image that can be decoded (it is no regular file); mend or remove it, or set corrupt to skip"
    assert found == [f"{said} (and 1 images more)", 6, f"{said} (and 1 images more)", 6, said]


def test_test_images_that_are_training_images_are_counted(tmp_path: Path) -> None:
    write_folders(tmp_path)
    assert doubles(load_images(str(tmp_path))) == 0
    for name in ("ant", "bee"):
        (tmp_path / "test" / name / "again.png").write_bytes((tmp_path / "train" / name / "0.png").read_bytes())
    assert doubles(load_images(str(tmp_path))) == 2
    both = np.concatenate([pixels(3, seed=5), pixels(2)])
    assert doubles(Images(pixels(4), np.arange(4), both, np.arange(5))) == 2
    with pytest.raises(ValueError, match="class_names must name each of 5 classes"):
        checked(Images(pixels(4), np.arange(4), both, np.arange(5), ["a"]))


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images were left out without a word."""
    write_folders(tmp_path)
    closed, scan = tmp_path / "train" / "ant" / "more", os.scandir
    closed.mkdir()

    def scandir(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(closed))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="Permission denied: '.*ant/more'"):
        load_images(str(tmp_path))


def test_a_preparation_by_no_known_transform_is_refused() -> None:
    with pytest.raises(ValueError, match="transform must be resize or pilot, got 'crop'"):
        Preparation(8, [0.5] * 3, [0.5] * 3, transform="crop")


def test_hidden_files_and_links(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert load_images(str(tmp_path)).train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    (tmp_path / "train" / "bee" / "same.png").symlink_to(tmp_path / "train" / "bee" / "0.png")
    with pytest.warns(UserWarning, match="left out 1 images that links lead to a second time"):
        assert load_images(str(tmp_path)).train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    (tmp_path / "train" / "ant" / "other").symlink_to(tmp_path / "train" / "bee")
    said = f"{tmp_path}/train/bee is left with none"
    with pytest.warns(UserWarning, match="left out 4 images that links"), pytest.raises(ValueError, match=said):
        load_images(str(tmp_path))
    (tmp_path / "train" / "ant" / "other").unlink()
    (tmp_path / "train" / "ant" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="ant/loop is a link to a folder above it"):
        load_images(str(tmp_path))


def test_class_folders_without_images_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for image in (tmp_path / "test" / "bee").iterdir():
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(ValueError, match=rf"but {tmp_path}/test/bee holds no image \(.jpg .*\): add some, or remove"):
        load_images(str(tmp_path))
    write_folders(tmp_path)
    for image in (tmp_path / "train" / "ant").iterdir():
        image.write_bytes(b"no image")
    said = f"{tmp_path}/train/ant is left with none: mend its images"
    with pytest.warns(UserWarning, match="left out 2 images"), pytest.raises(ValueError, match=said):
        load_images(str(tmp_path), corrupt="skip")


def test_hidden_files_are_not_predicted(tmp_path: Path) -> None:
    for name in (".cache", "seen"):
        (tmp_path / name).mkdir()
        for file in ("a.pgm", "._a.png", "b.gif", "c.txt"):
            (tmp_path / name / file).touch()
    assert image_paths([tmp_path]) == [tmp_path / "seen" / "a.pgm", tmp_path / "seen" / "b.gif"]
    assert image_paths([tmp_path / ".cache"]) == [tmp_path / ".cache" / "a.pgm", tmp_path / ".cache" / "b.gif"]


def test_training_and_prediction_agree_about_what_an_image_is(tmp_path: Path) -> None:
    write_folders(tmp_path)
    added = [tmp_path / "train" / "ant" / f"9{end}" for end in (".gif", ".PGM", ".JFIF")]
    for path in added:
        Image.fromarray(pixels(1)[0]).save(path, "JPEG" if path.suffix == ".JFIF" else None)
    others = [tmp_path / "train" / "ant" / name for name in ("8.heic", "8.jxl")]
    for path in others:
        path.touch()
    loose = tmp_path / "test" / "loose.png"
    loose.write_bytes((tmp_path / "test" / "ant" / "0.png").read_bytes())
    with pytest.warns(UserWarning) as said:
        data = load_images(str(tmp_path))
    assert [str(warning.message) for warning in said] == [
        f"left out 2 images of a kind that Pillow cannot read here, such as {others[0]}: save them as JPEG or PNG",
        f"left out 1 images beside the class folders, such as {loose}: move them into their classes",
    ]
    assert np.bincount(data.train_labels).tolist() == [5, 2, 2] and set(added) < set(data.train_images.paths)
    with pytest.warns(UserWarning, match="left out 2 images of a kind"):
        assert image_paths([tmp_path / "train"]) == sorted(data.train_images.paths)
    with pytest.warns(UserWarning, match="left out 2 images of a kind"):
        assert read_labelled(tmp_path / "train")[1] == ["ant"] * 5 + ["bee"] * 2 + ["cat"] * 2
    for path in (*added, *(tmp_path / "train" / "ant").glob("*.png")):
        path.unlink()
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"train/ant holds no image \((?!.*heic).jpg .*\.avif"),
    ):
        load_images(str(tmp_path))


def test_a_plugin_of_pillow_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**Image.registered_extensions(), ".heic": "HEIF"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    (tmp_path / "a.heic").touch()
    assert image_paths([tmp_path]) == [tmp_path / "a.heic"]


def test_lists_and_tensors_become_arrays() -> None:
    given = Images(torch.from_numpy(pixels(4)), [0, 1, 0, 1], pixels(2), torch.tensor([0, 1]), ["a", "b"])
    data = checked(given)
    assert data.train_labels.tolist() == [0, 1, 0, 1] and data.class_names == ["a", "b"]
    np.testing.assert_array_equal(data.train_images, pixels(4))
    with pytest.raises(TypeError, match=r"data must be plora_ext.data.Images\(train_images, .*, got tuple"):
        checked((pixels(4), [0] * 4))


def test_a_file_that_is_no_image_is_found_before_anything_is_learned(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for name in ("bee", "cat"):
        (tmp_path / "test" / name / "1.png").write_bytes(b"no image")
    bad = tmp_path / "test" / "bee" / "1.png"
    with pytest.raises(ValueError, match=rf"^{bad} is no image .*set corrupt to skip \(and 1 images more\)$"):
        load_images(str(tmp_path))


def test_a_file_that_is_cut_short_is_found_before_anything_is_learned(tmp_path: Path) -> None:
    write_folders(tmp_path)
    good = tmp_path / "train" / "ant" / "0.png"
    good.write_bytes(good.read_bytes() + b"what a telephone appends")
    large = Image.fromarray(pixels(1, 64)[0])
    for name, suffix in (("ant", "jpg"), ("bee", "png"), ("bee", "gif.png")):
        large.save(bad := tmp_path / "test" / name / f"9.{suffix}", {"gif.png": "gif"}.get(suffix))
        content = bad.read_bytes()
        bad.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"^{bad} is no image .*set corrupt to skip$"):
            load_images(str(tmp_path))
        bad.write_bytes(content)
    assert len(load_images(str(tmp_path)).test_images) == 9


def test_images_of_more_than_8_bits_that_become_dark_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path)
    ramp = np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)  # 12 bits
    Image.fromarray(ramp).save(tmp_path / "train" / "ant" / "9.png")
    with pytest.warns(UserWarning, match="ant/9.png and 0 images more reach 16 of 255 at most: scale them"):
        load_images(str(tmp_path))
    twelve = np.repeat(ramp[None, :, :, None], 3, 3)
    with pytest.warns(UserWarning, match="x.npz: train_images reach 16 of 255"):
        load_images(str(write_npz(tmp_path / "x.npz", train_images=twelve, train_labels=np.zeros(1, int))))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_or_left_out(tmp_path: Path, workers: int) -> None:
    write_folders(tmp_path)
    bad = tmp_path / "train" / "bee" / "0.png"
    content = bytearray(bad.read_bytes())
    content[60] ^= 255
    bad.write_bytes(content)
    view = prepared(load_images(str(tmp_path)).train_images, workers=workers)
    with pytest.raises(ValueError, match=rf"^{bad} is no image that can be decoded .*set corrupt to skip$"):
        whole(view)
    with pytest.warns(UserWarning, match=f"left out 1 images that cannot be decoded: {bad}"):
        data = load_images(str(tmp_path), corrupt="skip")
    assert data.train_labels.tolist() == [0, 0, 1, 2, 2]
    assert len(whole(prepared(data.train_images, workers=workers))) == 5


class _Deadly(ImageFiles):
    def __getitem__(self, index: int) -> np.ndarray:
        os._exit(3)


def test_a_dead_worker_names_the_setting() -> None:
    view = prepared(_Deadly([Path("a")] * 4), workers=1)
    with pytest.raises(ChildProcessError, match="a data worker died .* lower workers, or set it to 0"):
        whole(view)


# ---------------------------------------------------------------------- batches


def test_files_give_the_pixels_of_arrays(tmp_path: Path) -> None:
    files = load_images(str(write_folders(tmp_path))).train_images
    arrays = np.stack([files[i] for i in range(len(files))])
    expected = whole(prepared(arrays))
    for workers in (0, 2):
        assert torch.equal(whole(prepared(files, workers=workers)), expected)
        assert torch.equal(epoch(prepared(files, workers=workers))[1], epoch(prepared(arrays))[1])


def test_passes_that_take_turns_keep_to_their_own_images(tmp_path: Path) -> None:
    """Of one data set, whose workers they share; one that is given up leaves them to the next."""
    files = load_images(str(write_folders(tmp_path))).train_images
    view, expected = prepared(files, workers=2), whole(prepared(files))
    for _ in range(2):
        forth, back = view.split(1), view[torch.arange(len(view)).flip(0)].split(1)
        for i, (one, other) in enumerate(zip(forth, back)):
            assert torch.equal(one[0], expected[i]) and torch.equal(other[0], expected[-1 - i])
        next(view.split(1))
    assert torch.equal(whole(view), expected) and not view._loader._under_way


def test_arrays_are_resized_once_or_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = prepared(pixels(7))
    monkeypatch.setattr(views, "READY_BYTES", 0)
    lazy = prepared(pixels(7))
    assert kept._ready is not None and lazy._ready is None
    assert torch.equal(whole(kept), whole(lazy)) and torch.equal(epoch(kept)[1], epoch(lazy)[1])


@pytest.mark.parametrize("transform", ["resize", "pilot"])
def test_selections(transform: str) -> None:
    view = prepared(pixels(9), transform=transform)
    everything, rows = whole(view), torch.tensor([7, 2, 2, 0])
    chosen = view[rows]
    assert len(chosen) == 4 and len(view) == 9
    assert torch.equal(whole(chosen), everything[rows])
    assert torch.equal(whole(chosen[torch.tensor([1, 3])]), everything[[2, 0]])
    plain = prepared(pixels(9), transform=transform, augment=False)
    order, batches = epoch(plain)
    assert torch.equal(batches, everything[order])


def test_pilot_transforms_are_those_of_pilot() -> None:
    """Against torchvision's first-generation transforms, as LAMDA-PILOT composes them, under the same seeds."""
    from torchvision import transforms as v1

    images = pixels(5, 40)
    view = prepared(images, image_size=28, transform="pilot", mean=[0.0] * 3, std=[1.0] * 3)
    test = v1.Compose([v1.Resize(32, v1.InterpolationMode.BICUBIC), v1.CenterCrop(28), v1.ToTensor()])
    assert torch.equal(whole(view), torch.stack([test(Image.fromarray(image)) for image in images]))

    train = v1.Compose(
        [v1.RandomResizedCrop(28, (0.05, 1.0), (3 / 4, 4 / 3)), v1.RandomHorizontalFlip(), v1.ToTensor()]
    )
    order, batches = epoch(view, seed=3)
    torch.manual_seed(3)
    assert torch.equal(torch.randperm(5), order)
    for row, seed, batch in zip(order, torch.randint(2**62, (5,)).tolist(), batches):
        torch.manual_seed(seed)
        assert torch.equal(train(Image.fromarray(images[row])), batch)


def test_pilot_batches_do_not_depend_on_workers() -> None:
    views_ = [prepared(pixels(9), transform="pilot", workers=workers) for workers in (0, 1, 2)]
    first, *others = [epoch(view, seed=1) for view in views_]
    state = torch.get_rng_state()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))
    assert torch.equal(epoch(views_[0], seed=1)[1], first[1]) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(epoch(views_[0], seed=2)[1], first[1])
    order = torch.arange(9)
    one, two = (torch.cat([b for _, b in views_[0].epoch(order, 4)]) for _ in range(2))
    assert not torch.equal(one, two)  # another epoch, other crops


def test_digests_tell_images_and_preparations_apart(tmp_path: Path) -> None:
    view, rows = prepared(pixels(5)), torch.tensor([3, 1])
    digests = view.digests()
    assert digests.shape == (5, 2) and len(digests.unique(dim=0)) == 5
    assert torch.equal(view[rows].digests(), digests[rows])
    assert torch.equal(prepared(pixels(5), workers=2, augment=False).digests(), digests)
    for other in (prepared(pixels(5), image_size=7), prepared(pixels(5), transform="pilot")):
        assert not (other.digests() == digests).all(1).any()
    files = prepared(load_images(str(write_folders(tmp_path))).test_images)
    before = files.digests()
    (tmp_path / "test" / "ant" / "1.png").write_bytes((tmp_path / "test" / "bee" / "0.png").read_bytes())
    after = prepared(load_images(str(tmp_path)).test_images).digests()
    assert (before != after).any(1).tolist() == [False, True, False, False, False, False]


def test_names_of_files_need_not_be_utf8(tmp_path: Path) -> None:
    try:
        write_folders(tmp_path, ("ant", os.fsdecode(b"b\xe4r")))
    except OSError:
        pytest.skip("this file system takes no such names")
    data = load_images(str(tmp_path))
    digests = View(data.train_images, Preparation(12, [0.5] * 3, [0.5] * 3)).digests()
    assert len(data.digest()) == 16 and len(digests.unique(dim=0)) == len(data.train_images) == 4


def test_a_gray_tensor_is_not_turned() -> None:
    gray = torch.arange(6, dtype=torch.uint8).view(2, 3)  # as torchvision's MNIST has in `data`
    wanted = gray.numpy()[..., None].repeat(3, 2)
    for image in (gray, gray[None], gray.numpy()):
        np.testing.assert_array_equal(to_pixels(image), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_of_every_float_are_images(dtype: torch.dtype) -> None:
    values = torch.linspace(0, 1, 192).view(3, 8, 8).to(dtype)
    wanted = (values.double() * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(to_pixels(values), wanted)
    with pytest.raises(ValueError, match=rf"images must be uint8 \[N, H, W, 3\], got {dtype} \[1, 3, 8, 8\]"):
        read_images(values[None])


def test_arrays_of_16_bit_floats_are_rounded_once() -> None:
    values = np.linspace(0, 1, 1536).reshape(8, 64, 3).astype(np.float16)
    np.testing.assert_array_equal(to_pixels(values), np.round(values.astype(np.float64) * 255).astype(np.uint8))


def test_floats_that_overshoot_1_are_refused() -> None:
    """A bicubic resizing makes 1.02 of white: such an image became black, and only the first one was said to be."""
    white = np.full((4, 4, 3), 0.9, np.float32)
    for high in (1.02, 1.99):
        white[0, 0] = high
        for image in (white, torch.from_numpy(white).permute(2, 0, 1)):
            with pytest.raises(ValueError, match=r"floats in \[0, 1\] or \[0, 255\], got 0.89.* to 1.*: clip them"):
                to_pixels(image)
    white[0, 0] = 2.0
    assert to_pixels(white).max() == 2


def test_small_batches_are_prepared_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of 16 in one go, with the pixels of each by itself."""
    images = np.random.default_rng(0).integers(0, 256, (203, 40, 52, 3), dtype=np.uint8)
    calls, resample = [], views.resample
    monkeypatch.setattr(views, "resample", lambda images, *a: calls.append(len(images)) or resample(images, *a))
    seen = []
    for together in (1, 64):
        monkeypatch.setattr(views, "TOGETHER", together)
        torch.manual_seed(3)
        made = prepared(images, image_size=32, transform="pilot", on_device=True)
        seen.append([*(batch for _, batch in made.epoch(torch.randperm(203), 16)), *made.split(50)])
        assert calls == [[16] * 12 + [11] + [50] * 4 + [3], [64, 64, 64, 11] + [50] * 4 + [3]][together > 1]
        calls.clear()
    assert [len(batch) for batch in seen[1]] == [16] * 12 + [11] + [50] * 4 + [3]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
