"""Small benchmarks of this installation: `plora-ext bench ensemble | prototypes`.

Times are medians over rounds that visit every form in turn (A B C A B C ...), each call to its end on the device.
Before it is timed, what a form computes is compared with the first one's.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext import ops, reference
from plora_ext.nn import Adapters, Ensemble, inject

OURS, LOOP, EASE, PLAIN = (
    "plora_ext",
    "one adapter after the other, merged",
    "EASE's pass as in LAMDA-PILOT",
    "the plain model on T B images",
)


@dataclass
class Case:
    """Forms of one computation, ours first.

    Attributes:
        name: what is computed.
        forms: by name; called without arguments.
        alike: the forms that compute the same numbers as the first, to rounding; the others do the same kind of work.
        slow: the forms of which one call is enough.
    """

    name: str
    forms: dict[str, Callable[[], Any]]
    alike: Sequence[str] = ()
    slow: Sequence[str] = ()


@dataclass
class Line:
    """One form, measured: milliseconds a call, the spread of the middle half, time over ours, relative difference."""

    case: str
    form: str
    median_ms: float = float("nan")
    iqr_ms: float = float("nan")
    over_ours: float = float("nan")
    error: float | None = None
    note: str = ""
    times: list[float] = field(default_factory=list, repr=False)


@torch.no_grad()
def measure(case: Case, device: torch.device, rounds: int) -> list[Line]:
    """The lines of a case; a form that fails is listed with its error."""

    def timed(form: Callable[[], Any]) -> float:
        synchronize(device)
        start = time.perf_counter()
        form()
        synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    lines = {name: Line(case.name, name) for name in case.forms}
    expected = first(case.forms[next(iter(case.forms))]())
    for name, form in case.forms.items():
        try:
            got = None if name in case.slow and name not in case.alike else first(form())  # warms up too
            if name in case.alike and got is not None:
                lines[name].error = float((got.float() - expected.float()).norm() / expected.float().norm())
        except Exception as error:
            lines[name].note = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    for turn in range(rounds):
        for name, form in case.forms.items():
            if not lines[name].note and (turn == 0 or name not in case.slow):
                lines[name].times.append(timed(form))
    ours = next(iter(lines.values()))
    for line in lines.values():
        if line.times:
            line.median_ms = statistics.median(line.times)
            quartiles = statistics.quantiles(line.times, n=4) if len(line.times) > 1 else [0.0, 0.0, 0.0]
            line.iqr_ms = quartiles[2] - quartiles[0]
            line.over_ours = line.median_ms / statistics.median(ours.times)
    return list(lines.values())


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(lines: Sequence[Line]) -> str:
    """A Markdown table."""
    rows = ["| case | form | median ms | its time / ours | difference | |", "|---|---|---:|---:|---:|---|"]
    for line in lines:
        numbers = (f"{line.median_ms:.3f}", f"{line.over_ours:.2f}") if line.median_ms == line.median_ms else ("–", "–")
        error = "–" if line.error is None else f"{line.error:.0e}"
        rows.append(f"| {line.case} | {line.form} | {' | '.join(numbers)} | {error} | {line.note} |")
    return "\n".join(rows)


# ---------------------------------------------------------------------- ensemble


class EasePass(nn.Module):
    """The test pass of EASE as LAMDA-PILOT has it (`backbone/vit_ease.py: forward_test`), on the weights of a timm ViT.

    Patches once; then for each adapter a copy of them through all blocks. q, k and v are three products, the attention
    matrix is made, softmaxed and multiplied; each block's adapter, W_u relu(W_d x + b_d) + b_u times 0.1, r = 64,
    stands beside the MLP and reads its input before the norm.

    Args:
        vit: the backbone, which it takes over; the three parts of qkv are copied.
        T: number of adapters, random ones.
        r: their rank.
    """

    def __init__(self, vit: Any, T: int, r: int = 64) -> None:
        super().__init__()
        self.vit = vit
        self.qkv: Any = nn.ModuleList()
        weight, dim = vit.pos_embed, vit.embed_dim
        for block in vit.blocks:
            parts: Any = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3)).to(weight)
            for part, rows, bias in zip(parts, block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)):
                part.weight.data.copy_(rows)
                part.bias.data.copy_(bias)
            self.qkv.append(parts)
        self.adapters: Any = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(dim, r), nn.ReLU(), nn.Linear(r, dim)) for _ in vit.blocks)
            for _ in range(T)
        ).to(weight)

    def forward(self, images: Tensor, T: int | None = None) -> Tensor:
        """[T, B, D] of images [B, 3, H, W] under the first T adapters, by default all."""
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(images))
        features = []
        for adapters in self.adapters[:T]:
            y = copy.deepcopy(x)
            for block, qkv, adapter in zip(vit.blocks, self.qkv, adapters):
                y = y + self._attention(block.attn, qkv, block.norm1(y))
                adapted = 0.1 * adapter(y)
                y = y + (block.mlp(block.norm2(y)) + adapted)
            features.append(vit.norm(y))
        return torch.stack([f[:, 0] for f in features])

    @staticmethod
    def _attention(attn: Any, qkv: Any, x: Tensor) -> Tensor:
        B, N, C = x.shape
        heads = attn.num_heads
        q, k, v = (p(x).view(B, N, heads, C // heads).transpose(1, 2).contiguous().flatten(0, 1) for p in qkv)
        weights = torch.bmm(q * (C // heads) ** -0.5, k.transpose(1, 2)).softmax(-1)
        y = torch.bmm(weights, v).view(B, heads, N, C // heads).transpose(1, 2).reshape(B, N, C)
        return attn.proj(y)


def create_vit(name: str) -> Any:
    """A timm model by name with random weights, or a ViT of the embedded backbone's size."""
    torch.manual_seed(0)
    if name == "small":
        return VisionTransformer(img_size=48, patch_size=12, embed_dim=192, depth=4, num_heads=3, num_classes=0)
    return timm.create_model(name, num_classes=0)


def random_adapters(model: nn.Module, T: int, r: int, targets: Sequence[str] = ("q", "v")) -> Adapters:
    """T random adapters in a model, frozen."""
    adapters = inject(model.eval(), targets, r=r)
    for t in range(T):
        add_random(adapters, f"task{t}")
    return adapters


def add_random(adapters: Adapters, name: str) -> None:
    """One more random adapter, frozen as the others."""
    adapters.add_adapter(name)
    for parameter in adapters.parameters(name):
        nn.init.normal_(parameter, std=0.02)
    adapters.train_adapter(None)


def one_by_one(adapters: Adapters, images: Tensor) -> Tensor:
    """The features under each adapter in turn, merged into the weight: what `Ensemble` is measured against."""
    features = []
    for name in adapters.names:
        adapters.set_adapter(name)
        features.append(adapters.model(images))
    return torch.stack(features)


def under_autocast(model: nn.Module, images: Tensor) -> Tensor:
    """bfloat16 autocast on a GPU; on a CPU the model as it is."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        return model(images)


def ensemble_cases(device: torch.device, quick: bool = False, model: str | None = None, T: int = 20) -> Iterator[Case]:
    """One batch under T adapters: on a GPU ViT-B/16 in bfloat16, EASE under autocast; on a CPU a small ViT, float32."""
    cuda = device.type == "cuda"
    name = model or ("vit_base_patch16_224" if cuda else "small")
    half = torch.bfloat16 if cuda else torch.float32
    plain = create_vit(name).eval().to(device)
    size = plain.patch_embed.img_size
    ease = EasePass(copy.deepcopy(plain), T).eval()  # keeps float32 weights
    adapters = random_adapters(copy.deepcopy(plain), T, r=16)
    adapters.model.to(half)
    plain.to(half)
    ensemble = Ensemble(adapters)
    for B in (16,) if quick else (16, 128) if cuda else (4, 16):
        torch.manual_seed(0)
        images = torch.randn(B, 3, *size, device=device)
        low = images.to(half)
        yield Case(
            f"{T} adapters, r=16 on q and v, {name}, B={B}, {str(half).removeprefix('torch.')}",
            {
                OURS: partial(ensemble, low),
                LOOP: partial(one_by_one, adapters, low),
                EASE: partial(under_autocast, ease, images),
                PLAIN: partial(plain, low.repeat(T, 1, 1, 1)),
            },
            alike=[LOOP],
        )


# ---------------------------------------------------------------------- prototypes


def ease_complete(prototypes: Tensor, task_of_class: Tensor) -> Tensor:
    """The upper triangle as EASE's `solve_sim_reset` fills it: a Python call for each pair of classes, on the CPU."""
    W, T = prototypes.cpu().clone(), prototypes.shape[1]
    members = [(task_of_class.cpu() == t).nonzero().squeeze(1).tolist() for t in range(T)]
    for i in range(T):
        for j in range(i + 1, T):
            keys = [k for t in range(j, T) for k in members[t]]
            for c in members[i]:
                similarity = torch.stack([torch.cosine_similarity(W[c, i], W[k, i], dim=0) for k in keys]).softmax(0)
                filled = torch.zeros_like(W[c, j])
                for weight, k in zip(similarity, keys):
                    filled += weight * W[k, j]
                W[c, j] = filled
    return W.to(prototypes.device)


def ease_logits(features: Tensor, prototypes: Tensor, task_of_class: Sequence[int], alpha: float) -> Tensor:
    """EASE's `forward_reweight`: T² normalised products, block by block."""
    T = prototypes.shape[1]
    out = []
    for i in range(T):
        rows = [c for c, t in enumerate(task_of_class) if t == i]
        logits = torch.zeros(len(features), len(rows), device=features.device)
        for j in range(T):
            weight = prototypes[rows[0] : rows[-1] + 1, j]
            cosine = F.linear(F.normalize(features[:, j], dim=1), F.normalize(weight, dim=1))
            logits = logits + (cosine if i == j else cosine * alpha / (T - 1))
        out.append(logits)
    return torch.cat(out, 1)


def prototype_cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    """The prototype operators beside plain torch and EASE's loops, D = 768."""
    D, C, T, B = 768, 100, 20, 128
    n = 5_000 if quick else 50_000

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    torch.manual_seed(0)
    features, labels = draw(n, D), torch.randint(0, C, (n,), device=device)
    yield Case(
        f"class_sums, {n:,} rows, {C} classes",
        {
            OURS: lambda: ops.class_sums(features, labels, C)[0],
            "plain torch": lambda: reference.class_sums(features, labels, C)[0],
            "one-hot product": lambda: F.one_hot(labels, C).float().T @ features,
        },
        alike=["plain torch", "one-hot product"],
    )
    for old, new in ((900, 100),) if quick else ((900, 100), (20_000, 1_000)):
        args = draw(old, D), draw(new, D), draw(new, D)
        yield Case(
            f"reconstruct_prototypes, {old:,} x {new:,}",
            {
                OURS: partial(ops.reconstruct_prototypes, *args),
                "plain torch": partial(reference.reconstruct_prototypes, *args),
            },
            alike=["plain torch"],
        )
    prototypes, task = draw(C, T, D), torch.arange(C, device=device) * T // C
    forms: dict[str, Callable[[], Any]] = {
        OURS: lambda: ops.complete_prototypes(prototypes, task),
        "plain torch, a product for each pair of tasks": lambda: reference.complete_prototypes(prototypes, task),
    }
    if not quick:
        forms["EASE's loops"] = lambda: ease_complete(prototypes, task)
    yield Case(f"complete_prototypes, {C} classes, {T} tasks", forms, alike=list(forms)[1:], slow=["EASE's loops"])
    images, tasks = draw(B, T, D), task.tolist()
    weights = ops.own_other_weights(task, T, 0.1)
    yield Case(
        f"subspace_logits, {B} images, {C} classes, {T} tasks",
        {
            OURS: lambda: ops.subspace_logits(images, prototypes, weights),
            "plain torch, one product": lambda: reference.subspace_logits(images, prototypes, weights),
            "EASE's forward_reweight": lambda: ease_logits(images, prototypes, tasks, 0.1),
        },
        alike=["plain torch, one product", "EASE's forward_reweight"],
    )


CASES: dict[str, Callable[..., Iterator[Case]]] = {"ensemble": ensemble_cases, "prototypes": prototype_cases}
