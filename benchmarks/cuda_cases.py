"""What `cuda_lora.py` measures: the cases of its rows, and what is asked of ours in each."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import lora_forms
import torch
import torch.nn.functional as F
from harness import BASE, DEVICE, Form, GPUCase, Line, Step, doubled, verdict
from lora_forms import DTYPE, MASKED, MERGE, PLAIN, SCALE, Layer, Problem, peft_model
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.bench import OURS
from plora_ext.nn import inject

IMAGES, TOKENS = 64, 197  # of a ViT-B/16
M = IMAGES * TOKENS
LAYERS = ((768, 768), (768, 2304), (768, 3072), (3072, 768))  # in, out: proj, qkv, fc1, fc2
WIDE = ((1024, 1024), (1024, 3072), (1024, 4096), (4096, 1024))  # likewise of a ViT-L
BEST = "best rival"
SERVED: dict[Layer, tuple[tuple[int, int], ...]] = {  # rows, adapters
    (4096, 4096): ((1, 1), (8, 8), (64, 1), (64, 64), (256, 1), (256, 32), (512, 64)),
    (768, 768): ((1, 1), (64, 64), (256, 32), (512, 1)),
    (4096, 11008): ((1, 1), (64, 64), (256, 32)),
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

        def over(key: str) -> float | None:
            """The time of what `key` means over ours: a floor, or the fastest form that it names."""
            rivals = [t for n, t in times.items() if (self.ranked(n) if key == BEST else n.startswith(key))]
            other = self.floors.get(key) or min(rivals, default=None)
            return other and other / times[OURS]

        found = []
        for key, bound in self.limits.items():
            other = over(key)
            found.append(verdict(f"≤ {bound:.2f} × {key}", other and 1 / other, at_most=bound))
        return found + [verdict(f"{n} ≥ {bound:.2f} ×", over(n), at_least=bound) for n, bound in self.gains.items()]


def problem_case(
    row: int, name: str, forms: dict[str, Form], exact: str, kind: str, *sizes: Any, train: str = "", **goals: Any
) -> Case:
    """Forms of a `Problem` of these sizes, with gradients of `train`; the form `exact` in float64 is the reference."""
    make = partial(Problem, *sizes, train=train)
    return Case(row, name, make, forms, lambda p: forms[exact](doubled(p)), kind=kind, train=bool(train), **goals)


def shape(rows: int, layer: Layer) -> str:
    return f"M={rows:,}, {layer[0]}→{layer[1]}"


def one(row: int, layer: Layer, r: int, rows: int = M, **goals: Any) -> Case:
    name = f"one adapter, r={r}, {shape(rows, layer)}"
    return problem_case(row, name, lora_forms.ONE, PLAIN, "one", rows, layer, r, 1, **goals)


def indexed(row: int, what: str, layer: Layer, r: int, T: int, ids: Tensor, rows: int = M, **goals: Any) -> Case:
    forms, per_row = dict(lora_forms.INDEXED), len(ids) == rows
    if per_row:
        del forms["PEFT, adapter_names"]
    if per_row and not bool((ids == segments(T, rows)).all() and rows % T == 0):
        del forms["bmm"]
    if r > 16:
        del forms["gathered for each row"]  # gigabytes
    name, eager = f"{what}, T={T}, r={r}, {shape(rows, layer)}", ("PEFT",)  # reads names, moves indices from the host
    return problem_case(row, name, forms, MASKED, "indexed", rows, layer, r, T, ids, eager=eager, **goals)


def mixed(row: int, layer: Layer, T: int, ids: Tensor, rows: int, what: str = "mixed adapters", **goals: Any) -> Case:
    name, sizes = f"forward + backward of {what}, T={T}, r=16, {shape(rows, layer)}", (rows, layer, 16, T, ids)
    return problem_case(row, name, lora_forms.MIXED, MASKED, "training", *sizes, train="x A B", **goals)


def training(row: int, forms: dict[str, Form], layer: Layer, rows: int = M, **goals: Any) -> Case:
    name = f"forward + backward, r=16, {shape(rows, layer)}"
    return problem_case(row, name, forms, PLAIN, "training", rows, layer, 16, 1, train="x A B", **goals)


def floor(name: str, times: float, bytes_a_second: float, size: float) -> dict[str, Any]:
    """The goal: at most `times` what `size` bytes take at this speed."""
    return {"limits": {name: times}, "floors": {name: size / bytes_a_second * 1e6}}


def in_place(T: int, forms: dict[str, Form], twin: str, ids: Tensor | None, bandwidth: float) -> Case:
    name, size = f"added to a given y, T={T}, r=16, 768→768", 2 * (3 * M * 768 + 2 * T * 16 * 768)
    goals = floor("its bytes at copy bandwidth", 1 / 0.8, bandwidth, size)
    return problem_case(6, name, forms, twin, "in place", M, LAYERS[0], 16, T, ids, **goals)


def sum_of(T: int, train: bool) -> Case:
    forms, what = (lora_forms.SUM_TRAINED, "newest and weights trained") if train else (lora_forms.SUM, "inference")
    goals: dict[str, Any] = {"limits": {BASE: 2.0} if train else {MERGE: 1.1}, "gains": {"loop": 5.0}}
    leaves, name = "x A B A_new B_new coeff" if train else "", f"sum, T={T}, r=16, 768→768, {what}"
    return problem_case(7, name, forms, "concatenated", "sum", M, LAYERS[0], 16, T, train=leaves, **goals)


def stacking(T: int, layer: Layer) -> Case:
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
    return Case(
        12, f"factors stacked, T={T}, r=16, {layer[0]}→{layer[1]}", make, forms, lambda p: (p.A.double(), p.B.double()),
        "stack", gains={BEST: 1.0},
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
        5: lambda a: [training(5, lora_forms.TRAINED, a, limits={BASE: 1.35}, compile=True)],
    }
    found = [case for make in of_layers.values() for layer in layers for case in make(layer)]
    found += [indexed(2, "equal segments", square, 16, 10, segments(10, 12600), 12600, **fused)]
    found += [indexed(4, "segments", square, 16, 50, segments(50, 3150), 3150, **small)]
    for n in (M, 3150):
        found.append(indexed(4, "random", square, 16, 10, torch.randint(10, (n,), device=DEVICE), n, **small))
    found += [
        in_place(1, lora_forms.IN_PLACE_ONE, "addmm_", None, bandwidth),
        in_place(10, lora_forms.IN_PLACE, MASKED, segments(10), bandwidth),
    ]
    found += [sum_of(T, train) for T in (10, 50) for train in (False, True)]
    written = floor("its output at copy bandwidth", 1.25, bandwidth, 2 * 10 * M * 768)
    name, sizes = "all, T=10, r=16, 768→768", (M, LAYERS[0], 16, 10)
    found.append(problem_case(8, name, lora_forms.ALL, PLAIN, "all", *sizes, **written))
    found += [stacking(T, layer) for layer in layers for T in (1, 10)]
    for n in (197, 788, 1576, 3152):
        found.append(training(10, lora_forms.TRAINED_MODULES, square, n, gains={"PEFT": 3.0}, judged="wall_us"))
    for layer in list(SERVED)[:1] if quick else SERVED:
        for n, T in SERVED[layer]:
            goals: dict[str, Any] = dict(limits={BASE: 1.5 if n <= 64 else 1.6}, gains={BEST: 1.2})
            ids = torch.randint(T, (n,), device=DEVICE)
            found.append(
                one(11, layer, 16, n, **goals) if T == 1 else indexed(11, "few rows", layer, 16, T, ids, n, **goals)
            )
            if T > 8:
                found.append(mixed(11, layer, T, ids, n, gains={BEST: 1.5}))
    for n in (1, 4, 16):  # images
        for layer in layers:
            own = torch.arange(n, device=DEVICE)
            found += [one(13, layer, 16, n * TOKENS), training(13, lora_forms.TRAINED, layer, n * TOKENS)]
            found.append(indexed(13, "an adapter an image", layer, 16, n, own, n * TOKENS))
    for layer in WIDE[:1] if quick else WIDE:
        found += [one(14, layer, 16), training(14, lora_forms.TRAINED, layer)]
    for width in (768,) if quick else (768, 1024, 4096):
        for T in (4, 16, 64):  # the rivals are given the order of the rows
            for what, ids in (("segments", segments(T)), ("random rows", torch.randint(T, (M,), device=DEVICE))):
                found.append(mixed(15, (width, width), T, ids, M, what, gains={"grouped_mm": 1.5, BEST: 1.0}))
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

    def draw(*shape: int, std: float = 1.0, grad: bool = False) -> Tensor:
        return (torch.randn(shape, device=DEVICE, dtype=DTYPE) * std).requires_grad_(grad)

    factors = {
        name: (draw(T, r, n_in, std=n_in**-0.5), draw(T, out, r, std=0.05)) for name, (out, n_in) in sizes.items()
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

    def make() -> SimpleNamespace:
        x, grad = draw(batch, 3, 224, 224, grad=train), draw(batch, frozen.num_classes)
        return SimpleNamespace(x=x, y=grad, grad=grad)

    def form(model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> Form:
        """A forward, or where it trains a step with the gradients of x and of all that requires them."""
        forward = model if call is None else call
        if not train:
            return torch.no_grad()(lambda p: forward(p.x))
        return Step(lambda p: forward(p.x), lambda p: [p.x, *(w for w in model.parameters() if w.requires_grad)])

    def reference(p: Any) -> Any:
        return form(plain(torch.float64))(doubled(p))

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
        9, f"ViT-B/16, r={r} on all linears, B={batch}, {what}", make, forms, reference, "vit",
        eager=("",) if train else ("PEFT",),  # which moves indices from the host
        train=train, tolerance=0.1, **goals,
    )  # fmt: skip
