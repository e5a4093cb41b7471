"""Trains one task and reads features: everything that runs the model batch by batch, with the clock beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext.cil.alignment import class_means
from plora_ext.cil.callbacks import Callback, Callbacks
from plora_ext.cil.checkpoint import Checkpoint
from plora_ext.cil.distributed import SINGLE, World, gradients
from plora_ext.cil.frozen import hold_statistics, moving, require_gradient, unchanged
from plora_ext.cil.phases import Phases
from plora_ext.cil.settings import Settings
from plora_ext.cil.speed import Speed
from plora_ext.data import View, cutmix, quarter_turns, upright
from plora_ext.data.images import first_line
from plora_ext.graphs import Captured


@contextmanager
def lower_on_exhaustion(setting: str) -> Iterator[None]:
    """Where memory is exhausted inside, a GPU's or the host's, the error says to lower `setting`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # on the host torch raises the one and numpy the other
        on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        if not (on_host or isinstance(error, torch.OutOfMemoryError)) or "lower " in str(error):  # an inner one says it
            raise
        said = first_line(error) if str(error) else "out of memory"
        amp = "" if on_host else ", or set amp to bfloat16"
        raise torch.OutOfMemoryError(f"{said}; lower {setting}{amp}") from error


@contextmanager
def wants_float32(model: nn.Module) -> Iterator[None]:
    """Where a model of another dtype does not take images of float32, the error says so."""
    try:
        yield
    except RuntimeError as error:
        others = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
        if not others or isinstance(error, torch.OutOfMemoryError):
            raise
        dtypes, said = ", ".join(sorted(map(str, others))), first_line(error)
        raise ValueError(
            f"the backbone takes no images of float32, its parameters are {dtypes}: call its float() first ({said})"
        ) from error


class Trainer:
    """Fits adapters of one model, images [B, 3, H, W] to features [B, D] on `device`, to one task at a time."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        device: torch.device,
        callbacks: Sequence[Callback] = (),
        world: World = SINGLE,
    ):
        self.model, self.settings, self.device, self.world = model, settings, device, world
        self.speed = Speed(model, settings, device)
        self.callbacks = Callbacks(callbacks)
        self.speed.say = self.callbacks.note
        self.num_tasks: int | None = None  # where it is known
        self.steps = 0  # of training, over the tasks so far
        self.checkpoint: Checkpoint | None = None
        self.phases = Phases(device)
        self._held: list[nn.Module] | None = None  # modules that training would change, beside normalisations

    def fit(
        self,
        task: int,
        parameters: Sequence[Tensor],
        images: View,
        labels: Tensor,
        num_classes: int,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Trains `parameters` by cross-entropy of a cosine classifier over the task's own classes.

        The classifier, a direction per class, lives for this call only. Its logits are scale * cos(feature, direction),
        and it starts as the nearest-class-mean classifier. Frozen modules with running statistics stay in eval mode.
        With the setting `rotations` a turned class is another one, four times as many in all (PASS, Zhu et al., CVPR
        2021); those three start from the class's own mean.

        Args:
            images: The task's n training images.
            labels: int64 [n] in 0 ... num_classes - 1.
            teacher: Adds distill * mean(1 - cos(feature, teacher's feature)) over the images of a batch that are not
                turned.

        Raises:
            FloatingPointError: The loss is not finite, or what trains after an epoch: names task, epoch, step, tensors,
                and the settings that can be the cause.
            ValueError: A tensor of the frozen backbone has changed, or it gives its adapters no gradient.
        """
        s, world, unread = self.settings, self.world, self._held is None
        assert s.scale is not None, "it follows from the method"
        scale = s.scale
        if self._held is None:
            self._held = moving(self.model, lambda: self._look(images))
        with unchanged(self.model, parameters=unread):  # parameters once: reading all of them takes time
            # Started from the class means: random directions would first pull the features of every class elsewhere.
            own = world.rows(len(images))
            means = class_means(self.features(images[own]), labels[own.to(labels.device)], num_classes, world)
            if s.rotations:
                num_classes, means = 4 * num_classes, means.repeat(4, 1)
            directions = nn.Parameter(F.normalize(means))
            groups = [
                {"params": list(parameters), "weight_decay": s.weight_decay},
                {"params": [directions], "weight_decay": 0.0},
            ]
            optimizer, scaler = self.speed.optimizer(groups), self.speed.scaler()
            steps = math.ceil(len(images) / s.batch_size)
            size = math.ceil(len(images) / steps)  # a last batch of a few images would be a step as large, of noise
            losses = torch.zeros(steps, device=self.device)
            learned = [*parameters, directions]
            first = self.checkpoint.enter_fit(task, learned, optimizer, scaler) if self.checkpoint else 0
            self.model.train()
            hold_statistics(self.model, self._held)
            world.start_(self.model, learned)

            def update(batch: Tensor, wanted: Tensor, number: int = size) -> tuple[Tensor, Tensor | None]:
                """A step on a batch of `number` images; of several processes, the gradients of this one's part."""
                features = self.speed.forward(batch, self.model)
                require_gradient(features, parameters)
                loss = F.cross_entropy(scale * F.linear(F.normalize(features), F.normalize(directions)), wanted)
                loss = loss * world.share(number)
                if teacher:
                    of = upright(number) if s.rotations else number
                    own = len(range(world.rank, of, world.size))  # there may be none; a pass needs one
                    seen = slice(max(own, 1))
                    near = F.cosine_similarity(features[seen], self.speed.forward(batch[seen], teacher, False))
                    loss = loss + s.distillation * (1 - near)[:own].sum() / of
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                if world.size > 1:
                    return loss.detach(), gradients(learned)
                apply()
                return loss.detach(), None

            def apply() -> None:
                scaler.step(optimizer)
                scaler.update()

            captured = self.speed.captured("training", update, learned)
            rate = s.lr if task == 0 or s.lr_later is None else s.lr_later
            self.callbacks.tell("fit", task, len(images) * (s.epochs - first))
            for epoch in range(first, s.epochs):
                rates = []
                order = torch.randperm(len(images))
                targets = labels[order.to(self.device)].split(size)  # at once: every copy makes the host wait
                for step, (_, batch) in enumerate(images.epoch(order, size, world.own)):
                    done = (epoch * steps + step) / (steps * s.epochs)
                    rates.append(rate * (1 + math.cos(math.pi * done)) / 2)
                    self.speed.set_rate(optimizer, rates[-1])
                    number = len(targets[step])
                    wanted = targets[step][world.own(number)]
                    with world.own_random(s.seed, task, epoch, step):
                        if s.rotations:
                            batch, wanted = quarter_turns(batch, wanted, num_classes // 4, (number, world.own(number)))
                        if s.cutmix:
                            batch, wanted = cutmix(batch, wanted, num_classes, s.cutmix)
                        # A smaller last batch has another share, also where this process's part of it is as large.
                        whole = number == size
                        losses[step], found = captured(batch, wanted) if whole else update(batch, wanted, number)
                    if found is not None:  # no part of a graph: NCCL wants all processes to capture, and one may fail
                        world.sum_gradients_(learned, found)
                        apply()
                    self.callbacks.tell("step", number)
                # Looked at once an epoch: a look at every step would make the host wait for the device at every step.
                world.sum_(losses)
                self._refuse_infinite(f"task {task}, epoch {epoch}", losses, learned)
                self.callbacks.tell("steps", self.steps + epoch * steps + 1, losses.tolist(), rates)
                self.callbacks.tell("epoch", task * s.epochs + epoch + 1, float(losses.mean()))
                if self.checkpoint:
                    self.checkpoint.save_epoch(task, epoch, learned, optimizer, scaler)
            self.steps += self.steps_for(len(images))
            optimizer.zero_grad()  # a frozen adapter needs no memory for its gradient
            self.model.eval()

    def steps_for(self, images: int) -> int:
        """Steps of training on a task of so many images."""
        return self.settings.epochs * math.ceil(images / self.settings.batch_size)

    def _look(self, images: View) -> None:
        """A pass over a batch as the model is."""
        rows = torch.arange(min(len(images), self.settings.batch_size))
        with self.speed.passes(alone=False), self.speed.autocast(), wants_float32(self.model):
            for batch in images[rows].split(len(rows)):
                self.model(batch)

    def _refuse_infinite(self, where: str, losses: Tensor, learned: Sequence[Tensor]) -> None:
        """Raises FloatingPointError if a loss of an epoch, or what was learned in it, is not finite."""
        bad = (~losses.isfinite()).nonzero()
        sound = torch.stack([p.detach().norm() for p in learned]).isfinite()
        if not len(bad) and sound.all():
            return
        what = f"the weights are not finite after the last step of {where}"
        if len(bad):
            what = f"the loss is {losses[bad[0]].item()} at {where}, step {int(bad[0])}"
        names = {id(p): name for name, p in self.model.named_parameters()}
        tensors = [names.get(id(p), "classifier") for p, fine in zip(learned, sound.tolist()) if not fine]
        if tensors:
            more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
            what += f"; not finite: {tensors[0]}{more}"
        # What can be the cause: the learning rate, and whatever else is not as usual.
        s, usual = self.settings, Settings(method=self.settings.method)
        unusual = [
            n for n in ("lr_later", "weight_decay", "scale", "lora_alpha", "amp") if getattr(s, n) != getattr(usual, n)
        ]
        causes = " or ".join(f"{name} {getattr(s, name)}" for name in ("lr", *unusual))
        if len(bad) and not tensors:  # as in the first step: what goes in
            causes += ", or the images or the backbone's weights"
        raise FloatingPointError(f"{what}; the cause may be {causes}")

    def features(self, images: View, model: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Features float32 [n, D] of n images, by the test transform; of an ensemble called as `model`, [n, T, D]."""
        return torch.cat(list(self.read(images, model)))

    @torch.no_grad()
    def read(self, images: View, model: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tensor]:
        """The same in batches of `eval_batch_size`, one after another."""
        if self.model.training:
            self.model.eval()
        self.callbacks.tell("read", len(images))
        size, called = self.settings.eval_batch_size, model or self.model
        with lower_on_exhaustion("eval_batch_size"), self.speed.passes(model is None), wants_float32(self.model):
            forward = self.speed.captured(
                "passes", lambda batch: self.speed.forward(batch, called), batches=len(images) // size
            )
            for batch in images.split(size):
                features = forward(batch)
                if model is None and (features.dim() != 2 or len(features) != len(batch)):
                    raise ValueError(
                        f"the backbone must give features [{len(batch)}, D] of {len(batch)} images, got "
                        f"{list(features.shape)}: pool them"
                    )
                self.callbacks.tell("step", len(batch))
                yield features.clone() if isinstance(forward, Captured) else features
