"""Classification of images by what a method has learned, and its accuracy over all classes seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plora_ext.cil import metrics
from plora_ext.cil.features import FeatureCache
from plora_ext.cil.methods import Method
from plora_ext.cil.stream import Task
from plora_ext.data import View

AT_ONCE = 4096  # images whose kept features are put together at a time
FEATURES = 2**18  # images whose features are computed before they are classified
LOGITS = 2**22  # at a time: 16 MiB, and a few times that in between


def classify(method: Method, images: View, rows: Tensor, classes: int, top: int = 1) -> Tensor:
    """The best classes of each image among `rows` (int64 [n]), best first, in every process: float64 [n, top, 3].

    Each is its class, its logit, and its share of the softmax over all classes seen.

    Args:
        classes: How many have been seen.
        top: At most `classes`.
    """

    def best(logits: Tensor) -> Tensor:
        chosen = logits.argmax(-1, keepdim=True)
        if top > 1:
            chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top]
        values, sums = logits.gather(-1, chosen).double(), logits.double().logsumexp(-1, keepdim=True)
        return torch.stack([chosen.double(), values, (values - sums).exp()], -1)

    return method.world.spread(lambda own: torch.cat([*map(best, _logits(method, images, own, classes))]), rows)


def predict(
    method: Method, images: View, rows: Tensor, among: Sequence[int], cache: FeatureCache | None = None
) -> Tensor:
    """The class of each image of `rows` among the first `among[i]` classes seen, everywhere: int64 [n, len(among)].

    -1 where its features are not finite.

    Args:
        cache: Keeps features of images under adapters that stay as they are.
    """

    def chosen(logits: Tensor) -> Tensor:
        best = torch.stack([logits[:, :classes].argmax(-1) for classes in among], -1)
        return best.masked_fill(logits.isnan().any(-1, keepdim=True), -1)

    return method.world.spread(
        lambda own: torch.cat([*map(chosen, _logits(method, images, own, among[-1], cache))]), rows
    )


def _logits(
    method: Method, images: View, rows: Tensor, classes: int, cache: FeatureCache | None = None
) -> Iterator[Tensor]:
    """Part by part: neither all features nor the logits of all images for all classes need fit into memory."""
    spaces = method.spaces() if cache else None
    if cache is None or spaces is None:
        at_once = max(1, LOGITS // classes)
        parts = (f for part in rows.split(FEATURES) for f in method.features(images[part]).split(at_once))
    else:  # features under all adapters
        parts = (cache(images[part], spaces, method.features_in) for part in rows.split(AT_ONCE))
    return map(method.logits, parts)


@dataclass
class Evaluator:
    """Accuracy over all classes seen; `cache` keeps features of test images where old adapters stay as they are.

    `tasks` are those that the method learns: for joint one, of all classes of `task_of_class`.
    """

    method: Method
    tasks: Sequence[Task]
    images: View
    task_of_class: np.ndarray
    cache: FeatureCache | None = None

    def after(self, task: int) -> tuple[list[float], list[float]]:
        """A_b for each task of the stream whose classes `task` brought, and the row of the matrix after the last.

        Several are joint's: A_b is over the classes up to b and among them alone, as if none had come after them.
        """
        seen = self.tasks[: task + 1]
        # A process has the same images after every task, for more come behind: it finds their kept features.
        rows, new = torch.from_numpy(np.concatenate([t.test for t in seen])), seen[-1].classes
        among = [end for end in np.bincount(self.task_of_class).cumsum().tolist() if new.start < end <= new.stop]
        predicted = predict(self.method, self.images, rows, among, self.cache).cpu().numpy()
        if (number := int((predicted[:, -1] < 0).sum())) and self.method.world.first:
            said = f"{number} of {len(rows)} test images have features that are not finite, and count as wrong"
            self.method.trainer.callbacks.note(said)
        labels = np.concatenate([t.test_labels for t in seen])
        correct = (predicted == labels[:, None]).astype(np.float64)
        curve = [100.0 * float(correct[labels < end, i].mean()) for i, end in enumerate(among)]
        return curve, metrics.task_accuracies(correct[:, -1], self.task_of_class[labels])
