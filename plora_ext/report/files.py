"""Results as tables and files; every file appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from plora_ext.cil.files import named, to_csv
from plora_ext.cil.result import Result, to_json
from plora_ext.report.console import COMPACT, fits
from plora_ext.report.runs import COLUMNS, Group, Protocol, best_cells, group, is_finished, load_results, rows

__all__ = ["load_results", "to_json", "write_folder", "write_report"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSTALL = 'pip install "plora_ext[report]"'  # matplotlib and jinja2, which nothing else here needs


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


def drawers() -> dict[str, Callable[[Protocol], Figure | None]]:
    """What draws each figure, by its name.

    Raises:
        ImportError: matplotlib or jinja2 is not installed; names the command.
    """
    try:
        from plora_ext.report import figures, page  # noqa: F401  the page is as good as its figures
    except ImportError as error:
        raise ImportError(f"figures and reports need the package {error.name}: {INSTALL}") from error
    return {
        "accuracy": figures.accuracy,
        "task_matrix": figures.matrices,
        "forgetting": figures.forgetting,
        "drift": figures.drift,
        "cost": figures.cost,
        "cost_of_tasks": figures.cost_of_tasks,
    }


def write_folder(folder: Path, results: Sequence[Result], settings_yaml: str | None = None) -> list[str]:
    """Writes metrics.json, accuracy.png, task_matrix.png and, if given, settings.yaml, replacing older ones.

    Returns their names; without matplotlib there are no figures.
    """
    texts = {"metrics.json": to_json(results)}
    if settings_yaml is not None:
        texts["settings.yaml"] = settings_yaml
    (protocol,) = group(results)
    draw: Mapping[str, Callable[[Protocol], Figure | None]] = {}
    with suppress(ImportError):
        draw = drawers()
    pictures = {f"{name}.png": _titled(draw[name](protocol), protocol) for name in ("accuracy", "task_matrix") if draw}
    return _write(folder, texts, pictures)


def write_report(folder: Path, results: Sequence[Result]) -> list[str]:
    """Writes report.html, the figures (.png, .pdf), {summary,runs,tasks}.csv and metrics.json; returns their names."""
    drawn, protocols = drawers(), group(results)
    from plora_ext.report.page import page

    texts = {
        "report.html": page(protocols, results),
        "summary.csv": to_csv(list(_summary_rows(protocols))),
        "runs.csv": to_csv(list(_run_rows(protocols))),
        "tasks.csv": to_csv(list(_task_rows(protocols))),
        "metrics.json": to_json(results),
    }
    pictures: dict[str, Figure | None] = {}
    stems = [re.sub(r"\W+", "_", protocol.name)[:80].strip("_") for protocol in protocols]  # names of files are short
    for i, protocol in enumerate(protocols):
        again = f"_{number}" if (number := stems[: i + 1].count(stems[i])) > 1 else ""  # my-set, my_set
        where = "" if len(protocols) == 1 else f"{stems[i]}{again}-"
        for name, draw in drawn.items():
            figure = _titled(draw(protocol), protocol)
            pictures |= {f"{where}{name}.{kind}": figure for kind in ("png", "pdf")}
    return _write(folder, texts, pictures)


def _titled(figure: Figure | None, protocol: Protocol) -> Figure | None:
    """A figure that says by itself of what it is: files are parted from their folder."""
    if figure is not None:
        methods = ", ".join(dict.fromkeys(g.label for g in protocol.groups)) if len(protocol.groups) == 1 else ""
        title = ": ".join(filter(None, (protocol.name, methods)))
        figure.suptitle(textwrap.fill(title, int(11 * figure.get_size_inches()[0])), fontsize=9, color="#5c5c5c")
    return figure


def _write(folder: Path, texts: Mapping[str, str], pictures: Mapping[str, Figure | None]) -> list[str]:
    """Writes all of it into a hidden folder first, then moves it, so an interrupt leaves the files of before."""
    work = Path(tempfile.mkdtemp(prefix=".plora-", dir=folder))
    try:
        with named(folder):
            for name, text in texts.items():
                # A name that is not UTF-8 is escaped, as JSON reads it back.
                (work / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            for name, picture in pictures.items():
                if picture is not None:
                    picture.savefig(work / name, dpi=160)
        names = sorted(file.name for file in work.iterdir())
        for name in names:
            os.replace(work / name, folder / name)
        return names
    finally:
        shutil.rmtree(work, ignore_errors=True)


# ---------------------------------------------------------------------- tables


def comparison_table(protocol: Protocol, width: int = 80) -> Table:
    """The comparison as a table for a terminal of so many columns, into which it fits; the best Ā and A_B stand out."""
    several = any(len(g.results) > 1 for g in protocol.groups)
    titles = ["Method", "Seeds", *(title for title, *_ in COLUMNS)]
    shown = [t for t in titles if t not in (("Trainable", "BWT", "Peak MB") if several else ("Seeds",))]
    table = _comparison(protocol, titles, shown)
    # Columns go, never digits.
    for title in ("Trainable", "Peak MB", "Passes", "Stored MB", "BWT", "Time s", "Seeds", "Forgetting"):
        if title in shown and not fits(table, width):
            shown.remove(title)
            table = _comparison(protocol, titles, shown)
    return table


def _comparison(protocol: Protocol, titles: Sequence[str], shown: Sequence[str]) -> Table:
    table = Table(title=escape(f"{protocol.name}, accuracy in %"), title_justify="left", **COMPACT)
    lines = rows(protocol)
    best = best_cells(lines)
    for i, title in enumerate(titles):
        if title == "Method":
            table.add_column(title, min_width=min(16, max((len(line[0]) for line in lines), default=0)))
        elif title in shown:  # as wide as what it holds: a minimum that rich finds by itself would be one word's
            widest = max(len(text) for text in (title, *(line[i] for line in lines)))
            table.add_column(title, justify="right", no_wrap=True, min_width=widest)
    for row, line in enumerate(lines):
        cells = [f"[bold green]{cell}[/]" if (row, i) in best else escape(cell) for i, cell in enumerate(line)]
        table.add_row(*(cell for title, cell in zip(titles, cells) if title in shown))
    return table


def _summary_rows(protocols: Sequence[Protocol]) -> Iterable[dict[str, Any]]:
    names = "average_accuracy last_accuracy forgetting backward_transfer passes trainable stored_mb seconds peak_mb"
    for protocol in protocols:
        for g in protocol.groups:
            row: dict[str, Any] = {"protocol": protocol.name, "label": g.label, "seeds": len(g.results)}
            for name, (_, of, _) in zip(names.split(), COLUMNS):
                spread = g.spread(of)
                row[name], row[f"{name}_std"] = (None, None) if spread is None else map(float, spread)
            yield row


def _run_rows(protocols: Sequence[Protocol]) -> Iterable[dict[str, Any]]:
    for protocol, g, r in _each(protocols):
        yield {
            "protocol": protocol.name,
            "label": g.label,
            "finished": is_finished(r),
            "tasks_learned": len(r.curve),
            "num_tasks": len(r.classes_seen),  # `tasks` is a setting
            **r.summary(),
            "passes": r.passes,
            **r.parameters,
            "total_seconds": r.total_seconds,
            **{f"seconds_{phase}": value for phase, value in r.seconds.items()},
            **{f"peak_mb_{phase}": value for phase, value in r.peak_mb.items()},
            **{f"with_{name}": value for name, value in r.environment.items()},
            **r.settings,
        }


def _task_rows(protocols: Sequence[Protocol]) -> Iterable[dict[str, Any]]:
    for protocol, g, r in _each(protocols):
        for t, value in enumerate(r.curve):
            row: dict[str, Any] = {"protocol": protocol.name, "label": g.label, "seed": r.settings["seed"]}
            row |= {"out": r.settings.get("out"), "task": t + 1, "classes_seen": r.classes_seen[t], "accuracy": value}
            cost = r.costs[t] if t < len(r.costs) else {}
            row |= {f"{kind}_{phase}": v for kind, phases in cost.items() for phase, v in phases.items()}
            moved = (r.drift[t] if t < len(r.drift) else None) or {}
            yield row | {f"drift_{name}": v for name, v in moved.items()}


def _each(protocols: Sequence[Protocol]) -> Iterable[tuple[Protocol, Group, Result]]:
    return ((p, g, r) for p in protocols for g in p.groups for r in (*g.results, *g.unfinished))
