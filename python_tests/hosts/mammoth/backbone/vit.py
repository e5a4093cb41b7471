"""A ViT whose linear layers take the factors of their block by name: AB[block][layer]."""

import torch
from backbone.utils.lora_utils import LoRALinear
from torch import nn


class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = LoRALinear(dim, 3 * dim), LoRALinear(dim, dim)
        self.fc1, self.fc2 = LoRALinear(dim, 4 * dim), LoRALinear(4 * dim, dim)

    def forward(self, x, AB):
        def run(name, t):
            return getattr(self, name)(t, None if AB is None else AB.get(name))

        heads = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in run("qkv", self.norm1(x)).chunk(3, -1))
        x = x + run("proj", nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + run("fc2", nn.functional.gelu(run("fc1", self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, num_classes, use_lora):
        super().__init__()
        self.embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.position = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x, AB=None):
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for i, block in enumerate(self.blocks):
            x = block(x, None if AB is None else AB[i])
        return self.head(x.mean(1))
