"""The record of a run: the loop appends to it, a checkpoint holds it, reports are made of it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import plora_ext
from plora_ext.cil import metrics
from plora_ext.cil.files import write_whole


@dataclass(repr=False)
class Result:
    """What a run has measured so far; accuracies in percent, defined in plora_ext.cil.metrics.

    Attributes:
        settings: The resolved settings.
        classes_seen: Classes seen after each task, in order.
        class_order: The classes of the data set in the order they came.
        curve: A_b after each task (for joint, of the model trained on all classes).
        matrix: Row t: accuracy on the classes of tasks 0 ... t after task t (for joint, one row over all tasks).
        passes: Forward passes per prediction after the last task.
        parameters: After the last task (`plora_ext.cil.methods.Method.parameters`).
        seconds, peak_mb: Per phase that there is: train, prototypes, align, head, subspace, eval, drift.
        total_seconds: The whole run, without loading data and backbone.
        num_train, num_test: Images to train and to evaluate on.
        costs: `seconds` and `peak_mb` of each phase, task by task.
        drift: Of the prototypes, task by task (plora_ext.cil.prototype_error); None where there is none, empty if not
            measured.
        environment: Versions and the device's name; as `changed`, what was changed when the run was continued.
        inputs: Digests of the data and of the backbone's weights; `data` and `backbone`, where `run` was given others
            than the settings name, say so.
        class_names: Names of the classes in `class_order`, where the data set has names.
        learner: The `plora_ext.cil.Learner` that has learned the tasks; not part of what is written to files.
    """

    settings: dict[str, Any]
    classes_seen: list[int]
    class_order: list[int]
    num_train: int
    num_test: int
    curve: list[float] = field(default_factory=list)
    matrix: list[list[float]] = field(default_factory=list)
    passes: int = 1
    parameters: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0
    costs: list[dict[str, dict[str, float]]] = field(default_factory=list)
    drift: list[dict[str, float] | None] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    class_names: list[str] | None = None

    def __post_init__(self) -> None:
        self.learner: Any = None  # no field: neither compared nor written

    @property
    def method(self) -> str:
        return str(self.settings["method"])

    @property
    def evaluated_on(self) -> str:
        """What the accuracies are of: "the test images", or a share of the training images (setting `validation`)."""
        return metrics.evaluated_on(self.settings.get("validation", 0))

    def __repr__(self) -> str:
        known = {k: f"{v:.2f}" for k, v in (self.summary() if self.curve else {}).items() if v is not None}
        done = f"{len(self.curve)} of {len(self.classes_seen)} tasks"
        return f"Result({', '.join([self.method, done, *(f'{k} {v}' for k, v in known.items())])})"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes FOLDER/metrics.json, which `plora-ext report` reads, and returns its path; it appears whole or not."""
        file = Path(folder) / "metrics.json"
        write_whole(file, to_json([self]).encode("utf-8", "backslashreplace"))
        return file

    def summary(self) -> dict[str, float | None]:
        """The figures of a comparison: Ā, A_B, forgetting and BWT (both None for joint, which learns once)."""
        # A version of before gave joint's curve one entry, A_B.
        whole = len(self.curve) >= len(self.matrix[-1])
        return {
            "average_accuracy": metrics.average_accuracy(self.curve) if whole else None,
            "last_accuracy": metrics.last_accuracy(self.curve),
            "forgetting": metrics.forgetting(self.matrix),
            "backward_transfer": metrics.backward_transfer(self.matrix),
        }

    def append(self, curve: list[float], row: list[float], moved: dict[str, float] | None, measured: bool) -> None:
        """Takes down a task: A_b, its row of the matrix, and the drift, if that is `measured` or was once."""
        self.curve += curve
        self.matrix.append(row)
        if measured or self.drift:
            self.drift.append(moved)

    def record(self) -> dict[str, Any]:
        """All of it but the settings, as a checkpoint holds it."""
        return {**{k: v for k, v in asdict(self).items() if k != "settings"}, "tasks": len(self.classes_seen)}

    def resume(self, record: Mapping[str, Any], changed: Sequence[str], measure_drift: bool) -> str:
        """Takes over what was measured before, from `record`; returns what is said of the run if it is `changed`."""
        for name in ("classes_seen", "curve", "matrix", "passes", "parameters", "total_seconds", "costs", "drift"):
            setattr(self, name, copy.deepcopy(record.get(name, getattr(self, name))))
        self.seconds |= record.get("seconds", {})  # they are the clock's
        self.peak_mb |= record.get("peak_mb", {})
        if self.drift or measure_drift:  # as many as were learned, also where it was not measured
            self.drift += [None] * (len(self.matrix) - len(self.drift))
        text = f"{'; '.join(changed)}, after {len(self.curve)} of {len(self.classes_seen)} tasks" if changed else ""
        if all_changes := "; ".join(filter(None, (record.get("environment", {}).get("changed"), text))):
            self.environment["changed"] = all_changes
        return text

    def figures(self) -> dict[str, float]:
        """What was measured after the last task so far, by name."""
        costs, moved = self.costs[-1], (self.drift or [None])[-1] or {}
        means = {
            "forgetting": metrics.forgetting(self.matrix),
            "backward transfer": metrics.backward_transfer(self.matrix),
        }
        return {
            "accuracy/all classes seen": self.curve[-1],
            **{f"accuracy/{name}": value for name, value in means.items() if value is not None},
            **{f"accuracy of task/{i + 1}": value for i, value in enumerate(self.matrix[-1])},
            **{f"seconds/{phase}": value for phase, value in costs["seconds"].items()},
            **{f"peak MiB/{phase}": value for phase, value in costs["peak_mb"].items()},
            **{f"drift of prototypes/{name}": value for name, value in moved.items()},
        }


def to_json(results: Sequence[Result]) -> str:
    """The results as the text of metrics.json."""
    head = {"format": 1, "plora_ext": plora_ext.__version__, "torch": str(torch.__version__)}
    runs = [
        {"method": r.method, "evaluated_on": r.evaluated_on, **(r.summary() if r.curve else {}), **asdict(r)}
        for r in results
    ]
    return json.dumps({**head, "runs": runs}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
