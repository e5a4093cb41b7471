"""Features of images, each computed once under every adapter that stays as it is.

An adapter that is frozen gives an image the same features for ever. So T adapters over T equal tasks need T * N passes
of N test images in all, and not the sum over tasks t of t * (t N / T): (T + 1)(2T + 1) / (6T) times fewer.

What is kept is known by its content: an image by a digest of its pixels, an adapter by a fingerprint of everything that
its features depend on (plora_ext.cil.spaces). Nothing else says that a kept feature may be used, so a changed weight or
pixel is a miss.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plora_ext.change import fingerprint, row_digests
from plora_ext.memory import free_memory

__all__ = ["FeatureCache"]

SHARE = 1 / 4  # of the free memory of a device, or of the host, that kept features may take
_FILE = re.compile(r"features-[0-9a-f]{16}-[0-9a-f]{16}\.safetensors")


class Selection(Protocol):
    """Images that are perhaps not in memory: how many, some of them, digests `[n, 2]` of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Tensor) -> Any: ...
    def digests(self) -> Tensor: ...


Compute = Callable[[Any, list[str]], Tensor]


class FeatureCache:
    """Keeps features by image and adapter, on the device, on the host or in memory-mapped files.

        cache = FeatureCache()
        features = cache(images, {"task0": "9f3c...", "task1": "a771..."}, compute)   # [n, 2, ...]

    Without a folder, features stay on their device while they take up to a fourth of what is free there, then on the
    host by the same rule, then in files of a temporary folder. With a folder all of them go to files there, which a
    later run with the same weights and images finds again. A file that is truncated or damaged, or that holds features
    of an adapter by the same name but of other weights, is removed, a line says so, and its features are computed anew.

    Args:
        folder: where the files go; made if missing. Files in it by other names are left alone.
        device_memory: bytes on the device at most, instead of a fourth of what is free.
        host_memory: the same on the host.
        device: where the features that it gives are; default: where the images are.
        say: takes the line about a file that could not be used; default: print to stderr.

    Attributes:
        computed: how many pairs of an image and an adapter were computed.
        found: how many were there already.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        device_memory: int | None = None,
        host_memory: int | None = None,
        device: torch.device | None = None,
        say: Callable[[str], object] | None = None,
    ) -> None:
        self.device_memory, self.host_memory, self.device = device_memory, host_memory, device
        self.computed = self.found = 0
        self._say = say or (lambda line: print(line, file=sys.stderr))
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = None if folder is None else Path(folder)
        self._images: dict[bytes, int] = {}  # digest of an image: its number
        self._spaces: dict[str, _Space] = {}  # by fingerprint
        self._names: dict[str, str] = {}  # the fingerprint that an adapter's name stands for
        self._files: dict[str, list[tuple[str, Path]]] = {}  # of an earlier run, by name: fingerprint, file
        if self._folder:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"cannot be made ({error.strerror}): name a folder, auto or none"
                raise type(error)(f"feature_cache {str(self._folder)!r} {why}") from error
            self._look_around(self._folder)

    def __call__(self, images: Tensor | Selection, spaces: Mapping[str, str], compute: Compute) -> Tensor:
        """Features `[n, len(spaces), ...]` of n images.

        Args:
            images: what `compute` takes: a tensor `[n, ...]`, or anything that has digests of its images.
            spaces: for each adapter its name and the fingerprint of what its features depend on.
            compute: `compute(images, names)` gives `[n, len(names), ...]` for what is missing: some of the images, some
                of the names. It must not look at the other images of its batch.

        Raises:
            ValueError: there are no spaces, or `compute` returns another shape.
            OSError: a file cannot be written.
        """
        if not spaces:
            raise ValueError("spaces must hold at least one adapter, got none")
        if not len(images):
            return compute(images, list(spaces))
        numbers = self._numbers(images)
        of = {name: self._space(name, known) for name, known in spaces.items()}
        once, first = np.unique(numbers, return_index=True)
        missing = np.stack([space.block[once] < 0 for space in of.values()], 1)
        self.computed += int(missing.sum())
        self.found += missing.size - int(missing.sum())
        for pattern in np.unique(missing, axis=0):
            if pattern.any():
                names = [name for name, asks in zip(of, pattern) if asks]
                rows = first[(missing == pattern).all(1)]
                features = compute(images[torch.from_numpy(rows)], names)
                if features.shape[:2] != (len(rows), len(names)):
                    raise ValueError(
                        f"compute must return [{len(rows)}, {len(names)}, ...], got {list(features.shape)}"
                    )
                for name, column in zip(names, features.detach().unbind(1)):
                    self._keep(name, numbers[rows], column)
        space = next(iter(of.values()))
        like = space.blocks[space.block[numbers[0]]].features
        device = self.device or (images.device if isinstance(images, Tensor) else like.device)
        result = torch.empty(len(images), len(of), *like.shape[1:], dtype=like.dtype, device=device)
        for i, space in enumerate(of.values()):
            space.gather(numbers, result[:, i])
        return result

    # ------------------------------------------------------------------ what is known

    def _numbers(self, images: Tensor | Selection) -> np.ndarray:
        """A number for each image, the same for the same pixels."""
        if not isinstance(images, Tensor):
            return self._known(images.digests())
        shape = hashlib.sha256(f"{tuple(images.shape[1:])} {images.dtype}".encode()).digest()
        return self._known(row_digests(images) + int.from_bytes(shape[:7], "little"))

    def _known(self, digests: Tensor) -> np.ndarray:
        """The number of each image by its digest `[n, 2]`, a new one for a new image."""
        known, keys = self._images, digests.cpu().numpy().view("V16").ravel().tolist()
        numbers = np.array([known.setdefault(digest, len(known)) for digest in keys])
        for space in self._spaces.values():
            space.grow(len(known))
        return numbers

    def _space(self, name: str, known: str) -> _Space:
        """The space of adapter `name`; what is kept of the space that the name stood for before goes."""
        before = self._names.get(name)
        self._names[name] = known
        if before not in (None, known) and before not in self._names.values():
            for block in self._spaces.pop(before).blocks:
                if block.path is not None:
                    block.path.unlink(missing_ok=True)
        space = self._spaces.setdefault(known, _Space())
        space.grow(len(self._images))
        stale = 0
        for of, path in self._files.pop(name, []):
            if of == known:
                self._load(space, path)
            else:
                path.unlink(missing_ok=True)
                stale += 1
        if stale:
            self._say(f"feature cache: what {self._folder} holds of {name} is of another model, it is computed anew")
        return space

    # ------------------------------------------------------------------ where it is kept

    def _keep(self, name: str, numbers: np.ndarray, features: Tensor) -> None:
        known, host = self._names[name], torch.device("cpu")
        places = () if self._folder else dict.fromkeys((features.device, host))
        place = next((device for device in places if self._fits(features, device)), None)
        block = _Block(features.to(place, copy=True)) if place else self._write(name, known, numbers, features)
        self._spaces[known].add(numbers, block)

    def _fits(self, features: Tensor, device: torch.device) -> bool:
        kept = [block for space in self._spaces.values() for block in space.blocks if block.path is None]
        size = features.nbytes + sum(block.features.nbytes for block in kept if block.features.device == device)
        given = self.host_memory if device.type == "cpu" else self.device_memory
        return size <= (SHARE * free_memory(device) if given is None else given)

    def _write(self, name: str, known: str, numbers: np.ndarray, features: Tensor) -> _Block:
        folder = self._folder
        if folder is None:
            self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="plora-features-")
            folder = Path(self._temporary.name)
        digests = list(self._images)
        images = np.frombuffer(b"".join(digests[i] for i in numbers), dtype=np.int64).reshape(-1, 2)
        tensors = {"features": features.to("cpu").contiguous(), "images": torch.from_numpy(images.copy())}
        metadata = {"name": name, "space": known, "content": fingerprint(*tensors.values())}
        path = folder / f"features-{known[:16]}-{fingerprint(tensors['images'])[:16]}.safetensors"
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, part, metadata=metadata)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        with safe_open(path, "pt") as file:
            return _Block(file.get_tensor("features"), path)

    def _look_around(self, folder: Path) -> None:
        """Takes down what files there are; those that cannot be read go."""
        for path in sorted(folder.iterdir()):
            if _FILE.fullmatch(path.name):
                try:
                    with safe_open(path, "pt") as file:
                        metadata = file.metadata()
                    self._files.setdefault(metadata["name"], []).append((metadata["space"], path))
                except FileNotFoundError:  # another process has removed it
                    continue
                except (SafetensorError, KeyError, TypeError) as error:
                    self._refuse(path, error)

    def _load(self, space: _Space, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in ("features", "images")}
                if file.metadata()["content"] != fingerprint(*tensors.values()):
                    raise ValueError("its content has changed")
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            self._refuse(path, error)
            return
        space.add(self._known(tensors["images"]), _Block(tensors["features"], path))

    def _refuse(self, path: Path, error: Exception) -> None:
        path.unlink(missing_ok=True)
        self._say(f"feature cache: {path} is damaged ({str(error).splitlines()[0]}), it is computed anew")


@dataclass
class _Block:
    """Features `[m, ...]` that were computed together; with the file that they are mapped from."""

    features: Tensor
    path: Path | None = None


@dataclass
class _Space:
    """The features of one adapter: those of image i are row `row[i]` of block `block[i]`, -1 where there are none."""

    blocks: list[_Block] = field(default_factory=list)
    block: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    row: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def grow(self, number: int) -> None:
        more = max(number - len(self.block), 0)
        if more:
            self.block, self.row = np.pad(self.block, (0, more), constant_values=-1), np.pad(self.row, (0, more))

    def add(self, numbers: np.ndarray, block: _Block) -> None:
        self.block[numbers], self.row[numbers] = len(self.blocks), np.arange(len(numbers))
        self.blocks.append(block)

    def gather(self, numbers: np.ndarray, out: Tensor) -> None:
        block, row = self.block[numbers], self.row[numbers]
        for i in np.unique(block):
            here, features = np.flatnonzero(block == i), self.blocks[i].features
            rows = features[torch.from_numpy(row[here]).to(features.device)].to(out.device)
            out[torch.from_numpy(here).to(out.device)] = rows
