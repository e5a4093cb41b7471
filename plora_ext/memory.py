"""How much memory there is."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["free_memory"]


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
