"""EASE's own way, restated from LAMDA-PILOT: its test pass, its completion of prototypes and its head."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EASE = "EASE's pass as in LAMDA-PILOT"


class EasePass(nn.Module):
    """The test pass of EASE as LAMDA-PILOT has it (`backbone/vit_ease.py: forward_test`), on the weights of a timm ViT,
    which it takes over, with T random adapters.

    Patches once; then for each adapter a copy of them through all blocks. q, k and v are three products, the attention
    matrix is made, softmaxed and multiplied; each block's adapter, W_u relu(W_d x + b_d) + b_u times 0.1, r = 64,
    stands beside the MLP and reads its input before the norm.
    """

    def __init__(self, vit: Any, T: int, r: int = 64) -> None:
        super().__init__()
        self.vit = vit
        self.qkv: Any = nn.ModuleList()
        weight, dim = vit.pos_embed, vit.embed_dim
        for block in vit.blocks:
            parts: Any = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3)).to(weight)
            for part, rows, bias in zip(parts, block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)):
                part.weight.data.copy_(rows)
                part.bias.data.copy_(bias)
            self.qkv.append(parts)
        self.adapters: Any = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(dim, r), nn.ReLU(), nn.Linear(r, dim)) for _ in vit.blocks)
            for _ in range(T)
        ).to(weight)

    def forward(self, images: Tensor, T: int | None = None) -> Tensor:
        """[T, B, D] of images [B, 3, H, W] under the first T adapters, by default all."""
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(images))
        features = []
        for adapters in self.adapters[:T]:
            y = copy.deepcopy(x)
            for block, qkv, adapter in zip(vit.blocks, self.qkv, adapters):
                y = y + self._attention(block.attn, qkv, block.norm1(y))
                adapted = 0.1 * adapter(y)
                y = y + (block.mlp(block.norm2(y)) + adapted)
            features.append(vit.norm(y))
        return torch.stack([f[:, 0] for f in features])

    @staticmethod
    def _attention(attn: Any, qkv: Any, x: Tensor) -> Tensor:
        B, N, C = x.shape
        heads = attn.num_heads
        q, k, v = (p(x).view(B, N, heads, C // heads).transpose(1, 2).contiguous().flatten(0, 1) for p in qkv)
        weights = torch.bmm(q * (C // heads) ** -0.5, k.transpose(1, 2)).softmax(-1)
        y = torch.bmm(weights, v).view(B, heads, N, C // heads).transpose(1, 2).reshape(B, N, C)
        return attn.proj(y)


def rivals(vit: Any, T: int) -> dict[str, Any]:
    """The form that `plora_ext.bench.ensemble_cases` lists beside its own: float32 weights, on a GPU under autocast."""
    device = vit.pos_embed.device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    return {EASE: autocast(EasePass(vit, T).eval().forward)}


def complete(prototypes: Tensor, task_of_class: Tensor) -> Tensor:
    """`solve_sim_reset`: on the CPU, a cosine and an addition for each old and new class of each pair of tasks."""
    bank, task = prototypes.cpu(), task_of_class.cpu()
    result, T = bank.clone(), bank.shape[1]
    for i in range(T):
        for j in range(i + 1, T):
            old, new, values = bank[task == i, i], bank[task >= j, i], bank[task >= j, j]
            similarity = torch.zeros(len(old), len(new))
            for a in range(len(old)):
                for b in range(len(new)):
                    similarity[a][b] = torch.cosine_similarity(old[a], new[b], dim=0)
            similarity = torch.softmax(similarity, dim=1)
            filled = torch.zeros_like(old)
            for a in range(len(old)):
                for b in range(len(new)):
                    filled[a] += similarity[a][b] * values[b]
            result[task == i, j] = filled
    return result.to(prototypes.device)


def logits(features: Tensor, prototypes: Tensor, sizes: list[int], alpha: float) -> Tensor:
    """`forward_reweight`: for the `sizes` classes of each task, each subspace is normalised and multiplied anew."""
    blocks, T, D = [], *prototypes.shape[1:]
    x = features.flatten(1).split(D, 1)
    for i, weight in enumerate(prototypes.flatten(1).split(sizes)):
        total: Any = None
        for j, w in enumerate(weight.split(D, 1)):
            cosine = F.linear(F.normalize(x[j], p=2, dim=1), F.normalize(w, p=2, dim=1))
            part = cosine if i == j else alpha * cosine / (T - 1)
            total = part if total is None else total + part
        blocks.append(total)
    return torch.cat(blocks, dim=1)
