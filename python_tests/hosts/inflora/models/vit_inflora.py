"""InfLoRA's attention (liangyanshuo/InfLoRA): k and v get sum_t B_t A_t x; the mean of x x^T is kept on demand."""

import torch
from torch import nn


class Attention_LoRA(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, r=64, n_tasks=10):
        super().__init__()
        self.num_heads, self.scale = num_heads, qk_scale or (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        for name, (i, o) in {"A_k": (dim, r), "B_k": (r, dim), "A_v": (dim, r), "B_v": (r, dim)}.items():
            setattr(self, f"lora_{name}", nn.ModuleList(nn.Linear(i, o, bias=False) for _ in range(n_tasks)))
        self.matrix, self.n_matrix = torch.zeros(dim, dim), 0
        self.cur_matrix, self.n_cur_matrix = torch.zeros(dim, dim), 0

    def forward(self, x, task, register_hook=False, get_feat=False, get_cur_feat=False):
        gram, n = torch.einsum("bni,bnj->ij", x.detach(), x.detach()), x.shape[0] * x.shape[1]
        if get_feat:
            self.matrix = (self.matrix * self.n_matrix + gram) / (self.n_matrix + n)
            self.n_matrix += n
        if get_cur_feat:
            self.cur_matrix = (self.cur_matrix * self.n_cur_matrix + gram) / (self.n_cur_matrix + n)
            self.n_cur_matrix += n
        q, k, v = self.qkv(x).chunk(3, -1)
        for t in range(task + 1):
            k = k + self.lora_B_k[t](self.lora_A_k[t](x))
            v = v + self.lora_B_v[t](self.lora_A_v[t](x))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = self.attn_drop((self.scale * q @ k.mT).softmax(-1))
        if register_hook:
            self.attention_map = weights
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))
