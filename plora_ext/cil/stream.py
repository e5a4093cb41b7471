"""Splits a labelled data set into the tasks of class-incremental learning.

Only labels and indices pass through here: images stay where they are, and a task says which of them are its own.
Inside a stream a class is known by its position in the class order, so the classes of a task are a range and the
classes seen so far are the first ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from plora_ext.data.images import some


@dataclass(frozen=True)
class Task:
    """One task: its classes (positions in the class order) and the images of it, as indices with labels.

    Attributes:
        index: 0 for the first task.
        classes: Positions `range(start, stop)` of its classes in the class order.
        train, test: int64 indices of its images in the training and the test set.
        train_labels, test_labels: int64 labels of those images, as positions in the class order.
    """

    index: int
    classes: range
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


class TaskStream:
    """The tasks of "B-m Inc-n": `init_cls` classes first (0 = as many as later), then `increment` at a time.

    The class order is `numpy.random.RandomState(seed).permutation(num_classes)`, as in PILOT and its descendants
    (seed 1993 with 100 classes begins 68, 56, 78, 8, 23, 84). The last task takes what is left, be it less.

    Args:
        train_labels, test_labels: Labels 0 ... num_classes - 1, one per image.
        init_cls: Classes of the first task; 0 stands for `increment`.
        increment: Classes of every later task.
        seed: Seed of the class order.
        class_order: "shuffled" (also None), "sorted" for the order of the labels, or a permutation of the classes.
        tasks: The classes of every task, spelled out; overrides all of the above.
        num_classes: Number of classes; by default the largest training label + 1.

    Raises:
        ValueError: A label out of range, a class without training images, a task without test
            images, a class order that is no permutation,
            tasks that miss or repeat a class, or sizes below their minimum.
    """

    def __init__(
        self,
        train_labels: Sequence[int] | np.ndarray,
        test_labels: Sequence[int] | np.ndarray,
        init_cls: int = 0,
        increment: int = 10,
        seed: int = 1993,
        class_order: Sequence[int] | str | None = "shuffled",
        tasks: Sequence[Sequence[int]] | None = None,
        num_classes: int | None = None,
    ):
        train, test = (_integers(*given) for given in (("train_labels", train_labels), ("test_labels", test_labels)))
        if train.size == 0:
            raise ValueError("train_labels must hold at least one label, got none")
        self.num_classes = int(train.max()) + 1 if num_classes is None else num_classes
        _check_labels(train, test, self.num_classes)
        if tasks is None:
            order = _class_order(class_order, self.num_classes, seed)
            tasks = _split(order, init_cls, increment)
        else:
            if len(tasks) > self.num_classes:
                raise ValueError(f"tasks names {len(tasks)} tasks, but the data has {self.num_classes} classes")
            _check_cover([c for task in tasks for c in task], self.num_classes, "tasks")
            if not all(len(task) for task in tasks):
                raise ValueError("tasks must hold at least one class each, got an empty task")
        self.class_order: list[int] = [int(c) for task in tasks for c in task]

        position = np.empty(self.num_classes, dtype=np.int64)
        position[self.class_order] = np.arange(self.num_classes)
        train, test = position[train], position[test]
        bounds = np.cumsum([0, *(len(task) for task in tasks)]).tolist()
        self.tasks = [_task(t, range(a, b), train, test) for t, (a, b) in enumerate(pairwise(bounds))]
        for task in self.tasks:
            if task.test.size == 0:
                raise ValueError(
                    f"every task needs a test image, got none for task {task.index}: add one or, with `validation`, "
                    "which takes them from classes of two training images and more, raise it or make tasks larger"
                )
        self._all = _task(0, range(self.num_classes), train, test)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def joined(self) -> Task:
        """All classes as a single task: what joint training sees."""
        return self._all

    def task_of_class(self) -> np.ndarray:
        """The task of every class, by its position in the class order; int64 [num_classes]."""
        return np.repeat(np.arange(len(self)), [len(task.classes) for task in self.tasks])


def _task(index: int, classes: range, train: np.ndarray, test: np.ndarray) -> Task:
    rows = [np.flatnonzero((labels >= classes.start) & (labels < classes.stop)) for labels in (train, test)]
    return Task(index, classes, rows[0], train[rows[0]], rows[1], test[rows[1]])


def _split(order: Sequence[int], init_cls: int, increment: int) -> list[list[int]]:
    if increment < 1 or init_cls < 0:
        raise ValueError(f"increment must be at least 1 and init_cls at least 0, got {increment} and {init_cls}")
    first = init_cls or increment
    starts = [0, *range(first, len(order), increment)]
    return [list(order[a:b]) for a, b in zip(starts, [*starts[1:], len(order)])]


def _class_order(class_order: Sequence[int] | str | None, num_classes: int, seed: int) -> list[int]:
    if class_order is None or isinstance(class_order, str):
        if class_order not in (None, "shuffled", "sorted"):
            raise ValueError(f'class_order must be a list of classes, "shuffled" or "sorted", got {class_order!r}')
        shuffled = np.random.RandomState(seed).permutation(num_classes).tolist()
        return list(range(num_classes)) if class_order == "sorted" else shuffled
    _check_cover(class_order, num_classes, "class_order")
    return list(class_order)


def _check_cover(classes: Sequence[int], num_classes: int, name: str) -> None:
    times, known = Counter(classes), set(range(num_classes))
    faults = {
        "unknown": sorted(times.keys() - known),
        "missing": sorted(known - times.keys()),
        "repeated": sorted(c for c, n in times.items() if n > 1),
    }
    if any(faults.values()):
        said = "; ".join(f"{fault}: {some(which)}" for fault, which in faults.items() if which)
        raise ValueError(f"{name} must name each of the {num_classes} classes exactly once; {said}")


def _integers(name: str, labels: Sequence[int] | np.ndarray) -> np.ndarray:
    given = np.asarray(labels)
    if given.size and not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {given.dtype}")
    return given.astype(np.int64)


def _check_labels(train: np.ndarray, test: np.ndarray, num_classes: int) -> None:
    for name, labels in (("train_labels", train), ("test_labels", test)):
        if unknown := np.unique(labels[(labels < 0) | (labels >= num_classes)]).tolist():
            raise ValueError(f"{name} must lie in 0 ... {num_classes - 1}, got unknown class {some(unknown)}")
    if empty := np.setdiff1d(np.arange(num_classes), train).tolist():
        raise ValueError(
            f"every class needs a training image, got none for class {some(empty)}: train_labels must be "
            f"0 ... {num_classes - 1} without gaps, found {some(np.unique(train).tolist())}"
        )
