"""PLoRA as one module: what the loop's method holds (plora_ext.cil.methods) and what other training loops drive."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext.cil import fusion
from plora_ext.cil.alignment import Drift, class_means
from plora_ext.cil.covariances import ClassCovariances
from plora_ext.cil.frozen import hold_statistics, require_gradient
from plora_ext.cil.settings import takes_settings
from plora_ext.cil.sought import ROWS, Sample, move, targets
from plora_ext.nn import CosineHead, PrototypeBank, inject
from plora_ext.ops.autocast import without_autocast

__all__ = ["UNSEEN", "PLoRA"]

Batches = Iterable[tuple[Tensor, Tensor]]
UNSEEN = -1000.0  # the logit of a class that has no prototype: as good as none, and a loss stays finite


class PLoRA(nn.Module):
    """A frozen backbone with a LoRA adapter per task, fused into one, and prototypes that follow the fused model.

    For every task: `add_task` and `start`, train `parameters_to_train()` with the cross-entropy of `forward` in
    training mode, then `end_task`. In evaluation mode `forward` classifies among all classes seen, in one pass. Loading
    a `state_dict` gives a fresh network the tasks and classes of the saved one, and its settings (r, lora_alpha,
    alignment, tau, ridge, init, sought, scale), whatever it was made with; files of 0.1 hold no settings but `scale`.

        net = PLoRA(backbone, r=16)
        for batches, classes in tasks:                       # batches: (images, labels) of the task
            net.add_task(classes)
            net.start(batches)
            ...                                              # train net.parameters_to_train()
            net.end_task(batches)
        net.eval()(images)                                   # logits among all classes seen

    The backbone stays as it is in training mode too: its modules with running statistics are always in evaluation mode.

    Args:
        backbone: maps images to features [B, D]; changed in place.
        target_modules, r, lora_alpha: as in `plora_ext.nn.inject`.
        alignment, tau, ridge: as in `plora_ext.cil.alignment.align`.
        scale: factor of the cosines.
        num_features: D; default `backbone.num_features`, as timm's models have it.
        lora_dropout: as in `plora_ext.nn.inject`.
        init: "newest": a new adapter starts from the last task's; "first": from task 0's; "fresh": from nothing.
        sought: for alignment local, images moved to where an old class is, for each (`plora_ext.cil.sought`), from a
            sample of the task's; the backbone must have a gradient to its images, else 0.

    Attributes:
        adapters: one for each task, "task0" first.
        coefficients: of the adapters in the fused model, float32 [T].
        bank: the prototypes of all classes seen, in the space of the fused model.

    Raises:
        ValueError: a setting that does not fit, or num_features is not known.
        TypeError: there is no setting of that name; the closest is named.
    """

    task_classes: Tensor

    @takes_settings
    def __init__(
        self,
        backbone: nn.Module,
        target_modules: str | Sequence[str] = ("qkv", "proj"),
        r: int = 16,
        lora_alpha: float | None = None,
        alignment: str = "local",
        tau: float = 0.05,
        ridge: float = 0.1,
        scale: float = 32.0,
        num_features: int | None = None,
        *,
        lora_dropout: float = 0.0,
        init: str = "newest",
        sought: int = 10,
    ) -> None:
        super().__init__()
        num_features = num_features or getattr(backbone, "num_features", None)
        if not isinstance(num_features, int):
            raise ValueError("num_features must be given for a backbone that has no attribute num_features")
        Drift(alignment, torch.zeros(0, 1), 0, tau=tau)  # refuses what it does not know now and not after a task
        fusion.start(init, [])
        self.backbone = backbone
        self.adapters = inject(backbone, target_modules, r, lora_alpha, lora_dropout)
        self.alignment, self.tau, self.ridge, self.init, self.sought = alignment, tau, ridge, init, sought
        self.coefficients = torch.empty(0, dtype=torch.float32)
        self.bank, self.head = PrototypeBank(num_features), CosineHead(scale)
        self.num_classes = 0  # width of the logits
        # One for each class of the task that is trained.
        self.directions = nn.Parameter(torch.zeros(0, num_features, dtype=torch.float32))
        self.register_buffer("task_classes", torch.zeros(0, dtype=torch.int64))
        self.to(next(backbone.parameters()).device)

    def parameters_to_train(self) -> list[nn.Parameter]:
        """The newest adapter's, and the directions of the task's classes.

        Raises:
            RuntimeError: there was no task yet.
        """
        if not self.adapters.names:
            raise RuntimeError("there is no task to train for yet: call add_task first")
        return [*self.adapters.parameters(self.adapters.names[-1]), self.directions]

    def add_task(self, classes: Iterable[int]) -> None:
        """A new adapter; it alone is active and trains.

        Raises:
            ValueError: no class is given, or a negative one.
            RuntimeError: the task before has not ended, whose adapter would stay in the mean half trained.
        """
        ids = sorted(classes)
        chosen = sorted({int(c) for c in ids})
        if not chosen or chosen[0] < 0 or any(c != int(c) for c in ids):
            raise ValueError(f"classes must hold at least one class to learn, of ids from 0, got {ids}")
        if begun := self.task_classes.tolist():
            raise RuntimeError(f"the task of classes {begun} has not ended: call end_task before the next add_task")
        self.add_adapter()
        with torch.inference_mode(False):
            self.task_classes = torch.tensor(chosen, device=self.directions.device)
            self.directions = nn.Parameter(self.directions.new_zeros(len(chosen), self.directions.shape[1]).normal_())
        self.num_classes = max(self.num_classes, chosen[-1] + 1)

    def add_adapter(self) -> str:
        """A new adapter, by its name; it alone is active and trains."""
        names = self.adapters.names
        name = f"task{len(names)}"
        self.adapters.add_adapter(name, init_from=fusion.start(self.init, names))
        return name

    @torch.no_grad()
    def start(self, batches: Batches) -> None:
        """Start the classifier that is trained with from the class means of these (images, labels) of the task.

        Random directions would first pull the features of every class elsewhere.

        Raises:
            ValueError: a label of another task, a class without an image, or features that are not finite.
        """
        self.eval()
        pairs = [(self.backbone(images).float(), self._local(labels)) for images, labels in batches]
        self._require_all({int(self.task_classes[c]) for _, local in pairs for c in local.unique()})
        features, local = (torch.cat(part) for part in zip(*pairs))
        means = class_means(features, local, len(self.task_classes))
        if not bool(means.isfinite().all()):
            raise ValueError("features must be finite, got inf or NaN; the cause may be the images or the backbone")
        self.directions.copy_(F.normalize(means))
        self.train()

    @torch.inference_mode(False)
    def end_task(self, batches: Batches) -> None:
        """Fuse all adapters, align the old prototypes to the fused model and add the new ones.

        A class that comes back has the mean of its aligned prototype and the new images, each by its number of images.

        Args:
            batches: (images, labels) of the task on the network's device, in any order. The model before the fusion and
                the model after it see the same images.

        Raises:
            ValueError: a label of another task, a class without an image, or features that are not finite; the task
                then goes on as if there had been no call.
            RuntimeError: no task has begun.
        """
        if not len(self.task_classes):
            raise RuntimeError("there is no task to end: call add_task first")
        state, before = self.adapters._state, (self.adapters._state.common, self.coefficients, self.training)
        self.eval()
        try:
            self._take_in(batches)
        except BaseException:
            state.set(before[0])
            self.coefficients = before[1]
            self.train(before[2])
            raise
        self.adapters.train_adapter(None)
        self.task_classes = self.task_classes[:0]
        self.directions = nn.Parameter(self.directions[:0].clone())

    @torch.no_grad()
    def _take_in(self, batches: Batches) -> None:
        """Fuses, and moves the prototypes on; what is wrong with the images shows before the bank has changed."""
        known, fresh = self.bank.classes, PrototypeBank(self.bank.num_features).to(self.bank.sums.device)
        if known:
            self.fuse(newest=False)
            before, drift = self.adapters.frozen(), self.drift(known, len(self.task_classes))
        self.fuse()
        sample = Sample()
        for images, labels in batches:
            features, local = self.backbone(images).float(), self._local(labels)
            if known:
                old = before(images).float()
                drift.add(old, features, local)
                if drift.kind.rows and self.sought:
                    sample.add(images, old, local)
            fresh.update(features, labels)
        self._require_all(fresh.classes)
        if sample.rows:
            images, old, local = sample.rows
            starts, wanted = targets(drift.prototypes, old, local, self.sought)
            for rows, aims in zip(starts.to(images.device).split(ROWS), wanted.split(ROWS)):
                moved = move(images[rows], aims, before)
                drift.add(before(moved).float(), self.backbone(moved).float(), None)
        if known:
            self.bank.set(known, drift.align())
        self.bank._add(fresh)

    def _require_all(self, seen: Collection[int]) -> None:
        """Raises ValueError unless every class of the task is among these."""
        if without := set(self.task_classes.tolist()).difference(seen):
            raise ValueError(f"batches must hold an image of each class of the task, got none of {sorted(without)}")

    def _local(self, labels: Tensor) -> Tensor:
        """Labels as numbers among the task's classes."""
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        labels = labels.to(torch.int64)  # torch knows little of uint16
        if len(wrong := labels[~torch.isin(labels, self.task_classes)]):
            raise ValueError(f"labels must be of the task's classes {self.task_classes.tolist()}, got {int(wrong[0])}")
        return torch.searchsorted(self.task_classes, labels)

    def fuse(self, coefficients: Tensor | None = None, newest: bool = True) -> None:
        """Makes the sum of all adapters, or of all but the newest, the active model; `coefficients`: default mean."""
        names = self.adapters.names[: None if newest else -1]
        self.coefficients = fusion.coefficients("mean", len(names)) if coefficients is None else coefficients
        self.activate(names, self.coefficients)

    def activate(self, names: Sequence[str], coefficients: Tensor) -> None:
        """Makes adapters the active ones, except those with coefficient 0: they would cost time and change nothing."""
        chosen = coefficients.nonzero().flatten().tolist()
        self.adapters.set_adapter([names[i] for i in chosen], coefficients[chosen])

    def drift(self, known: Sequence[int], num_classes: int, covariances: ClassCovariances | None = None) -> Drift:
        """How the prototypes, and `covariances`, of the classes `known` move, once it has seen a task's images."""
        old, rule = self.bank.select(known), self.alignment
        return Drift(rule, old, num_classes, tau=self.tau, ridge=self.ridge, covariances=covariances)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] among all classes seen; in training mode among those of the task that is trained.

        In evaluation mode in the midst of a task, its classes are those that are trained, under the newest adapter, and
        the old ones their prototypes, under the fused model of before.

        Raises:
            ValueError: in training, the backbone gives its adapters no gradient.
        """
        features, task = self.backbone(images).float(), self.task_classes
        if not len(task):
            return self._among_old(features)
        if self.training and torch.is_grad_enabled() and not features.requires_grad:
            require_gradient(features, self.adapters.parameters(self.adapters.names[-1]))
        with without_autocast(features.device.type):  # which would tie logits
            cosines = self.head.scale * F.linear(F.normalize(features), F.normalize(self.directions.float()))
        if self.training or not self.bank.classes:
            logits = cosines.new_full((len(images), self.num_classes), UNSEEN)
        else:
            logits = self._among_old(self._before(images)).to(cosines.dtype)
        return logits.index_copy(1, task, cosines)

    def _among_old(self, features: Tensor) -> Tensor:
        logits = self.head(features, self.bank.prototypes).clamp(min=UNSEEN)
        return F.pad(logits, (0, max(0, self.num_classes - logits.shape[1])), value=UNSEEN)

    def _before(self, images: Tensor) -> Tensor:
        """Features of the model that the newest adapter is not yet part of, whose prototypes the bank holds."""
        names = self.adapters.names[:-1]
        mean = fusion.coefficients("mean", len(names)).to(self.directions.device)
        with self.adapters._state.within(names=tuple(names), coefficients=mean, written=None, batch=None):
            features: Tensor = self.backbone(images)
        return features.float()

    def train(self, mode: bool = True) -> PLoRA:
        super().train(mode)
        hold_statistics(self.backbone)
        return self

    def get_extra_state(self) -> Tensor:
        """The settings as JSON in a tensor of bytes: whatever keeps state dicts keeps tensors."""
        names = ("alignment", "tau", "ridge", "init", "sought")
        settings = {name: getattr(self, name) for name in names}
        text = json.dumps({**settings, "r": self.adapters.r, "lora_alpha": self.adapters.lora_alpha})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        settings = json.loads(bytes(state.tolist()))
        self.adapters.r, self.adapters.lora_alpha = settings.pop("r"), settings.pop("lora_alpha")
        self.__dict__.update(settings)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over settings, the number of tasks and of classes; in the midst of a task also what it trains."""
        extra = prefix + "_extra_state"
        if extra in state_dict:  # before adapters are made by it
            self.set_extra_state(state_dict[extra])
        layer = next(iter(self.adapters.layers))
        first = next(iter(self.adapters.layers.values()))
        stem = f"{prefix}backbone.{layer}.lora_A." + (f"{next(iter(first.slices))}." if first.slices else "")
        saved = sum(key.startswith(stem) for key in state_dict)
        while len(self.adapters.names) < saved:
            self.add_adapter()
        device = self.directions.device
        for name in ("task_classes", "directions"):
            if isinstance(value := state_dict.get(prefix + name), Tensor):
                value = value.detach().clone().to(device)
                setattr(self, name, nn.Parameter(value) if name == "directions" else value)
        counts = state_dict.get(f"{prefix}bank.counts")
        if isinstance(counts, Tensor):
            classes = [len(counts), *(int(c) + 1 for c in self.task_classes.tolist())]
            self.num_classes = max(self.num_classes, *classes)
        if saved and len(self.task_classes):
            self.adapters.set_adapter(self.adapters.names[-1])
            self.adapters.train_adapter(self.adapters.names[-1])
        elif saved:
            self.fuse()
            self.adapters.train_adapter(None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing: list[str] = args[2]
        missing[:] = [key for key in missing if key != extra]  # a file of 0.1
