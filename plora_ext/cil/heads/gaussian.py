"""`gaussian`: a quadratic discriminant, each class with its own covariance.

log p(x | c) = -1/2 (x - p_c)' K_c^-1 (x - p_c) - 1/2 log det K_c + const, with the class's own covariance S_c drawn
towards the mean covariance S of all classes and a small multiple of the identity:

    K_c = (1 - a) S_c + a S + e mean(diag S) I

With covariances of low rank, S_c = F_c F_c' + E, this is one matrix for all classes and F_c: K_c = K + (1 - a) F_c F_c'
with K = (1 - a) E + a S + e mean(diag S) I. With K^-1 = W' W and d = x - p_c (Woodbury's identity)

    d' K_c^-1 d = |W d|^2 - |L_c^-1 H_c' d|^2,   H_c = sqrt(1 - a) W' W F_c,   log det K_c = log det K + 2 log det L_c,
    L_c L_c' = I + (1 - a) F_c' W' W F_c

Regularised discriminant analysis (Friedman, JASA 1989); in class-incremental learning the use of class covariances
is FeCAM's (NeurIPS 2023). Here means and covariances follow the drift of the fused model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plora_ext.cil.covariances import CLASSES
from plora_ext.cil.heads.base import CovarianceHead
from plora_ext.cil.registry import register_head

_RIDGE = 0.03  # e; between 0.003 and 0.1 it hardly matters on the embedded benchmark
_NUMBERS = 2**24  # of the projections on the classes' axes that are held at a time


@register_head("gaussian")
class Gaussian(CovarianceHead):
    """See above; `shrinkage` is a, `covariance_rank` r.

    Attributes:
        factors: float32, not part of the state: inverse Cholesky factors of K_c [C, D, D], or W [1, D, D];
            sqrt(1 - a) L_c^-1 [C, r, r]; -1/2 log det K_c [C].
    """

    factors: tuple[Tensor, Tensor, Tensor]

    def learn(self, prototypes: Tensor, before: Tensor | None, after: Tensor, labels: Tensor) -> None:
        self.take_in(after, labels)
        self._factorise()

    def _factorise(self) -> None:
        a, mean = self.settings.shrinkage, self.covariances.mean()
        identity = torch.eye(len(mean), device=mean.device, dtype=torch.float64)
        common = a * mean + _RIDGE * mean.diag().mean().clamp_min(1e-12) * identity
        whitening, offsets = [], []
        for base in self.covariances.base:
            factor = torch.linalg.cholesky((1 - a) * base.double() + common)
            whitening.append(torch.linalg.solve_triangular(factor, identity, upper=False).float())
            offsets.append(-factor.diag().log().sum().float())
        inner, further = [], []
        for rows in self.covariances.rows.split(CLASSES):  # none for whole ones
            white = (1 - a) ** 0.5 * rows.double() @ whitening[0].double().T
            unit = identity[: rows.shape[1], : rows.shape[1]]
            factor = torch.linalg.cholesky(unit + white @ white.mT)
            inner.append(torch.linalg.solve_triangular(factor, (1 - a) ** 0.5 * unit, upper=False).float())
            further.append(-factor.diagonal(dim1=1, dim2=2).log().sum(1).float())
        self.factors = torch.stack(whitening), torch.cat(inner), torch.stack(offsets) + torch.cat(further)

    def __call__(self, features: Tensor, prototypes: Tensor) -> Tensor:
        (whitening, inner, offsets), x, means = self.factors, features.float(), prototypes.float()
        if not self.covariances.rank:
            distances = [((x - mean) @ whiten.T).square().sum(1) for mean, whiten in zip(means, whitening)]
            return offsets - torch.stack(distances, 1) / 2
        whiten, centre, near = whitening[0], means.mean(0), []
        x, means = (x - centre) @ whiten.T, (means - centre) @ whiten.T
        far = torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").square()
        x, means = x @ whiten, means @ whiten
        size = max(1, _NUMBERS // max(1, len(x) * inner.shape[1]))
        for rows, factors, mean in zip(self.covariances.rows.split(size), inner.split(size), means.split(size)):
            along = torch.einsum("nd,crd->ncr", x, rows) - torch.einsum("cd,crd->cr", mean, rows)
            near.append(torch.einsum("ncr,csr->ncs", along, factors).square().sum(2))
        return offsets - (far - torch.cat(near, 1)) / 2

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._factorise()
