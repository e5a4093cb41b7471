"""ACMap's ViT: AdaptFormer adapters that begin where the first task's ended."""

import copy
from functools import partial

import torch
from hosts.pilot.backbone import vit_ease
from torch import nn


class Attention(vit_ease.Attention):
    def forward(self, x):
        return super().forward(x)


class Block(vit_ease.Block):
    def __init__(self, config):
        super().__init__(config.block.dim, 1, config.block.mlp_ratio, partial(nn.LayerNorm, eps=1e-6))
        self.attn = Attention(config.block.dim, config.attention.num_heads)


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        shape, self.config, self.global_pool = config.transformer, config, config.transformer.global_pool
        self.distilled = shape.distilled
        self.patch_embed = vit_ease.PatchEmbed(shape.patch_size, shape.embed_dim)
        self.pos_drop, self.norm = nn.Dropout(shape.drop_rate), nn.LayerNorm(shape.embed_dim, eps=1e-6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.embed_dim))
        patches = (shape.img_size // shape.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, shape.embed_dim))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(shape.depth)))
        self.init_adapter = nn.ModuleList(self._adapter() for _ in self.blocks).requires_grad_(False)
        self.setup_adapter()

    def _adapter(self):
        own = self.config.adapter
        adapter = vit_ease.Adapter(
            type("Config", (), {"ffn_adapter_scalar": own.scalar, "d_model": own.d_model, "ffn_num": own.down_size}),
            own.dropout,
        )
        return adapter

    def setup_adapter(self):
        self.cur_adapter = copy.deepcopy(self.init_adapter).requires_grad_(True)

    _tokens = vit_ease.VisionTransformer._tokens

    def forward_train(self, x):
        return self._tokens(x, self.cur_adapter)[:, 0]

    def forward_test(self, x, adapter_list):
        return torch.cat([self._tokens(x, adapter)[:, 0] for adapter in adapter_list], 1)

    def forward_proto(self, x, adapter=None):
        return self._tokens(x, adapter)[:, 0]
