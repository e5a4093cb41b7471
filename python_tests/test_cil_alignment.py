"""Alignment and fusion against their formulas written out by hand, and the metrics on a matrix made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from plora_ext.cil import metrics
from plora_ext.cil.alignment import ALIGNMENTS, align, class_means, drift_map
from plora_ext.cil.fusion import coefficients, to_directions

TAU, RIDGE = 0.07, 0.2


@pytest.fixture
def drift(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Old prototypes [5, 8], features [30, 8] before and after, labels [30] of 3 new classes."""
    labels = torch.arange(30) % 3
    before = torch.randn(3, 8, generator=generator)[labels] + 0.3 * torch.randn(30, 8, generator=generator)
    after = before + 0.5 * torch.randn(30, 8, generator=generator)
    return torch.randn(5, 8, generator=generator), before, after, labels


def by_hand(name: str, old: Tensor, before: Tensor, after: Tensor, labels: Tensor) -> np.ndarray:
    p, f, g, y = (
        x.numpy().astype(np.float64 if x.is_floating_point() else np.int64) for x in (old, before, after, labels)
    )
    gram = f.T @ f
    drift_matrix = np.linalg.solve(gram + RIDGE * np.mean(np.diag(gram)) * np.eye(8), f.T @ (g - f))
    moved = np.eye(8) + drift_matrix
    new_old, new_new = (np.stack([x[y == k].mean(0) for k in range(3)]) for x in (f, g))

    def weights(keys: np.ndarray) -> np.ndarray:
        cosines = (p / np.linalg.norm(p, axis=1, keepdims=True)) @ (
            keys / np.linalg.norm(keys, axis=1, keepdims=True)
        ).T
        grown = np.exp(cosines / TAU)
        return grown / grown.sum(1, keepdims=True)

    return {
        "none": p,
        "complement": weights(new_old) @ new_new,
        "shift": p + weights(new_old) @ (new_new - new_old),
        "sdc": p + weights(f) @ (g - f),
        "ridge": p @ moved,
        "semantic": p @ moved + weights(new_old) @ (new_new - new_old @ moved),
    }[name]


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_formulas(name: str, drift: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    aligned = align(name, *drift, tau=TAU, ridge=RIDGE)
    assert aligned.dtype == torch.float32
    np.testing.assert_allclose(aligned.numpy(), by_hand(name, *drift), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [a for a in ALIGNMENTS if a != "complement"])
def test_without_drift_prototypes_stay(name: str, drift: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    old, before, _, labels = drift
    torch.testing.assert_close(align(name, old, before, before, labels), old)


@pytest.mark.parametrize("name", ["ridge", "semantic"])
def test_a_linear_drift_is_recovered(name: str, drift: tuple, generator: torch.Generator) -> None:
    old, before, _, labels = drift
    moved = torch.eye(8) + 0.4 * torch.randn(8, 8, generator=generator)
    aligned = align(name, old, before, before @ moved, labels, ridge=1e-9)
    torch.testing.assert_close(aligned, old @ moved, rtol=1e-4, atol=1e-4)


def test_drift_map_with_fewer_images_than_features(generator: torch.Generator) -> None:
    before, after = torch.randn(4, 9, generator=generator), torch.randn(4, 9, generator=generator)
    free = drift_map(before, after, ridge=0.0)  # of least norm, exact on what was seen
    torch.testing.assert_close((before.double() @ free).float(), after - before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drift_map(before, after, ridge=1e-9), free, rtol=1e-4, atol=1e-4)


def test_alignment_refuses(drift: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    old, before, after, labels = drift
    with pytest.raises(ValueError, match="alignment must be one of none, complement"):
        align("semantics", *drift)
    with pytest.raises(ValueError, match=r"got \[30, 8\], \[30, 8\] and \[5, 7\]"):
        align("ridge", old[:, :7], before, after, labels)
    after[3, 2] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        align("ridge", *drift)
    with pytest.raises(ValueError, match="every class needs a feature, got none for class 3"):
        class_means(before, labels, 4)


def test_fusion_rules() -> None:
    assert coefficients("mean", 4).tolist() == [0.25] * 4
    assert coefficients("sum", 3).tolist() == [1.0] * 3
    magnitudes = torch.tensor([0.5, 2.0])
    assert coefficients("learned", 2, magnitudes=magnitudes) is magnitudes
    means = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    grown = np.exp(np.array([0.0, 1.0, 1.0]) / 0.5)
    chosen = coefficients("similarity", 3, task_means=means, tau=0.5)
    np.testing.assert_allclose(chosen.numpy(), grown / grown.sum(), rtol=1e-6)


def test_fusion_refuses() -> None:
    with pytest.raises(ValueError, match="needs task_means of 2 tasks, got None"):
        coefficients("similarity", 2)
    with pytest.raises(ValueError, match="needs magnitudes of 3 tasks, got 2"):
        coefficients("learned", 3, magnitudes=torch.ones(2))
    with pytest.raises(ValueError, match="rule must be"):
        coefficients("median", 2)


def test_directions_have_norm_one() -> None:
    factors = [torch.nn.Parameter(3 * torch.randn(2, 5)), torch.nn.Parameter(torch.zeros(5, 2))]
    to_directions(factors)
    assert factors[0].norm().item() == pytest.approx(1.0)
    assert not factors[1].any()


def test_metrics_by_hand() -> None:
    matrix = [[90.0], [80.0, 70.0], [60.0, 75.0, 95.0]]
    assert metrics.forgetting(matrix) == pytest.approx(((90 - 60) + (75 - 75)) / 2)
    assert metrics.backward_transfer(matrix) == pytest.approx(((60 - 90) + (75 - 70)) / 2)
    assert metrics.average_accuracy([90.0, 76.0, 80.0]) == pytest.approx(82.0)
    assert metrics.last_accuracy([90.0, 76.0, 80.0]) == 80.0
    assert metrics.forgetting([[50.0]]) is None and metrics.backward_transfer([[50.0]]) is None
    correct, tasks = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), np.array([0, 0, 1, 1, 1])
    assert metrics.task_accuracies(correct, tasks) == pytest.approx([50.0, 200 / 3])
