"""Coefficients of the fused model: the weight change of a layer is the sum over tasks i of c_i s B_i A_i.

The sum is exact (adapters are concatenated along their rank, never averaged factor by factor), so a fusion rule is only
a choice of c.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def coefficients(
    rule: str, num_tasks: int, *, task_means: Tensor | None = None, tau: float = 0.1, magnitudes: Tensor | None = None
) -> Tensor:
    """Coefficients c of `num_tasks` adapters by `rule`; float32 [num_tasks].

    - mean: c_i = 1 / T.
    - sum: c_i = 1.
    - newest: c_T = 1, all others 0: the newest adapter alone. Where it starts from the one before it (`init: newest`),
      this is one adapter trained on and on, as in SLCA (ICCV 2023) and SLDC (AAAI 2026).
    - similarity: c = softmax_i(cos(m_T, m_i) / tau), with m_i the mean feature of task i under the frozen backbone,
      the one space in which the means of all tasks can be compared (the similarity mixture of MIN, NeurIPS 2025).
    - learned: c = `magnitudes`, trained beside the newest adapter while the older ones are reduced to directions
      (SD-LoRA, ICLR 2025).

    Args:
        task_means: [num_tasks, D], the newest last; for similarity.
        magnitudes: [num_tasks]; for learned.

    Raises:
        ValueError: An unknown rule, or one whose own input is missing or of another length.
    """
    if rule == "mean":
        return torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float32)
    if rule == "sum":
        return torch.ones(num_tasks, dtype=torch.float32)
    if rule == "newest":
        return F.one_hot(torch.tensor(num_tasks - 1), num_tasks).float()
    needed = {"similarity": ("task_means", task_means), "learned": ("magnitudes", magnitudes)}
    if rule not in needed:
        raise ValueError(f"rule must be mean, sum, newest, similarity or learned, got {rule!r}")
    what, given = needed[rule]
    if given is None or len(given) != num_tasks:
        came = None if given is None else len(given)
        raise ValueError(f"fusion {rule!r} needs {what} of {num_tasks} tasks, got {came}")
    if rule == "similarity":
        return torch.softmax(F.cosine_similarity(given[-1:].float(), given.float()) / tau, dim=0)
    return given


def start(init: str, names: Sequence[str]) -> str | None:
    """The adapter, among those of earlier tasks, that a new one starts from; None: from nothing.

    From the newest one, adapters are points along one path of training and `mean` is the mean of that path (stochastic
    weight averaging, Izmailov et al., UAI 2018, with a point for each task).

    Raises:
        ValueError: An unknown init.
    """
    chosen = {"newest": names[-1:], "first": names[:1], "fresh": (), "inflora": ()}
    if init not in chosen:
        raise ValueError(f"init must be newest, first or fresh, got {init!r}")
    return next(iter(chosen[init]), None)


@torch.no_grad()
def to_directions(parameters: Sequence[nn.Parameter]) -> None:
    """Scales the A and the B of every layer to Frobenius norm 1, in place: SD-LoRA keeps only their direction."""
    for parameter in parameters:
        parameter.div_(parameter.norm().clamp_min(torch.finfo(parameter.dtype).tiny))
