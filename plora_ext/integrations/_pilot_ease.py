"""EASE in LAMDA-PILOT: `backbone/vit_ease.py`, `backbone/linears.py` and `models/ease.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.data.resample import to_device
from plora_ext.graphs import Captured, why_not
from plora_ext.integrations._layers import kept_on_device
from plora_ext.integrations._patch import Original
from plora_ext.integrations._pilot_vit import (
    adapter_features,
    best_classes,
    class_means,
    draw_as_if_read,
    features_of,
    is_served,
    training_features,
    trains_plainly,
)


def subspaces_of(vit: Any, use_init_ptm: bool) -> list[Any]:
    """EASE's adapters in the order of its feature blocks."""
    return [*([None] if use_init_ptm else []), *vit.adapter_list, vit.cur_adapter]


# ---------------------------------------------------------------------- backbone/vit_ease.py


def forward_test(original: Original, self: Any, x: Tensor, use_init_ptm: bool = False) -> list[Tensor]:
    if not is_served(self):
        return original(self, x, use_init_ptm)
    return adapter_features(self, x, subspaces_of(self, use_init_ptm), class_token_only=False)


def forward(original: Original, self: Any, x: Tensor, test: bool = False, use_init_ptm: bool = False) -> Tensor:
    if not test and trains_plainly(self):
        return training_features(self, x)
    if not test or not is_served(self):
        return original(self, x, test, use_init_ptm)
    return torch.cat(adapter_features(self, x, subspaces_of(self, use_init_ptm)), dim=2)[:, 0]


def forward_proto(original: Original, self: Any, x: Tensor, adapt_index: int) -> Tensor:
    if not is_served(self):
        return original(self, x, adapt_index)
    old = self.adapter_list
    chosen = None if adapt_index == -1 else old[adapt_index] if adapt_index < len(old) else self.cur_adapter
    return adapter_features(self, x, [chosen])[0][:, 0]


def add_adapter_to_list(original: Original, self: Any) -> None:
    if isinstance(self.adapter_list, list):  # which state_dict(), .to() and .eval() do not see
        self.adapter_list = nn.ModuleList(self.adapter_list)
    original(self)


def load_from_state_dict(
    original: Original, self: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
    missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
) -> None:  # fmt: skip
    """A network that has seen fewer tasks grows to those of the file."""
    saved = {key[len(prefix) :].split(".")[1] for key in state_dict if key.startswith(prefix + "adapter_list.")}
    while len(self.adapter_list) < len(saved):
        self.add_adapter_to_list()
    original(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


# ---------------------------------------------------------------------- models/ease.py


def init_train(
    original: Original, self: Any, train_loader: Any, test_loader: Any, optimizer: Any, scheduler: Any
) -> None:
    """PILOT's loop over the epochs of a task; it waits for the device once in each, not three times a step."""
    from tqdm import tqdm  # as PILOT does

    network, device, known = self._network, self._device, self._known_classes
    if self.moni_adam or isinstance(network, nn.DataParallel):
        return original(self, train_loader, test_loader, optimizer, scheduler)
    epochs = self.args["init_epochs" if self._cur_task == 0 or self.init_cls == self.inc else "later_epochs"]
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def gradients(images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        torch.clear_autocast_cache()  # a graph would go on with the casts of these weights
        logits = network(images, test=False)["logits"]
        wanted = (labels - known).clamp(min=-1)
        loss = F.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        return torch.stack([loss.detach(), (logits.argmax(1) == wanted).sum()]), [p.grad for p in learned]

    captured = Captured(gradients, tried=lambda made: logging.info(f"CUDA graph of EASE's step: {made.report()}"))
    step = gradients if why_not(network, learned) else captured
    progress, info = tqdm(range(epochs)), ""
    for epoch in progress:
        network.train()
        sums, total = torch.zeros(2, dtype=torch.float64, device=device), 0
        for _, images, labels in train_loader:
            found, grads = step(*(to_device(t, device) for t in (images, labels)))
            for parameter, grad in zip(learned, grads):
                parameter.grad = grad  # a graph's own, also after a batch that ran without it
            optimizer.step()
            sums += found
            total += len(labels)
        if scheduler:
            scheduler.step()
        loss, right = sums.tolist()
        accuracy = np.around(right * 100 / total, decimals=2)
        info = (
            f"Task {self._cur_task}, Epoch {epoch + 1}/{epochs} => Loss {loss / len(train_loader):.3f}, "
            f"Train_accy {accuracy:.2f}"
        )
        progress.set_description(info)
    optimizer.zero_grad()  # the graph's memory
    logging.info(info)


def replace_fc(original: Original, self: Any, train_loader: Any) -> None:
    network = self._network.eval()
    if self.moni_adam or self.use_exemplars or not is_served(network.backbone):
        return original(self, train_loader)
    subspaces, D = subspaces_of(network.backbone, self.use_init_ptm), network.out_dim
    # The diagonal alone: the frozen backbone, if it is used, and the newest adapter.
    wanted = [i for i, a in enumerate(subspaces) if not self.use_diagonal or a is None or i == len(subspaces) - 1]
    labels = self.train_dataset_for_protonet.labels
    chosen = [subspaces[i] for i in wanted]
    classes, means = class_means(network.backbone, train_loader, labels, chosen, self._device)
    for _ in wanted[1:]:
        draw_as_if_read(train_loader)
    with torch.no_grad():
        for i, of_subspace in zip(wanted, means):
            network.fc.weight[classes, i * D : (i + 1) * D] = of_subspace
    if self.use_diagonal:
        return None
    return self.solve_sim_reset() if self.recalc_sim else self.solve_similarity()


def solve(original: Original, self: Any, *, mode: str) -> None:
    if self.moni_adam:
        return original(self)
    weight, D = self._network.fc.weight.data, self._network.out_dim
    blocks = weight.view(len(weight), -1, D)[:, int(self.use_init_ptm) :]  # the frozen backbone's are all real
    tasks = _task_of_class(len(weight), self.init_cls, self.inc, weight.device)
    blocks.copy_(ops.complete_prototypes(blocks, tasks, tau=1.0, mode=mode))
    return None


@kept_on_device
def _task_of_class(num_classes: int, init_cls: int, inc: int, device: torch.device) -> Tensor:
    return ((torch.arange(num_classes) - init_cls).div(inc, rounding_mode="floor") + 1).clamp_(min=0).to(device)


@kept_on_device
def _reweights(
    num_classes: int, blocks: int, cur_task: int, alpha: float, beta: float, init_cls: int, inc: int, ptm: bool,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """What `forward_reweight` multiplies the cosine of a class with in every block."""
    weights = torch.full((num_classes, blocks), alpha / max(cur_task, 1), dtype=torch.float32)
    own = _task_of_class(num_classes, init_cls, inc, torch.device("cpu")) + int(ptm)
    weights.scatter_(1, own[:, None].clamp(max=blocks - 1), 1.0)
    if ptm:
        weights[:, 0] = beta
    return weights.to(device)


def reweight(
    original: Original,
    self: Any,
    input: Tensor,
    cur_task: int,
    alpha: float = 0.1,
    beta: float = 0.0,
    init_cls: int = 10,
    inc: int = 10,
    out_dim: int = 768,
    use_init_ptm: bool = False,
) -> dict[str, Tensor]:
    if self.to_reduce or self.nb_proxy != 1 or self.in_features % out_dim or input.shape[1] != self.in_features:
        return original(self, input, cur_task, alpha, beta, init_cls, inc, out_dim, use_init_ptm)
    seen = min(len(self.weight), init_cls + cur_task * inc)
    prototypes = self.weight[:seen].view(seen, -1, out_dim)
    weights = _reweights(seen, prototypes.shape[1], cur_task, alpha, beta, init_cls, inc, use_init_ptm, input.device)
    logits = ops.subspace_logits(input.to(prototypes.dtype).view(len(input), -1, out_dim), prototypes, weights)
    return {"logits": logits if self.sigma is None else self.sigma * logits}


def eval_cnn(original: Original, self: Any, loader: Any, *, cache: bool) -> tuple[np.ndarray, np.ndarray]:
    network = self._network.eval()
    if isinstance(network, nn.DataParallel) or not is_served(network.backbone):
        return original(self, loader)
    own_task, given_task = [], []

    def outputs() -> Iterator[tuple[Tensor, Tensor]]:
        for features, labels in features_of(self, loader, cache, subspaces_of(network.backbone, self.use_init_ptm)):
            logits = _logits(network, features)
            labels = labels.to(logits.device)
            task_ids = (labels - self.init_cls).div(self.inc, rounding_mode="floor") + 1
            inside = torch.where(_window(task_ids, logits.shape[1], self.init_cls, self.inc), logits, 0)
            best = logits.max(dim=1)[1]
            own_task.append(((best - self.init_cls).div(self.inc, rounding_mode="floor") + 1) == task_ids)
            given_task.append(inside.max(dim=1)[1] == labels)
            yield logits, labels

    predicted = best_classes(self, outputs())
    for text, right in (("Task correct: {}", own_task), ("Task acc: {}", given_task)):
        logging.info(text.format(torch.cat(right).sum().cpu().numpy() * 100 / len(torch.cat(right))))
    return predicted


def _window(task_ids: Tensor, num_classes: int, init_cls: int, inc: int) -> Tensor:
    """The logits [B, num_classes] that PILOT's "Task acc" leaves, others are 0: those of each image's task.

    A first task of more classes than the later ones has ids below 0 too, and PILOT slices by these as by any: `inc`
    classes about the image's own, from the end where that begins below 0.
    """
    stops = init_cls + task_ids[:, None] * inc
    starts = torch.where(task_ids[:, None] == 0, 0, stops - inc)
    starts = torch.where(starts < 0, (starts + num_classes).clamp(min=0), starts)
    classes = torch.arange(num_classes, device=task_ids.device)
    return (starts <= classes) & (classes < stops)


def _logits(network: Any, features: Tensor) -> Tensor:
    """`EaseNet.forward` from its features on."""
    if network.args["moni_adam"] or not network.args["use_reweight"]:
        return network.fc(features)["logits"]
    of_network = {name: getattr(network, name) for name in ("alpha", "beta", "init_cls", "inc", "use_init_ptm")}
    reweighted = network.fc.forward_reweight(
        features, cur_task=network._cur_task, out_dim=network.out_dim, **of_network
    )
    return reweighted["logits"]
