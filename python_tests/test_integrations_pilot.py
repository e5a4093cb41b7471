"""LAMDA-PILOT, a real checkout or a stand-in, with and without the patch: whole runs, from the same random numbers."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pilot_host as host
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from plora_ext.integrations import _pilot_ease, _pilot_family, _pilot_vit, pilot

SETTINGS = {
    "reset": {},
    "last": {"recalc_sim": False},
    "frozen_too": {"use_init_ptm": True, "beta": 0.3},
    "diagonal": {"use_diagonal": True},
    "plain_cosine": {"use_reweight": False},
    "base_session": {"init_cls": 4},  # and a ragged last task
    "large_base_session": {"init_cls": 6, "increment": 2},  # whose "Task acc" PILOT counts in slices of two classes
    "exemplars": {"use_old_data": True},  # PILOT's own replace_fc
}


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if host.REAL:
        pytest.importorskip("scipy", reason="PILOT needs scipy")
    host.enter(monkeypatch)
    yield
    pilot.unpatch()


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [r.getMessage() for r in caplog.records if "Task correct" in r.getMessage() or "acc" in r.getMessage()]
    caplog.clear()
    return lines


@pytest.mark.parametrize("case", SETTINGS)
def test_ease_runs_are_equal(case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    settings = {**host.EASE, **SETTINGS[case]}
    theirs, their_log = host.learn(settings), logged(caplog)
    with pilot.patch():
        ours, our_log = host.learn(settings), logged(caplog)
    assert our_log == their_log and our_log
    assert ours.curve == theirs.curve and 100 / 9 < theirs.curve[-1] < 100
    for a, b in zip(ours.predictions, theirs.predictions):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(ours.weights, theirs.weights):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


class Replayed:
    """What a graph does to a step, for batches of the first one's size: its results lie where they lay."""

    def __init__(self, function: Any, tried: Any = None) -> None:
        self.function, self.held = function, None

    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        sums, grads = self.function(images, labels)
        if self.held is None:
            self.size, self.held = len(images), (sums.clone(), [None if g is None else g.clone() for g in grads])
        if len(images) != self.size:
            return sums, grads
        for parameter in inspect.getclosurevars(self.function).nonlocals["learned"]:
            parameter.grad = None if parameter.grad is None else torch.full_like(parameter, 9.0)  # another's
        for held, new in zip([self.held[0], *self.held[1]], [sums, *grads]):
            if held is not None:
                held.copy_(new)
        return self.held


@pytest.mark.parametrize("replayed", [False, True])
def test_ease_trains_as_in_pilot(
    replayed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """24 images in batches of ten: every epoch has a ragged batch between two full ones."""
    if replayed:
        monkeypatch.setattr(_pilot_ease, "Captured", Replayed)
    caplog.set_level(logging.INFO)

    def trained() -> tuple[list[str], Tensor, list[list[float]]]:
        learner = host.learn({**host.EASE, "init_epochs": 3, "init_lr": 0.5}, tasks=2)
        vit = learner._network.backbone
        lines = [r.getMessage() for r in caplog.records if "Epoch" in r.getMessage()]
        caplog.clear()
        told = [[float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)] for line in lines]
        weights = torch.cat([p.detach().flatten() for old in vit.adapter_list for p in old.parameters()])
        return [re.sub(r"[\d.]+", "", line) for line in lines], weights, told

    words, theirs, numbers = trained()
    with pilot.patch():
        our_words, ours, our_numbers = trained()
    assert our_words == words and len(words) == 2
    np.testing.assert_allclose(our_numbers, numbers, atol=2e-3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_of_eases_step(caplog: pytest.LogCaptureFixture) -> None:
    """The same weights after batches that are captured, with a ragged one between them; drops and all."""
    caplog.set_level(logging.INFO)
    assert train_some("cuda", caplog) == ["CUDA graph of EASE's step: captured in"]


def train_some(device: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Trains some steps with the patch and without; returns what was said of graphs."""
    learner = host.learn({**host.EASE, "init_lr": 0.5}, tasks=1)
    network = learner._network
    network.update_fc(6)
    learner._device = torch.device(device)
    network.to(device)
    state = {name: t.clone() for name, t in network.state_dict().items()}
    learned = [p for name, p in network.named_parameters() if "cur_adapter" in name or "proxy_fc" in name]
    draw = torch.Generator().manual_seed(5)
    sizes = [8] * 7 + [5] + [8] * 4
    batches = [(None, torch.rand(n, 3, 32, 32, generator=draw), torch.arange(n) % 3 + 3) for n in sizes]
    batches = [(i, images.to(device), labels.to(device)) for i, images, labels in batches]

    def trained() -> Tensor:
        network.load_state_dict(state)
        optimizer = torch.optim.SGD([p.requires_grad_() for p in learned], 0.5, 0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
        torch.manual_seed(4)
        learner._init_train(batches, None, optimizer, scheduler)
        return torch.cat([p.detach().flatten() for p in learned])

    before = torch.cat([p.detach().flatten() for p in learned])
    theirs = trained()
    caplog.clear()
    with pilot.patch():
        ours = trained()
    assert (theirs - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    return [re.sub(r" [0-9.]+ s.*", "", r.getMessage()) for r in caplog.records if "CUDA graph" in r.getMessage()]


def test_the_same_without_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    assert train_some("cpu", caplog) == []


@pytest.mark.parametrize("case", ["reset", "frozen_too"])
def test_logits_and_tokens(case: str) -> None:
    images, ptm = torch.rand(5, 3, 32, 32), case == "frozen_too"

    def after(learner: Any, task: int) -> None:
        network = learner._network.eval()
        vit = network.backbone
        with torch.no_grad():
            theirs = network(images, test=True), vit.forward_test(images, ptm), vit.forward_proto(images, -1)
            with pilot.patch():
                ours = network(images, test=True), vit.forward_test(images, ptm), vit.forward_proto(images, -1)
                for i in range(task + 1):
                    torch.testing.assert_close(vit.forward_proto(images, i), ours[1][i + ptm][:, 0])
        assert len(ours[1]) == len(theirs[1]) == task + 1 + ptm
        for a, b in zip(
            [ours[0]["logits"], ours[0]["features"], *ours[1], ours[2]],
            [theirs[0]["logits"], theirs[0]["features"], *theirs[1], theirs[2]],
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    host.learn({**host.EASE, **SETTINGS[case]}, tasks=3, after=after)


def test_many_adapters_go_in_several_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(5, 3, 32, 32)

    def after(learner: Any, task: int) -> None:
        vit = learner._network.backbone.eval()
        with torch.no_grad(), pilot.patch():
            whole = vit(images, test=True, use_init_ptm=True)
            monkeypatch.setattr(_pilot_vit, "IMAGES", 10)  # two adapters of five images
            torch.testing.assert_close(vit(images, test=True, use_init_ptm=True), whole)

    host.learn(host.EASE, tasks=3, after=after)


def test_autocast_keeps_the_residual_stream_wide() -> None:
    images = torch.rand(5, 3, 32, 32)

    def after(learner: Any, task: int) -> None:
        vit = learner._network.backbone.eval()
        with torch.no_grad():
            exact = vit(images, test=True)
            with torch.autocast("cpu", torch.bfloat16):
                theirs = vit(images, test=True)
                with pilot.patch():
                    ours = vit(images, test=True)
        assert ours.dtype == theirs.dtype
        assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()

    host.learn(host.EASE, tasks=2, after=after)


def test_training_mode_is_pilot_s() -> None:
    def after(learner: Any, task: int) -> None:
        vit, images = learner._network.backbone.train(), torch.rand(2, 3, 32, 32)
        results = []
        for patched in (False, True):
            torch.manual_seed(3)
            if patched:
                with pilot.patch():
                    results.append(vit(images, test=False))
            else:
                results.append(vit(images, test=False))
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)  # the same drops

    host.learn(host.EASE, tasks=1, after=after)


# ---------------------------------------------------------------------- the cache


def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(images, adapters) of every batched forward from here on."""
    seen: list[tuple[int, int]] = []
    original = _pilot_vit.adapter_features

    def counted(vit: nn.Module, images: Tensor, adapters: Any, class_token_only: bool = True) -> list[Tensor]:
        seen.append((len(images), len(adapters)))
        return original(vit, images, adapters, class_token_only)

    for module in (_pilot_vit, _pilot_ease, _pilot_family):
        monkeypatch.setattr(module, "adapter_features", counted)
    return seen


def test_features_of_frozen_adapters_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    per_task = 3 * 4  # test images of a task

    def after(learner: Any, task: int) -> None:
        total = sum(images * adapters for images, adapters in seen)
        assert total == per_task * (task + task + 1) + per_task * 2 * (task + 1)  # evaluation, prototypes
        seen.clear()
        learner._eval_cnn(learner.test_loader)
        assert not seen  # nothing has changed since
        learner._eval_cnn(DataLoader(learner.test_dataset, 5, shuffle=True))
        assert not seen  # images are known by their pixels, wherever they come
        weight = learner._network.backbone.cur_adapter[1].up_proj.weight.data
        weight[2, 1] += 1e-3
        learner._eval_cnn(learner.test_loader)
        assert sum(n * t for n, t in seen) == per_task * (task + 1)  # that adapter alone
        seen.clear()
        with torch.no_grad():  # a change that neither a sum nor one with evenly growing weights shows
            weight.view(-1)[:3] += torch.tensor([1.0, -2.0, 1.0])
        learner._eval_cnn(learner.test_loader)
        assert sum(n * t for n, t in seen) == per_task * (task + 1)
        seen.clear()
        learner._network.backbone.cur_adapter[0].scale *= 2
        learner._eval_cnn(learner.test_loader)
        assert sum(n * t for n, t in seen) == per_task * (task + 1)
        seen.clear()

    with pilot.patch():
        seen = passes(monkeypatch)
        host.learn(host.EASE, tasks=3, after=after)


def test_without_a_cache_and_on_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def after(learner: Any, task: int) -> None:
        first = learner._eval_cnn(learner.test_loader)[0]
        learner.test_dataset.images[0] = 255 - learner.test_dataset.images[0]  # another image in its place
        assert not np.array_equal(learner._eval_cnn(learner.test_loader)[0], first) or task == 0
        pilot.unpatch()
        theirs = learner._eval_cnn(learner.test_loader)[0]
        for cache in (True, False):
            with pilot.patch(cache=cache):
                np.testing.assert_array_equal(learner._eval_cnn(learner.test_loader)[0], theirs)
        pilot.patch()

    with pilot.patch():
        host.learn(host.EASE, tasks=2, after=after)


# ---------------------------------------------------------------------- what PILOT loses


def test_old_adapters_are_part_of_the_state(tmp_path: Path) -> None:
    def names(learner: Any) -> list[str]:
        return [name for name in learner._network.state_dict() if "adapter_list" in name]

    assert not names(host.learn(host.EASE, tasks=2))
    with pilot.patch():
        learner = host.learn(host.EASE, tasks=2)
        saved = learner._network.state_dict()
        assert len(names(learner)) == 2 * 2 * 4
        fresh = host.learn(host.EASE, tasks=1)._network  # has seen one task
        fresh.update_fc(6)
        fresh.load_state_dict(saved)
        images = torch.rand(3, 3, 32, 32)
        torch.testing.assert_close(
            fresh.eval().backbone(images, test=True), learner._network.backbone(images, test=True)
        )


# ---------------------------------------------------------------------- MOS


def test_mos_as_shipped() -> None:
    theirs = host.learn(host.MOS)
    with pilot.patch():
        ours = host.learn(host.MOS)
    for a, b in zip(ours.predictions, theirs.predictions):
        np.testing.assert_array_equal(a, b)
    mine, its = (learner._network.backbone.adapter_list.state_dict() for learner in (ours, theirs))
    assert list(mine) == list(its)
    for name in its:  # moved as often, by testing too
        torch.testing.assert_close(mine[name], its[name], rtol=1e-5, atol=1e-6)


def test_mos_moves_its_adapters_while_testing_and_fixed_does_not() -> None:
    def norms(learner: Any) -> Tensor:
        return torch.stack([p.norm() for p in learner._network.backbone.adapter_list.parameters()])

    def moved(learner: Any) -> bool:
        before = norms(learner)
        learner._eval_cnn(learner.test_loader)
        return not torch.equal(norms(learner), before)

    with pilot.patch():
        assert moved(host.learn(host.MOS, tasks=2))
    with pilot.patch(mos="fixed"):
        learner = host.learn(host.MOS, tasks=2)
        assert not moved(learner)
        first = learner._eval_cnn(learner.test_loader)[0]
        np.testing.assert_array_equal(learner._eval_cnn(learner.test_loader)[0], first)
    with pytest.raises(ValueError, match='"as shipped" or "fixed"'):
        pilot.patch(mos="broken")


# ---------------------------------------------------------------------- PLoRA in PILOT


def test_plora_learns_in_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    host.enter(monkeypatch, per_class=6, size=160)
    settings = {**host.EASE, "model_name": "plora", "backbone_type": "test_vit", "epochs": 2, "num_workers": 0, "r": 4}
    with pilot.patch():
        learner = host.learn(settings, tasks=2)
    assert learner._network.plora.adapters.names == ["task0", "task1"]
    assert learner.predictions[-1].max() < 6 and learner.curve[-1] > 100 / 6
    with pilot.patch(), pytest.raises(ValueError, match="epochs must be a positive integer, got 0"):
        host.learn({**settings, "epochs": 0}, tasks=1)
    from utils import factory

    with pytest.raises(AssertionError):
        factory.get_model("plora", {})  # PILOT's own answer


def test_main_is_pilot_s_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", "--help"])
    with pytest.raises(SystemExit):
        pilot.main()
    assert "--config" in capsys.readouterr().out


# ---------------------------------------------------------------------- patching


def test_patch_and_unpatch() -> None:
    import backbone.linears as linears
    import backbone.vit_ease as vit_ease
    import models.ease as ease

    def functions() -> list[Any]:
        return [
            vars(ease.Learner).get("replace_fc"), vars(ease.Learner).get("_eval_cnn"),
            vars(linears.EaseCosineLinear).get("forward_reweight"),
            vars(vit_ease.VisionTransformer).get("_load_from_state_dict"),
        ]  # fmt: skip

    theirs = functions()
    assert theirs[3] is None  # inherited
    with pilot.patch(), pilot.patch():
        assert all(mine is not its for mine, its in zip(functions(), theirs))
    assert all(mine is its for mine, its in zip(functions(), theirs))


def test_a_checkout_without_mos(monkeypatch: pytest.MonkeyPatch) -> None:
    import models.mos

    monkeypatch.delattr(models.mos, "Learner")
    with pytest.warns(UserWarning, match="models.mos:Learner._eval_cnn") as caught, pilot.patch() as patch:
        assert "models.ease:Learner._eval_cnn" in patch.report.replaced
    assert len(caught) == 1
