"""Data sets by name or by path, as labelled images with a training and a test side.

Named sets lie under one folder, as LAMDA-PILOT lays them out; arrays, IDX files and class folders may lie anywhere.
Images of one small size are held in memory, files are decoded when they are needed.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from plora_ext.change import row_digests

from .decode import decode, to_8_bits

FOLDER = Path(__file__).parent
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
# Where LAMDA-PILOT keeps the sets that come as class folders, relative to the common root.
FOLDERS = {
    "cub": "cub",
    "imagenet-r": "imagenet-r",
    "imagenet-a": "imagenet-a",
    "objectnet": "objectnet",
    "omnibenchmark": "omnibenchmark",
    "vtab": "vtab-cil/vtab",
}
NAMES = ("icon100", "cifar100", "fashion-mnist", *FOLDERS)
_IDX = {split: [f"{stem}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        for split, stem in (("train", "train"), ("test", "t10k"))}  # fmt: skip
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# How files of a format end, unless something follows: what ends otherwise may be cut short.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
_DARK = 64  # what images of more than 8 bits have to reach of 255, else it is said: 12 bits kept in 16 give 16
_FASHION = "t-shirt/top trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()


class ImageFiles:
    """Image files as a sequence of uint8 arrays [H, W, 3], each decoded when it is asked for.

    Args:
        paths: The files.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises ValueError naming the file when it is no whole image."""
        path = self.paths[index]
        try:
            return decode(path)
        except Exception as error:  # decoders raise all kinds
            raise ValueError(_no_image(path, error)) from error


@dataclass
class Images:
    """A labelled data set.

    Attributes:
        train_images, test_images: uint8 [N, H, W, 3], or files.
        train_labels, test_labels: int64 [N], from 0.
        class_names: A name for each label, where there are names.
        source: What the setting `data` named, where it did.
        train_groups: int [N] of the training images, where it is known which ones have a common source.
        held_out: Share of the training images that `hold_out` has made the test side; 0: it is the test set.
    """

    train_images: np.ndarray | ImageFiles
    train_labels: np.ndarray
    test_images: np.ndarray | ImageFiles
    test_labels: np.ndarray
    class_names: list[str] | None = None
    source: str | None = None
    train_groups: np.ndarray | None = None
    held_out: float = 0.0

    def digest(self) -> str:
        """A fingerprint of labels and images (of files: their names and sizes), 16 hexadecimal digits."""
        seen = hashlib.sha256()
        for labels in (self.train_labels, self.test_labels):
            seen.update(np.asarray(labels, dtype=np.int64).tobytes())
        for images in (self.train_images, self.test_images):
            if isinstance(images, ImageFiles):
                for path in images.paths:
                    seen.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
            else:
                seen.update(np.ascontiguousarray(images).data)
        return seen.hexdigest()[:16]


def select(images: Any, rows: np.ndarray) -> Any:
    """The images of these rows."""
    return ImageFiles([images.paths[i] for i in rows]) if isinstance(images, ImageFiles) else images[rows]


def hold_out(images: Images, share: float) -> Images:
    """`images` with a part of the training side in place of the test side, for choosing settings; 0: as they are.

    Of each class `share` of its images is held out, at least one and never all: none of a class that has but one. Where
    images have groups, whole groups are held out in a random order, as long as they are no more than `share` of all
    images, so that the share of single classes varies. The draw is the same for every seed, and its generator its own.

    Raises:
        ValueError: Another share has been held out before.
    """
    if share == images.held_out:
        return images
    if images.held_out:
        raise ValueError(f"validation is {share}, but data has {images.held_out} of its images held out: give all")
    labels = images.train_labels
    groups = None if images.train_groups is None else np.asarray(images.train_groups)
    held = np.zeros(len(labels), dtype=bool)
    if groups is None:
        ends = np.unique(labels, return_counts=True)[1].cumsum()
        for i, own in enumerate(np.split(np.argsort(labels, kind="stable"), ends[:-1])):
            number = min(max(round(share * len(own)), 1), len(own) - 1)
            held[np.random.RandomState(i).permutation(own)[:number]] = True
    else:
        for chosen in np.random.RandomState(0).permutation(np.unique(groups)):
            more = held | (groups == chosen)
            if more.sum() <= share * len(labels) and len(np.unique(labels[~more])) == len(np.unique(labels)):
                held = more
    train, test = np.flatnonzero(~held), np.flatnonzero(held)
    return replace(
        images, train_images=select(images.train_images, train), train_labels=labels[train],
        test_images=select(images.train_images, test), test_labels=labels[test],
        train_groups=None if groups is None else groups[train], held_out=share,
    )  # fmt: skip


def load_images(
    data: str, root: str | Path = "data", *, download: bool = False, corrupt: str = "error", test: bool = True
) -> Images:
    """The data set `data`.

    - `icon100` is part of the package.
    - `cifar100` and `fashion-mnist` are looked for under `root` and, if `download`, fetched by torchvision.
    - `cub`, `imagenet-r`, `imagenet-a`, `objectnet`, `omnibenchmark` and `vtab` are class folders under `root`,
      `<root>/<name>/{train,test}/<class>/<image>` (vtab: `<root>/vtab-cil/vtab/...`), as LAMDA-PILOT distributes them.
    - A folder of `train` and `test` with one folder per class, or a folder of four IDX files (gzipped or not).
    - An `.npz` file of train_images, train_labels, test_images and test_labels, and perhaps class_names. Images that
      are not of 8 bits are scaled as those of files (`plora_ext.data.decode`).

    Labels of class folders follow the sorted names of the folders.

    Args:
        data: Name or path.
        root: Where named sets lie.
        download: Let torchvision download a set that is not there.
        corrupt: "error": an image file that cannot be opened or is cut short is an error at the start, one whose pixels
            cannot be decoded for another reason when they are met; "skip": every image file is decoded once at the
            start, and those that cannot be are left out with a warning that names them.
        test: False: files of the test side are not looked into.

    Raises:
        ValueError: An unknown name, arrays that do not fit together, class folders that differ between train and
            test, or an IDX file that is cut short.
        OSError: Files are not where they were looked for; the message says where, and the layout expected.
    """
    if data == "icon100":
        return load_icon100()
    if data == "cifar100":
        return _cifar100(Path(root), download)
    if data == "fashion-mnist":
        return _fashion_mnist(Path(root), download)
    if data in FOLDERS:
        return _class_folders(Path(root) / FOLDERS[data], corrupt, test)
    if data.endswith(".npz"):
        return _npz(Path(data))
    if Path(data).is_dir():
        idx = any((Path(data) / (_IDX["train"][0] + end)).is_file() for end in ("", ".gz"))
        return _idx(Path(data)) if idx else _class_folders(Path(data), corrupt, test)
    if "/" in data:
        raise FileNotFoundError(f"data {data!r} is no folder, looked for at {Path(data).absolute()}")
    near = difflib.get_close_matches(data, NAMES, n=1, cutoff=0.4)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    named = f"(one of: {', '.join(NAMES)}, a folder, FILE.npz)"
    raise ValueError(f"unknown data {data!r}, and no folder {Path(data).absolute()}{guess} {named}")


def packaged(name: str, maker: str) -> Path:
    """A file of the package, which `maker` among the tools writes.

    Raises:
        FileNotFoundError: It is missing from the installation.
    """
    path = FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall plora_ext, or make it with tools/{maker}")
    return path


# ---------------------------------------------------------------------- arrays


def load_icon100() -> Images:
    """Icon-100, which is part of the package: 100 concepts drawn by many icon designers.

    uint8 [N, 64, 64, 3], RGB on white; every family of designs stands on the training or on the test side as a whole,
    and is one of the `train_groups`.
    Its drawings' licences: `plora_ext/data/LICENSES.md`.

    Raises:
        FileNotFoundError: A file of it is missing from the installation.
    """
    arrays, about = (packaged(f"icon100.{kind}", "build_icon100.py") for kind in ("npz", "json"))
    with np.load(arrays, allow_pickle=False) as file:
        images, labels, test, of = file["images"], file["labels"].astype(np.int64), file["test"], file["sets"]
    facts = json.loads(about.read_text(encoding="utf-8"))
    families = np.unique([icon_set["family"] for icon_set in facts["sets"].values()], return_inverse=True)[1][of]
    names = facts["class_names"]
    return Images(images[~test], labels[~test], images[test], labels[test], names, train_groups=families[~test])


def _npz(path: Path) -> Images:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, looked for at {path.absolute()}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no whole .npz file: it is empty, cut short, or something else by that name")
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as file:
        held = {name.removesuffix(".npy") for name in file.namelist()}
        if missing := [name for name in ARRAYS if name not in held]:
            raise ValueError(f"{str(path)!r} must hold {', '.join(ARRAYS)}, but lacks {', '.join(missing)}")
        for name in (*ARRAYS, *(["class_names"] if "class_names" in held else [])):
            try:
                with file.open(f"{name}.npy") as part:
                    arrays[name] = np.lib.format.read_array(part, allow_pickle=False)
            except Exception as error:  # a flipped bit, objects, half an array
                objects = "it holds Python objects, not numbers" if "pickle" in str(error) else str(error)
                raise ValueError(f"{path}: {name} cannot be read: {objects}") from error
    names = arrays.pop("class_names", None)
    for name in ("train_images", "test_images"):
        given, arrays[name] = arrays[name], to_8_bits(arrays[name], f"{path}: {name}")
        if given.dtype != np.uint8:
            _warn_if_dark(arrays[name], f"{path}: {name}")
    images = Images(arrays["train_images"], arrays["train_labels"], arrays["test_images"], arrays["test_labels"])
    images.class_names = None if names is None else [str(name) for name in names]
    try:
        return checked(images)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def checked(images: Images) -> Images:
    """`images`, whose arrays fit together; lists and tensors become arrays.

    Raises:
        TypeError: It is something else.
        ValueError: They do not; names the array.
    """
    if not isinstance(images, Images):
        raise TypeError(
            "data must be plora_ext.data.Images(train_images, train_labels, test_images, test_labels), or what "
            f"plora_ext.data.load_images(FOLDER) reads, got {type(images).__name__}"
        )
    given = {name: getattr(images, name) for name in ARRAYS}
    arrays: dict[str, Any] = {k: v if isinstance(v, ImageFiles) else np.asarray(v) for k, v in given.items()}
    images = replace(images, **arrays)
    for split in ("train", "test"):
        pixels, labels = getattr(images, f"{split}_images"), getattr(images, f"{split}_labels")
        if isinstance(pixels, np.ndarray) and (pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3):
            raise ValueError(f"{split}_images must be uint8 [N, H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        if isinstance(pixels, np.ndarray) and len(pixels) and 0 in pixels.shape:
            raise ValueError(f"{split}_images must be of a height and a width above 0, got {list(pixels.shape)}")
        if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer):
            wanted = f"integers of shape [{len(pixels)}], one an image"
            raise ValueError(f"{split}_labels must be {wanted}, got {labels.dtype} {list(labels.shape)}")
    if images.train_groups is not None and len(images.train_groups) != len(images.train_labels):
        raise ValueError(
            f"train_groups must hold a number for each of {len(images.train_labels)} training images, got "
            f"{len(images.train_groups)}"
        )
    if images.class_names is not None:
        classes = max(
            (int(labels.max()) + 1 for labels in (images.train_labels, images.test_labels) if len(labels)), default=0
        )
        if len(images.class_names) < classes:
            raise ValueError(f"class_names must name each of {classes} classes, got {len(images.class_names)} names")
    return images


def doubles(images: Images) -> int:
    """How many test images are, to the last pixel or byte, images of the training side."""
    sides: list[Any] = [images.train_images, images.test_images]
    if all(isinstance(side, ImageFiles) for side in sides):
        sizes = [{path: path.stat().st_size for path in side.paths} for side in sides]
        common = set(sizes[0].values()) & set(sizes[1].values())  # few files have to be read
        train, test = (
            [hashlib.blake2b(path.read_bytes()).digest() for path, size in side.items() if size in common]
            for side in sizes
        )
    else:
        if any(isinstance(side, ImageFiles) for side in sides) or sides[0].shape[1:] != sides[1].shape[1:]:
            return 0
        train, test = (
            row_digests(torch.from_numpy(np.asarray(side))).numpy().view("V16").ravel().tolist() for side in sides
        )
    seen = set(train)
    return sum(digest in seen for digest in test)


def _cifar100(root: Path, download: bool) -> Images:
    from torchvision.datasets import CIFAR100

    try:
        train, test = CIFAR100(str(root), True, download=download), CIFAR100(str(root), False)
    except RuntimeError as error:  # torchvision looks at the checksums before it opens the files
        raise FileNotFoundError(
            f"cifar100 is not whole: looked for {(root / CIFAR100.base_folder).absolute()} with the files train, test "
            f"and meta of {CIFAR100.filename}; unpack it there, set data_root, or set download to true"
        ) from error
    labels = (np.asarray(side.targets, dtype=np.int64) for side in (train, test))
    return Images(train.data, next(labels), test.data, next(labels), list(train.classes))


# ---------------------------------------------------------------------- IDX files


def _fashion_mnist(root: Path, download: bool) -> Images:
    places = [root / "fashion-mnist", root / "FashionMNIST" / "raw"]
    found = [place for place in places if place.is_dir()]
    if not found and download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(root), download=True)
        found = places[1:]
    images = _idx((found or places)[0])
    images.class_names = list(_FASHION)
    return images


def _idx(folder: Path) -> Images:
    arrays: list[Any] = []
    for split in ("train", "test"):
        pixels, labels = (_read_idx(folder, name) for name in _IDX[split])
        if pixels.ndim != 3 or labels.ndim != 1:
            raise ValueError(f"{folder}: the {split} files must hold images [N, H, W] and labels [N]")
        arrays += [np.repeat(pixels[..., None], 3, axis=3), labels.astype(np.int64)]
    return checked(Images(*arrays))


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """The array in an IDX file of unsigned bytes: 0, 0, 8, the number of dimensions, each in 4 bytes, the values."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{name} (or {name}.gz) is missing: looked for it in {folder.absolute()}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut short or no gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes, it begins {content[:4].hex(' ')}")
    head = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:head], dtype=">u4").astype(int).tolist()
    if len(content) - head != int(np.prod(shape)):
        raise ValueError(
            f"{path} must hold {int(np.prod(shape))} bytes for its shape {shape}, got {len(content) - head}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)


# ---------------------------------------------------------------------- class folders


def _class_folders(root: Path, corrupt: str, test_too: bool) -> Images:
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"no data at {root.absolute()}: expected {root / 'train'}/<class>/<image> and "
                f"{root / 'test'}/<class>/<image>; move it there, or set data_root"
            )
    train, test = (
        sorted(p.name for p in (root / split).iterdir() if p.is_dir() and not p.name.startswith("."))
        for split in ("train", "test")
    )
    if train != test:
        only = {"train": set(train) - set(test), "test": set(test) - set(train)}
        said = "; ".join(f"only in {side}: {some(sorted(names))}" for side, names in only.items() if names)
        raise ValueError(f"{root}: train and test must hold the same class folders; {said}")
    if not train:
        raise FileNotFoundError(f"there is no class folder in {root / 'train'}")
    arrays: list[Any] = []
    for split in ("train", "test"):
        found = [_files(root / split / name) for name in train]
        none = f"holds no image ({' '.join(IMG_EXTENSIONS)}): add some, or remove it"
        _refuse_empty(found, root / split, train, none)
        kept = decodable(_once(found), corrupt) if test_too or split == "train" else found
        if split == "train":
            _refuse_empty(kept, root / split, train, "is left with none: mend its images, or remove it")
        paths = [path for of in kept for path in of]
        labels = np.repeat(np.arange(len(kept)), [len(of) for of in kept])
        arrays += [ImageFiles(paths), labels.astype(np.int64)]
    arrays.append(train)
    return Images(*arrays)


def _files(folder: Path) -> list[Path]:
    """The images in a class folder and below, those that links lead to as well, in the order of torchvision.

    Hidden files (`._x.jpg`) and folders (`.ipynb_checkpoints`) are not meant to be images.

    Raises:
        ValueError: A link leads to a folder above itself, so that images of other classes would count as of this one.
    """
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        for part in (Path(place), *(Path(place) / name for name in folders)):
            if part.is_symlink() and part.parent.resolve().is_relative_to(part.resolve()):
                raise ValueError(
                    f"{part} is a link to a folder above it, whose images are not all of one class: remove it"
                )
        folders[:] = [name for name in folders if not name.startswith(".")]
        wanted = (name for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS) and name[0] != ".")
        found.append((place, [Path(place) / name for name in wanted]))
    return [path for _, paths in sorted(found) for path in paths]


def _once(classes: list[list[Path]]) -> list[list[Path]]:
    """The images of each class without those that links lead to a second time."""
    seen: set[str] = set()
    real: dict[Path, str] = {}  # of folders: fewer questions to the file system
    kept: list[list[Path]] = []
    for paths in classes:
        kept.append([])
        for path in paths:
            if path.parent not in real:
                real[path.parent] = os.path.realpath(path.parent)
            key = os.path.realpath(path) if path.is_symlink() else os.path.join(real[path.parent], path.name)
            if key not in seen:
                seen.add(key)
                kept[-1].append(path)
    if twice := sum(map(len, classes)) - len(seen):
        warnings.warn(f"left out {twice} images that links lead to a second time", stacklevel=2)
    return kept


def _refuse_empty(classes: list[list[Path]], folder: Path, names: list[str], why: str) -> None:
    if empty := [str(folder / name) for name, paths in zip(names, classes) if not paths]:
        raise ValueError(f"every class needs an image, but {some(empty)} {why}")


def _no_image(path: Path, error: Exception) -> str:
    return f"{path} is no image that can be decoded ({error}); mend or remove it, or set corrupt to skip"


def decodable(classes: list[list[Path]], corrupt: str) -> list[list[Path]]:
    """The images of each class that can be decoded, if `corrupt` is "skip"; a warning names the others.

    Else all of them: headers and ends are read, and what looks cut short is decoded, so that a file that is no image is
    found before anything is learned. Another warning names the first image of more than 8 bits if it becomes dark.

    Raises:
        ValueError: There is one that is none, and it is not to be skipped.
    """
    deep: set[Path] = set()

    def fault(path: Path) -> str:
        try:
            with path.open("rb") as file, Image.open(file) as image:
                if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                    deep.add(path)
                end = _ENDS.get(image.format or "", b"")
                file.seek(-len(end), os.SEEK_END)
                whole = file.read() == end or not end
            if corrupt == "skip" or not whole:
                decode(path)
        except Exception as error:  # decoders raise all kinds
            return _no_image(path, error)
        return ""

    paths = [path for of in classes for path in of]
    with ThreadPoolExecutor() as pool:  # decoders leave Python's lock
        bad = {path: said for path, said in zip(paths, pool.map(fault, paths)) if said}
    if bad and corrupt != "skip":
        more = f" (and {len(bad) - 1} images more)" if len(bad) > 1 else ""
        raise ValueError(next(iter(bad.values())) + more)
    if bad:
        named = some(list(bad))
        warnings.warn(f"left out {len(bad)} images that cannot be decoded: {named}", stacklevel=2)
    if first := next((path for path in paths if path in deep and path not in bad), None):
        with suppress(Exception):  # it is met, and named, where it is needed
            _warn_if_dark(decode(first), f"{first} and {len(deep) - 1} images more")
    return [[path for path in of if path not in bad] for of in classes]


def _warn_if_dark(pixels: np.ndarray, what: str) -> None:
    if pixels.size and pixels.max() < _DARK:
        warnings.warn(
            f"more than 8 bits are scaled by the range of their type, so that {what} reach {pixels.max()} of 255 at "
            "most: scale them to 8 bits yourself",
            stacklevel=2,
        )


def some(names: Sequence[Any], most: int = 5) -> str:
    """The first of `names`, and how many there are beside them, for a message."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
