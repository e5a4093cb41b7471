"""PLoRA as a method of the loop: an adapter per task, fused into one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plora_ext.cil import fusion, sought
from plora_ext.cil.alignment import Drift
from plora_ext.cil.inflora import InputGrams, Subspaces, share_after
from plora_ext.cil.methods.base import Method, _Adapted
from plora_ext.cil.packing import to_device
from plora_ext.cil.plora import PLoRA
from plora_ext.cil.settings import Settings
from plora_ext.cil.stream import Task
from plora_ext.cil.training import Trainer, lower_on_exhaustion
from plora_ext.data import View
from plora_ext.nn import PrototypeBank


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

        Returns those of all images [n, 2, D] where a head learns from them or images are sought by them.
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
        """Features [k, 2, D] under the two models of images that are moved to the old `prototypes` (`cil.sought`)."""
        size = self.settings.eval_batch_size
        starts, wanted = sought.targets(prototypes, features, labels, self.settings.sought)
        own = self.world.rows(len(starts))
        pairs, parts = [torch.stack([features[:0]] * 2, 1)], wanted[own.to(wanted.device)].split(size)
        with self.trainer.speed.passes(alone=False), lower_on_exhaustion("eval_batch_size"), torch.no_grad():
            # Of several processes one may have none.
            for batch, aims in zip(images[starts[own]].split(size), parts, strict=True) if len(own) else ():
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
        """Trains the task's adapter, alone or beside the others, near the features of `teacher`, and fuses all."""
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
