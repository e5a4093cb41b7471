"""CL-LoRA's ViT (JiangpengHe/CL-LoRA): shared adapters in the blocks `general_pos`, one per task in `specfic_pos`."""

import copy

import torch
from torch import nn


class Adapter(nn.Module):
    def __init__(self, dim, r):
        super().__init__()
        self.down, self.up = nn.Linear(dim, r, bias=False), nn.Linear(r, dim, bias=False)

    def forward(self, x):
        return self.up(self.down(x))


class Block(nn.Module):
    def __init__(self, dim, num_heads, norm_layer):
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x, adapt=None, prompt=None, rank_prompt=None, block_weight=None):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        if adapt is not None:
            x = x + adapt(y) * (1 if block_weight is None else block_weight[0])
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, num_classes, tuning_config, norm_layer):
        super().__init__()
        self.config, self.use_block_weight = tuning_config, tuning_config.use_block_weight
        self.general_pos, self.specfic_pos = tuning_config.general_pos, tuning_config.specfic_pos
        self.adapt_pos = sorted([*self.general_pos, *self.specfic_pos])
        self.conv = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2 + 1, embed_dim))
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, norm_layer) for _ in range(depth)))
        self.norm = norm_layer(embed_dim)
        self.cur_adapter = nn.ModuleList(Adapter(embed_dim, tuning_config.ffn_num) for _ in self.adapt_pos)
        self.adapter_list, self.block_weight_list = [], []
        self.block_weight = nn.Parameter(torch.randn(3, len(self.specfic_pos)))

    def patch_embed(self, x):
        return self.conv(x).flatten(2).transpose(1, 2)

    def add_adapter_to_list(self):
        specific = [self.cur_adapter[self.adapt_pos.index(j)] for j in self.specfic_pos]
        self.adapter_list.append(copy.deepcopy(nn.ModuleList(specific)))
        self.block_weight_list.append(self.block_weight.detach().clone())
        nn.init.normal_(self.block_weight)

    def forward_test(self, x, use_init_ptm=False):
        x = self.patch_embed(x)
        start = self.pos_drop(torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed)
        features = [self.norm(self.blocks(start))] if use_init_ptm else []
        for adapters, weights in zip([*self.adapter_list, None], [*self.block_weight_list, self.block_weight]):
            x = start
            for j, block in enumerate(self.blocks):
                own = j in self.specfic_pos
                shared = self.cur_adapter[self.adapt_pos.index(j)] if j in self.adapt_pos else None
                adapter = adapters[self.specfic_pos.index(j)] if own and adapters is not None else shared
                weight = weights[:, self.specfic_pos.index(j)] if own and self.use_block_weight else None
                x = block(x, adapter, None, None, weight)
            features.append(self.norm(x))
        return features
