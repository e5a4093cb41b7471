"""The methods: PLoRA in its fused and its ensemble form, and the baselines it is measured against.

All have prototypes and a head on top (plora_ext.cil.heads) and train an adapter with the same loop, so a comparison
differs only in what the methods are about: which adapters exist, which are active, and what becomes of old prototypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.cil import fusion, sought
from plora_ext.cil.alignment import Drift, class_means
from plora_ext.cil.checkpoint import adapters_state, pack, restore_adapters, to_device
from plora_ext.cil.features import space_fingerprints
from plora_ext.cil.heads import Subspace, create_head
from plora_ext.cil.inflora import InputGrams, Subspaces, share_after
from plora_ext.cil.plora import PLoRA
from plora_ext.cil.registry import METHODS
from plora_ext.cil.settings import Settings
from plora_ext.cil.stream import Task
from plora_ext.cil.training import Trainer, lower_on_exhaustion
from plora_ext.data import View
from plora_ext.nn import Adapters, Ensemble, PrototypeBank, inject
from plora_ext.nn.adapters import BASE


class Method(ABC):
    """Frozen features and nearest class means: what every method here starts from.

    Under many processes all of them learn the same: images are divided (plora_ext.cil.distributed), results are not.

    Attributes:
        prototypes: One row per class seen, in the class order.
        head: What classifies by them or by what it learns (plora_ext.cil.heads).
        passes: Forward passes of the backbone that one prediction takes.
        trainable: Numbers that the last training optimised, beside the directions that serve it as a classifier.
    """

    STATE: tuple[str, ...] = ("prototypes", "passes", "trainable")  # attributes that a checkpoint holds
    prototypes: Tensor | None = None

    def __init__(self, trainer: Trainer, settings: Settings):
        self.trainer, self.settings, self.world = trainer, settings, trainer.world
        self.head = create_head(settings.head, settings, trainer.device)
        self.passes, self.trainable = 1, 0

    @abstractmethod
    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        """Learns a task.

        Args:
            images: Its n training images.
            labels: int64 [n], counted from 0 within the task.
        """

    def features(self, images: View) -> Tensor:
        """Features of n images in the current space; [n, D], or [n, T, D] for an ensemble."""
        return self.trainer.features(images)

    def spaces(self) -> dict[str, str] | None:
        """The adapters whose spaces the features are in, each with a fingerprint of all that these depend on.

        None where the features of an image change with every task, so that there is no use in keeping them.
        """
        return None

    def features_in(self, images: View, names: Sequence[str]) -> Tensor:
        """Features [n, len(names), D] of images in some of the `spaces`."""
        return self.features(images)[:, None]

    def logits(self, features: Tensor) -> Tensor:
        """Logits [n, classes seen] of features in the current space, [n, D] or [n, 1, D]."""
        assert self.prototypes is not None, "learn a task first"
        return self.head(features.flatten(1), self.prototypes)

    def predict(self, images: View) -> Tensor:
        """Logits [n, classes seen] of images."""
        return self.logits(self.features(images))

    def state(self) -> dict[str, Any]:
        """What the method has learned so far, for a checkpoint: tensors and plain values."""
        head = {f"head:{name}": value for name, value in self.head.state().items()}
        return {"method": {name: getattr(self, name) for name in self.STATE}, **head}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned, in a method that has learned nothing yet."""
        for name, value in to_device(state["method"], self.trainer.device).items():
            setattr(self, name, value)
        head = {name.removeprefix("head:"): value for name, value in state.items() if name.startswith("head:")}
        if head:
            self.head.restore(to_device(head, self.trainer.device))

    def parameters(self) -> dict[str, float]:
        """`trainable`; `stored`, the numbers in all adapters; `stored_mb`, MiB of all that `state` holds.

        The last is what must be kept beside the backbone to classify and to go on: adapters, prototypes, statistics.
        """
        kept: dict[str, Tensor] = {}
        pack(self.state(), "", kept)
        stored = sum(tensor.numel() for name, tensor in kept.items() if name.startswith("/adapter:"))
        size = sum(tensor.nbytes for tensor in kept.values()) / 2**20
        return {"trainable": self.trainable, "stored": stored, "stored_mb": size}

    def _append_means(self, task: Task, images: View, labels: Tensor) -> None:
        """Appends the means of the task's classes to the prototypes."""
        with self.trainer.phases("prototypes"):
            own = self.world.rows(len(images))
            features = self.features(images[own])
            new = class_means(features, labels[own.to(labels.device)], len(task.classes), self.world)
        self.prototypes = new if self.prototypes is None else torch.cat([self.prototypes, new])
        if self.head.learns:  # else nobody asks for the other processes' rows
            features = self.world.gather(features, len(images))
        self._teach(None, features, labels)

    def _teach(self, before: Tensor | None, after: Tensor, labels: Tensor) -> None:
        """Hands the features of a task to the head, if it learns from them."""
        if not self.head.learns:
            return
        assert self.prototypes is not None
        size = "projections" if self.settings.head == "ranpac" else "covariance_rank (null: as large as the features)"
        with self.trainer.phases("head"), lower_on_exhaustion(size):
            self.head.learn(self.prototypes, before, after, labels)


class SimpleCIL(Method):
    """`simplecil`: the frozen backbone's class means."""

    def spaces(self) -> dict[str, str]:
        return space_fingerprints(self.trainer.model, [BASE], *self.trainer.speed.context)

    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        self._append_means(task, images, labels)


class _Adapted(Method):
    """A method with adapters, those given or new ones in the trainer's model."""

    def __init__(self, trainer: Trainer, settings: Settings, adapters: Adapters | None = None):
        super().__init__(trainer, settings)
        s = settings
        self.adapters = adapters or inject(trainer.model, s.target_modules, s.r, s.lora_alpha, s.lora_dropout)

    def state(self) -> dict[str, Any]:
        return {**adapters_state(self.adapters), **super().state()}

    def restore(self, state: dict[str, Any]) -> None:
        restore_adapters(self.adapters, state)
        super().restore(state)

    def _fit(
        self,
        task: Task,
        images: View,
        labels: Tensor,
        extra: tuple[Tensor, ...] = (),
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        newest = self.adapters.parameters(self.adapters.names[-1])
        parameters = [*(p for p in newest if p.requires_grad), *extra]
        self.trainable = sum(p.numel() for p in parameters)
        with self.trainer.phases("train"), lower_on_exhaustion("batch_size in a new run"), self.trainer.speed.passes():
            self.trainer.fit(task.index, parameters, images, labels, len(task.classes), teacher)

    def _add_adapter(self, task: Task) -> str:
        """A new adapter; it alone is active and trains."""
        name = f"task{task.index}"
        self.adapters.add_adapter(name, init_from=fusion.start(str(self.settings.init), self.adapters.names))
        return name


class LoRASequential(_Adapted):
    """`lora-sequential`: one adapter, trained on and on; prototypes stay as they were when their class was new."""

    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        if task.index == 0:
            self._add_adapter(task)
        self._fit(task, images, labels)
        self._append_means(task, images, labels)


class LoRAFirst(_Adapted):
    """`lora-first`: an adapter trained on the first task only, class means from then on.

    First-session adaptation (Panos et al., ICCV 2023) with LoRA.
    """

    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        if task.index == 0:
            self._add_adapter(task)
            self._fit(task, images, labels)
        self._append_means(task, images, labels)

    def spaces(self) -> dict[str, str]:
        return space_fingerprints(self.adapters, self.adapters.names, *self.trainer.speed.context)


class APER(LoRAFirst):
    """`aper`: f(x) = [f_0(x), f_1(x)], the frozen model's features and those of `lora-first` side by side, [n, 2 D].

    `aper_adapter` (Zhou et al., IJCV 2024) with LoRA for its adapters. Two forward passes, made as one
    (`plora_ext.nn.Ensemble`).
    """

    def __init__(self, trainer: Trainer, settings: Settings):
        super().__init__(trainer, settings)
        self.ensemble, self.passes = Ensemble(self.adapters), 2

    def features(self, images: View) -> Tensor:
        return self.features_in(images, [BASE, *self.adapters.names]).flatten(1)

    def features_in(self, images: View, names: Sequence[str]) -> Tensor:
        return self.trainer.features(images, lambda batch: self.ensemble(batch, names).movedim(0, 1))

    def spaces(self) -> dict[str, str]:
        return space_fingerprints(self.adapters, [BASE, *self.adapters.names], *self.trainer.speed.context)


class Joint(LoRAFirst):
    """`joint`: all classes at once as a single task, the upper bound of this recipe; the loop hands it that task.

    It is evaluated as the others are, on the growing sets of classes, among these alone.
    """


class PLoRAFused(_Adapted):
    """`plora`: an adapter per task, fused into one model, and old prototypes aligned to every new fusion."""

    STATE = (*Method.STATE, "task_means", "coefficients")

    def __init__(self, trainer: Trainer, settings: Settings):
        s = settings
        self.net = PLoRA(
            trainer.model, s.target_modules, s.r, s.lora_alpha, s.alignment, s.tau, s.ridge,
            num_features=1, lora_dropout=s.lora_dropout, init=str(s.init), sought=s.sought,
        )  # fmt: skip
        super().__init__(trainer, settings, self.net.adapters)
        self.task_means: list[Tensor] = []  # of fusion: similarity
        self.subspaces = Subspaces()  # of init: inflora

    @property
    def prototypes(self) -> Tensor | None:
        bank = self.net.bank
        return bank.prototypes if len(bank.counts) else None

    @prototypes.setter
    def prototypes(self, value: Tensor | None) -> None:
        if value is not None:
            self.net.bank = PrototypeBank(value.shape[1]).to(value.device)
            self.net.bank.set(torch.arange(len(value)), value)

    @property
    def coefficients(self) -> Tensor:
        """Those of the adapters in the fused model, [T]."""
        return self.net.coefficients

    @coefficients.setter
    def coefficients(self, value: Tensor) -> None:
        self.net.coefficients = value

    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        if self.prototypes is None:
            self.train_and_fuse(task, images, labels)
            self._append_means(task, images, labels)
            return
        s, older = self.settings, (self.adapters.names, self.coefficients)
        # `learned` goes on to change the older adapters; elsewhere they need not be held as weights while one trains.
        before = self._frozen() if s.fusion == "learned" or s.distillation else None
        self.train_and_fuse(task, images, labels, before if s.distillation else None)
        drift = self.net.drift(range(len(self.prototypes)), len(task.classes), self.head.covariances)
        with self.trainer.phases("prototypes"):
            if before is None:
                self.net.activate(*older)
                before = self._frozen()
                self.activate()
            features = self._read_both(before, images, labels, drift)
        with self.trainer.phases("align"):
            self.prototypes = torch.cat([drift.align(), drift.means()[1]])
        if features is not None and self.head.learns:
            self.head.follow(drift)
            self._teach(features[:, 0], features[:, 1], labels)

    def _frozen(self) -> Callable[[Tensor], Tensor]:
        """The model as it is now, its merged weights in the dtype of autocast, which would cast them at every pass."""
        with self.trainer.speed.autocast():
            return self.adapters.frozen()

    def _read_both(
        self, before: Callable[[Tensor], Tensor], images: View, labels: Tensor, drift: Drift
    ) -> Tensor | None:
        """Feeds `drift` an image's features under the model `before` and under the present one, from one look at it.

        Returns:
            Features [n, 2, D] of all images where a head learns from them, or images are sought by them, else nothing.
        """
        own, kept, after = self.world.rows(len(images)), [], self._frozen()
        seeks = drift.kind.rows and self.settings.sought > 0
        parts = labels[own.to(labels.device)].split(self.settings.eval_batch_size)
        both = self.trainer.read(images[own], lambda batch: torch.stack([before(batch), after(batch)], 1))
        for features, part in zip(both, parts, strict=True):
            drift.add(features[:, 0], features[:, 1], part)
            if self.head.learns or seeks:
                kept.append(features)
        drift.gather(self.world)
        gathered = self.world.gather(torch.cat(kept), len(images)) if kept else None
        if gathered is not None and seeks:
            found = self._seek(before, after, images, gathered[:, 0], labels, drift.prototypes)
            drift.add(found[:, 0], found[:, 1], None)
        return gathered

    def _seek(
        self,
        before: Callable[[Tensor], Tensor],
        after: Callable[[Tensor], Tensor],
        images: View,
        features: Tensor,
        labels: Tensor,
        prototypes: Tensor,
    ) -> Tensor:
        """Features [k, 2, D] under the two models of images that are moved to the old `prototypes` (`cil.sought`).

        Args:
            features: Of the task's images under the model `before`.
        """
        size = self.settings.eval_batch_size
        starts, wanted = sought.targets(prototypes, features, labels, self.settings.sought)
        own = self.world.rows(len(starts))
        pairs, parts = [torch.stack([features[:0]] * 2, 1)], wanted[own.to(wanted.device)].split(size)
        with self.trainer.speed.passes(alone=False), lower_on_exhaustion("eval_batch_size"), torch.no_grad():
            for batch, aims in zip(images[starts[own]].split(size), parts, strict=True):
                moved = sought.move(batch, aims, before)
                pairs.append(torch.stack([before(moved), after(moved)], 1).float())
        return self.world.gather(torch.cat(pairs), len(starts))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "subspaces": self.subspaces.bases}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.subspaces.bases = to_device(state["subspaces"], self.trainer.device)
        self.activate()

    def train_and_fuse(
        self, task: Task, images: View, labels: Tensor, teacher: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Trains the task's adapter, alone or beside the others, and fuses all of them.

        Args:
            teacher: Gives the features to stay near, as far as the setting `distill` asks for it.
        """
        s = self.settings
        if s.fusion == "similarity":
            with self.trainer.phases("prototypes"), self.adapters.disabled():
                self.task_means.append(self.world.spread(self.features, images).mean(0))
        older = list(self.adapters.names)
        name = self.net.add_adapter()
        if s.fusion == "learned":
            for previous in older[-1:]:  # the ones before it are directions already
                fusion.to_directions(self.adapters.parameters(previous))
            # 0.8 is where SD-LoRA starts its magnitudes.
            magnitudes = nn.Parameter(torch.full((len(older) + 1,), 0.8, device=self.trainer.device))
            self.adapters.set_adapter([*older, name], magnitudes)
            self._fit(task, images, labels, (magnitudes,), teacher)
            self.coefficients = fusion.coefficients("learned", len(older) + 1, magnitudes=magnitudes.detach())
        else:
            means = torch.stack(self.task_means) if self.task_means else None
            self.coefficients = fusion.coefficients(s.fusion, len(older) + 1, task_means=means, tau=s.fusion_tau)
            if s.onto == "fused":
                self.net.activate([*older, name], self.coefficients)
            if s.init == "inflora":  # the new B is zero: these are the inputs of the model before the task
                self.subspaces.design(self.adapters, name, self._input_grams(images))
            self._fit(task, images, labels, (), teacher)
            if s.init == "inflora":
                assert self.trainer.num_tasks is not None  # a learner asks for it
                share = share_after(task.index, self.trainer.num_tasks, s.subspace)
                self.subspaces.grow(self._input_grams(images), share)
        self.activate()

    def _input_grams(self, images: View) -> dict[str, Tensor]:
        with self.trainer.phases("subspace"), InputGrams(self.adapters) as grams:
            # Uncompiled: hooks look on.
            self.trainer.features(images[self.world.rows(len(images))], self.trainer.model)
        return grams.means(self.world)

    def activate(self) -> None:
        """Makes the fused model the active one."""
        self.net.fuse(self.coefficients)


class PLoRAEnsemble(_Adapted):
    """`plora-ensemble`: every adapter keeps its own feature space (EASE, CVPR 2024, with LoRA).

    T forward passes, made as one (`plora_ext.nn.Ensemble`); old adapters stay as they are, so their features are kept.
    Prototypes are [C, T, D]. Those of a class in the spaces of later tasks' adapters are completed from later classes.
    """

    def __init__(self, trainer: Trainer, settings: Settings, adapters: Adapters | None = None):
        super().__init__(trainer, settings, adapters)
        self.head: Subspace = Subspace(settings, trainer.device)
        memory = settings.ensemble_memory
        self.ensemble = Ensemble(self.adapters, None if memory is None else int(memory * 2**20))

    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        self._add_adapter(task)
        if task.index == 0:
            self.features(images[torch.arange(1)])  # too little ensemble_memory shows before anything is trained
        self._fit(task, images, labels)
        self.add_prototypes(task, images, labels)

    def add_prototypes(self, task: Task, images: View, labels: Tensor) -> None:
        """Means of the task's classes in every space, then what the older classes lack in the newest one."""
        with self.trainer.phases("prototypes"):
            own = self.world.rows(len(images))
            spaces, mine = self.features(images[own]).unbind(1), labels[own.to(labels.device)]
            new = torch.stack([class_means(space, mine, len(task.classes), self.world) for space in spaces], 1)
        with self.trainer.phases("align"):
            task_of_class = self.head.add_task(len(new))
            old = new[:0] if self.prototypes is None else F.pad(self.prototypes, (0, 0, 0, 1))  # the newest is empty
            self.prototypes = ops.complete_prototypes(
                torch.cat([old, new]), task_of_class, tau=self.settings.ensemble_tau, mode="reset"
            )
        self.passes = task.index + 1

    def features(self, images: View) -> Tensor:
        return self.features_in(images, self.adapters.names)

    def features_in(self, images: View, names: Sequence[str]) -> Tensor:
        return self.trainer.features(images, lambda batch: self.ensemble(batch, names).movedim(0, 1))

    def spaces(self) -> dict[str, str]:
        return space_fingerprints(self.adapters, self.adapters.names, *self.trainer.speed.context)

    def logits(self, features: Tensor) -> Tensor:
        assert self.prototypes is not None, "learn a task first"
        return self.head(features, self.prototypes)


METHODS |= {
    "plora": PLoRAFused,
    "plora-ensemble": PLoRAEnsemble,
    "simplecil": SimpleCIL,
    "lora-sequential": LoRASequential,
    "lora-first": LoRAFirst,
    "aper": APER,
    "joint": Joint,
}
