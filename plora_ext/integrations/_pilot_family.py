"""Codebases with PILOT's skeleton and LoRA layers of their own: InfLoRA, SD-LoRA and CL-LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext import ops
from plora_ext.integrations._layers import constant


def _ones(x: Tensor, n: int) -> Tensor:
    return constant((1.0,) * n, torch.promote_types(x.dtype, torch.float32), x.device)


def make_inflora(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """InfLoRA's attention (liangyanshuo/InfLoRA, `models/vit_inflora.py`).

    It forms T dense products B_t A_t for k and for v in every forward and adds them; here k and v are one `lora_sum`
    each, attention is torch's fused one, and the Gram matrix of the input is one product instead of one per image.
    """

    def forward(
        self: Any, x: Tensor, task: int, register_hook: bool = False, get_feat: bool = False, get_cur_feat: bool = False
    ) -> Tensor:
        if register_hook or (self.training and self.attn_drop.p > 0):
            return original(self, x, task, register_hook, get_feat, get_cur_feat)
        for asked, prefix in ((get_feat, ""), (get_cur_feat, "cur_")):
            if asked:
                rows, seen = x.detach().flatten(0, 1), getattr(self, f"n_{prefix}matrix")
                total = getattr(self, f"{prefix}matrix") * seen + (rows.T @ rows).cpu()
                setattr(self, f"{prefix}matrix", total / (seen + len(rows)))
                setattr(self, f"n_{prefix}matrix", seen + len(rows))
        C, heads = x.shape[-1], self.num_heads
        q, k, v = self.qkv(x).split(C, dim=-1)
        if task > -0.5:
            count = int(task) + 1
            k = k + _sum_of(x, self.lora_A_k[:count], self.lora_B_k[:count])
            v = v + _sum_of(x, self.lora_A_v[:count], self.lora_B_v[:count])
        q, k, v = (t.unflatten(-1, (heads, C // heads)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        result: Tensor = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return result

    return forward


def _sum_of(x: Tensor, downs: Any, ups: Any) -> Tensor:
    lora_A, lora_B = (torch.stack([layer.weight for layer in layers]) for layers in (downs, ups))
    asks = [i for i, pair in enumerate(zip(downs, ups)) if any(layer.weight.requires_grad for layer in pair)]
    return ops.lora_sum(x, lora_A, lora_B, _ones(x, len(downs)), trainable=asks)


def make_sd_lora(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """SD-LoRA's qkv (WuYichen-97/SD-Lora-CL, `backbone/lora.py:_LoRA_qkv_timm_train`).

    qkv(x) with c_t B_t A_t x + sum_{i < t} c_i B_i A_i x / (|B_i| |A_i|) added to the q and to the v rows. In every
    forward it makes four new layers on the CPU and loops over the tasks; here q and v are one `lora_sum` each, with
    gradients to the newest factors and to all c.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dim() != 3:
            return original(self, x)
        qkv: Tensor = self.qkv(x)
        d = self.dim
        for slot, (rows, down, up) in enumerate(
            ((slice(0, d), self.linear_a_q, self.linear_b_q), (slice(-d, None), self.linear_a_v, self.linear_b_v))
        ):
            old = [
                (list(self.saved_A[f"saved_A_{i}"])[2 * self.t_layer_i + slot].weight.detach().to(x.device),
                 list(self.saved_B[f"saved_B_{i}"])[2 * self.t_layer_i + slot].weight.detach().to(x.device))
                for i in range(self.task_id)
            ]  # fmt: skip
            coeff = [
                self.scaling_factor_prev[i].param.flatten() / (A.norm() * B.norm()) for i, (A, B) in enumerate(old)
            ]
            y = ops.lora_sum(
                x,
                torch.stack([*(A for A, _ in old), down.weight]),
                torch.stack([*(B for _, B in old), up.weight]),
                _ones(x, len(old) + 1),
                coeff=torch.cat([*coeff, self.scaling_factor[0].param.flatten()]),
                trainable=[len(old)],
            )
            qkv[..., rows] += y
        return qkv

    return forward


def make_cl_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """CL-LoRA's test forward (JiangpengHe/CL-LoRA, `backbone/vit_cllora.py:VisionTransformer.forward_test`).

    The blocks before the first task-specific one are the same for every task; they run once instead of T times.
    """

    def forward_test(self: Any, x: Tensor, use_init_ptm: bool = False) -> list[Tensor]:
        if self.training or not self.config.ffn_adapt:
            features: list[Tensor] = original(self, x, use_init_ptm)
            return features
        x = self.patch_embed(x)
        x = self.pos_drop(torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed)
        features = [self.norm(self.blocks(x))] if use_init_ptm else []
        depth = len(self.blocks)
        shared = next((j for j in range(depth) if j in self.adapt_pos and j not in self.general_pos), depth)
        for j in range(shared):
            x = self.blocks[j](x, self.cur_adapter[self.adapt_pos.index(j)] if j in self.adapt_pos else None)
        for task in range(len(self.adapter_list) + 1):
            y = x
            for j in range(shared, depth):
                y = self.blocks[j](y, *_of_block(self, task, j))
            features.append(self.norm(y))
        return features

    return forward_test


def _of_block(vit: Any, task: int, j: int) -> tuple[Any, ...]:
    """Adapter, two unused prompts and block weight of block j for a task, the newest being the last."""
    if j not in vit.adapt_pos:
        return None, None, None, None
    newest = task == len(vit.adapter_list)
    specific = j in vit.specfic_pos
    if newest or j in vit.general_pos:
        adapter = vit.cur_adapter[vit.adapt_pos.index(j)]
    else:
        adapter = vit.adapter_list[task][vit.specfic_pos.index(j)]
    if not (vit.use_block_weight and specific):
        return adapter, None, None, None
    weights = vit.block_weight if newest else vit.block_weight_list[task]
    return adapter, None, None, weights[:, vit.specfic_pos.index(j)]
