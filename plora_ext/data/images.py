"""Labelled images with a training and a test side, as arrays or as files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plora_ext.change import row_digests

from .decode import decode

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


class ImageFiles:
    """Image files as a sequence of uint8 arrays [H, W, 3], each decoded when it is asked for."""

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
            raise ValueError(no_image(path, error)) from error

    def repeats(self) -> bool:
        """Whether an image is the same every time, so that it may be kept."""
        return True


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
                    name = f"{path.parent.name}/{path.name} {path.stat().st_size}\n"
                    seen.update(name.encode("utf-8", "surrogateescape"))  # which need not be UTF-8
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


def no_image(path: Path, error: Exception) -> str:
    """What is said of a file that is none."""
    return f"{path} is no image that can be decoded ({error}); mend or remove it, or set corrupt to skip"


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
            row_digests(torch.from_numpy(np.ascontiguousarray(side))).numpy().view("V16").ravel().tolist()
            for side in sides
        )
    seen = set(train)
    return sum(digest in seen for digest in test)


def first_line(error: BaseException) -> str:
    """Of what an error says, for a message; its kind where it says nothing, as those of sockets may."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def some(names: Sequence[Any]) -> str:
    """The first five of `names`, and how many there are beside them, for a message."""
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
