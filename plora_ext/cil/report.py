"""Results as tables, pictures and files; every file appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from rich.table import Table

import plora_ext
from plora_ext.cil.console import COMPACT
from plora_ext.cil.engine import Result
from plora_ext.cil.methods import METHODS

COLUMNS = ("Method", "Ā", "A_B", "Forgetting", "BWT", "Passes", "Time s", "Peak MB")
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")  # Okabe and Ito
_INK, _GRID = "#333333", "#e4e4e4"


def prepare_folder(out: str | Path) -> Path:
    """Creates the output folder and proves that files can be written there, before any work is done.

    Raises:
        OSError: It cannot; names the folder and the reason.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(f"cannot write to the output folder {str(out)!r}: {error.strerror or error}") from error


def write_folder(folder: Path, results: Sequence[Result], settings_yaml: str | None = None) -> None:
    """Writes metrics.json, accuracy.png, task_matrix.png and, if given, settings.yaml, replacing older ones.

    All of them are finished in a hidden folder first, then moved, so an interrupt leaves the files of before.
    """
    work = Path(tempfile.mkdtemp(prefix=".plora-", dir=folder))
    try:
        (work / "metrics.json").write_text(to_json(results), encoding="utf-8")
        accuracy_figure(results).savefig(work / "accuracy.png", dpi=160)
        matrix_figure(results).savefig(work / "task_matrix.png", dpi=160)
        if settings_yaml is not None:
            (work / "settings.yaml").write_text(settings_yaml, encoding="utf-8")
        for file in sorted(work.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def to_json(results: Sequence[Result]) -> str:
    """The results as the text of metrics.json."""
    head = {"format": 1, "plora_ext": plora_ext.__version__, "torch": str(torch.__version__)}
    runs = [{"method": r.method, **r.summary(), **asdict(r)} for r in results]
    return json.dumps({**head, "runs": runs}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load_results(path: str | Path) -> list[Result]:
    """The results of a run folder (or of its metrics.json).

    Raises:
        OSError: There is no such file.
        ValueError: The file is not one that this package wrote.
    """
    file = Path(path)
    file = file / "metrics.json" if file.is_dir() else file
    names = [f.name for f in fields(Result)]
    try:
        return [Result(**{name: run[name] for name in names}) for run in json.loads(file.read_text("utf-8"))["runs"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(file)!r} is not a metrics.json of plora-ext: {error}") from error


def labels(results: Sequence[Result]) -> list[str]:
    """A name for each result: its method, with the seed or a number where that alone is not unique."""
    names = [r.method for r in results]
    for tell_apart in (lambda i: f" (seed {results[i].settings['seed']})", lambda i: f" #{i + 1}"):
        times = Counter(names)
        names = [name + tell_apart(i) if times[name] > 1 else name for i, name in enumerate(names)]
    return names


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The comparison as text cells, one row a result, in the order of COLUMNS."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}"

    table = []
    for name, r in zip(labels(results), results):
        accuracies = [cell(value) for value in r.summary().values()]
        costs = [str(r.passes), f"{r.total_seconds:.0f}", f"{max(r.peak_mb.values()):.0f}"]
        table.append([name, *accuracies, *costs])
    return table


def comparison_table(results: Sequence[Result]) -> Table:
    """The comparison as a table for the terminal; the best Ā and A_B stand out."""
    table = Table(title="Class-incremental learning, accuracy in %", title_justify="left", **COMPACT)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    lines = rows(results)
    for k in (1, 2) if len(lines) > 1 else ():
        best = max(lines, key=lambda line: float(line[k]))
        best[k] = f"[bold green]{best[k]}[/]"
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    head = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def accuracy_figure(results: Sequence[Result]) -> Figure:
    """Accuracy over all classes seen, against their number: a curve a method, named at its end."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes: Axes = figure.add_subplot()
    most = max(r.classes_seen[-1] for r in results)
    least = min(r.classes_seen[0] for r in results)
    names, ends = labels(results), []
    unique = len({r.method for r in results}) == len(results)  # then a method has the same colour in every figure
    for i, r in enumerate(results):
        color = _COLORS[list(METHODS).index(r.method) if unique else i % len(_COLORS)]
        if len(r.curve) == 1:  # joint training: one figure, drawn across as the bound it is
            axes.plot([least, most], r.curve * 2, color=color, linewidth=1.4, linestyle=(0, (4, 3)))
        else:
            axes.plot(r.classes_seen, r.curve, color=color, linewidth=2, marker="o", markersize=4)
        ends.append((r.curve[-1], f"{names[i]}  {r.curve[-1]:.1f}", color))
    low = min(min(r.curve) for r in results)
    axes.set(ylim=(max(0.0, 10 * (low // 10) - 5), 101), xlabel="classes seen", ylabel="accuracy over all of them (%)")
    bottom, top = axes.get_ylim()
    heights = _spread([end[0] for end in ends], gap=0.052 * (top - bottom))
    for height, (_, text, color) in zip(heights, ends):
        axes.annotate(
            text, (most, height), (8, 0), textcoords="offset points", color=color, va="center", fontweight="bold"
        )
    axes.set_xticks(sorted({seen for r in results for seen in r.classes_seen}) if most <= 200 else [])
    _clean(axes)
    axes.grid(axis="y", color=_GRID)
    return figure


def matrix_figure(results: Sequence[Result]) -> Figure:
    """The task matrix of every result as a heat map: row, the task just learned; column, the task tested."""
    panels = [(name, r) for name, r in zip(labels(results), results) if len(r.matrix) > 1] or [
        (name, r) for name, r in zip(labels(results), results)
    ]
    size = max(len(r.matrix[-1]) for _, r in panels)
    side = min(max(0.36 * size, 2.4), 6.0)
    figure = Figure(figsize=(len(panels) * (side + 0.35) + 1.0, side + 0.9), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    colors = colormaps["YlGnBu"]
    scale = ScalarMappable(Normalize(0, 100), colors)
    for axes, (name, r) in zip(every, panels):
        width = len(r.matrix[-1])
        cells = [[*row, *[float("nan")] * (width - len(row))] for row in r.matrix]
        axes.imshow(cells, norm=scale.norm, cmap=colors)
        for t, row in enumerate(r.matrix):
            for i, value in enumerate(row):
                ink = "white" if value > 60 else _INK
                axes.text(i, t, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=7)
        axes.set_title(name, color=_INK, fontsize=11, fontweight="bold")
        axes.set_xlabel("tested on task")
        axes.set_xticks(range(width), [str(i + 1) for i in range(width)])
        axes.set_yticks(range(len(r.matrix)), [str(t + 1) for t in range(len(r.matrix))])
        _clean(axes)
        axes.spines[:].set_visible(False)
    every[0].set_ylabel("after task")
    bar = figure.colorbar(scale, ax=list(every), shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("accuracy (%)", color=_INK)
    return figure


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=_INK, length=0, labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved apart to at least `gap`, as little as possible, in the same order."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []

    def center(group: list[int]) -> float:
        return sum(heights[i] for i in group) / len(group)

    for i in order:
        groups.append([i])
        while len(groups) > 1:
            low, high = groups[-2], groups[-1]
            if center(high) - center(low) >= gap * (len(low) + len(high)) / 2:
                break
            groups[-2:] = [low + high]
    placed: dict[int, Any] = {}
    for group in groups:
        start = center(group) - gap * (len(group) - 1) / 2
        placed.update({i: start + gap * k for k, i in enumerate(group)})
    return [placed[i] for i in range(len(heights))]
