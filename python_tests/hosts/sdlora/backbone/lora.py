"""SD-LoRA's qkv (WuYichen-97/SD-Lora-CL): q and v get c B A x + sum_i c_i B_i A_i x / (|B_i| |A_i|)."""

import torch
from torch import nn


class ParameterWrapper(nn.Module):
    def __init__(self, param):
        super().__init__()
        self.param = param

    def forward(self, x):
        return x * self.param


class _LoRA_qkv_timm_train(nn.Module):
    def __init__(
        self, qkv, linear_a_q, linear_b_q, linear_a_v, linear_b_v, task_id, saved_A, saved_B, t_layer_i, rank,
        scaling_factor, scaling_factor_prev, eval1=False,
    ):  # fmt: skip
        super().__init__()
        self.qkv, self.dim, self.rank, self.task_id, self.t_layer_i = qkv, qkv.in_features, rank, task_id, t_layer_i
        self.linear_a_q, self.linear_b_q, self.linear_a_v, self.linear_b_v = (
            linear_a_q, linear_b_q, linear_a_v, linear_b_v,
        )  # fmt: skip
        self.saved_A, self.saved_B = saved_A, saved_B
        self.scaling_factor, self.scaling_factor_prev = scaling_factor, scaling_factor_prev

    def forward(self, x):
        changes = []
        for slot, (a, b) in enumerate(((self.linear_a_q, self.linear_b_q), (self.linear_a_v, self.linear_b_v))):
            change = self.scaling_factor[0](b(a(x)))
            for i in range(self.task_id):
                A = self.saved_A[f"saved_A_{i}"][2 * self.t_layer_i + slot].weight.detach()
                B = self.saved_B[f"saved_B_{i}"][2 * self.t_layer_i + slot].weight.detach()
                change = change + self.scaling_factor_prev[i](x @ A.T @ B.T / (A.norm() * B.norm()))
            changes.append(change)
        q, k, v = self.qkv(x).split([self.dim, self.qkv.out_features - 2 * self.dim, self.dim], -1)
        return torch.cat([q + changes[0], k, v + changes[1]], -1)
