"""A run on the terminal: a live table with a progress bar, or plain lines where nobody watches one."""

from __future__ import annotations

import time
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.progress import Task as BarTask
from rich.table import Table
from rich.text import Text

from plora_ext.cil.callbacks import Callback
from plora_ext.variables import unwatched

COMPACT: Any = {"box": SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}  # tables fit 80 columns
SHOWN = 10  # tasks in the live table at most: the latest ones


def fits(table: Table, width: int) -> bool:
    """Whether every figure of a table can be read in so many columns."""
    return Console(width=1000).measure(table).minimum <= width


class _Rate(ProgressColumn):
    """Images per second, over the last half minute."""

    def render(self, task: BarTask) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.0f} images/s")


class ConsoleProgress(Callback):
    """Shows the accuracy after every task of every method, as it comes. Use it as a context manager."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self._curves: dict[str, list[float]] = {}
        self._of, self._method, self._start = "", "", 0.0
        self._images, self._since = 0, 0.0  # of this task
        self._learned = False  # something, since the method began
        bar = [BarColumn(10)] if self.console.width >= 80 and not self.console.no_color else []
        count, left = MofNCompleteColumn(), TimeRemainingColumn(compact=True)
        self._bar = Bar(TextColumn("{task.description}"), *bar, count, _Rate(), left, TextColumn("left"))
        self._job = self._bar.add_task("", total=None)
        self._ended = False
        self._live = Live(console=self.console, refresh_per_second=4, get_renderable=self._render)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and not unwatched()

    def __enter__(self) -> ConsoleProgress:
        if self.live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = True  # the accuracies stay, the bar goes
        if self.live:
            self._live.transient = not any(self._curves.values())
            self._live.stop()

    def begin(self, method: str, num_tasks: int | None) -> None:
        self._method, self._start = method, time.perf_counter()
        self._of = f" of {num_tasks}" if num_tasks else ""
        self._curves[method] = []
        self._images, self._since, self._learned = 0, self._start, False
        self._bar.reset(self._job, visible=False)

    def fit(self, task: int, images: int) -> None:
        self._bar.reset(self._job, description=f"{self._method}, task {task + 1}{self._of}", total=images, visible=True)

    def read(self, images: int) -> None:
        self._bar.reset(self._job, description=f"{self._method}, reading features", total=images, visible=True)

    def step(self, images: int) -> None:
        self._images += images
        self._bar.advance(self._job, images)

    def task(self, task: int, accuracy: float) -> None:
        self._curves[self._method].append(accuracy)
        if not self.live:
            now = time.perf_counter()
            where = f"{self._method:<16} task {task + 1:>2}{self._of}"
            spent = f"{now - self._start:4.0f} s   {self._images / (now - self._since):5.0f} images/s"
            other = "learned together" if self._learned else "learned before"  # by joint; by a run that is continued
            self._learned |= self._images > 0
            line = f"{where}   accuracy {accuracy:5.1f} %   {spent if self._images else other}"
            self.console.print(line, highlight=False, markup=False)
            self._images, self._since = 0, now

    def note(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _render(self) -> Group:
        tables = (self._table(shown) for shown in range(SHOWN, 0, -1))
        table = next((t for t in tables if fits(t, self.console.width)), self._table(1))
        return Group(table, *([] if self._ended else [self._bar]))

    def _table(self, shown: int) -> Table:
        longest = max((len(curve) for curve in self._curves.values()), default=0)
        first = max(0, longest - shown)
        table = Table(title="Accuracy (%) after task", title_justify="left", **COMPACT)
        table.add_column("method", no_wrap=True)
        for task in range(first, max(longest, 1)):
            table.add_column(str(task + 1), justify="right", no_wrap=True)
        for method, curve in list(self._curves.items()):  # drawn by a thread of its own
            table.add_row(method, *(f"{accuracy:.1f}" for accuracy in curve[first:]))
        return table
