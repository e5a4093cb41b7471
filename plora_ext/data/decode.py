"""Image files as 8-bit RGB: what every part of the package that opens one agrees on."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_PHOTOMETRIC = 262  # tag of TIFF
_DARK = 64  # what images of more than 8 bits have to reach of 255, else it is said: 12 bits kept in 16 give 16


def decode(path: Path) -> np.ndarray:
    """The pixels of an image file, uint8 [H, W, 3], turned as its EXIF orientation says.

    Integers of 16 bits and more are scaled by 1 / 257, floats in [0, 1] by 255; floats in [0, 255], some above 2, stay,
    gray becomes RGB and what is transparent is laid on white. Of colours in 16 bits Pillow reads the upper eight.

    Raises:
        ValueError: Values outside of these ranges, no regular file, or colours in 16 bits of which one is transparent.
        Exception: What Pillow's decoders raise, which is all kinds.
    """
    check_regular(path)
    with Image.open(path) as image:
        return to_rgb(image)


def check_regular(path: Path) -> None:
    """Raises ValueError for a pipe, a socket or a device: what opens one may wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")


def check_transparency(image: Image.Image) -> None:
    """Raises ValueError where what is transparent cannot be told, before anything is decoded."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and (max(key) > 255 or ";16" in _raw_mode(image)):
        raise ValueError(
            "its colours have 16 bits and one of them is transparent, and Pillow reads 8 bits of them: save it with 8"
        )


def is_deep(image: Image.Image) -> bool:
    """Whether an opened file holds more than 8 bits a value."""
    raw = _raw_mode(image)
    return image.mode in ("F", "I") or image.mode.startswith("I;16") or (";16" in raw and not raw.startswith("BGR"))


def _raw_mode(image: Image.Image) -> str:
    """How the values lie in an opened file, as Pillow's decoders name it: "RGB;16B", "L;4"; "" once it is decoded."""
    args = tile[0][3] if (tile := getattr(image, "tile", None)) else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an image of Pillow, by the rules of `decode`."""
    check_transparency(image)
    raw = _raw_mode(image)
    turned = ImageOps.exif_transpose(image)
    key = turned.info.get("transparency")
    if turned.mode in ("F", "I") or turned.mode.startswith("I;16"):
        values = np.asarray(turned)
        if raw == "I;16" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # a TIFF file whose 0 is white
            values = 65535 - values  # of 8 bits Pillow does it
        gray = to_8_bits(values)
        if isinstance(key, int):  # the value that a PNG file has as transparent
            gray[values == key] = 255
        return np.repeat(gray[..., None], 3, axis=2)
    if isinstance(key, int) and (bits := {"L;2": 2, "L;4": 4}.get(raw)) and key < 2**bits:
        turned.info["transparency"] = key * 255 // (2**bits - 1)  # as Pillow scales the pixels
    if turned.mode == "La":
        turned = turned.convert("LA")
    if turned.mode in _ALPHA or key is not None:
        turned = turned.convert("RGBA")
        white = Image.new("RGBA", turned.size, "white")
        turned = Image.alpha_composite(white, turned)
    return np.array(turned.convert("RGB"))


def to_8_bits(values: np.ndarray, what: str = "") -> np.ndarray:
    """Pixels of any number type as uint8, by the rule of `decode`; `what` names them in errors."""
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8, copy=False)
    low, high, integers = values.min(), values.max(), values.dtype.kind in "iu"
    # What ends between 1 and 2 is [0, 1] that a resizing has overshot, and would be black as [0, 255].
    known = integers or (values.dtype.kind == "f" and not 1 < high < 2)
    if not known or not 0 <= low <= high <= (65535 if integers else 255):  # NaN, too
        wanted = "integers in [0, 65535]" if integers else "floats in [0, 1] or [0, 255]"
        said = f"{what} must hold {wanted}, got {low} to {high}: clip them, or scale them to 8 bits first"
        raise ValueError(said.lstrip())
    if not integers:
        values = values.astype(np.promote_types(values.dtype, np.float32), copy=False)  # rounded once
    return np.round(values / 257 if integers else values * (255 if high <= 1 else 1)).astype(np.uint8)


def warn_if_dark(pixels: np.ndarray, what: str) -> None:
    """Says so if what was scaled from more than 8 bits has become dark; `what` names it."""
    if pixels.size and pixels.max() < _DARK:
        warnings.warn(
            f"more than 8 bits are scaled by the range of their type, so that {what} reach {pixels.max()} of 255 at "
            "most: scale them to 8 bits yourself",
            stacklevel=2,
        )
