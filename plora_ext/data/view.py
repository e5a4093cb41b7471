"""From a data set to a backbone's input, batch by batch: selection, decoding, transforms, normalisation.

Two pairs of transforms for training and test, S being the backbone's image size:

    resize   training: the image resized to S x S, then moved by a small random affine map; test: resized to S x S
    pilot    training: RandomResizedCrop(S, scale 0.05 ... 1, ratio 3/4 ... 4/3) and a horizontal flip;
             test: shorter side to 256/224 S (bicubic), centre crop S x S        (LAMDA-PILOT's build_transform)

Random numbers come from torch's global CPU generator, one seed an image where images are loaded one by one, so that
the same state of it gives the same batches for any number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .sets import ImageFiles
from .transforms import random_affine, to_tensor

READY_BYTES = 2 << 30  # arrays whose float images take no more than this are resized once and kept
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
    """

    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    transform: str = "resize"
    augment: bool = True
    workers: int = 0


class View:
    """A selection of images, and how they become normalised float32 batches [B, 3, S, S].

    Args:
        images: uint8 [N, H, W, 3], or files.
        preparation: What becomes of them.
    """

    def __init__(self, images: np.ndarray | ImageFiles, preparation: Preparation):
        self.images, self.preparation = images, preparation
        self.rows = torch.arange(len(images))
        p = preparation
        self._digests: list[Tensor] = []  # of all images, shared by every selection
        self._one_by_one = isinstance(images, ImageFiles) or p.transform == "pilot"
        self._ready: Tensor | None = None
        if not self._one_by_one and 12 * len(images) * p.image_size**2 <= READY_BYTES:
            self._ready = to_tensor(np.asarray(images), p.image_size, p.mean, p.std, p.device)

    def __len__(self) -> int:
        return len(self.rows)

    def digests(self) -> Tensor:
        """Two 64-bit numbers [n, 2] that stand for each image by the test transform.

        From the stored pixels, or of a file from its path, size and time, and from what becomes of them.
        """
        if not self._digests:
            p = self.preparation
            about = repr((p.image_size, list(p.mean), list(p.std), p.transform)).encode()
            parts = [hashlib.blake2b(about + content, digest_size=16).digest() for content in self._contents()]
            self._digests.append(torch.from_numpy(np.frombuffer(b"".join(parts), dtype=np.int64).reshape(-1, 2).copy()))
        return self._digests[0][self.rows]

    def _contents(self) -> Iterator[bytes]:
        if isinstance(self.images, ImageFiles):
            for path in self.images.paths:
                facts = path.stat()
                yield f"{path.absolute()} {facts.st_size} {facts.st_mtime_ns}".encode()
        else:
            for image in self.images:
                yield repr(image.shape).encode() + image.tobytes()

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
        return zip((rows[own(len(rows))] for rows in order.split(batch_size)), batches)

    def _batches(self, batches: Sequence[Tensor], train: bool, own: Own = _all) -> Iterator[Tensor]:
        p = self.preparation
        affine = train and p.transform == "resize"
        parts = [batch[own(len(batch))] for batch in batches]
        loaded = self._loaded(batches, train, own) if self._one_by_one else map(self._of_arrays, parts)
        for batch, whole in zip(loaded, batches):
            yield random_affine(batch, among=(len(whole), own(len(whole)))) if affine else batch

    def _of_arrays(self, rows: Tensor) -> Tensor:
        if self._ready is not None:
            return self._ready[rows.to(self._ready.device)]
        p = self.preparation
        return to_tensor(self.images[rows.numpy()], p.image_size, p.mean, p.std, p.device)  # type: ignore[index]

    def _loaded(self, batches: Sequence[Tensor], train: bool, own: Own) -> Iterator[Tensor]:
        """Batches of images that are loaded one by one, perhaps by workers."""
        p = self.preparation
        seeds = torch.randint(2**62, (sum(map(len, batches)),)) if train and p.transform == "pilot" else None
        numbers = iter(seeds.tolist()) if seeds is not None else None
        items = [
            [(row, next(numbers) if numbers else None) for row in batch.tolist()][own(len(batch))] for batch in batches
        ]
        loader = DataLoader(
            _Items(self.images, _transform(p, train)),
            batch_sampler=items,
            num_workers=min(p.workers, len(items)),
            collate_fn=_collate,
            pin_memory=p.device.type == "cuda",
            generator=torch.Generator(),  # its own: the global one stays where it is
        )
        mean, std = (torch.tensor(v, device=p.device).view(3, 1, 1) for v in (p.mean, p.std))
        for batch in _watched(loader):
            if isinstance(batch, Exception):
                raise batch
            batch = batch.to(p.device, non_blocking=True)
            batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch
            yield (batch - mean) / std


def _watched(loader: DataLoader) -> Iterator[Tensor | Exception]:
    """The batches of a loader; a worker that died becomes one clear error."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        said = str(error).splitlines()[0]
        raise ChildProcessError(
            f"a data worker died ({said}); it may have run out of memory: lower workers, or set it to 0"
        ) from error


class _Items(Dataset):
    """Item (row, seed): the transformed image, or what went wrong (an exception would arrive as a traceback)."""

    def __init__(self, images: np.ndarray | ImageFiles, transform: Callable[[np.ndarray], Tensor]):
        self.images, self.transform = images, transform

    def __getitem__(self, item: tuple[int, int | None]) -> Tensor | Exception:
        row, seed = item
        try:
            image = self.images[row]
        except ValueError as error:
            return error
        if seed is None:
            return self.transform(image)
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)  # the CPU's alone
            return self.transform(image)
        finally:
            torch.set_rng_state(state)


def _collate(items: list[Tensor | Exception]) -> Tensor | Exception:
    for item in items:
        if isinstance(item, Exception):
            return item
    return torch.stack(items)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Resize:
    """The same pixels as `to_tensor` gives for arrays, before normalisation."""

    size: int

    def __call__(self, image: np.ndarray) -> Tensor:
        return to_tensor(image[None], self.size, (0, 0, 0), (1, 1, 1))[0]


def _transform(p: Preparation, train: bool) -> Callable[[np.ndarray], Tensor]:
    if p.transform == "resize":
        return _Resize(p.image_size)
    from torchvision.transforms import InterpolationMode, v2

    if train:
        crop = v2.RandomResizedCrop(p.image_size, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3))
        steps = [v2.ToPILImage(), crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]
    else:
        larger = v2.Resize(int(256 / 224 * p.image_size), InterpolationMode.BICUBIC)
        steps = [v2.ToPILImage(), larger, v2.CenterCrop(p.image_size), v2.PILToTensor()]
    return v2.Compose(steps)
