"""A run as TensorBoard scalars: the loss of every epoch, and what was measured after every task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """A listener (`plora_ext.cil.training.Progress`) that writes event files and hands everything on to another one.

    Steps are epochs of all tasks for `loss`, tasks for everything else. Use it as a context manager.

    Args:
        folder: Where the event files go, in a folder for each method.
        also: The listener that is told as well.
        anew: The run begins: TensorBoard hides what an earlier one has left in the folder.

    Raises:
        ImportError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path, also: Any, anew: bool = True):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard"
            ) from error
        self._create = SummaryWriter
        self._writer: Any = None
        self.folder, self.also, self.anew = folder, also, anew

    def __getattr__(self, name: str) -> Any:
        return getattr(self.also, name)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def begin(self, method: str, num_tasks: int) -> None:
        self.__exit__()
        self._writer = self._create(str(self.folder / method), purge_step=0 if self.anew else None)
        self.also.begin(method, num_tasks)

    def epoch(self, number: int, loss: float) -> None:
        self._writer.add_scalar("loss", loss, number)
        self.also.epoch(number, loss)

    def measured(self, task: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, task + 1)
        self._writer.flush()
        self.also.measured(task, figures)
