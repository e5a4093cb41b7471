"""The pages in docs: links lead somewhere, code runs, tables show what the result files say."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from plora_ext.cil import Settings
from plora_ext.cli import _parser

PAGES = ["README.md", "configs/README.md", "benchmarks/results/README.md", *(f"docs/{name}.md" for name in (
    "guide", "method", "metrics", "integrations", "reproducibility", "scaling"))]  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(repository: Path, name: str) -> None:
    page = repository / name
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_scaling_shows_what_the_files_say(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    scaling = runpy.run_path(str(repository / "benchmarks" / "scaling.py"))
    page = (repository / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling["filled"](page) == page, "run benchmarks/scaling.py"


def test_the_cost_model_is_consistent(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    scaling = runpy.run_path(str(repository / "benchmarks" / "scaling.py"))
    Scenario = scaling["Scenario"]
    one, two = (scaling["project"](Scenario("", T, 10, 128, 5, 2), 1) for T in (50, 100))
    assert two["train"] == pytest.approx(2 * one["train"]) and two["adapters"] == 2 * one["adapters"]
    assert two["eval"] == pytest.approx(one["eval"] * 100 * 101 / (50 * 51))
    assert one["bytes"] == 0 and one["network"] == 0 and one["full"] == 1
    step, _ = scaling["step_and_forward"]()
    assert one["train"] == pytest.approx(50 * 2 * 1280 * step / 3600)
    eight = scaling["project"](Scenario("", 50, 10, 128, 5, 2), 8)
    assert eight["bytes"] == 50 * 2 * 2 * 2 * 7 / 8 * (scaling["ADAPTER"] + 4 * 10 * 768)


def test_the_guide_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (repository / "docs" / "guide.md").read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", guide, re.DOTALL):
        for line in block.strip().splitlines():
            words = shlex.split(line)
            assert words[0] == "plora-ext"
            _, unknown = _parser().parse_known_args(words[1:])
            assert not unknown
    known = set(Settings().as_dict())
    table = guide.split("| to choose | settings |")[1].split("\n\n")[0]
    named = {n for n in re.findall(r"`([a-z_]+)`", table)}
    assert named <= known, named - known
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace('method="simplecil"', 'method="simplecil", device="cpu", increment=50'), {})
    assert not list(tmp_path.iterdir())
