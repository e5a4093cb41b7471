"""Covariances of classes, whole and of low rank, against numpy; that low rank stays small."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plora_ext.cil import Settings
from plora_ext.cil.alignment import class_means
from plora_ext.cil.covariances import ClassCovariances
from plora_ext.cil.heads import HEADS

D = 8


def tasks(*counts: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Features around far means and labels of tasks, with so many images of each class."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for sizes in counts:
        parts = [
            (torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator)) + 30 * c
            for c, n in enumerate(sizes)
        ]
        made.append((torch.cat(parts), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))))
    return made


def by_hand(given: list[tuple[Tensor, Tensor]]) -> list[np.ndarray]:
    """The classes' covariances; zero for one image."""
    classes = [x[y == c].double().numpy() for x, y in given for c in range(int(y.max()) + 1)]
    return [np.cov(own.T) if len(own) > 1 else np.zeros((D, D)) for own in classes]


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_the_best_and_the_mean_is_exact(rank: int) -> None:
    """With more and with fewer images than features, in tasks of three classes and of one."""
    given = tasks((20, 5, 9), (6,))
    held = ClassCovariances(rank or 0)
    for x, y in given:
        held = held.added(x, y)
    own, left = by_hand(given), []
    for covariance, rows in zip(own, held.rows, strict=True):
        values, vectors = np.linalg.eigh(covariance)
        best = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        np.testing.assert_allclose((rows.T @ rows).numpy(), best, atol=1e-5 * values[-1])
        np.testing.assert_allclose(rows.square().sum(1).numpy(), values[::-1][:rank], rtol=1e-4)
        left.append(covariance - best)
    np.testing.assert_allclose(held.base[0].numpy(), np.mean(left, 0), atol=1e-4)
    np.testing.assert_allclose(held.mean().numpy(), np.mean(own, 0), atol=1e-4)
    np.testing.assert_allclose(held.of(1).numpy(), own[1] - left[1] + np.mean(left, 0), atol=1e-4)


@pytest.mark.parametrize("rank", [None, 5, D, 100])
def test_few_images_and_a_rank_above_the_width(rank: int | None) -> None:
    """Of n images, n - 1 axes: nothing is left over, and every class is as it is whole."""
    given = tasks((1, 2, 5), (3,))
    held = ClassCovariances(rank or 0)
    for x, y in given:
        held = held.added(x, y)
    assert held.rows.shape == (4, min(rank or 0, D), D) and held.base.shape == (1 if rank else 4, D, D)
    for c, expected in enumerate(by_hand(given)):
        np.testing.assert_allclose(held.of(c).numpy(), expected, atol=1e-4)
    assert not held.of(0).any()
    again = ClassCovariances(rank or 0).restored(held.state())
    assert torch.equal(again.mean(), held.mean()) and again.state().keys() == held.state().keys()


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_features_that_have_no_covariance(rank: int | None, bad: float) -> None:
    x, y = tasks((4, 4))[0]
    x[2, 1] = bad
    with pytest.raises(ValueError, match="features must be finite, below 1e18"):
        ClassCovariances(rank or 0).added(x, y)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operator gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for made in given if isinstance(given, tuple | list) else [given]:
            if isinstance(made, Tensor):
                self.numel = max(self.numel, made.numel())
        return given


def test_thousands_of_classes_take_no_matrix_each() -> None:
    C, width, rank = 2000, 32, 4
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3 * C, width, generator=generator), torch.arange(3 * C) % C
    head, means = HEADS["gaussian"](Settings(covariance_rank=rank), torch.device("cpu")), class_means(x, y, C)
    with Largest() as largest:
        head.learn(means, None, x, y)
        logits = head(x[:64], means)
        moved = head.covariances.moved(torch.eye(width, dtype=torch.float64))
    assert largest.numel < C * width**2 / 3
    torch.testing.assert_close(moved.mean(), head.covariances.mean())
    assert sum(part.numel() for part in head.state().values()) == C * rank * width + width**2
    mixed = 0.2 * head.covariances.of(7) + 0.8 * head.covariances.mean().float()
    mixed += 0.03 * head.covariances.mean().diag().mean().float() * torch.eye(width)
    expected = torch.distributions.MultivariateNormal(means[7], mixed).log_prob(x[:64])
    torch.testing.assert_close(logits[:, 7] - logits[0, 7], expected - expected[0], atol=1e-3, rtol=1e-3)
