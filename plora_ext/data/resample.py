"""Crops, resizing and flips of whole batches on the images' device, each image by its own numbers.

Resizing with antialiasing is linear and works on rows and columns apart, so an image's crop, resize and flip together
are two small matrices, R [S, H] and C [S, W], and the result is R x C' for each channel: two batched products, whatever
the sizes of the images and their crops. The weights are those of torch's and Pillow's antialiased filters
(`torch.nn.functional.interpolate(antialias=True)`): output i of a resize from n to m pixels is the mean of the inputs j
with weights f((j + 1/2 - (i + 1/2) s) / max(s, 1)), s = n / m, with f the triangle (bilinear) or Keys' cubic with
a = -1/2 (bicubic).

What becomes of B images is said by windows, int64 [2, 4, B]: for rows and for columns `start, length, full, offset`.
The pixels from start to start + length are resized to `full`, of which S from `offset` are the result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BYTES = 256 << 20  # of float copies at once
_TRIES = 10


def resample(
    images: Tensor, windows: Tensor, size: int, kernel: str = "bilinear", flip: Tensor | None = None
) -> Tensor:
    """Crops, resizes and mirrors images.

    Args:
        images: uint8 [B, H, W, 3]; smaller images of a batch are padded, their windows leave the padding out.
        windows: int64 [2, 4, B] on the host, see above.
        size: Height and width S of the result.
        kernel: "bilinear" or "bicubic", both antialiased.
        flip: bool [B], the images to mirror left and right.

    Returns:
        float32 [B, 3, S, S] in 0 ... 255, on the images' device.
    """
    numbers = windows if flip is None else torch.cat([windows, flip.expand_as(windows[:1])])
    alike = bool((numbers == numbers[..., :1]).all())  # images of one size, nothing random: their weights are the same
    numbers = to_device((numbers[..., :1] if alike else numbers).float(), images.device)
    step = max(1, _BYTES // (12 * images.shape[1] * images.shape[2]))
    parts = []
    for first in range(0, max(len(images), 1), step):
        part = slice(first, first + step)
        own = numbers if alike else numbers[..., part]
        rows, columns = (_weights(own[i], size, images.shape[1 + i], kernel) for i in (0, 1))
        if flip is not None:
            columns = torch.where(own[2, 0, :, None, None] > 0, columns.flip(1), columns)
        resized = (rows @ images[part].flatten(2).float()).unflatten(2, (-1, 3))  # [B, S, W, 3]
        parts.append((resized.permute(0, 3, 1, 2).flatten(1, 2) @ columns.mT).unflatten(1, (3, -1)))
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    return result.clamp_(0, 255) if kernel == "bicubic" else result


def _weights(window: Tensor, size: int, extent: int, kernel: str) -> Tensor:
    """The weights [B, size, extent] of `size` results in `extent` pixels; window [4, B]."""
    start, length, full, offset = window[:, :, None, None]
    scale = length / full
    center = (torch.arange(size, device=window.device)[:, None] + offset + 0.5) * scale
    pixel = torch.arange(extent, device=window.device) - start
    x = ((pixel + 0.5 - center) / scale.clamp(min=1)).abs()
    if kernel == "bilinear":
        weight = (1 - x).clamp(min=0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = torch.where((pixel >= 0) & (pixel < length), weight, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def whole(sizes: Tensor, size: int) -> Tensor:
    """Windows of all of an image, of `sizes` int64 [B, 2], resized to size x size."""
    zero = torch.zeros_like(sizes)
    return torch.stack([zero, sizes, torch.full_like(sizes, size), zero]).permute(2, 0, 1)


def center(sizes: Tensor, shorter: int, size: int) -> Tensor:
    """Windows of the central size x size after the shorter side has become `shorter`: Resize and CenterCrop."""
    least = sizes.amin(1, keepdim=True)
    full = torch.where(sizes == least, shorter, shorter * sizes // least)
    offset = ((full - size).double() / 2).round().long()
    return torch.stack([torch.zeros_like(sizes), sizes, full, offset]).permute(2, 0, 1)


def random_numbers(n: int) -> Tensor:
    """What `random_crop` needs for n images, float64 [n, 23], of torch's global CPU generator."""
    return torch.rand(n, 2 * _TRIES + 3, dtype=torch.float64)


def random_crop(
    sizes: Tensor, numbers: Tensor, size: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Windows and flips [B] of torchvision's RandomResizedCrop and RandomHorizontalFlip, drawn for each image.

    The area of a crop is drawn evenly from `scale`, its aspect from `ratio` evenly in the logarithm; of ten draws the
    first that fits into the image counts, and where none does, the largest central crop of a permitted aspect.

    Args:
        sizes: int64 [B, 2], heights and widths.
        numbers: float64 [B, 23] in [0, 1), see `random_numbers`.
    """
    sides = sizes.double()
    height, width = sides.split(1, 1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[:, :_TRIES])
    low, high = map(math.log, ratio)
    aspect = (low + (high - low) * numbers[:, _TRIES : 2 * _TRIES]).exp()
    crops = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()], 2)  # [B, tries, 2]
    fits = ((crops > 0) & (crops <= sides[:, None])).all(2)
    largest = torch.minimum(sides, (sides.flip(1) * torch.tensor([1 / ratio[0], ratio[1]])).round())
    some, first = fits.any(1, keepdim=True), fits.int().argmax(1)
    crop = torch.where(some, crops[torch.arange(len(crops)), first], largest)
    start = torch.where(some, (numbers[:, 2 * _TRIES : -1] * (sides - crop + 1)).floor(), ((sides - crop) / 2).floor())
    window = [start.long(), crop.long(), torch.full_like(sizes, size), torch.zeros_like(sizes)]
    return torch.stack(window).permute(2, 0, 1), numbers[:, -1] < 0.5


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host does not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
