"""InfLoRA (Liang & Li, CVPR 2024): adapters that cannot move what earlier tasks fed into a layer.

Before task t the A of the new adapter is designed and frozen; only B trains. With G_t = mean of x x' over the layer's
inputs on the task's images, and M an orthonormal basis of the input subspace of earlier tasks,

    A_t = (first r left singular vectors of (I - M M') G_t)' / sqrt(3)

so that the change B_t A_t vanishes on M, and the fused model is the plain sum over tasks. After the task M grows by the
fewest singular vectors of (I - M M') G_t, the inputs taken anew, with which M explains a share e_t of |G_t|_F^2, where
e_t rises evenly from the setting `subspace` to 1 over the tasks (DualGPM, kept here as M alone: its other form, the
orthogonal complement, is the same projection). Formulas and constants follow the authors' code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plora_ext.cil.distributed import SINGLE, World
from plora_ext.nn import Adapters


class InputGrams:
    """G of every adapted layer, over whatever passes through the model inside the `with` block."""

    def __init__(self, adapters: Adapters):
        self._layers = adapters.layers
        self._sums: dict[str, Tensor] = {}
        self._rows = dict.fromkeys(adapters.layers, 0)

    def __enter__(self) -> InputGrams:
        self._hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._add(name, inputs[0]))
            for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):  # the pass may have it, sums over all rows must not
            gram = rows.T @ rows
        self._sums[name] = self._sums[name] + gram if name in self._sums else gram
        self._rows[name] += len(rows)

    def means(self, world: World = SINGLE) -> dict[str, Tensor]:
        """G by layer name, float32 [in, in]; over what passed in all processes of `world`.

        Raises:
            FloatingPointError: An input, or the sum of its squares, was not finite; names the layer.
        """
        rows = torch.tensor([self._rows[name] for name in self._sums])
        world.sum_(rows, *self._sums.values())
        sound = torch.stack([total.isfinite().all() for total in self._sums.values()]).tolist()
        if spoilt := [name for name, fine in zip(self._sums, sound) if not fine]:
            more = f" and of {len(spoilt) - 1} layers more" if len(spoilt) > 1 else ""
            raise FloatingPointError(
                f"inputs of the layer {spoilt[0]}{more} are not finite, or their squares are not; the cause may be the "
                "images, the backbone's weights, or a training that diverged"
            )
        return {name: total / number for (name, total), number in zip(self._sums.items(), rows.tolist())}


class Subspaces:
    """M of every layer.

    Attributes:
        bases: By layer name: float32 [in, k] with orthonormal columns.
    """

    def __init__(self) -> None:
        self.bases: dict[str, Tensor] = {}

    @torch.no_grad()
    def design(self, adapters: Adapters, name: str, grams: dict[str, Tensor]) -> None:
        """Sets and freezes the A of adapter `name` in every layer; what is left to train are the Bs."""
        for key, layer in adapters.layers.items():
            directions = torch.linalg.svd(self._outside(key, grams[key]))[0]
            for A, _ in layer.pairs(name):
                A.copy_(directions[:, : len(A)].T / math.sqrt(3))
                A.requires_grad_(False)

    @torch.no_grad()
    def grow(self, grams: dict[str, Tensor], share: float) -> None:
        """Extends every M until it explains `share` of |G|_F^2."""
        for key, gram in grams.items():
            outside = self._outside(key, gram)
            directions, values, _ = torch.linalg.svd(outside)
            total = gram.double().square().sum()
            explained = 1 - outside.double().square().sum() / total
            after = explained + (values.double().square() / total).cumsum(0)
            if key in self.bases:
                number = 0 if explained >= share else int((after < share).sum()) + 1
                # never more than there are dimensions
                number = min(number, len(gram) - self.bases[key].shape[1])
                self.bases[key] = torch.cat([self.bases[key], directions[:, :number]], 1)
            else:
                self.bases[key] = directions[:, : max(int((after < share).sum()), 1)]

    def _outside(self, key: str, gram: Tensor) -> Tensor:
        basis = self.bases.get(key)
        return gram if basis is None else gram - basis @ (basis.T @ gram)


def share_after(task: int, num_tasks: int, first: float) -> float:
    """e_t of task `task`, counted from 0: from `first` towards 1."""
    return first + (1 - first) * task / num_tasks
