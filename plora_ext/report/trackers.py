"""A run as scalars of TensorBoard or Weights & Biases: losses, learning rate, what was measured after every task.

Each is used as a context manager, at whose end it closes what it has opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from plora_ext.cil.callbacks import Callback
from plora_ext.cil.settings import Settings


class TensorBoard(Callback, ExitStack):
    """Event files; steps are steps of training for `step/...`, epochs of all tasks for `loss`, tasks for all else.

    Args:
        folder: Where they go.
        anew: The run begins: TensorBoard hides what an earlier one has left in the folder.
        settings: Of the run, to be shown as a text.
        several: More methods than one will follow: each in a folder of its own.

    Raises:
        ImportError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path, anew: bool = True, settings: Settings | None = None, several: bool = False):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard"
            ) from error
        super().__init__()
        self._create, self.folder, self.anew = SummaryWriter, folder, anew
        self.settings, self.several = settings, several

    def begin(self, method: str, num_tasks: int | None) -> None:
        self.close()  # the method before
        folder = self.folder / method if self.several else self.folder
        self._open: Any = self.enter_context(self._create(str(folder), purge_step=0 if self.anew else None))
        if self.settings:
            lines = replace(self.settings, method=method).to_yaml().splitlines()  # type: ignore[arg-type]
            self._open.add_text("settings", "\n".join(f"    {line}" for line in lines))

    def steps(self, first: int, losses: Sequence[float], rates: Sequence[float]) -> None:
        for step, values in enumerate(zip(losses, rates), first):
            for name, value in zip(("loss", "lr"), values):
                self._open.add_scalar(f"step/{name}", value, step)

    def epoch(self, number: int, loss: float) -> None:
        self._open.add_scalar("loss", loss, number)

    def measured(self, task: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._open.add_scalar(name, value, task + 1)
        self._open.flush()


class WandB(Callback, ExitStack):
    """A run of Weights & Biases for each method; `step`, `epoch` and `task` are logged beside what they count.

    Args:
        project: Of the runs.
        **keywords: More of `wandb.init`: config, name, mode, ...

    Raises:
        ImportError: The package wandb is not installed.
    """

    def __init__(self, project: str = "plora_ext", **keywords: Any):
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"WandB needs the package wandb ({error}): pip install wandb") from error
        super().__init__()
        self._init, self.keywords = wandb.init, {"project": project, **keywords}

    def begin(self, method: str, num_tasks: int | None) -> None:
        self.close()  # the method before
        self._open: Any = self._init(**{"name": method, **self.keywords})
        self.callback(self._open.finish)

    def steps(self, first: int, losses: Sequence[float], rates: Sequence[float]) -> None:
        for step, (loss, rate) in enumerate(zip(losses, rates), first):
            self._open.log({"step/loss": loss, "step/lr": rate, "step": step})

    def epoch(self, number: int, loss: float) -> None:
        self._open.log({"loss": loss, "epoch": number})

    def measured(self, task: int, figures: Mapping[str, float]) -> None:
        self._open.log({**figures, "task": task + 1})
