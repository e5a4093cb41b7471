"""Settings: defaults, files, the command line's words, and errors that name the closest valid one."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch import nn

from plora_ext.cil import PLoRA
from plora_ext.cil.methods import METHODS
from plora_ext.cil.same_run import refuse_other
from plora_ext.cil.settings import Settings, current, parse
from plora_ext.data.backbone import PILOT_NAMES


def test_defaults_resolve() -> None:
    settings = Settings()
    assert (settings.onto, settings.init) == ("base", "newest")
    assert (Settings(onto="fused").init, Settings(fusion="learned").onto) == ("fresh", "fused")
    assert replace(settings, method="joint").method == "joint"
    assert settings.distillation == 0 and replace(settings, head="gaussian").distillation == 1
    assert replace(settings, head="gaussian", distill=0).distillation == 0 and Settings(distill=2).distillation == 2
    assert all(f.metadata["help"] for f in fields(Settings))


def test_every_method_can_be_named() -> None:
    assert all(Settings(method=name).method == name for name in METHODS)


def test_yaml_round_trip(tmp_path: Path) -> None:
    settings = Settings(lr=1e-3, tasks=[[0, 1], [2]], class_order="sorted", lora_alpha=8, target_modules=["q", "v"])
    (tmp_path / "a.yaml").write_text(settings.to_yaml())
    assert Settings.load(tmp_path / "a.yaml") == settings


def test_file_then_overrides(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nepochs: 7\n")  # YAML 1.1 reads 1e-3 as text
    settings = Settings.load(tmp_path / "a.yaml", {"epochs": 2})
    assert (settings.lr, settings.epochs) == (1e-3, 2)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert Settings.load(tmp_path / "empty.yaml") == Settings()


def test_numbers_of_a_file_are_decimal(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 0020\ninit_cls: 010\ntasks: [[010, 1.5e+0], [2]]\n")
    with pytest.raises(ValueError, match="tasks must be int, got 1.5"):
        Settings.load(tmp_path / "a.yaml")
    settings = Settings.load(tmp_path / "a.yaml", {"tasks": None})
    assert (settings.seed, settings.init_cls) == (20, 10)
    (tmp_path / "a.yaml").write_text("lr: 1:30.5")  # YAML 1.1: 90.5
    with pytest.raises(ValueError, match="lr must be float, got '1:30.5'"):
        Settings.load(tmp_path / "a.yaml")


def test_a_day_is_a_text(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    for day in ("2024-05-17", "2024-13-45"):
        file.write_text(f"out: {day}\n")
        assert Settings.load(file).out == day
    with pytest.raises(ValueError, match="seed must be int, got '2024-13-45'"):
        Settings.load(None, {"seed": parse("seed", "2024-13-45")})


def test_the_word_off_of_a_file(tmp_path: Path) -> None:
    """YAML reads it as false, which was refused."""
    (tmp_path / "a.yaml").write_text("graphs: off\naugment: off\n")
    settings = Settings.load(tmp_path / "a.yaml")
    assert settings.graphs == "off" and settings.augment is False
    with pytest.raises(ValueError, match="unknown head False"):
        Settings(head=False)  # type: ignore[arg-type]


def test_files_over_one_another(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("epochs: 7\nlr: 0.1\n")
    (tmp_path / "b.yaml").write_text("epochs: 3\nhead: gaussian\n")
    settings = Settings.load([tmp_path / "a.yaml", tmp_path / "b.yaml"], {"seed": 5})
    assert (settings.lr, settings.epochs, settings.head, settings.seed) == (0.1, 3, "gaussian", 5)
    assert Settings.load([tmp_path / "b.yaml", tmp_path / "a.yaml"]).epochs == 7


def test_what_follows_from_others_follows_in_a_copy(tmp_path: Path) -> None:
    mean, learned = Settings(), Settings(fusion="learned")
    changed = replace(mean, fusion="learned")
    assert (changed.onto, changed.init) == ("fused", "fresh") and changed == learned
    assert replace(learned, fusion="mean") == mean and replace(mean, onto="fused").init == "fresh"
    (tmp_path / "mean.yaml").write_text(mean.to_yaml())
    assert "\nonto: null  # here base\ninit: null  # here newest\n" in mean.to_yaml()
    assert Settings.load(tmp_path / "mean.yaml", {"fusion": "learned"}) == learned
    said = replace(Settings(onto="base", init="fresh"), seed=1)  # what was said stays
    assert (said.onto, said.init) == ("base", "fresh") and "\nonto: base\n" in said.to_yaml()
    with pytest.raises(ValueError, match="needs onto 'fused'"):
        replace(said, fusion="learned")
    assert all(type(mean.as_dict()[name]) is str for name in ("onto", "init"))


def test_the_scale_follows_from_the_method(tmp_path: Path, repository: Path) -> None:
    plora, ensemble = Settings(), Settings(method="plora-ensemble")
    assert (plora.scale, ensemble.scale) == (32, 16) and type(ensemble.as_dict()["scale"]) is float
    assert replace(ensemble, method="joint").scale == 32 and replace(ensemble, scale=8, method="joint").scale == 8
    (tmp_path / "a.yaml").write_text(ensemble.to_yaml())
    assert "\nscale: null  # here 16.0\n" in ensemble.to_yaml() and Settings.load(tmp_path / "a.yaml") == ensemble
    assert Settings.load(tmp_path / "a.yaml", {"method": "plora"}).scale == 32
    assert replace(plora, scale=None) == plora
    assert Settings.load(repository / "configs" / "methods" / "ensemble.yaml") == ensemble


def test_words_of_before() -> None:
    with pytest.warns(UserWarning, match='class_order "none" is called "sorted" now'):
        assert Settings(class_order="none").class_order == "sorted"  # type: ignore[arg-type]
    assert Settings(class_order=None).class_order == "shuffled"  # type: ignore[arg-type]
    assert current({"class_order": "none", "r": 3}) == {"class_order": "sorted", "r": 3}
    assert current({"class_order": [1, 0]})["class_order"] == [1, 0] and current({})["class_order"] == "shuffled"


def test_checkpoints_in_words_of_before_are_of_the_same_run() -> None:
    def fingerprint(settings: dict) -> dict:
        return {"settings": settings, "data": "d", "tasks": [], "backbone": "b"}

    now = fingerprint(Settings().as_dict())
    before = fingerprint({**Settings().as_dict(), "class_order": None, "onto": "base", "init": "newest"})
    del before["settings"]["replay_epochs"]
    assert refuse_other(before, now, "it is the checkpoint") == {}
    with pytest.raises(ValueError, match="class_order is 'shuffled' there and 'sorted' here"):
        refuse_other(before, fingerprint(Settings(class_order="sorted").as_dict()), "it is the checkpoint")


def test_a_file_of_settings_has_a_setting_a_line() -> None:
    text = Settings(target_modules=r".*\.attn\.(qkv|proj)").to_yaml()
    assert [line.split(":")[0] for line in text.splitlines()] == [f.name for f in fields(Settings)]


def test_the_configs_of_the_repository_load(repository: Path) -> None:
    folder = repository / "configs"
    assert Settings.load(folder / "icon100_b0_inc10.yaml") == Settings()  # as the demo runs it
    methods = {path.stem: yaml.safe_load(path.read_text()) for path in (folder / "methods").glob("*.yaml")}
    assert sorted(methods) == "aper ensemble first gaussian inflora ranpac sdlora slca sldc".split()
    assert len([*folder.rglob("*.yaml")]) <= 20
    for data in folder.glob("*.yaml"):
        for method, values in methods.items():
            settings = Settings.load([data, folder / "methods" / f"{method}.yaml"])
            assert {name: getattr(settings, name) for name in values} == {
                **values,
                **{name: float(values[name]) for name in ("lr", "lr_later") if name in values},
            }
            assert settings.increment == Settings.load(data).increment


def test_configs_are_what_their_names_say(repository: Path) -> None:
    listed = (repository / "configs" / "README.md").read_text()
    for config in (repository / "configs").glob("*.yaml"):
        data, base, increment, *_ = config.stem.split("_")
        settings = Settings.load(config)
        assert (settings.data, f"b{settings.init_cls}", f"inc{settings.increment}") == (data, base, increment)
        if data != "icon100":
            assert f"{data} {increment}" in listed
            assert (settings.transform, settings.normalize, settings.image_size) == ("pilot", "none", None)
            assert settings.backbone in PILOT_NAMES.values()
    assert all(f"`{path.stem}`" in listed for path in (repository / "configs" / "methods").glob("*.yaml"))


def test_values_of_numpy_and_pathlib_are_plain_ones() -> None:
    """An order as an array ended in numpy's question of its truth."""
    given = Settings(class_order=np.array([2, 0, 1]), epochs=np.int64(3), out=Path("runs/a"), weights=Path("w.pth"))
    assert (given.class_order, given.epochs, given.out, given.weights) == ([2, 0, 1], 3, "runs/a", "w.pth")
    assert type(given.epochs) is int and Settings(class_order=range(3)).class_order == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-3", 1e-3),
        ("epochs", "5", 5),
        ("augment", "false", False),
        ("target_modules", "q,v", ["q", "v"]),
        ("target_modules", "qkv", ["qkv"]),
        ("target_modules", "blocks.0.attn.qkv, fc1", ["blocks.0.attn.qkv", "fc1"]),
        ("target_modules", r".*\.(fc1|fc2)", r".*\.(fc1|fc2)"),
        ("target_modules", "all-linear", "all-linear"),
        ("class_order", "sorted", "sorted"),
        ("class_order", "2,0,1", [2, 0, 1]),
        ("class_order", "0", [0]),
        ("class_order", "null", "shuffled"),
        ("tasks", "[[0, 1], [2]]", [[0, 1], [2]]),
        ("lora_alpha", "null", None),
        ("data", "1993", "1993"),
        ("epochs", "4.0", 4),
        ("out", "~/$RUNS/a", "/home/me/some/a"),
        ("weights", "$HOME/w.pth", "/home/me/w.pth"),
        ("seed", "010", 10),  # as `seq -w` counts; YAML 1.1 has it to base 8
        ("seed", "1_000", 1000),
        ("init_cls", "0x10", 16),
        ("lr", "0010", 10.0),
        ("class_order", "002, 000,001", [2, 0, 1]),
        ("out", "1:30", "1:30"),
    ],
)
def test_words_of_the_command_line(name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "some")
    settings = Settings(**{name: parse(name, text)})
    assert getattr(settings, name) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "unknown setting 'learning_rate'; did you mean 'lr'[?]$"),
        ({"bs": 1}, "unknown setting 'bs'; did you mean 'batch_size'?"),
        ({"output_dir": "x"}, "unknown setting 'output_dir'; did you mean 'out'?"),
        ({"val_fraction": 1}, "unknown setting 'val_fraction'; did you mean 'validation'[?]$"),
        ({"smoothing": 1}, "unknown setting 'smoothing'; train --help lists them$"),
        ({"epochs": 1.5}, "epochs must be int, got 1.5"),
        ({"epoch": 1}, "unknown setting 'epoch'; did you mean 'epochs'?"),
        ({"method": "plora-ensembel"}, "unknown method 'plora-ensembel'; did you mean 'plora-ensemble'?"),
        ({"alignment": "semantics"}, "unknown alignment 'semantics'; did you mean 'semantic'?"),
        ({"fusion": 3}, "unknown fusion 3"),
        ({"epochs": "many"}, "epochs must be int, got 'many'"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"lr": "fast"}, "lr must be float, got 'fast'"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"tau": 0}, "tau must be above 0"),
        ({"lr_later": 0}, "lr_later must be above 0, got 0"),
        ({"augment": "yes please"}, "augment must be true or false"),
        ({"target_modules": 3}, r"target_modules must be list\[str\] or str, got 3"),
        ({"target_modules": "(qkv"}, r"target_modules must be a list or a regular expression, got '\(qkv'"),
        ({"class_order": "random"}, r"unknown class_order 'random'.*\(one of: shuffled, sorted\)"),
        ({"tasks": [0, 1]}, r"tasks must be list\[int\], got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"validation": 1.0}, r"validation must be in \[0, 1\), got 1"),
        ({"validation": -0.1}, r"validation must be in \[0, 1\), got -0.1"),
        ({"fusion": "learned", "onto": "base"}, "needs onto 'fused'"),
        ({"init": "inflora", "fusion": "sum"}, "init inflora needs fusion sum and onto fused, got sum and base"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"covariance_rank": 0}, "covariance_rank must be at least 1, got 0"),
        ({"covariance_rank": 2.5}, "covariance_rank must be int or null, got 2.5"),
        ({"shrinkage": 2}, r"shrinkage must be in \[0, 1\], got 2"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number, got inf"),
        ({"seed": 2**33}, r"seed must be in \[0, 4294967295\], got 8589934592"),
        ({"order_seed": -1}, r"order_seed must be in \[0, 4294967295\], got -1"),
        ({"image_size": 100_000}, "image_size must be at most 4096, got 100000"),
        ({"projections": 10**8}, "projections must be at most 200000, got 100000000"),
        ({"out": ""}, "out must be the name of a folder, got ''"),
        ({"tasks": [[0], [1]], "class_order": [1, 0]}, "leave class_order out"),
        ({3: 4}, "names of settings must be words, got 3: 4"),
        ({"plugins": ["./mine.py"]}, "plugins names './mine.py', which is no module here"),
        ({"seed": parse("seed", "1:30")}, "seed must be int, got '1:30'"),  # YAML 1.1: 90
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.load(None, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1, 2]", "must hold `setting: value` lines"),
        (b"a: [", "is not valid YAML"),
        (b"seed: 1\nr: 2\nseed: 3", "is not valid YAML: seed is given twice in line 3, column 1"),
        (b"lr: [1\nr: 2", "is not valid YAML: while parsing a flow sequence in line 1, column 5 expected"),
        ("seed: 1".encode("utf-16"), "is no text file"),
        (b"epochs: many", ": epochs must be int, got 'many'"),
        (b"head: cosin", ": unknown head 'cosin'; did you mean 'cosine'?"),
        (b"epoch: 1", ": unknown setting 'epoch'; did you mean 'epochs'?"),
        (b"1: 1", ": names of settings must be words, got 1: 1"),
        (b"seed: !!int x", "is not valid YAML: invalid literal for int"),
    ],
)
def test_files_that_are_not_settings(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "a.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a.yaml.*{re.escape(message)}"):
        Settings.load(tmp_path / "a.yaml", {"r": 1})
    with pytest.raises(ValueError, match="^lr must be"):  # not the file's fault
        Settings.load(None, {"lr": 0})


@pytest.mark.parametrize(
    ("name", "message"),
    [("methd", "; did you mean 'method'[?]$"), ("rank", "; did you mean 'r'[?]$"), ("zzz", "$")],
)
def test_keywords_that_are_not_settings(name: str, message: str) -> None:
    with pytest.raises(TypeError, match=f"^unknown setting {name!r}{message}"):
        Settings(**{name: 1})
    with pytest.raises(TypeError, match=f"^unknown setting {name!r}{message}"):
        replace(Settings(), **{name: 1})
    with pytest.raises(TypeError, match="^unknown setting 'rank'; did you mean 'r'[?]$"):
        PLoRA(nn.Identity(), rank=4)  # type: ignore[call-arg]
    assert list(signature(Settings).parameters) == [f.name for f in fields(Settings)]


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"cannot read settings from a.yaml \(No such .*\): looked for a .*at /"
    ):
        Settings.load("a.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("r: 3")
    assert Settings.load("~/a.yaml").r == 3
    with pytest.raises(IsADirectoryError, match=rf"cannot read settings from {tmp_path} \(Is a directory\)"):
        Settings.load(tmp_path)


@pytest.mark.parametrize("name", ["shrinkage", "cutmix"])
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_shares_lie_in_the_unit_interval(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\], got {value}$"):
        Settings(**{name: value})
