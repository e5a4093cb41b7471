"""A run as scalars of TensorBoard or Weights & Biases: the loss of every epoch, what was measured after every task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plora_ext.cil.callbacks import Callback


class _Tracker(Callback):
    """A callback that is used as a context manager, at whose end it closes what it has opened."""

    _open: Any = None

    def close(self) -> None:
        """Ends what `begin` has opened."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open is not None:
            self.close()
            self._open = None


class TensorBoard(_Tracker):
    """Event files; steps are epochs of all tasks for `loss`, tasks for everything else.

    Args:
        folder: Where they go, in a folder for each method.
        anew: The run begins: TensorBoard hides what an earlier one has left in the folder.

    Raises:
        ImportError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path, anew: bool = True):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard"
            ) from error
        self._create, self.folder, self.anew = SummaryWriter, folder, anew

    def close(self) -> None:
        self._open.close()

    def begin(self, method: str, num_tasks: int | None) -> None:
        self.__exit__()
        self._open = self._create(str(self.folder / method), purge_step=0 if self.anew else None)

    def epoch(self, number: int, loss: float) -> None:
        self._open.add_scalar("loss", loss, number)

    def measured(self, task: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._open.add_scalar(name, value, task + 1)
        self._open.flush()


class WandB(_Tracker):
    """A run of Weights & Biases for each method; `epoch` and `task` are logged beside what they are the steps of.

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
        self._init, self.keywords = wandb.init, {"project": project, **keywords}

    def close(self) -> None:
        self._open.finish()

    def begin(self, method: str, num_tasks: int | None) -> None:
        self.__exit__()
        self._open = self._init(**{"name": method, **self.keywords})

    def epoch(self, number: int, loss: float) -> None:
        self._open.log({"loss": loss, "epoch": number})

    def measured(self, task: int, figures: Mapping[str, float]) -> None:
        self._open.log({**figures, "task": task + 1})
