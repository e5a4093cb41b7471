"""`gaussian`: a quadratic discriminant, each class with its own covariance.

log p(x | c) = -1/2 (x - p_c)' K_c^-1 (x - p_c) - 1/2 log det K_c + const, with the class's own covariance S_c drawn
towards the mean covariance S of all classes and a small multiple of the identity:

    K_c = (1 - a) S_c + a S + e mean(diag S) I

Regularised discriminant analysis (Friedman, JASA 1989); in class-incremental learning the use of class covariances
is FeCAM's (NeurIPS 2023). Here means and covariances follow the drift of the fused model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plora_ext.cil.heads.base import CovarianceHead
from plora_ext.cil.registry import register_head

_RIDGE = 0.03  # e; between 0.003 and 0.1 it hardly matters on the embedded benchmark


@register_head("gaussian")
class Gaussian(CovarianceHead):
    """See above; `shrinkage` is a.

    Attributes:
        whitening: float32 [C, D, D], inverse Cholesky factors of K_c.
        offsets: float32 [C], -1/2 log det K_c.
    """

    def learn(self, prototypes: Tensor, before: Tensor | None, after: Tensor, labels: Tensor) -> None:
        self.take_in(after, labels)
        self._factorise()

    def _factorise(self) -> None:
        a, size = self.settings.shrinkage, self.covariances.shape[1]
        identity = torch.eye(size, device=self.device, dtype=torch.float64)
        mean = self.covariances.double().mean(0)
        common = a * mean + _RIDGE * mean.diag().mean().clamp_min(1e-12) * identity
        whitening, offsets = [], []
        for own in self.covariances:
            factor = torch.linalg.cholesky((1 - a) * own.double() + common)
            whitening.append(torch.linalg.solve_triangular(factor, identity, upper=False).float())
            offsets.append(-factor.diag().log().sum().float())
        self.whitening, self.offsets = torch.stack(whitening), torch.stack(offsets)

    def __call__(self, features: Tensor, prototypes: Tensor) -> Tensor:
        centred = zip(prototypes.float(), self.whitening)
        distances = [((features.float() - mean) @ whiten.T).square().sum(1) for mean, whiten in centred]
        return self.offsets - torch.stack(distances, 1) / 2

    def state(self) -> dict[str, Any]:
        derived = ("whitening", "offsets")
        return {name: value for name, value in super().state().items() if name not in derived}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._factorise()
