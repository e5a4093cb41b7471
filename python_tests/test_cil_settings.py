"""Settings: defaults, files, the command line's words, and errors that name the closest valid one."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from plora_ext.cil.methods import METHODS
from plora_ext.cil.settings import Settings, parse
from plora_ext.data.backbone import PILOT_NAMES


def test_defaults_resolve() -> None:
    settings = Settings()
    assert (settings.onto, settings.init) == ("base", "first")
    assert (Settings(onto="fused").init, Settings(fusion="learned").onto) == ("fresh", "fused")
    assert replace(settings, method="joint").method == "joint"
    assert all(f.metadata["help"] for f in fields(Settings))


def test_every_method_can_be_named() -> None:
    assert all(Settings(method=name).method == name for name in METHODS)


def test_yaml_round_trip(tmp_path: Path) -> None:
    settings = Settings(lr=1e-3, tasks=[[0, 1], [2]], class_order="none", lora_alpha=8, target_modules=["q", "v"])
    (tmp_path / "a.yaml").write_text(settings.to_yaml())
    assert Settings.load(tmp_path / "a.yaml") == settings


def test_file_then_overrides(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nepochs: 7\n")  # YAML 1.1 reads 1e-3 as text
    settings = Settings.load(tmp_path / "a.yaml", {"epochs": 2})
    assert (settings.lr, settings.epochs) == (1e-3, 2)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert Settings.load(tmp_path / "empty.yaml") == Settings()


def test_the_configs_of_the_repository_load(repository: Path) -> None:
    configs = sorted((repository / "configs").glob("*.yaml"))
    assert configs
    for config in configs:
        Settings.load(config)
    assert Settings.load(repository / "configs" / "icon100_b0_inc10.yaml") == Settings()  # as the demo runs it


def test_configs_are_what_their_names_say(repository: Path) -> None:
    listed = (repository / "configs" / "README.md").read_text()
    for config in (repository / "configs").glob("*.yaml"):
        data, base, increment, *method = config.stem.split("_")
        settings = Settings.load(config)
        assert (settings.data, f"b{settings.init_cls}", f"inc{settings.increment}") == (data, base, increment)
        if data != "icon100":
            assert "_".join(method) in listed and f"{data} {increment}" in listed
            assert (settings.transform, settings.normalize, settings.image_size) == ("pilot", "none", None)
            assert settings.backbone in (*PILOT_NAMES.values(), "vit_base_patch16_224.augreg2_in21k_ft_in1k")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-3", 1e-3),
        ("epochs", "5", 5),
        ("augment", "false", False),
        ("target_modules", "q,v", ["q", "v"]),
        ("target_modules", "qkv", ["qkv"]),
        ("class_order", "none", "none"),
        ("class_order", "2,0,1", [2, 0, 1]),
        ("class_order", "null", None),
        ("tasks", "[[0, 1], [2]]", [[0, 1], [2]]),
        ("lora_alpha", "null", None),
        ("data", "1993", "1993"),
    ],
)
def test_words_of_the_command_line(name: str, text: str, value: object) -> None:
    settings = Settings(**{name: parse(name, text)})
    assert getattr(settings, name) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "unknown setting 'learning_rate'"),
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
        ({"augment": "yes please"}, "augment must be bool"),
        ({"target_modules": "qkv"}, r"target_modules must be list\[str\], got 'qkv'"),
        ({"tasks": [0, 1]}, r"tasks must be list\[int\], got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"fusion": "learned", "onto": "base"}, "needs onto 'fused'"),
        ({"init": "inflora", "fusion": "sum"}, "init inflora needs fusion sum and onto fused, got sum and base"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"shrinkage": 2}, r"shrinkage must be in \[0, 1\], got 2"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number, got inf"),
        ({"seed": 2**33}, r"seed must be in \[0, 4294967295\], got 8589934592"),
        ({"image_size": 100_000}, "image_size must be at most 4096, got 100000"),
        ({"projections": 10**8}, "projections must be at most 200000, got 100000000"),
        ({"out": ""}, "out must be the name of a folder, got ''"),
        ({"tasks": [[0], [1]], "class_order": [1, 0]}, "leave class_order out"),
        ({3: 4}, "names of settings must be words, got 3: 4"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.load(None, values)


@pytest.mark.parametrize(
    ("text", "message"), [("[1, 2]", "must hold `setting: value` lines"), ("a: [", "not valid YAML")]
)
def test_files_that_are_not_settings(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Settings.load(tmp_path / "a.yaml")
