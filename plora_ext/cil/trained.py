"""A method brought back from a run's checkpoint: evaluation and prediction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import plora_ext
from plora_ext.cil.build import load_data, make_stream, tasks_of
from plora_ext.cil.checkpoint import MANIFEST, Checkpoint
from plora_ext.cil.distributed import SINGLE, World
from plora_ext.cil.evaluate import Evaluator
from plora_ext.cil.files import to_csv, write_whole
from plora_ext.cil.learner import Learner
from plora_ext.cil.metrics import evaluated_on
from plora_ext.cil.same_run import data_digests, refuse_other
from plora_ext.cil.settings import Settings
from plora_ext.data import ImageFiles, View


class Trained:
    """The method of a run as it was after the last task learned; `learner` predicts, is saved, and goes on from there.

    Args:
        run: The run's folder, which holds its checkpoint.
        world: The processes that share the work.
        elsewhere: Settings that say where things are: device, workers, data, data_root, weights.

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
        self.learner = Learner(self.settings, world=world, num_tasks=checkpoint.manifest["run"]["tasks"])
        refuse_other(
            self.fingerprint,
            {**self.fingerprint, "backbone": self.learner.backbone_digest},
            f"{checkpoint.folder} is the checkpoint",
        )
        saved = checkpoint.load()
        self.run: dict[str, Any] = saved["run"]
        self.method = self.learner.method
        with self.learner.random():
            self.method.restore(saved["state"])
        self.learner.random.state = saved["state"]["rng"]
        seen = self.run["classes_seen"][: len(self.run["curve"])]
        for start, stop in pairwise([0, *(seen[-1:] if self.settings.method == "joint" else seen)]):
            self.learner.add_task(self.run["class_order"][start:stop])
        by, ours = checkpoint.manifest["plora_ext"], plora_ext.__version__
        if by != ours and world.first:
            self.learner.trainer.callbacks.note(f"{checkpoint.folder} was written by plora_ext {by}, this is {ours}")

    def evaluate(self) -> dict[str, Any]:
        """Accuracy over all classes seen and on each task, on the run's own test images, or those that it held out.

        Raises:
            ValueError: They are not the images of the run.
        """
        try:
            data, learned = load_data(self.settings), len(self.learner.task_sizes)
        except (ValueError, OSError) as error:
            raise type(error)(f"the run's data cannot be read; --data says where they are now: {error}") from error
        stream = make_stream(self.settings, data)
        tasks = tasks_of(self.settings, stream)
        here = {**self.fingerprint, **data_digests(data, tasks), "training": None}  # test images have to be the same
        refuse_other(self.fingerprint, here, f"{self.settings.data} is the data", learned)
        last = learned - 1
        with self.learner.random():
            images = View(data.test_images, self.learner.preparation)
            curve, row = Evaluator(self.method, tasks, images, stream.task_of_class()).after(last)
        return {
            "tasks_learned": last + 1,
            "tasks": len(tasks),
            "classes_seen": tasks[last].classes.stop,
            "evaluated_on": evaluated_on(self.settings.validation),
            "accuracy": curve[-1],
            "task_accuracies": row,
        }

    def predict(self, images: np.ndarray | ImageFiles, top: int = 1) -> list[dict[str, Any]]:
        """A row for each of the `top` likeliest classes of each image, among all classes seen.

        `class` is its label in the data set, `name` its name, `task` the one that brought it, from 1; `probability` and
        `score` are those of `plora_ext.cil.Learner.best`. With `top` above 1 there is a `rank`, too.
        """
        order, names = self.run["class_order"], self.run.get("class_names")
        task = np.repeat(np.arange(len(self.learner.task_sizes)), self.learner.task_sizes) + 1
        return [
            {
                **({"rank": rank} if top > 1 else {}),
                "class": order[int(c)],
                "name": names[int(c)] if names else str(order[int(c)]),
                "task": int(task[int(c)]),
                "probability": round(probability, 6),
                "score": score,
            }
            for best in self.learner.best(images, top).tolist()
            for rank, (c, score, probability) in enumerate(best, 1)
        ]


def write_predictions(out: Path, paths: Sequence[Path], predictions: Sequence[dict[str, Any]]) -> None:
    """Writes the rows of `Trained.predict`, as many for each image, each with its path, as JSON or CSV by the suffix.

    The file appears whole or not at all.
    """
    each = len(predictions) // len(paths)
    rows = [{"image": str(paths[i // each]), **prediction} for i, prediction in enumerate(predictions)]
    text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n" if out.suffix == ".json" else to_csv(rows)
    # A path that is not UTF-8: in JSON as json.loads gives it back, in CSV its bytes.
    write_whole(out, text.encode("utf-8", "backslashreplace" if out.suffix == ".json" else "surrogateescape"))
