"""Mammoth's LoRA layer (aimagelab/mammoth): x W^T + b + sum_t B_t A_t x, or sum_t B_t x."""

import torch
from torch import nn


class LoRALinear(nn.Linear):
    fan_in_fan_out = False

    def forward(self, x, AB=None):
        y = nn.functional.linear(x, self.weight, self.bias)
        if AB is None:
            return y
        if isinstance(AB, dict):
            assert "B" in AB, "there must be a 'B' key"
            A, B = AB.get("A"), AB["B"]
        else:
            A, B = None, AB
        columns = x.transpose(1, 2).unsqueeze(1)  # [batch, 1, in, tokens]
        return y + torch.matmul(B, columns if A is None else torch.matmul(A, columns)).sum(1).transpose(1, 2)
