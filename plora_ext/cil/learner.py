"""Class-incremental learning from Python, task by task as tasks come.

    learner = Learner(method="plora", head="gaussian", backbone="vit_base_patch16_224.augreg_in21k")
    for task in tasks:                              # (images, labels), a folder, a torch or Hugging Face data set
        learner.fit(task)
    learner.predict(images), learner.evaluate(test)
    learner.save_pretrained("folder")
    learner = Learner.from_pretrained("folder")     # predicts, and goes on learning

It holds what the loop (`plora_ext.cil.run`) holds, and learns the same from the same tasks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from plora_ext.cil.distributed import SINGLE, World
from plora_ext.cil.settings import Settings, as_before

if TYPE_CHECKING:  # they import timm: not before a learner is made
    from plora_ext.cil.callbacks import Callback
    from plora_ext.cil.methods import Method
    from plora_ext.cil.stream import Task
    from plora_ext.cil.training import Trainer
    from plora_ext.data import Backbone, View

__all__ = ["Learner"]

FORMAT = 1
CONFIG, TENSORS, ADAPTERS = "learner.json", "learner.safetensors", "adapters"


class Learner:
    """A frozen backbone, a method that learns tasks on it, and the labels of the classes seen.

    The process's random generators are as they were after every call: those of the learner are its own, by `seed`.
    Threads may ask one learner: they take turns.
    Settings of the protocol (tasks, class order, `validation`) are for `run`: what `fit` is given is learned whole.

    Args:
        settings: Of the run; default those of `Settings()`.
        backbone: The setting, or a backbone to use instead of the one that it names; its model is changed in place.
        callbacks: Told of every step.
        make: Builds the method from (trainer, settings), instead of the one that settings name.
        num_tasks: How many there will be; only `init: inflora` needs to know.
        world: The processes that share the work, all of which make the same calls.
        **changes: Settings by name, on top of `settings`.

    Attributes:
        method: What learns (plora_ext.cil.methods).
        classes: The labels of the classes seen, in the order in which they came.
        task_sizes: Classes of each task learned.

    Raises:
        ValueError: Settings or layers that do not fit, or there is no setting of that name.
        TypeError: `settings` or `backbone` is something else.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        backbone: Backbone | str | None = None,
        callbacks: Sequence[Callback] = (),
        make: Callable[[Trainer, Settings], Method] | None = None,
        num_tasks: int | None = None,
        world: World = SINGLE,
        **changes: Any,
    ):
        from plora_ext.cil.build import Generators, load_backbone, pick_device, prepare
        from plora_ext.cil.frozen import check_backbone
        from plora_ext.cil.methods import METHODS
        from plora_ext.cil.same_run import weights_digest
        from plora_ext.cil.training import Trainer
        from plora_ext.data import Backbone

        if not isinstance(settings, Settings | None):
            raise TypeError(f"settings must be Settings, as Settings.load(FILE) reads, got {type(settings).__name__}")
        if not isinstance(backbone, Backbone | str | None):
            raise TypeError(
                "backbone must be plora_ext.data.Backbone(model, image_size, mean, std), whose model gives features, "
                f"or a name as in settings, got {type(backbone).__name__}"
            )
        if isinstance(backbone, str):
            changes, backbone = {**changes, "backbone": backbone}, None
        self.settings = s = Settings.load(overrides={**(settings.as_dict() if settings else {}), **changes})
        if s.init == "inflora" and not (num_tasks and num_tasks > 0):
            raise ValueError(f"init inflora needs to know how many tasks will come: give num_tasks, got {num_tasks}")
        device = world.place(pick_device(s.device))
        self.random = Generators(s, device)
        self.classes: list[Any] = []
        self.task_sizes: list[int] = []
        self._cut_short = False
        self.backbone_given = backbone is not None
        with self.random():
            backbone = backbone or load_backbone(s)
            if s.image_size not in (None, backbone.image_size):
                raise ValueError(f"image_size must be {backbone.image_size}, the given backbone's, got {s.image_size}")
            check_backbone(backbone.model)
            world.broadcast_([tensor.data for tensor in backbone.model.state_dict().values()])
            self.backbone_digest = weights_digest(backbone.model)
            model = backbone.model.to(device).requires_grad_(False).eval()  # all parts of it, whatever each was in
            self.trainer = Trainer(model, s, device, callbacks, world)
            self.trainer.num_tasks = num_tasks
            self.method: Method = (make or METHODS[s.method])(self.trainer, s)
            self.preparation = prepare(s, backbone, device, world)

    # ------------------------------------------------------------------ learning and using

    def fit(self, data: Any) -> Learner:
        """Learns a task: the classes of its labels, none of which was seen before.

        Args:
            data: (images uint8 [N, H, W, 3], labels), the path of a folder with a folder of images for each class, a
                torch Dataset of (image, label), or a Hugging Face data set with a column of images and one of labels.

        Raises:
            ValueError: A class of an earlier task, data of another kind, or a backbone of another dtype than float32.
            RuntimeError: An earlier call has ended with an error while it learned.
        """
        from plora_ext.data.inputs import read_labelled

        images, labels = read_labelled(data, self.settings.corrupt)
        with self.random():  # another thread that learns is waited for
            self._refuse_half()
            task, new = self._task_of(labels)
            if not self.classes:
                self.trainer.callbacks.tell("begin", self.settings.method, self.trainer.num_tasks)
            view = self._view(images)
            images[0]  # what is no image shows before anything is learned
            self._cut_short = True
            self.learn(task, view, new)
            self._cut_short = False
        return self

    def _task_of(self, labels: Sequence[Any]) -> tuple[Task, list[Any]]:
        """The next task, of images with these labels, and the labels of its classes."""
        from plora_ext.cil.stream import Task

        if len({isinstance(label, str) for label in [*self.classes, *labels]}) > 1:
            raise ValueError("labels must be all numbers or all texts, in every task the same, got both")
        new, first = sorted(set(labels)), len(self.classes)
        if again := [label for label in new if label in self.classes]:
            raise ValueError(f"a task brings new classes, but {again[0]!r} was learned before: leave its images out")
        if self.settings.init == "inflora" and len(self.task_sizes) == self.trainer.num_tasks:
            raise ValueError(f"init inflora has made room for num_tasks {self.trainer.num_tasks}, and all are learned")
        if self.settings.method == "joint" and self.classes:
            raise ValueError("method joint learns all classes as one task: fit it once")
        position = {label: first + i for i, label in enumerate(new)}
        nothing, rows = np.zeros(0, np.int64), np.arange(len(labels))
        local = np.array([position[label] for label in labels])
        return Task(len(self.task_sizes), range(first, first + len(new)), rows, local, nothing, nothing), new

    def learn(self, task: Task, train: View, classes: Sequence[Any]) -> None:
        """Learns a task of a stream, within `self.random()`.

        Args:
            train: The images that `task.train` counts.
            classes: The labels of `task.classes`.

        Raises:
            ValueError: Fewer images than processes.
        """
        world, device = self.trainer.world, self.trainer.device
        if len(task.train) < world.size:
            raise ValueError(
                f"task {task.index} has {len(task.train)} training images for {world.size} processes: start fewer"
            )
        labels = torch.from_numpy(task.train_labels - task.classes.start).to(device)
        self.method.learn(task, train[torch.from_numpy(task.train)], labels)
        self.add_task(classes)

    def add_task(self, classes: Sequence[Any]) -> None:
        """Takes down the labels of a task that the method has learned."""
        self.classes += classes
        self.task_sizes.append(len(classes))

    def predict(self, images: Any) -> np.ndarray:
        """The label of each image, among those of the classes seen.

        Args:
            images: uint8 [N, H, W, 3], a sequence of images, a Hugging Face data set, or the path of an image or of a
                folder, whose images are taken in the order of their names.

        Raises:
            RuntimeError: No task is learned yet, or an earlier call has ended with an error while it learned: then the
                model is another than the prototypes are of.
        """
        return np.array([self.classes[c] for c in self.scores(images)[0]])

    def scores(self, images: Any) -> tuple[np.ndarray, np.ndarray]:
        """The position in `classes` of each image's class, int64 [N], and its score by the head, float64 [N].

        The score is a scaled cosine, a log-likelihood or a regression value: it orders the classes of one image.
        """
        best = self.best(images)
        return best[:, 0, 0].astype(np.int64), best[:, 0, 1]

    def best(self, images: Any, top: int = 1) -> np.ndarray:
        """The best classes of each image, best first, float64 [N, top, 3]: position in `classes`, score, probability.

        The probability is the score's share of the softmax over all classes seen. Where the head gives log-likelihoods
        (gaussian) it is that of the class if all are as frequent; elsewhere it is not calibrated.

        Raises:
            FloatingPointError: An image has no score, since its features are not finite.
        """
        from plora_ext.cil.evaluate import classify
        from plora_ext.data.inputs import read_images

        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        read = read_images(images)
        if not len(read):
            raise ValueError("images must hold at least one image, got none")
        with self.random():  # another thread that learns is waited for
            self._refuse_half()
            if not self.classes:
                raise RuntimeError("this learner has learned no task yet: call fit first")
            view = self._view(read, cache=0.0)  # each is read once
            number, rows = len(self.classes), torch.arange(len(view))
            best = np.asarray(classify(self.method, view, rows, number, top=min(top, number)).cpu())
        if len(bad := np.flatnonzero(np.isnan(best[:, 0, 1]))):
            raise FloatingPointError(f"scores must be numbers, got nan for image {bad[0]}: its features are not finite")
        return best

    def evaluate(self, data: Any) -> dict[str, Any]:
        """`accuracy` over all images in percent, and `task_accuracies`, over those of each task's classes.

        Args:
            data: As for `fit`, with labels of classes seen; a task without an image has None.

        Raises:
            ValueError: A label that was not learned.
        """
        from plora_ext.data.inputs import read_labelled

        images, labels = read_labelled(data, self.settings.corrupt)
        position = {label: i for i, label in enumerate(self.classes)}
        if unknown := [label for label in labels if label not in position]:
            raise ValueError(f"data holds label {unknown[0]!r}, which no task has brought yet")
        wanted = np.array([position[label] for label in labels])
        correct = (self.scores(images)[0] == wanted).astype(np.float64)
        task = np.repeat(np.arange(len(self.task_sizes)), self.task_sizes)[wanted]
        each = [correct[task == t] for t in range(len(self.task_sizes))]
        return {
            "accuracy": 100.0 * float(correct.mean()),
            "task_accuracies": [100.0 * float(own.sum()) / len(own) if len(own) else None for own in each],
        }

    def _refuse_half(self) -> None:
        if self._cut_short:
            raise RuntimeError(
                "a fit is under way, as where a callback asks, or an earlier fit was cut short within its task: wait "
                "for its end, make a new learner, or load a saved one"
            )

    def _view(self, images: Any, **changes: Any) -> View:
        from plora_ext.data import View

        return View(images, replace(self.preparation, **changes))

    # ------------------------------------------------------------------ on disk

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes what was learned: JSON, safetensors, and each adapter as PEFT has it, in `adapters/NAME`.

        The folder appears whole or not at all, in the place of an earlier one. The frozen backbone is not part of it.

        Raises:
            ValueError: The method or the head is not registered, so that nobody could read it back.
            TypeError: A head of one's own has learned what its `state` leaves out.
            FileExistsError: The folder holds something else, or is the working directory.
            RuntimeError: No task is learned yet, or one was cut short.
        """
        import plora_ext
        from plora_ext.cil.packing import pack
        from plora_ext.cil.registry import HEADS, METHODS
        from plora_ext.cil.same_run import input_of

        with self.random():  # another thread that learns is waited for
            if not self.classes or self._cut_short:
                raise RuntimeError("this learner has learned no task yet, or one was cut short: call fit first")
            folder = Path(folder).resolve()  # a link stays one
            if folder == Path.cwd():
                raise FileExistsError(
                    f"{folder} is the working directory, which cannot be replaced: choose another folder"
                )
            s, method = self.settings, self.method
            _check_registered("method", METHODS.get(s.method), method)
            if s.method != "plora-ensemble":  # which has a head of its own
                _check_registered("head", HEADS.get(s.head), method.head)
            method.head.refuse_loss()
            tensors: dict[str, torch.Tensor] = {}
            state = {name: value for name, value in method.state().items() if not name.startswith("adapter:")}
            config = {
                "format": FORMAT,
                "plora_ext": plora_ext.__version__,
                "settings": {k: v for k, v in s.as_dict().items() if k not in ("out", "plugins", "device", "workers")},
                "classes": self.classes,
                "task_sizes": self.task_sizes,
                "num_tasks": self.trainer.num_tasks,
                "backbone": {
                    "digest": self.backbone_digest,
                    "given": self.backbone_given,
                    "input": input_of(self.preparation),
                },
                "adapters": self._adapters.names if self._adapters else [],
                "state": pack({**state, "rng": self.random.state}, "", tensors),
            }
            self.trainer.world.from_first(lambda: self._write(folder, config, tensors))

    @property
    def _adapters(self) -> Any:
        return getattr(self.method, "adapters", None)

    def _write(self, folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        from plora_ext.io import save_adapter

        held = {path.name for path in folder.iterdir()} if folder.is_dir() else {""} if folder.exists() else set()
        if held and not {CONFIG} <= held <= {CONFIG, TENSORS, ADAPTERS}:
            raise FileExistsError(f"{folder} holds something else than a learner: choose another folder")
        work, before = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("part", "old"))
        try:
            work.mkdir(parents=True)
            for name in config["adapters"]:
                save_adapter(self._adapters, work / ADAPTERS / name, name)
            save_file({k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, work / TENSORS)
            (work / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            if folder.exists():
                os.replace(folder, before)
            os.replace(work, folder)
        finally:
            if before.exists() and not folder.exists():  # stopped between the two
                os.replace(before, folder)
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(before, ignore_errors=True)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        backbone: Backbone | None = None,
        callbacks: Sequence[Callback] = (),
        world: World = SINGLE,
        **elsewhere: Any,
    ) -> Learner:
        """The learner that `save_pretrained` wrote: it predicts the same, and goes on learning as that would have.

        Args:
            folder: Where it is.
            backbone: The one that was given to the learner, if one was.
            callbacks, world: As for a new learner.
            **elsewhere: Settings that say where things are (device, weights, workers) and how numbers are computed.

        Raises:
            FileNotFoundError: The folder holds no learner.
            ValueError: It is damaged, of another format or of a method that is not registered, or the backbone's
                weights or input are others.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from plora_ext.cil.packing import unpack
        from plora_ext.cil.same_run import ELSEWHERE, ROUNDING, input_of
        from plora_ext.io import load_adapter

        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder / CONFIG} is missing: folder must be one that save_pretrained wrote")
        if wrong := [name for name in elsewhere if name not in (*ELSEWHERE, *ROUNDING)]:
            raise ValueError(f"{wrong[0]} cannot differ from the saved learner's: leave it out")
        try:
            config = json.loads((folder / CONFIG).read_text("utf-8"))
            if config["format"] != FORMAT:
                by = config.get("plora_ext", "an unknown version")
                raise ValueError(f"it has format {config['format']}, of plora_ext {by}; this one reads {FORMAT}")
            state = unpack(config["state"], load_file(folder / TENSORS))
            given, names, classes, sizes, number = (
                config[key] for key in ("backbone", "adapters", "classes", "task_sizes", "num_tasks")
            )
            settings = Settings.load(overrides={**as_before(config["settings"]), **elsewhere})
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            why = f"what of it is a user's own must be registered first, and the folder whole: {error}"
            raise ValueError(f"{folder} cannot be read as a learner; {why}") from error
        if given["given"] and backbone is None:
            raise ValueError(f"{folder} is of a learner made with a backbone of its own: give that as backbone")
        learner = cls(settings, backbone=backbone, callbacks=callbacks, num_tasks=number, world=world)
        if learner.backbone_digest != given["digest"]:
            raise ValueError(f"the backbone's weights are not those with which the learner in {folder} has learned")
        here = input_of(learner.preparation)
        if given.get("input", here) != here:
            raise ValueError(
                f"the backbone's input (size, mean, std) must be {given['input']}, as in {folder}, got {here}"
            )
        rng = state.pop("rng")
        with learner.random():
            for name in names:
                load_adapter(learner._adapters, folder / ADAPTERS / name, name)
            learner.method.restore(state)
        learner.random.state = rng
        learner.classes, learner.task_sizes = classes, sizes
        return learner


def _check_registered(kind: str, registered: Any, used: object) -> None:
    made = type(used)
    if made is not registered:
        raise ValueError(
            f"{kind} {made.__qualname__} is not registered, so that a saved learner could not be read back: write "
            f'@register_{kind}("name") above its class and set {kind}="name"'
        )
