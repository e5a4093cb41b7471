"""The heads on given features, against their formulas, and in the loop."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_cil_alignment import drift_map
from torch import Tensor, nn

from plora_ext.cil import Settings
from plora_ext.cil.alignment import Drift, align, class_means
from plora_ext.cil.heads import HEADS, Head
from plora_ext.cil.heads.base import CovarianceHead
from plora_ext.cil.heads.ranpac import RIDGES, best_ridge, spectrum
from plora_ext.cil.packing import pack, unpack

CPU = torch.device("cpu")
LEARNED = [name for name, head in HEADS.items() if head.learn is not Head.learn]
D = 6


def blobs(classes: range, each: int = 40) -> tuple[Tensor, Tensor]:
    """Features of classes with covariances of their own, and labels from 0."""
    parts = []
    for c in classes:
        generator = torch.Generator().manual_seed(c)
        factor = torch.randn(D, D, generator=generator)
        parts.append(torch.randn(each, D, generator=generator) @ factor + 2 * torch.randn(D, generator=generator))
    return torch.cat(parts), torch.arange(len(classes)).repeat_interleave(each)


def taught(name: str, moves: Tensor | None = None, **settings) -> tuple:
    """A head after two tasks of three and two classes; the space moves by `moves` before the second."""
    s = Settings(**{"projections": 50, "replay_epochs": 5, "alignment": "ridge", "ridge": 1e-9, **settings})
    head = HEADS[name](s, CPU)
    x, y = blobs(range(3))
    prototypes = class_means(x, y, 3)
    head.learn(prototypes, None, x, y)
    after, y2 = blobs(range(3, 5))
    before = None if moves is None else after @ torch.linalg.inv(moves)
    if before is not None:
        drift = Drift(s.alignment, prototypes, 2, ridge=s.ridge, covariances=head.covariances)
        drift.add(before, after, y2)
        prototypes = align("ridge", prototypes, before, after, y2, ridge=s.ridge)
        drift.align()
        head.follow(drift)
        x = x @ moves
    prototypes = torch.cat([prototypes, class_means(after, y2, 2)])
    head.learn(prototypes, before, after, y2)
    return head, torch.cat([x, after]), torch.cat([y, y2 + 3]), s, prototypes


def moving() -> Tensor:
    return torch.eye(D) + 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("shrinkage", [0.0, 0.8])
@pytest.mark.parametrize("rank", [None, 2, 6, 60])
@pytest.mark.parametrize("moves", [None, moving()])
def test_gaussian_is_the_discriminant_of_the_formula(moves: Tensor | None, rank: int | None, shrinkage: float) -> None:
    """Old classes too, after a linear move of the space: means and covariances are those of the moved features."""
    head, x, y, s, prototypes = taught("gaussian", moves, covariance_rank=rank, shrinkage=shrinkage)
    own = torch.stack([torch.cov(x[y == c].T.double()) for c in range(5)])
    torch.testing.assert_close(head.covariances.mean(), own.mean(0), atol=1e-4, rtol=1e-4)
    if rank == 2:
        own = torch.stack([head.covariances.of(c).double() for c in range(5)])
    shared, identity = own.mean(0), torch.eye(D, dtype=torch.float64)
    expected = []
    for c in range(5):
        mixed = (1 - s.shrinkage) * own[c] + s.shrinkage * shared + 0.03 * shared.diag().mean() * identity
        expected.append(torch.distributions.MultivariateNormal(x[y == c].double().mean(0), mixed).log_prob(x.double()))
    given = head(x, prototypes).double()
    torch.testing.assert_close(given.log_softmax(1), torch.stack(expected, 1).log_softmax(1), atol=2e-3, rtol=1e-3)


def test_covariances_stay_where_the_alignment_has_no_map() -> None:
    still, moved = (taught("gaussian", moving(), alignment=name)[0].covariances.base for name in ("shift", "ridge"))
    first = taught("gaussian")[0].covariances.base
    assert torch.equal(still[:3], first[:3]) and not torch.equal(moved[:3], first[:3])
    assert torch.equal(still[3:], moved[3:])


def test_ranpac_over_tasks_is_ridge_regression_on_all_of_them() -> None:
    head, x, y, s, prototypes = taught("ranpac")
    hidden = torch.relu(x @ head.weights).double()
    second = slice(120, 200)
    generator = torch.Generator().manual_seed(s.seed)
    ridge = best_ridge(hidden[second].float(), F.one_hot(y[second] - 3).float(), generator)
    expected = torch.linalg.solve(hidden.T @ hidden + ridge * torch.eye(50), hidden.T @ F.one_hot(y).double())
    torch.testing.assert_close(head(x, prototypes).double(), hidden @ expected, atol=2e-3, rtol=2e-3)


def test_ranpac_does_not_seek_a_ridge_for_sums_that_are_not_finite() -> None:
    """It sought one for ever."""
    head, x, y, _, prototypes = taught("ranpac")
    head.gram[0, 0] = float("inf")
    with pytest.raises(ValueError, match="the sums over features are not finite"):
        head.learn(prototypes, None, x[y == 4], torch.zeros(int((y == 4).sum()), dtype=torch.int64))


def test_the_ridge_with_the_least_error_on_held_out_rows() -> None:
    hidden, targets = torch.relu(torch.randn(60, 30)), F.one_hot(torch.arange(60) % 3).float()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    held, fitted = order[:12], order[12:]
    errors = []
    for ridge in RIDGES:
        h = hidden[fitted].double()
        w = torch.linalg.solve(h.T @ h + ridge * torch.eye(30), h.T @ targets[fitted].double())
        errors.append((hidden[held].double() @ w - targets[held]).square().mean().item())
    assert best_ridge(hidden, targets, torch.Generator().manual_seed(4)) == RIDGES[int(np.argmin(errors))]
    assert best_ridge(hidden[:1], targets[:1], torch.Generator()) > 0  # nothing to hold out
    alone = [best_ridge(hidden[:6], torch.eye(6), torch.Generator().manual_seed(seed)) for seed in range(5)]
    assert alone == [1.0] * 5  # an image a class: the largest ridge was the best for what no other image tells of


@pytest.mark.parametrize("size", [(40, 12), (12, 40), (20, 20)])
def test_both_forms_of_the_ridge_are_the_formula(size: tuple[int, int]) -> None:
    hidden, others = torch.randn(size, dtype=torch.float64), torch.randn(7, size[1], dtype=torch.float64)
    targets = F.one_hot(torch.arange(size[0]) % 3)
    values, across, right = spectrum(hidden, others, targets)
    wide = F.pad(hidden, (0, size[0])), F.pad(others, (0, size[0]))  # features of zeros: now n < M
    dual = spectrum(*wide, targets)
    assert len(values) == min(size) and len(dual[0]) == size[0]
    for ridge in RIDGES[6:]:
        gram = hidden.T @ hidden + ridge * torch.eye(size[1], dtype=torch.float64)
        expected = others @ torch.linalg.solve(gram, hidden.T @ targets.double())
        torch.testing.assert_close(across / (values + ridge) @ right, expected, rtol=0, atol=1e-8)
        torch.testing.assert_close(dual[1] / (dual[0] + ridge) @ dual[2], expected, rtol=0, atol=1e-8)


def test_the_ridge_takes_no_cube_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, eigh, factor = [], torch.linalg.eigh, torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: (sizes.append(a.shape), eigh(a))[1])
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: (sizes.append(a.shape), factor(a))[1])
    for each in (3, 20, 200):
        head = HEADS["ranpac"](Settings(projections=30), CPU)
        (x, y), (more, z) = blobs(range(2), each), blobs(range(2, 4), each)
        head.learn(class_means(x, y, 2), None, x, y)
        head.learn(torch.zeros(4, D), more @ moving(), more, z)
    assert len(sizes) >= 3 * 5 and max(max(shape) for shape in sizes) == 30


@pytest.mark.parametrize("each", [8, 40])  # fewer and more images than projections
def test_ranpac_follows_the_drift_map_of_its_projections(each: int) -> None:
    s = Settings(projections=20, alignment="semantic", ridge=0.1)
    head = HEADS["ranpac"](s, CPU)
    x, y = blobs(range(3))
    head.learn(class_means(x, y, 3), None, x, y)
    gram, target = head.gram.double(), head.target.double()
    before, y2 = blobs(range(3, 5), each)
    after = before @ moving()
    head.learn(torch.zeros(5, D), before, after, y2)
    h, k = (torch.relu(f @ head.weights) for f in (before, after))
    moved = torch.eye(20) + drift_map(h, k, s.ridge)
    new = F.one_hot(y2).double()
    torch.testing.assert_close(
        head.gram.double(), moved.T @ gram @ moved + k.T.double() @ k.double(), rtol=1e-3, atol=1
    )
    torch.testing.assert_close(head.target[:, :3].double(), moved.T @ target, rtol=1e-3, atol=0.1)
    torch.testing.assert_close(head.target[:, 3:].double(), k.T.double() @ new, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", LEARNED)
def test_heads_beat_the_cosine_where_covariances_matter(name: str) -> None:
    head, x, y, _, prototypes = taught(name, replay_epochs=100)
    means = torch.stack([x[y == c].mean(0) for c in range(5)])
    cosine = (F.normalize(x) @ F.normalize(means).T).argmax(1)
    assert (head(x, prototypes).argmax(1) == y).float().mean() > (cosine == y).float().mean()


@pytest.mark.parametrize(("name", "rank"), [*((name, None) for name in LEARNED), ("gaussian", 2), ("replay", 2)])
def test_state_brings_a_head_back(name: str, rank: int | None) -> None:
    head, x, _, s, prototypes = taught(name, covariance_rank=rank)
    again = HEADS[name](s, CPU)
    again.restore(head.state())
    assert torch.equal(again(x, prototypes), head(x, prototypes))
    if name != "ranpac" and rank is None:  # as older checkpoints have it
        older = {key: value for key, value in head.state().items() if not key.startswith("covariances")}
        again = HEADS[name](s, CPU)
        again.restore({**older, "covariances": head.covariances.base})
        assert torch.equal(again(x, prototypes), head(x, prototypes))


@pytest.mark.parametrize("base", [Head, CovarianceHead])
def test_what_a_head_of_one_s_own_has_learned_is_kept_or_named(base: type[Head]) -> None:
    """Its attributes that were no tensors were lost without a word: it predicted by what it began with."""

    class Mine(base):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.means: list[Tensor] = []
            self.seen: dict[str, int] = {"images": 0}

        def learn(self, prototypes: Tensor, before: Tensor | None, after: Tensor, labels: Tensor) -> None:
            self.means += [after[labels == c].mean(0) for c in labels.unique().tolist()]
            self.seen["images"] += len(after)

        def __call__(self, features: Tensor, prototypes: Tensor) -> Tensor:
            return features @ torch.stack(self.means).T

    (x, y), s = blobs(range(2)), Settings()
    head, again = Mine(s, CPU), Mine(s, CPU)
    head.take_in(x, y) if base is CovarianceHead else None
    head.learn(x, None, x, y)
    tensors: dict[str, Tensor] = {}
    again.restore(unpack(json.loads(json.dumps(pack(head.state(), "", tensors))), tensors))
    assert torch.equal(again(x, x), head(x, x)) and again.seen == {"images": len(x)}
    for value in (nn.Linear(2, 2), np.ones(2), (torch.ones(2),), {0: torch.ones(2)}):
        head.other = value
        with pytest.raises(
            TypeError, match="head Mine cannot be saved whole: other is no tensor, .*give the head a st"
        ):
            head.refuse_loss()
        kept = ["means", "seen"] + ["covariances:0"] * (base is CovarianceHead)
        assert list(head.state()) == kept

    class Whole(Mine):
        def restore(self, state: dict[str, Any]) -> None:
            super().restore(state)

    whole = Whole(s, CPU)
    whole.other = nn.Linear(2, 2)
    whole.refuse_loss()  # it knows what it does


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", LEARNED)
def test_one_image_of_a_class(name: str, rank: int | None) -> None:
    s = Settings(projections=20, replay_epochs=1, covariance_rank=rank)
    head, (x, y) = HEADS[name](s, CPU), blobs(range(2), each=1)
    prototypes = class_means(x, y, 2)
    head.learn(prototypes, None, x, y)
    assert head(x, prototypes).isfinite().all()


@pytest.mark.parametrize("rank", [None, 2])
def test_replay_draws_from_the_covariances(rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, linear = [], F.linear
    monkeypatch.setattr("plora_ext.cil.heads.replay._SAMPLES", 20_000)
    monkeypatch.setattr(F, "linear", lambda x, *rest: (drawn.append(x), linear(x, *rest))[1])
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    x, y = blobs(range(2))
    head, means = HEADS["replay"](Settings(replay_epochs=1, covariance_rank=rank), CPU), class_means(x, y, 2)
    head.learn(means, None, x, y)
    shared = head.covariances.mean().diag().float()
    spread = (shared + means.var(0, correction=0)).sqrt()
    for c, part in enumerate((torch.cat(drawn) * spread).chunk(2)):
        expected = head.covariances.of(c) + 1e-3 * shared.mean() * torch.eye(D)
        assert (torch.cov(part.T) - expected).norm() < 0.04 * expected.norm()
        torch.testing.assert_close(part.mean(0) + means.mean(0), means[c], atol=0.1, rtol=0)


def test_an_ensemble_has_no_one_space() -> None:
    with pytest.raises(ValueError, match="head 'ranpac' works in one feature space, plora-ensemble has one a task"):
        Settings(method="plora-ensemble", head="ranpac")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", LEARNED)
def test_features_that_are_not_finite_are_refused(name: str, value: float) -> None:
    head = HEADS[name](Settings(projections=50, replay_epochs=1), CPU)
    x, y = torch.ones(1, D), torch.zeros(1, dtype=torch.int64)
    x[0, 1] = value
    with pytest.raises(ValueError, match="features must be finite"):
        head.learn(x, None, x, y)
