"""What `cuda_lora.py` measures: inputs, the forms of each computation, and the cases with their goals."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from harness import BASE, DEVICE, Form, GPUCase, Line, Step
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.bench import OURS
from plora_ext.nn import MultiLoRALinear, inject

DTYPE, SCALE = torch.bfloat16, 0.5
IMAGES, TOKENS = 64, 197  # of a ViT-B/16
M = IMAGES * TOKENS
LAYERS = ((768, 768), (768, 2304), (768, 3072), (3072, 768))  # in, out: proj, qkv, fc1, fc2
PLAIN, MASKED = "plain torch", "concatenated, masked"
BEST, MERGE = "best rival", "merge"
Layer = tuple[int, int]
SERVED: dict[Layer, tuple[tuple[int, int], ...]] = {  # rows, adapters
    (4096, 4096): ((1, 1), (8, 8), (64, 1), (64, 64), (256, 1), (256, 32), (512, 64)),
    (768, 768): ((1, 1), (64, 64), (256, 32), (512, 1)),
    (4096, 11008): ((1, 1), (64, 64), (256, 32)),
}


# ---------------------------------------------------------------------- inputs


class Problem:
    """One set of inputs: a frozen layer, x and T adapters; `ids` has one for each row, or one for each image."""

    def __init__(self, rows: int, layer: Layer, r: int, T: int, ids: Tensor | None = None, train: str = "") -> None:
        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(shape, device=DEVICE, dtype=DTYPE) * std

        n_in, out = layer
        self.x, self.y, self.grad = draw(rows, n_in), draw(rows, out), draw(rows, out)
        self.weight, self.bias = draw(out, n_in, std=n_in**-0.5), draw(out)
        self.A, self.B = draw(T, r, n_in, std=n_in**-0.5), draw(T, out, r, std=r**-0.5)
        self.scaling, self.coeff = torch.full((T,), SCALE, device=DEVICE), torch.rand(T, device=DEVICE) + 0.5
        self.A_cat, self.B_cat = self.A.flatten(0, 1), self.B.transpose(1, 2).flatten(0, 1)  # [T r, in], [T r, out]
        self.A_new, self.B_new = self.A[-1].clone(), self.B[-1].clone()
        self.ids = self.image_ids = None
        if ids is not None:
            self.image_ids = ids if len(ids) < rows else None
            self.ids = ids.repeat_interleave(rows // len(ids))
            self.mask = F.one_hot(self.ids, T).to(DTYPE).repeat_interleave(r, 1)
            self.counts = self.ids.bincount(minlength=T).tolist()
            self.ends = self.ids.bincount(minlength=T).cumsum(0).int()
            self.sorted = bool((self.ids.diff() >= 0).all())
            self.order = self.ids.argsort(stable=True)
            self.names = [f"t{t}" for t in ids.tolist()]
        for name in train.split():
            getattr(self, name).requires_grad_()

    def double(self) -> Problem:
        twin = copy.copy(self)
        for name, t in vars(self).items():
            if isinstance(t, Tensor) and t.is_floating_point():
                setattr(twin, name, t.detach().double().requires_grad_(t.requires_grad))
        return twin

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
    x, ids = (p.x, p.ids) if p.image_ids is None else (p.x.view(len(p.image_ids), -1, p.x.shape[1]), p.image_ids)
    return ops.lora_indexed(x, ids, p.A, p.B, p.scaling, weight=p.weight, bias=p.bias)


def ours_summed(p: Problem, **options: Any) -> Tensor:
    return ops.lora_sum(p.x, p.A, p.B, p.scaling, weight=p.weight, bias=p.bias, **options)


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


def all_plain(p: Problem) -> Tensor:
    return base(p) + SCALE * (p.x @ p.A.transpose(1, 2)) @ p.B.transpose(1, 2)


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
    "PEFT, adapter_names": lambda p: p.peft(p.x.view(len(p.names), -1, p.x.shape[1]), adapter_names=p.names),
}
IN_PLACE: dict[str, Form] = {
    OURS: lambda p: ops.lora_indexed_(p.y, p.x, p.ids, p.A, p.B, p.scaling),
    "grouped_mm": lambda p: grouped(p, p.y),
    MASKED: lambda p: masked(p, p.y),
    "loop, addmm_": lambda p: loop(p, p.y),
}
IN_PLACE_ONE: dict[str, Form] = {
    OURS: lambda p: ops.lora_sum_(p.y, p.x, p.A, p.B, p.scaling),
    "addmm_": lambda p: p.y.addmm_(F.linear(p.x, p.A[0]), p.B[0].T, alpha=SCALE),
}
SUM: dict[str, Form] = {
    BASE: base,
    OURS: lambda p: ours_summed(p, coeff=p.coeff),
    MERGE + " (lora_merge), then linear": lambda p: F.linear(
        p.x, ops.lora_merge(p.weight, p.A, p.B, p.scaling, coeff=p.coeff), p.bias
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
    OURS: lambda p: ops.lora_all(p.x, p.A, p.B, p.scaling, weight=p.weight, bias=p.bias),
    "baddbmm": all_baddbmm,
    "loop, addmm": all_loop,
    PLAIN: all_plain,
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


# ---------------------------------------------------------------------- cases and their goals


@dataclass
class Case(GPUCase):
    """Forms of one computation, and what is asked of ours."""

    kind: str = ""
    limits: dict[str, float] = field(default_factory=dict)  # ours takes at most so many times as long as this form
    gains: dict[str, float] = field(default_factory=dict)  # this form takes at least so many times as long as ours
    floors: dict[str, float] = field(default_factory=dict)  # microseconds of what is no form, for `limits`
    scale: float = SCALE

    def size(self, first: Any, expected: tuple[Tensor, ...]) -> float:
        named = (getattr(first, name, None) for name in ("x", "weight", "A", "B"))
        return sum(t.nbytes for t in named if t is not None) + sum(t.numel() * DTYPE.itemsize for t in expected)

    def ranked(self, name: str) -> bool:
        """Whether a form is a rival that keeps the adapters unmerged, and has no goal of its own."""
        return not name.startswith((OURS, BASE, MERGE, *self.gains))

    def to_compile(self, name: str) -> bool:
        return self.ranked(name) and not name.startswith(("PEFT", "loop"))

    def judge(self, lines: dict[str, Line]) -> list[str]:
        times = {name: line[self.judged] for name, line in lines.items() if self.judged in line}
        found, ours = [], times.get(OURS)
        goals = [(key, bound, True) for key, bound in self.limits.items()]
        for key, bound, limit in [*goals, *((key, bound, False) for key, bound in self.gains.items())]:
            text = f"≤ {bound:.2f} × {key}" if limit else f"{key} ≥ {bound:.2f} ×"
            rivals = {n: t for n, t in times.items() if (self.ranked(n) if key == BEST else n.startswith(key))}
            other = self.floors.get(key) or min(rivals.values(), default=None)
            if not ours or not other:
                found.append(f"{text}: not measured")
            else:
                ratio = ours / other if limit else other / ours
                met = ratio <= bound if limit else ratio >= bound
                found.append(f"{text}: {ratio:.2f} {'met' if met else 'NOT MET'}")
        return found


def one(row: int, layer: Layer, r: int, rows: int = M, **goals: Any) -> Case:
    name = f"one adapter, r={r}, M={rows:,}, {layer[0]}→{layer[1]}"
    return Case(row, name, lambda: Problem(rows, layer, r, 1), ONE, lambda p: ONE[PLAIN](p.double()), "one", **goals)


def indexed(row: int, what: str, layer: Layer, r: int, T: int, ids: Tensor, rows: int = M, **goals: Any) -> Case:
    forms, per_row = dict(INDEXED), len(ids) == rows
    if per_row:
        del forms["PEFT, adapter_names"]
    if per_row and not bool((ids == segments(T, rows)).all() and rows % T == 0):
        del forms["bmm"]
    if r > 16:
        del forms["gathered for each row"]  # gigabytes
    name = f"{what}, T={T}, r={r}, M={rows:,}, {layer[0]}→{layer[1]}"
    return Case(
        row, name, lambda: Problem(rows, layer, r, T, ids), forms, lambda p: INDEXED[MASKED](p.double()), "indexed",
        eager=("PEFT",), **goals,  # it reads names and moves indices from the host
    )  # fmt: skip


def mixed(row: int, layer: Layer, T: int, ids: Tensor, rows: int, **goals: Any) -> Case:
    return Case(
        row, f"forward + backward of mixed adapters, T={T}, r=16, M={rows:,}, {layer[0]}→{layer[1]}",
        lambda: Problem(rows, layer, 16, T, ids, "x A B"), MIXED, lambda p: MIXED[MASKED](p.double()), "training",
        train=True, **goals,
    )  # fmt: skip


def training(row: int, forms: dict[str, Form], layer: Layer, rows: int = M, **goals: Any) -> Case:
    return Case(
        row, f"forward + backward, r=16, M={rows:,}, {layer[0]}→{layer[1]}",
        lambda: Problem(rows, layer, 16, 1, train="x A B"), forms, lambda p: TRAINED[PLAIN](p.double()), "training",
        train=True, **goals,
    )  # fmt: skip


def in_place(T: int, forms: dict[str, Form], twin: str, ids: Tensor | None, bandwidth: float) -> Case:
    us = 2 * (3 * M * 768 + 2 * T * 16 * 768) / bandwidth * 1e6
    return Case(
        6, f"added to a given y, T={T}, r=16, 768→768", lambda: Problem(M, LAYERS[0], 16, T, ids), forms,
        lambda p: forms[twin](p.double()), "in place", {"its bytes at copy bandwidth": 1 / 0.8},
        floors={"its bytes at copy bandwidth": us},
    )  # fmt: skip


def sum_of(T: int, train: bool) -> Case:
    forms, what = (SUM_TRAINED, "newest and weights trained") if train else (SUM, "inference")
    return Case(
        7, f"sum, T={T}, r=16, 768→768, {what}",
        lambda: Problem(M, LAYERS[0], 16, T, train="x A B A_new B_new coeff" if train else ""), forms,
        lambda p: forms["concatenated"](p.double()), "sum", {BASE: 2.0} if train else {MERGE: 1.1},
        {"loop": 5.0}, train=train,
    )  # fmt: skip


def all_of(T: int, bandwidth: float) -> Case:
    us = 2 * T * M * 768 / bandwidth * 1e6
    return Case(
        8, f"all, T={T}, r=16, 768→768", lambda: Problem(M, LAYERS[0], 16, T), ALL,
        lambda p: all_plain(p.double()), "all", {"its output at copy bandwidth": 1.25},
        floors={"its output at copy bandwidth": us},
    )  # fmt: skip


def stacking(T: int, layer: Layer, bandwidth: float) -> Case:
    """float32 factors that lie one by one, as the operators take them beside an x of 16 bits."""

    def make() -> SimpleNamespace:
        A, B = (torch.randn(T, *shape, device=DEVICE) for shape in ((16, layer[0]), (layer[1], 16)))
        return SimpleNamespace(x=torch.empty(0, device=DEVICE, dtype=DTYPE), A=A, B=B, As=list(A), Bs=list(B))

    def joined(p: Any, of: Callable[[list[Tensor]], Tensor]) -> tuple[Tensor, ...]:
        return tuple(of(own).to(DTYPE).view(T, *own[0].shape) for own in (p.As, p.Bs))

    forms: dict[str, Form] = {
        OURS: lambda p: torch.ops.plora_ext.lora_stack(p.x, p.As, p.Bs, [SCALE] * T)[:2],
        "cat, cast": lambda p: joined(p, torch.cat),
        "stack, cast": lambda p: joined(p, torch.stack),
    }
    us = (4 + DTYPE.itemsize) * T * 16 * sum(layer) / bandwidth * 1e6
    return Case(
        12, f"factors stacked, T={T}, r=16, {layer[0]}→{layer[1]}", make, forms, lambda p: (p.A.double(), p.B.double()),
        "stack", gains={BEST: 1.0}, floors={"its bytes at copy bandwidth": us},
    )  # fmt: skip


def segments(T: int, rows: int = M) -> Tensor:
    """The adapters of rows in T segments of almost equal length, whose borders no tile shares."""
    return torch.arange(rows, device=DEVICE) * T // rows


def cases(rows: Sequence[int], quick: bool, compiled: bool, bandwidth: float) -> Iterator[Case]:
    """The cases of these rows of the table, those of a whole ViT last; `bandwidth` of a copy in bytes a second."""
    layers, square = LAYERS[:1] if quick else LAYERS, LAYERS[0]
    images = torch.arange(IMAGES, device=DEVICE) % 10
    fused: dict[str, Any] = dict(limits={BASE: 1.15}, gains={BEST: 1.6})
    small: dict[str, Any] = dict(limits={BASE: 1.5}, gains={BEST: 1.6}, compile=True)
    of_layers: dict[int, Callable[[Layer], list[Case]]] = {
        1: lambda a: [one(1, a, 16, limits={BASE: 1.15}, gains={"LoRAFusion": 1.0, BEST: 1.5}, compile=True)],
        2: lambda a: [
            indexed(2, "segments", a, 16, 10, segments(10), **fused, compile=True),
            indexed(2, "an adapter an image", a, 16, 10, images, **fused),
        ],
        3: lambda a: [
            one(3, a, 64, limits={BASE: 1.3}),
            indexed(3, "segments", a, 64, 10, segments(10), limits={BASE: 1.3}),
        ],
        5: lambda a: [training(5, TRAINED, a, limits={BASE: 1.35}, compile=True)],
    }
    found = [case for make in of_layers.values() for layer in layers for case in make(layer)]
    found += [indexed(2, "equal segments", square, 16, 10, segments(10, 12600), 12600, **fused)]
    found += [indexed(4, "segments", square, 16, 50, segments(50, 3150), 3150, **small)]
    for n in (M, 3150):
        found.append(indexed(4, "random", square, 16, 10, torch.randint(10, (n,), device=DEVICE), n, **small))
    found += [
        in_place(1, IN_PLACE_ONE, "addmm_", None, bandwidth),
        in_place(10, IN_PLACE, MASKED, segments(10), bandwidth),
    ]
    found += [sum_of(T, train) for T in (10, 50) for train in (False, True)] + [all_of(10, bandwidth)]
    found += [stacking(T, layer, bandwidth) for layer in layers for T in (1, 10)]
    for n in (197, 788, 1576, 3152):
        found.append(training(10, TRAINED_MODULES, square, n, gains={"PEFT": 3.0}, judged="wall_us"))
    for layer in list(SERVED)[:1] if quick else SERVED:
        for n, T in SERVED[layer]:
            goals: dict[str, Any] = dict(limits={BASE: 1.5 if n <= 64 else 1.6}, gains={BEST: 1.2})
            ids = torch.randint(T, (n,), device=DEVICE)
            found.append(
                one(11, layer, 16, n, **goals) if T == 1 else indexed(11, "few rows", layer, 16, T, ids, n, **goals)
            )
            if T > 8:
                found.append(mixed(11, layer, T, ids, n, gains={BEST: 1.5}))
    yield from sorted((case for case in found if case.row in rows), key=lambda case: case.row)
    if 9 in rows:
        yield vit(1, True, compiled, limits={BASE: 1.15}, gains={"PEFT eager": 1.25, "PEFT, torch.compile": 1.0})
        yield vit(1, False, compiled, limits={BASE: 1.1})
        yield vit(10, False, compiled, limits={BASE: 1.1})


# ---------------------------------------------------------------------- a whole ViT-B/16

VIT_LAYERS = r"blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)"


class PlainLoRA(nn.Module):
    """T adapters of a linear layer in plain torch, concatenated; `mask` [batch, 1, T r] keeps each image's own."""

    def __init__(self, linear: nn.Module, A: Tensor, B: Tensor, mask: Tensor | None) -> None:
        super().__init__()
        self.linear, self.mask = linear, mask
        self.A, self.B = nn.Parameter(A.flatten(0, 1)), nn.Parameter(B.transpose(0, 1).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.A)
        return self.linear(x) + SCALE * F.linear(h if self.mask is None else h * self.mask, self.B)


def vit(T: int, train: bool, compiled: bool, r: int = 16, batch: int = 128, **goals: Any) -> Case:
    """A training step of one adapter, or a forward without merging in which every image has its own of T."""
    import timm

    frozen: Any = timm.create_model("vit_base_patch16_224").to(DEVICE, DTYPE).eval().requires_grad_(False)
    sizes: dict[str, Any] = {n: m.weight.shape for n, m in frozen.named_modules() if re.fullmatch(VIT_LAYERS, n)}
    factors = {
        name: (
            torch.randn(T, r, n_in, device=DEVICE, dtype=DTYPE) * n_in**-0.5,
            torch.randn(T, out, r, device=DEVICE, dtype=DTYPE) * 0.05,
        )
        for name, (out, n_in) in sizes.items()
    }
    ids = torch.arange(batch, device=DEVICE) % T

    def plain(dtype: torch.dtype) -> nn.Module:
        model = copy.deepcopy(frozen).to(dtype)
        mask = F.one_hot(ids, T).to(dtype).repeat_interleave(r, 1)[:, None] if T > 1 else None
        for name, (A, B) in factors.items():
            parent, _, child = name.rpartition(".")
            layer = PlainLoRA(model.get_submodule(name), A.to(dtype), B.to(dtype), mask)
            setattr(model.get_submodule(parent), child, layer)
        return model

    ours = copy.deepcopy(frozen)
    adapters = inject(ours, VIT_LAYERS, r, SCALE * r)
    for t in range(T):
        adapters.add_adapter(f"t{t}")
        for name, layer in adapters.layers.items():
            for parameter, value in zip(layer.pairs(f"t{t}")[0], factors[name]):
                parameter.data.copy_(value[t])
    adapters.set_adapter("t0")
    if not train:
        adapters.train_adapter(None)
    chosen, names = ops.AdapterBatch(ids, T), [f"t{t}" for t in ids.tolist()]

    def unmerged(p: Any) -> Tensor:
        with adapters.batch(chosen):
            return ours(p.x)

    def draw() -> SimpleNamespace:
        x = torch.randn(batch, 3, 224, 224, device=DEVICE, dtype=DTYPE, requires_grad=train)
        grad = torch.randn(batch, frozen.num_classes, device=DEVICE, dtype=DTYPE)
        return SimpleNamespace(x=x, y=grad, grad=grad)

    def form(model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> Form:
        """A forward, or where it trains a step with the gradients of x and of all that requires them."""
        forward = model if call is None else call
        if not train:
            return torch.no_grad()(lambda p: forward(p.x))
        return Step(lambda p: forward(p.x), lambda p: [p.x, *(w for w in model.parameters() if w.requires_grad)])

    def reference(p: Any) -> Any:
        wide = SimpleNamespace(x=p.x.detach().double().requires_grad_(train), grad=p.grad.double())
        return form(plain(torch.float64))(wide)

    peft = peft_model(copy.deepcopy(frozen), VIT_LAYERS, factors)
    eager = peft.get_base_model()
    forms = {BASE: form(frozen), OURS: form(ours), PLAIN: form(plain(DTYPE)), "PEFT eager": form(eager)}
    if train and compiled:
        for name, model in ((OURS, ours), ("PEFT", eager)):
            forms[f"{name}, torch.compile"] = form(model, torch.compile(model, dynamic=False))
    if not train:
        forms[OURS] = torch.no_grad()(unmerged)
    if T > 1:
        forms["PEFT eager"] = torch.no_grad()(lambda p: peft(p.x, adapter_names=names))
    what = "a training step" if train else f"forward, unmerged, T={T}"
    return Case(
        9, f"ViT-B/16, r={r} on all linears, B={batch}, {what}", draw, forms, reference, "vit",
        eager=("",) if train else ("PEFT",),  # which moves indices from the host
        train=train, tolerance=0.1, **goals,
    )  # fmt: skip
