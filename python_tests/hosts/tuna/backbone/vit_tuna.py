"""TUNA's ViT: an adapter per task, and one into which all are merged."""

import copy

import torch
from hosts.pilot.backbone import vit_ease
from torch import nn


class Attention(vit_ease.Attention):
    def forward(self, x):
        return super().forward(x)


class VisionTransformer(vit_ease.VisionTransformer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.embed_dim, self.adapter_list = kwargs["embed_dim"], nn.ModuleList()
        self.out_dim, self.merged_adapter = self.embed_dim, copy.deepcopy(self.cur_adapter)
        for block in self.blocks:
            block.attn = Attention(self.embed_dim, kwargs["num_heads"])
        self.requires_grad_(False)
        self.cur_adapter.requires_grad_(True)

    def adapter_update(self):
        self.adapter_list.append(copy.deepcopy(self.cur_adapter).requires_grad_(False))

    def merge(self):
        self.merged_adapter = copy.deepcopy(self.cur_adapter).requires_grad_(False)
        for name, merged in self.merged_adapter.named_parameters():
            weights = [dict(adapter.named_parameters())[name] for adapter in self.adapter_list]
            sign = torch.where(sum(weights) / len(weights) > 0, 1.0, -1.0)
            largest = torch.zeros_like(merged)
            for weight in weights:  # none of them where no weight has the sign
                largest = torch.where((weight * sign > 0) & (weight.abs() > largest), weight.abs(), largest)
            merged.data = sign * largest

    def forward_features(self, x, adapter_id, train):
        if adapter_id == -1:
            adapter = None
        elif train or adapter_id == len(self.adapter_list):
            adapter = self.cur_adapter
        elif adapter_id < len(self.adapter_list):
            adapter = self.adapter_list[adapter_id]
        else:
            adapter = self.merged_adapter
        features = self._tokens(x, adapter)[:, 0]
        return {"x": features, "pre_logits": features, "features": features}

    def forward(self, x, adapter_id=-1, train=False):
        return self.forward_features(x, adapter_id, train)
