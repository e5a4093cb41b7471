"""ACMap's network: the adapters' running mean, and prototypes moved as the mean of the new ones moves."""

import copy

import numpy as np
import torch
from hosts.pilot.backbone.linears import CosineLinear
from torch import nn


def vit_base_patch16_224_in21k(config):
    raise NotImplementedError("a test puts its own in the place")


class ACMapNet(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.c, self.config, self.device = context, context.config, context.config.device
        self.use_init_ptm, self.out_dim = self.config.exp.use_init_ptm, self.config.transformer.embed_dim
        self.backbone = vit_base_patch16_224_in21k(self.config)
        self.fc, self.merged_adapter_list, self.protos_list_source = None, [], []

    def update_proxy_fc(self):
        self.proxy_fc = CosineLinear(self.out_dim, self.c.cur_task_size)

    def update_fc(self):
        fc = CosineLinear(self.out_dim * (1 + self.use_init_ptm), self.c.total_classes)
        nn.init.zeros_(fc.weight)
        if self.fc is not None:
            fc.weight.data[: len(self.fc.weight)] = self.fc.weight.data
        self.fc = fc

    def merge_adapters(self):
        merged, seen = copy.deepcopy(self.backbone.cur_adapter).requires_grad_(False), len(self.merged_adapter_list)
        if seen:
            for mean, before in zip(merged.parameters(), self.merged_adapter_list[-1].parameters()):
                mean.data = (before * seen + mean) / (seen + 1)
        self.merged_adapter_list.append(merged)

    def replace_fc(self, dataset, data_loader):
        *earlier, newest = self.merged_adapter_list
        new, weight, d = self.extract_prototype(dataset, data_loader, newest), self.fc.weight.data, self.out_dim
        if self.config.our.use_centroid_map and 0 < len(earlier) < self.config.our.limit_centroid_map - 1:
            under = [self.extract_prototype(dataset, data_loader, adapter) for adapter in earlier]
            moved = [old + new.mean(0) - then.mean(0) for old, then in zip(self.protos_list_source, under)]
            weight[: -len(new), :d] = torch.cat(moved)
        weight[-len(new) :, :d] = new
        self.protos_list_source.append(new)
        if self.use_init_ptm:
            weight[-len(new) :, d:] = self.extract_prototype(dataset, data_loader, None)

    @torch.no_grad()
    def extract_prototype(self, dataset, data_loader, adapter):
        pairs = [(self.backbone.forward_proto(images, adapter), labels) for _, images, labels in data_loader]
        features, labels = (torch.cat(part) for part in zip(*pairs))
        return torch.stack([features[labels == int(c)].mean(0) for c in np.unique(dataset.labels)])

    def forward(self, x, test=False):
        if not test:
            return self.proxy_fc(self.backbone.forward_train(x))
        adapters = [self.merged_adapter_list[-1], *([None] if self.use_init_ptm else [])]
        return self.fc(self.backbone.forward_test(x, adapters))
