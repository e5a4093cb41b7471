"""Images sought for old classes: where they start, what they seek, and that they come nearer to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plora_ext import change
from plora_ext.cil import sought


def test_targets_are_around_the_prototypes_and_start_from_the_nearest_images(generator: torch.Generator) -> None:
    labels = torch.arange(400) % 2
    spread = torch.tensor([1.0, 0.5, 0.1, 0.0])
    features = torch.randn(400, 4, generator=generator) * spread + 20 * F.one_hot(labels, 4)
    old = torch.tensor([[30.0, 0, 1, 0], [0, 30.0, -1, 0]])
    starts, wanted = sought.targets(old, features, labels, 300)
    assert starts.shape == (600,) and wanted.shape == (600, 4)
    assert bool((labels[starts[:300]] == 0).all()) and bool((labels[starts[300:]] == 1).all())
    nearest = (F.normalize(old) @ F.normalize(features).T).topk(sought.NEAREST).indices
    assert set(starts[:300].tolist()) <= set(nearest[0].tolist()) and len(set(starts[:300].tolist())) > 80
    drawn = wanted.view(2, 300, 4)
    torch.testing.assert_close(drawn.mean(1), old, atol=0.3, rtol=0)
    torch.testing.assert_close(drawn.std(1), spread.expand(2, 4), atol=0.1, rtol=0.1)
    again = sought.targets(old, features, labels, 300)
    assert torch.equal(again[0], starts) and torch.equal(again[1], wanted)


def test_a_sample_of_a_stream() -> None:
    """Rows stay together, and those of the last batches are as likely as those of the first."""
    sample = sought.Sample()
    for start in range(0, 3000, 30):
        numbers = torch.arange(start, start + 30)
        sample.add(numbers, numbers.double() * 2)
        assert len(sample.keys) == min(start + 30, sought.SAMPLE)
    numbers, doubled = sample.rows
    assert torch.equal(doubled, numbers.double() * 2) and len(numbers.unique()) == sought.SAMPLE
    assert 1300 < numbers.double().mean() < 1700


def test_a_class_with_one_image_and_fewer_images_than_are_nearest() -> None:
    features = torch.eye(3)[:2]
    starts, wanted = sought.targets(torch.ones(1, 3), features, torch.arange(2), 5)
    assert starts.max() <= 1
    torch.testing.assert_close(wanted, torch.ones(5, 3), atol=1e-4, rtol=0)  # no spread is known of


def test_features_that_are_not_finite() -> None:
    features = torch.randn(4, 3)
    features[2, 1] = torch.inf
    with pytest.raises(ValueError, match="features must be finite"):
        sought.targets(torch.ones(1, 3), features, torch.arange(4), 2)


def test_images_come_nearer_by_steps_of_one_size(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6)).requires_grad_(False)
    images, wanted = torch.randn(5, 3, 4, 4, generator=generator), 3 * torch.randn(5, 6, generator=generator)
    with torch.no_grad():  # as passes are made
        moved = sought.move(images, wanted, model)
    before, after = ((model(x) - wanted).norm(dim=1) for x in (images, moved))
    assert bool((after < before).all()) and not moved.requires_grad
    change = (moved - images).flatten(1).norm(dim=1) / 48**0.5
    assert bool((change <= sought.STEPS * sought.STEP + 1e-5).all()) and bool((change > sought.STEP).all())
    assert torch.equal(sought.move(images, model(images).float(), model), images)  # where they are there, none moves


def test_numbers_are_the_same_under_another_default_device() -> None:
    """Draws of a CPU's generator are a CPU's: with a GPU as the default, they ended in an error."""

    def drawn() -> list[torch.Tensor]:
        sample, x = sought.Sample(), torch.linspace(0, 1, 60, device="cpu").view(12, 5).sin()
        for _ in range(30):
            sample.add(x)
        change._keys.cache_clear()
        labels = torch.arange(12, device="cpu") % 3
        return [*sample.rows, *sought.targets(x[:4], x, labels, 3), change.row_digests(x)]

    expected = drawn()
    with torch.device("meta"):
        assert all(map(torch.equal, drawn(), expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_numbers_are_the_same_under_another_default_dtype(dtype: torch.dtype) -> None:
    def drawn() -> list[torch.Tensor]:
        sample, x = sought.Sample(), torch.linspace(0, 1, 1500, dtype=torch.float32).view(300, 5).sin()
        sample.add(x)
        return [*sample.rows, *sought.targets(x[:4], x[:12], torch.arange(12) % 3, 3)]

    expected = drawn()
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, drawn(), expected))
    finally:
        torch.set_default_dtype(torch.float32)
