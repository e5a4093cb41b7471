"""From a data set to a backbone's input, batch by batch: selection, decoding, transforms, normalisation.

Two pairs of transforms for training and test, S being the backbone's image size:

    resize   training: the image resized to S x S, then moved by a small random affine map; test: resized to S x S
    pilot    training: RandomResizedCrop(S, scale 0.05 ... 1, ratio 3/4 ... 4/3) and a horizontal flip;
             test: shorter side to 256/224 S (bicubic), centre crop S x S        (LAMDA-PILOT's build_transform)

Crops and resizing are Pillow's, image by image in the data workers, or those of `resample`, batch by batch on the
device; the two differ by Pillow's rounding to whole pixel values and its clipping between columns and rows.

Random numbers come from torch's global CPU generator, all of an epoch's at its start where images are loaded one by one
or prepared on the device, so that the same state of it gives the same batches for any number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from plora_ext.memory import free_memory

from .decoded import Decoded
from .images import ImageFiles
from .loader import Item, Loader, stacked
from .resample import center, random_crop, random_numbers, resample, to_device, whole
from .transforms import random_affine, to_tensor

READY_BYTES = 2 << 30  # arrays whose float images take no more than this are resized once and kept
TOGETHER = 64  # images on the device that are prepared at once, in several batches: the host launches as much for one
SHARE = 1 / 4  # of the free memory of the device or the host, that images may take
CROP = {"scale": (0.05, 1.0), "ratio": (3 / 4, 4 / 3)}  # of transform pilot
Own = Callable[[int], slice]


def _all(number: int) -> slice:
    return slice(None)


@dataclass(frozen=True)
class Preparation:
    """What becomes of a stored image.

    Attributes:
        image_size: Height and width S of the result.
        mean, std: Of each colour channel, in [0, 1]; the result is (x / 255 - mean) / std.
        device: Where batches go.
        transform: "resize" or "pilot".
        augment: Use the training transform while training.
        workers: Processes that load images one by one; 0 does it in this one.
        on_device: Crop and resize on the device, batch by batch; None: arrays, where that is a GPU.
        cache: Share of the host's free memory that the pixels of decoded files may take; 0 keeps none. Those of a data
            set that changes its images at random are not kept.
    """

    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    transform: str = "resize"
    augment: bool = True
    workers: int = 0
    on_device: bool | None = False
    cache: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int | np.integer) or self.image_size < 1:
            raise ValueError(f"image_size must be the pixels of a side, a whole number above 0, got {self.image_size}")
        if self.transform not in ("resize", "pilot"):
            raise ValueError(f"transform must be resize or pilot, got {self.transform!r}")
        for name, least in (("mean", 0.0), ("std", 1e-12)):
            if len(values := list(getattr(self, name))) != 3 or not all(least <= value <= 1 for value in values):
                raise ValueError(
                    f"{name} must be three numbers, for red, green and blue in [0, 1] and std above 0, got {values}"
                )


class View:
    """A selection of images, uint8 [N, H, W, 3] or files, and how they become batches: float32 [B, 3, S, S]."""

    def __init__(self, images: np.ndarray | ImageFiles, preparation: Preparation):
        p = preparation
        if p.on_device is None:
            p = replace(p, on_device=p.device.type == "cuda" and not isinstance(images, ImageFiles))
        if not isinstance(images, ImageFiles):
            images = np.ascontiguousarray(images)  # torch knows no array that is turned round
        self.images, self.preparation = images, p
        self.rows = torch.arange(len(images))
        self._colors = [torch.tensor(v, dtype=torch.float32, device=p.device).view(3, 1, 1) for v in (p.mean, p.std)]
        self._digests: list[Tensor] = []  # of all images, shared by every selection
        self._ready: Tensor | None = None  # float images, prepared
        self._stored: Tensor | None = None  # uint8 images, on the device
        self._loader: Loader | None = None  # for images that are loaded one by one
        source: np.ndarray | ImageFiles | Decoded = images
        if isinstance(images, ImageFiles):
            if p.cache and images.repeats():
                with suppress(OSError):  # a system that promises no more memory than it has
                    source = Decoded(images, int(p.cache * free_memory(torch.device("cpu"))))
        elif p.transform == "resize" and 12 * len(images) * p.image_size**2 <= READY_BYTES:
            self._ready = to_tensor(np.asarray(images), p.image_size, p.mean, p.std, p.device)
        elif p.on_device and (p.device.type == "cpu" or images.nbytes <= SHARE * free_memory(p.device)):
            self._stored = torch.as_tensor(images).to(p.device)
        in_memory = self._ready is not None or self._stored is not None
        if not in_memory and (isinstance(images, ImageFiles) or p.transform == "pilot" or p.on_device):
            # as they are stored, images may have any size: a million bytes is one of 580 pixels
            each = 10**6 if p.on_device else p.image_size**2 * (3 if p.transform == "pilot" else 12)
            self._loader = Loader(_Items(source, p), p.workers, each)

    def __len__(self) -> int:
        return len(self.rows)

    def digests(self) -> Tensor:
        """Two 64-bit numbers [n, 2] that stand for each image by the test transform.

        From the stored pixels, or of a file from its path, size and time, and from what becomes of them.
        """
        if not self._digests:
            p = self.preparation
            about = repr((p.image_size, list(p.mean), list(p.std), p.transform)).encode()
            about += b" on the device" if p.on_device and self._ready is None else b""
            if isinstance(self.images, ImageFiles):
                files = ((path.absolute(), path.stat()) for path in self.images.paths)
                texts = (f"{path} {facts.st_size} {facts.st_mtime_ns}" for path, facts in files)
                contents = (text.encode("utf-8", "surrogateescape") for text in texts)  # paths need not be UTF-8
            else:
                contents = (repr(image.shape).encode() + image.tobytes() for image in self.images)
            parts = [hashlib.blake2b(about + content, digest_size=16).digest() for content in contents]
            self._digests.append(torch.from_numpy(np.frombuffer(b"".join(parts), dtype=np.int64).reshape(-1, 2).copy()))
        return self._digests[0][self.rows]

    def __getitem__(self, rows: Tensor) -> View:
        """The images of `rows`, int64, within this selection."""
        chosen = object.__new__(View)
        chosen.__dict__.update(self.__dict__, rows=self.rows[rows.cpu()])
        return chosen

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, by the test transform."""
        return self._batches(self.rows.split(batch_size), train=False)

    def epoch(self, order: Tensor, batch_size: int, own: Own = _all) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, batch) for `order`, a permutation of this selection, by the training transform.

        Args:
            own: of a batch's number of rows, the part to load: what another process does not load of it. Random numbers
                are drawn for the whole batch.
        """
        order = order.cpu()
        batches = self._batches(self.rows[order].split(batch_size), self.preparation.augment, own)
        return zip(_own(order.split(batch_size), own), batches)

    def _batches(self, batches: Sequence[Tensor], train: bool, own: Own = _all) -> Iterator[Tensor]:
        p = self.preparation
        numbers: Sequence[Tensor | None] = [None] * len(batches)
        if train and p.transform == "pilot":
            total, each = sum(map(len, batches)), [len(rows) for rows in batches]
            drawn = random_numbers(total) if p.on_device else torch.randint(2**62, (total,))
            numbers = _own(drawn.split(each), own)
        for batch, rows in zip(self._made(_own(batches, own), numbers), batches):
            moved = train and p.transform == "resize"
            yield random_affine(batch, among=(len(rows), own(len(rows)))) if moved else batch

    def _made(self, batches: Sequence[Tensor], numbers: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """The batches of these rows, normalised; with random numbers, those of random crops."""
        p, (mean, std) = self.preparation, self._colors
        if self._ready is not None:
            yield from (self._ready[rows] for rows in _split_on(self._ready.device, batches))
        elif p.on_device:
            each = max(1, (1 if self._stored is None else TOGETHER) // max(len(batches[0]), 1)) if batches else 1
            groups = [slice(i, i + each) for i in range(0, len(batches), each)]
            joined = self._pixels([torch.cat(tuple(batches[group])) for group in groups])
            for (images, sizes), group in zip(joined, groups):
                own = [part for part in numbers[group] if part is not None]
                prepared = (self._resampled(images, sizes, torch.cat(own) if own else None) / 255 - mean) / std
                yield from prepared.split([len(rows) for rows in batches[group]])
        elif self._loader:
            seeds = [[None] * len(rows) if own is None else own.tolist() for rows, own in zip(batches, numbers)]
            for loaded in self._loader([list(zip(rows.tolist(), own)) for rows, own in zip(batches, seeds)]):
                batch = stacked(loaded, p.device)
                yield ((batch.float() / 255 if batch.dtype == torch.uint8 else batch) - mean) / std
        else:
            for rows in batches:
                yield to_tensor(self.images[rows.numpy()], p.image_size, p.mean, p.std, p.device)  # type: ignore[index]

    def _pixels(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches as they are stored: uint8 [B, H, W, 3] on the device, padded, and their sizes [B, 2]."""
        p = self.preparation
        if self._stored is not None:
            size = torch.tensor(self._stored.shape[1:3])
            for rows in _split_on(self._stored.device, batches):
                yield self._stored[rows], size.expand(len(rows), 2)
        else:
            assert self._loader is not None
            for images in self._loader([[(row, None) for row in rows.tolist()] for rows in batches]):
                yield stacked(images, p.device), torch.tensor([image.shape[:2] for image in images])

    def _resampled(self, images: Tensor, sizes: Tensor, numbers: Tensor | None) -> Tensor:
        """Cropped and resized where the model is."""
        size, pilot = self.preparation.image_size, self.preparation.transform == "pilot"
        if numbers is not None:
            windows, flip = random_crop(sizes, numbers, size, **CROP)
            return resample(images, windows, size, "bilinear", flip)
        if pilot:
            return resample(images, center(sizes, int(256 / 224 * size), size), size, "bicubic")
        return resample(images, whole(sizes, size), size)


def _own(batches: Sequence[Tensor], own: Own) -> list[Tensor]:
    return [rows[own(len(rows))] for rows in batches]


def _split_on(device: torch.device, batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of batches on `device`, sent there at once."""
    return to_device(torch.cat(list(batches)), device).split([len(rows) for rows in batches]) if batches else []


class _Items:
    """Item (row, seed): the image prepared, with a seed a random crop of it; as stored where the device does that."""

    def __init__(self, images: np.ndarray | ImageFiles | Decoded, preparation: Preparation):
        self.images, self.raw = images, preparation.on_device
        self.transforms = {crop: _transform(preparation, crop) for crop in (False, True)}

    def __getitem__(self, item: Item) -> Tensor:
        row, seed = item
        image = self.images[row]
        if self.raw:
            return torch.as_tensor(image)
        if seed is None:
            return self.transforms[False](image)
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)  # the CPU's alone
            return self.transforms[True](image)
        finally:
            torch.set_rng_state(state)

    def at_hand(self, rows: list[int]) -> bool:
        return bool(self.raw) and isinstance(self.images, Decoded) and self.images.hold(rows)


def _transform(p: Preparation, crop: bool) -> Callable[[np.ndarray], Tensor]:
    """From a stored image to pixels that are not normalised yet."""
    if p.transform == "resize":  # the same pixels as `to_tensor` gives for arrays
        return lambda image: to_tensor(image[None], p.image_size, (0, 0, 0), (1, 1, 1))[0]
    from torchvision.transforms import InterpolationMode, v2

    if crop:
        steps = [v2.RandomResizedCrop(p.image_size, **CROP), v2.RandomHorizontalFlip()]
    else:
        larger = v2.Resize(int(256 / 224 * p.image_size), InterpolationMode.BICUBIC)
        steps = [larger, v2.CenterCrop(p.image_size)]
    return v2.Compose([v2.ToPILImage(), *steps, v2.PILToTensor()])
