"""Alignment and fusion against their formulas written out by hand, and the metrics on a matrix made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from plora_ext.cil import metrics
from plora_ext.cil.alignment import (
    ALIGNMENTS,
    LOCAL_RIDGE,
    Drift,
    align,
    class_means,
    solve_ridge,
)
from plora_ext.cil.covariances import ClassCovariances
from plora_ext.cil.fusion import coefficients, to_directions

TAU, RIDGE = 0.07, 0.2


def drift_map(before: Tensor, after: Tensor, ridge: float) -> Tensor:
    """R [D, D], float64: argmin over R of |F R - (F' - F)|^2 + l |R|^2, with l = ridge * mean(diag(F'F))."""
    before, after = before.double(), after.double()
    gram = before.T @ before
    return solve_ridge(gram, before.T @ (after - before), ridge * gram.diagonal().mean())


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

    def local(c: int) -> np.ndarray:
        cosines = f @ p[c] / np.linalg.norm(f, axis=1) / np.linalg.norm(p[c])
        near = np.diag(np.exp((cosines - cosines.max()) / TAU))
        gram = f.T @ near @ f
        regular = gram + LOCAL_RIDGE * np.mean(np.diag(gram)) * np.eye(8)
        return p[c] @ (moved + np.linalg.solve(regular, f.T @ near @ (g - f @ moved)))

    return {
        "local": np.stack([local(c) for c in range(len(p))]),
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


@pytest.mark.parametrize("name", ["ridge", "semantic", "local"])
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


# ---------------------------------------------------------------------- streaming

SPLITS = [[30], [1] * 30, [0, 7, 0, 1, 22, 0], [29, 1]]


def streamed(name: str, drift: tuple[Tensor, Tensor, Tensor, Tensor], sizes: list[int]) -> Drift:
    old, *parts = drift
    sums = Drift(name, old, 3, tau=TAU, ridge=RIDGE)
    for before, after, labels in zip(*(part.split(sizes) for part in parts)):
        sums.add(before, after, labels)
    return sums


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_batches_are_as_the_whole(name: str, drift: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    old, before, after, labels = drift
    wide = old.double(), before.double(), after.double(), labels
    expected = by_hand(name, *wide)
    for sizes in SPLITS:
        exact = streamed(name, wide, sizes).align()
        assert exact.dtype == torch.float64
        np.testing.assert_allclose(exact.numpy(), expected, rtol=1e-12, atol=1e-12)
        sums = streamed(name, drift, sizes)
        assert torch.equal(sums.align(), sums.align())  # looking changes nothing
        assert torch.equal(sums.align(), streamed(name, drift, sizes).align())
        np.testing.assert_allclose(sums.align().numpy(), expected, rtol=1e-5, atol=1e-6)
        for mean, features in zip(sums.means(), (before, after)):
            assert torch.equal(mean, class_means(features, labels, 3))


def test_sums_are_float64(generator: torch.Generator) -> None:
    """A thousandth of movement far away from the origin, which float32 sums of squares would not see."""
    labels = torch.arange(4000) % 2
    before = 100 + torch.randn(4000, 6, generator=generator)
    after = before + 1e-3 * torch.randn(4000, 6, generator=generator)
    old = 100 + torch.randn(3, 6, generator=generator)
    b, move = before.double(), (after.double() - before.double())
    gram = b.T @ b
    for ridge in (0.0, 1e-6):
        regular = gram + ridge * gram.diagonal().mean() * torch.eye(6)
        expected = old.double() @ torch.linalg.solve(regular, b.T @ move)
        sums = Drift("ridge", old.double(), 2, ridge=ridge)
        for f, g, y in zip(before.split(77), after.split(77), labels.split(77)):
            sums.add(f, g, y)
        torch.testing.assert_close(sums.align() - old, expected, rtol=1e-6, atol=1e-10)


def test_more_images_than_are_taken_at_a_time(generator: torch.Generator) -> None:
    before, after = torch.randn(2, 2500, 4, generator=generator)
    drift = torch.randn(3, 4, generator=generator), before, after, torch.arange(2500) % 3
    np.testing.assert_allclose(streamed("sdc", drift, [2500]).align(), streamed("sdc", drift, [1] * 2500).align(), 1e-6)
    torch.testing.assert_close(
        align("ridge", *drift, ridge=0.2), drift[0] @ (torch.eye(4) + drift_map(before, after, 0.2).float())
    )


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_one_image_and_none(name: str, generator: torch.Generator) -> None:
    old, before, after = (torch.randn(n, 6, generator=generator) for n in (4, 1, 1))
    move = after - before
    share = (old @ before.T) / before.square().sum() / (1 + RIDGE / 6)

    def one_share(ridge: float) -> float:
        """What a ridge finds of the drift of the only image."""
        return 1 / (1 + ridge / 6)

    expected = {
        "none": old,
        "complement": after.expand(4, 6),
        "shift": old + move,
        "sdc": old + move,
        "ridge": old + share * move,
        "semantic": old + move + (share - 1 / (1 + RIDGE / 6)) * move,
        "local": old + share * (1 + RIDGE / 6) * (1 - (1 - one_share(RIDGE)) * (1 - one_share(LOCAL_RIDGE))) * move,
    }[name]
    one = align(name, old, before, after, torch.zeros(1, dtype=torch.int64), tau=TAU, ridge=RIDGE)
    torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    nothing = old, before[:0], after[:0], torch.zeros(0, dtype=torch.int64)
    if name in ("complement", "shift", "semantic"):
        with pytest.raises(ValueError, match="new must hold at least one class"):
            align(name, *nothing)
    else:
        assert torch.equal(align(name, *nothing), old)


@pytest.mark.parametrize("rank", [None, 3])
def test_covariances_follow_the_maps(rank: int | None, drift: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    old, before, after, labels = drift
    generator = torch.Generator().manual_seed(1)
    held = ClassCovariances(rank or 0).added(torch.randn(60, 8, generator=generator), torch.arange(60) % 5)
    rows, base = held.rows.double(), held.base.double()
    for name in ALIGNMENTS:
        sums = Drift(name, old, 3, tau=TAU, ridge=RIDGE, covariances=held)
        sums.add(before, after, labels)
        aligned = sums.align()
        assert sums.covariances is not None
        if name in ("none", "complement", "shift", "sdc"):
            assert sums.covariances is held
            continue
        maps = list(sums.local_maps()) if name == "local" else [sums.map()] * 5
        if name != "semantic":
            torch.testing.assert_close(aligned, torch.stack([(p.double() @ m).float() for p, m in zip(old, maps)]))
        of_base = [sums.map()] if rank else maps
        torch.testing.assert_close(sums.covariances.rows, torch.stack([f @ m for f, m in zip(rows, maps)]).float())
        expected = torch.stack([m.T @ own @ m for own, m in zip(base, of_base, strict=True)])
        torch.testing.assert_close(sums.covariances.base, expected.float())
    assert torch.equal(held.rows.double(), rows) and torch.equal(held.base.double(), base)  # not written to


def test_images_of_no_class_tell_of_the_drift_only(drift: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    old, before, after, labels = drift
    with_them = Drift("local", old, 3, tau=TAU, ridge=RIDGE)
    with_them.add(before[:20], after[:20], labels[:20])
    with_them.add(before[20:], after[20:], None)
    torch.testing.assert_close(with_them.align(), align("local", *drift, tau=TAU, ridge=RIDGE))
    assert torch.equal(with_them.means()[1], class_means(after[:20], labels[:20], 3))


@pytest.mark.parametrize("ridge", [0.0, 1e-17, 0.1])
def test_singular_sums(ridge: float, generator: torch.Generator) -> None:
    """Features that repeat, are zero, or are more than the images: the solution of least norm if there is no ridge."""
    before, after = torch.randn(2, 40, 6, generator=generator)
    cases = {
        "few images": (before[:4], after[:4]),
        "a feature twice": (before[:, [0, 1, 2, 3, 4, 4]], after),
        "a zero feature": (before * torch.tensor([1, 1, 0, 1, 1, 1]), after),
        "zero features": (torch.zeros(40, 6), after),
    }
    for what, (f, g) in cases.items():
        b, d = f.double(), g.double() - f.double()
        gram = b.T @ b
        expected = torch.linalg.pinv(gram + ridge * gram.diagonal().mean() * torch.eye(6), hermitian=True) @ b.T @ d
        old = torch.randn(3, 6, generator=generator)
        aligned = align("ridge", old, f, g, torch.zeros(len(f), dtype=torch.int64), ridge=ridge)
        torch.testing.assert_close(aligned, (old + old.double() @ expected).float(), msg=what, rtol=1e-4, atol=1e-5)
        gaps = b @ solve_ridge(gram.clone(), b.T @ d, torch.tensor(0.0)) - d
        torch.testing.assert_close(b.T @ gaps, torch.zeros_like(gram), rtol=0, atol=1e-9)  # the least squares


def test_sdc_where_all_similarities_are_small(drift: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, before, after, labels = drift
    before = before[:1] + 1e-3 * before  # all of them the opposite of the prototype
    for tau in (0.05, 0.004, 1e-4):
        aligned = align("sdc", -before[:1], before, after, labels, tau=tau)
        cosines = np.float64(1) * torch.nn.functional.cosine_similarity(-before[:1].double(), before.double()).numpy()
        grown = np.exp((cosines - cosines.max()) / tau)
        expected = (grown / grown.sum()) @ (after - before).double().numpy() - before[0].numpy()
        assert bool(aligned.isfinite().all())
        if tau > 1 / 300:
            np.testing.assert_allclose(aligned[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_streaming_refuses(drift: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    old, before, after, labels = drift
    with pytest.raises(ValueError, match="alignment must be one of none"):
        Drift("linear", old, 3)
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        Drift("sdc", old, 3, tau=0)
    for wrong in (before[:29], before[:, :7], before[0]):
        with pytest.raises(ValueError, match="before and after must be"):
            Drift("sdc", old, 3).add(wrong, after, labels)
    for name in ALIGNMENTS:
        for bad in (torch.nan, torch.inf):
            worse = after.clone()
            worse[3, 2] = bad
            with pytest.raises(ValueError, match="must be finite"):
                streamed(name, (old, before, worse, labels), [10, 20]).align()
    lacking = Drift("shift", old, 4)
    lacking.add(before, after, labels)
    for look in (lacking.align, lacking.means):
        with pytest.raises(ValueError, match="every class needs a feature, got none for class 3"):
            look()


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
