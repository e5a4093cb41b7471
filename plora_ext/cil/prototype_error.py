"""How far the prototypes of old classes are from the true class means: measured beside a run, no method learns of it.

For the old classes c, with m_c the mean feature of c's training images under the model after the task, p_c the
prototype held when the task began and p'_c the one that the task left,

    before   mean_c 1 - cos(p_c, m_c)             what the change of the model would cost
    after    mean_c 1 - cos(p'_c, m_c)            what is left of it after the alignment
    spacing  mean_c min_k!=c 1 - cos(m_c, m_k)    the distance to the nearest other class, the scale of the two

Distances are those by which the classifier decides, 0 for the same direction and 1 for orthogonal ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plora_ext.cil.alignment import class_means
from plora_ext.cil.methods import Method
from plora_ext.cil.stream import Task
from plora_ext.data import View


def prototype_drift(prototypes: Tensor, means: Tensor) -> float:
    """mean_c 1 - cos(p_c, m_c) of prototypes [C, D] and means [C, D]."""
    return float((1 - F.cosine_similarity(prototypes.double(), means.double())).mean())


def spacing(means: Tensor, old: int) -> float:
    """mean_c min_k!=c 1 - cos(m_c, m_k), over the first `old` classes c and all k of means [C, D]."""
    unit = F.normalize(means.double())
    nearest = []
    for rows in torch.arange(old, device=unit.device).split(1024):
        cosines = (unit[rows] @ unit.T).scatter_(1, rows[:, None], -1)
        nearest.append(cosines.amax(1))
    return float((1 - torch.cat(nearest)).mean())


@torch.no_grad()
def measure(method: Method, tasks: Sequence[Task], train: View, held: Tensor | None) -> dict[str, float] | None:
    """before, after and spacing once the last of `tasks` is learned; a pass over the training images of the others.

    Args:
        train: The training images of the whole run.
        held: The prototypes when the last task began.

    Returns:
        None where there are no old classes, or no single feature space to compare them in (plora-ensemble).
    """
    now = method.prototypes
    if held is None or now is None or now.dim() != 2:
        return None
    true = []
    for task in tasks[:-1]:
        own = method.world.rows(len(task.train)).numpy()
        labels = torch.from_numpy(task.train_labels[own] - task.classes.start).to(now.device)
        features = method.features(train[torch.from_numpy(task.train[own])])
        true.append(class_means(features, labels, len(task.classes), method.world))
    means, old = torch.cat(true), len(held)
    everything = torch.cat([means, now[old:]])  # the prototypes of new classes are their means
    return {
        "before": prototype_drift(held, means),
        "after": prototype_drift(now[:old], means),
        "spacing": spacing(everything, old),
    }
