"""The time of a run, part by part: what `plora-ext bench run` prints."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plora_ext.cil.build import load_data, make_cache, make_stream, tasks_of
from plora_ext.cil.callbacks import Callback
from plora_ext.cil.evaluate import Evaluator
from plora_ext.cil.learner import Learner
from plora_ext.cil.phases import Phases
from plora_ext.cil.settings import Settings
from plora_ext.cil.stream import Task
from plora_ext.data import View
from plora_ext.info import environment

EPOCHS = 3  # of which the first starts workers, decodes and captures


class Resident:
    """What a view of images gives, but the same random batch again and again, which is on the device."""

    def __init__(self, n: int, size: int, device: torch.device):
        self.n, self.batch = n, torch.empty(0)
        self.size, self.device = size, device

    def __len__(self) -> int:
        return self.n

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order."""
        if len(self.batch) != batch_size:
            self.batch = torch.randn(batch_size, 3, self.size, self.size, device=self.device)
        for first in range(0, self.n, batch_size):
            yield self.batch[: self.n - first]

    def __getitem__(self, rows: Tensor) -> Resident:
        part = Resident(len(rows), self.size, self.device)
        part.batch = self.batch
        return part

    def epoch(self, order: Tensor, batch_size: int, _: Any = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, batch) of a pass for training."""
        return zip(order.split(batch_size), self.split(batch_size))


class Clock(Callback):
    """When each fit began and its epochs ended, at which the host waits for the device."""

    def __init__(self) -> None:
        self.fits: list[list[float]] = []

    def fit(self, task: int, images: int) -> None:
        self.fits.append([time.perf_counter()])

    def epoch(self, number: int, loss: float) -> None:
        self.fits[-1].append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each epoch of the last fit."""
        return np.diff(self.fits[-1]).tolist() if self.fits else []


def time_run(settings: Settings, seconds: float = 2.0, tell: Callable[[str], None] = lambda line: None) -> Any:
    """Images a second of the parts of a run, and the seconds of its phases, on as many images as a part has time for.

    Args:
        settings: The run's.
        seconds: Of an epoch on one batch again and again, uncaptured; the first epoch of three counts only as such.
        tell: Called with the lines of a Markdown table of the parts as they are found.

    Returns:
        `images_per_second`: by part. `phases`: seconds of each over the same share of the first two tasks, training
        carried on to all epochs. `cuda_graphs`: what the run says of them. `images`: of the first task, and
        how many it has. `classes`: of each task.

    Raises:
        ValueError, OSError, torch.OutOfMemoryError: as the run itself.
    """
    if not 0 < seconds <= 600:
        raise ValueError(f"seconds must be above 0 and at most 600, got {seconds}")
    data = load_data(settings)
    stream = make_stream(settings, data)
    tasks = tasks_of(settings, stream)
    rates: dict[str, float] = {}

    def found(part: str, images: int, seconds: float) -> None:
        if not rates:
            tell("| part | images/s |\n|---|---:|")
        rates[part] = images / seconds
        tell(f"| {part} | {rates[part]:,.0f} |")

    def learner(**changes: Any) -> tuple[Learner, Clock]:
        clock = Clock()
        return Learner(settings, callbacks=[clock], num_tasks=len(tasks), **{"epochs": EPOCHS, **changes}), clock

    def on_one_batch(task: Task, **changes: Any) -> list[float]:
        made, clock = learner(**changes)
        resident: Any = Resident(len(task.train), made.preparation.image_size, made.trainer.device)
        with made.random():
            made.learn(task, resident, task.classes)
        del made
        gc.collect()  # one model and graph at a time
        return clock.seconds

    whole, batch = len(tasks[0].train), settings.batch_size
    few = _thinned(tasks[0], 2 * batch)
    probe = on_one_batch(few, graphs="off", epochs=2)
    steps = int(math.ceil(len(few.train) / batch) * seconds / probe[-1]) if probe else 16  # nothing is trained
    some = parts(tasks, batch * max(4, steps))
    n = len(some[0].train)

    made, clock = learner()
    trainer, look = made.trainer, made.preparation
    cuda = trainer.device.type == "cuda"
    if probe:
        found("step on one batch, eager", 2 * n, sum(on_one_batch(some[0], graphs="off")[1:]))
        if cuda and settings.graphs == "auto":
            found("step on one batch, captured", 2 * n, sum(on_one_batch(some[0])[1:]))

    train, test = View(data.train_images, look), View(data.test_images, look)
    evaluator = Evaluator(made.method, some, test, stream.task_of_class(), make_cache(settings, trainer))
    later = 0.0
    with made.random():
        for task in some:
            fits = len(clock.fits)
            made.learn(task, train, task.classes)
            if len(clock.fits) > fits:
                later += sum(clock.seconds[1:]) / (EPOCHS - 1)
            with trainer.phases("eval"):
                evaluator.after(task.index)
            if task.index == 0 and clock.fits:
                found("loop, first epoch", n, clock.seconds[0])
                found("loop, later", 2 * n, sum(clock.seconds[1:]))
        phases = dict(trainer.phases.seconds)
        if "train" in phases:
            phases["train"] += (settings.epochs - EPOCHS) * later

        def passed(call: Callable[[], Any]) -> float:
            laps = Phases(trainer.device)
            for name in ("first", "second"):
                with laps(name):
                    call()
            return laps.seconds["second"]

        rows = torch.from_numpy(some[0].train)
        own, same = train[rows], Resident(n, look.image_size, trainer.device)
        if probe:
            found("data alone", n, passed(lambda: [None for _ in own.epoch(torch.randperm(n), batch)]))
        for part, images in (("evaluation, one batch", same), ("evaluation", own)):
            found(part, n, passed(partial(made.method.features, images)))  # type: ignore[arg-type]
    return {
        "settings": settings.as_dict(),
        "environment": environment(trainer.device),
        "images": [n, whole],
        "classes": [len(task.classes) for task in some],
        "images_per_second": rates,
        "phases": phases,
        "cuda_graphs": trainer.speed.graphs,
    }


def parts(tasks: Sequence[Task], number: int) -> list[Task]:
    """The first two tasks with the same share of their images, at most `number` of each, but one a class."""
    share = min(1.0, number / max(len(task.train) for task in tasks[:2]))
    return [_thinned(task, round(share * len(task.train))) for task in tasks[:2]]


def _thinned(task: Task, n: int) -> Task:
    """A task of n of its training images, at least one a class, and as large a part of its test images."""

    def chosen(labels: np.ndarray, number: int) -> np.ndarray:
        first = np.unique(labels, return_index=True)[1]
        rest = np.setdiff1d(np.arange(len(labels)), first)
        more = np.linspace(0, len(rest) - 1, min(max(number - len(first), 0), len(rest))).astype(int)
        return np.sort(np.concatenate([first, rest[more]]))

    train = chosen(task.train_labels, n)
    test = chosen(task.test_labels, round(len(task.test) * len(train) / len(task.train)))
    return replace(
        task, train=task.train[train], train_labels=task.train_labels[train], test=task.test[test],
        test_labels=task.test_labels[test],
    )  # fmt: skip


def shares(figures: dict[str, Any]) -> str:
    """The phases of `time_run` as a Markdown table."""
    phases, (n, whole) = figures["phases"], figures["images"]
    total, tasks, epochs = sum(phases.values()), len(figures["classes"]), figures["settings"]["epochs"]
    rows = [
        f"| phase ({tasks} task{'s' * (tasks > 1)}, {n} of {whole} images, {epochs} epochs) | seconds | share |",
        "|---|---:|---:|",
    ]
    rows += [f"| {name} | {spent:.2f} | {spent / total:.0%} |" for name, spent in phases.items()]
    return "\n".join([*rows, *(f"CUDA graph of {what}: {said}" for what, said in figures["cuda_graphs"].items())])
