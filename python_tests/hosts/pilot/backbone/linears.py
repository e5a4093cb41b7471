"""The classifiers: cosines, and for EASE their sum over the subspaces with weights."""

import torch
import torch.nn.functional as F
from torch import nn


class CosineLinear(nn.Module):
    def __init__(self, in_features, out_features, nb_proxy=1, to_reduce=False, sigma=True):
        super().__init__()
        self.in_features, self.out_features, self.nb_proxy, self.to_reduce = (
            in_features,
            out_features,
            nb_proxy,
            to_reduce,
        )
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-1, 1) / in_features**0.5)
        self.sigma = nn.Parameter(torch.ones(1))

    def forward(self, input):
        return {"logits": self.sigma * F.linear(F.normalize(input), F.normalize(self.weight))}


class EaseCosineLinear(CosineLinear):
    def forward_reweight(
        self, input, cur_task, alpha=0.1, beta=0.0, init_cls=10, inc=10, out_dim=768, use_init_ptm=False
    ):
        """A class counts 1 in the subspace of its task, alpha / cur_task in others, beta in the frozen model."""
        logits = []
        for task in range(cur_task + 1):
            start = init_cls + (task - 1) * inc if task else 0
            rows = self.weight[start : init_cls + task * inc]
            total = 0
            for j, (x, w) in enumerate(zip(input.split(out_dim, 1), rows.split(out_dim, 1), strict=True)):
                cosine = F.linear(F.normalize(x), F.normalize(w))
                own = j - use_init_ptm
                total = total + cosine * (beta if own < 0 else 1 if own == task else alpha / cur_task)
            logits.append(total)
        return {"logits": self.sigma * torch.cat(logits, 1)}
