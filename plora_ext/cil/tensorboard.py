"""A run as TensorBoard scalars: the loss of every epoch, and what was measured after every task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plora_ext.cil.training import Progress


class TensorBoard(Progress):
    """Writes event files to `folder`/METHOD and hands everything on to another listener. Use it as a context manager.

    Steps are epochs of all tasks for `loss`, tasks for everything else.

    Args:
        folder: Where the event files go.
        also: The listener that is told as well.
        anew: The run begins: TensorBoard hides what an earlier one has left in the folder.

    Raises:
        ImportError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path, also: Progress, anew: bool = True):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard"
            ) from error
        self._create, self._writer = SummaryWriter, None
        self.folder, self.also, self.anew = folder, also, anew

    _writer: Any

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def begin(self, method: str, num_tasks: int) -> None:
        self.__exit__()
        self._writer = self._create(str(self.folder / method), purge_step=0 if self.anew else None)
        self.also.begin(method, num_tasks)

    def fit(self, task: int, images: int) -> None:
        self.also.fit(task, images)

    def read(self, images: int) -> None:
        self.also.read(images)

    def step(self, images: int) -> None:
        self.also.step(images)

    def epoch(self, number: int, loss: float) -> None:
        self._writer.add_scalar("loss", loss, number)
        self.also.epoch(number, loss)

    def task(self, task: int, accuracy: float) -> None:
        self.also.task(task, accuracy)

    def measured(self, task: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, task + 1)
        self._writer.flush()
        self.also.measured(task, figures)

    def note(self, line: str) -> None:
        self.also.note(line)
