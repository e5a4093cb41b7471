"""Formulas of the prototype operators in torch: gradients, for devices without a compiled backward, and the completion
of prototypes without a look at the tasks, for what the compiled operator does not serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plora_ext.ops.checks import wide
from plora_ext.reference import EPS
from plora_ext.torch_private import softmax_backward

SCORES = 2**22  # of the softmax, at most so many at a time


def unit(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms, and the norms."""
    norm = x.to(dtype).norm(dim=-1, keepdim=True).clamp_min(EPS)
    return x.to(dtype) / norm, norm


def through_unit(d: Tensor, u: Tensor, norm: Tensor) -> Tensor:
    """The gradient before normalisation; below eps the norm is a constant."""
    return torch.where(norm > EPS, d - (d * u).sum(-1, keepdim=True) * u, d) / norm


def reconstruct_prototypes(
    grad: Tensor, old: Tensor, new: Tensor, values: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of old, new and values, a block of old classes after the other, so that no Co x Cn matrix is held."""
    kept = wide(old.dtype)
    (q, q_norm), (k, k_norm), v, g = unit(old, kept), unit(new, kept), values.to(kept), grad.to(kept)
    dq, dk, dv, k_scaled = [q[:0]], torch.zeros_like(k), torch.zeros_like(v), k / tau
    rows = max(256, SCORES // max(len(k), 1))
    for i in range(0, len(q), rows):
        q_i, g_i = q[i : i + rows], g[i : i + rows]
        p = torch.softmax(q_i @ k_scaled.T, dim=-1)
        ds = softmax_backward(p, g_i @ v.T)
        dq.append(ds @ k_scaled)
        dk, dv = dk.addmm(ds.T, q_i), dv.addmm(p.T, g_i)
    d_old, d_new = through_unit(torch.cat(dq), q, q_norm), through_unit(dk / tau, k, k_norm)
    return d_old.to(old.dtype), d_new.to(new.dtype), dv.to(values.dtype)


def _seen(prototypes: Tensor, task_of_class: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries [C, T] are real, and the prototypes with ones for the others, which may be anything."""
    real = task_of_class[:, None] >= torch.arange(prototypes.shape[1], device=task_of_class.device)
    return real, prototypes.to(wide(prototypes.dtype)).masked_fill(~real[..., None], 1)


def completed_prototypes(prototypes: Tensor, task_of_class: Tensor, tau: float, last: bool) -> Tensor:
    """`plora_ext.reference.complete_prototypes` with the same products whatever the tasks are: to trace and to map."""
    real, seen = _seen(prototypes, task_of_class)
    subspaces = seen.unbind(1)
    u, _ = unit(seen, seen.dtype)
    own = task_of_class[:, None] == torch.arange(len(subspaces), device=task_of_class.device)
    scores = (u * own[..., None]).flatten(1) @ u.flatten(1).T / tau  # of every class in its own subspace
    result = []
    for j, values in enumerate(subspaces):
        keys = real[:, j]
        some = keys.any()
        p = torch.softmax(scores.masked_fill(~keys & some, -torch.inf), -1)
        filled = ~keys & some if j == len(subspaces) - 1 or not last else torch.zeros_like(keys)
        result.append(torch.where(filled[:, None], (p @ values).to(prototypes.dtype), prototypes[:, j]))
    return torch.stack(result, 1) if result else prototypes.clone()


def complete_prototypes(grad: Tensor, prototypes: Tensor, task_of_class: Tensor, tau: float, last: bool) -> Tensor:
    """Of prototypes: all pairs of classes at once, some subspaces after the other, without looking at the tasks."""
    kept = wide(prototypes.dtype)
    C, T, _ = prototypes.shape
    real, seen = _seen(prototypes, task_of_class)
    u, norm = unit(seen, kept)
    subspaces = torch.arange(T, device=grad.device)
    own = (task_of_class[:, None] == subspaces).to(kept)[..., None]  # [C, T, 1]
    q = (u * own).flatten(1)  # every class in its own subspace
    scores, dcos = q @ u.flatten(1).T / tau, q.new_zeros(C, C)
    keys = real.T  # [T, C]
    filled = ~keys & keys.any(1, keepdim=True)
    if last:
        filled = filled & (subspaces[:, None] == T - 1)
    g = grad.to(kept).transpose(0, 1) * filled[..., None]  # [T, C, D]
    v = seen.transpose(0, 1)
    dv, count = [v[:0]], max(1, SCORES // max(C * C, 1))
    for first in range(0, T, count):
        j = slice(first, first + count)
        p = torch.softmax(scores.masked_fill(~keys[j, None], -torch.inf), -1).nan_to_num(0)
        dcos = dcos + softmax_backward(p, g[j] @ v[j].mT).sum(0)
        dv.append(p.mT @ g[j])
    dcos = dcos / tau
    du = (dcos @ u.flatten(1)).view_as(u) * own + (dcos.T @ q).view_as(u)
    direct = grad.to(kept).masked_fill(filled.T[..., None], 0)
    return (direct + through_unit(du, u, norm) + torch.cat(dv).transpose(0, 1)).to(prototypes.dtype)
