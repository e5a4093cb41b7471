"""Runs side by side: read from their folders, grouped by what they are, to be averaged over seeds.

Runs are in one *group* if they differ in nothing but the seed and in where things were, and in one *protocol* if they
saw the same data, in the same tasks, through the same backbone: by name and by content. Only finished runs of a group
are averaged.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from plora_ext.cil.checkpoint import MANIFEST, Checkpoint
from plora_ext.cil.methods import METHODS
from plora_ext.cil.metrics import evaluated_on
from plora_ext.cil.result import Result
from plora_ext.cil.same_run import ELSEWHERE
from plora_ext.cil.settings import Settings, as_before, current

PROTOCOL = ("data", "init_cls", "increment", "tasks", "class_order", "order_seed", "validation", "backbone", "weights",
            "image_size", "transform", "normalize", "corrupt")  # fmt: skip
_PARTS = {"plora": ("fusion", "alignment", "head"), "plora-ensemble": ()}
# Settings that may differ between runs that are averaged.
_FREE = {"seed", "measure_drift", *ELSEWHERE} - {"data", "weights"}


@dataclass
class Group:
    """Runs of one configuration, by seed.

    Attributes:
        label: The method, with those settings in which it differs from the usual ones of the protocol's groups.
        results: Its finished runs.
        unfinished: Those that have not learned all tasks.
    """

    label: str
    results: list[Result] = field(default_factory=list)
    unfinished: list[Result] = field(default_factory=list)

    @property
    def example(self) -> Result:
        """One of its runs."""
        return (self.results or self.unfinished)[0]

    @property
    def method(self) -> str:
        return self.example.method

    @property
    def short(self) -> str:
        """The label in at most 44 characters, for a figure."""
        return textwrap.shorten(self.label, 44, placeholder=" …")

    def spread(self, of: Callable[[Result], Any]) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and standard deviation (n - 1; 0 for one run) of `of(result)`, over runs for which it is not None."""
        values = [value for value in map(of, self.results) if value is not None]
        if not values:
            return None
        stack = np.array(values, dtype=np.float64)
        return stack.mean(0), stack.std(0, ddof=1) if len(values) > 1 else np.zeros_like(stack[0])


@dataclass
class Protocol:
    """Groups that can be compared."""

    name: str
    groups: list[Group]
    classes_seen: list[int]

    @property
    def results(self) -> list[Result]:
        return [result for group in self.groups for result in (*group.results, *group.unfinished)]

    @property
    def finished(self) -> list[Group]:
        """The groups that have a finished run."""
        return [group for group in self.groups if group.results]


def is_finished(result: Result) -> bool:
    """Whether all tasks were learned."""
    return 0 < len(result.classes_seen) == len(result.curve)


def load_results(path: str | Path, out: str | Path | None = None) -> list[Result]:
    """The results of a run's folder, of the runs somewhere below a folder, or of a metrics.json.

    An unfinished run is read from its checkpoint.

    Args:
        out: A folder below that does not count: of the report to be replaced, which holds runs as they were then.

    Raises:
        OSError: There is neither.
        ValueError: A file is not one that this package wrote whole.
    """
    path = Path(path)
    metrics = path / "metrics.json" if path.is_dir() else path
    results = _of_metrics(metrics) if metrics.is_file() else []
    if path.is_dir():
        manifest: dict[str, Any] = {}
        with suppress(ValueError) if results else nullcontext():  # a finished run needs no checkpoint
            manifest = Checkpoint(path, resume=True).manifest
        if manifest and (not results or len(manifest["run"].get("curve", [])) < manifest["run"].get("tasks", 1)):
            results.append(_of_checkpoint(path, manifest))
    if not results and path.is_dir():
        below = {file.parent for file in path.rglob("metrics.json") if file.is_file()}
        below |= {file.parent.parent for file in path.rglob(f"checkpoint/{MANIFEST}") if file.is_file()}
        left_out = {path.resolve(), *([] if out is None else [Path(out).resolve()])}  # what it holds itself is none
        below = {run for run in below if run.resolve() not in left_out}
        results = [result for run in sorted(below) for result in load_results(run)]
    if not results:
        raise FileNotFoundError(
            f"{path} is no run: it holds neither metrics.json nor checkpoint/{MANIFEST}, nor does a folder in it; RUN "
            "must be a folder that `plora-ext train` or `demo` wrote, or a folder of such"
        )
    return results


def _of_metrics(file: Path) -> list[Result]:
    try:
        runs = json.loads(file.read_text("utf-8"))["runs"]
        results = [_result(run) for run in runs]
        for r in results:
            np.array(r.curve, dtype=np.float64), [np.array(row, dtype=np.float64) for row in r.matrix]
            r.settings["method"], r.settings["seed"], len(r.classes_seen)
        return results
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is not a metrics.json of plora-ext: {error}") from error


def _of_checkpoint(path: Path, manifest: dict[str, Any]) -> Result:
    run = manifest["run"]
    if not run.get("curve"):  # within its first task, of which an older version said nothing
        run = {"classes_seen": [], "class_order": [], "num_train": 0, "num_test": 0, **run}
    try:
        return _result({**run, "settings": manifest["settings"]})
    except TypeError as error:
        raise ValueError(
            f"{path}: its checkpoint is of an older version of plora-ext, which did not record all of it ({error}); "
            "finish it with `plora-ext train --resume`"
        ) from error


def _result(run: dict[str, Any]) -> Result:
    return Result(**{f.name: run[f.name] for f in fields(Result) if f.name in run})


# ---------------------------------------------------------------------- groups


def distinct(results: Iterable[Result]) -> list[Result]:
    """The results without those that are given a second time."""
    return list({json.dumps(asdict(result), sort_keys=True): result for result in results}.values())


def group(results: Iterable[Result]) -> list[Protocol]:
    """The results by protocol and configuration, both in the order in which they came, the seeds sorted.

    Left out: a run given twice, and one that has not learned its first task.
    """
    protocols: dict[str, dict[str, Group]] = {}
    for result in distinct(results):
        if result.curve:
            groups = protocols.setdefault(_key(protocol_of(result)), {})
            own = groups.setdefault(_key(configuration_of(result)), Group(result.method))
            (own.results if is_finished(result) else own.unfinished).append(result)
    names = _names([next(iter(groups.values())).example for groups in protocols.values()])
    return [_protocol(name, list(groups.values())) for name, groups in zip(names, protocols.values())]


def protocol_of(result: Result) -> dict[str, Any]:
    """What must agree for two results to be compared."""
    s = settings_of(result)
    facts = {name: s[name] for name in PROTOCOL}
    facts["init_cls"] = s["init_cls"] or s["increment"]  # 0 says the same
    facts["images"] = [result.num_train, result.num_test]
    if "data_digest" in result.inputs:  # it says which; the folder may have been named from elsewhere
        facts |= {name: s[name] and Path(s[name]).name for name in ("data", "weights")}
    for name in ("data", "backbone"):
        facts[name] = result.inputs.get(name, facts[name])
    facts["digests"] = [result.inputs.get(f"{name}_digest", "unknown") for name in ("data", "backbone")]
    return facts if facts["tasks"] is None else {**facts, "init_cls": None, "increment": None}


def configuration_of(result: Result) -> dict[str, Any]:
    """What must agree for two results to be averaged, beside the protocol: settings, and the device's name.

    `evaluations`: how many accuracies the curve has; one for joint where a version of before measured it.
    """
    facts = {name: value for name, value in settings_of(result).items() if name not in _FREE and name not in PROTOCOL}
    device = result.environment.get("device", "unknown")
    return {**facts, "device": device, "evaluations": len(result.classes_seen)}


def settings_of(result: Result) -> dict[str, Any]:
    """A result's settings; those that came after it was written are as they were when there was no such setting."""
    return {**_defaults(), **as_before(current(result.settings))}


@cache
def _defaults() -> dict[str, Any]:
    return Settings().as_dict()


def differing(groups: Sequence[Group]) -> list[str]:
    """The names in `configuration_of` in which groups differ."""
    facts = [configuration_of(g.example) for g in groups]
    names = dict.fromkeys(name for f in facts for name in f)
    return [name for name in names if len({_key(f.get(name)) for f in facts}) > 1]


def text_of(value: Any) -> str:
    """A setting's value as a short text."""
    if isinstance(value, list):
        return " ".join(map(text_of, value))
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def repeated_seeds(group: Group) -> list[int]:
    """Seeds of which a group has several finished runs."""
    times = Counter(int(r.settings["seed"]) for r in group.results)
    return sorted(seed for seed, n in times.items() if n > 1)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _protocol(name: str, groups: list[Group]) -> Protocol:
    defaults = _defaults()
    for method in dict.fromkeys(g.method for g in groups):
        own = [g for g in groups if g.method == method]
        facts = [configuration_of(g.example) for g in own]
        # The default goes without saying, or else what most of the method's groups have.
        usual = {setting: _usual([f.get(setting) for f in facts], defaults.get(setting)) for setting in differing(own)}
        # What a method is made of is said whenever it is another than the default.
        usual |= {setting: _key(defaults[setting]) for setting in _PARTS.get(method, ("head",))}
        for g, f in zip(own, facts):
            said = [f"{n} {text_of(f.get(n))}" for n, value in usual.items() if _key(f.get(n)) != value]
            g.label = ", ".join([method, *said])
            g.results.sort(key=lambda r: int(r.settings["seed"]))
            g.unfinished.sort(key=lambda r: int(r.settings["seed"]))
    order = {method: i for i, method in enumerate(METHODS)}
    groups.sort(key=lambda g: (order.get(g.method, len(order)), g.label != g.method))
    longest = max((g.example.classes_seen for g in groups), key=len)
    return Protocol(name, groups, list(longest))


def _usual(values: list[Any], default: Any) -> str | None:
    """The key of the value that needs no word: the most frequent, if it alone is that or the default is as frequent."""
    times = Counter(map(_key, values))
    most = [value for value, n in times.items() if n == max(times.values())]
    return most[0] if len(most) == 1 else _key(default) if _key(default) in most else None


def _names(firsts: Sequence[Result]) -> list[str]:
    """A title for each protocol, none twice: data, tasks, backbone, and what else tells apart those that agree there.

    Where that is too long to be said in full, they are numbered.
    """
    facts = [protocol_of(r) for r in firsts]
    telling = (*PROTOCOL[PROTOCOL.index("tasks") :], "images", "digests")
    titles = []
    for f in facts:
        first, increment = f["init_cls"], f["increment"]
        tasks = f"B{0 if first == increment else first} Inc{increment}" if first else f"{len(f['tasks'])} given tasks"
        on = f", on {evaluated_on(f['validation'])}" if f["validation"] else ""
        titles.append(f"{Path(str(f['data'])).name or f['data']}, {tasks}, {f['backbone']}{on}")

    def alike() -> list[list[int]]:
        return [[i for i, t in enumerate(titles) if t == title] for title in dict.fromkeys(titles)]

    for same in alike():
        for name in (n for n in telling if len({_key(facts[i][n]) for i in same}) > 1):
            for i in same:
                titles[i] += f", {_said(name, facts[i][name])}"
    for same in alike():
        if len({facts[i]["data"] for i in same}) > 1:
            for i in same:
                titles[i] += f" ({facts[i]['data']})"
    for same in alike():
        for number, i in enumerate(same if len(same) > 1 else (), 1):
            titles[i] += f", protocol {number} of that name"
    return [title.encode("utf-8", "backslashreplace").decode() for title in titles]  # a folder's need not be UTF-8


def _said(name: str, value: Any) -> str:
    if name == "images":
        return f"{value[0]} training and {value[1]} evaluation images"
    return f"{name.replace('_', ' ')} {textwrap.shorten(text_of(value), 40)}"


# ---------------------------------------------------------------------- the comparison

# Columns of the comparison: title, figure of a result, digits after the point.
COLUMNS: tuple[tuple[str, Callable[[Result], float | None], int], ...] = (
    ("Ā", lambda r: r.summary()["average_accuracy"], 1),
    ("A_B", lambda r: r.summary()["last_accuracy"], 1),
    ("Forgetting", lambda r: r.summary()["forgetting"], 1),
    ("BWT", lambda r: r.summary()["backward_transfer"], 1),
    ("Passes", lambda r: r.passes, 0),
    ("Trainable", lambda r: r.parameters.get("trainable"), 0),
    ("Stored MB", lambda r: r.parameters.get("stored_mb"), 2),
    ("Time s", lambda r: r.total_seconds, 0),
    ("Peak MB", lambda r: max(r.peak_mb.values(), default=None), 0),
)


def rows(protocol: Protocol) -> list[list[str]]:
    """The comparison as text cells, one row a group: its label, its seeds, COLUMNS."""
    return [
        [g.label, str(len(g.results)), *(_cell(g, of, digits) for _, of, digits in COLUMNS)] for g in protocol.finished
    ]


def best_cells(lines: Sequence[Sequence[str]]) -> set[tuple[int, int]]:
    """(row, column) of the highest Ā and A_B, where there are several rows."""
    best: set[tuple[int, int]] = set()
    for column in (2, 3) if len(lines) > 1 else ():
        values = {i: float(line[column].split()[0]) for i, line in enumerate(lines) if line[column] != "–"}
        best |= {(i, column) for i, value in values.items() if value == max(values.values())}
    return best


def _cell(group: Group, of: Callable[[Result], float | None], digits: int) -> str:
    spread = group.spread(of)
    if spread is None:
        return "–"
    mean, deviation = (f"{float(value):.{digits}f}" for value in spread)
    return f"{mean} ± {deviation}" if len(group.results) > 1 and digits == 1 else mean  # accuracies
