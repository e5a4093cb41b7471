"""The low-rank operators' benchmarks: inputs, and the forms of each computation, ours and those people write."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from harness import BASE, DEVICE, Form, Step
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.bench import OURS
from plora_ext.nn import MultiLoRALinear

DTYPE, SCALE = torch.bfloat16, 0.5
PLAIN, MASKED, MERGE = "plain torch", "concatenated, masked", "merge"
Layer = tuple[int, int]  # in, out


class Problem:
    """One set of inputs: a frozen layer, x and T adapters; `ids` has one for each row, or one for each image.

    What a batch needs once for all layers is made here: of ours the `AdapterBatch`, of others the order of the rows.
    """

    def __init__(
        self, rows: int, layer: Layer, r: int, T: int, ids: Tensor | None = None, train: str = "",
        device: str = DEVICE, dtype: torch.dtype = DTYPE,
    ) -> None:  # fmt: skip
        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype) * std

        n_in, out = layer
        self.x, self.y, self.grad = draw(rows, n_in), draw(rows, out), draw(rows, out)
        self.weight, self.bias = draw(out, n_in, std=n_in**-0.5), draw(out)
        self.A, self.B = draw(T, r, n_in, std=n_in**-0.5), draw(T, out, r, std=r**-0.5)
        self.scaling, self.coeff = torch.full((T,), SCALE, device=device), torch.rand(T, device=device) + 0.5
        self.A_cat, self.B_cat = self.A.flatten(0, 1), self.B.transpose(1, 2).flatten(0, 1)  # [T r, in], [T r, out]
        self.A_new, self.B_new = self.A[-1].clone(), self.B[-1].clone()
        self.ids = self.image_ids = None
        if ids is not None:
            self.given_ids = ops.AdapterBatch(ids, T)
            self.image_ids = ids if len(ids) < rows else None
            self.ids = ids.repeat_interleave(rows // len(ids))
            self.mask = F.one_hot(self.ids, T).to(dtype).repeat_interleave(r, 1)
            self.counts = self.ids.bincount(minlength=T).tolist()
            self.ends = self.ids.bincount(minlength=T).cumsum(0).int()
            self.sorted = bool((self.ids.diff() >= 0).all())
            self.order = self.ids.argsort(stable=True)
            self.names = [f"t{t}" for t in ids.tolist()]
        for name in train.split():
            getattr(self, name).requires_grad_()

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.A, self.B, self.scaling

    @property
    def layer(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}

    def by_image(self, t: Tensor) -> Tensor:
        """Rows [M, D], as [images, rows, D] where ids are those of images."""
        return t if self.image_ids is None else t.view(len(self.image_ids), -1, t.shape[1])

    @functools.cached_property
    def outputs(self) -> Tensor:
        """Where those of all adapters go."""
        return torch.empty(len(self.A), *self.y.shape, device=self.y.device, dtype=self.y.dtype)

    @functools.cached_property
    def linear(self) -> nn.Linear:
        layer = nn.Linear(1, 1)
        layer.out_features, layer.in_features = self.weight.shape
        layer.weight, layer.bias = (nn.Parameter(t, requires_grad=False) for t in (self.weight, self.bias))
        return layer

    @functools.cached_property
    def ours(self) -> MultiLoRALinear:
        layer = MultiLoRALinear(self.linear)
        layer.add_adapter("t0", [(self.A[0], self.B[0])], lora_alpha=SCALE * self.A.shape[1])
        layer.set_adapter(["t0"])
        for parameter in layer.pairs("t0")[0]:
            parameter.requires_grad_()
        return layer

    @functools.cached_property
    def peft(self) -> Any:
        model = nn.Sequential(self.linear)
        return peft_model(model, "0", {"0": (self.A.detach(), self.B.detach())}).get_base_model()[0]


def peft_model(model: nn.Module, targets: str, factors: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """`model` in PEFT, with adapters t0, t1, ... of the given factors, in their dtype."""
    import peft

    T, r = next(iter(factors.values()))[0].shape[:2]
    config = peft.LoraConfig(r=r, lora_alpha=int(SCALE * r), target_modules=targets)
    wrapped = peft.get_peft_model(model, config, "t0")
    for t in range(1, T):
        wrapped.add_adapter(f"t{t}", config)
    wrapped.to(next(iter(factors.values()))[0].dtype)  # PEFT's default is float32 adapters, which are slower
    for name, (A, B) in factors.items():
        layer: Any = wrapped.get_base_model().get_submodule(name)
        for t in range(T):
            layer.lora_A[f"t{t}"].weight.data.copy_(A[t])
            layer.lora_B[f"t{t}"].weight.data.copy_(B[t])
    return wrapped.eval()


# ---------------------------------------------------------------------- the forms of each computation


def base(p: Problem) -> Tensor:
    return F.linear(p.x, p.weight, p.bias)


def ours_indexed(p: Problem) -> Tensor:
    return ops.lora_indexed(p.by_image(p.x), p.given_ids, *p.factors, **p.layer)


def ours_summed(p: Problem, **options: Any) -> Tensor:
    return ops.lora_sum(p.x, *p.factors, **p.layer, **options)


def bmm(p: Problem, y: Tensor) -> Tensor:
    """Batched products, an image each with its factors gathered; or a segment each, where all are of one length."""
    A, B = (p.A, p.B) if p.image_ids is None else (p.A[p.image_ids], p.B[p.image_ids])
    h = torch.bmm(p.x.view(len(A), -1, p.x.shape[1]), A.transpose(1, 2))
    return y.view(*h.shape[:2], -1).baddbmm_(h, B.transpose(1, 2), alpha=SCALE)


def grouped(p: Problem, y: Tensor) -> Tensor:
    """Grouped products of the rows in the order of their adapters."""
    product: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    h = product(p.x if p.sorted else p.x[p.order], p.A.transpose(1, 2), offs=p.ends)
    delta = product(h, p.B.transpose(1, 2), offs=p.ends)
    return y.add_(delta, alpha=SCALE) if p.sorted else y.index_add_(0, p.order, delta, alpha=SCALE)


def masked(p: Problem, y: Tensor) -> Tensor:
    """All adapters on all rows; a mask keeps each row's own."""
    return y.addmm_(F.linear(p.x, p.A_cat) * p.mask, p.B_cat, alpha=SCALE)


def masked_apart(p: Problem) -> Tensor:
    """From factors that are concatenated each time, so that each adapter's get their gradients."""
    h = F.linear(p.x, p.A.flatten(0, 1)) * p.mask
    return base(p).addmm_(h, p.B.transpose(1, 2).flatten(0, 1), alpha=SCALE)


def loop(p: Problem, y: Tensor) -> Tensor:
    if p.sorted:
        for x, part, A, B in zip(p.x.split(p.counts), y.split(p.counts), p.A, p.B):
            part.addmm_(x @ A.T, B.T, alpha=SCALE)
    else:
        for rows, A, B in zip(p.order.split(p.counts), p.A, p.B):
            y.index_add_(0, rows, (p.x[rows] @ A.T) @ B.T, alpha=SCALE)
    return y


def gathered(p: Problem) -> Tensor:
    h = torch.bmm(p.A[p.ids], p.x[:, :, None])
    return base(p).add_(torch.bmm(p.B[p.ids], h)[:, :, 0], alpha=SCALE)


def weights(p: Problem) -> Tensor:
    return (p.coeff * p.scaling).repeat_interleave(p.A.shape[1]).to(p.x.dtype)


def summed(p: Problem, A: Tensor, B: Tensor) -> Tensor:
    """All adapters on all rows as one product of the concatenated factors."""
    return torch.addmm(base(p), F.linear(p.x, A) * weights(p), B)


def merged(p: Problem, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(p.x, torch.addmm(p.weight, (B * weights(p)[:, None]).T, A), p.bias)


def newest(p: Problem) -> tuple[Tensor, Tensor]:
    """The concatenated factors with the newest adapter as leaves of their own."""
    r = len(p.A_new)
    return torch.cat([p.A_cat[:-r], p.A_new]), torch.cat([p.B_cat[:-r], p.B_new.T])


def loop_of_sum(p: Problem) -> Tensor:
    y, A_old, B_old = base(p), p.A.detach(), p.B.detach()
    for A, B, c in zip([*A_old[:-1], p.A_new], [*B_old[:-1], p.B_new], p.coeff * p.scaling):
        y = y + c.to(y.dtype) * F.linear(F.linear(p.x, A), B)
    return y


def all_baddbmm(p: Problem) -> Tensor:
    h = F.linear(p.x, p.A_cat).view(len(p.x), *p.A.shape[:2]).transpose(0, 1)
    return torch.baddbmm(base(p).expand(len(p.A), -1, -1), h, p.B.transpose(1, 2), alpha=SCALE)


def all_loop(p: Problem) -> Tensor:
    y = base(p)
    return torch.stack([torch.addmm(y, p.x @ A.T, B.T, alpha=SCALE) for A, B in zip(p.A, p.B)])


ONE: dict[str, Form] = {
    BASE: base,
    OURS: ours_summed,
    PLAIN: lambda p: base(p) + SCALE * F.linear(F.linear(p.x, p.A[0]), p.B[0]),
    "addmm": lambda p: torch.addmm(base(p), F.linear(p.x, p.A[0]), p.B[0].T, alpha=SCALE),
    "addmm_": lambda p: base(p).addmm_(F.linear(p.x, p.A[0]), p.B[0].T, alpha=SCALE),
    MERGE + ", then linear": lambda p: F.linear(p.x, torch.addmm(p.weight, p.B[0], p.A[0], alpha=SCALE), p.bias),
    "PEFT": lambda p: p.peft(p.x),
}
INDEXED: dict[str, Form] = {
    BASE: base,
    OURS: ours_indexed,
    "bmm": lambda p: bmm(p, base(p)),
    "grouped_mm": lambda p: grouped(p, base(p)),
    MASKED: lambda p: masked(p, base(p)),
    "loop, addmm_": lambda p: loop(p, base(p)),
    "gathered for each row": gathered,
    "PEFT, adapter_names": lambda p: p.peft(p.by_image(p.x), adapter_names=p.names),
}
IN_PLACE: dict[str, Form] = {
    OURS: lambda p: ops.lora_indexed_(p.by_image(p.y), p.by_image(p.x), p.given_ids, *p.factors),
    "grouped_mm": lambda p: grouped(p, p.y),
    MASKED: lambda p: masked(p, p.y),
    "loop, addmm_": lambda p: loop(p, p.y),
}
IN_PLACE_ONE: dict[str, Form] = {
    OURS: lambda p: ops.lora_sum_(p.y, p.x, *p.factors),
    "addmm_": lambda p: p.y.addmm_(F.linear(p.x, p.A[0]), p.B[0].T, alpha=SCALE),
}
SUM: dict[str, Form] = {
    BASE: base,
    OURS: lambda p: ours_summed(p, coeff=p.coeff),
    MERGE + " (lora_merge), then linear": lambda p: F.linear(
        p.x, ops.lora_merge(p.weight, *p.factors, coeff=p.coeff), p.bias
    ),
    MERGE + " (addmm), then linear": lambda p: merged(p, p.A_cat, p.B_cat),
    "concatenated": lambda p: summed(p, p.A_cat, p.B_cat),
    "loop": loop_of_sum,
}
SUM_TRAINED: dict[str, Form] = {
    BASE: Step(base, "x"),
    OURS: Step(lambda p: ours_summed(p, coeff=p.coeff, trainable=[len(p.A) - 1]), "x A B coeff"),
    MERGE + " (addmm), then linear": Step(lambda p: merged(p, *newest(p)), "x A_new B_new coeff"),
    "concatenated": Step(lambda p: summed(p, *newest(p)), "x A_new B_new coeff"),
    "loop": Step(loop_of_sum, "x A_new B_new coeff"),
}
ALL: dict[str, Form] = {
    BASE: base,
    OURS: lambda p: ops.lora_all(p.x, *p.factors, **p.layer),
    "baddbmm": all_baddbmm,
    "loop, addmm": all_loop,
    PLAIN: lambda p: base(p) + SCALE * (p.x @ p.A.transpose(1, 2)) @ p.B.transpose(1, 2),
}
TRAINED: dict[str, Form] = {
    BASE: Step(base, "x"),
    **{name: Step(ONE[name], "x A B") for name in (OURS, PLAIN, "addmm", "addmm_")},
    "PEFT": Step(ONE["PEFT"], lambda p: [p.x, p.peft.lora_A["t0"].weight, p.peft.lora_B["t0"].weight]),
}
MIXED: dict[str, Form] = {
    BASE: Step(base, "x"),
    OURS: Step(ours_indexed, "x A B"),
    "grouped_mm": Step(INDEXED["grouped_mm"], "x A B"),
    MASKED: Step(masked_apart, "x A B"),
}
TRAINED_MODULES: dict[str, Form] = {
    **TRAINED,
    OURS: Step(lambda p: p.ours(p.x), lambda p: [p.x, *p.ours.pairs("t0")[0]]),
}
