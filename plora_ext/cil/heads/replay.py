"""`replay`: classifier alignment, a linear classifier trained on samples of every class's Gaussian (SLCA, ICCV 2023).

After each task all classes seen so far give features drawn from N(p_c, S_c), equally many, and a linear layer is
trained from zero on them by cross-entropy. Covariances of low rank, S_c = F_c F_c' + E, are drawn from as
p_c + F_c e + chol(E) e'. Here p_c and S_c follow the drift of the fused model; features are standardised by the mean
and the total variance of the Gaussians.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext.cil.heads.base import CovarianceHead
from plora_ext.cil.registry import register_head

_SAMPLES, _BATCH, _LR, _DECAY = 64, 256, 1e-2, 5e-4  # a class and epoch; a step; AdamW's


@register_head("replay")
class Replay(CovarianceHead):
    """See above; `replay_epochs` draws of all classes.

    Attributes:
        weight, bias: float32 [C, D] and [C], for features as they are.
    """

    def learn(self, prototypes: Tensor, before: Tensor | None, after: Tensor, labels: Tensor) -> None:
        self.take_in(after, labels)
        means, number = prototypes.float(), len(prototypes)
        shared, axes = self.covariances.mean().diag().float(), self.covariances.rows
        floor = 1e-3 * shared.mean().clamp_min(1e-12) * torch.eye(means.shape[1], device=means.device)
        # One factor for all classes where their covariances are of low rank: no copy of it for each.
        factors = torch.linalg.cholesky(self.covariances.base.double() + floor).float().squeeze(0)
        centre, spread = means.mean(0), (shared + means.var(0, correction=0)).sqrt().clamp_min(1e-6)

        weight = torch.zeros_like(means, requires_grad=True)
        bias = torch.zeros(number, device=means.device, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, bias], _LR, weight_decay=_DECAY)
        labels = torch.arange(number).repeat_interleave(_SAMPLES).to(means.device)
        generator = torch.Generator().manual_seed(self.settings.seed)  # its own: training is the same under any head
        epochs, steps = self.settings.replay_epochs, math.ceil(len(labels) / _BATCH)
        for epoch in range(epochs):
            noise = torch.randn(number, _SAMPLES, means.shape[1], generator=generator).to(means.device)
            own = torch.randn(number, _SAMPLES, axes.shape[1], generator=generator).to(means.device)
            drawn = (means[:, None] + noise @ factors.mT + own @ axes).flatten(0, 1)
            for step, rows in enumerate(torch.randperm(len(drawn), generator=generator).to(means.device).split(_BATCH)):
                optimizer.param_groups[0]["lr"] = _LR * (1 + math.cos(math.pi * (epoch + step / steps) / epochs)) / 2
                logits = F.linear((drawn[rows] - centre) / spread, weight, bias)
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[rows]).backward()
                optimizer.step()
        self.weight = weight.detach() / spread
        self.bias = bias.detach() - self.weight @ centre

    def __call__(self, features: Tensor, prototypes: Tensor) -> Tensor:
        return F.linear(features.float(), self.weight, self.bias)
