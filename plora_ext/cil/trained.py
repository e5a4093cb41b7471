"""A method brought back from a run's checkpoint: evaluation and prediction."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import plora_ext
from plora_ext.cil.checkpoint import MANIFEST, Checkpoint, data_digests, refuse_other, weights_digest, write_whole
from plora_ext.cil.distributed import SINGLE, World
from plora_ext.cil.engine import (
    Evaluator,
    load_backbone,
    load_data,
    make_stream,
    pick_device,
    prepare,
    seeded,
)
from plora_ext.cil.methods import METHODS
from plora_ext.cil.settings import Settings
from plora_ext.cil.training import Trainer
from plora_ext.data import ImageFiles, View

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Trained:
    """The method of a run as it was after the last task learned.

    Args:
        run: The run's folder, which holds its checkpoint.
        world: The processes that share the work.
        elsewhere: Settings that say where things are: device, workers, data_root.

    Raises:
        FileNotFoundError: There is no checkpoint, or none of a learned task.
        ValueError: The checkpoint is damaged, or the backbone's weights are others.
    """

    def __init__(self, run: str | Path, world: World = SINGLE, **elsewhere: Any):
        checkpoint = Checkpoint(Path(run), resume=True, world=world)
        if not checkpoint.manifest or not checkpoint.manifest["run"]["curve"]:
            raise FileNotFoundError(
                f"{checkpoint.folder / MANIFEST} holds no learned task: RUN must be a folder of `plora-ext train`"
            )
        self.settings = Settings(**{**checkpoint.settings, "cache_images": False, **elsewhere})  # each is read once
        self.fingerprint = checkpoint.manifest["fingerprint"]
        device = world.place(pick_device(self.settings.device))
        self._device = device
        with seeded(self.settings, device):
            backbone = load_backbone(self.settings)
            refuse_other(
                self.fingerprint,
                {**self.fingerprint, "backbone": weights_digest(backbone.model)},
                f"{checkpoint.folder} is the checkpoint",
            )
            trainer = Trainer(backbone.model.to(device).requires_grad_(False), self.settings, device, world=world)
            saved = checkpoint.load()
            self.run: dict[str, Any] = saved["run"]
            self.method = METHODS[self.settings.method](trainer, self.settings)
            self.method.restore(saved["state"])
            by, ours = checkpoint.manifest["plora_ext"], plora_ext.__version__
            if by != ours and world.first:
                trainer.progress.note(f"{checkpoint.folder} was written by plora_ext {by}, this is {ours}")
            self.look = prepare(self.settings, backbone, device, world)

    def evaluate(self) -> dict[str, Any]:
        """Accuracy over all classes seen and on each task, on the run's own test images.

        Raises:
            ValueError: They are not the images of the run.
        """
        data, learned = load_data(self.settings), len(self.run["curve"])
        stream = make_stream(self.settings, data)
        tasks = [stream.joined()] if self.settings.method == "joint" else stream.tasks
        here = {**self.fingerprint, **data_digests(data, tasks)}
        refuse_other(self.fingerprint, here, f"{self.settings.data} is the data", learned)
        evaluator = Evaluator(self.method, tasks, View(data.test_images, self.look), stream.task_of_class())
        last = learned - 1
        with seeded(self.settings, self._device):
            accuracy, row = evaluator.after(last)
        return {
            "tasks_learned": last + 1,
            "tasks": len(tasks),
            "classes_seen": tasks[last].classes.stop,
            "accuracy": accuracy,
            "task_accuracies": row,
        }

    def predict(self, images: np.ndarray | ImageFiles) -> list[dict[str, Any]]:
        """For each image its class among those seen: `class` (its label in the data set), `name`, and the `score`.

        The score is the head's own: a scaled cosine, a log-likelihood, or a regression value; it orders the classes of
        one image.
        """
        with seeded(self.settings, self._device):
            best = self.method.world.spread(self._best, View(images, self.look))
        order, names = self.run["class_order"], self.run["class_names"]
        return [
            {"class": order[int(c)], "name": names[int(c)] if names else str(order[int(c)]), "score": score}
            for score, c in best.tolist()
        ]

    def _best(self, view: View) -> Tensor:
        """float64 [n, 2]: the best score of each image and its class."""
        parts = [self.method.predict(view[rows]).max(1) for rows in torch.arange(len(view)).split(4096)]
        return torch.cat([torch.stack([best.values.double(), best.indices.double()], 1) for best in parts])


def image_paths(given: Sequence[str | Path]) -> list[Path]:
    """The image files among `given`: files as they are, folders searched, sorted by name.

    Raises:
        FileNotFoundError: A path that does not exist, or no image at all.
    """
    paths: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            paths += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            paths.append(path)
        else:
            raise FileNotFoundError(f"{path} is no file and no folder")
    if not paths:
        raise FileNotFoundError(f"no image ({' '.join(IMAGE_SUFFIXES)}) in {', '.join(map(str, given))}")
    return paths


def write_predictions(out: Path, paths: Sequence[Path], predictions: Sequence[dict[str, Any]]) -> None:
    """Writes a row for each image, as JSON or CSV by the suffix of `out`; the file appears whole or not at all."""
    rows = [{"image": str(path), **prediction} for path, prediction in zip(paths, predictions)]
    if out.suffix == ".json":
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    elif out.suffix == ".csv":
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    else:
        raise ValueError(f"out must end in .csv or .json, got {str(out)!r}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text.encode("utf-8"))
