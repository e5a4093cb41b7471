"""The CPU operators beside the best forms in plain torch, timed in turn in one process.

    python benchmarks/cpu_operators.py --threads 2 --out benchmarks/results/cpu_operators

A round runs every form of a case once; a ratio is the median over the rounds of (its time / ours) within a round, so
that a machine that slows down for a while slows both. ViT-B/16: width 768, images of 197 rows, r = 16; float32, and
the low-rank families in bfloat16 as well.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
import torch.nn.functional as F
from operators import CASES, one_hot
from torch import Tensor, nn

from plora_ext import data, ops, reference
from plora_ext import nn as plora_nn
from plora_ext.bench import OPERATORS, OURS, in_turn, timed
from plora_ext.info import environment

FROZEN = "frozen backbone, gradient to its input"
D, R, S, ROWS = 768, 16, 0.5, 197
Form = Callable[[], Any]


class Case(NamedTuple):
    name: str
    forms: dict[str, Form]


class Problem:
    """A frozen layer, T adapters, `images` images in segments of one adapter each, and a y to add to."""

    def __init__(self, images: int, T: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> None:
        torch.manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype)

        self.x, self.y = draw(images, ROWS, D), draw(images, ROWS, D)
        self.weight, self.bias = draw(D, D) / D**0.5, draw(D)
        self.A, self.B = draw(T, R, D) / D**0.5, draw(T, D, R) / R**0.5
        self.s = torch.full((T,), S)
        self.ids = torch.arange(images) * T // images
        self.layer = {"weight": self.weight, "bias": self.bias}
        self.factors = self.A, self.B, self.s
        if grad:
            for t in (self.x, self.A, self.B):
                t.requires_grad_()
        starts = [int((self.ids < t).sum()) for t in range(T + 1)]
        self.segments = [(t, slice(starts[t], starts[t + 1])) for t in range(T)]
        self.grad = draw(images, ROWS, D)

    def base(self) -> Tensor:
        return F.linear(self.x, self.weight, self.bias)

    def add_one(self, y: Tensor) -> Tensor:
        h = self.x.view(-1, D) @ self.A[0].T
        y.view(-1, D).addmm_(h, self.B[0].T, alpha=S)
        return y

    def add_segments(self, y: Tensor) -> Tensor:
        for t, rows in self.segments:
            h = self.x[rows].view(-1, D) @ self.A[t].T
            y[rows].view(-1, D).addmm_(h, self.B[t].T, alpha=S)
        return y

    def add_images(self, y: Tensor) -> Tensor:
        h = torch.bmm(self.x, self.A[self.ids].transpose(1, 2))
        return y.baddbmm_(h, self.B[self.ids].transpose(1, 2), alpha=S)

    def concatenated(self) -> tuple[Tensor, Tensor]:
        return self.A.view(-1, D), self.B.transpose(0, 1).reshape(D, -1)

    def merged(self) -> Tensor:
        A, B = self.concatenated()
        return torch.addmm(self.weight, B, A, alpha=S)

    def step(self, y: Tensor) -> None:
        torch.autograd.grad(y, (self.x, self.A, self.B), self.grad)


def added(images: int, dtype: torch.dtype) -> Iterator[Case]:
    p, q = Problem(images, 1, dtype), Problem(images, 10, dtype)
    yield Case(
        "one adapter, y +=",
        {
            OURS: lambda: ops.lora_sum_(p.y, p.x, *p.factors),
            "mm, addmm_": lambda: p.add_one(p.y),
            "y.add_(x): its bytes alone": lambda: p.y.add_(p.x, alpha=1e-9),
        },
    )
    yield Case(
        "10 segments, y +=",
        {
            OURS: lambda: ops.lora_indexed_(q.y, q.x, q.ids, *q.factors),
            "mm, addmm_ by segment": lambda: q.add_segments(q.y),
            "bmm, baddbmm_ by image": lambda: q.add_images(q.y),
        },
    )


def with_base(images: int, dtype: torch.dtype) -> Iterator[Case]:
    p, q = Problem(images, 1, dtype), Problem(images, 10, dtype)
    yield Case(
        "one adapter, base layer included",
        {
            OURS: lambda: ops.lora_sum(p.x, *p.factors, **p.layer),
            "linear, mm, addmm_": lambda: p.add_one(p.base()),
            "merge, linear": lambda: F.linear(p.x, p.merged(), p.bias),
            "base layer alone": p.base,
        },
    )
    yield Case(
        "10 segments, base layer included",
        {
            OURS: lambda: ops.lora_indexed(q.x, q.ids, *q.factors, **q.layer),
            "linear, mm, addmm_ by segment": lambda: q.add_segments(q.base()),
            "linear, bmm, baddbmm_ by image": lambda: q.add_images(q.base()),
            "base layer alone": q.base,
        },
    )
    yield Case(
        "sum of 10, base layer included",
        {
            OURS: lambda: ops.lora_sum(q.x, *q.factors, **q.layer),
            "merge, linear": lambda: F.linear(q.x, q.merged(), q.bias),
            "base layer alone": q.base,
        },
    )
    A, B = q.A.transpose(1, 2), q.B.transpose(1, 2)
    rows, out = q.x.view(-1, D), torch.empty(10, images * ROWS, D, dtype=dtype)
    yield Case(
        "all 10 outputs, base layer included, preallocated",
        {
            OURS: lambda: ops.lora_all(rows, *q.factors, **q.layer, out=out),
            "linear, matmul, baddbmm": lambda: torch.baddbmm(
                F.linear(rows, q.weight, q.bias), rows @ A, B, alpha=S, out=out
            ),
        },
    )
    yield Case(
        "all 10 outputs, base layer included, new memory",
        {
            OURS: lambda: ops.lora_all(rows, *q.factors, **q.layer),
            "linear, matmul, baddbmm": lambda: torch.baddbmm(F.linear(rows, q.weight, q.bias), rows @ A, B, alpha=S),
        },
    )


def trained(images: int, dtype: torch.dtype) -> Iterator[Case]:
    p, q = Problem(images, 1, dtype, grad=True), Problem(images, 10, dtype, grad=True)

    def addmm(y: Tensor) -> Tensor:
        return torch.addmm(y.view(-1, D), p.x.view(-1, D) @ p.A[0].T, p.B[0].T, alpha=S).view_as(y)

    def segments(y: Tensor) -> Tensor:
        parts = [(q.x[rows] @ q.A[t].T) @ q.B[t].T for t, rows in q.segments]
        return torch.add(y, torch.cat(parts), alpha=S)

    def by_image(y: Tensor) -> Tensor:
        return torch.baddbmm(y, torch.bmm(q.x, q.A[q.ids].transpose(1, 2)), q.B[q.ids].transpose(1, 2), alpha=S)

    yield Case(
        "one adapter, y + low rank, forward and backward",
        {
            OURS: lambda: p.step(ops.lora_sum(p.x, *p.factors, base=p.y)),
            "mm, addmm": lambda: p.step(addmm(p.y)),
            "y + s (x A') B'": lambda: p.step(p.y + S * (p.x @ p.A[0].T) @ p.B[0].T),
        },
    )
    yield Case(
        "10 segments, y + low rank, forward and backward",
        {
            OURS: lambda: q.step(ops.lora_indexed(q.x, q.ids, *q.factors, base=q.y)),
            "mm, mm by segment": lambda: q.step(segments(q.y)),
            "bmm, baddbmm by image": lambda: q.step(by_image(q.y)),
        },
    )
    yield Case(
        "one adapter, base layer included, forward and backward",
        {
            OURS: lambda: p.step(ops.lora_sum(p.x, *p.factors, **p.layer)),
            "linear, mm, addmm": lambda: p.step(addmm(p.base())),
            "linear + s (x A') B'": lambda: p.step(p.base() + S * (p.x @ p.A[0].T) @ p.B[0].T),
            "merge, linear": lambda: p.step(F.linear(p.x, torch.addmm(p.weight, p.B[0], p.A[0], alpha=S), p.bias)),
            "base layer alone": lambda: torch.autograd.grad(p.base(), p.x, p.grad),
        },
    )
    yield Case(
        "10 segments, base layer included, forward and backward",
        {
            OURS: lambda: q.step(ops.lora_indexed(q.x, q.ids, *q.factors, **q.layer)),
            "linear, mm, mm by segment": lambda: q.step(segments(q.base())),
            "linear, bmm, baddbmm by image": lambda: q.step(by_image(q.base())),
            "base layer alone": lambda: torch.autograd.grad(q.base(), q.x, q.grad),
        },
    )


def merge() -> Iterator[Case]:
    q = Problem(1, 10)
    yield Case("lora_merge of 10", {OURS: lambda: ops.lora_merge(q.weight, *q.factors), "addmm": q.merged})


def completed(prototypes: Tensor, task_of_class: Tensor) -> Tensor:
    """complete_prototypes by one product of all classes in each subspace, for classes sorted by task."""
    T = prototypes.shape[1]
    unit, result = F.normalize(prototypes, dim=-1), prototypes.clone()
    for i in range(T - 1):
        mine = task_of_class == i
        e = (unit[mine, i] @ unit[:, i].T - 1).exp()  # tau = 1; one similarity for every j
        later = (task_of_class[None] >= torch.arange(i + 1, T)[:, None]).to(e)  # [T - i - 1, C]
        masked = e[None] * later[:, None]
        out = torch.bmm(masked, prototypes[:, i + 1 :].transpose(0, 1)) / masked.sum(-1, keepdim=True)
        result[mine, i + 1 :] = out.transpose(0, 1)
    return result


def index_add(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return torch.zeros(num_classes, D).index_add_(0, labels, features)


RIVALS: dict[str, dict[str, Callable[..., Any]]] = {
    "class_sums": {"index_add_": index_add, "one-hot product": one_hot,
                   "features.sum(): its bytes alone": lambda features, **_: features.sum()},
    "complete_prototypes": {"pair by pair": reference.complete_prototypes, "a task's pairs at once": completed},
    "reconstruct_prototypes": {"plain torch": reference.reconstruct_prototypes},
    "subspace_logits": {"plain torch": reference.subspace_logits},
}  # fmt: skip


def prototypes() -> Iterator[Case]:
    torch.manual_seed(0)
    for case, (operator, sizes) in CASES.items():
        if operator in RIVALS:
            given, forms = OPERATORS[operator].inputs(**sizes), {OURS: getattr(ops, operator), **RIVALS[operator]}
            yield Case(case, {name: partial(form, **given) for name, form in forms.items()})


class PlainLoRA(nn.Module):
    """What people write: the frozen layer, then the two thin ones beside it; optionally for rows of y alone."""

    def __init__(self, layer: nn.Linear, r: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.A.T) @ self.B.T


def embedded_step(form: str) -> Form:
    """A training step of the embedded backbone: 48 images, LoRA r = 8 on qkv and proj, cross-entropy, SGD.

    Frozen: without LoRA, but with the gradient that reaches the first block.
    """
    torch.manual_seed(0)
    model = data.create_backbone("embedded").model.requires_grad_(False)
    if form == OURS:
        adapters = plora_nn.inject(model, ["qkv", "proj"], r=8)
        adapters.add_adapter("task0")
        parameters = list(adapters.parameters("task0"))
    elif form == FROZEN:
        parameters = [model.pos_embed.requires_grad_()]
    else:
        for block in model.blocks:
            block.attn.qkv, block.attn.proj = PlainLoRA(block.attn.qkv, 8), PlainLoRA(block.attn.proj, 8)
        parameters = [p for p in model.parameters() if p.requires_grad]
    head = nn.Linear(model.num_features, 10)
    optimizer = torch.optim.SGD([*parameters, *head.parameters()], lr=0.01, momentum=0.9)
    images, labels = torch.randn(48, 3, 48, 48), torch.randint(0, 10, (48,))

    def step() -> None:
        loss = F.cross_entropy(head(model(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def training() -> Iterator[Case]:
    forms = {form: embedded_step(form) for form in (OURS, "plain torch LoRA", FROZEN)}
    yield Case("training step of the embedded benchmark", forms)


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {"merge": merge, "prototypes": prototypes, "training": training}
for dtype_, suffix in ((torch.float32, ""), (torch.bfloat16, ", bfloat16")):
    for images_ in (16, 64):
        for name, group in (("added", added), ("base", with_base), ("trained", trained)):
            GROUPS[f"{name} {images_ * ROWS:,}{suffix}"] = lambda group=group, n=images_, dtype=dtype_, suffix=suffix: (
                Case(f"{c.name}, {n * ROWS:,} rows{suffix}", c.forms) for c in group(n, dtype)
            )


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Every form once a round, in an order that turns, until the time is spent."""
    for form in case.forms.values():
        form(), form()
    times = in_turn(
        {n: partial(timed, form, torch.device("cpu")) for n, form in case.forms.items()}, 9, seconds, turning=True
    )
    rows = []
    for name in case.forms:
        ratios = [a / b for a, b in zip(times[name], times[OURS], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        row = {"case": case.name, "form": name, "median_ms": f"{statistics.median(times[name]):.3f}"}
        row |= {"ratio": f"{statistics.median(ratios):.2f}", "ratio_q1": f"{low:.2f}", "ratio_q3": f"{high:.2f}"}
        rows.append(row | {"rounds": str(len(ratios))})
    return rows


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4, help="for each case")
    parser.add_argument("--only", default="", help="a regular expression that the case's name must hold")
    parser.add_argument("--out", type=Path, help="path of the results without its suffix")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    here = environment(torch.device("cpu"))
    where = {"device": here["device"].rsplit(",", 1)[0], "threads": args.threads}
    where |= {name: here[name] for name in ("torch", "plora_ext")}
    columns = ("case", "form", "median ms", "its time / ours (quartiles)")
    print(harness.said(where), harness.table(columns, []), sep="\n\n", end="", flush=True)
    rows, lines = [], []
    for group in GROUPS.values():
        for case in group():
            if not re.search(args.only, case.name):
                continue
            for row in measure(case, args.seconds):
                rows.append(row)
                ratio = f"{row['ratio']} ({row['ratio_q1']}–{row['ratio_q3']})"
                lines.append((row["case"], row["form"], row["median_ms"], ratio))
                print(f"| {' | '.join(lines[-1])} |", flush=True)
    if args.out:
        harness.write(args.out, list(rows[0]), rows, harness.table(columns, lines, texts=2), where)


if __name__ == "__main__":
    main()
