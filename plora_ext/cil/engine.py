"""The loop: for every task, learn it, then evaluate on all classes seen so far."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plora_ext.cil import drift, metrics
from plora_ext.cil.checkpoint import Checkpoint, fingerprint_of, rng_state, set_rng_state
from plora_ext.cil.distributed import SINGLE, World
from plora_ext.cil.features import FeatureCache
from plora_ext.cil.frozen import check_backbone
from plora_ext.cil.methods import METHODS, Method
from plora_ext.cil.settings import Settings
from plora_ext.cil.stream import Task, TaskStream
from plora_ext.cil.training import Progress, Trainer
from plora_ext.data import Backbone, Images, Preparation, View, create_backbone, load_images
from plora_ext.data.sets import checked
from plora_ext.data.view import SHARE
from plora_ext.info import environment

AT_ONCE = 4096  # images whose kept features are put together at a time
FEATURES = 2**18  # images whose features are computed before they are classified
LOGITS = 2**22  # at a time: 16 MiB, and a few times that in between


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
        costs: `seconds` and `peak_mb` of each phase, task by task.
        drift: Of the prototypes, task by task (plora_ext.cil.drift); None where there is none, empty if not measured.
        environment: Versions and the device's name; as `changed`, what was changed when the run was continued.
        inputs: Digests of the data and of the backbone's weights; `data` and `backbone`, where `run` was given others
            than the settings name, say so.
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
    costs: list[dict[str, dict[str, float]]] = field(default_factory=list)
    drift: list[dict[str, float] | None] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return str(self.settings["method"])

    def summary(self) -> dict[str, float | None]:
        """The figures of a comparison: Ā, A_B, forgetting and BWT (None for joint but A_B: it has one step)."""
        return {
            # its accuracy over all classes beside means that hold easy early tasks would say that these are ahead
            "average_accuracy": None if self.method == "joint" else metrics.average_accuracy(self.curve),
            "last_accuracy": metrics.last_accuracy(self.curve),
            "forgetting": metrics.forgetting(self.matrix),
            "backward_transfer": metrics.backward_transfer(self.matrix),
        }


def load_data(settings: Settings) -> Images:
    """The data set that the settings name; raises what `plora_ext.data.load_images` does."""
    s = settings
    return replace(load_images(s.data, s.data_root, download=s.download, corrupt=s.corrupt), source=s.data)


def load_backbone(settings: Settings) -> Backbone:
    """The backbone that the settings name; raises what `plora_ext.data.create_backbone` does."""
    s = settings
    weights = None if s.weights == "random" else s.weights
    return create_backbone(s.backbone, s.weights != "random", weights=weights, image_size=s.image_size)


def prepare(settings: Settings, backbone: Backbone, device: torch.device, world: World = SINGLE) -> Preparation:
    """How images become the backbone's input under the settings."""
    s, cores = settings, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mean, std = (backbone.mean, backbone.std) if s.normalize == "backbone" else ([0.0] * 3, [1.0] * 3)
    workers = min(8, max(cores // world.local_size, 1)) if s.workers is None else s.workers
    on_device, cache = s.transform_on == "device", SHARE / world.local_size if s.cache_images else 0.0
    return Preparation(backbone.image_size, mean, std, device, s.transform, s.augment, workers, on_device, cache)


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
        if (kind := torch.device(device).type) not in ("cpu", "cuda"):
            raise RuntimeError(f"it must be auto, cpu or cuda, not {kind}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0][:200]}") from error
    return torch.device(device)


def make_cache(settings: Settings, trainer: Trainer) -> FeatureCache | None:
    """What the setting `feature_cache` asks for."""
    if settings.feature_cache == "none":
        return None
    folder = None if settings.feature_cache == "auto" else settings.feature_cache
    return FeatureCache(folder, device=trainer.device, say=trainer.progress.note)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds the global generators of Python, numpy and torch.

    Args:
        seed: Of all of them.
        deterministic: From here on, in the whole process, torch takes algorithms that repeat, also on a GPU, and raises
            a RuntimeError that names an operation which has none.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)


@contextmanager
def seeded(settings: Settings, device: torch.device) -> Iterator[None]:
    """`seed_everything` as the settings say; afterwards generators and the switch are as they were before."""
    if device.type == "cuda":
        torch.cuda.init()  # else its generators have no state yet
    state, deterministic = rng_state(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        seed_everything(settings.seed, settings.deterministic)
        yield
    finally:
        set_rng_state(state)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


class Evaluator:
    """Accuracy over all classes seen; `cache` keeps features of test images where old adapters stay as they are."""

    def __init__(
        self,
        method: Method,
        tasks: list[Task],
        images: View,
        task_of_class: np.ndarray,
        cache: FeatureCache | None = None,
    ):
        self.method, self.tasks, self.images, self.task_of_class = method, tasks, images, task_of_class
        self.cache = cache

    def after(self, task: int) -> tuple[float, list[float]]:
        """A_b and the row of the task matrix after `task`."""
        seen = self.tasks[: task + 1]
        # A process has the same images after every task, for more come behind: it finds their kept features.
        rows, classes = torch.from_numpy(np.concatenate([t.test for t in seen])), seen[-1].classes.stop
        predicted = self.method.world.spread(lambda own: self._predicted(own, classes), rows).cpu().numpy()
        labels = np.concatenate([t.test_labels for t in seen])
        correct = (predicted == labels).astype(np.float64)
        return 100.0 * float(correct.mean()), metrics.task_accuracies(correct, self.task_of_class[labels])

    def _predicted(self, rows: Tensor, classes: int) -> Tensor:
        """Part by part: neither all features nor the logits of all images for all classes need fit into memory."""
        method, cache = self.method, self.cache
        spaces = method.spaces() if cache else None
        if cache is None or spaces is None:
            at_once = max(1, LOGITS // classes)
            parts = (f for part in rows.split(FEATURES) for f in method.features(self.images[part]).split(at_once))
        else:  # features under all adapters
            parts = (cache(self.images[part], spaces, method.features_in) for part in rows.split(AT_ONCE))
        return torch.cat([method.logits(features).argmax(-1) for features in parts])


def run(
    settings: Settings,
    *,
    data: Images | None = None,
    backbone: Backbone | None = None,
    progress: Progress | None = None,
    make: Callable[[Trainer, Settings], Method] | None = None,
    checkpoint: Checkpoint | None = None,
    world: World = SINGLE,
) -> Result:
    """Runs one method over the task stream; writes nothing but the checkpoint.

    Global random generators are seeded for the run, and are afterwards as they were before; likewise torch's switch of
    deterministic algorithms.

    Args:
        settings: What to run.
        data: The data set, when it is loaded already; the result says so if it is not the one that settings name.
        backbone: The backbone to use instead of the one that settings name; its model is changed in place, and the
            result names it.
        progress: Told of every step and task.
        make: Builds the method from (trainer, settings), instead of the one that settings name.
        checkpoint: Saved after every epoch and task; a run that it holds is continued.
        world: The processes that share the work, all of which call this (`plora_ext.cil.distributed.launched`).

    Raises:
        ValueError: Settings, labels or layers that do not fit, or a checkpoint of another run.
        OSError: The checkpoint cannot be written.
        FloatingPointError: A loss or a weight that is not finite.
        torch.OutOfMemoryError: Memory is exhausted, the device's or the host's; names the setting to lower.
    """
    device = world.place(pick_device(settings.device))
    data = checked(data) if data else load_data(settings)
    with seeded(settings, device):
        return _run(settings, device, data, backbone, progress, make, checkpoint, world)


def _run(
    settings: Settings,
    device: torch.device,
    data: Images,
    backbone: Backbone | None,
    progress: Progress | None,
    make: Callable[[Trainer, Settings], Method] | None,
    checkpoint: Checkpoint | None,
    world: World,
) -> Result:
    stream = make_stream(settings, data)
    own_backbone, backbone = backbone, backbone or load_backbone(settings)
    check_backbone(backbone.model)
    world.broadcast_([tensor.data for tensor in backbone.model.state_dict().values()])
    tasks = [stream.joined()] if settings.method == "joint" else stream.tasks
    known = fingerprint_of(settings, data, tasks, backbone.model)
    inputs = {"data_digest": known["data"], "backbone_digest": known["backbone"]}
    if data.source != settings.data:
        inputs["data"] = f"given images {known['data']}"
    if own_backbone:
        inputs["backbone"] = f"given {type(own_backbone.model).__name__} {known['backbone']}"
    elif settings.weights == "random":
        inputs["backbone_digest"] = "random"  # another with every seed
    saved = checkpoint and checkpoint.begin(known, settings.as_dict())
    trainer = Trainer(backbone.model.to(device).requires_grad_(False), settings, device, progress, world)
    method = (make or METHODS[settings.method])(trainer, settings)
    look = prepare(settings, backbone, device, world)
    train, test = View(data.train_images, look), View(data.test_images, look)
    trainer.num_tasks, trainer.checkpoint = len(tasks), checkpoint
    evaluator = Evaluator(method, tasks, test, stream.task_of_class(), make_cache(settings, trainer))

    record: dict[str, Any] = {"curve": [], "matrix": [], "seconds": {}, "peak_mb": {}, "total_seconds": 0.0}
    record |= {"costs": [], "drift": []}
    facts: dict[str, Any] = {
        "tasks": len(tasks),
        "class_order": stream.class_order,
        "class_names": None if data.class_names is None else [data.class_names[c] for c in stream.class_order],
        "classes_seen": [task.classes.stop for task in tasks],
        "num_train": len(train),
        "num_test": len(test),
        "environment": environment(device),
        "inputs": inputs,
    }
    trainer.progress.begin(settings.method, len(tasks))
    if saved:
        record.update(saved["run"])
        method.restore(saved["state"])
        set_rng_state(saved["state"]["rng"])
        trainer.phases.seconds, trainer.phases.peak_mb = dict(record["seconds"]), dict(record["peak_mb"])
        for done, accuracy in enumerate(record["curve"]):
            trainer.progress.task(done, accuracy)
        if record["drift"] or settings.measure_drift:  # as many as tasks, also where it was not measured
            record["drift"] += [None] * (len(record["curve"]) - len(record["drift"]))
    if checkpoint and checkpoint.changed:
        changed = f"{'; '.join(checkpoint.changed)}, after {len(record['curve'])} of {len(tasks)} tasks"
        if world.first:
            trainer.progress.note(f"the run continues, though not as it began: {changed}")
        before = record.get("environment", {}).get("changed")
        facts["environment"]["changed"] = f"{before}; {changed}" if before else changed
    elif "changed" in record.get("environment", {}):
        facts["environment"]["changed"] = record["environment"]["changed"]
    start = time.perf_counter() - record["total_seconds"]
    for task in tasks[len(record["curve"]) :]:
        if len(task.train) < world.size:
            raise ValueError(
                f"task {task.index} has {len(task.train)} training images for {world.size} processes: start fewer"
            )
        labels = torch.from_numpy(task.train_labels - task.classes.start).to(device)
        held = method.prototypes
        method.learn(task, train[torch.from_numpy(task.train)], labels)
        with trainer.phases("eval"):
            accuracy, row = evaluator.after(task.index)
        record["curve"].append(accuracy)
        record["matrix"].append(row)
        if settings.measure_drift:
            with trainer.phases("drift"):
                record["drift"].append(drift.measure(method, tasks[: task.index + 1], train, held))
        elif record["drift"]:
            record["drift"].append(None)
        record["costs"].append(trainer.phases.lap())
        record["total_seconds"] = time.perf_counter() - start
        if checkpoint:
            costs = {"seconds": trainer.phases.seconds, "peak_mb": trainer.phases.peak_mb}
            checkpoint.save_task({**record, **costs, **facts, "passes": method.passes}, method.state())
        trainer.progress.task(task.index, accuracy)
        trainer.progress.measured(task.index, figures_of(record))
    return Result(
        settings=settings.as_dict(),
        classes_seen=facts["classes_seen"],
        class_order=stream.class_order,
        curve=record["curve"],
        matrix=record["matrix"],
        passes=method.passes,
        seconds=trainer.phases.seconds,
        peak_mb=trainer.phases.peak_mb,
        total_seconds=record["total_seconds"],
        num_train=len(train),
        num_test=len(test),
        costs=record["costs"],
        drift=record["drift"],
        environment=facts["environment"],
        inputs=inputs,
    )


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What a run measured after its last task so far, by name."""
    matrix, costs, moved = record["matrix"], record["costs"][-1], (record["drift"] or [None])[-1] or {}
    means = {"forgetting": metrics.forgetting(matrix), "backward transfer": metrics.backward_transfer(matrix)}
    return {
        "accuracy/all classes seen": record["curve"][-1],
        **{f"accuracy/{name}": value for name, value in means.items() if value is not None},
        **{f"accuracy of task/{i + 1}": value for i, value in enumerate(matrix[-1])},
        **{f"seconds/{phase}": value for phase, value in costs["seconds"].items()},
        **{f"peak MiB/{phase}": value for phase, value in costs["peak_mb"].items()},
        **{f"drift of prototypes/{name}": value for name, value in moved.items()},
    }
