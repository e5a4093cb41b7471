"""Comparing runs: how they are grouped, averaged, drawn and written, and the page in a real browser."""

from __future__ import annotations

import copy
import csv
import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn

from plora_ext.cil import Settings
from plora_ext.cil.checkpoint import Checkpoint
from plora_ext.cil.files import exclusive
from plora_ext.cil.result import Result
from plora_ext.cil.trained import write_predictions
from plora_ext.cli import main
from plora_ext.report import figures
from plora_ext.report.console import ConsoleProgress
from plora_ext.report.files import comparison_table, load_results, to_json, write_report
from plora_ext.report.runs import group, is_finished

EVIL = "runs/<script>alert(1)</script>&\"'"


def result(method: str = "plora", seed: int = 1993, tasks: int = 4, done: int | None = None, **settings: Any) -> Result:
    """A made-up result of two classes a task; `done` tasks of them learned."""
    rng = np.random.default_rng([seed, tasks, len(method), len(settings)])
    values = {"increment": 2, "out": f"runs/{method}-{seed}", **settings}
    resolved = Settings(method=method, seed=seed, **values).as_dict()  # type: ignore[arg-type]
    steps = tasks if done is None else done
    matrix = [np.round(rng.uniform(40, 100, t + 1), 2).tolist() for t in range(steps)]
    curve = [float(np.mean(row)) for row in matrix]
    if method == "joint":
        matrix, steps = matrix[-1:], 1
    costs = [
        {"seconds": {"train": 1.0 + t / 10, "eval": 0.1}, "peak_mb": {"train": 100.0 + t, "eval": 90.0}}
        for t in range(steps)
    ]
    drifts: list[dict[str, float] | None] = [
        None,
        *({"before": 0.1 * t, "after": 0.05 * t, "spacing": 0.3} for t in range(1, steps)),
    ]
    return Result(
        settings=resolved,
        classes_seen=[2 * (t + 1) for t in range(tasks)],
        class_order=list(range(2 * tasks)),
        curve=curve,
        matrix=matrix,
        passes=1,
        parameters={"trainable": 1000 + tasks, "stored": 1000 * tasks, "stored_mb": 0.25 * tasks},
        seconds={"train": sum(c["seconds"]["train"] for c in costs), "eval": 0.1 * steps},
        peak_mb={"train": 100.0 + steps, "eval": 90.0},
        total_seconds=2.0 * steps,
        num_train=48,
        num_test=24,
        costs=costs,
        drift=drifts if resolved["measure_drift"] else [],
        environment={"plora_ext": "1", "torch": "2", "python": "3", "device": "cpu"},
    )  # fmt: skip


def many() -> list[Result]:
    """60 runs: ten configurations, three seeds, two protocols."""
    kinds: list[dict[str, Any]] = [
        {"method": method} for method in ("plora", "plora-ensemble", "simplecil", "lora-sequential", "joint")
    ]
    kinds += [{"alignment": "ridge"}, {"alignment": "none"}, {"r": 8}, {"head": "gaussian"}]
    kinds.append({"fusion": "learned", "target_modules": ["q", "v"]})
    return [
        result(seed=seed, tasks=tasks, increment=increment, measure_drift=True, **kind)
        for tasks, increment in ((6, 2), (3, 4))
        for seed in (1, 2, 3)
        for kind in kinds
    ]


# ---------------------------------------------------------------------- grouping


def test_a_folder_without_runs_is_none(tmp_path: Path) -> None:
    """It was searched within itself for ever."""
    (tmp_path / "a" / "metrics.json").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.json").write_text('{"runs": []}')
    for folder in ("a", "b"):
        with pytest.raises(FileNotFoundError, match=f"{folder} is no run: it holds neither"):
            load_results(tmp_path / folder)


def test_seeds_are_averaged_and_nothing_else() -> None:
    runs = [result(seed=s) for s in (3, 1, 2)] + [result(seed=1, r=8), result(seed=1, increment=4), result("joint", 1)]
    runs += [copy.deepcopy(runs[0])]  # the same run twice
    runs[1].settings |= {"out": "elsewhere", "workers": 3, "measure_drift": True}  # of no consequence
    protocols = group(runs)
    assert [p.name for p in protocols] == ["icon100, B0 Inc2, embedded", "icon100, B0 Inc4, embedded"]
    assert [g.label for g in protocols[0].groups] == ["plora", "plora, r 8", "joint"]
    plora = protocols[0].groups[0]
    assert [r.settings["seed"] for r in plora.results] == [1, 2, 3]
    spread = plora.spread(lambda r: r.curve)
    assert spread is not None
    curves = np.array([r.curve for r in runs[:3]])
    np.testing.assert_allclose(spread[0], curves.mean(0))
    np.testing.assert_allclose(spread[1], curves.std(0, ddof=1))


def test_other_data_device_or_order_is_not_averaged() -> None:
    one, other = result(seed=1), result(seed=2)
    for changed, apart in (
        ({"num_train": 50}, "protocols"),
        ({"settings": {**other.settings, "data": "else.npz"}}, "protocols"),
        ({"settings": {**other.settings, "class_order": "sorted"}}, "protocols"),
        ({"settings": {**other.settings, "weights": "w.safetensors"}}, "protocols"),
        ({"environment": {"device": "NVIDIA H200"}}, "groups"),
        ({"settings": {**other.settings, "amp": "bfloat16"}}, "groups"),
        ({}, "none"),
    ):
        protocols = group([one, replace(other, **changed)])
        numbers = len(protocols), sum(len(p.groups) for p in protocols)
        assert numbers == {"protocols": (2, 2), "groups": (1, 2), "none": (1, 1)}[apart], changed
        assert len({p.name for p in protocols}) == len(protocols)


def test_the_first_task_may_be_said_in_two_ways() -> None:
    assert len(group([result(seed=1, init_cls=0), result(seed=2, init_cls=2)])) == 1


def test_labels_say_what_is_unusual() -> None:
    kinds: list[dict[str, Any]] = [{}, {"alignment": "none"}, {"r": 8}, {"r": 8, "alignment": "shift"}]
    (protocol,) = group([result(**kind) for kind in kinds])
    assert {g.label for g in protocol.groups} == {
        "plora", "plora, alignment none", "plora, r 8", "plora, r 8, alignment shift"
    }  # fmt: skip


def test_what_a_method_is_made_of_is_said_of_a_single_run() -> None:
    (protocol,) = group([result(head="gaussian", r=8), result("simplecil", head="ranpac"), result("lora-first", r=8)])
    assert [g.label for g in protocol.groups] == ["plora, head gaussian", "simplecil, head ranpac", "lora-first"]


def test_settings_of_an_older_version_have_their_default() -> None:
    old = result(seed=1)
    del old.settings["measure_drift"], old.settings["projections"]
    (protocol,) = group([old, result(seed=2)])
    assert len(protocol.groups) == 1


def test_a_run_of_before_a_setting_is_not_averaged_with_its_default() -> None:
    before: dict[str, Any] = {"cutmix": 0.0, "distill": 0.0, "shrinkage": 0.7, "rotations": False, "init": "first"}
    old, same, new = result(seed=1), result(seed=2, **before), result(seed=2)
    for name in before:
        del old.settings[name]
    for result_ in (old, same, new):  # or it would stand in a protocol of its own
        result_.inputs = {"data_digest": "a", "backbone_digest": "b"}
    (protocol,) = group([old, same, new])
    assert [[r.settings["seed"] for r in g.results] for g in protocol.groups] == [[2], [1, 2]]
    assert protocol.groups[0].results == [new]


# ---------------------------------------------------------------------- reading


def write(folder: Path, *results: Result) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(to_json(results))
    return folder


def begun(folder: Path, of: Result) -> Path:
    """A folder with the checkpoint of an unfinished run."""
    folder.mkdir(parents=True)
    checkpoint = Checkpoint(folder)
    checkpoint.begin({}, of.settings)
    facts = {k: v for k, v in of.__dict__.items() if k != "settings"}
    checkpoint.save_task({**facts, "tasks": len(of.classes_seen)}, {})
    return folder


def test_what_was_written_is_read(tmp_path: Path) -> None:
    runs = [result(seed=1, measure_drift=True), result("joint")]
    assert load_results(write(tmp_path, *runs)) == runs == load_results(tmp_path / "metrics.json")


def test_a_folder_of_runs_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = result(seed=1), result(seed=2, done=2)
    write(tmp_path / "runs" / "a", one)
    begun(tmp_path / "runs" / "deep" / "b", two)
    (tmp_path / "runs" / "no run").mkdir()
    assert load_results(tmp_path / "runs") == [one, two]
    for _ in range(2):  # the report itself, in the folder, counts no run twice
        assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "runs" / "report")]) == 0
        (protocol,) = group(load_results(tmp_path / "runs"))
        assert len(protocol.results) == 2
    assert "seed 2 (runs/plora-2) is incomplete, 2 of 4 tasks" in capsys.readouterr().out


def test_a_report_below_its_runs_is_of_the_runs_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "report"
    for done in (2, None):
        write(tmp_path / "runs" / "a", result(seed=1, done=done))
        assert main(["report", str(tmp_path / "runs"), str(tmp_path / "runs" / "a"), "--out", str(out)]) == 0
        incomplete = "is incomplete, 2 of 4 tasks" in capsys.readouterr().out
        assert incomplete == (done == 2) and len(load_results(out)) == 1
        assert "1 run, 1 configuration, 1 protocol" in (out / "report.html").read_text()


def test_a_result_is_short_to_see_and_saved(tmp_path: Path) -> None:
    one = result(done=3)
    said = f"average_accuracy {np.mean(one.curve):.2f}, last_accuracy {one.curve[-1]:.2f}"
    assert repr(one).startswith(f"Result(plora, 3 of 4 tasks, {said}") and len(repr(one)) < 160
    assert repr(result(done=0)) == "Result(plora, 0 of 4 tasks)"
    assert one.save(tmp_path / "new" / "run") == tmp_path / "new" / "run" / "metrics.json"
    assert load_results(tmp_path / "new" / "run") == [one]


def test_metrics_without_the_newer_fields_are_read(tmp_path: Path) -> None:
    text = json.loads(to_json([result()]))
    for name in ("costs", "drift", "environment", "parameters", "evaluated_on", "peak_mb", "seconds"):
        del text["runs"][0][name]
    for name in ("validation", "order_seed"):
        del text["runs"][0]["settings"][name]
    (tmp_path / "metrics.json").write_text(json.dumps(text))
    (read,) = load_results(tmp_path)
    assert read.costs == read.drift == [] and read.environment == read.parameters == {}
    assert read.evaluated_on == "the test images"
    write_report(tmp_path, [read])
    page = (tmp_path / "report.html").read_text()
    assert "No run here recorded what each task cost." in page and "No complete run here measured it." in page


def test_an_unfinished_run_is_read_from_its_checkpoint(tmp_path: Path) -> None:
    (read,) = load_results(begun(tmp_path / "a", result(done=3)))
    assert not is_finished(read) and len(read.curve) == 3 and read.classes_seen == [2, 4, 6, 8]
    finished = begun(tmp_path / "b", result())
    assert len(load_results(finished)) == 1  # its checkpoint alone
    write(finished, result())
    assert len(load_results(finished)) == 1  # both, once
    write(tmp_path / "a", result(seed=7))  # an older run, then one begun in its place
    assert [is_finished(r) for r in load_results(tmp_path / "a")] == [True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds neither metrics.json nor checkpoint/checkpoint.json"),
        ('{"runs": [{}]}', "is not a metrics.json of plora-ext"),
        ('{"runs": ', "is not a metrics.json of plora-ext"),
        ("[1]", "is not a metrics.json of plora-ext"),
        ('{"runs": 3}', "is not a metrics.json of plora-ext"),
        (b"\xff\xfe\x00", "is not a metrics.json of plora-ext"),
    ],
)
def test_what_is_no_run_is_named(
    tmp_path: Path, content: str | bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path / "good", result()), tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "metrics.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["report", str(good), str(bad), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and str(bad) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = begun(tmp_path / "a", result(done=2))
    (folder / "checkpoint" / "checkpoint.json").write_text("{}")
    with pytest.raises(ValueError, match="checkpoint.json is damaged"):
        load_results(folder)
    assert len(load_results(write(folder, result()))) == 1  # a finished run needs none


# ---------------------------------------------------------------------- the page


class Outline(HTMLParser):
    """What a page consists of; fails where tags do not match."""

    VOID = ("meta", "link", "br", "img", "use", "path")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.unnamed = 0
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        given = dict(attributes)
        if "id" in given:
            self.ids[str(given["id"])] += 1
        self.links += [str(v) for k, v in attributes if k in ("href", "src", "xlink:href", "action", "data")]
        if tag == "svg":
            self.unnamed += given.get("role") != "img" or "aria-labelledby" not in given
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> Outline:
    outline = Outline(text)
    assert outline.tags["title"] == 1 + outline.tags["svg"] and outline.tags["h1"] == 1 and not outline.unnamed
    assert outline.tags["table"] == outline.tags["caption"] and "script" not in outline.tags
    assert all(link.startswith(("#", "data:")) for link in outline.links)  # nothing from elsewhere
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids)
    assert not [name for name, times in outline.ids.items() if times > 1]
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    return outline


@pytest.fixture(scope="module")
def sixty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `many`."""
    folder = tmp_path_factory.mktemp("sixty")
    write_report(folder, many())
    return folder


def test_sixty_runs(sixty: Path) -> None:
    names = {path.name for path in sixty.iterdir()}
    text = (sixty / "report.html").read_text()
    outline = check_page(text)
    assert "7.5 (62%)" in text and "0.6 (5%)" in text  # seconds of training and evaluation in six tasks, of 12
    assert outline.tags["svg"] == 2 * (4 + 1 + 9)  # four figures, the seconds of tasks, a matrix for each but joint
    assert "60 runs, 20 configurations, 2 protocols" in text and "no figure is averaged across them" in text
    pictures = {name for name in names if name.endswith(".png")}
    assert len(pictures) == 12 and {f"{name[:-4]}.pdf" for name in pictures} <= names
    drawn = (sixty / "icon100_B0_Inc2_embedded-drift.pdf").read_bytes()
    assert drawn.startswith(b"%PDF") and b"/Subtype /Image" not in drawn  # lines and letters
    assert {"icon100_B0_Inc2_embedded-drift.png", "icon100_B0_Inc4_embedded-accuracy.png", "tasks.csv"} <= names
    with (sixty / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and {row["seeds"] for row in rows} == {"3"}
    own = [r for r in many() if r.method == "simplecil" and len(r.classes_seen) == 6]
    row = next(row for row in rows if row["label"] == "simplecil")
    last = [r.curve[-1] for r in own]
    assert float(row["last_accuracy"]) == pytest.approx(np.mean(last))
    assert float(row["last_accuracy_std"]) == pytest.approx(np.std(last, ddof=1))
    assert f"{np.mean(last):.1f} ± {np.std(last, ddof=1):.1f}" in text
    with (sixty / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and Counter(row["num_tasks"] for row in rows) == {"6": 30, "3": 30}
    assert load_results(sixty) == many()  # a report is a run's folder again


@pytest.mark.parametrize("after", [1e-5, 0.05])
def test_figures_show_every_value(after: float) -> None:
    """The dashed line too, where it lies far above the others; and no band leaves what an accuracy can be."""
    runs = [result(seed=seed, measure_drift=True) for seed in (1, 2)]
    for i, run in enumerate(runs):
        run.drift = [
            None,
            *({"before": 3e-4 * (i + 1) * t, "after": after * 3e-4 * t, "spacing": 0.3} for t in (1, 2, 3)),
        ]
        run.curve = [100.0, 99.0 - 40 * i, 98.0, 60.0 * i]
    (protocol,) = group(runs)
    figure = figures.drift(protocol)
    assert figure is not None
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    for line in axes.get_lines():
        assert low <= min(line.get_ydata()) and max(line.get_ydata()) <= high
    (axes,) = figures.accuracy(protocol).axes
    for band in axes.collections:
        heights = np.concatenate([path.vertices[:, 1] for path in band.get_paths()])
        assert heights.min() >= 0 and heights.max() <= 100


def test_drift_that_was_measured_from_a_task_on_is_drawn_there(tmp_path: Path) -> None:
    runs = [result(seed=s, measure_drift=True) for s in (1, 2)]
    runs += [result(seed=3, r=8, measure_drift=True), result(seed=4, alignment="none", measure_drift=True)]
    for late in (runs[1], runs[2]):  # continued with --measure-drift
        late.drift[:3] = [None] * 3
    runs[3].drift[3:] = [None]  # and without
    (protocol,) = group(runs)
    figure = figures.drift(protocol)
    assert figure is not None
    drawn = {
        line.get_color(): dict(zip(*map(np.ndarray.tolist, line.get_data())))
        for line in figure.axes[0].get_lines()
        if line.get_marker() != "None"
    }
    mean, late, early = ([line[t] for t in (2, 3, 4)] for line in drawn.values())  # the mean of two is of both
    np.testing.assert_allclose(mean, [np.nan, np.nan, 0.15])
    np.testing.assert_allclose(late, [np.nan, np.nan, 0.15])
    np.testing.assert_allclose(early, [0.05, 0.1, np.nan])
    write_report(tmp_path, runs)
    text = (tmp_path / "report.html").read_text()
    check_page(text)
    assert "Not measured after every task: plora, r 8, plora, alignment none." in text and "nan" not in text


def test_one_run_without_spread_or_drift(tmp_path: Path) -> None:
    names = write_report(tmp_path, [result()])
    text = (tmp_path / "report.html").read_text()
    check_page(text)
    assert "±" not in text.split("What the figures mean")[0] and "1 run, 1 configuration, 1 protocol" in text
    assert "No complete run here measured it." in text and "drift.png" not in names
    with (tmp_path / "tasks.csv").open(newline="") as file:
        tasks = list(csv.DictReader(file))
    assert [float(t["accuracy"]) for t in tasks] == result().curve
    assert [float(t["seconds_train"]) for t in tasks] == [1.0, 1.1, 1.2, 1.3]


def test_a_single_task_and_sixty(tmp_path: Path) -> None:
    for tasks in (1, 60):
        (tmp_path / str(tasks)).mkdir()
        write_report(tmp_path / str(tasks), [result(tasks=tasks, seed=s, measure_drift=True) for s in (1, 2)])
        check_page((tmp_path / str(tasks) / "report.html").read_text())


def test_incomplete_runs_are_marked_and_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / str(s), result(seed=s)) for s in (1, 2)]
    runs += [begun(tmp_path / "cut", result(seed=3, done=2)), begun(tmp_path / "only", result("simplecil", done=1))]
    empty = tmp_path / "empty"
    empty.mkdir()
    checkpoint = Checkpoint(empty)
    checkpoint.begin({}, result(seed=9, out="runs/empty").settings)
    checkpoint._save({"curve": [], "tasks": 4}, {}, keep={})
    assert main(["report", *map(str, [*runs, empty]), "--out", str(tmp_path / "r")]) == 0
    text = (tmp_path / "r" / "report.html").read_text()
    check_page(text)
    said = capsys.readouterr().out
    for note in (
        "plora, seed 3 (runs/plora-3) is incomplete, 2 of 4 tasks: not in the means.",
        "simplecil, seed 1993 (runs/simplecil-1993) is incomplete, 1 of 4 tasks: not in the means.",
        "runs/empty has not learned its first task: left out.",
    ):
        assert note in text and note in said
    mean = np.mean([result(seed=s).curve[-1] for s in (1, 2)])
    assert f"{mean:.1f} ±" in text


def test_seeds_given_twice_and_versions_that_differ_are_said(tmp_path: Path) -> None:
    again = result(seed=1)
    again.curve[-1] -= 1
    other = result(seed=2)
    other.environment["torch"] = "2.99"
    write_report(tmp_path, [result(seed=1), again, other])
    text = (tmp_path / "report.html").read_text()
    assert "plora has seed 1 more than once" in text and "different versions of torch: 2, 2.99" in text


def test_names_are_escaped(tmp_path: Path) -> None:
    write_report(
        tmp_path, [result(out=EVIL, backbone=EVIL), result(out=EVIL, backbone=EVIL, r=3), result(done=1, out=EVIL)]
    )
    check_page((tmp_path / "report.html").read_text())


def test_headings_say_in_words_what_tells_protocols_apart() -> None:
    runs = [result(), replace(result(), num_train=8264), result(increment=4), result(class_order="sorted")]
    assert [p.name for p in group(runs)] == [
        "icon100, B0 Inc2, embedded, class order shuffled, 48 training and 24 evaluation images",
        "icon100, B0 Inc2, embedded, class order shuffled, 8264 training and 24 evaluation images",
        "icon100, B0 Inc4, embedded",
        "icon100, B0 Inc2, embedded, class order sorted, 48 training and 24 evaluation images",
    ]


def test_protocols_have_names_and_figures_of_their_own(tmp_path: Path) -> None:
    orders = [[*range(98), 99, 98], [*range(100)]]  # too long to be told apart in a heading
    given = [[[0, 1], [2, 3], [4, 5]], [[5, 1], [2, 3], [4, 0]]]
    changes = [
        *({"class_order": order} for order in orders),
        *({"tasks": tasks} for tasks in given),
        *({"data": data, "normalize": "none"} for data in ("a/my-set", "a/my_set", "é" * 115)),
    ]
    runs = [result(tasks=3) for _ in changes]
    for run, changed in zip(runs, changes):
        run.settings |= changed
    protocols = group(runs)
    names = [p.name for p in protocols]
    assert len({*names}) == len(runs) and names[2:4] == [
        "icon100, 3 given tasks, embedded, tasks 0 1 2 3 4 5",
        "icon100, 3 given tasks, embedded, tasks 5 1 2 3 4 0",
    ]
    assert names[0].endswith("[...], protocol 1 of that name") and names[1].endswith("protocol 2 of that name")
    written = write_report(tmp_path, runs)
    assert len([name for name in written if name.endswith("accuracy.png")]) == len(runs)
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        assert [row["protocol"] for row in csv.DictReader(file)] == names


def of_curve(method: str, seed: int, curve: list[float]) -> Result:
    made = result(method, seed, len(curve))
    made.curve, made.matrix = curve, [curve[: t + 1] for t in range(len(curve))]
    return made


def test_the_result_comes_first(tmp_path: Path) -> None:
    """In a sentence, then in a table with the best on top, before any figure; in the numbers of print."""
    runs = [of_curve("plora", s, [90.0, 80.0 + s]) for s in (1, 2, 3)]
    runs += [of_curve("simplecil", 1, [95.0, 60.0]), of_curve("lora-sequential", 1, [91.0, 85.0])]
    write_report(tmp_path, runs)
    text = (tmp_path / "report.html").read_text()
    said = "lora-sequential ends at 85.0 % over all 4 classes (Ā 88.0 %), best of 3 configurations."
    assert f'<p class="lead">{said}</p>' in text
    table, figure = text.index("<table>"), text.index("<figure>")
    assert text.index(said) < table < figure
    assert re.findall(r'<tr><th scope="row">(.*?)</th>', text[table:figure]) == [
        "lora-sequential", "plora", "simplecil"
    ]  # fmt: skip
    assert "82.0 ± 1.0" in text[table:figure] and not re.search(r"<td[^>]*>-\d", text)


def test_what_figures_are_of_is_said_wherever_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = [result(seed=s, validation=0.2) for s in (1, 2)]
    folders = [write(tmp_path / str(i), r) for i, r in enumerate(held)]
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    note = "evaluated on 20 % of the training images, which were held out, and not on the test set."
    text, said = (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().out
    assert "% over all 8 classes on 20 % of the training images" in text and note in text and note in said
    assert "embedded, on 20 % of the training images, accuracy in %" in " ".join(said.split())
    runs = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"]
    assert [run["evaluated_on"] for run in runs] == ["20 % of the training images"] * 2
    protocols = group([*held, result(seed=1), result(seed=1, order_seed=3)])  # never side by side with the test set
    assert [len(p.results) for p in protocols] == [2, 1, 1]
    assert [p.name.partition("embedded")[2] for p in protocols] == [
        ", on 20 % of the training images", ", order seed null", ", order seed 3"
    ]  # fmt: skip


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.json'"):
        result().save(tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        write_report(tmp_path, [result()])
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Folders of a Latin-1 archive, as Python reads their names."""
    runs = [result(seed=seed, data="data/l\udce4t") for seed in (1, 2)]
    for run in runs:
        run.class_names = ["b\udce4r", *map(str, range(1, 8))]
    runs[0].save(tmp_path / "run")
    assert load_results(tmp_path / "run") == runs[:1]
    write_report(tmp_path, runs)
    assert load_results(tmp_path / "metrics.json") == runs
    assert "l\\udce4t, B0 Inc2" in (tmp_path / "report.html").read_text("utf-8")
    rows = [{"class": 0, "name": "b\udce4r"}]
    for name in ("out.json", "out.csv"):
        write_predictions(tmp_path / name, [Path("b\udce4r.png")], rows)
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == [{"image": "b\udce4r.png", **rows[0]}]
    assert (tmp_path / "out.csv").read_bytes().splitlines()[1] == b"b\xe4r.png,0,b\xe4r"


def test_what_is_trained_and_stored_stands_beside_passes(tmp_path: Path) -> None:
    old = result("simplecil")
    old.parameters = {}
    runs = [result(seed=s) for s in (1, 2)] + [old]
    write_report(tmp_path, runs)
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"Passes</th>\s*<th[^>]*>Trainable</th>\s*<th[^>]*>Stored MB", text)
    assert re.search(r">1</td>\s*<td[^>]*>1004</td>\s*<td[^>]*>1.00</td>", text)
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert (rows["plora"]["trainable"], rows["plora"]["stored_mb"], rows["simplecil"]["stored_mb"]) == (
        "1004.0",
        "1.0",
        "",
    )
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert [row["stored"] for row in csv.DictReader(file)] == ["4000", "4000", ""]


def test_joint_has_a_curve_and_older_files_a_line(tmp_path: Path) -> None:
    new, old = result("joint", 1), result("joint", 2)
    old.classes_seen, old.curve = old.classes_seen[-1:], old.curve[-1:]
    assert new.summary()["average_accuracy"] == np.mean(new.curve) and old.summary()["average_accuracy"] is None
    for r in (new, old):
        assert r.summary()["last_accuracy"] == r.curve[-1] and is_finished(r)
        assert r.summary()["forgetting"] is r.summary()["backward_transfer"] is None
    (protocol,) = group([result("plora", 1), old, new])
    assert [g.label for g in protocol.groups] == ["plora", "joint, evaluations 1", "joint, evaluations 4"]
    lines = figures.accuracy(protocol).axes[0].get_lines()
    np.testing.assert_allclose(lines[1].get_ydata(), old.curve * 4)
    np.testing.assert_allclose(lines[2].get_ydata(), new.curve)
    assert [line.get_linestyle() for line in lines] == ["-", "--", "--"]
    write_report(tmp_path, protocol.results)


def test_two_runs_are_dots_and_three_a_band() -> None:
    (protocol,) = group([result("plora", s) for s in (1, 2)] + [result("simplecil", s) for s in (1, 2, 3)])
    (axes,) = figures.accuracy(protocol).axes
    dots = [line.get_ydata() for line in axes.get_lines() if line.get_marker() == "."]
    assert len(axes.collections) == 1 and len(dots) == 2
    for drawn, run in zip(dots, (result("plora", s) for s in (1, 2))):
        np.testing.assert_allclose(drawn, run.curve)


def test_figures_of_the_page_fit_a_phone_and_files_say_what_they_show(tmp_path: Path) -> None:
    (protocol,) = group([result(m, s, measure_drift=True) for m in ("plora", "simplecil") for s in (1, 2)])
    for draw in (figures.accuracy, figures.forgetting, figures.drift, figures.cost, figures.cost_of_tasks):
        narrow, wide = draw(protocol, True), draw(protocol)
        assert narrow is not None and wide is not None
        assert narrow.get_size_inches()[0] == figures.NARROW and wide.get_size_inches()[0] == figures.WIDE
        assert narrow.legends and not narrow.axes[0].texts  # no names beside the curves, which would press the plot
    for draw in (figures.forgetting, figures.cost_of_tasks):  # of tasks that do not follow from one another
        figure = draw(protocol)
        assert figure is not None and not figure.axes[0].texts  # a name would lie on a dot
        assert {line.get_linestyle() for line in figure.axes[0].get_lines()} == {"None"}
        low, high = figure.axes[0].get_ylim()
        for bar in figure.axes[0].collections:
            heights = np.concatenate([path.vertices[:, 1] for path in bar.get_paths()])
            assert low <= heights.min() and heights.max() <= high and heights.min() >= 0
    titles: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: titles.append(self.get_suptitle()))
        patch.setattr(figures, "svg", lambda *_: "")
        write_report(tmp_path, protocol.results)
    assert titles == ["icon100, B0 Inc2, embedded"] * 6 * 2  # .png and .pdf


@pytest.mark.parametrize(
    ("first", "last", "named"),
    [(1, 100, [1, 20, 40, 60, 80, 100]), (1, 10, list(range(1, 11))), (2, 2, [2]), (50, 100, [50, 60, 80, 100])],
)
def test_the_ends_of_an_axis_are_named(first: int, last: int, named: list[int]) -> None:
    assert figures.ticks(first, last) == named


def test_small_numbers_share_their_unit() -> None:
    assert figures.unit(0.3) == (1.0, "") and figures.unit(0) == (1.0, "")
    factor, name = figures.unit(3.28e-4)
    assert (round(factor), name) == (10**4, " (10⁻⁴)")


def test_brackets_of_a_label_are_no_markup() -> None:
    runs = [result(target_modules=f"blocks.{which}.qkv") for which in ("[a-z]+", "[/a]+")]
    for run in runs:
        run.settings["data"] = "set[b]"
    console = Console(width=200, record=True)
    console.print(comparison_table(group(runs)[0], 200))
    text = console.export_text()
    assert "set[b], B0 Inc2" in text and "blocks.[a-z]+.qkv" in text and "blocks.[/a]+.qkv" in text


def test_the_table_of_the_terminal_marks_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    (protocol,) = group([result(seed=s, r=r) for s in (1, 2) for r in (4, 8)])
    Console(width=80).print(comparison_table(protocol))
    printed = capsys.readouterr().out
    assert "plora, r 4" in printed and "Seeds" in printed and max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_figure_is_cut_on_a_narrow_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "false")
    runs = [result(method, tasks=12) for method in ("simplecil", "lora-sequential", "plora")]
    (protocol,) = group(runs)
    page = Console(width=width, file=StringIO(), force_terminal=True, color_system=None)
    page.print(comparison_table(protocol, width))
    with ConsoleProgress(page) as progress:
        for run in runs:
            progress.begin(run.method, 12)
            for task, accuracy in enumerate(run.curve):
                progress.task(task, accuracy)
    printed = page.file.getvalue()  # type: ignore[attr-defined]
    live = printed[printed.rindex("Accuracy (%) after task") :].splitlines()
    assert "…" not in printed and all(cell_len(line) <= width for line in printed.splitlines() if "\x1b" not in line)
    for run in runs:  # the last table stays, with as many of the latest tasks as fit
        assert f"{run.summary()['average_accuracy']:.1f}" in printed and f"{run.curve[-1]:.1f}" in printed
        (line,) = (line for line in live if line.split()[:1] == [run.method])
        shown = [f"{accuracy:.1f}" for accuracy in run.curve]
        assert line.split()[1:] == shown[-min(10, (width - 17) // 6) :]
    titles = {
        40: [],
        60: ["Forgetting", "BWT", "Time s"],
        80: ["Forgetting", "BWT", "Passes", "Stored MB", "Time s"],
        120: ["Forgetting", "BWT", "Passes", "Trainable", "Stored MB", "Time s", "Peak MB"],
    }
    assert re.findall("Forgetting|BWT|Passes|Trainable|Stored MB|Time s|Peak MB|Pea|Tim", printed) == titles[width]
    (several,) = group([result(seed=s) for s in (1, 2)])
    page.print(comparison_table(several, width))
    mean, deviation = (float(v) for v in several.groups[0].spread(lambda r: r.curve[-1]) or (0, 0))
    assert f"{mean:.1f} ± {deviation:.1f}" in page.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"CI": "true"}, {"CI": "1"}])
def test_a_terminal_that_nobody_watches_gets_lines(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm", "CI": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    page = Console(width=80, file=StringIO(), force_terminal=True)
    with ConsoleProgress(page) as progress:
        progress.begin("plora", 3)
        progress.fit(0, 8)
        progress.step(8)
        progress.task(0, 51.0)
    printed = page.file.getvalue()  # type: ignore[attr-defined]
    assert printed.startswith("plora            task  1 of 3   accuracy  51.0 %") and printed.count("\n") == 1


def test_a_terminal_without_colour_has_no_bar() -> None:
    for plain in (False, True):
        shown = ConsoleProgress(Console(width=80, file=StringIO(), force_terminal=True, no_color=plain))
        assert any(isinstance(column, BarColumn) for column in shown._bar.columns) is not plain


def test_a_report_waits_for_no_one_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write(tmp_path / "run", result())
    with exclusive(run):  # a run that is being written to may be looked at
        assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    assert main(["report", str(write(tmp_path / "run", result(seed=5))), "--out", str(tmp_path / "out")]) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# ---------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no Chromium here ({', '.join(names)})")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_a_browser(browser: Any, sixty: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((sixty / "report.html").as_uri())
    assert not said and asked == [(sixty / "report.html").as_uri()]
    for details in page.query_selector_all("details"):
        details.evaluate("e => e.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What is wider than the page scrolls in a box of its own; nothing else sticks out.
    outside = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""
    assert page.evaluate(outside) == []
    sizes = page.evaluate("[...document.querySelectorAll('svg')].map(e => [e.clientWidth, e.clientHeight])")
    assert len(sizes) >= 14 and all(w > 100 and h > 60 for w, h in sizes)
    page_color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert page_color == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 27)"}[scheme]
    ink = page.evaluate(  # text in figures is as light or dark as that of the page
        "getComputedStyle([...document.querySelectorAll('svg g')].find(e => e.style.fill.includes('--ink'))).fill"
    )
    assert ink == page.evaluate("getComputedStyle(document.body).color")
    for details in page.query_selector_all("details"):
        details.evaluate("e => e.open = false")
    shown = "[...document.querySelectorAll('details table')].map(e => e.checkVisibility({contentVisibilityAuto: true}))"
    assert not any(page.evaluate(shown))
    page.emulate_media(media="print")
    page.wait_for_function(f"{shown}.every(Boolean)", timeout=5000)  # nobody can open them on paper
    named = "[...document.querySelectorAll('summary')].map(e => e.checkVisibility())"
    assert not any(page.evaluate(named))
    text = (sixty / "report.html").read_text()
    page.set_content(text.replace("selector(::details-content)", "selector(::unknown)"))  # as older browsers read it
    assert all(page.evaluate(named)) and not any(page.evaluate(shown))
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(page.pdf()) > 10_000
    context.close()


def test_the_loop_knows_nothing_of_reports(repository: Path) -> None:
    above = re.compile(
        r"plora_ext\.(report|integrations|cli|bench)|plora_ext import .*\b(report|integrations|cli|bench)\b"
    )
    for path in (repository / "plora_ext" / "cil").rglob("*.py"):
        lines = [line for line in path.read_text().splitlines() if re.match(r"\s*(from|import) ", line)]
        assert not [line for line in lines if above.search(line)], path
