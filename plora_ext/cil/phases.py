"""What the phases of a run take: seconds and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class Phases:
    """Seconds and peak memory of each phase of a run.

    Memory is the device's allocation peak on CUDA and the resident set of the process elsewhere (where the system can
    reset its high-water mark, Linux, the peak is the phase's own; otherwise it is the process's so far).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_mb: dict[str, float] = {}
        self._lap: dict[str, dict[str, float]] = {"seconds": {}, "peak_mb": {}}

    def lap(self) -> dict[str, dict[str, float]]:
        """`seconds` and `peak_mb` of each phase since the last call."""
        lap, self._lap = self._lap, {"seconds": {}, "peak_mb": {}}
        return lap

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else _resident_peak_mb()
        for sums, peaks in ((self.seconds, self.peak_mb), (self._lap["seconds"], self._lap["peak_mb"])):
            sums[name] = sums.get(name, 0.0) + seconds
            peaks[name] = max(peaks.get(name, 0.0), peak)


def _resident_peak_mb() -> float:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
