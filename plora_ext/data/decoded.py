"""Image files decoded once: their pixels are kept in memory that all data workers share."""

from __future__ import annotations

import mmap
import multiprocessing

import numpy as np

from .images import ImageFiles


class Decoded:
    """Image files as a sequence of uint8 arrays [H, W, 3], each decoded when it is asked for the first time.

    Made before data workers are forked, it is theirs and this process's in common: what one has decoded, all find.
    Images beyond `limit` bytes are decoded every time. Memory is taken as images come.
    """

    def __init__(self, files: ImageFiles, limit: int):
        self.files, self.limit = files, limit
        self._places = np.frombuffer(mmap.mmap(-1, 24 * max(len(files), 1)), np.int64).reshape(-1, 3)  # end, H, W
        self._used = np.frombuffer(mmap.mmap(-1, 8), np.int64)
        self._pixels = np.frombuffer(mmap.mmap(-1, max(limit, 1)), np.uint8)
        self._lock = multiprocessing.get_context("fork").Lock()

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises what `ImageFiles` does."""
        end, height, width = self._places[index].tolist()
        if end:
            return self._pixels[end - 3 * height * width : end].reshape(height, width, 3)
        image = self.files[index]
        with self._lock:
            end = int(self._used[0]) + image.size
            if end > self.limit:
                return image
            self._used[0] = end
        self._pixels[end - image.size : end] = image.ravel()
        self._places[index, 1:] = image.shape[:2]
        with self._lock:
            pass
        with self._lock:  # taken behind a release: who sees the end finds the pixels, also on ARM
            self._places[index, 0] = end
        return image

    def hold(self, rows: list[int]) -> bool:
        """Whether the images of `rows` are all decoded."""
        return bool(self._places[rows, 0].all())
