"""From a data set to a backbone's input, batch by batch: selection, decoding, transforms, normalisation.

Two pairs of transforms for training and test, S being the backbone's image size:

    resize   training: the image resized to S x S, then moved by a small random affine map; test: resized to S x S
    pilot    training: RandomResizedCrop(S, scale 0.05 ... 1, ratio 3/4 ... 4/3) and a horizontal flip;
             test: shorter side to 256/224 S (bicubic), centre crop S x S        (LAMDA-PILOT's build_transform)

Crops and resizing are Pillow's, image by image in the data workers, or those of `resample`, batch by batch on the
device; the two differ by Pillow's rounding to whole pixel values.

Random numbers come from torch's global CPU generator, all of an epoch's at its start where images are loaded one by one
or prepared on the device, so that the same state of it gives the same batches for any number of workers.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from plora_ext.memory import free_memory

from .decoded import Decoded
from .images import ImageFiles
from .resample import center, random_crop, random_numbers, resample, to_device, whole
from .transforms import random_affine, to_tensor

READY_BYTES = 2 << 30  # arrays whose float images take no more than this are resized once and kept
SHARE = 1 / 4  # of the free memory of the device or the host, that images may take
SHM, TIMEOUT = "/dev/shm", 600  # where workers hand over images; seconds to wait for some
PIECE = 16  # images that a worker hands over together, so that all of them make an epoch's first batch
AHEAD = 4  # pieces that a worker may be ahead
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
        cache: Share of the host's free memory that the pixels of decoded files may take; 0 keeps none.
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


class View:
    """A selection of images, and how they become normalised float32 batches [B, 3, S, S].

    Args:
        images: uint8 [N, H, W, 3], or files.
        preparation: What becomes of them.
    """

    def __init__(self, images: np.ndarray | ImageFiles, preparation: Preparation):
        p = preparation
        if p.on_device is None:
            p = replace(p, on_device=p.device.type == "cuda" and not isinstance(images, ImageFiles))
        self.images, self.preparation = images, p
        self.rows = torch.arange(len(images))
        self._colors = [torch.tensor(v, device=p.device).view(3, 1, 1) for v in (p.mean, p.std)]
        self._digests: list[Tensor] = []  # of all images, shared by every selection
        self._ready: Tensor | None = None  # float images, prepared
        self._stored: Tensor | None = None  # uint8 images, on the device
        self._loader: _Loader | None = None  # for images that are loaded one by one
        source: np.ndarray | ImageFiles | Decoded = images
        if isinstance(images, ImageFiles):
            if p.cache:
                with suppress(OSError):  # a system that promises no more memory than it has
                    source = Decoded(images, int(p.cache * free_memory(torch.device("cpu"))))
        elif p.transform == "resize" and 12 * len(images) * p.image_size**2 <= READY_BYTES:
            self._ready = to_tensor(np.asarray(images), p.image_size, p.mean, p.std, p.device)
        elif p.on_device and (p.device.type == "cpu" or images.nbytes <= SHARE * free_memory(p.device)):
            self._stored = torch.as_tensor(images).to(p.device)
        in_memory = self._ready is not None or self._stored is not None
        if not in_memory and (isinstance(images, ImageFiles) or p.transform == "pilot" or p.on_device):
            self._loader = _Loader(_Items(source, p), p)

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
                contents = (f"{path} {facts.st_size} {facts.st_mtime_ns}".encode() for path, facts in files)
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
            for (images, sizes), own in zip(self._pixels(batches), numbers):
                yield (self._resampled(images, sizes, own) / 255 - mean) / std
        elif self._loader:
            seeds = [[None] * len(rows) if own is None else own.tolist() for rows, own in zip(batches, numbers)]
            for pieces in self._loader([list(zip(rows.tolist(), own)) for rows, own in zip(batches, seeds)]):
                batch = torch.cat([piece.to(p.device, non_blocking=True) for piece in pieces])
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
            for pieces in self._loader([[(row, None) for row in rows.tolist()] for rows in batches]):
                sizes = torch.cat([own for _, own in pieces])
                yield _padded([images.to(p.device, non_blocking=True) for images, _ in pieces], sizes), sizes

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


class _Loader:
    """Batches of items, from workers that live on between passes: starting them takes longer than a small epoch."""

    def __init__(self, items: _Items, preparation: Preparation):
        self._items, self._preparation = items, preparation
        self._plan: list[Any] = []  # what the loader takes as its batch sampler
        self._loader: DataLoader | None = None
        self._warned = False

    def _fitting(self, batch_size: int) -> int:
        """How many workers shared memory has room for: each has up to `AHEAD` pieces there; a batch is being read."""
        try:
            free = shutil.disk_usage(SHM).free
        except OSError:  # batches lie elsewhere
            return self._preparation.workers
        p, workers = self._preparation, self._preparation.workers
        # as they are stored, images may have any size: a million bytes is one of 580 pixels
        image = 10**6 if p.on_device else p.image_size**2 * (3 if p.transform == "pilot" else 12)
        batch, piece = batch_size * image, min(batch_size, PIECE) * image
        fit = min(workers, max(0, (free - batch) // (AHEAD * piece)))
        if fit < workers and not self._warned:
            self._warned = True
            warnings.warn(
                f"{SHM} has {free >> 20} MiB free and a batch takes {batch / 2**20:.1f}: {fit} data workers instead of "
                f"{workers} (docker run --shm-size=1g makes room)",
                stacklevel=2,
            )
        return fit

    def __call__(self, batches: list[list[Any]]) -> Iterator[list[Any]]:
        """The pieces of every batch of `batches`, lists of items; a worker that died becomes one clear error."""
        cuts = [[batch[i : i + PIECE] for i in range(0, len(batch), PIECE)] for batch in batches]
        self._plan[:] = chain.from_iterable(cuts)
        workers = min(self._preparation.workers, len(self._plan))
        if workers and (fit := self._fitting(max(map(len, batches)))) < workers:
            workers = fit
            if self._loader is not None and self._loader.num_workers > fit:
                self._loader = None
        if self._loader is None or self._loader.num_workers < workers:
            self._loader = DataLoader(
                self._items,
                batch_sampler=self._plan,
                num_workers=workers,
                collate_fn=partial(_collate, bool(self._preparation.on_device)),
                pin_memory=self._preparation.device.type == "cuda",
                generator=torch.Generator(),  # its own: the global one stays where it is
                persistent_workers=workers > 0,
                multiprocessing_context="fork" if workers else None,
                prefetch_factor=AHEAD if workers else None,
                timeout=TIMEOUT if workers else 0,
            )
        try:
            loaded = iter(self._loader)
            for cut in cuts:
                pieces = [next(loaded) for _ in cut]
                if wrong := next((piece for piece in pieces if isinstance(piece, Exception)), None):
                    raise wrong
                yield pieces
            next(loaded, None)  # its end, or the next pass would begin while this one is under way
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            if "DataLoader timed out" in said:
                self._loader = None
                raise TimeoutError(
                    f"no batch came from data workers within {TIMEOUT} s: {SHM} may be full (docker run "
                    "--shm-size=1g), or the disk hangs; set workers to 0"
                ) from error
            if "DataLoader worker" not in said:
                raise
            self._loader = None
            raise ChildProcessError(
                f"a data worker died ({said}); it may have run out of memory: lower workers, or set it to 0"
            ) from error


class _Items(Dataset):
    """Item (row, seed): the prepared image, or what went wrong (an exception would arrive as a traceback).

    With a seed it is a random crop. Images that the device prepares come as they are stored.
    """

    def __init__(self, images: np.ndarray | ImageFiles | Decoded, preparation: Preparation):
        self.images, self.raw = images, preparation.on_device
        self.transforms = {crop: _transform(preparation, crop) for crop in (False, True)}

    def __getitem__(self, item: tuple[int, int | None]) -> Tensor | Exception:
        row, seed = item
        try:
            image = self.images[row]
        except ValueError as error:
            return error
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


def _collate(raw: bool, items: list[Any]) -> Any:
    """A batch; of raw images [H, W, 3] one padded to the largest, with their sizes [B, 2]; or what went wrong."""
    for item in items:
        if isinstance(item, Exception):
            return item
    if not raw:
        return torch.stack(items)
    sizes = torch.tensor([image.shape[:2] for image in items])
    return _padded([image[None] for image in items], sizes), sizes


def _padded(pieces: list[Tensor], sizes: Tensor) -> Tensor:
    """Images [n, H, W, 3] of several n, H and W one after another, zeros around those smaller than the largest."""
    height, width = sizes.amax(0).tolist()
    if all(piece.shape[1:3] == (height, width) for piece in pieces):
        return torch.cat(pieces)
    batch = pieces[0].new_zeros(len(sizes), height, width, 3)
    for place, piece in zip(batch.split([len(piece) for piece in pieces]), pieces):
        place[:, : piece.shape[1], : piece.shape[2]] = piece
    return batch


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
