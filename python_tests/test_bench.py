"""Benchmarks: that rivals compute the same, that tables say what was measured, that all of benchmarks/ imports."""

from __future__ import annotations

import csv
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pilot_host import EASE

from plora_ext import bench, ops
from plora_ext.cil import Settings, timing
from plora_ext.cil.stream import Task, TaskStream
from plora_ext.cli import main

CPU = torch.device("cpu")


def test_a_table_of_medians_differences_and_failures() -> None:
    def sleeps(ms: float, value: float) -> torch.Tensor:
        time.sleep(ms / 1e3)
        return torch.full((3,), value)

    def fails() -> torch.Tensor:
        raise RuntimeError("no such kernel\nat all")

    forms = {"ours": lambda: sleeps(2, 1), "slower": lambda: sleeps(20, 1.5), "broken": fails}
    lines = bench.measure(bench.Case("sleep", forms, alike=["slower", "broken"]), CPU, 3)
    assert [len(line.times) for line in lines] == [3, 3, 0]
    assert lines[0].median_ms >= 2 and lines[1].over_ours > 2 and lines[1].error == pytest.approx(0.5)
    printed = bench.table(lines).splitlines()
    assert len({row.count("|") for row in printed}) == 1
    assert printed[-1] == "| sleep | broken | – | – | – | RuntimeError: no such kernel |"


@pytest.fixture
def ease(monkeypatch: pytest.MonkeyPatch, repository: Path) -> Any:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("ease")


def test_the_ensemble_table(ease: Any) -> None:
    for rivals in ({}, {"rivals": lambda vit: ease.rivals(vit, 2)}):
        (case,) = bench.ensemble_cases(CPU, quick=True, T=2, **rivals)
        lines = bench.measure(case, CPU, 1)
        assert [line.form for line in lines] == [bench.OURS, bench.LOOP, *([ease.EASE] if rivals else []), bench.PLAIN]
        assert not any(line.note for line in lines) and lines[1].error < 1e-5


@torch.no_grad()
def test_eases_pass_is_the_vit_where_its_adapters_are_zero(ease: Any) -> None:
    vit = bench.create_vit("small").eval()
    images = torch.randn(2, 3, 48, 48)
    expected = vit(images)
    passed = ease.EasePass(vit, T=2)
    for parameter in passed.adapters[0].parameters():
        parameter.zero_()
    zero, other = passed(images)
    torch.testing.assert_close(zero, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, expected, atol=1e-2)
    assert passed(images, 1).shape == (1, 2, 192)


def test_eases_loops_compute_what_the_operators_do(ease: Any) -> None:
    task = torch.tensor([0, 0, 1, 2, 2, 2])
    prototypes, features = torch.randn(6, 3, 8), torch.randn(5, 3, 8)
    torch.testing.assert_close(ease.complete(prototypes, task), ops.complete_prototypes(prototypes, task))
    weights = ops.own_other_weights(task, 3, 0.1)
    torch.testing.assert_close(
        ease.logits(features, prototypes, [2, 1, 3], 0.1), ops.subspace_logits(features, prototypes, weights)
    )


def test_evaluations_after_every_task(ease: Any) -> None:
    ensemble = importlib.import_module("ensemble")
    forwards = {form: ensemble.evaluations(form, "small", 2, 5, CPU)[1] for form in (bench.OURS, bench.LOOP)}
    assert forwards == {bench.OURS: 5 + 15, bench.LOOP: 5 + 20}  # 5 images of task 0 under adapter 0 are kept


SMALL = {"images": 3, "rows": 5, "D": 8, "out": 6, "T": 4, "r": 2, "n": 20, "C": 6, "old": 5, "new": 3, "B": 2}


@pytest.mark.parametrize("name", bench.OPERATORS)
def test_every_operator_and_its_twin(name: str) -> None:
    operator = bench.OPERATORS[name]
    given = operator.inputs(**{size: SMALL[size] for size in operator.sizes})
    ours, twin = (form(**given) for form in operator.forms.values())
    torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-5)
    again = operator.inputs(dtype=torch.float64, **{size: SMALL[size] for size in operator.sizes})
    assert {t.dtype for t in again.values() if torch.is_tensor(t) and t.is_floating_point()} >= {torch.float64}
    assert {key: t.shape for key, t in again.items() if torch.is_tensor(t)} == {
        key: t.shape for key, t in given.items() if torch.is_tensor(t)
    }


def test_every_public_operator_is_listed() -> None:
    others = {"AdapterBatch", "own_other_weights", "lora_indexed_", "lora_sum_", "lora_all_"}  # no kernels of their own
    assert set(bench.OPERATORS) == set(ops.__all__) - others


def test_a_form_that_breaks_the_gpu_ends_the_measurement_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """All after it would fail as well, and the last of them would be blamed."""

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    case = bench.Case("few rows", {"ours": lambda: torch.ones(1), "a rival": lambda: torch.ones(1, 2) @ torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"^few rows: a rival broke the GPU's context: RuntimeError: "):
        bench.measure(case, torch.device("cpu"), 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench.measure(case, torch.device("cpu"), 1)[1].note.startswith("RuntimeError: ")


def test_forms_take_turns() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "abc"}
    assert {name: len(found) for name, found in bench.in_turn(calls, 2).items()} == {"a": 2, "b": 2, "c": 2}
    bench.in_turn(calls, 2, turning=True)
    assert "".join(order) == "abcabc" + "abcbca"
    assert len(bench.in_turn({"a": lambda: 0}, 1, seconds=60, most=7)["a"]) == 7 and bench.in_turn({}, 1) == {}


def test_a_table_and_its_files(ease: Any, tmp_path: Path) -> None:
    harness = importlib.import_module("harness")
    assert (
        harness.table(("a", "b", "c"), [("x", 1, "y")], texts=1, notes=1)
        == "| a | b | c |\n|---|---:|---|\n| x | 1 | y |\n"
    )
    assert [harness.number(v, ".1f") for v in (1.25, None, float("nan"), "")] == ["1.2", "–", "–", "–"]
    where = harness.facts(CPU, "abc", threads=3)
    assert (where["commit"], where["threads"], where["torch"]) == ("abc", 3, torch.__version__)
    harness.write(tmp_path / "t", ("n", "torch"), [{"n": 1, "private": 2}], "text\n", where)
    (row,) = csv.DictReader((tmp_path / "t.csv").read_text(encoding="utf-8").splitlines())
    assert (
        list(row) == ["n", "torch", "device", "threads", "plora_ext", "commit", "date", "command"] and row["n"] == "1"
    )
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == f"{harness.said(where)}\n\ntext\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.md"]


@pytest.mark.parametrize(
    "options", ["operators.py --only logits|95 --seconds 0", "cpu_operators.py --only 95 --seconds 0"]
)
def test_benchmarks_of_operators_run(options: str, repository: Path, tmp_path: Path) -> None:
    script, *rest = options.split()
    command = [sys.executable, str(repository / "benchmarks" / script), *rest, "--out", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "o.csv").read_text(encoding="utf-8").splitlines()))
    assert {"plora_ext", "plain torch"} == {row.get("rival") or row["form"] for row in rows}
    assert (tmp_path / "o.md").read_text(encoding="utf-8").count("\n| ") == 1 + len(rows)


@pytest.mark.parametrize(
    "script",
    [path.name for path in sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))],
)
def test_benchmarks_import(script: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script == "soak.py":
        pytest.importorskip("test_cuda_lora")
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    runpy.run_path(str(repository / "benchmarks" / script))


_EASE = """
import torch
from pilot_ease import ease_learner, ease_vit, import_pilot
import_pilot()
import pilot_host
cpu = torch.device("cpu")
learner, manager = ease_learner(
    lambda: ease_vit(cpu, 64, img_size=32, depth=1, mlp_ratio=1), lambda arguments: pilot_host.Noise(5, 4, 32),
    seed=1, init_cls=3, increment=2, epochs=1, workers=0, device=cpu,
)
for _ in range(manager.nb_tasks):
    learner.incremental_train(manager)
    learner.after_task()
print(learner._total_classes, learner.args["later_epochs"], learner.args["nb_tasks"], learner._network.fc.weight.shape)
"""


def test_pilots_ease_is_set_up_in_one_place(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = repository / "python_tests"
    shutil.copytree(tests / "hosts" / "pilot", tmp_path / "pilot")
    (tmp_path / "pilot" / "exps").mkdir()
    (tmp_path / "pilot" / "exps" / "ease.json").write_text(json.dumps({**EASE, "ffn_num": 64}))
    path = [str(repository / "benchmarks"), str(tests)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("PLORA_PILOT", str(tmp_path / "pilot"))
    done = subprocess.run([sys.executable, "-c", _EASE], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["5 1 2 torch.Size([5, 128])"], done.stderr
    script = [sys.executable, str(repository / "benchmarks" / "integrations.py"), "--out", str(tmp_path / "out")]
    options = "--quick --device cpu --rows ease-prototypes --seconds 0 --limit 0".split()
    done = subprocess.run([*script, *options], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and "ease-prototypes: cut at EASE, prototypes" in done.stdout, done.stderr
    monkeypatch.delenv("PLORA_PILOT")
    done = subprocess.run([sys.executable, "-c", _EASE], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stderr == "PLORA_PILOT must name a checkout of LAMDA-PILOT, it is not set\n"


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[torch.device, bool]] = []

    def cases(device: torch.device, quick: bool) -> list[bench.Case]:
        asked.append((device, quick))
        return [bench.Case("nothing", {"plora_ext": lambda: torch.zeros(1)})]

    monkeypatch.setitem(bench.CASES, "prototypes", cases)
    assert main(["bench", "prototypes", "--quick", "--device", "cpu"]) == 0
    assert asked == [(CPU, True)]
    assert "| nothing | plora_ext | 0.0" in capsys.readouterr().out
    assert main(["bench", "prototypes", "--device", "gpu"]) == 2
    assert "device 'gpu' cannot be used" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "lora"])
    assert "invalid choice: 'lora'" in capsys.readouterr().err


def test_images_a_second_from_every_source(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "benchmarks" / "throughput.py"), "--out", str(tmp_path / "rates")]
    command += "--model embedded --device cpu --amp none --batch 4 --eval-batch 4 --passes 2 --workers 1".split()
    done = subprocess.run([*command, "--images", "12"], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "rates.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 2 * 6 and all(float(row["later"]) > 0 for row in rows)


@pytest.mark.parametrize(
    "method, device",
    [("plora", "cpu"), ("simplecil", "cpu"), ("joint", "cpu"), pytest.param("plora", "cuda", marks=pytest.mark.cuda)],
)
def test_the_parts_of_a_run(method: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 20)
    images = rng.integers(0, 256, (80, 12, 12, 3), dtype=np.uint8)
    np.savez(
        tmp_path / "data.npz",
        train_images=images,
        train_labels=labels,
        test_images=images[::2],
        test_labels=labels[::2],
    )
    options = f"--data {tmp_path}/data.npz --method {method} --increment 2 --batch-size 2 --epochs 30"
    (tmp_path / "device.yaml").write_text(f"device: {device}\n")
    options += f" -c {tmp_path}/device.yaml"
    command = ["bench", "run", *options.split(), "--seconds", "0.001", "--out", str(tmp_path / "rates.json")]
    assert main(command) == 0
    trains = method != "simplecil"
    steps = ["step on one batch, eager", *["step on one batch, captured"] * (device == "cuda")]
    parts = [*steps, "loop, first epoch", "loop, later", "data alone"] * trains
    found = json.loads((tmp_path / "rates.json").read_text(encoding="utf-8"))
    assert list(found["images_per_second"]) == [*parts, "evaluation, one batch", "evaluation"]
    assert all(rate > 0 for rate in found["images_per_second"].values())
    assert found["images"] == ([8, 80 if method == "joint" else 40] if trains else [32, 40])
    assert found["settings"]["epochs"] == 30 and found["classes"] == ([4] if method == "joint" else [2, 2])
    assert ("train" in found["phases"]) == trains
    if trains:  # thirty epochs, not the three that were run
        assert found["phases"]["train"] > 20 * 8 / found["images_per_second"]["loop, later"]
    if device == "cuda":
        assert found["cuda_graphs"]["training"].startswith("captured in")
    printed = capsys.readouterr().out
    assert "| evaluation |" in printed and "| eval |" in printed and "%" in printed


def test_tasks_of_other_sizes_are_thinned_alike() -> None:
    labels = np.repeat(np.arange(4), 20)
    stream = TaskStream(labels, labels, tasks=[[0], [1, 2, 3]])
    for number, sizes in ((30, [10, 30]), (100, [20, 60]), (6, [2, 6]), (1, [1, 3])):
        some = timing.parts(stream.tasks, number)
        assert [len(task.train) for task in some] == [len(task.test) for task in some] == sizes
        assert [len(np.unique(task.train_labels)) for task in some] == [1, 3]


def test_the_probe_s_steps_are_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a task has more classes than two batches have images, its epoch is of more steps than two."""
    images, labels = np.zeros((40, 12, 12, 3), np.uint8), np.repeat(np.arange(20), 2)
    np.savez(tmp_path / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    asked: list[int] = []

    def parts(tasks: list[Task], number: int) -> list[Task]:
        asked.append(number)
        raise ValueError("that is all")

    monkeypatch.setattr(timing, "parts", parts)
    monkeypatch.setattr(timing.Clock, "seconds", [1.0, 1.0])
    settings = Settings(data=str(tmp_path / "data.npz"), increment=20, batch_size=2, device="cpu")
    with pytest.raises(ValueError, match="that is all"):
        timing.time_run(settings, 3.0)
    assert asked == [2 * 3 * 10]  # 20 images are 10 steps, which took a second together


def test_the_parts_of_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "run", "--seconds", "0"]) == 2
    assert capsys.readouterr().err == "error: seconds must be above 0 and at most 600, got 0.0\n"
    assert main(["bench", "run", "--lrr", "1"]) == 2
    assert "unknown argument '--lrr'; did you mean '--lr'?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_loop_against_its_step(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "benchmarks" / "graphs.py"), "--out", str(tmp_path / "graphs")]
    command += "--device cpu --model embedded --small embedded --batches 2 --steps 3 --eval-batch 4".split()
    command += "--small-batch 2 --workers 0".split()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "graphs.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["part"] for row in rows] == ["arrays", *["files"] * 2, *["evaluation"] * 3, *["step"] * 2, "small"]
    for row in rows:
        ratio = float(row["images_per_s"]) / float(row["its_images_per_s"])
        assert float(row["ratio"]) == pytest.approx(1 / ratio if row["part"] == "step" else ratio)
