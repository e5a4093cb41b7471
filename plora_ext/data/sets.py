"""Data sets by name or by path, as labelled images with a training and a test side.

Named sets lie under one folder, as LAMDA-PILOT lays them out; arrays, IDX files and class folders may lie anywhere.
Images of one small size are held in memory, files are decoded when they are needed.
"""

from __future__ import annotations

import difflib
import gzip
import json
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .decode import to_8_bits, warn_if_dark
from .folders import class_folders
from .images import ARRAYS, Images, checked

FOLDER = Path(__file__).parent
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
_FASHION = "t-shirt/top trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()


def load_images(
    data: str | Path, root: str | Path = "data", *, download: bool = False, corrupt: str = "error", test: bool = True
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
    data = os.fspath(data)
    if data == "icon100":
        return load_icon100()
    if data == "cifar100":
        return _cifar100(Path(root), download)
    if data == "fashion-mnist":
        return _fashion_mnist(Path(root), download)
    if data in FOLDERS:
        return class_folders(Path(root) / FOLDERS[data], corrupt, test)
    if data.endswith(".npz"):
        return _npz(Path(data))
    if Path(data).is_dir():
        idx = any((Path(data) / (_IDX["train"][0] + end)).is_file() for end in ("", ".gz"))
        return _idx(Path(data)) if idx else class_folders(Path(data), corrupt, test)
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
            warn_if_dark(arrays[name], f"{path}: {name}")
    images = Images(arrays["train_images"], arrays["train_labels"], arrays["test_images"], arrays["test_labels"])
    if names is not None:
        if names.ndim != 1:
            raise ValueError(f"{path}: class_names must be one name a class, got shape {list(names.shape)}")
        if names.dtype.kind == "S":
            names = np.char.decode(names, "utf-8", "replace")
        images.class_names = [str(name) for name in names]
    try:
        return checked(images)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _cifar100(root: Path, download: bool) -> Images:
    from torchvision.datasets import CIFAR100

    try:
        train, test = CIFAR100(str(root), True, download=download), CIFAR100(str(root), False)
    except RuntimeError as error:  # torchvision looks at the checksums before it opens the files
        raise FileNotFoundError(
            f"cifar100 is not whole: looked for {(root / CIFAR100.base_folder).absolute()} with the files train, test "
            f"and meta of {CIFAR100.filename}; unpack it there, set data_root, or set download to true"
        ) from error
    return Images(train.data, np.asarray(train.targets), test.data, np.asarray(test.targets), list(train.classes))


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
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut short or no gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes, it begins {content[:4].hex(' ')}")
    head = 4 + 4 * content[3]
    if len(content) < head:
        raise ValueError(f"{path} is cut short: it ends within its header")
    shape = np.frombuffer(content[4:head], dtype=">u4").tolist()
    if len(content) - head != math.prod(shape):
        raise ValueError(f"{path} must hold {math.prod(shape)} bytes for its shape {shape}, got {len(content) - head}")
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)
