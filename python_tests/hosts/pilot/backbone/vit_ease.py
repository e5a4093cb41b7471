"""EASE's ViT: AdaptFormer adapters beside the MLPs, a list of them for every old task and one that trains."""

import copy

import torch
import torch.nn.functional as F
from torch import nn


class Adapter(nn.Module):
    def __init__(self, config, dropout=0.1):
        super().__init__()
        self.scale, self.dropout = float(config.ffn_adapter_scalar), dropout
        self.down_proj, self.up_proj = (
            nn.Linear(config.d_model, config.ffn_num), nn.Linear(config.ffn_num, config.d_model)
        )  # fmt: skip
        for parameter in (self.down_proj.bias, *self.up_proj.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x):
        return self.scale * self.up_proj(F.dropout(torch.relu(self.down_proj(x)), self.dropout, self.training))


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = self.attn_drop((self.scale * q @ k.mT).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, norm_layer):
        super().__init__()
        self.norm1, self.norm2, self.attn = norm_layer(dim), norm_layer(dim), Attention(dim, num_heads)
        self.fc1, self.act = nn.Linear(dim, int(dim * mlp_ratio)), nn.GELU()
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        self.mlp_drop, self.drop_path = nn.Dropout(0.0), nn.Identity()

    def forward(self, x, adapt=None):
        x = x + self.attn(self.norm1(x))
        y = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return y if adapt is None else y + adapt(x)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(
        self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, norm_layer, num_classes, tuning_config
    ):
        super().__init__()
        self.config, self.global_pool = tuning_config, False
        self.patch_embed, self.pos_drop = PatchEmbed(patch_size, embed_dim), nn.Dropout(0.0)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (img_size // patch_size) ** 2 + 1, embed_dim))
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, mlp_ratio, norm_layer) for _ in range(depth)))
        self.norm = norm_layer(embed_dim)
        self.adapter_list = []
        self.get_new_adapter()

    def get_new_adapter(self):
        self.cur_adapter = nn.ModuleList(Adapter(self.config) for _ in self.blocks)

    def add_adapter_to_list(self):
        self.adapter_list.append(copy.deepcopy(self.cur_adapter.requires_grad_(False)))
        self.get_new_adapter()

    def _tokens(self, x, adapters):
        x = self.patch_embed(x)
        x = self.pos_drop(torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed)
        for i, block in enumerate(self.blocks):
            x = block(x, None if adapters is None else adapters[i])
        return self.norm(x)

    def forward_test(self, x, use_init_ptm=False):
        subspaces = [*([None] if use_init_ptm else []), *self.adapter_list, self.cur_adapter]
        return [self._tokens(x, adapters) for adapters in subspaces]

    def forward(self, x, test=False, use_init_ptm=False):
        if not test:
            return self._tokens(x, self.cur_adapter)[:, 0]
        return torch.cat([tokens[:, 0] for tokens in self.forward_test(x, use_init_ptm)], 1)

    def forward_proto(self, x, adapt_index):
        every = [*self.adapter_list, self.cur_adapter]
        return self._tokens(x, None if adapt_index == -1 else every[adapt_index])[:, 0]
