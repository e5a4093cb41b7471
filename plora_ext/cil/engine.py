"""The loop: for every task, learn it, then evaluate on all classes seen so far."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plora_ext.cil import metrics
from plora_ext.cil.features import FeatureCache
from plora_ext.cil.methods import METHODS, Method
from plora_ext.cil.settings import Settings, closest
from plora_ext.cil.stream import Task, TaskStream
from plora_ext.cil.training import Progress, Trainer
from plora_ext.data import Backbone, create_backbone, load_icon100, to_tensor

AT_ONCE = 4096  # images whose kept features are put together at a time
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass
class Images:
    """A labelled data set: uint8 images [N, H, W, 3] and int64 labels [N], as numpy arrays."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclass
class Result:
    """What a run measured; accuracies in percent, defined in plora_ext.cil.metrics.

    Attributes:
        settings: The resolved settings.
        classes_seen: Classes seen after each task, in order.
        class_order: The classes of the data set in the order they came.
        curve: A_b after each task.
        matrix: Row t: accuracy on the classes of tasks 0 ... t after task t (for joint, one row over all tasks).
        passes: Forward passes per prediction after the last task.
        seconds, peak_mb: Per phase: train, prototypes, align, eval.
        total_seconds: The whole run, without loading data and backbone.
        num_train, num_test: Images.
    """

    settings: dict[str, Any]
    classes_seen: list[int]
    class_order: list[int]
    curve: list[float]
    matrix: list[list[float]]
    passes: int
    seconds: dict[str, float]
    peak_mb: dict[str, float]
    total_seconds: float
    num_train: int
    num_test: int

    @property
    def method(self) -> str:
        return str(self.settings["method"])

    def summary(self) -> dict[str, float | None]:
        """The figures of a comparison: Ā, A_B, forgetting and BWT (None for joint, which has one step)."""
        return {
            "average_accuracy": metrics.average_accuracy(self.curve),
            "last_accuracy": metrics.last_accuracy(self.curve),
            "forgetting": metrics.forgetting(self.matrix),
            "backward_transfer": metrics.backward_transfer(self.matrix),
        }


def load_images(data: str) -> Images:
    """The data set that the setting `data` names.

    Raises:
        ValueError: An unknown name, or an .npz file without the four arrays or with arrays that do not fit together.
        OSError: The file cannot be read.
    """
    if data == "icon100":
        icons = load_icon100()
        return Images(icons.train_images, icons.train_labels, icons.test_images, icons.test_labels)
    if not data.endswith(".npz"):
        raise ValueError(f"unknown data {data!r}{closest(data, ['icon100', 'FILE.npz'])}")
    with np.load(Path(data), allow_pickle=False) as file:
        missing = [name for name in ARRAYS if name not in file]
        if missing:
            raise ValueError(f"{data} must hold {', '.join(ARRAYS)}; it lacks {', '.join(missing)}")
        images = Images(*(file[name] for name in ARRAYS))
    for split, pixels, labels in (
        ("train", images.train_images, images.train_labels),
        ("test", images.test_images, images.test_labels),
    ):
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"{split}_images must be uint8 [N, H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        if labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            wanted = f"integers of shape [{len(pixels)}], one an image"
            raise ValueError(f"{split}_labels must be {wanted}, got {labels.dtype} {list(labels.shape)}")
    return images


def make_stream(settings: Settings, data: Images) -> TaskStream:
    """The task stream that the settings ask for."""
    s = settings
    return TaskStream(data.train_labels, data.test_labels, s.init_cls, s.increment, s.seed, s.class_order, s.tasks)


def pick_device(device: str) -> torch.device:
    """The setting `device` as a torch device; "auto" is CUDA where there is a GPU and the CPU elsewhere.

    Raises:
        ValueError: A device that torch does not know or does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def make_cache(settings: Settings, trainer: Trainer) -> FeatureCache | None:
    """What the setting `feature_cache` asks for."""
    if settings.feature_cache == "none":
        return None
    folder = None if settings.feature_cache == "auto" else settings.feature_cache
    return FeatureCache(folder, device=trainer.device, say=trainer.progress.note)


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch: on a CPU, a run with the same settings then repeats bit for bit."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Evaluator:
    """Accuracy over all classes seen; `cache` keeps features of test images where old adapters stay as they are."""

    def __init__(
        self,
        method: Method,
        tasks: list[Task],
        images: Tensor,
        task_of_class: np.ndarray,
        cache: FeatureCache | None = None,
    ):
        self.method, self.tasks, self.images, self.task_of_class = method, tasks, images, task_of_class
        self.cache = cache

    def after(self, task: int) -> tuple[float, list[float]]:
        """A_b and the row of the task matrix after `task`."""
        seen = self.tasks[: task + 1]
        predicted = self._logits(torch.from_numpy(np.concatenate([t.test for t in seen]))).argmax(-1).cpu().numpy()
        labels = np.concatenate([t.test_labels for t in seen])
        correct = (predicted == labels).astype(np.float64)
        return 100.0 * float(correct.mean()), metrics.task_accuracies(correct, self.task_of_class[labels])

    def _logits(self, rows: Tensor) -> Tensor:
        method, cache = self.method, self.cache
        spaces = method.spaces() if cache else None
        if cache is None or spaces is None:
            return method.logits(method.features(self.images[rows]))
        # Part by part, for the features of all images under all adapters may be more than the device can hold.
        kept = (cache(self.images[part], spaces, method.features_in) for part in rows.split(AT_ONCE))
        return torch.cat([method.logits(features) for features in kept])


def run(
    settings: Settings,
    *,
    data: Images | None = None,
    backbone: Backbone | None = None,
    progress: Progress | None = None,
    make: Callable[[Trainer, Settings], Method] | None = None,
) -> Result:
    """Runs one method over the task stream; writes nothing.

    Args:
        settings: What to run.
        data: The data set, when it is loaded already.
        backbone: The backbone to use instead of the one that settings name; its model is changed in place.
        progress: Told of every step and task.
        make: Builds the method from (trainer, settings), instead of the one that settings name.

    Raises:
        ValueError: Settings, labels or layers that do not fit.
        FloatingPointError: A loss that is not finite.
    """
    device = pick_device(settings.device)
    data = data or load_images(settings.data)
    stream = make_stream(settings, data)
    seed_everything(settings.seed)
    backbone = backbone or create_backbone(settings.backbone, weights=settings.weights)
    trainer = Trainer(backbone.model.to(device).requires_grad_(False), settings, device, progress)
    method = (make or METHODS[settings.method])(trainer, settings)
    look = (backbone.image_size, backbone.mean, backbone.std, device)
    train, test = to_tensor(data.train_images, *look), to_tensor(data.test_images, *look)
    tasks = [stream.joined()] if settings.method == "joint" else stream.tasks
    evaluator = Evaluator(method, tasks, test, stream.task_of_class(), make_cache(settings, trainer))

    start, curve, matrix = time.perf_counter(), [], []
    trainer.progress.begin(settings.method, len(tasks))
    for task in tasks:
        labels = torch.from_numpy(task.train_labels - task.classes.start).to(device)
        method.learn(task, train[torch.from_numpy(task.train).to(device)], labels)
        with trainer.phases("eval"):
            accuracy, row = evaluator.after(task.index)
        curve.append(accuracy)
        matrix.append(row)
        trainer.progress.task(task.index, accuracy)
    return Result(
        settings=settings.as_dict(),
        classes_seen=[task.classes.stop for task in tasks],
        class_order=stream.class_order,
        curve=curve,
        matrix=matrix,
        passes=method.passes,
        seconds=trainer.phases.seconds,
        peak_mb=trainer.phases.peak_mb,
        total_seconds=time.perf_counter() - start,
        num_train=len(train),
        num_test=len(test),
    )
