"""Icon-100: 100 concepts drawn by many icon designers, who stand on the training or on the test side as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

_FOLDER = Path(__file__).parent


class Icon100(NamedTuple):
    """The data set as numpy arrays.

    Attributes:
        train_images: uint8 [N, 64, 64, 3], RGB on white.
        train_labels: int64 [N], an index into `class_names`.
        test_images: uint8 [M, 64, 64, 3], by designer families that have no training image.
        test_labels: int64 [M].
        class_names: the 100 concepts in alphabetical order.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]


def load_icon100() -> Icon100:
    """Loads Icon-100, which is part of the package (its drawings' licences: `plora_ext/data/LICENSES.md`).

    Returns:
        The training and test images and labels, see `Icon100`.

    Raises:
        FileNotFoundError: a file of the data set is missing from the installation.
    """
    for name in ("icon100.npz", "icon100.json"):
        if not (_FOLDER / name).is_file():
            raise FileNotFoundError(
                f"load_icon100: {_FOLDER / name} is missing; reinstall plora_ext, or run tools/build_icon100.py"
            )
    class_names = json.loads((_FOLDER / "icon100.json").read_text(encoding="utf-8"))["class_names"]
    with np.load(_FOLDER / "icon100.npz", allow_pickle=False) as file:
        images, labels, test = file["images"], file["labels"].astype(np.int64), file["test"]
    return Icon100(images[~test], labels[~test], images[test], labels[test], class_names)
