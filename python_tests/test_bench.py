"""The benchmarks that the package carries: that rivals compute the same, and that the table says what was measured."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from plora_ext import bench, ops
from plora_ext.cli import main

CPU = torch.device("cpu")


def test_a_table_of_medians_differences_and_failures() -> None:
    def sleeps(ms: float, value: float) -> torch.Tensor:
        time.sleep(ms / 1e3)
        return torch.full((3,), value)

    def fails() -> torch.Tensor:
        raise RuntimeError("no such kernel\nat all")

    forms = {"ours": lambda: sleeps(2, 1), "slower": lambda: sleeps(20, 1.5), "broken": fails}
    lines = bench.measure(bench.Case("sleep", forms, alike=["slower", "broken"], slow=["slower"]), CPU, 3)
    assert [len(line.times) for line in lines] == [3, 1, 0]
    assert lines[0].median_ms >= 2 and lines[1].over_ours > 2 and lines[1].error == pytest.approx(0.5)
    printed = bench.table(lines).splitlines()
    assert len({row.count("|") for row in printed}) == 1
    assert printed[-1] == "| sleep | broken | – | – | – | RuntimeError: no such kernel |"


def test_the_ensemble_table() -> None:
    (case,) = bench.ensemble_cases(CPU, quick=True, T=2)
    lines = bench.measure(case, CPU, 1)
    assert [line.form for line in lines] == [bench.OURS, bench.LOOP, bench.EASE, bench.PLAIN]
    assert not any(line.note for line in lines) and lines[1].error < 1e-5


@torch.no_grad()
def test_eases_pass_is_the_vit_where_its_adapters_are_zero() -> None:
    vit = bench.create_vit("small").eval()
    images = torch.randn(2, 3, 48, 48)
    expected = vit(images)
    ease = bench.EasePass(vit, T=2)
    for parameter in ease.adapters[0].parameters():
        parameter.zero_()
    zero, other = ease(images)
    torch.testing.assert_close(zero, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, expected, atol=1e-2)
    assert ease(images, 1).shape == (1, 2, 192)


def test_eases_loops_compute_what_the_operators_do() -> None:
    task = torch.tensor([0, 0, 1, 2, 2, 2])
    prototypes, features = torch.randn(6, 3, 8), torch.randn(5, 3, 8)
    torch.testing.assert_close(bench.ease_complete(prototypes, task), ops.complete_prototypes(prototypes, task))
    weights = ops.own_other_weights(task, 3, 0.1)
    torch.testing.assert_close(
        bench.ease_logits(features, prototypes, task.tolist(), 0.1), ops.subspace_logits(features, prototypes, weights)
    )


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
