"""A data set as folders of image files, one for each class."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .decode import check_regular, check_transparency, decode, is_deep, warn_if_dark
from .images import ImageFiles, Images, no_image, some

# What counts as an image by its name, in training and in prediction; which of them can be read is for Pillow to say.
IMG_EXTENSIONS = tuple(".jpg .jpeg .jfif .png .gif .webp .bmp .tif .tiff .ppm .pgm .jp2 .avif .heic .heif .jxl".split())
# How files of a format end, unless something follows: what ends otherwise may be cut short.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}


def class_folders(root: Path, corrupt: str, test_too: bool) -> Images:
    """The images `root`/{train,test}/<class>/<image>, as `plora_ext.data.load_images` says it."""
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"no data at {root.absolute()}: expected {root / 'train'}/<class>/<image> and "
                f"{root / 'test'}/<class>/<image>; move it there, or set data_root"
            )
    train, test = (class_names(root / split) for split in ("train", "test"))
    if train != test:
        only = {"train": set(train) - set(test), "test": set(test) - set(train)}
        said = "; ".join(f"only in {side}: {some(sorted(names))}" for side, names in only.items() if names)
        raise ValueError(f"{root}: train and test must hold the same class folders; {said}")
    if not train:
        raise FileNotFoundError(f"there is no class folder in {root / 'train'}")
    arrays: list[Any] = []
    for split in ("train", "test"):
        kept = class_files(root / split, train)
        if test_too or split == "train":
            kept = decodable(kept, corrupt)
        if split == "train":
            _refuse_empty(kept, root / split, train, "is left with none: mend its images, or remove it")
        arrays.append(ImageFiles([path for of in kept for path in of]))
        arrays.append(np.repeat(np.arange(len(kept)), [len(of) for of in kept]))
    return Images(*[*arrays, train])


def class_names(root: Path) -> list[str]:
    """The folders in `root`, one for each class; hidden ones are none."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def class_files(root: Path, names: list[str]) -> list[list[Path]]:
    """The images of each class, in the folders `names` of `root`; warnings count what else looks like an image there.

    Raises:
        ValueError: A class without an image.
    """
    if loose := [path for path in sorted(root.iterdir()) if path.is_file() and _is_image(path.name)]:
        warnings.warn(
            f"left out {len(loose)} images beside the class folders, such as {loose[0]}: move them into their classes",
            stacklevel=2,
        )
    found = readable([images_below(root / name) for name in names])
    _refuse_empty(found, root, names, f"holds no image ({' '.join(readable_kinds())}): add some, or remove it")
    return _once(found)


def images_below(folder: Path) -> list[Path]:
    """The images in a folder and below, those that links lead to as well, in the order of torchvision.

    Hidden files (`._x.jpg`) and folders (`.ipynb_checkpoints`) are not meant to be images.

    Raises:
        ValueError: A link leads to a folder above itself, so that images elsewhere would count as of this folder.
        OSError: A folder cannot be read.
    """
    found = []

    def refuse(error: OSError) -> None:
        raise error  # a folder that cannot be read: its images would be left out without a word

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        for part in (Path(place), *(Path(place) / name for name in folders)):
            if part.is_symlink() and part.parent.resolve().is_relative_to(part.resolve()):
                raise ValueError(
                    f"{part} is a link to a folder above it, which would be searched in circles: remove it"
                )
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.append((place, [Path(place) / name for name in sorted(names) if _is_image(name)]))
    return [path for _, paths in sorted(found) for path in paths]


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def readable_kinds() -> list[str]:
    """Those of `IMG_EXTENSIONS` that Pillow opens as it is installed here, with the plugins that are registered."""
    known = Image.registered_extensions()
    return [end for end in IMG_EXTENSIONS if end in known]


def readable(classes: list[list[Path]]) -> list[list[Path]]:
    """The images of each class but those of a kind that cannot be read here, which a warning counts."""
    ends = tuple(readable_kinds())
    if others := [path for of in classes for path in of if not path.name.lower().endswith(ends)]:
        warnings.warn(
            f"left out {len(others)} images of a kind that Pillow cannot read here, such as {others[0]}: "
            "save them as JPEG or PNG",
            stacklevel=2,
        )
    return [[path for path in of if path.name.lower().endswith(ends)] for of in classes]


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
            check_regular(path)
            with path.open("rb") as file, Image.open(file) as image:
                check_transparency(image)
                if is_deep(image):
                    deep.add(path)
                end = _ENDS.get(image.format or "", b"")
                file.seek(-len(end), os.SEEK_END)
                whole = file.read() == end or not end
            if corrupt == "skip" or not whole:
                decode(path)
        except Exception as error:  # decoders raise all kinds
            return no_image(path, error)
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
            warn_if_dark(decode(first), f"{first} and {len(deep) - 1} images more")
    return [[path for path in of if path not in bad] for of in classes]
