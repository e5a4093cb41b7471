"""Whether tensors have changed: by their content, which nothing that writes to memory can hide.

torch counts writes to a tensor (`_version`), but neither those of fused optimizers nor those through `.data` nor those
of a replayed CUDA graph.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "row_digests"]

_WORDS = 4096  # in a row of a long tensor's digest
_SMALL = 2**20  # bytes


def fingerprint(*parts: Tensor | str) -> str:
    """64 hexadecimal digits that stand for the content of tensors and texts: values, shapes, dtypes, order.

    Tensors are read where they are, at about the speed of their memory on a GPU; the host waits once.
    """
    tensors = [part.detach() for part in parts if isinstance(part, Tensor)]
    seal = hashlib.sha256()
    for part in parts:
        text = f"{tuple(part.shape)} {part.dtype}" if isinstance(part, Tensor) else part
        seal.update(f"{isinstance(part, Tensor)} {len(text.encode())} {text}".encode())
    if tensors:
        device = tensors[0].device
        flat = [t.reshape(-1).contiguous().view(torch.uint8) for t in tensors]
        blocks = [t for t in flat if len(t) >= _SMALL]
        if small := [t.to(device) for t in flat if len(t) < _SMALL]:
            blocks.append(torch.cat(small))  # one digest for all: fewer launches
        seal.update(torch.stack([_digest(t).to(device) for t in blocks]).cpu().numpy().tobytes())
    return seal.hexdigest()


def row_digests(rows: Tensor) -> Tensor:
    """Two 64-bit numbers `[n, 2]` for the bits of each row `[n, ...]`, on its device.

    h = sum_i w_i k_i mod 2^64 over the row's 64-bit words w, for two fixed sequences of random odd keys k: a row that
    differs in one word always has another h, and two others that differ have the same with probability about 2^-96.
    """
    flat = rows.detach().reshape(len(rows), math.prod(rows.shape[1:])).contiguous().view(torch.uint8)
    if not flat.shape[1]:
        return torch.zeros(len(rows), 2, dtype=torch.int64, device=rows.device)
    if flat.shape[1] % 8:
        flat = nn.functional.pad(flat, (0, -flat.shape[1] % 8))
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    words = flat.view(torch.int64)
    keys = _keys(words.shape[1], words.device)
    if words.device.type == "cpu":
        sums = [words @ key for key in keys]  # in one pass; CUDA has no such product of integers
    else:
        parts = words.split(max(1, 2**24 // max(words.shape[1], 1)))  # bounds the products' memory to 128 MB
        sums = [torch.cat([(part * key).sum(1) for part in parts]) for key in keys]
    return torch.stack(sums, 1)


@lru_cache(maxsize=8)
def _keys(number: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1993)
    keys = torch.randint(-(2**63), 2**63 - 1, (2, number), generator=generator, device="cpu")
    return (keys | 1).to(device)


def _digest(flat: Tensor) -> Tensor:
    """Two numbers for all bytes `[n]`: digests of rows, then of these, until one is left."""
    while len(flat) > 8 * _WORDS:
        whole = len(flat) - len(flat) % (8 * _WORDS)
        rows = row_digests(flat[:whole].view(-1, 8 * _WORDS))
        flat = torch.cat([rows.view(-1).view(torch.uint8), flat[whole:]])
    return row_digests(flat[None])[0]
