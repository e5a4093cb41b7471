"""A comparison as one HTML page that needs nothing else: figures in the page, no script, no address."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

import plora_ext
from plora_ext.cil import metrics
from plora_ext.cil.result import Result
from plora_ext.report import figures
from plora_ext.report.runs import (
    COLUMNS,
    Group,
    Protocol,
    best_cells,
    configuration_of,
    differing,
    protocol_of,
    repeated_seeds,
    rows,
    settings_of,
    text_of,
)

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class Table:
    """A table of texts; the first column names the rows. `best` holds (row, column) of cells that stand out."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: set[tuple[int, int]] = field(default_factory=set)


@dataclass
class Section:
    """A heading with its figures, tables and words; without a figure, `missing` says why."""

    title: str
    pictures: list[tuple[str, str]] = field(default_factory=list)  # caption, <svg>
    tables: list[Table] = field(default_factory=list)  # always to be seen
    details: list[Table] = field(default_factory=list)  # folded
    text: str = ""
    missing: str = ""


def page(protocols: Sequence[Protocol], results: Sequence[Result]) -> str:
    """The page of all `protocols`; `results` are all runs given, among them those that no protocol holds."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    methods = list(dict.fromkeys(g.method for p in protocols for g in p.groups))
    makers = (_overview, _matrices, _forgetting, _drift, _cost, _settings)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        title=f"Class-incremental learning: {', '.join(methods) or 'no run'}",
        counts=[
            _count(len(results), "run"),
            _count(sum(len(p.groups) for p in protocols), "configuration"),
            _count(len(protocols), "protocol"),
        ],
        date=datetime.date.today().isoformat(),
        version=plora_ext.__version__,
        leads=[line for p in protocols if (line := lead(p, len(protocols) > 1))],
        notes=list(notes(protocols, results)),
        protocols=[
            {"name": p.name, "id": f"p{i}", "sections": [make(p, f"p{i}") for make in makers]}
            for i, p in enumerate(protocols)
        ],
    )


def lead(protocol: Protocol, named: bool) -> str:
    """The result of a protocol in a sentence; "" where no run is complete."""
    lines = ranked(protocol)
    if not lines:
        return ""
    where = f"{protocol.name}: " if named else ""
    seeds = f" over {lines[0][1]} seeds" if lines[0][1] != "1" else ""
    among = f", best of {len(lines)} configurations" if len(lines) > 1 else ""
    average = f" (Ā {lines[0][2]} %)" if lines[0][2] != "–" else ""
    example = protocol.groups[0].example
    on = f" on {example.evaluated_on}" if example.settings.get("validation") else ""
    end = f"{lines[0][0]} ends at {lines[0][3]} % over all {protocol.classes_seen[-1]} classes{on}"
    return f"{where}{end}{average}{seeds}{among}."


def ranked(protocol: Protocol) -> list[list[str]]:
    """The comparison by A_B, the best first, with the minus of print."""
    lines = sorted(rows(protocol), key=lambda line: -float(line[3].split()[0]))
    return [[line[0], *(cell.replace("-", "−") for cell in line[1:])] for line in lines]


def notes(protocols: Sequence[Protocol], results: Sequence[Result]) -> Iterable[str]:
    """What a reader must know of the comparison: runs left out or incomplete, protocols and versions that differ."""
    for r in results:
        if not r.curve:
            yield f"{_run(r)} has not learned its first task: left out."
    if len(protocols) > 1:
        yield f"The runs follow {len(protocols)} protocols: no figure is averaged across them."
    for protocol in protocols:
        where = f"{protocol.name}: " if len(protocols) > 1 else ""
        example = protocol.groups[0].example
        if example.settings.get("validation"):
            yield f"{where}evaluated on {example.evaluated_on}, which were held out, and not on the test set."
        for g in protocol.groups:
            for r in g.unfinished:
                yield (
                    f"{where}{g.label}, seed {r.settings['seed']} ({_run(r)}) is incomplete, {len(r.curve)} of "
                    f"{len(r.classes_seen)} tasks: not in the means."
                )
            for seed in repeated_seeds(g):
                yield f"{where}{g.label} has seed {seed} more than once, with different results; each counts."
            for name in ("plora_ext", "torch"):
                versions = sorted({r.environment.get(name, "unknown") for r in g.results})
                if len(versions) > 1:
                    yield f"{where}{g.label} averages runs of different versions of {name}: {', '.join(versions)}."


# ---------------------------------------------------------------------- sections


def _overview(protocol: Protocol, name: str) -> Section:
    groups, lines, section = protocol.finished, ranked(protocol), Section("Accuracy")
    several = any(len(g.results) > 1 for g in groups)
    best = best_cells(lines)
    if lines:
        head = ("Method", "Seeds", *(title for title, *_ in COLUMNS))
        spread = ", mean ± standard deviation over seeds" if several else ""
        marked = " The best Ā and A_B are in bold." if best else ""
        section.tables.append(Table(f"Accuracies in %{spread}.{marked}", head, lines, best))
    else:
        section.text = "No run is complete; the curves show how far they have come."
    last = ", ".join(f"{line[0]} ends at {line[3]}" for line in lines)
    words = f"Accuracy over all classes seen, by their number. {last}."
    caption = "Accuracy over all classes seen" + (
        "; band: ± one standard deviation; dots: the runs, where there are two." if several else "."
    )
    section.pictures.append((caption, figures.svg(figures.accuracy(protocol, True), f"{name}-accuracy", words)))
    curves = [(g, g.spread(lambda r: r.curve)) for g in groups if len(g.example.curve) == len(protocol.classes_seen)]
    if curves:
        head = ("Classes seen", *map(str, protocol.classes_seen))
        section.details.append(_over_tasks("Accuracy over all classes seen, in %", head, curves))
    return section


def _matrices(protocol: Protocol, name: str) -> Section:
    section = Section("Task matrices", missing="No complete run has more than one task.")
    for i, g in enumerate(g for g in protocol.finished if len(g.example.matrix) > 1):
        cells = figures.mean_matrix(g)
        words = (
            f"Task matrix of {g.label}: task 1 starts at {cells[0, 0]:.0f} % and ends at {cells[-1, 0]:.0f} %, "
            f"the last task is at {cells[-1, -1]:.0f} %."
        )
        section.pictures.append((g.label, figures.svg(figures.matrix(g), f"{name}-matrix{i}", words)))
        if len(cells) <= 20:
            head = ("After task", *(f"task {t + 1}" for t in range(len(cells))))
            lines = [[str(t + 1), *("" if np.isnan(v) else f"{v:.1f}" for v in row)] for t, row in enumerate(cells)]
            section.details.append(Table(f"{g.label}: accuracy on each task, in %", head, lines))
    section.text = (
        "Row: the task just learned. Column: the task whose classes are tested, among all classes seen, in %, "
        "mean over seeds."
    )
    return section


def _forgetting(protocol: Protocol, name: str) -> Section:
    text = "How far the accuracy on each task's classes has fallen from its best when all tasks are learned, in points."
    missing = "No complete run has more than one task."
    section = _curves("Forgetting", text, figures.forgetting(protocol, True), f"{name}-forgetting", missing)
    spreads = [(g, g.spread(lambda r: metrics.fallen(r.matrix) or None)) for g in protocol.finished]
    if curves := [(g, spread) for g, spread in spreads if spread is not None]:
        longest = max(len(mean) for _, (mean, _) in curves)
        head = ("Task", *(str(t + 1) for t in range(longest)))
        section.details.append(_over_tasks("Forgetting, task by task", head, curves))
    return section


def _drift(protocol: Protocol, name: str) -> Section:
    text = (
        "Mean over old classes of 1 − cos(prototype, true class mean), both in the space after the task: dashed, the "
        "prototype as it was when the task began; solid, as the method left it. The true means take the old classes' "
        "training images, which no method sees."
    )
    missing = (
        "No complete run here measured it. It takes a pass over old images after every task: --measure-drift true."
    )
    section = _curves("Drift of the prototypes", text, figures.drift(protocol, True), f"{name}-drift", missing)
    means = []
    for g in protocol.finished:
        spreads = [g.spread(partial(_mean_moved, which=which)) for which in ("before", "after", "spacing")]
        if all(spread is not None for spread in spreads):
            means.append((g.label, [float(spread[0]) for spread in spreads if spread]))
    factor, power = figures.unit(max((max(values[:2]) for _, values in means), default=0.0))
    lines = []
    for label, (before, after, spacing) in means:
        kept = f"{100 * (1 - after / before):.0f} %".replace("-", "−") if before > 1e-9 else "–"
        lines.append([label, f"{factor * before:.3f}", f"{factor * after:.3f}", kept, f"{spacing:.3f}"])
    if lines:
        head = ("Method", f"Before{power}", f"After{power}", "Made good", "Distance to the nearest other class")
        section.text += " Made good: the share of the distance that the alignment has removed."
        section.tables.append(Table("Mean over tasks of 1 − cos", head, lines))
        absent = [g.label for g in protocol.finished if g.label not in {line[0] for line in lines}]
        section.text += f" Not measured after every task: {', '.join(absent)}." if absent else ""
    return section


def _cost(protocol: Protocol, name: str) -> Section:
    section = Section("Cost", missing="No run is complete.")
    groups = protocol.finished
    drawn = figures.cost(protocol, True)
    if drawn is None:
        return section
    words = "Seconds of each phase: " + "; ".join(
        f"{g.label} {float(np.mean([r.total_seconds for r in g.results])):.0f} in all" for g in groups
    )
    section.pictures.append(("Seconds of each phase of a run", figures.svg(drawn, f"{name}-cost", words)))
    by_task = figures.cost_of_tasks(protocol, True)
    if by_task is None:
        section.text = "No run here recorded what each task cost."
    else:
        words = "Seconds to learn each task, without evaluation."
        section.pictures.append((words, figures.svg(by_task, f"{name}-tasks", words)))
    phases = figures.phases(groups)
    seconds = [[g.label, *(_seconds(g, p) for p in phases)] for g in groups]
    section.tables.append(Table("Seconds and share of the run, mean over seeds", ("Method", *phases), seconds))
    if phases := [p for p in phases if p != "other"]:
        peaks = [[g.label, *(_peak(g, p) for p in phases)] for g in groups]
        what = (
            "Peak memory in MiB: what was allocated on a GPU, the process's resident set on a CPU; largest over seeds"
        )
        section.tables.append(Table(what, ("Method", *phases), peaks))
    return section


def _settings(protocol: Protocol, name: str) -> Section:
    section = Section("Settings and versions")
    groups = protocol.groups
    names = differing(groups)
    if names:
        lines = [[g.label, *(text_of(configuration_of(g.example).get(n)) for n in names)] for g in groups]
        section.tables.append(Table("Settings in which the configurations differ", ("Method", *names), lines))
    facts = protocol_of(groups[0].example)
    common = {k: v for k, v in configuration_of(groups[0].example).items() if k not in names}
    shared = [[k, text_of(v)] for k, v in {**facts, **common}.items()]
    section.details.append(Table("Protocol and settings that all configurations share", ("Setting", "Value"), shared))
    lines = []
    for g in groups:
        for r in (*g.results, *g.unfinished):
            done = "complete" if r in g.results else f"{len(r.curve)} of {len(r.classes_seen)} tasks"
            figures_ = [f"{v:.1f}" if v is not None else "–" for v in r.summary().values()]
            versions = [r.environment.get(k, "not recorded") for k in ("plora_ext", "torch", "python", "device")]
            lines.append([g.label, text_of(settings_of(r)["seed"]), done, *figures_[:2], _run(r), *versions])
    head = ("Method", "Seed", "Tasks", "Ā", "A_B", "Folder", "plora_ext", "torch", "Python", "Device")
    section.details.append(Table("Every run", head, lines))
    return section


# ---------------------------------------------------------------------- parts of sections


def _curves(title: str, text: str, figure: Figure | None, name: str, missing: str) -> Section:
    if figure is None:
        return Section(title, missing=missing)
    return Section(title, [(f"{title}, task by task", figures.svg(figure, name, text))], text=text)


def _over_tasks(caption: str, head: Sequence[str], curves: Sequence[tuple[Group, Any]]) -> Table:
    lines = []
    for g, (mean, deviation) in curves:
        several = len(g.results) > 1
        lines.append([g.label, *(f"{m:.1f}" + (f" ± {d:.1f}" if several else "") for m, d in zip(mean, deviation))])
    return Table(caption, head, lines)


def _mean_moved(result: Result, which: str) -> float | None:
    values = figures.moved(result, which)
    return None if values is None or np.isnan(values).any() else float(np.mean(values))


def _seconds(group: Group, phase: str) -> str:
    mean, total = (
        float(np.mean([value(r) for r in group.results])) for value in (figures.phase(phase), lambda r: r.total_seconds)
    )
    return f"{mean:.1f} ({mean / total:.0%})" if total else f"{mean:.1f}"


def _peak(group: Group, phase: str) -> str:
    peaks = [r.peak_mb[phase] for r in group.results if phase in r.peak_mb]
    return f"{max(peaks):.0f}" if peaks else "–"


def _run(result: Result) -> str:
    return str(result.settings.get("out") or "a run")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
