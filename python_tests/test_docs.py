"""The pages in docs: links lead somewhere, code runs, tables show what the result files say."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from plora_ext import variables
from plora_ext.arguments import parser
from plora_ext.cil import Settings
from plora_ext.cil.heads import HEADS
from plora_ext.cli import COMMANDS

PAGES = ["README.md", "configs/README.md", "benchmarks/results/README.md", *(f"docs/{name}.md" for name in (
    "guide", "method", "metrics", "integrations", "reproducibility", "scaling", "speed", "many_gpus",
    "environment"))]  # fmt: skip


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


SMALL = 'method="simplecil", device="cpu", increment=50'


def parses(line: str) -> None:
    """A command line of the pages: `plora-ext ...`, or `torchrun ... plora_ext ...`, with files of this repository."""
    words = shlex.split(line)
    assert words[0] in ("plora-ext", "torchrun"), line
    start = words.index("plora_ext") if words[0] == "torchrun" else 0
    args, unknown = parser(COMMANDS).parse_known_args(words[start + 1 :])
    assert not unknown and all(Path(file).is_file() for file in getattr(args, "config", None) or [])


def test_the_page_on_many_gpus_runs(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    page = (repository / "docs" / "many_gpus.md").read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.strip().splitlines():
            parses(line)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "Settings()" in code
    names: dict = {}
    exec(code.replace("Settings()", f"Settings({SMALL})"), names)
    assert len(names["result"].curve) == 2


def test_the_page_on_speed_names_settings_and_their_defaults(repository: Path) -> None:
    page = (repository / "docs" / "speed.md").read_text(encoding="utf-8")
    defaults, rows = Settings().as_dict(), 0
    for names, default in re.findall(r"^\| (`[a-z0-9_`, ]+`) \| ([^|]+) \|", page, re.MULTILINE):
        settings, rows = re.findall(r"`(\w+)`", names), rows + 1
        assert set(settings) <= set(defaults), names
        if settings != ["workers"]:
            assert [str(defaults[name]).lower() for name in settings] == default.replace("`", "").split(", ")
    assert rows == 10
    for command in re.findall(r"`(?:[A-Z_]+=\w+ )?(plora-ext train[^`]*)`", page):
        parses(command.replace(" ...", ""))


def test_the_page_of_variables_is_whole(repository: Path) -> None:
    page = (repository / "docs" / "environment.md").read_text(encoding="utf-8")
    sources = [repository / "setup.py", repository / "CMakeLists.txt"]
    for folder, endings in (
        ("plora_ext", ("py",)), ("build_backend", ("py",)), ("benchmarks", ("py",)), ("cmake", ("cmake",)),
        ("csrc", ("h", "cpp", "cu", "cuh")),
    ):  # fmt: skip
        sources += [path for ending in endings for path in (repository / folder).rglob(f"*.{ending}")]
    read: set[str] = set()
    for path in sources:
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r"""(?:environ(?:\.get\(|\.setdefault\(|\[)|getenv\()\s*"(\w+)\"""", text))
        read |= set(re.findall(r"\$ENV\{(\w+)\}", text))
    assert {"PLORA_BACKEND", "PLORA_CPU_ISA", "PLORA_FORCE_CPU", "PLORA_TORCH_DIR"} <= read  # the search finds them
    listed = {name for name in re.findall(r"`([A-Z][A-Z_]*[A-Z])`", page)}
    assert read - {"PATH", "VIRTUAL_ENV"} <= listed
    ours = {*variables.CHOICES, *(f"PLORA_{name}" for name in variables.OTHERS)}
    assert {name for name in listed if name.startswith("PLORA_")} == ours
    for name, values in variables.CHOICES.items():
        assert f"| `{name}` | {', '.join(f'`{value}`' for value in values)} |" in page


def test_the_guide_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    guide = (repository / "docs" / "guide.md").read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", guide, re.DOTALL):
        for line in block.strip().splitlines():
            parses(line)
    known = set(Settings().as_dict())
    table = guide.split("| to choose | settings |")[1].split("\n\n")[0]
    named = {n for n in re.findall(r"`([a-z_]+)`", table)}
    assert named <= known, named - known
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        code = code.replace('method="simplecil"', SMALL)
        exec(code.replace('method="plora"', 'method="plora", device="cpu"'), {"__name__": "guide"})
    HEADS.pop("euclidean")  # the page's own
    assert [path.name for path in tmp_path.iterdir()] == ["icons"]  # a run writes nothing
