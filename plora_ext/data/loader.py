"""Images from data workers, which write them where this process reads them.

A batch is cut into pieces, so that all workers make an epoch's first batch. A worker gets a piece and a slot of memory
that all processes have shared from the start; it puts the images there, one behind the other, and sends their shapes.
No image lies in /dev/shm, none is pickled but those of a piece that is larger than a slot.
"""

from __future__ import annotations

import math
import mmap
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

PIECE = 16  # images that a worker makes at a time
AHEAD = 4  # pieces that a worker may be ahead
BATCH = 256  # images that there are slots for beside: a larger batch has workers start anew
TIMEOUT = 600  # seconds to wait for a piece
SHM, LOCKS = "/dev/shm", 1 << 20  # where the locks of workers' queues lie, and more than enough bytes for them

Item = tuple[int, int | None]  # a row, and the seed of its random crop


class Items(Protocol):
    """What makes an image of an item."""

    def __getitem__(self, item: Item, /) -> Tensor:
        """Raises ValueError where there is no image."""

    def at_hand(self, rows: list[int]) -> bool:
        """Whether images take no work, so that this process has them sooner than a worker."""


class Loader:
    """Batches of images of about `image_bytes` each, which `workers` processes make of `items`; 0: this one does.

    Workers live on between passes: starting them takes longer than a small epoch.
    """

    def __init__(self, items: Items, workers: int, image_bytes: int):
        self._items, self.workers, self._image_bytes = items, workers, image_bytes
        self._plan: list[Any] = []  # slots and items of all pieces to come
        self._loader: DataLoader | None = None
        self._slots = torch.empty(0, 0, dtype=torch.uint8)
        self._under_way = False  # whether workers make what a pass still reads

    def __call__(self, batches: Sequence[list[Item]]) -> Iterator[list[Tensor]]:
        """The images of every batch, there until the next batch is asked for.

        Workers serve one pass: one that begins before it has ended is this process's own work.

        Raises:
            ValueError: There is no image where one should be.
            ChildProcessError: A worker died.
            TimeoutError: No piece came within `TIMEOUT` seconds.
        """
        pieces = [[batch[i : i + PIECE] for i in range(0, len(batch), PIECE)] for batch in batches]
        number = sum(map(len, pieces))
        loaded = None
        free = self.workers and not self._under_way
        if free and number and not self._items.at_hand([row for batch in batches for row, _ in batch]):
            loaded = self._start(min(self.workers, number), pieces)
        if loaded is None:
            for batch in batches:
                yield [self._items[item] for item in batch]
            return
        self._under_way = True
        try:
            for cut in pieces:
                yield [image for _ in cut for image in self._read(next(loaded))]
            next(loaded, None)  # its end, or the next pass would begin while this one is under way
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            if "DataLoader timed out" in said:
                self._loader = None
                raise TimeoutError(
                    f"no images came from data workers within {TIMEOUT} s: the disk may hang; set workers to 0"
                ) from error
            if "DataLoader worker" not in said:
                raise
            self._loader = None
            raise ChildProcessError(
                f"a data worker died ({said}); it may have run out of memory: lower workers, or set it to 0"
            ) from error
        finally:
            self._under_way = False

    def _start(self, workers: int, pieces: list[list[list[Item]]]) -> Iterator[Any] | None:
        """What the workers send back, piece by piece; None: none can be started.

        There are slots for what workers are ahead and for the largest batch, none is written to while read.
        """
        with suppress(OSError):  # there may be none
            if shutil.disk_usage(SHM).free < LOCKS:
                warnings.warn(f"{SHM} is full: this process loads images, without data workers", stacklevel=2)
                self.workers = 0
                return None
        workers = max(workers, self._loader.num_workers if self._loader else 0)
        slots = AHEAD * workers + max(*map(len, pieces), math.ceil(BATCH / PIECE))
        if self._loader is None or self._loader.num_workers < workers or len(self._slots) < slots:
            memory = mmap.mmap(-1, slots * PIECE * self._image_bytes)  # taken as it is written to
            self._slots = torch.frombuffer(memory, dtype=torch.uint8).view(slots, -1)
            self._loader = DataLoader(
                _Pieces(self._items, self._slots),
                batch_size=None,
                sampler=self._plan,
                num_workers=workers,
                collate_fn=lambda piece: piece,
                generator=torch.Generator(),  # its own: the global one stays where it is
                persistent_workers=True,
                multiprocessing_context="fork",
                prefetch_factor=AHEAD,
                timeout=TIMEOUT,
            )
        in_order = (piece for cut in pieces for piece in cut)
        self._plan[:] = ((i % len(self._slots), piece) for i, piece in enumerate(in_order))
        return iter(self._loader)

    def _read(self, piece: Any) -> list[Tensor]:
        if isinstance(piece, Exception):
            raise piece
        if isinstance(piece, list):
            return [torch.from_numpy(image) for image in piece]
        slot, dtype, shapes = piece
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        parts = self._slots[slot, : sum(sizes)].split(sizes)
        return [part.view(dtype).view(shape) for part, shape in zip(parts, shapes)]


class _Pieces(Dataset):
    """What a worker makes of (slot, items): (slot, dtype, shapes of the images there); those that a slot is too small
    for, as arrays; or what went wrong, for an exception would arrive as a traceback."""

    def __init__(self, items: Items, slots: Tensor):
        self.items, self.slots = items, slots

    def __getitem__(self, piece: tuple[int, list[Item]]) -> Any:
        slot, items = piece
        try:
            images = [self.items[item].contiguous() for item in items]
        except ValueError as error:
            return error
        sizes = [image.nbytes for image in images]
        if sum(sizes) > self.slots.shape[1]:
            return [image.numpy() for image in images]
        for place, image in zip(self.slots[slot, : sum(sizes)].split(sizes), images):
            place.copy_(image.view(-1).view(torch.uint8))
        return slot, images[0].dtype, [tuple(image.shape) for image in images]


def stacked(images: Sequence[Tensor], device: torch.device) -> Tensor:
    """Images [B, ...] of one shape, or padded by zeros to the largest, on `device` as soon as it has time."""
    cuda, shape = device.type == "cuda", [max(sizes) for sizes in zip(*(image.shape for image in images))]
    batch = torch.empty(len(images), *shape, dtype=images[0].dtype, pin_memory=cuda)
    if all(image.shape == batch.shape[1:] for image in images):
        torch.stack(list(images), out=batch)
    else:
        batch.zero_()
        for place, image in zip(batch, images):
            place[tuple(map(slice, image.shape))] = image
    return batch.to(device, non_blocking=True)
