"""How much memory there is, and how much something takes."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from plora_ext.torch_private import DispatchMode, tree_leaves

__all__ = ["PeakMemory", "free_memory", "limit_of_pass"]

_SHARE = {"cuda": 1 / 2, "cpu": 1 / 4}  # of the free memory that a pass may take by default
_CPU_LIMIT = 2**30  # on a CPU, larger passes only leave the caches


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: of a GPU with what torch's allocator holds in reserve, else of the host."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file, word in (("/proc/meminfo", "MemAvailable:"), ("/sys/fs/cgroup/memory.max", "")):
        try:
            text = Path(file).read_text()
            if word:  # what the kernel could free at once
                free = 1024 * int(text.split(word)[1].split()[0])
            else:  # a container's limit
                free = min(free, int(text) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
        except (OSError, ValueError, IndexError):
            continue
    return max(free, 0)


def limit_of_pass(device: torch.device) -> int:
    """Bytes that the intermediate results of a pass through a model may take where nobody says how many."""
    limit = int(_SHARE.get(device.type, 1 / 4) * free_memory(device))
    return limit if device.type == "cuda" else min(limit, _CPU_LIMIT)


class PeakMemory(DispatchMode):  # type: ignore[misc, unused-ignore]
    """The most bytes that results of operators took at a time, on any device; `peak` after the `with` block."""

    measures: ClassVar[bool] = tree_leaves is not None
    """Whether torch lets it look; `peak` is 0 otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in given | self._known:
                self._known.add(key)
                self.live += t.untyped_storage().nbytes()
                weakref.finalize(t.untyped_storage(), self._free, key, t.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
