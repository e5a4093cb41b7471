"""The learner of tasks as they come: it learns what the loop learns, takes data of all kinds, comes back."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_cil_methods
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cil_methods import CLASSES, backbone
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Dataset, TensorDataset

from plora_ext.cil import (
    Callback,
    Head,
    Images,
    Learner,
    Settings,
    register_alignment,
    register_backbone,
    register_head,
    register_method,
    run,
)
from plora_ext.cil.checkpoint import Checkpoint
from plora_ext.cil.methods import PLoRAFused
from plora_ext.cil.registry import ALIGNMENTS, BACKBONES, HEADS, METHODS
from plora_ext.cil.trained import Trained
from plora_ext.data import Backbone
from plora_ext.data.images import doubles
from plora_ext.data.inputs import read_labelled

images = test_cil_methods.images
QUICK: dict[str, Any] = {
    "r": 4, "epochs": 2, "batch_size": 16, "lr": 5e-3, "device": "cpu", "projections": 100, "replay_epochs": 3
}  # fmt: skip
KINDS: list[dict[str, Any]] = [
    {}, {"head": "gaussian"}, {"head": "ranpac"}, {"method": "plora-ensemble"}, {"method": "lora-first"},
    {"method": "lora-sequential"}, {"method": "aper", "head": "gaussian"}, {"method": "simplecil"},
    {"fusion": "newest", "init": "newest", "lr_later": 1e-3}, {"fusion": "learned"},
    {"fusion": "sum", "onto": "fused", "init": "inflora"}, {"lora_dropout": 0.1, "target_modules": ["q", "v"]},
]  # fmt: skip


def tasks(images: Images, train: bool, names: list[Any] | None = None) -> list[tuple[np.ndarray, list[Any]]]:
    """The images of two classes each, and their labels, by `names`."""
    pixels, labels = (images.train_images, images.train_labels) if train else (images.test_images, images.test_labels)
    names = names or list(range(CLASSES))
    parts = [np.flatnonzero(labels // 2 == t) for t in range(3)]
    return [(pixels[rows], [names[c] for c in labels[rows]]) for rows in parts]


def learner(**settings: Any) -> Learner:
    return Learner(backbone=backbone(), **{**QUICK, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_the_loop_learns(kind: dict[str, Any], images: Images) -> None:
    settings = Settings(**{**QUICK, **kind, "increment": 2, "class_order": "none"})
    result = run(settings, data=images, backbone=backbone())
    ours = Learner(settings, backbone=backbone(), num_tasks=3)
    pixels, labels = [], []
    for t, (train, test) in enumerate(zip(tasks(images, True), tasks(images, False))):
        state = torch.get_rng_state(), random.getstate()
        figures = ours.fit(train).evaluate((np.concatenate([*pixels, test[0]]), [*labels, *test[1]]))
        assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
        pixels.append(test[0])
        labels += test[1]
        assert figures["accuracy"] == result.curve[t]
        assert figures["task_accuracies"] == result.matrix[t]
    assert torch.equal(ours.method.prototypes, result.learner.method.prototypes)  # type: ignore[arg-type]
    assert ours.classes == result.learner.classes == list(range(CLASSES)) and ours.task_sizes == [2, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_brought_back(kind: dict[str, Any], images: Images, tmp_path: Path) -> None:
    """It predicts the same, and goes on learning as if it had not been away."""
    names = ["ant", "bee", "cat", "dog", "eel", "fox"]
    one = learner(**kind, num_tasks=3)
    train, test = tasks(images, True, names), images.test_images
    for part in train[:2]:
        one.fit(part)
    one.save_pretrained(tmp_path / "it")
    two = Learner.from_pretrained(tmp_path / "it", backbone=backbone(), device="cpu")
    assert two.classes == names[:4] and two.settings.method == one.settings.method
    assert (two.predict(test) == one.predict(test)).all()
    for mine, other in zip(one.scores(test), two.scores(test)):
        assert np.array_equal(mine, other)
    for each in (one, two):
        each.fit(train[2])
    assert set(one.predict(test)) <= set(names) and np.array_equal(one.scores(test)[1], two.scores(test)[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it"]
    kinds = {p.suffix for p in (tmp_path / "it").rglob("*") if p.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_its_adapters_are_peft_s(images: Images, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    one = learner(method="lora-first").fit(tasks(images, True)[0])
    one.save_pretrained(tmp_path / "it")
    model = peft.PeftModel.from_pretrained(backbone().model, tmp_path / "it" / "adapters" / "task0").eval()
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x), one.trainer.model(x))
    held = load_file(tmp_path / "it" / "learner.safetensors")
    assert torch.equal(held["/method/prototypes"], one.method.prototypes)  # type: ignore[arg-type]


def test_a_folder_is_replaced_whole_or_not_at_all(
    images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts, folder = tasks(images, True), tmp_path / "it"
    one = learner(method="simplecil").fit(parts[0])
    one.save_pretrained(folder)
    one.fit(parts[1]).save_pretrained(folder)
    assert Learner.from_pretrained(folder, backbone=backbone()).classes == [0, 1, 2, 3]
    monkeypatch.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        one.fit(parts[2]).save_pretrained(folder)
    monkeypatch.undo()
    assert Learner.from_pretrained(folder, backbone=backbone()).classes == [0, 1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="mine holds something else than a learner"):
        one.save_pretrained(tmp_path / "mine")
    one.save_pretrained(folder / "second")  # a learner within: it would go with the folder
    with pytest.raises(FileExistsError, match="it holds something else than a learner"):
        one.save_pretrained(folder)
    assert Learner.from_pretrained(folder / "second", backbone=backbone()).classes == [0, 1, 2, 3, 4, 5]
    shutil.rmtree(folder / "second")
    replace, stops = os.replace, [tmp_path / "it"]

    def cut(source: Path, target: Path) -> None:
        if target in stops:  # between the earlier one's going and the new one's coming
            stops.clear()
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        one.save_pretrained(folder)
    monkeypatch.undo()
    assert Learner.from_pretrained(folder, backbone=backbone()).classes == [0, 1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it", "mine"]
    monkeypatch.chdir(folder)
    with pytest.raises(FileExistsError, match="it is the working directory, which cannot be replaced"):
        one.save_pretrained(".")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    one.save_pretrained("link")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it", "link", "mine"] and Path("link").is_symlink()
    assert Learner.from_pretrained("it", backbone=backbone()).classes == [0, 1, 2, 3, 4, 5]


def test_what_cannot_be_brought_back_is_said(images: Images, tmp_path: Path) -> None:
    one = learner(method="simplecil")
    with pytest.raises(RuntimeError, match="no task yet, or one was cut short: call fit"):
        one.save_pretrained(tmp_path / "it")
    one.fit(tasks(images, True)[0]).save_pretrained(tmp_path / "it")
    with pytest.raises(ValueError, match="backbone of its own: give that as backbone"):
        Learner.from_pretrained(tmp_path / "it")
    other = backbone()
    next(other.model.parameters()).data += 1
    with pytest.raises(ValueError, match="weights are not those with which"):
        Learner.from_pretrained(tmp_path / "it", backbone=other)
    with pytest.raises(ValueError, match=r"input \(size, mean, std\) must be \[16, \[0.5.*, got \[16, \[0.25"):
        Learner.from_pretrained(tmp_path / "it", backbone=backbone()._replace(mean=[0.25] * 3))
    with pytest.raises(ValueError, match="lr cannot differ"):
        Learner.from_pretrained(tmp_path / "it", backbone=backbone(), lr=1.0)
    with pytest.raises(FileNotFoundError, match=r"learner\.json is missing"):
        Learner.from_pretrained(tmp_path)
    path = tmp_path / "it" / "learner.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(ValueError, match=r"it cannot be read .*has format 7, of plora_ext .*; this one reads 1"):
        Learner.from_pretrained(tmp_path / "it", backbone=backbone())
    for name in ("learner.safetensors", "learner.json"):
        whole = (tmp_path / "it" / name).read_bytes()
        (tmp_path / "it" / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="it cannot be read as a learner"):
            Learner.from_pretrained(tmp_path / "it", backbone=backbone())
        (tmp_path / "it" / name).write_bytes(whole)
    path.write_text("{")
    with pytest.raises(ValueError, match="it cannot be read as a learner"):
        Learner.from_pretrained(tmp_path / "it", backbone=backbone())


@contextlib.contextmanager
def default_device(kind: str) -> Iterator[None]:
    torch.set_default_device(kind)
    try:
        yield
        assert torch.get_default_device().type == kind
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("head", ["cosine", "gaussian", "ranpac"])
def test_it_learns_the_same_whatever_its_caller_has_switched(head: str, images: Images, tmp_path: Path) -> None:
    settings = Settings(**{**QUICK, "head": head, "increment": 2, "class_order": "sorted"})
    expected = run(settings, data=images, backbone=backbone())
    autocast = torch.autocast("cpu", torch.bfloat16)
    dtype, device = default_dtype(torch.float64), default_device("meta")
    for switched in (torch.no_grad(), torch.inference_mode(), dtype, device, autocast):
        models = backbone(), backbone(), backbone()
        with switched:
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            curve = run(settings, data=images, backbone=models[0]).curve
            ours = Learner(settings, backbone=models[1])
            for task in tasks(images, True):
                ours.fit(task)
            figures = ours.evaluate((images.test_images, images.test_labels))
            ours.save_pretrained(tmp_path / "it")
            again = Learner.from_pretrained(tmp_path / "it", backbone=models[2], device="cpu")
            assert np.array_equal(again.scores(images.test_images)[1], ours.scores(images.test_images)[1])
            assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        assert curve == expected.curve and figures["accuracy"] == curve[-1]
        assert torch.equal(ours.method.prototypes, expected.learner.method.prototypes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["simplecil", "plora"])
def test_a_backbone_of_another_dtype_is_named(method: str, dtype: torch.dtype, images: Images) -> None:
    given = backbone()
    given.model.to(dtype)
    one = Learner(backbone=given, **QUICK, method=method)
    with pytest.raises(ValueError, match=f"takes no images of float32, its parameters are {dtype}: call its float"):
        one.fit(tasks(images, True)[0])


@pytest.mark.parametrize("method", ["simplecil", "plora"])
def test_a_backbone_that_carries_adapters_is_refused(method: str, images: Images) -> None:
    """What an earlier run has trained into it would count as the frozen model."""
    given = backbone()
    run(Settings(**QUICK, increment=2), data=images, backbone=given)
    with pytest.raises(ValueError, match="the backbone carries adapters already"):
        run(Settings(**QUICK, increment=2, method=method), data=images, backbone=given)


def test_a_learner_without_adapters_sees_those_of_another_one(images: Images) -> None:
    """Features were those of the other learner's model, and the prototypes those of before, without a word."""
    given, (first, *_) = backbone(), tasks(images, True)
    one = Learner(method="simplecil", backbone=given, **QUICK).fit(first)
    one.predict(first[0])
    Learner(backbone=given, **QUICK).fit(first)
    with pytest.raises(ValueError, match="the backbone carries adapters already"):
        one.predict(first[0])


class Odd(torch.nn.Module):
    """A backbone of one layer, and what `change` makes of its tokens [B, 16, 8]."""

    def __init__(self, change: Callable[[torch.Tensor], Any], before: Callable[[torch.Tensor], Any] = lambda x: x):
        super().__init__()
        self.proj, self.change, self.before = torch.nn.Linear(48, 8), change, before

    def forward(self, x: torch.Tensor) -> Any:
        patches = torch.nn.functional.unfold(self.before(x), 4, stride=4)
        return self.change(self.proj(patches.transpose(1, 2)))


@pytest.mark.parametrize("method", ["plora", "plora-ensemble", "simplecil"])
def test_what_a_backbone_must_give(method: str, images: Images) -> None:
    first, second, *_ = tasks(images, True)

    def fitted(*made: Any, **changes: Any) -> Learner:
        given = Backbone(Odd(*made), 16, [0.5] * 3, [0.5] * 3)
        return Learner(backbone=given, method=method, target_modules=["proj"], **{**QUICK, **changes}).fit(first)

    for change, error, message in (
        (lambda t: t, ValueError, r"must give features \[40, D\] of 40 images, got \[40, 16, 8\]: pool them"),
        (lambda t: t.mean((1, 2)), ValueError, r"must give features \[40, D\] of 40 images, got \[40\]"),
        (lambda t: (t.mean(1), t), TypeError, "must (give|return) one tensor( of features)?, got tuple"),
    ):
        with pytest.raises(error, match=message):
            fitted(change)
    if method == "simplecil":
        fitted(lambda t: t.detach().mean(1))
        return
    with pytest.raises(ValueError, match="the backbone gives its adapters no gradient"):
        fitted(lambda t: t.detach().mean(1))  # the classifier alone trained
    if method == "plora":
        with pytest.raises(ValueError, match="the backbone must give its images a gradient, or else sought be 0"):
            fitted(lambda t: t.mean(1), lambda x: x.detach()).fit(second)
        fitted(lambda t: t.mean(1), lambda x: x.detach(), sought=0).fit(second)


def test_two_items_are_a_data_set(images: Images) -> None:
    """They were taken as images and labels, as two lists are."""
    pixels, labels = images.train_images, [3, 8]
    for two in (list(zip(pixels[:2], labels)), ((pixels[0], np.int64(3)), (pixels[1], torch.tensor(8)))):
        found, given = read_labelled(two)
        assert given == labels and np.array_equal(np.stack(list(found)), pixels[:2])
    for pair in ((list(pixels[:2]), labels), [tuple(pixels[:2]), tuple(labels)], (pixels[:2], labels)):
        found, given = read_labelled(pair)
        assert given == labels and np.array_equal(np.stack(list(found)), pixels[:2])


def test_a_backbone_with_a_classifier_is_refused() -> None:
    """Its logits would be taken as features."""
    given = backbone()
    given.model.reset_classifier(7)
    with pytest.raises(ValueError, match="the backbone has a classifier of 7 classes"):
        Learner(backbone=given, **QUICK)
    vit = given.model
    vit.forward = lambda x: vit.forward_head(vit.forward_features(x), pre_logits=True)  # gives features all the same
    Learner(backbone=given, **QUICK)
    given = backbone()
    given.model.reset_classifier(7)
    given.model.reset_classifier(0)
    Learner(backbone=given, **QUICK)


def test_a_backbone_is_evaluated_in_all_its_parts(images: Images) -> None:
    vit = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, proj_drop_rate=0.5
    )
    scores = []
    for mode in (False, True):
        given = backbone()._replace(model=copy.deepcopy(vit).eval())
        given.model.blocks.train(mode)
        one = Learner(backbone=given, **QUICK, method="simplecil").fit(tasks(images, True)[0])
        scores.append(one.scores(images.test_images)[1])
    assert np.array_equal(*scores)


def test_a_backbone_made_where_nothing_trains_is_refused() -> None:
    with torch.inference_mode():
        given = backbone()
    with pytest.raises(ValueError, match="the backbone was made under torch.inference_mode"):
        Learner(backbone=given, **QUICK)


@pytest.mark.filterwarnings("ignore:nothing is shared by the adapters")
@pytest.mark.parametrize("method", ["plora", "plora-ensemble", "simplecil"])
def test_prototypes_that_are_not_finite_are_refused(
    method: str, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = backbone()
    torch.nn.init.constant_(spoilt.model.norm.weight, float("inf"))
    one = Learner(backbone=spoilt, **QUICK, method=method)
    monkeypatch.setattr(one.trainer, "fit", lambda *given: None)  # which would see it first
    with pytest.raises(FloatingPointError, match="features of task 0 are not finite"):
        one.fit(tasks(images, True)[0])


def test_a_fit_that_failed_leaves_no_half_learner(images: Images, tmp_path: Path) -> None:
    class Stop(Callback):
        def epoch(self, number: int, loss: float) -> None:
            raise KeyboardInterrupt

    one = learner(callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        one.fit(tasks(images, True)[0])
    with pytest.raises(RuntimeError, match="an earlier fit was cut short"):
        one.fit(tasks(images, True)[0])
    with pytest.raises(RuntimeError, match="or one was cut short"):
        one.save_pretrained(tmp_path / "it")


def test_a_fit_that_failed_leaves_nothing_to_predict_by(images: Images) -> None:
    """The model trained on, its prototypes are of before: answers would be others than a moment ago, without a word."""

    class Stop(Callback):
        def epoch(self, number: int, loss: float) -> None:
            if number > QUICK["epochs"]:
                raise KeyboardInterrupt

    one, (first, second, _) = learner(callbacks=[Stop()]), tasks(images, True)
    one.fit(first)
    assert one.evaluate(first)["accuracy"] > 50
    with pytest.raises(KeyboardInterrupt):
        one.fit(second)
    for ask in (lambda: one.predict(first[0]), lambda: one.evaluate(first), lambda: one.best(first[0], 2)):
        with pytest.raises(RuntimeError, match="an earlier fit was cut short within its task"):
            ask()


def test_threads_take_turns(images: Images) -> None:
    """Adapters are merged into the model for a pass: those of another thread would be of half of it."""
    one, (first, second, _) = learner(head="gaussian"), tasks(images, True)
    one.fit(first)
    expected = one.scores(images.test_images)[1]
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: one.scores(images.test_images)[1], range(12)):
            assert np.array_equal(scores, expected)
        learned = pool.submit(one.fit, second)
        while not one._cut_short and not learned.done():
            time.sleep(1e-4)
        found = pool.submit(one.predict, second[0]).result()
        assert learned.result() is one and set(found) & {2, 3}
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert np.array_equal(again.scores(images.test_images)[1], one.scores(images.test_images)[1])


class Pauses(Callback):
    """Its first epoch ends when it is let go on, or after a second."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.reached, self.go_on = threading.Event(), threading.Event()

    def epoch(self, number: int, loss: float) -> None:
        self.losses.append(loss)
        if not self.reached.is_set():
            self.reached.set()
            self.go_on.wait(1)


def test_a_fit_waits_for_that_of_another_thread(images: Images) -> None:
    pauses, (first, second, _) = Pauses(), tasks(images, True)
    one = learner(callbacks=[pauses])
    with ThreadPoolExecutor(2) as pool:
        learning = pool.submit(one.fit, first)
        assert pauses.reached.wait(60)
        waiting = pool.submit(one.fit, second)
        learning.result(), waiting.result()
    again = learner()
    again.fit(first), again.fit(second)
    assert one.classes == again.classes == [0, 1, 2, 3] and one.task_sizes == [2, 2]
    assert np.array_equal(one.scores(images.test_images)[1], again.scores(images.test_images)[1])


def test_learners_of_several_threads_draw_their_own_numbers(images: Images) -> None:
    """Where one paused in the other's epochs, both would go on with its generators."""
    (first, *_), one, other = tasks(images, True), Pauses(), Pauses()
    learners = learner(callbacks=[one]), learner(callbacks=[other], seed=3)
    with ThreadPoolExecutor(2) as pool:
        learning = pool.submit(learners[0].fit, first)
        assert one.reached.wait(60)
        beside = pool.submit(learners[1].fit, first)
        other.reached.wait(0.5)
        one.go_on.set()
        learning.result(), other.go_on.set(), beside.result()
    for pauses, changes in ((one, {}), (other, {"seed": 3})):
        alone = Pauses()
        alone.go_on.set()
        learner(callbacks=[alone], **changes).fit(first)
        assert pauses.losses == alone.losses


def test_a_run_s_learner_goes_on(images: Images, tmp_path: Path) -> None:
    """Its checkpoint and its figures stay those of the run."""
    few = Images(*(part[labels < 4] for part, labels in (
        (images.train_images, images.train_labels), (images.train_labels, images.train_labels),
        (images.test_images, images.test_labels), (images.test_labels, images.test_labels))))  # fmt: skip
    settings = Settings(**QUICK, increment=2)
    result = run(settings, data=few, backbone=backbone(), checkpoint=Checkpoint(tmp_path))
    seconds, files = dict(result.seconds), {p.name: p.read_bytes() for p in (tmp_path / "checkpoint").iterdir()}
    result.learner.fit(tasks(images, True)[2])
    assert sorted(result.learner.classes) == list(range(6)) and result.learner.task_sizes == [2, 2, 2]
    assert result.seconds == seconds
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoint").iterdir()} == files


def test_the_learner_of_a_run_s_folder(images: Images, registered: None, tmp_path: Path) -> None:
    register_backbone("tiny")(lambda *_: backbone())
    settings = Settings(**QUICK, increment=2, backbone="tiny", class_order="sorted")
    result, learned = (
        run(settings, data=images, checkpoint=Checkpoint(tmp_path)),
        (images.test_images, images.test_labels),
    )
    again = Trained(tmp_path).learner
    assert again.evaluate(learned) == {"accuracy": result.curve[-1], "task_accuracies": result.matrix[-1]}
    more = images.train_images[:40], [7] * 20 + [8] * 20
    for each in (again, result.learner):
        each.fit(more)
    assert np.array_equal(again.scores(learned[0])[1], result.learner.scores(learned[0])[1])


# ---------------------------------------------------------------------- data


class Pairs(Dataset):
    """(image, label) by `form`."""

    def __init__(self, pixels: np.ndarray, labels: list[Any], form: Any):
        self.pixels, self.labels, self.form = pixels, labels, form

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.form(self.pixels[index]), self.labels[index]


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


class Table:
    """As much of a Hugging Face data set as is used."""

    def __init__(self, pixels: np.ndarray, labels: list[Any]):
        self.columns = {"id": [1.5] * len(labels), "img": [Image.fromarray(p) for p in pixels], "label": labels}
        self.column_names = list(self.columns)

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, key: Any) -> Any:
        return self.columns[key] if isinstance(key, str) else {name: c[key] for name, c in self.columns.items()}


def in_folder(pixels: np.ndarray, labels: list[Any], root: Path) -> Path:
    for i, (image, label) in enumerate(zip(pixels, labels)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / str(label) / f"{i:03}.png")
    return root


def test_data_of_every_kind_is_the_same_data(images: Images, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    pixels, labels = tasks(images, True, names)[1]
    order = np.argsort(labels, kind="stable")  # as folders are read
    pixels, labels, test = pixels[order], [labels[i] for i in order], images.test_images

    def scores(data: Any, given: Any = test) -> np.ndarray:
        return learner(workers=0, augment=False).fit(data).scores(given)[1]

    expected = scores((pixels, labels))
    given = {
        "pil": Pairs(pixels, labels, Image.fromarray),
        "tensors": Pairs(pixels, labels, as_tensor),
        "arrays": Pairs(pixels, labels, np.asarray),
        "hugging face": Table(pixels, labels),
        "folder": in_folder(pixels, labels, tmp_path / "train"),
        "labels as an array": (pixels, np.array(labels)),
    }
    for name, data in given.items():
        np.testing.assert_array_equal(scores(data), expected, name)
    in_folder(test, ["all"] * len(test), tmp_path / "test")
    for more in ([Image.fromarray(p) for p in test], str(tmp_path / "test"), Table(test, [0] * len(test))):
        np.testing.assert_array_equal(scores((pixels, labels), more), expected)


def test_labels_of_a_data_set_are_those_of_its_items(images: Images) -> None:
    """torchvision keeps in `targets` what labels were before `target_transform`."""
    pixels, labels = tasks(images, True)[0]
    data: Any = Pairs(pixels, [label + 100 for label in labels], Image.fromarray)
    data.targets, data.target_transform = labels, lambda label: label + 100
    assert learner(method="simplecil").fit(data).classes == [100, 101]
    data.target_transform = None  # and a class of one's own may change labels in its items
    assert learner(method="simplecil").fit(data).classes == [100, 101]
    data.targets = labels[:3]
    assert learner(method="simplecil").fit(data).classes == [100, 101]
    data.targets = [{"boxes": []}] * len(labels)
    assert learner(method="simplecil").fit(data).classes == [100, 101]
    data.targets, read = [label + 100 for label in labels], []
    data.form = lambda pixels: read.append(1) or Image.fromarray(pixels)
    read_labelled(data)
    assert len(read) < 10 < len(labels)
    data.labels = [*data.labels]
    data.labels[1] = 7  # a place that is not looked at: a label of noise was learned as its target
    with pytest.raises(ValueError, match="targets must be the labels of its items, got 100 for item 1 of label 7"):
        learner(method="simplecil", workers=0).fit(data)


def test_a_data_set_that_changes_its_images_is_read_every_time(images: Images) -> None:
    pixels, labels = tasks(images, True)[0]
    read: list[int] = []

    def flipped(image: np.ndarray) -> np.ndarray:
        read.append(1)
        return image[:, ::-1] if torch.rand(()) < 0.5 else image

    def plain(image: np.ndarray) -> np.ndarray:
        read.append(1)
        return image

    numbers = []
    for form in (flipped, plain):
        read.clear()
        learner(epochs=4, workers=0).fit(Pairs(pixels, labels, form))
        numbers.append(len(read))
    assert numbers[0] > 4 * len(labels) and numbers[1] < 3 * len(labels)
    with torch.random.fork_rng():
        for number in (1, 2, 40):  # of two, half of the images were taken for constant
            few = Pairs(pixels[:number], labels[:number], flipped)
            torch.manual_seed(0)
            assert not any(read_labelled(few)[0].repeats() for _ in range(30))  # type: ignore[union-attr]
    read.clear()
    learner(epochs=1, workers=0).fit((pixels, labels)).predict([plain(image) for image in pixels[:3]])
    assert len(read) == 3


def test_arrays_of_more_bits_and_turned_round(images: Images) -> None:
    """64 bits that hold 0 ... 255 became black without a word; torch takes no array turned round."""
    pixels, labels = tasks(images, True)[0]
    with pytest.warns(UserWarning, match="the first image's values reach 1 of 255 at most: scale them to 8 bits"):
        learner(method="simplecil", workers=0).fit(([p.astype(np.int64) for p in pixels], labels))
    turned = learner(method="simplecil").fit((pixels[..., ::-1], labels)).scores(pixels[..., ::-1])
    copied = learner(method="simplecil").fit((pixels[..., ::-1].copy(), labels)).scores(pixels[..., ::-1].copy())
    assert np.array_equal(turned[1], copied[1])
    assert doubles(Images(pixels[..., ::-1], np.array(labels), pixels[:3, :, :, ::-1], np.array(labels[:3]))) == 3


def test_a_real_hugging_face_data_set(images: Images) -> None:
    datasets = pytest.importorskip("datasets")
    pixels, labels = tasks(images, True)[0]
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(p) for p in pixels], "label": labels})
    ours, theirs = (learner(method="simplecil").fit(data) for data in ((pixels, labels), table))
    np.testing.assert_array_equal(ours.scores(pixels)[1], theirs.scores(table)[1])


def test_images_of_many_sizes(images: Images) -> None:
    pixels, labels = tasks(images, True)[0]
    sizes = [pixels[i, : 10 + i % 5] for i in range(len(pixels))]
    one = learner(method="simplecil", workers=0).fit((sizes, labels))
    assert set(one.predict(sizes)) == {0, 1}


def test_labels_stay_the_user_s(images: Images) -> None:
    one = learner(method="simplecil")
    for part, names in zip(tasks(images, True), ([70, -3], [5, 900], [1, 2])):
        one.fit((part[0], [names[c % 2] for c in part[1]]))
    assert one.classes == [-3, 70, 5, 900, 1, 2] and set(one.predict(images.test_images)) <= set(one.classes)
    figures = one.evaluate((images.test_images[:10], [70] * 10))
    assert figures["task_accuracies"][1:] == [None, None] and figures["accuracy"] == figures["task_accuracies"][0]


def test_bad_input(images: Images, tmp_path: Path) -> None:
    one, (pixels, labels) = learner(method="simplecil"), tasks(images, True)[0]
    for data, message in [
        ((pixels, labels[1:]), "labels must be one an image, got 39 labels for 40 images"),
        ((pixels / 255, labels), r"images must be uint8 \[N, H, W, 3\], got float64"),
        ((pixels[:0], []), "labels must be one an image"),
        (3, "data must be a pair .*, got int"),
        ((pixels, 3), "labels must be one an image, got 3"),
        ((pixels, [1, "a"] * 20), "must be all numbers or all texts"),
        (TensorDataset(torch.zeros(2, 5), torch.zeros(2)), r"an image must be a PIL image, .* got Tensor \[5\]"),
        (Table(pixels, [None] * 40), "one column of labels, got none"),
        ((np.zeros((2, 0, 5, 3), np.uint8), [0, 1]), r"images must be uint8 .*, got uint8 \[2, 0, 5, 3\]"),
        (([np.zeros((0, 5, 3), np.uint8)], [0]), r"an image must be .*, got ndarray \[0, 5, 3\]"),
        ({"image": pixels, "label": labels}, "data must be a pair .*, got dict"),
        ((pixels, [1.0, float("nan")] * 20), "labels must be numbers or texts, got nan"),
        ((pixels, [1.0, float("inf")] * 20), "labels must be numbers or texts, got inf"),
        ((pixels, [None] * 40), "labels must be numbers or texts, got None"),
        ((pixels, [(0, "cat")] * 40), r"labels must be numbers or texts, got \(0, 'cat'\)"),  # no JSON gives them back
        ([{"image": pixels[0], "label": 0}] * 3, r"a torch Dataset of \(image, label\), .* got list of dict"),
        (SimpleNamespace(column_names={"train": [], "test": []}), "has splits, train, test: give one of them"),
        (SimpleNamespace(column_names=["image"]), "must be loaded whole, without streaming, got SimpleNamespace"),
    ]:
        with pytest.raises(ValueError, match=message):
            one.fit(data)
    for data, message in [(tmp_path / "gone", "is no folder"), (tmp_path, "a folder of images for each class")]:
        with pytest.raises(FileNotFoundError, match=message):
            one.fit(data)
    with pytest.raises(RuntimeError, match="call fit first"):
        one.predict(pixels)
    one.fit((pixels, labels))
    with pytest.raises(ValueError, match="an image must be .*, got a tuple of ndarray, int"):
        one.predict([(image, 0) for image in pixels])  # items of a data set
    with pytest.raises(ValueError, match="an image must be .*, got the text 'ant.png'"):
        one.predict(["ant.png"])
    with pytest.raises(ValueError, match="0 was learned before"):
        one.fit((pixels, labels))
    with pytest.raises(ValueError, match="all numbers or all texts, in every task the same"):
        one.fit((pixels, ["a", "b"] * 20))  # predictions would be texts, "0" for 0
    with pytest.raises(ValueError, match="label 5, which no task has brought"):
        one.evaluate((pixels, [5] * 40))
    with pytest.raises(ValueError, match="at least one image, got none"):
        one.predict(pixels[:0])
    (tmp_path / "both" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds train and not classes"):
        one.fit(tmp_path / "both")
    for split in ("train", "valid"):
        (tmp_path / "both" / split / "ant").mkdir(parents=True)
        Image.fromarray(pixels[0]).save(tmp_path / "both" / split / "ant" / "0.png")
    with pytest.raises(ValueError, match="holds train, valid and not classes"):
        one.fit(tmp_path / "both")
    with pytest.raises(TypeError, match="settings must be Settings, .*got str"):
        Learner("run.yaml")  # type: ignore[arg-type]
    for number in (None, 0):
        with pytest.raises(ValueError, match=f"give num_tasks, got {number}"):
            learner(fusion="sum", onto="fused", init="inflora", num_tasks=number)
    told = learner(fusion="sum", onto="fused", init="inflora", num_tasks=1).fit((pixels, labels))
    with pytest.raises(ValueError, match="room for num_tasks 1, and all are learned"):
        told.fit((pixels, [label + 2 for label in labels]))
    one.trainer.model.norm.bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="got nan for image 0: its features are not finite"):
        one.predict(pixels)  # all were of the first class
    spoilt = backbone()
    torch.nn.init.constant_(spoilt.model.norm.weight, float("inf"))  # as where 16 bits overflow
    with pytest.raises(FloatingPointError, match="features of task 0 are not finite; .* the backbone's weights$"):
        Learner(backbone=spoilt, **QUICK, method="simplecil").fit((pixels, labels))
    with pytest.raises(ValueError, match="image_size must be 16, the given backbone's, got 32"):
        learner(image_size=32)  # images had 16 pixels all the same
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        one.best(pixels, 0)
    for mean in ([127.0] * 3, [0.5]):  # those of pixels up to 255 cost half of the accuracy
        with pytest.raises(ValueError, match=rf"mean must be three numbers, .*, got \{mean}"):
            Learner(backbone=backbone()._replace(mean=mean), **QUICK)
    with pytest.raises(ValueError, match=r"image_size must be the pixels of a side, .*, got \(16, 16\)"):
        Learner(backbone=backbone()._replace(image_size=(16, 16)), **QUICK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown setting 'metod'; did you mean 'method'"):
        Learner(metod="plora")
    joint = learner(method="joint").fit((pixels, labels))
    with pytest.raises(ValueError, match="fit it once"):
        joint.fit(tasks(images, True)[1])


# ---------------------------------------------------------------------- a user's own


@pytest.fixture
def registered() -> Any:
    """Whatever a test registers is gone after it."""
    before = [dict(of) for of in (METHODS, HEADS, ALIGNMENTS, BACKBONES)]
    yield
    for of, was in zip((METHODS, HEADS, ALIGNMENTS, BACKBONES), before):
        of.clear()
        of.update(was)


class Euclid(Head):
    def __call__(self, features: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(features, prototypes)


def test_registered_names_are_choices_and_are_used(images: Images, registered: None, tmp_path: Path) -> None:
    called: list[str] = []
    register_head("euclid")(Euclid)

    @register_method("mine")
    class Mine(PLoRAFused):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.sizes: list[int] = []
            self.memory: dict[str, torch.Tensor] = {}

        def learn(self, *args: Any) -> None:
            called.append("method")
            super().learn(*args)
            self.sizes.append(len(args[2]))
            self.memory[str(len(self.sizes))] = args[2]

    @register_alignment("half", linear=True)
    def half(drift: Any) -> torch.Tensor:
        called.append("alignment")
        return (drift.prototypes.double() @ (drift.map() + torch.eye(32)) / 2).float()

    @register_backbone("tiny")
    def tiny(pretrained: bool, weights: str | None, image_size: int | None) -> Any:
        called.append("backbone")
        return backbone()

    own: dict[str, Any] = {"method": "mine", "head": "euclid", "alignment": "half", "backbone": "tiny"}
    settings = Settings(**QUICK, **own, increment=2, seed=3)
    checkpoint = Checkpoint(tmp_path / "run")
    result = run(settings, data=images, checkpoint=checkpoint)
    assert called == ["backbone", "method", "method", "alignment", "method", "alignment"]
    again = Trained(tmp_path / "run")  # as `plora-ext predict` does
    assert type(again.method) is Mine and type(again.method.head) is Euclid
    found = [p["class"] for p in again.predict(images.test_images)]
    assert found == result.learner.predict(images.test_images).tolist()
    result.learner.save_pretrained(tmp_path / "it")
    saved = Learner.from_pretrained(tmp_path / "it")
    assert saved.predict(images.test_images).tolist() == found
    for method in (again.method, saved.method):  # attributes that nobody has named
        assert method.sizes == [40, 40, 40] and torch.equal(method.memory["3"], result.learner.method.memory["3"])
    mine = METHODS.pop("mine")
    with pytest.raises(ValueError, match="a user's own must be registered first, .*: unknown method 'mine'"):
        Learner.from_pretrained(tmp_path / "it")
    METHODS["mine"] = mine
    with pytest.raises(ValueError, match="head 'cosine' is taken"):
        register_head("cosine")(Euclid)
    register_head("euclid")(Euclid)  # a cell of a notebook, run again
    with pytest.raises(ValueError, match="unknown head 'euclit'; did you mean 'euclid'"):
        Settings(head="euclit")


def test_what_is_not_registered_is_not_saved(images: Images, registered: None, tmp_path: Path) -> None:
    class Mine(PLoRAFused):
        pass

    one = learner(make=Mine).fit(tasks(images, True)[0])
    with pytest.raises(
        ValueError, match=r'method .*Mine is not registered, .*: write @register_method\("name"\) above'
    ):
        one.save_pretrained(tmp_path / "it")
    two = learner().fit(tasks(images, True)[0])
    two.method.head = Euclid(two.settings, torch.device("cpu"))
    with pytest.raises(ValueError, match=r'head Euclid is not registered, .*@register_head\("name"\).* head="name"'):
        two.save_pretrained(tmp_path / "it")
    assert not list(tmp_path.iterdir())


PLUGIN = """
import torch
from plora_ext.cil import Head, register_head

@register_head("euclid2")
class Euclid(Head):
    def __call__(self, features, prototypes):
        return -torch.cdist(features, prototypes)
"""


def test_plugins_reach_the_command_line(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train, resume, eval and predict, each in a process of its own; eval from another folder, too."""
    (tmp_path / "my_heads.py").write_text(PLUGIN)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(tmp_path / "toy.npz", **{name: getattr(images, name) for name in names})
    (tmp_path / "run.yaml").write_text(
        "plugins: [my_heads]\nmethod: simplecil\nhead: euclid2\ndata: toy.npz\nincrement: 2\ndevice: cpu\nout: run\n"
    )
    Image.fromarray(images.test_images[0]).save(tmp_path / "one.png")

    def command(*words: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        code = "import sys; sys.path.pop(0); from plora_ext.cli import main; sys.exit(main())"
        return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True)

    for words in (
        ("train", "-c", "run.yaml"),
        ("train", "--resume", "--out", "run"),
        ("eval", "run"),
        ("predict", "run", "one.png"),
    ):
        done = command(*words)
        assert done.returncode == 0, done.stderr
    (tmp_path / "elsewhere").mkdir()
    done = command("eval", "../run", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path / "elsewhere")  # a run that was continued from there still knows where it began
    monkeypatch.setattr(sys, "path", [*sys.path])
    checkpoint = Checkpoint(tmp_path / "run", resume=True)
    settings = checkpoint.settings
    assert str(tmp_path) in sys.path
    checkpoint.begin(checkpoint.manifest["fingerprint"], settings)
    assert checkpoint.manifest["folders"] == [str(tmp_path), str(tmp_path / "elsewhere")]
    for name in ("my_heads", "euclid2"):
        sys.modules.pop(name, None), HEADS.pop(name, None)
    (tmp_path / "my_heads.py").rename(tmp_path / "renamed.py")
    for words in (("train", "--resume", "--out", "run"), ("train", "-c", "run.yaml", "--resume")):
        done = command(*words, "--plugins", "renamed")
        assert done.returncode == 0, done.stderr
    assert command("train", "--plugins", "no_such").stderr.startswith(
        "error: plugins names 'no_such', which is no module"
    )


def test_callbacks_are_told(images: Images) -> None:
    heard: list[Any] = []

    class Ear(Callback):
        def begin(self, method: str, num_tasks: int | None) -> None:
            heard.append((method, num_tasks))

        def epoch(self, number: int, loss: float) -> None:
            heard.append(number)

    one = learner(callbacks=iter([Ear(), Ear()]))
    for part in tasks(images, True)[:2]:
        one.fit(part)
    assert heard == [("plora", None)] * 2 + [1, 1, 2, 2, 3, 3, 4, 4]
    with pytest.raises(TypeError, match=r"callbacks must derive from plora_ext\.cil\.Callback, got list"):
        learner(callbacks=[heard])

    class Curious(Callback):
        def epoch(self, number: int, loss: float) -> None:
            asks.predict(images.train_images[:1])

    asks = learner(callbacks=[Curious()])
    with pytest.raises(RuntimeError, match="a fit is under way, as where a callback asks"):
        asks.fit(tasks(images, True)[0])


def test_naming_a_learner_imports_no_model(tmp_path: Path) -> None:
    heavy = ("timm", "torchvision", "matplotlib", "rich")
    code = f"import sys; from plora_ext.cil import Learner; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert said == "[]\n"


def test_what_is_no_backbone_no_data_and_no_checkpoint() -> None:
    with pytest.raises(TypeError, match=r"backbone must be plora_ext.data.Backbone\(model, .*, got Linear"):
        Learner(backbone=torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"data must be plora_ext.data.Images\(.*, got tuple"):
        run(Settings(), data=([], []))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"checkpoint must be .*Checkpoint\(Path\(FOLDER\)\), got 'runs/a'"):
        run(Settings(), checkpoint="runs/a")  # type: ignore[arg-type]


def test_a_folder_with_a_file_that_is_no_image(tmp_path: Path) -> None:
    for c, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((16, 16, 3), 90 * c + i, np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "b" / "1.png").write_text("no image")
    learner = Learner(backbone=backbone(), method="simplecil", **QUICK)
    with pytest.raises(ValueError, match="b/1.png is no image that can be decoded"):
        learner.fit(tmp_path)
    skipping = Learner(backbone=backbone(), method="simplecil", corrupt="skip", **QUICK)
    with pytest.warns(UserWarning, match="left out 1 images that cannot be decoded: .*b/1.png"):
        assert skipping.fit(tmp_path).classes == ["a", "b"]
