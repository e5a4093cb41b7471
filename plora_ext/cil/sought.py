"""Images of the new task moved to where the old model sees old classes: they tell how features drift there.

For an old class c with prototype p_c, under the model before the task (F its features):

    z = p_c + W e, e ~ N(0, I)       W W' = mean covariance of the new classes around their means, in the old space
    x_0                              one of the NEAREST images of the task whose F has the largest cosines to p_c
    x_k+1 = x_k - STEP sqrt(m) g / |g|,  g = d/dx |F(x_k) - z|^2     STEPS times; m values an image, in units of their
                                                                     normalisation: a step changes them by STEP (RMS)

The pairs of features (before, after) of the last x join those of the task's images when old prototypes are aligned
(alignment: local). It is adversarial drift compensation (Goswami et al., CVPR 2024) with draws as targets in place of
the prototype, so that a linear map can be fitted around every class; neither old images nor covariances are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext.cil.covariances import covariance

NEAREST, STEPS, STEP = 100, 5, 0.1
SAMPLE, ROWS = 256, 128  # images kept of a stream; moved at once
_HERE: Any = {"device": "cpu", "dtype": torch.float32}  # whatever the caller's defaults are


class Sample:
    """Up to SAMPLE rows of a stream, any of them as likely as any other."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.keys = torch.empty(0, **_HERE)
        self.rows: tuple[Tensor, ...] = ()

    def add(self, *rows: Tensor) -> None:
        """Takes in rows, tensors of one length."""
        keys = torch.cat([self.keys, torch.rand(len(rows[0]), generator=self.generator, **_HERE)])
        kept = keys.topk(min(SAMPLE, len(keys))).indices
        both = [torch.cat(pair) for pair in zip(self.rows, rows)] or rows
        self.keys, self.rows = keys[kept], tuple(part[kept.to(part.device)] for part in both)


def targets(prototypes: Tensor, features: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """What to start from and what to seek, `number` times for each old class; the same numbers for the same sizes.

    Args:
        prototypes: [C, D], of old classes.
        features: [n, D], of the task's images in the space of the prototypes.
        labels: int64 [n], the task's classes counted from 0.

    Returns:
        Images to start from, int64 [C number] in 0 ... n - 1 on the CPU, and features z, float32 [C number, D].

    Raises:
        ValueError: A feature is not finite.
    """
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, got one that is not: did the model before the task diverge?")
    generator = torch.Generator().manual_seed(len(prototypes))  # its own: training is the same without it
    (C, D), n = prototypes.shape, len(features)
    within = torch.stack([covariance(features[labels == c]) for c in labels.unique().tolist()]).double().mean(0)
    within.diagonal().add_((1e-4 * within.diagonal().mean()).clamp_min(1e-12))
    factor = torch.linalg.cholesky(within).float()
    nearest = (F.normalize(prototypes.float()) @ F.normalize(features.float()).T).topk(min(NEAREST, n)).indices.cpu()
    starts = nearest.gather(1, torch.randint(nearest.shape[1], (C, number), generator=generator, device="cpu"))
    noise = torch.randn(C, number, D, generator=generator, **_HERE).to(factor.device)
    return starts.flatten(), (prototypes.float()[:, None] + noise @ factor.T).flatten(0, 1)


def move(images: Tensor, wanted: Tensor, model: Callable[[Tensor], Tensor]) -> Tensor:
    """Images [B, ...] moved until `model` gives them features near `wanted` [B, D]; the model stays as it is.

    Raises:
        ValueError: It gives the images no gradient.
    """
    step = STEP * images[0].numel() ** 0.5
    with torch.enable_grad():
        for _ in range(STEPS):
            images = images.detach().requires_grad_(images.is_floating_point())
            loss = (model(images).float() - wanted).square().sum()
            (gradient,) = torch.autograd.grad(loss, images, allow_unused=True) if loss.requires_grad else (None,)
            if gradient is None:
                raise ValueError("the backbone must give its images a gradient, or else sought be 0")
            norm = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
            images = images - step * gradient / norm.view(-1, *[1] * (images.dim() - 1))
    return images.detach()
