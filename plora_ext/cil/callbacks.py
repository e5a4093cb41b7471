"""Those that a run tells of its progress."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any


class Callback:
    """Told of a run's progress; one derives from it and writes the methods that it wants to hear of.

    The terminal, TensorBoard and Weights & Biases are such (plora_ext.report). Under many processes only those given
    in a process are told there.
    """

    def begin(self, method: str, num_tasks: int | None) -> None:
        """A method starts; the number of tasks is None where nobody knows it."""

    def fit(self, task: int, images: int) -> None:
        """Training on a task starts and will take so many images."""

    def read(self, images: int) -> None:
        """Reading the features of so many images starts."""

    def step(self, images: int) -> None:
        """So many of them are done."""

    def steps(self, first: int, losses: Sequence[float], rates: Sequence[float]) -> None:
        """Loss and learning rate of every step of an epoch, when it is done; `first` counts over all tasks from 1."""

    def epoch(self, number: int, loss: float) -> None:
        """An epoch of training is done, counted over all tasks from 1; `loss` is the mean over its steps."""

    def task(self, task: int, accuracy: float) -> None:
        """A task is learned; accuracy is over all classes seen, in percent."""

    def measured(self, task: int, figures: Mapping[str, float]) -> None:
        """What was measured after a task, by name: accuracies in percent, seconds, MiB, drift."""

    def note(self, line: str) -> None:
        """Something that the user should know; printed to stderr where no callback writes this method."""


class Callbacks:
    """A list of callbacks, told of everything in their order.

    Raises:
        TypeError: One is no `Callback`.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self.callbacks = tuple(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks must derive from plora_ext.cil.Callback, got {type(callback).__name__}")

    def tell(self, event: str, *what: Any) -> None:
        """Calls the method `event` of all."""
        for callback in self.callbacks:
            getattr(callback, event)(*what)

    def note(self, line: str) -> None:
        """Tells of something that the user should know."""
        if all(type(callback).note is Callback.note for callback in self.callbacks):
            print(line, file=sys.stderr)
        self.tell("note", line)
