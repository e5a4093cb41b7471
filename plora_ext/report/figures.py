"""The figures of a comparison, each of the groups of one protocol: mean over seeds, ± one standard deviation."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plora_ext.cil import metrics
from plora_ext.cil.result import Result
from plora_ext.report.runs import Group, Protocol

# Hues of Okabe and Ito, dark enough to be read on white; the page has a light twin of each for a dark background.
COLORS = ("#0072b2", "#b84f00", "#007a58", "#b0487f", "#8f6200", "#6a51a3", "#555555")
INK, GRID, EDGE = "#333333", "#e4e4e4", "#bbbbbb"
_MARKERS, _LINES = "osD^vPX*", ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
WIDE, NARROW = 7.2, 4.8  # inches: of a file, and in the page, where it is to be read on a phone
_NAMED = 12  # curves at most that are named at their end; more have a legend
_LETTERED = 14  # tasks at most whose accuracies are written into the cells of a matrix
PHASES = ("train", "prototypes", "subspace", "align", "head", "eval", "drift", "other")


def accuracy(protocol: Protocol, narrow: bool = False) -> Figure:
    """Accuracy over all classes seen, against their number: a curve for each group."""
    figure, axes = _axes(narrow)
    seen = protocol.classes_seen
    ends = []
    for group in protocol.finished:
        style = _style(protocol, group)
        mean, deviation = group.spread(lambda r: r.curve) or (np.zeros(1), np.zeros(1))
        both = [r.curve for r in group.results] if len(group.results) == 2 else []  # two make no spread
        if group.method == "joint":  # no learner of tasks but their bound
            style |= {"marker": "", "linestyle": (0, (4, 3))}
        if len(mean) == 1 < len(seen):  # of a version that measured joint at the end alone: drawn across
            mean, deviation = mean.repeat(len(seen)), deviation.repeat(len(seen))
        x = group.example.classes_seen if len(seen) == 1 else seen
        _curve(axes, x, mean, deviation, style, both, limits=(0, 100))
        ends.append((mean[-1], f"{group.short}  {mean[-1]:.1f}", style["color"]))
    for group in protocol.groups:
        for r in group.unfinished if not group.results else ():  # nothing else is known of them
            x, color = r.classes_seen[: len(r.curve)], _style(protocol, group)["color"]
            axes.plot(x, r.curve, color=color, linestyle=":", marker=".")
            ends.append((r.curve[-1], f"{group.short}, incomplete", color))
    low = max(0.0, 10 * (axes.dataLim.y0 // 10) - 5)
    axes.set(ylim=(low, 101), xlabel="classes seen", ylabel="accuracy over all of them (%)")
    _name(axes, ends, seen[-1], narrow)
    axes.set_xticks(seen if len(seen) <= (10 if narrow else 20) else ticks(seen[0], seen[-1]))
    return figure


def forgetting(protocol: Protocol, narrow: bool = False) -> Figure | None:
    """By how much the accuracy on each task's classes has fallen from its best when all tasks are learned."""
    curves = [(g, g.spread(lambda r: metrics.fallen(r.matrix))) for g in protocol.finished if len(g.example.matrix) > 1]
    if not curves:
        return None
    return _over_tasks(protocol, curves, "task", "accuracy lost since its best (points)", narrow, joined=False)


def drift(protocol: Protocol, narrow: bool = False) -> Figure | None:
    """Distance of old prototypes from the true class means: dashed when the task began, solid after the alignment."""
    spreads = [(g, g.spread(lambda r: moved(r, "after"))) for g in protocol.finished]
    curves = [(g, s) for g, s in spreads if s is not None and np.isfinite(s[0]).any()]
    if not curves:
        return None
    before = [g.spread(lambda r: moved(r, "before")) for g, _ in curves]
    every = np.concatenate([spread[0] for spread in (*before, *(s for _, s in curves)) if spread is not None])
    low, high = float(np.nanmin(every)), float(np.nanmax(every))
    log = low > 0 and high > 30 * low
    factor, power = (1.0, "") if log else unit(high)
    figure = _over_tasks(
        protocol,
        [(g, (mean * factor, deviation * factor)) for g, (mean, deviation) in curves],
        "after task",
        f"mean 1 − cos to the true class mean{power}",
        narrow,
        first=2,
        scale="log" if log else "linear",
        dashed=[None if spread is None else spread[0] * factor for spread in before],
    )
    figure.axes[0].set_title("dashed: before the alignment, solid: after", color=INK, fontsize=9, loc="left")
    return figure


def unit(largest: float) -> tuple[float, str]:
    """A factor and its name, such as (1e4, " (10⁻⁴)"), with which numbers up to `largest` need few digits."""
    power = 0 if largest >= 0.01 or largest <= 0 else math.floor(math.log10(largest))
    return 10.0**-power, f" (10⁻{str(-power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))})" if power else ""


def ticks(first: int, last: int) -> list[int]:
    """Whole numbers to name on an axis from the first to the last, both among them."""
    if last - first < 12:
        return list(range(first, last + 1))
    between = MaxNLocator(8, steps=[1, 2, 5, 10], integer=True).tick_values(0, last)
    step = between[1] - between[0]
    return [first, *(int(t) for t in between if first + step / 3 < t < last - step / 3), last]


def cost(protocol: Protocol, narrow: bool = False) -> Figure | None:
    """Seconds of each phase of a whole run: a bar for each group."""
    groups = protocol.finished
    if not groups:
        return None
    figure = Figure(figsize=(NARROW if narrow else WIDE, 1.0 + 0.34 * len(groups)), layout="constrained")
    axes: Axes = figure.add_subplot()
    left = np.zeros(len(groups))
    for i, name in enumerate(phases(groups)):
        seconds = np.array([float(group.spread(phase(name))[0]) for group in groups])  # type: ignore[index]
        axes.barh(range(len(groups)), seconds, left=left, color=COLORS[i % 7], label=name, height=0.7)
        left += seconds
    axes.set_yticks(range(len(groups)), [textwrap.fill(g.short, 20 if narrow else 44) for g in groups])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    _clean(axes)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    _legend(figure, axes)
    return figure


def cost_of_tasks(protocol: Protocol, narrow: bool = False) -> Figure | None:
    """Seconds to learn each task: everything but the evaluation, which grows with the classes seen by itself."""
    curves = [(g, g.spread(_seconds_of_tasks)) for g in protocol.finished if len(g.example.matrix) > 1]
    curves = [(g, spread) for g, spread in curves if spread is not None]
    if not curves:
        return None
    return _over_tasks(protocol, curves, "task", "seconds to learn it", narrow, joined=False)


def matrix(group: Group, axes: Axes | None = None) -> Figure:
    """A group's task matrix as a heat map: row, the task just learned; column, the task tested."""
    cells = mean_matrix(group)
    size = cells.shape[1]
    side = min(max(0.32 * size, 2.2), 4.5)
    figure = axes.figure if axes else Figure(figsize=(side + 0.7, side * len(cells) / size + 0.7), layout="constrained")
    assert isinstance(figure, Figure)
    axes = axes or figure.add_subplot()
    colors = colormaps["YlGnBu"]
    norm = Normalize(0, 100)
    axes.imshow(cells, norm=norm, cmap=colors, interpolation="none", aspect="auto")
    named = np.arange(size)
    if size <= _LETTERED:
        for (t, i), value in np.ndenumerate(cells):
            if np.isfinite(value):
                ink = "white" if value > 60 else "#222222"
                axes.text(i, t, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=7.5, in_layout=False)
    else:
        named = np.unique(np.linspace(0, size - 1, 6).astype(int))
        bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, shrink=0.8, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=INK, length=0, labelsize=8)
    axes.set_xticks(named, named + 1)
    axes.set_yticks(named[: len(cells)], named[: len(cells)] + 1)  # joint has one row
    axes.set(xlabel="tested on task", ylabel="after task")
    _clean(axes)
    axes.spines[:].set_visible(False)
    return figure


def matrices(protocol: Protocol) -> Figure | None:
    """The task matrices of all groups, at most three beside each other, on the width of a page."""
    groups = [g for g in protocol.finished if len(g.example.matrix) > 1] or protocol.finished
    if not groups:
        return None
    columns = 2 if len(groups) == 4 else min(3, len(groups))
    lines = -(-len(groups) // columns)
    side = min(max(0.36 * len(protocol.classes_seen), 2.4), 5.0, (WIDE - 0.4) / columns - 0.4)
    figure = Figure(figsize=(max(columns * (side + 0.4) + 0.4, 3.6), lines * (side + 0.6)), layout="constrained")
    every = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, group in zip(every, groups):
        matrix(group, axes)
        axes.set_title(group.short, color=INK, fontsize=10, fontweight="bold")
    for axes in every[len(groups) :]:
        axes.set_visible(False)
    return figure


def mean_matrix(group: Group) -> np.ndarray:
    """The mean task matrix over a group's finished runs; NaN above the diagonal."""

    def padded(r: Result) -> np.ndarray:
        width = len(r.matrix[-1])
        return np.array([[*row, *[np.nan] * (width - len(row))] for row in r.matrix])

    spread = group.spread(padded)
    assert spread is not None
    return spread[0]


def svg(figure: Figure, name: str, title: str) -> str:
    """A figure as an <svg> element to stand in a page: named, with ids of its own, in colours that the page sets."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    content = re.split(r"<svg[^>]*>", text, maxsplit=1)[1]
    content = re.sub(r'\bid="', f'id="{name}-', content)
    content = re.sub(r'(href="#|url\(#)', rf"\1{name}-", content)
    for i, color in enumerate(COLORS):
        content = content.replace(color, f"var(--c{i})")
    content = content.replace(INK, "var(--ink)").replace(GRID, "var(--grid)").replace(EDGE, "var(--edge)")
    width, height = figure.get_size_inches()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-labelledby="{name}-title" viewBox="0 0 {72 * width:g} {72 * height:g}">'
        f'<title id="{name}-title">{escape(title)}</title>{content}'
    )


# ---------------------------------------------------------------------- what is drawn


def moved(r: Result, which: str) -> list[float] | None:
    """`before`, `after` or `spacing` of the drift after each task but the first; None if it was never measured.

    NaN where it was not, as of a run that was continued with another `measure_drift`.
    """
    return [step[which] if step else math.nan for step in r.drift[1:]] if any(r.drift) else None


def _seconds_of_tasks(r: Result) -> list[float] | None:
    return [sum(v for phase, v in c["seconds"].items() if phase not in ("eval", "drift")) for c in r.costs] or None


def phases(groups: Sequence[Group]) -> list[str]:
    """The phases of the groups' runs, and `other`, what is in none."""
    known = dict.fromkeys(phase for g in groups for r in g.results for phase in r.seconds)
    return [p for p in PHASES if p in known or p == "other"] + [p for p in known if p not in PHASES]


def phase(name: str) -> Callable[[Result], float]:
    """Seconds of a phase, as a function of a result."""
    if name == "other":
        return lambda r: max(0.0, r.total_seconds - sum(r.seconds.values()))
    return lambda r: r.seconds.get(name, 0.0)


# ---------------------------------------------------------------------- how


def _axes(narrow: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(NARROW, 3.9) if narrow else (WIDE, 4.2), layout="constrained")
    axes: Axes = figure.add_subplot()
    _clean(axes)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    return figure, axes


def _over_tasks(
    protocol: Protocol,
    curves: Sequence[tuple[Group, Any]],
    xlabel: str,
    ylabel: str,
    narrow: bool,
    first: int = 1,
    scale: str = "linear",
    dashed: Sequence[np.ndarray | None] = (),
    joined: bool = True,
) -> Figure:
    """Figures of tasks; `joined` by lines where one follows from the other, else side by side with bars of spread."""
    figure, axes = _axes(narrow)
    ends, last = [], 1
    for i, (group, (mean, deviation)) in enumerate(curves):
        style = _style(protocol, group)
        x = np.arange(len(mean)) + first
        deviation = deviation if scale == "linear" else 0 * deviation
        if joined:
            _curve(axes, x, mean, deviation, style, limits=(0, np.inf))
        else:
            aside = 0.5 * ((i + 0.5) / len(curves) - 0.5)
            axes.plot(x + aside, mean, **{**style, "linestyle": "none"}, markersize=4, clip_on=False)
            if deviation.any():
                low, high = np.maximum(mean - deviation, 0), mean + deviation
                axes.vlines(x + aside, low, high, color=style["color"], linewidth=1, alpha=0.6)
        ends.append((mean[np.isfinite(mean)][-1], group.short, style["color"]))
        last = max(last, int(x[-1]))
    for values, (group, _) in zip(dashed, curves):
        if values is not None:
            color = _style(protocol, group)["color"]
            axes.plot(np.arange(len(values)) + first, values, color=color, linewidth=1.2, linestyle=(0, (2, 2)))
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale=scale)
    if scale == "linear":
        axes.set_ylim(bottom=0)
    axes.set_xticks(ticks(first, last))
    _name(axes, ends, last, narrow or not joined)
    return figure


def _style(protocol: Protocol, group: Group) -> dict[str, Any]:
    """Colour, marker and line of a group, the same in every figure of its protocol."""
    n = next(i for i, g in enumerate(protocol.groups) if g is group)
    return {"color": COLORS[n % 7], "marker": _MARKERS[n % len(_MARKERS)], "linestyle": _LINES[n // 7 % len(_LINES)]}


def _curve(
    axes: Axes,
    x: Any,
    mean: np.ndarray,
    deviation: np.ndarray,
    style: dict[str, Any],
    both: Sequence[Any] = (),
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> None:
    every = max(1, len(mean) // 15)
    axes.plot(x, mean, linewidth=1.8, markersize=4, markevery=every, **style)
    for values in both:
        axes.plot(x, np.broadcast_to(values, len(mean)), ".", color=style["color"], markersize=4, alpha=0.5)
    if deviation.any() and not both:
        low, high = np.clip(mean - deviation, *limits), np.clip(mean + deviation, *limits)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.16, linewidth=0)


def _name(axes: Axes, ends: Sequence[tuple[float, str, str]], at: float, narrow: bool) -> None:
    """Names the curves at their ends, where there are few and the figure is wide, otherwise in a legend below."""
    if narrow or len(ends) > _NAMED:
        named = (line for line in axes.get_lines() if line.get_marker() != "." or line.get_linestyle() == ":")
        for line, (_, text, _) in zip(named, ends):
            line.set_label(text)
        _legend(axes.figure, axes)  # type: ignore[arg-type]
        return
    to_axes = axes.transData + axes.transAxes.inverted()  # where the curves end, as a share of the height
    heights = _apart([float(to_axes.transform((at, end[0]))[1]) for end in ends], gap=0.052)
    for height, (_, text, color) in zip(heights, ends):
        axes.annotate(
            text, (at, height), (8, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
            annotation_clip=False, color=color, va="center", weight="bold",
        )  # fmt: skip


def _legend(figure: Figure, axes: Axes) -> None:
    handles, texts = axes.get_legend_handles_labels()
    columns = max(1, min(len(texts), int(13 * figure.get_size_inches()[0]) // (max(map(len, texts)) + 6)))
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, labelcolor=INK)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved apart to at least `gap`, as little as possible, in the same order: isotonic regression."""
    n, order = len(heights), np.argsort(heights, kind="stable")
    steps = gap * np.arange(n)
    sums = np.cumsum([0.0, *(np.array(heights)[order] - steps)])
    mean = lambda a, b: (sums[b] - sums[a]) / (b - a)  # noqa: E731
    fit = [max(min(mean(a, b) for b in range(i + 1, n + 1)) for a in range(i + 1)) for i in range(n)]
    placed = np.empty(n)
    placed[order] = fit + steps
    return placed.tolist()
