"""Images and labels as users have them: arrays, a folder, a torch Dataset, a Hugging Face data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from .decode import to_8_bits, to_rgb, warn_if_dark
from .folders import class_files, class_names, decodable, images_below, readable, readable_kinds
from .images import ImageFiles

_WANTED = (
    "a pair (images, labels), a folder of one folder of images for each class, a torch Dataset of (image, label), or a "
    "Hugging Face data set with a column of images and one of labels"
)


class Items(ImageFiles):
    """Images that are read one by one, whatever from, as uint8 arrays [H, W, 3]."""

    def __init__(self, number: int, read: Callable[[int], Any]):
        super().__init__([])
        self.number, self.read = number, read

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> np.ndarray:
        image = self.read(int(index))
        pixels = to_pixels(image)
        if not index and np.asarray(image.cpu() if isinstance(image, Tensor) else image).dtype != np.uint8:
            warn_if_dark(pixels, "the first image's values")
        return pixels

    def repeats(self) -> bool:
        """A data set may change its images at random; then a few of them are others at one of some 20 more looks.

        (One that turns every second image round is taken for constant once in 100,000 times.)
        """
        rows = {round(part * (self.number - 1) / 7) for part in range(8)} if self.number else set[int]()
        looks = range(16 // max(len(rows), 1) + 1)
        return all(np.array_equal(first, self[row]) for row in rows for first in [self[row]] for _ in looks)


def read_images(data: Any) -> np.ndarray | ImageFiles:
    """Images without labels: uint8 [N, H, W, 3], a sequence of images, or the path of an image or a folder.

    Raises:
        ValueError: They are neither.
        FileNotFoundError: A path that does not exist, or no image at all.
    """
    if isinstance(data, ImageFiles):
        return data
    if isinstance(data, str | Path):
        return ImageFiles(image_paths([data]))
    if hasattr(data, "column_names"):
        column = _column(data, lambda value: isinstance(value, Image), "images")
        return Items(len(data), lambda row: data[row][column])
    if isinstance(data, np.ndarray | Tensor):
        pixels = _on_host(data) if isinstance(data, Tensor) else data
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape[1:]:
            raise ValueError(f"images must be uint8 [N, H, W, 3], got {data.dtype} {list(pixels.shape)}")
        return pixels
    if isinstance(data, Sequence):
        return Items(len(data), data.__getitem__)
    raise ValueError(f"images must be uint8 [N, H, W, 3], a sequence of images or a path, got {type(data).__name__}")


def read_labelled(data: Any, corrupt: str = "error") -> tuple[np.ndarray | ImageFiles, list[Any]]:
    """Images and their labels, numbers or texts.

    Args:
        corrupt: What files of a folder do that are no images, as in `plora_ext.data.load_images`.

    Raises:
        ValueError: The data is of no kind known here, or labels and images do not fit together.
        FileNotFoundError: A folder that does not exist or holds no class.
    """
    images: np.ndarray | ImageFiles
    if isinstance(data, str | Path):
        images, labels = _class_folders(Path(data), corrupt)
    elif isinstance(data, tuple | list) and len(data) == 2 and not _are_items(data):
        images, labels = read_images(data[0]), _labels(data[1])
    elif hasattr(data, "column_names"):
        images, labels = read_images(data), _labels(data[_column(data, lambda v: isinstance(v, int | str), "labels")])
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, dict):
        if len(data) and not isinstance(data[0], tuple | list):
            raise ValueError(f"data must be {_WANTED}, got {type(data).__name__} of {type(data[0]).__name__}")
        targets = _targets(data)
        images = Items(len(data), lambda row: _image_of(data, row, targets))
        labels = targets or _labels([data[row][1] for row in range(len(data))])
    else:
        raise ValueError(f"data must be {_WANTED}, got {type(data).__name__}")
    if len(labels) != len(images) or not labels:
        raise ValueError(f"labels must be one an image, got {len(labels)} labels for {len(images)} images")
    return images, labels


def to_pixels(image: Any) -> np.ndarray:
    """One image as uint8 [H, W, 3]: PIL's, an array [H, W, 3] or [H, W], or a tensor [3, H, W], [1, H, W] or [H, W].

    Raises:
        ValueError: It is nothing of these, or its values lie outside of what `plora_ext.data.decode` takes.
    """
    if isinstance(image, Image):
        return to_rgb(image)
    try:
        pixels = _on_host(image) if isinstance(image, Tensor) else np.asarray(image)
    except ValueError:  # of several shapes, as an image with its label
        pixels = np.empty(0)
    if isinstance(image, Tensor) and pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
        what = "a PIL image, an array [H, W, 3] or a tensor [3, H, W]"
        raise ValueError(f"an image must be {what}, got {_said(image)}")
    return to_8_bits(pixels, "an image").repeat(3 // pixels.shape[2], 2)


def _said(image: Any) -> str:
    """What came in place of an image, for a message."""
    if isinstance(image, tuple | list):
        return f"a {type(image).__name__} of {', '.join(type(part).__name__ for part in image[:3])}"
    return f"the text {image!r:.60}" if isinstance(image, str) else f"{type(image).__name__} {list(np.shape(image))}"


def _are_items(two: Sequence[Any]) -> bool:
    """Whether these two are items (image, label), and not images and labels."""
    pairs = [item for item in two if isinstance(item, tuple) and len(item) == 2]
    return len(pairs) == 2 and all(not isinstance(label, Image) and np.ndim(label) == 0 for _, label in pairs)


def _on_host(tensor: Tensor) -> np.ndarray:
    """As an array; numpy has no bfloat16, and nothing smaller."""
    small = tensor.is_floating_point() and tensor.element_size() < 4
    return np.asarray((tensor.float() if small else tensor).detach().cpu())


def image_paths(given: Sequence[str | Path]) -> list[Path]:
    """The image files among `given`: files as they are, folders searched as those of classes are, sorted by name.

    Raises:
        FileNotFoundError: A path that does not exist, or no image at all.
    """
    paths: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            paths += sorted(readable([images_below(path)])[0])
        elif path.is_file():
            paths.append(path)
        else:
            raise FileNotFoundError(f"{path} is no file and no folder")
    if not paths:
        raise FileNotFoundError(f"no image ({' '.join(readable_kinds())}) in {', '.join(map(str, given))}")
    return paths


def _class_folders(root: Path, corrupt: str) -> tuple[ImageFiles, list[str]]:
    """Labels are the names of the folders."""
    if not root.is_dir():
        raise FileNotFoundError(f"data {str(root)!r} is no folder, looked for at {root.absolute()}")
    names = class_names(root)
    if not names:
        raise FileNotFoundError(f"{root} must hold a folder of images for each class, it holds none")
    if set(names) <= {"train", "test", "val", "valid", "validation"}:
        raise ValueError(f"{root} holds {', '.join(names)} and not classes: give one of these folders")
    files = decodable(class_files(root, names), corrupt)
    paths = [path for of in files for path in of]
    return ImageFiles(paths), [name for name, of in zip(names, files) for _ in of]


def _image_of(data: Any, row: int, targets: Sequence[Any]) -> Any:
    """The image of an item, whose label has to be its target, where these are the labels."""
    image, label, *_ = data[row]
    if targets and _labels([label]) != [targets[row]]:
        raise ValueError(
            f"the data set's targets must be the labels of its items, got {targets[row]!r} for item {row} of label "
            f"{label!r}: delete the attribute targets"
        )
    return image


def _targets(data: Any) -> list[Any]:
    """The attribute `targets` of torchvision's data sets, without reading all images; none where items say otherwise.

    Items with another label than their target are looked for at five places, and whenever an image is read.
    """
    given = None if getattr(data, "target_transform", None) else getattr(data, "targets", None)
    if given is None or not hasattr(given, "__len__") or len(given) != len(data) or isinstance(given, dict):
        return []
    try:
        labels = _labels(given)
    except ValueError:  # what items hold may be labels all the same
        return []
    rows = {round(part * (len(labels) - 1) / 4) for part in range(5)} if labels else ()
    return labels if _labels([data[row][1] for row in rows]) == [labels[row] for row in rows] else []


def _labels(given: Any) -> list[Any]:
    """Labels as plain values."""
    try:
        values = list(given.tolist() if hasattr(given, "tolist") else given)
    except TypeError:
        raise ValueError(f"labels must be one an image, got {given!r}") from None
    values = [value.item() if hasattr(value, "item") and math.prod(value.shape) == 1 else value for value in values]
    for value in values:
        if not isinstance(value, int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"labels must be numbers or texts, got {value!r:.60}")
    return values


def _column(data: Any, fits: Callable[[Any], bool], what: str) -> str:
    """The only column of a Hugging Face data set whose values fit."""
    if isinstance(data.column_names, dict):
        raise ValueError(f"the data set has splits, {', '.join(data.column_names)}: give one of them")
    if not hasattr(data, "__len__"):
        raise ValueError(f"the data set must be loaded whole, without streaming, got {type(data).__name__}")
    row = data[0] if len(data) else {}
    names = [name for name in data.column_names if name in row and fits(row[name])]
    usual = [name for name in names if name in ("image", "img", "label", "labels", "fine_label")]
    found = usual[:1] or names
    if len(found) != 1:
        raise ValueError(
            f"the data set must have one column of {what}, got {names or 'none'} of {data.column_names}: "
            "select_columns or rename_column to image and label"
        )
    return str(found[0])
