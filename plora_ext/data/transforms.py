"""From stored images to a backbone's input, and one cheap batched augmentation (CPU and GPU)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .resample import to_device

_CHUNK = 1024  # images resized at once: bounds the memory of the float copies


def to_tensor(
    images: np.ndarray | Tensor,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str | None = None,
) -> Tensor:
    """Resizes images (bilinear, antialiased) and normalises them: (x / 255 - mean) / std.

    Args:
        images: uint8 [N, H, W, 3], numpy array or tensor.
        image_size: height and width of the result, in pixels.
        mean: mean of each colour channel, in [0, 1].
        std: standard deviation of each colour channel.
        device: where the result lives; the images' own device when None.

    Returns:
        float32 [N, 3, image_size, image_size].

    Raises:
        ValueError: the images are not uint8 [N, H, W, 3], or image_size is not positive.
    """
    # torch knows no array that is turned round
    source = images if isinstance(images, Tensor) else torch.as_tensor(np.ascontiguousarray(images))
    if source.dtype != torch.uint8 or source.ndim != 4 or source.shape[-1] != 3:
        raise ValueError(
            f"to_tensor: images must be uint8 of shape [N, H, W, 3], got {source.dtype} {list(source.shape)}"
        )
    if image_size < 1:
        raise ValueError(f"to_tensor: image_size must be positive, got {image_size}")
    source = source.to(device or source.device)
    shift = torch.tensor(mean, dtype=torch.float32, device=source.device).view(3, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=source.device).view(3, 1, 1)
    result = torch.empty(len(source), 3, image_size, image_size, dtype=torch.float32, device=source.device)
    for start in range(0, len(source), _CHUNK):
        part = source[start : start + _CHUNK].permute(0, 3, 1, 2).contiguous().float() / 255
        if part.shape[-2:] != (image_size, image_size):
            part = F.interpolate(part, size=(image_size, image_size), mode="bilinear", antialias=True)
        result[start : start + _CHUNK] = (part - shift) / scale
    return result


def random_affine(
    images: Tensor,
    generator: torch.Generator | None = None,
    *,
    zoom: tuple[float, float] = (0.8, 1.2),
    stretch: float = 1.0,
    shift: float = 0.1,
    rotate: float = 0.0,
    flip: bool = False,
    among: tuple[int, slice] | None = None,
) -> Tensor:
    """Moves every image by its own random affine map, one bilinear sampling for the whole batch.

    The picture is continued beyond its border by its border pixels. The numbers are drawn on the generator's device, so
    one seed gives one result there.

    Args:
        images: float [N, C, H, W].
        generator: source of the random numbers; torch's global CPU generator when None.
        zoom: range of the magnification, drawn evenly in its logarithm; above 1 the picture grows.
        stretch: largest ratio between the two axes' magnifications; 1 keeps the shape.
        shift: largest move along each axis, as a share of the image's side.
        rotate: largest rotation either way, in degrees.
        flip: also mirror left and right, one image in two. Off, since a mirrored icon may mean something else.
        among: (n, which): the images are `which` of a batch of n, and move as they would in it; default: all of it.

    Returns:
        float [N, C, H, W], new memory, the images' dtype and device.

    Raises:
        ValueError: the images are not floating point [N, C, H, W], or a range is not positive and ordered.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"random_affine: images must be floating point of shape [N, C, H, W], got {images.dtype} "
            f"{list(images.shape)}"
        )
    if not 0 < zoom[0] <= zoom[1]:
        raise ValueError(f"random_affine: zoom must be (low, high) with 0 < low <= high, got {zoom}")
    if stretch < 1 or shift < 0 or rotate < 0:
        raise ValueError(
            f"random_affine: needs stretch >= 1, shift >= 0 and rotate >= 0, got {stretch}, {shift} and {rotate}"
        )

    device = generator.device if generator is not None else torch.device("cpu")
    total, which = among or (len(images), slice(None))
    number = torch.rand(6, total, generator=generator, device=device)[:, which].float()
    number = to_device(number, images.device)
    size = (math.log(zoom[0]) + math.log(zoom[1] / zoom[0]) * number[0]).exp()
    ratio = (math.log(stretch) * (number[1] - 0.5)).exp()
    angle = math.radians(rotate) * (2 * number[2] - 1)
    mirror = torch.where(number[5] < 0.5, -1.0, 1.0) if flip else torch.ones_like(size)

    # Sampling maps output positions to input positions: a larger picture reads from a smaller region. Written out, for
    # autocast would round the matrix product of F.affine_grid to bfloat16: [N, 1, 1] by [H, 1] and [W].
    cos, sin, ratio, size, mirror, move_x, move_y = (
        part.view(-1, 1, 1)
        for part in (torch.cos(angle), torch.sin(angle), ratio, size, mirror, *(2 * shift * (2 * number[3:5] - 1)))
    )
    height, width = images.shape[-2:]
    y = (torch.arange(height, device=images.device).view(-1, 1) + 0.5) * (2 / height) - 1
    x = mirror * ((torch.arange(width, device=images.device) + 0.5) * (2 / width) - 1)
    grid_x = (cos * x - sin * y) / (size * ratio) + move_x
    grid_y = (sin * x + cos * y) * ratio / size + move_y
    grid = torch.stack(torch.broadcast_tensors(grid_x, grid_y), dim=-1)
    moved = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved.to(images.dtype)


def upright(number: int) -> int:
    """How many images of a batch of `number` `quarter_turns` leaves as they are: the first ones, half of them."""
    return number - 3 * (number // 6)


def quarter_turns(
    images: Tensor, labels: Tensor, num_classes: int, among: tuple[int, slice] | None = None
) -> tuple[Tensor, Tensor]:
    """The images with the second half of them turned by 90, 180 and 270 degrees, a sixth each.

    Args:
        images: float [N, C, S, S].
        labels: int64 [N] in 0 ... num_classes - 1.
        among: (n, which): the images are `which` of a batch of n, and turn as they would in it; default: all of it.

    Returns:
        images, and int64 [N]: after k quarter turns a label is k * num_classes larger.
    """
    total, which = among or (len(images), slice(None))
    turns = ((torch.arange(total)[which] - upright(total)) // max(total // 6, 1) + 1).clamp(min=0)  # ascending
    parts = images.split(torch.bincount(turns, minlength=4).tolist())
    turned = torch.cat([part.rot90(k, (2, 3)) for k, part in enumerate(parts)])
    return turned, labels + num_classes * to_device(turns, labels.device)


def cutmix(images: Tensor, labels: Tensor, num_classes: int, share: float) -> tuple[Tensor, Tensor]:
    """With probability `share` the images with a rectangle of the batch's next one each, and what they then show.

    CutMix (Yun et al., ICCV 2019), by torchvision: the rectangle is a part of the image uniform in [0, 1]. Numbers are
    drawn from torch's global CPU generator.

    Args:
        images: float [N, C, H, W].
        labels: int64 [N] in 0 ... num_classes - 1.
        num_classes: width of the result.
        share: in [0, 1].

    Returns:
        images, and float32 [N, num_classes]: the part of an image that is of a class; rows sum to 1.
    """
    from torchvision.transforms import v2

    if torch.rand(()) < share:
        return v2.CutMix(num_classes=num_classes)(images, labels)
    return images, F.one_hot(labels, num_classes).float()
