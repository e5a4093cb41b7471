"""Image files as 8-bit RGB: what every part of the package that opens one agrees on."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_DARK = 64  # what images of more than 8 bits have to reach of 255, else it is said: 12 bits kept in 16 give 16


def decode(path: Path) -> np.ndarray:
    """The pixels of an image file, uint8 [H, W, 3], turned as its EXIF orientation says.

    Integers of 16 bits and more are scaled by 1 / 257, floats in [0, 1] by 255; floats in [0, 255] stay, gray becomes
    RGB and what is transparent is laid on white.

    Raises:
        ValueError: Values outside of these ranges.
        Exception: What Pillow's decoders raise, which is all kinds.
    """
    with Image.open(path) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an image of Pillow, by the rules of `decode`."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("F", "I") or turned.mode.startswith("I;16"):
        values = np.asarray(turned)
        gray = _to_8_bits(values)
        if isinstance(key := turned.info.get("transparency"), int):  # the value that a PNG file has as transparent
            gray[values == key] = 255
        return np.repeat(gray[..., None], 3, axis=2)
    if turned.mode in _ALPHA or "transparency" in turned.info:
        turned = turned.convert("RGBA")
        white = Image.new("RGBA", turned.size, "white")
        turned = Image.alpha_composite(white, turned)
    return np.array(turned.convert("RGB"))


def to_8_bits(values: np.ndarray, what: str) -> np.ndarray:
    """Pixels of any number type as uint8, by the rule of `decode`; `what` names them in errors."""
    try:
        return values if values.dtype == np.uint8 else _to_8_bits(values)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from None


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    if not values.size:
        return values.astype(np.uint8)
    low, high = values.min(), values.max()
    if values.dtype.kind in "iu":
        if not 0 <= low <= high <= 65535:
            raise ValueError(f"must hold integers in [0, 65535], got {low} to {high}: scale them to 8 bits first")
        return np.round(values / 257).astype(np.uint8)
    if values.dtype.kind != "f" or not 0 <= low <= high <= 255:  # NaN fails as well
        raise ValueError(f"must hold floats in [0, 1] or [0, 255], got {low} to {high}: scale them to 8 bits first")
    return np.round(values * (255 if high <= 1 else 1)).astype(np.uint8)


def warn_if_dark(pixels: np.ndarray, what: str) -> None:
    """Says so if what was scaled from more than 8 bits has become dark; `what` names it."""
    if pixels.size and pixels.max() < _DARK:
        warnings.warn(
            f"more than 8 bits are scaled by the range of their type, so that {what} reach {pixels.max()} of 255 at "
            "most: scale them to 8 bits yourself",
            stacklevel=2,
        )
