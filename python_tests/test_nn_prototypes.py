"""PrototypeBank and the cosine heads: the plain formulas, state that resizes, one clear error otherwise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plora_ext.nn import CosineHead, PrototypeBank, SubspaceHead

D = 8


def filled(device: torch.device | str = "cpu") -> tuple[PrototypeBank, torch.Tensor, torch.Tensor]:
    features, labels = torch.randn(50, D), torch.randint(0, 5, (50,))
    labels[labels == 3] = 2  # class 3 never comes
    bank = PrototypeBank(D).to(device)
    for rows, ids in zip(features.split(7), labels.split(7), strict=True):
        bank.update(rows.to(device), ids.to(device))
    return bank, features, labels


def test_prototypes_are_the_class_means_over_batches(device) -> None:
    bank, features, labels = filled(device)
    assert bank.classes == [0, 1, 2, 4]
    assert bank.counts.tolist() == torch.bincount(labels, minlength=5).tolist()
    for c in bank.classes:
        torch.testing.assert_close(bank.prototypes[c].cpu(), features[labels == c].mean(0))
    assert not bank.prototypes[3].any()
    assert torch.equal(bank.select([4, 0]), bank.prototypes[[4, 0]])


def test_it_grows_and_old_classes_keep_their_bits() -> None:
    bank, *_ = filled()
    before = bank.prototypes.clone()
    bank.update(torch.ones(2, D), torch.tensor([9, 9], dtype=torch.int32))
    assert bank.prototypes.shape == (10, D) and bank.classes == [0, 1, 2, 4, 9]
    assert torch.equal(bank.prototypes[:5], before)
    assert torch.equal(bank.prototypes[9], torch.ones(D))
    bank.update(torch.zeros(0, D), torch.zeros(0, dtype=torch.int64))
    assert bank.classes == [0, 1, 2, 4, 9]
    bank.reset()
    assert bank.classes == [] and bank.prototypes.shape == (0, D)


def test_set_replaces_bit_for_bit_and_update_goes_on_from_there() -> None:
    bank, *_ = filled()
    counts = bank.counts.clone()
    new = torch.randn(2, D)
    bank.set([1, 6], new)
    assert torch.equal(bank.select([1, 6]), new)
    assert bank.counts[1] == counts[1] and bank.counts[6] == 1
    bank.update(torch.zeros(1, D), torch.tensor([0]))
    assert torch.equal(bank.select([1, 6]), new)  # other classes' updates leave them alone
    bank.update(torch.zeros(1, D), torch.tensor([6]))
    torch.testing.assert_close(bank.prototypes[6], new[1] / 2)
    bank.set(torch.tensor([7]), torch.ones(1, D), counts=torch.tensor([20]))
    assert bank.counts[7] == 20


def test_state_dict_brings_its_own_size() -> None:
    bank, *_ = filled()
    for classes in (0, 30):
        other = PrototypeBank(D)
        other.update(torch.ones(classes, D), torch.arange(classes))
        model = nn.ModuleDict({"bank": other})
        model.load_state_dict({f"bank.{k}": v for k, v in bank.state_dict().items()}, strict=True)
        assert torch.equal(other.prototypes, bank.prototypes) and other.classes == bank.classes
    with pytest.raises(RuntimeError, match="size mismatch for prototypes"):
        PrototypeBank(D + 1).load_state_dict(bank.state_dict())


def test_means_stay_in_float32() -> None:
    bank, *_ = filled()
    before = bank.prototypes.clone()
    bank.bfloat16()
    assert bank.prototypes.dtype == bank.sums.dtype == torch.float32
    assert torch.equal(bank.prototypes, before)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        bank.update(torch.ones(2, D, dtype=dtype), torch.tensor([11, 12]))
    assert torch.equal(bank.select([11]), torch.ones(1, D))
    empty = bank.to("meta").to_empty(device="cpu")
    other, *_ = filled()
    empty.load_state_dict(other.state_dict())
    assert torch.equal(empty.prototypes, other.prototypes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8], ids=str)
def test_labels_of_every_integer(dtype: torch.dtype) -> None:
    """Of the unsigned ones beside uint8 torch knows no least and no largest."""
    bank, labels = PrototypeBank(D), torch.tensor([0, 2], dtype=dtype)
    bank.update(torch.ones(2, D), labels)
    bank.set(labels, torch.full((2, D), 3.0))
    assert bank.counts.tolist() == [1, 0, 1] and torch.equal(bank.select(labels), torch.full((2, D), 3.0))
    head = SubspaceHead()
    head.assign(labels)
    assert head.task_of_class.tolist() == [0, 2]


def test_bad_labels_and_shapes() -> None:
    bank, *_ = filled()
    before = {k: v.clone() for k, v in bank.state_dict().items()}
    with pytest.raises(ValueError, match="must not be negative, got -4"):
        bank.update(torch.ones(2, D), torch.tensor([1, -4]))
    with pytest.raises(ValueError, match=r"integer tensor, got torch\.float32"):
        bank.update(torch.ones(2, D), torch.ones(2))
    with pytest.raises(ValueError, match=r"must be \[N, 8\] and \[N\], got \[2, 9\] and \[2\]"):
        bank.update(torch.ones(2, D + 1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"got \[3, 8\] and \[2\]"):
        bank.update(torch.ones(3, D), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"class 3 has no prototype, 4 classes have: \[0, 1, 2, 4\]"):
        bank.select([0, 3])
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        bank.set([-1], torch.ones(1, D))
    with pytest.raises(ValueError, match=r"prototypes must be \[1, 8\]"):
        bank.set([0], torch.ones(2, D))
    with pytest.raises(ValueError, match="must not repeat"):
        bank.set([0, 0], torch.ones(2, D))
    for counts in (torch.tensor([3]), torch.tensor([3, -1]), [3], [3, 2.5]):  # one number was that of both classes
        with pytest.raises(ValueError, match=r"counts must be \[2\] numbers of samples"):
            bank.set([0, 99], torch.ones(2, D), counts)
    with pytest.raises(ValueError, match=r"prototypes must be \[1, 8\]"):
        bank.set([99], torch.ones(2, D))
    with pytest.raises(ValueError, match="num_features must be at least 1"):
        PrototypeBank(0)
    assert all(torch.equal(v, before[k]) for k, v in bank.state_dict().items())


def test_cosine_head() -> None:
    bank, *_ = filled()
    head, features = CosineHead(scale=20), torch.randn(4, 6, D, requires_grad=True)
    logits = head(features, bank.prototypes)
    expected = 20 * F.cosine_similarity(features[:, :, None], bank.prototypes, dim=-1)
    expected[..., 3] = -torch.inf  # no data: never predicted
    torch.testing.assert_close(logits, expected)
    logits[..., [0, 1, 2, 4]].sum().backward()
    assert features.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(features, bank.prototypes), logits)
    torch.testing.assert_close(head(features.bfloat16(), bank.prototypes), logits, rtol=2e-2, atol=0.2)
    assert head.state_dict()["scale"] == 20
    with pytest.raises(ValueError, match=r"must share D, got \[4, 9\] and \[5, 8\]"):
        head(torch.randn(4, 9), bank.prototypes)


def test_heads_keep_their_factors_in_a_narrower_model() -> None:
    cosine, subspace = CosineHead(scale=0.3), SubspaceHead(alpha=0.7)
    subspace.assign([0, 1, 2, 3])
    weights, heads = subspace.weights.clone(), nn.ModuleList([cosine, subspace])
    heads.bfloat16()
    assert torch.equal(cosine.scale, torch.tensor(0.3)) and torch.equal(subspace.weights, weights)
    assert heads.to("meta")[0].scale.is_meta


def test_subspace_head_is_the_weighted_sum_of_cosines() -> None:
    head, tasks = SubspaceHead(alpha=0.3), [0, 0, 1, 2, 2]
    head.assign(tasks)
    features, prototypes = torch.randn(4, 3, D), torch.randn(5, 3, D)
    expected = torch.zeros(4, 5)
    for c, own in enumerate(tasks):
        for t in range(3):
            weight = 1.0 if t == own else 0.3 / 2
            expected[:, c] += weight * F.cosine_similarity(features[:, t], prototypes[c, t], dim=-1)
    torch.testing.assert_close(head(features, prototypes), expected)
    other = SubspaceHead(alpha=0.3)
    other.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(other(features, prototypes), head(features, prototypes))
    for bad in ([0.5], [[0]], [-1]):
        with pytest.raises(ValueError, match="sequence of task ids from 0"):
            head.assign(bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_is_refused_and_leaves_the_bank_as_it_was(dtype: torch.dtype, bad: float, device) -> None:
    bank, *_ = filled(device)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    rows = torch.ones(3, D, dtype=dtype, device=device)
    rows[1, 2] = bad
    for call in (bank.update, lambda rows, classes: bank.set(classes, rows)):
        with pytest.raises(ValueError, match="s must be finite, got inf or NaN"):
            call(rows, torch.tensor([0, 1, 8], device=device))
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
