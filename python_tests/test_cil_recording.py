"""What a run takes down beside accuracies: drift of prototypes, costs of tasks, environment, TensorBoard scalars."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import plora_ext
from plora_ext.cil import Settings, prototype_error
from plora_ext.cil.alignment import class_means
from plora_ext.cil.build import prepare
from plora_ext.cil.callbacks import Callback
from plora_ext.cil.checkpoint import Checkpoint
from plora_ext.cil.loop import run
from plora_ext.cil.methods import METHODS, PLoRAFused
from plora_ext.cil.result import Result
from plora_ext.cli import main
from plora_ext.data import Backbone, Images, View
from plora_ext.report.console import ConsoleProgress
from plora_ext.report.files import load_results
from plora_ext.report.trackers import TensorBoard, WandB


@pytest.fixture
def data() -> Images:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(6), 8)
    images = rng.integers(0, 60, (48, 16, 16, 3)) + 30 * labels[:, None, None, None]
    return Images(images.astype(np.uint8), labels, images.astype(np.uint8)[:24], labels[:24], None)


def backbone() -> Backbone:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return Backbone(vit.eval(), 16, [0.5] * 3, [0.5] * 3)


def learn(
    data: Images, make: Any = None, checkpoint: Checkpoint | None = None, callbacks: Any = (), **given: Any
) -> Result:
    settings = Settings(
        **{
            "increment": 2,
            "r": 2,
            "epochs": 2,
            "batch_size": 8,
            "lr": 0.02,
            "device": "cpu",
            "measure_drift": True,
            **given,
        }
    )
    return run(settings, data=data, backbone=backbone(), make=make, checkpoint=checkpoint, callbacks=callbacks)


def test_drift_is_that_of_its_definition(data: Images) -> None:
    seen: dict[str, Any] = {}

    class Spy(PLoRAFused):
        def learn(self, task, images: View, labels: Tensor) -> None:  # type: ignore[no-untyped-def]
            seen["held"] = self.prototypes
            super().learn(task, images, labels)
            seen["now"], seen["method"] = self.prototypes, self

    result = learn(data, lambda trainer, settings: Spy(trainer, settings))
    assert result.drift[0] is None and len(result.drift) == 3
    # After the last task, by hand: the model is still the last one.
    position = np.empty(6, dtype=np.int64)
    position[result.class_order] = np.arange(6)
    method = seen["method"]
    images = View(data.train_images, prepare(method.settings, backbone(), torch.device("cpu")))
    means = class_means(method.features(images), torch.from_numpy(position[data.train_labels]), 6)
    last = result.drift[-1]
    assert last is not None

    def distance(a: Tensor, b: Tensor) -> float:
        return float((1 - F.cosine_similarity(a.double(), b.double())).mean())

    assert last["before"] == pytest.approx(distance(seen["held"], means[:4]), rel=1e-4)
    assert last["after"] == pytest.approx(distance(seen["now"][:4], means[:4]), rel=1e-4)
    unit = F.normalize(means.double())
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-1)
    assert last["spacing"] == pytest.approx(float((1 - cosines[:4].max(1).values).mean()), rel=1e-4)
    assert last["before"] > 1e-7


def test_spacing_block_by_block() -> None:
    means = torch.randn(1500, 8, dtype=torch.float64)
    unit = F.normalize(means)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-1)
    assert prototype_error.spacing(means, 1400) == pytest.approx(float((1 - cosines[:1400].max(1).values).mean()))


@pytest.mark.parametrize("method", list(METHODS))
def test_measuring_changes_nothing(data: Images, method: str) -> None:
    measured, plain = (learn(data, method=method, measure_drift=on) for on in (True, False))
    assert measured.matrix == plain.matrix and measured.curve == plain.curve
    assert plain.drift == [] and len(measured.drift) == len(measured.matrix)
    assert "drift" in measured.seconds and "drift" not in plain.seconds
    for step in measured.drift[1:]:
        if method == "plora-ensemble":  # no single space
            assert step is None
        else:
            assert step is not None and step["spacing"] > 0
            if method == "simplecil":
                assert step["before"] == pytest.approx(0, abs=1e-6) == step["after"]
            if method != "plora":
                assert step["before"] == step["after"]


def test_costs_of_tasks_add_up(data: Images) -> None:
    result = learn(data)
    assert len(result.costs) == 3 and set(result.costs[1]["seconds"]) == {
        "train",
        "prototypes",
        "align",
        "eval",
        "drift",
    }
    for phase, seconds in result.seconds.items():
        assert sum(c["seconds"].get(phase, 0.0) for c in result.costs) == pytest.approx(seconds)
        assert max(c["peak_mb"].get(phase, 0.0) for c in result.costs) == result.peak_mb[phase] > 0
    assert result.environment["torch"] == str(torch.__version__) and "threads" in result.environment["device"]
    assert result.environment["plora_ext"] == plora_ext.__version__


def test_a_resumed_run_has_the_records_of_all_tasks(data: Images, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Stopping(Callback):
        def measured(self, task: int, figures: Any) -> None:
            if task == 1:
                raise Stop

    with pytest.raises(Stop):
        learn(data, checkpoint=Checkpoint(tmp_path), callbacks=[Stopping()])
    (half,) = load_results(tmp_path)
    assert len(half.costs) == len(half.drift) == len(half.curve) == 2 and half.classes_seen == [2, 4, 6]
    assert (half.num_train, half.num_test, half.passes) == (48, 24, 1)
    resumed, whole = learn(data, checkpoint=Checkpoint(tmp_path, resume=True)), learn(data)
    assert resumed.drift == whole.drift and len(resumed.costs) == 3 and resumed.costs[:2] == half.costs


def test_listeners_hear_the_loss_and_the_figures(data: Images) -> None:
    class Ear(Callback):
        def __init__(self) -> None:
            self.losses: list[tuple[int, float]] = []
            self.heard: list[tuple[int, dict[str, float]]] = []

        def epoch(self, number: int, loss: float) -> None:
            self.losses.append((number, loss))

        def measured(self, task: int, figures: Any) -> None:
            self.heard.append((task, figures))

    ear = Ear()
    result = learn(data, callbacks=[ear])
    assert [number for number, _ in ear.losses] == [1, 2, 3, 4, 5, 6] and all(loss >= 0 for _, loss in ear.losses)
    assert [task for task, _ in ear.heard] == [0, 1, 2]
    last = ear.heard[-1][1]
    assert last["accuracy/all classes seen"] == result.curve[-1]
    assert last["accuracy/forgetting"] == result.summary()["forgetting"]
    assert [last[f"accuracy of task/{i}"] for i in (1, 2, 3)] == result.matrix[-1]
    assert last["seconds/train"] == result.costs[-1]["seconds"]["train"]
    assert last["drift of prototypes/after"] == result.drift[-1]["after"]  # type: ignore[index]


def problem(data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(plora_ext.cil.build, "create_backbone", lambda *_, **__: backbone())
    names = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(tmp_path / "toy.npz", **{name: getattr(data, name) for name in names})
    given = f"--data {tmp_path / 'toy.npz'} --increment 2 --r 2 --epochs 2 --device cpu --tensorboard"
    return given.split()


def test_tensorboard_scalars(data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = [*problem(data, tmp_path, monkeypatch), "--out", str(tmp_path / "out"), "--measure-drift", "true"]
    for _ in range(2):  # a second run in the same folder takes the place of the first
        assert main(["train", *given]) == 0
        (result,) = load_results(tmp_path / "out")
        events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
        accuracy = [(e.step, e.value) for e in events.Scalars("accuracy/all classes seen")]
        assert accuracy == [(t + 1, pytest.approx(value)) for t, value in enumerate(result.curve)]
        assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
        losses, rates = events.Scalars("step/loss"), events.Scalars("step/lr")
        assert [e.step for e in losses] == [e.step for e in rates] == list(range(1, 7))  # a step an epoch here
        assert [e.value for e in losses] == pytest.approx([e.value for e in events.Scalars("loss")])
        assert [e.value for e in rates[:3]] == pytest.approx([3e-3, 1.5e-3, 3e-3])  # of two steps a task
        (text,) = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val
        assert b"    method: plora\n" in text and b"    epochs: 2\n" in text
    after = [e.value for e in events.Scalars("drift of prototypes/after")]
    assert after == pytest.approx([step["after"] for step in result.drift if step])


def test_a_resumed_run_says_where_it_goes_on(
    data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*problem(data, tmp_path, monkeypatch)[:-1], "--out", str(tmp_path / "out")]
    whole = Checkpoint.save_epoch

    def save(self: Checkpoint, task: int, epoch: int, *rest: Any) -> None:
        whole(self, task, epoch, *rest)
        if (task, epoch) == (1, 0):
            raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(Checkpoint, "save_epoch", save)
        assert main(["train", *given]) == 130
    capsys.readouterr()
    heard: list[int] = []
    monkeypatch.setattr(Callback, "steps", lambda self, first, losses, rates: heard.append(first))
    assert main(["train", *given, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "continuing after task 1 of 3, epoch 1 of task 2\n" in said
    assert "task  1 of 3   accuracy 100.0 %   learned before\n" in said and said.count("images/s") == 2
    assert heard == [4, 5, 6]  # the steps count on
    assert main(["train", *given, "--resume"]) == 0
    assert "all 3 tasks are learned already\n" in capsys.readouterr().out


def test_joint_learns_its_tasks_together(capsys: pytest.CaptureFixture[str]) -> None:
    """They were "learned before", as those of a run that is continued."""
    for images in (0, 30):
        with ConsoleProgress(Console(width=100)) as progress:
            progress.begin("joint", 2)
            progress.step(images)
            progress.task(0, 90.0)
            progress.task(1, 80.0)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("%")[1].strip() for line in lines[:2] if "images/s" not in line] == (
            ["learned together"] if images else ["learned before"] * 2
        )


def test_tensorboard_that_is_not_installed_costs_no_work(
    data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*problem(data, tmp_path, monkeypatch), "--out", str(tmp_path / "out")]
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard" or "utils.tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard(tmp_path)
    monkeypatch.setattr(plora_ext.cil.build, "load_data", lambda *_: pytest.fail("worked before checking"))
    assert main(["train", *given]) == 2
    assert "--tensorboard needs the package tensorboard" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_weights_and_biases_hear_the_same(data: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    made: list[dict[str, Any]] = []

    class Run:
        log = staticmethod(logged.append)
        finish = staticmethod(lambda: logged.append({"finished": 1}))

    def init(**keywords: Any) -> type[Run]:
        made.append(keywords)
        return Run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with WandB("mine", mode="offline") as wandb:
        result = learn(data, callbacks=[wandb], measure_drift=False)
    assert made == [{"name": "plora", "project": "mine", "mode": "offline"}]
    assert [line["epoch"] for line in logged if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in logged if "step/lr" in line] == list(range(1, 13))  # two steps an epoch
    curve = [(line["task"], line["accuracy/all classes seen"]) for line in logged if "task" in line]
    assert curve == list(enumerate(result.curve, 1)) and logged[-1] == {"finished": 1}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="WandB needs the package wandb .*: pip install wandb"):
        WandB()


@pytest.mark.parametrize("method", ["plora", "joint"])
def test_evaluation_part_by_part(data: Images, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn(data, method=method, measure_drift=False)
    monkeypatch.setattr(plora_ext.cil.evaluate, "FEATURES", 7)
    monkeypatch.setattr(plora_ext.cil.evaluate, "LOGITS", 13)  # two or three images at a time
    parts = learn(data, method=method, measure_drift=False)
    assert parts.matrix == whole.matrix and parts.curve == whole.curve
