"""Resume: a run cut short anywhere ends as an undisturbed one; damaged or foreign checkpoints are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import plora_ext.cil.build
import plora_ext.cil.speed
from plora_ext.cil import Images, Result, Settings, run
from plora_ext.cil import checkpoint as checkpoints
from plora_ext.cil.checkpoint import MANIFEST, Checkpoint
from plora_ext.cil.files import exclusive
from plora_ext.cil.methods import METHODS, Method
from plora_ext.cil.trained import Trained
from plora_ext.cil.training import Trainer
from plora_ext.cli import main
from plora_ext.data import Backbone
from plora_ext.report.files import load_results

CLASSES = 6
TINY = """
import torch
from timm.models.vision_transformer import VisionTransformer
from plora_ext.data import Backbone

def create(*_, **__):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return Backbone(vit.eval(), 16, [0.5] * 3, [0.5] * 3)
"""


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(CLASSES), 8)
    images = (rng.integers(0, 60, (48, 16, 16, 3)) + 30 * labels[:, None, None, None]).astype(np.uint8)
    return {
        "train_images": images,
        "train_labels": labels,
        "test_images": images[:24] + np.uint8(1),  # not the very images of training
        "test_labels": labels[:24],
    }


@pytest.fixture
def data() -> Images:
    return Images(**arrays(), class_names=["ant", "bee", "cat", "dog", "eel", "fox"])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict = {}
    exec(TINY, made)
    monkeypatch.setattr(plora_ext.cil.build, "create_backbone", made["create"])


@pytest.fixture
def problem(tmp_path: Path) -> list[str]:
    np.savez(tmp_path / "toy.npz", **arrays())
    return ["--data", str(tmp_path / "toy.npz"), "--increment", "2", "--r", "2", "--epochs", "2", "--device", "cpu"]


def backbone() -> Backbone:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    return Backbone(vit.eval(), 16, [0.5] * 3, [0.5] * 3)


def settings(**changes) -> Settings:
    quick = {"increment": 2, "r": 2, "epochs": 2, "batch_size": 8, "lr": 5e-3, "device": "cpu", "workers": 0}
    return Settings(**{**quick, "projections": 30, "replay_epochs": 2, **changes})


class Cut(Exception):
    """The run ends here."""


def learn(data: Images, checkpoint: Checkpoint | None, **changes) -> tuple[Result, Method]:
    made: list[Method] = []

    def make(trainer: Trainer, s: Settings) -> Method:
        made.append(METHODS[s.method](trainer, s))
        return made[0]

    return run(settings(**changes), data=data, backbone=backbone(), make=make, checkpoint=checkpoint), made[0]


VARIANTS = [
    {"method": "plora", "lora_dropout": 0.2},
    {"method": "plora", "fusion": "learned", "optimizer": "sgd", "target_modules": ["q", "v"]},
    {"method": "plora", "fusion": "similarity", "head": "replay", "transform": "pilot"},
    {"method": "plora", "fusion": "sum", "onto": "fused", "init": "inflora", "head": "gaussian"},
    {"method": "plora", "fusion": "newest", "init": "newest", "lr_later": 1e-3},
    {"method": "lora-first", "head": "ranpac"},
    *({"method": name} for name in METHODS if name != "plora"),
]


@pytest.fixture
def repeats(device: torch.device) -> Iterator[dict]:
    """Settings of a run that repeats on each type of device."""
    yield {"device": device.type, "deterministic": device.type == "cuda"}
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(map(str, c.values())))
def test_cut_after_every_save(
    changes: dict, data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeats: dict
) -> None:
    """One process after another gets as far as one save; each leaves the random state in a mess."""
    changes = changes | repeats
    whole, method = learn(data, None, **changes)
    save, saves = Checkpoint._save, 0

    def save_and_cut(self: Checkpoint, *args, **keywords) -> None:
        save(self, *args, **keywords)
        raise Cut

    monkeypatch.setattr(Checkpoint, "_save", save_and_cut)
    for saves in range(20):
        torch.manual_seed(saves)
        random.seed(saves)
        try:
            result, resumed = learn(data, Checkpoint(tmp_path, resume=True), **changes)
            break
        except Cut:
            assert all(path.name == MANIFEST or path.suffix == ".safetensors" for path in _files(tmp_path))
    trains = {"simplecil": 0, "joint": 1, "lora-first": 1, "aper": 1}.get(changes["method"], 3)
    assert saves == (1 if changes["method"] == "joint" else 3) + 2 * trains  # a task each, two epochs where it trains
    assert (result.curve, result.matrix, result.passes) == (whole.curve, whole.matrix, whole.passes)
    assert method.prototypes is not None and torch.equal(method.prototypes, resumed.prototypes)
    images = torch.rand(4, 3, 16, 16, device=repeats["device"])
    assert torch.equal(method.predict(images), resumed.predict(images))  # type: ignore[arg-type]
    again, _ = learn(data, Checkpoint(tmp_path, resume=True), **changes)  # nothing is left to do
    assert again.curve == whole.curve


def test_deterministic_is_torch_s_own(data: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: list[bool] = []
    fit = Trainer.fit

    def watched(*args) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        fit(*args)

    monkeypatch.setattr(Trainer, "fit", watched)
    learn(data, None, epochs=1)
    assert seen == [False] * 3 and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    learn(data, None, epochs=1, deterministic=True)
    assert seen[3:] == [True] * 3 and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("ends", ["well", "early"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_leaves_the_process_as_it_was(
    ends: str, deterministic: bool, data: Images, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def drawn() -> list[float]:
        switch = torch.are_deterministic_algorithms_enabled()
        return [random.random(), float(np.random.rand()), float(torch.rand(())), switch]

    def seed() -> None:
        random.seed(5), np.random.seed(6), torch.manual_seed(7)

    seed()
    expected = drawn()
    seed()
    s = settings(epochs=1, optimizer="sgd", lr=1e30 if ends == "early" else 0.1, deterministic=deterministic)
    if ends == "well":
        run(s, data=data, checkpoint=Checkpoint(tmp_path))
        Trained(tmp_path).predict(data.test_images)
    else:
        with pytest.raises(FloatingPointError):
            run(s, data=data)
    assert drawn() == expected


def test_a_renamed_file_is_on_disk_before_others_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.begin({}, {})
    checkpoint.save_task({"curve": [1.0], "tasks": 2}, {"method": {"prototypes": torch.zeros(2)}})
    calls: list[str] = []
    sync, rename, unlink = os.fsync, os.replace, Path.unlink

    def synced(file: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        sync(file)

    def renamed(source: Path, target: Path) -> None:
        calls.append(f"rename {target.name.partition('-')[0]}")
        rename(source, target)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        calls.extend(["unlink"] if path.exists() else [])
        unlink(path, missing_ok)

    monkeypatch.setattr(checkpoints.os, "fsync", synced)
    monkeypatch.setattr(checkpoints.os, "replace", renamed)
    monkeypatch.setattr(Path, "unlink", unlinked)
    checkpoint.save_task({"curve": [1.0, 2.0], "tasks": 2}, {"method": {"prototypes": torch.ones(2)}})
    whole = ["file", "rename method", "folder", "file", f"rename {MANIFEST}", "folder"]
    assert [call for call in calls if call != "unlink"] == whole and calls[-1] == "unlink"
    assert "unlink" not in calls[: len(whole)]


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoint").iterdir())


def test_files_are_named_by_content_and_swept(data: Images, tmp_path: Path) -> None:
    learn(data, Checkpoint(tmp_path))
    (tmp_path / "checkpoint" / ".left.part").write_text("half")
    (tmp_path / "checkpoint" / "notes.txt").write_text("not ours")
    (tmp_path / "checkpoint" / "old-0123456789abcdef.safetensors").write_text("old")
    names = {path.name.rpartition("-")[0] for path in _files(tmp_path)} - {""}
    assert names >= {"adapter-task0", "adapter-task1", "adapter-task2", "method", "rng"}
    learn(data, Checkpoint(tmp_path, resume=True))
    assert {path.name.rpartition("-")[0] for path in _files(tmp_path)} - {""} == names - {"old"}
    assert not list((tmp_path / "checkpoint").glob(".*")) and (tmp_path / "checkpoint" / "notes.txt").exists()


def test_checkpoints_are_small(data: Images, tmp_path: Path) -> None:
    """What a task adds: its adapter and prototypes, not the backbone."""
    learn(data, Checkpoint(tmp_path))
    adapter = 4 * 2 * ((32 + 96) + (32 + 32))  # float32, r = 2, qkv and proj of one block
    sizes = {path.name.rpartition("-")[0]: path.stat().st_size for path in _files(tmp_path)}
    assert adapter < sizes["adapter-task2"] < adapter + 1000
    assert sum(sizes.values()) < 60_000


# ---------------------------------------------------------------------- what is refused


def test_another_run_is_refused_with_every_difference(data: Images, tmp_path: Path) -> None:
    learn(data, Checkpoint(tmp_path), epochs=1)
    with pytest.raises(ValueError, match=r"of another run: r is 2 there and 4 here; lr is 0.005 there and 0.1 here"):
        learn(data, Checkpoint(tmp_path, resume=True), epochs=1, lr=0.1, r=4)
    other = Images(**{**arrays(), "test_labels": arrays()["test_labels"][::-1].copy()})
    with pytest.raises(ValueError, match="of another run: the images or labels differ, those of task 0, 1, 2, which"):
        learn(other, Checkpoint(tmp_path, resume=True), epochs=1)
    frozen = backbone()
    torch.nn.init.zeros_(frozen.model.blocks[0].mlp.fc1.weight)
    with pytest.raises(ValueError, match="of another run: the backbone's weights differ"):
        run(settings(epochs=1), data=data, backbone=frozen, checkpoint=Checkpoint(tmp_path, resume=True))
    darker = backbone()._replace(mean=[0.25] * 3)
    with pytest.raises(ValueError, match=r"the backbone's input .* is \[16, \[0.5.* there and \[16, \[0.25"):
        run(settings(epochs=1), data=data, backbone=darker, checkpoint=Checkpoint(tmp_path, resume=True))
    learn(data, Checkpoint(tmp_path, resume=True), epochs=1, out="moved", workers=1)  # not what is computed


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes the manifest of the run in `folder`, sealed as the package does."""
    path = folder / "checkpoint" / MANIFEST
    manifest = json.loads(path.read_text())["manifest"]
    change(manifest)
    seal = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": seal, "manifest": manifest}))


def cut_after(task: int, data: Images, folder: Path, epoch: int | None = None, **changes) -> None:
    """A run that ends after its `task`, or after an epoch of it."""
    save, name = Checkpoint.save_task, "save_task"
    if epoch is not None:
        save, name = Checkpoint.save_epoch, "save_epoch"  # type: ignore[assignment]

    def save_and_cut(self: Checkpoint, *args, **keywords) -> None:
        save(self, *args, **keywords)
        if (len(args[0]["curve"]) == task + 1) if epoch is None else args[:2] == (task, epoch):
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, name, save_and_cut)
        with pytest.raises(Cut):
            learn(data, Checkpoint(folder, resume=True), **changes)


def test_settings_that_came_later_are_as_before(data: Images, tmp_path: Path, tiny: None) -> None:
    of = {"cutmix": 0.0, "rotations": False, "distill": 0.0, "shrinkage": 0.7, "init": "first"}
    cut_after(1, data, tmp_path, **of)

    def older(manifest: dict) -> None:
        for held in (manifest["settings"], manifest["fingerprint"]["settings"]):
            for name in ("deterministic", "augment", *of):
                held.pop(name, None)

    rewrite(tmp_path, older)
    with pytest.raises(ValueError, match="shrinkage is 0.7 there and 0.5 here"):
        learn(data, Checkpoint(tmp_path, resume=True), **{**of, "shrinkage": 0.5})
    saved = Checkpoint(tmp_path, resume=True).settings
    assert {name: saved[name] for name in of} == of
    assert learn(data, Checkpoint(tmp_path, resume=True), **of)[0].curve == learn(data, None, **of)[0].curve


@pytest.mark.parametrize("changes", [{"method": "lora-first"}, {"head": "ranpac"}])
def test_parameters_are_known_after_a_resumed_run_too(changes: dict, data: Images, tmp_path: Path) -> None:
    whole, _ = learn(data, None, **changes)
    cut_after(1, data, tmp_path, **changes)
    rewrite(tmp_path, lambda manifest: manifest["run"].pop("parameters"))  # as a version of before
    resumed, _ = learn(data, Checkpoint(tmp_path, resume=True), **changes)
    again, _ = learn(data, Checkpoint(tmp_path, resume=True), **changes)
    assert resumed.parameters == again.parameters == whole.parameters and whole.parameters["trainable"] == 384


def test_validation_makes_another_run(data: Images, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture) -> None:
    cut_after(0, data, tmp_path, validation=0.25)
    for share in (0.0, 0.5):
        with pytest.raises(ValueError, match=f"validation is 0.25 there and {share} here"):
            learn(data, Checkpoint(tmp_path, resume=True), validation=share)
    resumed, _ = learn(data, Checkpoint(tmp_path, resume=True), validation=0.25)
    assert resumed.curve == learn(data, None, validation=0.25)[0].curve and resumed.num_test == 12


def test_what_a_run_held_out_is_evaluated_again(
    problem: list[str], tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", *problem, "--method", "simplecil", "--validation", "0.25", "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "36 training and 12 held-out images, 6 classes in 3 tasks evaluated on: 25 % of the training images" in said
    assert "embedded, on 25 % of the training images, accuracy in %" in said
    run_ = json.loads((out / "metrics.json").read_text())["runs"][0]
    assert (run_["evaluated_on"], run_["num_train"], run_["num_test"]) == ("25 % of the training images", 36, 12)
    np.savez(tmp_path / "toy.npz", **{**arrays(), "test_images": arrays()["test_images"][:3], "test_labels": [0, 1, 2]})
    assert main(["eval", str(out), "--out", str(tmp_path / "new" / "eval.json")]) == 0
    figures = json.loads((tmp_path / "new" / "eval.json").read_text())
    assert (figures["accuracy"], figures["task_accuracies"]) == (run_["last_accuracy"], run_["matrix"][-1])
    assert "% on 25 % of the training images of 6 classes" in capsys.readouterr().out


def test_joint_of_before_is_as_it_was(problem: list[str], tmp_path: Path, tiny: None) -> None:
    """Then its curve had one entry, A_B."""
    assert main(["train", *problem, "--method", "joint", "--out", str(tmp_path)]) == 0
    (new,) = load_results(tmp_path)
    evaluated, learner = Trained(tmp_path).evaluate(), Trained(tmp_path).learner
    assert (evaluated["accuracy"], evaluated["task_accuracies"]) == (new.curve[-1], new.matrix[0])
    assert learner.task_sizes == [6] and len(new.curve) == len(new.classes_seen) == 3

    def older(manifest: dict) -> None:
        manifest["run"] |= {"curve": manifest["run"]["curve"][-1:], "classes_seen": [6], "tasks": 1}
        del manifest["run"]["parameters"]

    rewrite(tmp_path, older)
    (tmp_path / "metrics.json").unlink()
    assert main(["train", *problem, "--method", "joint", "--out", str(tmp_path), "--resume"]) == 0
    (old,) = load_results(tmp_path)
    assert old.curve == new.curve[-1:] and old.classes_seen == [6] and old.summary()["average_accuracy"] is None
    assert Trained(tmp_path).evaluate()["accuracy"] == old.curve[0] and Trained(tmp_path).learner.task_sizes == [6]


def test_settings_that_are_gone_are_named(data: Images, tmp_path: Path, tiny: None) -> None:
    cut_after(1, data, tmp_path)
    rewrite(tmp_path, lambda manifest: manifest["settings"].update(momentum=0.9))
    message = rf"{tmp_path}/checkpoint, written by plora_ext {plora_ext.__version__}: .* does not have: momentum"
    with pytest.raises(ValueError, match=message):
        Trained(tmp_path)
    with pytest.raises(ValueError, match=message):
        learn(data, Checkpoint(tmp_path, resume=True))
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 2


def test_formats(data: Images, tmp_path: Path) -> None:
    cut_after(1, data, tmp_path)

    def second(manifest: dict) -> None:
        manifest["format"] = 2
        manifest["fingerprint"].pop("tasks")
        manifest["fingerprint"]["settings"]["eval_batch_size"] = manifest["settings"]["eval_batch_size"]

    rewrite(tmp_path, second)
    assert learn(data, Checkpoint(tmp_path, resume=True))[0].curve == learn(data, None)[0].curve
    for changes, older, newer in (
        ({"method": "plora-ensemble"}, "task_of_class", "head:task_of_class"),
        ({"head": "gaussian"}, "head:means", "head:covariances:0"),
    ):
        folder = tmp_path / older
        cut_after(1, data, folder, **changes)

        def third(manifest: dict, older: str = older, newer: str = newer) -> None:
            manifest["format"] = 3
            part = manifest["parts"][newer] if older == "head:means" else manifest["parts"].pop(newer)
            manifest["parts"][older] = part

        rewrite(folder, third)
        resumed, _ = learn(data, Checkpoint(folder, resume=True), **changes)
        assert resumed.curve == learn(data, None, **changes)[0].curve
        assert older not in Checkpoint(folder, resume=True).manifest["parts"]
    rewrite(tmp_path, lambda manifest: manifest.update(format=1, plora_ext="0.0.1"))
    with pytest.raises(ValueError, match=r"has format 1, of plora_ext 0\.0\.1; .* reads 2 and 3 and 4"):
        Checkpoint(tmp_path, resume=True)


@pytest.mark.parametrize(
    "now",
    [
        {"eval_batch_size": 5},
        {"measure_drift": True},
        {"amp": "bfloat16", "channels_last": True, "tf32": True},
        {"deterministic": True},
    ],
)
def test_settings_that_may_change(now: dict, data: Images, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, _ = learn(data, None)
    cut_after(1, data, tmp_path)
    try:
        result, _ = learn(data, Checkpoint(tmp_path, resume=True), **now)
        learn(data, Checkpoint(tmp_path, resume=True), **now)
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.curve[:2] == whole.curve[:2] and len(result.curve) == 3
    if "measure_drift" in now:
        assert result.drift[:2] == [None, None] and result.drift[2]["after"] > 0  # type: ignore[index]
        assert result.curve == whole.curve and "changed" not in result.environment
        cut_after(1, data, tmp_path / "other", measure_drift=True)
        drift = learn(data, Checkpoint(tmp_path / "other", resume=True))[0].drift
        assert drift[0] is None and drift[1] and drift[2] is None
    else:
        said = "; ".join(
            f"{name} {settings().as_dict()[name]} -> {now[name]}" for name in checkpoints.ROUNDING if name in now
        )
        assert result.environment["changed"] == f"{said}, after 2 of 3 tasks"
        assert f"not as it began: {said}" in capfd.readouterr().err
        manifest = Checkpoint(tmp_path, resume=True).manifest
        assert manifest["run"]["environment"]["changed"] == result.environment["changed"]


def test_another_version_is_said(data: Images, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cut_after(1, data, tmp_path)
    rewrite(tmp_path, lambda manifest: manifest.update(plora_ext="0.0.9", torch="2.9.0"))
    result, _ = learn(data, Checkpoint(tmp_path, resume=True))
    said = f"plora_ext 0.0.9 -> {plora_ext.__version__}; torch 2.9.0 -> {torch.__version__}"
    assert result.environment["changed"] == f"{said}, after 2 of 3 tasks" and said in capfd.readouterr().err


@pytest.mark.parametrize("epoch", [None, 0])
def test_images_of_tasks_to_come_may_change(epoch: int | None, data: Images, tmp_path: Path) -> None:
    """A picture that is mended does not cost the tasks that never saw it."""
    cut_after(1 if epoch is None else 2, data, tmp_path, epoch, class_order="sorted")
    mended = Images(**{name: value.copy() for name, value in arrays().items()})
    mended.train_images[4], mended.test_images[5] = 0, 255  # of classes 4 and 5, the last task's
    fresh, _ = learn(mended, None, class_order="sorted")
    result, _ = learn(mended, Checkpoint(tmp_path, resume=True), class_order="sorted")
    assert result.curve == fresh.curve and result.matrix == fresh.matrix
    assert result.environment["changed"] == "images or labels of task 2, after 2 of 3 tasks"
    mended.test_images[2] = 0
    with pytest.raises(ValueError, match="the images or labels differ, those of task 1, which is learned"):
        learn(mended, Checkpoint(tmp_path, resume=True), class_order="sorted")


def test_paths_are_those_of_the_folder_where_the_run_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("begun", "else", "away"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    np.savez("toy.npz", **arrays())
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, num_classes=0, img_size=16)
    torch.save(model.state_dict(), "w.pth")
    run_ = tmp_path / "run"
    options = f"--data toy.npz --backbone {name} --weights w.pth --image-size 16 --method simplecil --increment 3"
    assert main(["train", *options.split(), "--device", "cpu", "--workers", "0", "--out", str(run_)]) == 0
    monkeypatch.chdir(tmp_path / "else")
    Image.fromarray(arrays()["test_images"][0]).save("a.png")
    assert main(["eval", str(run_)]) == 0 and main(["predict", str(run_), "a.png"]) == 0
    assert main(["train", "--resume", "--out", str(run_)]) == 0
    capsys.readouterr()
    for file in ("toy.npz", "w.pth"):
        (tmp_path / "begun" / file).rename(tmp_path / "away" / file)
    Path("predictions.csv").unlink()
    assert main(["predict", str(run_), "a.png"]) == 2
    assert "weights must be a file" in (said := capsys.readouterr().err) and f"{tmp_path}/else/w.pth" in said
    moved = ["--weights", str(tmp_path / "away" / "w.pth")]
    assert main(["predict", str(run_), "a.png", *moved]) == 0 and main(["eval", str(run_), *moved]) == 2
    assert (
        f"--data says where they are now: there is no file toy.npz, looked for at {tmp_path}" in capsys.readouterr().err
    )
    assert main(["eval", str(run_), *moved, "--data", str(tmp_path / "away" / "toy.npz")]) == 0


def test_test_images_of_learned_tasks_may_be_mended_or_left_out(
    tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("train", "test"):
        for c, name in enumerate("abcd"):
            (tmp_path / "pics" / side / name).mkdir(parents=True)
            for i in range(2):
                image = Image.fromarray(
                    np.random.default_rng(10 * i + c).integers(0, 255, (16, 16, 3)).astype(np.uint8)
                )
                image.save(tmp_path / "pics" / side / name / f"{i}.png")
    options = f"--data {tmp_path}/pics --increment 2 --method simplecil --class-order sorted --workers 0 --device cpu"
    command = ["train", *options.split(), "--out", str(tmp_path / "run")]
    spoiled = [tmp_path / "pics" / side / name / "1.png" for side, name in (("test", "a"), ("test", "d"))]
    content = spoiled[1].read_bytes()
    flipped = bytearray(content)
    flipped[60] ^= 255  # its header and its end are whole: met when task 1 is evaluated
    spoiled[1].write_bytes(flipped)
    assert main(command) == 2 and "set corrupt to skip" in capsys.readouterr().err
    spoiled[0].write_bytes(content[:60])
    assert main([*command, "--resume", "--corrupt", "skip"]) == 0
    said = "the run continues, though not as it began: test images of task 0, 1, after 1 of 2 tasks"
    assert said in " ".join(capsys.readouterr().out.split())
    assert load_results(tmp_path / "run")[0].num_test == 6
    assert main(["eval", str(tmp_path / "run")]) == 0
    spoiled[1].write_bytes(content)
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "those of task 1, which is learned" in capsys.readouterr().err
    other = tmp_path / "pics" / "train" / "a" / "1.png"
    other.write_bytes(other.read_bytes() + b"more")
    assert main([*command, "--resume", "--corrupt", "skip"]) == 2
    assert "the images or labels differ, those of task 0, which is learned" in capsys.readouterr().err


def test_damaged_checkpoints_are_refused(data: Images, tmp_path: Path) -> None:
    learn(data, Checkpoint(tmp_path), epochs=1)
    file = next(path for path in _files(tmp_path) if path.name.startswith("adapter-task1"))
    content, manifest = file.read_bytes(), tmp_path / "checkpoint" / MANIFEST
    text = manifest.read_text()
    for damage, message in (
        (content[:-3], rf"{file.name} is cut short: it must hold {len(content)} bytes, got {len(content) - 3}"),
        (content[:-1] + bytes([content[-1] ^ 1]), f"{file.name} has been altered"),
    ):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=message):
            learn(data, Checkpoint(tmp_path, resume=True), epochs=1)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name} is cut short: .* got 0"):
        learn(data, Checkpoint(tmp_path, resume=True), epochs=1)
    for damage in (text[:-20], text.replace('"epochs": 1', '"epochs": 2'), "[]"):
        manifest.write_text(damage)
        with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
            Checkpoint(tmp_path, resume=True)


def test_an_unfinished_run_is_not_overwritten(data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Checkpoint.save_task

    def save_and_cut(self: Checkpoint, *args) -> None:
        done(self, *args)
        raise Cut

    monkeypatch.setattr(Checkpoint, "save_task", save_and_cut)
    with pytest.raises(Cut):
        learn(data, Checkpoint(tmp_path))
    with pytest.raises(ValueError, match=r"has learned 1 of 3 tasks: continue it with --resume, choose another folder"):
        Checkpoint(tmp_path)
    monkeypatch.undo()
    learn(data, Checkpoint(tmp_path, resume=True))
    learn(data, Checkpoint(tmp_path))  # the same once more


def test_a_finished_run_is_replaced_by_its_like_alone(
    data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plora_ext.report.files import drawers

    names = {"metrics.json", "settings.yaml", *(f"{name}.png" for name in drawers())}
    assert set(checkpoints.RESULTS) == names
    learn(data, Checkpoint(tmp_path))
    for name in (*names, "mine.png"):
        (tmp_path / name).write_text("of the first run")
    before = (tmp_path / "checkpoint" / "checkpoint.json").read_bytes()
    with pytest.raises(ValueError, match=r"holds the results of another run: r is \d there and 1 here; choose another"):
        learn(data, Checkpoint(tmp_path), r=1)
    assert (tmp_path / "checkpoint" / "checkpoint.json").read_bytes() == before and (tmp_path / "metrics.json").exists()

    save = Checkpoint._save

    def save_and_cut(self: Checkpoint, *args, **keywords) -> None:
        save(self, *args, **keywords)
        raise Cut

    monkeypatch.setattr(Checkpoint, "_save", save_and_cut)
    with pytest.raises(Cut):  # from its first save on there is nothing of the other run
        learn(data, Checkpoint(tmp_path, overwrite=True), r=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "mine.png"]
    assert Checkpoint(tmp_path, resume=True).settings["r"] == 1


def test_a_full_disk_leaves_the_last_checkpoint(data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = learn(data, None)
    calls, sync = [0], os.fsync

    def full(file: int) -> None:
        calls[0] += 1
        if calls[0] > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*No space left.* what it held before is whole"):
        learn(data, Checkpoint(tmp_path))
    assert not list((tmp_path / "checkpoint").glob(".*"))
    monkeypatch.undo()
    manifest = Checkpoint(tmp_path, resume=True).manifest
    assert manifest["run"]["curve"] == whole.curve[: len(manifest["run"]["curve"])]
    assert learn(data, Checkpoint(tmp_path, resume=True))[0].curve == whole.curve


def test_one_run_a_folder(tmp_path: Path) -> None:
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time\nfrom pathlib import Path\nfrom plora_ext.cil.files import exclusive\n"
            "with exclusive(Path(sys.argv[1])):\n    child = os.fork()\n    print(child or '', flush=True)\n"
            "    time.sleep(99)",
            str(tmp_path),
        ],
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdout is not None
    child = int(next(line for line in held.stdout if line.strip()))
    try:
        with pytest.raises(OSError, match=f"another run is writing to {tmp_path}"), exclusive(tmp_path):
            pass
        held.kill()
        held.wait()
        (tmp_path / ".plora-left").mkdir()
        with exclusive(tmp_path):  # a data worker that outlives its run holds no lock
            assert not list(tmp_path.iterdir())
    finally:
        held.kill()
        os.kill(child, signal.SIGKILL)


# ---------------------------------------------------------------------- the command line


@pytest.mark.usefixtures("tiny")
def test_resume_needs_no_other_option(problem: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert main(["train", *problem, "--resume", "--out", out]) == 0  # nothing there yet: from the beginning
    before = load_results(out)[0]
    assert main(["train", "--resume", "--out", out, "--device", "cpu"]) == 0
    assert load_results(out)[0].matrix == before.matrix
    capsys.readouterr()
    assert main(["train", "--resume", "--out", out, "--lr", "1"]) == 2
    assert "of another run: lr is 0.003 there and 1.0 here" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_eval_and_predict(problem: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pictures = tmp_path / "run", tmp_path / "pictures"
    pictures.mkdir()
    for i, image in enumerate(arrays()["test_images"]):
        Image.fromarray(image).save(pictures / f"{i:02}.png")
    assert main(["train", *problem, "--epochs", "4", "--out", str(out), "--head", "gaussian"]) == 0
    expected = load_results(out)[0]
    assert main(["eval", str(out), "--out", str(tmp_path / "eval.json")]) == 0
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert (figures["accuracy"], figures["task_accuracies"]) == (expected.curve[-1], expected.matrix[-1])

    for name in ("p.json", "p.csv"):
        assert main(["predict", str(out), str(pictures), "--out", str(tmp_path / name)]) == 0
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [Path(row["image"]).name for row in rows] == [f"{i:02}.png" for i in range(24)]
    right = np.mean([row["class"] == label for row, label in zip(rows, arrays()["test_labels"])])
    assert 100 * right == pytest.approx(expected.curve[-1])
    assert (tmp_path / "p.csv").read_text().splitlines()[0] == "image,class,name,task,probability,score"
    assert all(0.2 < row["probability"] <= 1 for row in rows)  # of six classes, by the best
    order = expected.class_order
    assert [row["task"] for row in rows] == [order.index(row["class"]) // 2 + 1 for row in rows]
    written = (tmp_path / "p.csv").read_bytes()
    assert main(["predict", str(out), str(pictures), "--out", str(tmp_path / "p.csv")]) == 2
    assert "p.csv is there already" in capsys.readouterr().err and (tmp_path / "p.csv").read_bytes() == written
    again = ["predict", str(out), str(pictures), "--top", "9", "--out", str(tmp_path / "p.json"), "--overwrite"]
    assert main(again) == 0
    all_classes = json.loads((tmp_path / "p.json").read_text())
    assert len(all_classes) == 24 * 6 and [row["rank"] for row in all_classes[:7]] == [1, 2, 3, 4, 5, 6, 1]
    assert [row["class"] for row in all_classes[::6]] == [row["class"] for row in rows]
    for i in range(0, len(all_classes), 6):
        shares = [row["probability"] for row in all_classes[i : i + 6]]
        assert sum(shares) == pytest.approx(1, abs=1e-4) and shares == sorted(shares, reverse=True)

    capsys.readouterr()
    (pictures / "00.png").write_bytes(b"no picture")
    for arguments, message in (
        (["predict", str(out), str(pictures)], "00.png is no image that can be decoded"),
        (["predict", str(out), str(tmp_path / "nowhere")], "nowhere is no file and no folder"),
        (["predict", str(out), str(pictures), "--out", "p.txt"], "out must end in .csv or .json, got 'p.txt'"),
        (["predict", str(out), str(pictures), "--top", "0"], "top must be at least 1, got 0"),
        (["predict", str(tmp_path), str(pictures)], "holds no learned task: RUN must be a folder of `plora-ext train`"),
        (["eval", str(out / "nowhere")], "holds no learned task"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    skipping = ["predict", str(out), str(pictures), "--corrupt", "skip", "--out", str(tmp_path / "left.json")]
    assert main(skipping) == 0
    assert f"left out 1 images that cannot be decoded: {pictures / '00.png'}" in capsys.readouterr().err
    assert json.loads((tmp_path / "left.json").read_text()) == rows[1:]
    (tmp_path / "toy.npz").rename(tmp_path / "moved.npz")
    assert main(["eval", str(out), "--data", str(tmp_path / "moved.npz")]) == 0
    np.savez(tmp_path / "toy.npz", **{**arrays(), "test_labels": arrays()["test_labels"][::-1]})
    assert main(["eval", str(out)]) == 2
    assert "the images or labels differ" in capsys.readouterr().err


def test_names_of_classes_and_several_batches(data: Images, tmp_path: Path, tiny: None) -> None:
    checkpoint = Checkpoint(tmp_path)
    result = run(settings(method="plora-ensemble"), data=data, checkpoint=checkpoint)
    trained = Trained(tmp_path)
    rows = trained.predict(np.concatenate([data.test_images] * 2))
    assert rows[:24] == rows[24:]
    assert all(row["name"] == data.class_names[row["class"]] for row in rows)  # type: ignore[index]
    right = np.mean([row["class"] == label for row, label in zip(rows, data.test_labels)])
    assert 100 * right == pytest.approx(result.curve[-1])


@pytest.mark.slow
def test_killed_at_random_moments(problem: list[str], tmp_path: Path) -> None:
    """SIGKILL, which no process can catch, and --resume; benchmarks/resume.py does it twenty times on real data."""
    script = (
        f"{TINY}\nimport sys, torch\nimport plora_ext.cil.build as engine\nfrom plora_ext.cli import main\n"
        "torch.set_num_threads(1)\nengine.create_backbone = create\nsys.exit(main(sys.argv[1:]))"
    )

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", script, "train", *problem, "--epochs", "30", "--resume", "--out", str(out)]
        return subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, text=True)

    assert start(tmp_path / "whole").wait() == 0
    delays = random.Random(0)
    for _ in range(2):
        process = start(tmp_path / "cut")
        assert process.stdout is not None and "3 tasks" in process.stdout.readline()  # it has begun
        time.sleep(delays.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "cut").wait() == 0
    whole, cut = (load_results(tmp_path / name)[0] for name in ("whole", "cut"))
    assert (whole.curve, whole.matrix) == (cut.curve, cut.matrix)
    listed = [
        sorted(p.relative_to(tmp_path / name).as_posix() for p in (tmp_path / name).rglob("*"))
        for name in ("whole", "cut")
    ]
    assert [n.rpartition("-")[0] for n in listed[0]] == [n.rpartition("-")[0] for n in listed[1]]
    assert listed[0] == listed[1]  # the same content: nothing half-written, nothing left behind


def test_only_what_has_changed_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.begin({}, {})
    written: list[str] = []
    write = Checkpoint._write
    monkeypatch.setattr(
        Checkpoint, "_write", lambda self, name, content: (written.append(name), write(self, name, content))[1]
    )
    parameters = {f"adapter:{i}": {"alpha": 1.0, "factors": [torch.nn.Parameter(torch.randn(3))]} for i in range(3)}

    def saved() -> list[str]:
        written.clear()
        checkpoint.save_task({"curve": [1.0], "tasks": 2}, parameters)
        assert Checkpoint(tmp_path, resume=True).load()["state"].keys() == {*parameters, "rng"}
        return [name for name in written if name != "rng"]

    assert saved() == ["adapter:0", "adapter:1", "adapter:2"] and saved() == []
    optimizer = torch.optim.AdamW(parameters["adapter:1"]["factors"])  # type: ignore[arg-type]
    parameters["adapter:1"]["factors"][0].grad = torch.ones(3)  # type: ignore[index]
    optimizer.step()
    assert saved() == ["adapter:1"]
    parameters["adapter:2"]["factors"] = [torch.nn.Parameter(torch.ones(3))]
    assert saved() == ["adapter:2"]
    parameters["adapter:0"]["alpha"] = 2.0
    assert saved() == ["adapter:0"]
    fused = torch.optim.AdamW(parameters["adapter:1"]["factors"], fused=True)  # type: ignore[arg-type]
    fused.step()  # nor this nor the next raises torch's count of writes
    assert saved() == ["adapter:1"]
    parameters["adapter:2"]["factors"][0].data.mul_(2)  # type: ignore[index]
    assert saved() == ["adapter:2"]
    parameters["adapter:2"]["factors"] = [parameters["adapter:2"]["factors"][0].clone()]  # type: ignore[index]
    assert saved() == []
    for path in checkpoint.folder.glob("adapter-*"):
        path.unlink()
    assert saved() == ["adapter:0", "adapter:1", "adapter:2"]
    value = Checkpoint(tmp_path, resume=True).load()["state"]["adapter:1"]["factors"][0]
    assert torch.equal(value, parameters["adapter:1"]["factors"][0])  # type: ignore[index]


def test_a_run_that_is_measured_on_in_place_is_saved_as_it_is(tmp_path: Path) -> None:
    checkpoint, record = Checkpoint(tmp_path), {"curve": [1.0], "tasks": 3}
    checkpoint.begin({}, {})
    for accuracy in (2.0, 3.0):
        checkpoint.save_task(record, {})
        assert Checkpoint(tmp_path, resume=True).manifest["run"] == record
        record["curve"].append(accuracy)  # type: ignore[attr-defined]


@pytest.mark.parametrize("writer", ["fused", "data"])
def test_a_checkpoint_holds_the_live_adapter(
    writer: str, data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lora-sequential` trains the same tensors in every task; no write to them may pass unseen."""
    if writer == "fused":
        fused = lambda self, groups: torch.optim.AdamW(groups, 5e-3, fused=True)  # noqa: E731
        monkeypatch.setattr(plora_ext.cil.speed.Speed, "optimizer", fused)
    else:

        def write(self: Trainer, task: int, parameters: list[torch.Tensor], *_) -> None:
            for parameter in parameters:
                parameter.data.add_(0.01)

        monkeypatch.setattr(Trainer, "fit", write)
    result, method = learn(data, Checkpoint(tmp_path), method="lora-sequential")
    saved = Checkpoint(tmp_path, resume=True).load()["state"]["adapter:task0"]["factors"]
    again, resumed = learn(data, Checkpoint(tmp_path, resume=True), method="lora-sequential")
    assert again.curve == result.curve
    for key, layer in method.adapters.layers.items():  # type: ignore[attr-defined]
        other = resumed.adapters.layers[key]  # type: ignore[attr-defined]
        live, back = ([p for pair in of.pairs("task0") for p in pair] for of in (layer, other))
        for a, b, c in zip(live, saved[key], back, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"method": "simplecil", "head": "gaussian"}, set()),
        ({"method": "simplecil", "head": "gaussian", "covariance_rank": 2}, {"head:covariances:shared"}),
        ({"method": "plora", "head": "replay", "alignment": "shift"}, set()),
        ({"method": "plora", "head": "gaussian"}, {"head:covariances:0", "head:covariances:1"}),
        (
            {"method": "plora", "head": "replay", "covariance_rank": 2},
            {"head:covariances:0", "head:covariances:1", "head:covariances:shared"},
        ),
        ({"method": "plora", "head": "ranpac"}, set()),
    ],
)
def test_what_a_head_keeps_is_written_once(
    changes: dict, again: set[str], data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Covariances of old tasks, unless a drift map moves them; the projections of ranpac."""
    written: list[str] = []
    write = Checkpoint._write
    monkeypatch.setattr(
        Checkpoint, "_write", lambda self, name, content: (written.append(name), write(self, name, content))[1]
    )
    learn(data, Checkpoint(tmp_path), **changes)
    fixed = [name for name in written if "covariances" in name or name == "head:weights"]
    tasks = {f"head:covariances:{t}" for t in range(3)} if changes["head"] != "ranpac" else {"head:weights"}
    assert set(fixed) == tasks | again and {name for name in fixed if fixed.count(name) > 1} == again
