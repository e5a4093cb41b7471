"""`ranpac`: ridge regression to one-hot labels on random projections (RanPAC, McDonnell et al., NeurIPS 2023).

    h(x) = ReLU(x W), W [D, M] standard normal;   G = sum h h', Q = sum h onehot(y)';   logits = h (G + l I)^-1 Q

G and Q add up over tasks, so nothing is forgotten as long as the features stay: with `lora-first` and `simplecil` this
is RanPAC itself. Where they move (`plora`) and the alignment of prototypes has a linear drift map, G and Q follow the
same map of the projected features: with H and K [n, M] those of the task's images before and after the move,

    G <- (I + R)' G (I + R),   Q <- (I + R)' Q,   R = H' (H H' + m I)^-1 (K - H), which has the least
                                                  |H R - (K - H)|^2 + m |R|^2, m = ridge * mean(diag(H' H))

l is chosen for each task, as the authors do: of 1e-8 ... 1e8 the one with the least squared error on a fifth of the
task's images, fitted to the other four; of a class that has none among these nothing is learned of it, so that its
images do not count, and l is 1 where none are left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext.cil.alignment import has_map, solve_ridge
from plora_ext.cil.heads.base import Head
from plora_ext.cil.registry import register_head
from plora_ext.cil.settings import Settings

RIDGES = tuple(10.0**power for power in range(-8, 9))


@register_head("ranpac")
class RanPAC(Head):
    """See above; `projections` is M.

    Attributes:
        weights: W [D, M].
        gram, target: G [M, M] and Q [M, C], float32.
        solution: float32 [M, C].
    """

    def __init__(self, settings: Settings, device: torch.device):
        super().__init__(settings, device)
        self.gram = self.target = torch.empty(0)

    def learn(self, prototypes: Tensor, before: Tensor | None, after: Tensor, labels: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.settings.seed)
        if not len(self.gram):
            size = (after.shape[1], self.settings.projections)
            self.weights = torch.randn(size, generator=generator).to(self.device)
            self.gram = torch.zeros(size[1], size[1], device=self.device)
            self.target = torch.zeros(size[1], 0, device=self.device)
        hidden = self._hidden(after)
        gram = hidden.T @ hidden
        if not bool(gram.isfinite().all()):
            raise ValueError("features must be finite, and so their squares: got others; did the training diverge?")
        if before is not None and has_map(self.settings.alignment):
            self._move(self._hidden(before), hidden)
        self.target = F.pad(self.target, (0, len(prototypes) - self.target.shape[1]))
        new = F.one_hot(labels, int(labels.max()) + 1).float()
        self.gram += gram
        self.target[:, -new.shape[1] :] += hidden.T @ new
        self.solution = _solve(self.gram, self.target, best_ridge(hidden, new, generator))

    def _move(self, before: Tensor, after: Tensor) -> None:
        """G and Q under the drift map, by whichever is smaller, n or M."""
        ridge = self.settings.ridge * before.double().square().sum(0).mean()
        if len(before) > before.shape[1]:  # R = (H' H + m I)^-1 H' (K - H), the same
            move = solve_ridge((before.T @ before).double(), (before.T @ (after - before)).double(), ridge).float()
            move.diagonal().add_(1)
            self.gram, self.target = move.T @ self.gram @ move, move.T @ self.target
            return
        # Written out so that no product is larger than [M, n] by [n, M].
        drift = solve_ridge((before @ before.T).double(), (after - before).double(), ridge).float()  # R = before' drift
        across = before @ self.gram
        twice = across.T @ drift
        self.gram = self.gram + twice + twice.T + drift.T @ (across @ before.T) @ drift
        self.target = self.target + drift.T @ (before @ self.target)

    def __call__(self, features: Tensor, prototypes: Tensor) -> Tensor:
        return self._hidden(features) @ self.solution

    def _hidden(self, features: Tensor) -> Tensor:
        return torch.relu(features.float() @ self.weights)


def best_ridge(hidden: Tensor, targets: Tensor, generator: torch.Generator) -> float:
    """The ridge of RIDGES with the least squared error on a random fifth of the rows, fitted to the others."""
    order = torch.randperm(len(hidden), generator=generator).to(hidden.device)
    held_out, fitted = order[: max(len(order) // 5, 1)], order[max(len(order) // 5, 1) :]
    held_out = held_out[targets[held_out] @ targets[fitted].sum(0) > 0]
    if not len(held_out):
        return 1.0
    values, across, right = spectrum(hidden[fitted], hidden[held_out], targets[fitted])
    wanted = targets[held_out].double()
    errors = [(across / (values + ridge) @ right - wanted).square().mean().item() for ridge in RIDGES]
    return RIDGES[errors.index(min(errors))]


def spectrum(fitted: Tensor, others: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v, X and Y, float64, with X / (v + l) Y = F (H' H + l I)^-1 H' T for every ridge l: one eigendecomposition.

    Of H' H [M, M], or of H H' [n, n] where that is smaller: it takes the cube of its size.

    Args:
        fitted: H [n, M].
        others: F [k, M].
        targets: T [n, C].
    """
    targets = targets.to(fitted.dtype)
    if len(fitted) > fitted.shape[1]:
        gram, across, right = fitted.T @ fitted, others, fitted.T @ targets
    else:
        gram, across, right = fitted @ fitted.T, others @ fitted.T, targets
    values, vectors = torch.linalg.eigh(gram.double())
    return values.clamp_min(0), across.double() @ vectors, vectors.T @ right.double()


def _solve(gram: Tensor, target: Tensor, ridge: float) -> Tensor:
    """(G + l I)^-1 Q in float64; a ridge below what rounding leaves of G's smallest eigenvalues grows tenfold."""
    if not bool(gram.isfinite().all()):  # no ridge would do
        raise ValueError("the sums over features are not finite: the drift map has blown them up; raise ridge")
    while True:
        regular = gram.double()
        regular.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(regular)
        if not failed:
            return torch.cholesky_solve(target.double(), factor).float().contiguous()  # as a checkpoint has it
        ridge *= 10
