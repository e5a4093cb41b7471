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
from typing import Any

import harness
import lora_forms
import torch
import torch.nn.functional as F
from harness import BASE, Step
from lora_forms import MERGE, SCALE, Problem, base, ours_summed
from operators import CASES, one_hot
from torch import Tensor, nn

from plora_ext import data, ops, reference
from plora_ext import nn as plora_nn
from plora_ext.bench import OPERATORS, OURS, Case, in_turn, timed
from plora_ext.info import environment

FROZEN = "frozen backbone, gradient to its input"
D, R, ROWS = 768, 16, 197


# ---------------------------------------------------------------------- the low-rank operators


def merge_all(p: Problem) -> Tensor:
    """All adapters merged, from factors that are concatenated each time."""
    return torch.addmm(p.weight, p.B.transpose(0, 1).flatten(1), p.A.flatten(0, 1), alpha=SCALE)


def all_outputs(p: Problem, out: Tensor | None = None) -> Tensor:
    return torch.baddbmm(base(p), p.x @ p.A.transpose(1, 2), p.B.transpose(1, 2), alpha=SCALE, out=out)


def addmm(p: Problem, y: Tensor) -> Tensor:
    return torch.addmm(y, p.x @ p.A[0].T, p.B[0].T, alpha=SCALE)


def plain(p: Problem, y: Tensor) -> Tensor:
    return y + SCALE * (p.x @ p.A[0].T) @ p.B[0].T


def by_segment(p: Problem, y: Tensor) -> Tensor:
    parts = [(x @ A.T) @ B.T for x, A, B in zip(p.x.split(p.counts), p.A, p.B)]
    return torch.add(y, torch.cat(parts), alpha=SCALE)


def by_image(p: Problem, y: Tensor) -> Tensor:
    h = torch.bmm(p.by_image(p.x), p.A[p.given_ids.ids].transpose(1, 2))
    return torch.baddbmm(p.by_image(y), h, p.B[p.given_ids.ids].transpose(1, 2), alpha=SCALE).view_as(y)


def indexed(p: Problem, **given: Tensor) -> Tensor:
    return ops.lora_indexed(p.by_image(p.x), p.given_ids, *p.factors, **given)


def step(forward: Callable[[Problem], Tensor]) -> Step:
    return Step(forward, "x A B")


Group = dict[str, tuple[int, dict[str, Callable[[Problem], Any]]]]  # of cases: how many adapters, the forms
ADDED: Group = {
    "one adapter, y +=": (1, {
        OURS: lora_forms.IN_PLACE_ONE[OURS],
        "mm, addmm_": lora_forms.IN_PLACE_ONE["addmm_"],
        "y.add_(x): its bytes alone": lambda p: p.y.add_(p.x, alpha=1e-9),
    }),
    "10 segments, y +=": (10, {
        OURS: lora_forms.IN_PLACE[OURS],
        "mm, addmm_ by segment": lora_forms.IN_PLACE["loop, addmm_"],
        "bmm, baddbmm_ by image": lambda p: lora_forms.bmm(p, p.y),
    }),
}  # fmt: skip
WITH_BASE: Group = {
    "one adapter, base layer included": (1, {
        OURS: ours_summed,
        "linear, mm, addmm_": lora_forms.ONE["addmm_"],
        "merge, linear": lora_forms.ONE[MERGE + ", then linear"],
        BASE: base,
    }),
    "10 segments, base layer included": (10, {
        OURS: lora_forms.INDEXED[OURS],
        "linear, mm, addmm_ by segment": lora_forms.INDEXED["loop, addmm_"],
        "linear, bmm, baddbmm_ by image": lora_forms.INDEXED["bmm"],
        BASE: base,
    }),
    "sum of 10, base layer included": (10, {
        OURS: ours_summed,
        "merge, linear": lambda p: F.linear(p.x, merge_all(p), p.bias),
        BASE: base,
    }),
    "all 10 outputs, base layer included, preallocated": (10, {
        OURS: lambda p: ops.lora_all(p.x, *p.factors, **p.layer, out=p.outputs),
        "linear, matmul, baddbmm": lambda p: all_outputs(p, p.outputs),
    }),
    "all 10 outputs, base layer included, new memory": (10, {
        OURS: lambda p: ops.lora_all(p.x, *p.factors, **p.layer),
        "linear, matmul, baddbmm": all_outputs,
    }),
}  # fmt: skip
STEPS: Group = {
    "one adapter, y + low rank, forward and backward": (1, {
        OURS: step(lambda p: ops.lora_sum(p.x, *p.factors, base=p.y)),
        "mm, addmm": step(lambda p: addmm(p, p.y)),
        "y + s (x A') B'": step(lambda p: plain(p, p.y)),
    }),
    "10 segments, y + low rank, forward and backward": (10, {
        OURS: step(lambda p: indexed(p, base=p.by_image(p.y)).flatten(0, 1)),
        "mm, mm by segment": step(lambda p: by_segment(p, p.y)),
        "bmm, baddbmm by image": step(lambda p: by_image(p, p.y)),
    }),
    "one adapter, base layer included, forward and backward": (1, {
        OURS: lora_forms.TRAINED[OURS],
        "linear, mm, addmm": step(lambda p: addmm(p, base(p))),
        "linear + s (x A') B'": step(lambda p: plain(p, base(p))),
        "merge, linear": step(lora_forms.ONE[MERGE + ", then linear"]),
        BASE: lora_forms.TRAINED[BASE],
    }),
    "10 segments, base layer included, forward and backward": (10, {
        OURS: step(lambda p: indexed(p, **p.layer).flatten(0, 1)),
        "linear, mm, mm by segment": step(lambda p: by_segment(p, base(p))),
        "linear, bmm, baddbmm by image": step(lambda p: by_image(p, base(p))),
        BASE: lora_forms.TRAINED[BASE],
    }),
}  # fmt: skip


def low_rank(group: Group, images: int, dtype: torch.dtype, suffix: str) -> Iterator[Case]:
    """Images of 197 rows, in segments of one adapter each."""
    for name, (T, forms) in group.items():
        torch.manual_seed(0)
        ids, train = torch.arange(images) * T // images, "x A B" if group is STEPS else ""
        p = Problem(images * ROWS, (D, D), R, T, ids, train, "cpu", dtype)
        yield Case(f"{name}, {images * ROWS:,} rows{suffix}", {form: partial(call, p) for form, call in forms.items()})


def merge() -> Iterator[Case]:
    p = Problem(ROWS, (D, D), R, 10, device="cpu", dtype=torch.float32)
    yield Case("lora_merge of 10", {OURS: lambda: ops.lora_merge(p.weight, *p.factors), "addmm": lambda: merge_all(p)})


# ---------------------------------------------------------------------- the prototype operators


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


# ---------------------------------------------------------------------- a training step


class PlainLoRA(nn.Module):
    """What people write: the frozen layer, then the two thin ones beside it."""

    def __init__(self, layer: nn.Linear, r: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.A.T) @ self.B.T


def embedded_step(form: str) -> Callable[[], None]:
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


def every_case() -> Iterator[Case]:
    for make in (merge, prototypes, training):
        yield from make()
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, ", bfloat16")):
        for images in (16, 64):
            for group in (ADDED, WITH_BASE, STEPS):
                yield from low_rank(group, images, dtype, suffix)


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
    for case in every_case():
        for row in measure(case, args.seconds) if re.search(args.only, case.name) else ():
            rows.append(row)
            ratio = f"{row['ratio']} ({row['ratio_q1']}–{row['ratio_q3']})"
            lines.append((row["case"], row["form"], row["median_ms"], ratio))
            print(f"| {' | '.join(lines[-1])} |", flush=True)
    if args.out:
        harness.write(args.out, list(rows[0]), rows, harness.table(columns, lines, texts=2), where)


if __name__ == "__main__":
    main()
