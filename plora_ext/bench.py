"""Every operator with inputs and its twin, and what `plora-ext bench ensemble | prototypes` times.

Times are medians over rounds that visit every form in turn (A B C A B C ...), each call to its end on the device.
Before it is timed, what a form computes is compared with the first one's.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext import ops, reference
from plora_ext.nn import Adapters, Ensemble, inject

OURS, TWIN, LOOP, PLAIN = (
    "plora_ext", "plain torch", "one adapter after the other, merged", "the plain model on T B images"
)  # fmt: skip


# ---------------------------------------------------------------------- the operators


class Operator(NamedTuple):
    """An operator: `make` draws its arguments at some sizes, those of `sizes` where nothing else is said."""

    name: str
    make: Callable[..., dict[str, Any]]
    sizes: dict[str, int]

    @property
    def forms(self) -> dict[str, Callable[..., Any]]:
        """The operator and its twin, by what they are called in tables."""
        return {OURS: getattr(ops, self.name), TWIN: getattr(reference, self.name)}

    def inputs(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int
    ) -> dict[str, Any]:
        """Its arguments by name, random ones of torch's global generator."""
        return self.make(partial(torch.randn, device=device, dtype=dtype), **{**self.sizes, **sizes})


def _lora(draw: Any, T: int, r: int, D: int, out: int) -> dict[str, Tensor]:
    factors = {"lora_A": draw(T, r, D) / D**0.5, "lora_B": draw(T, out, r), "weight": draw(out, D) / D**0.5}
    return {**factors, "scaling": torch.full((T,), 0.5, device=factors["weight"].device)}


def _layer(draw: Any, images: int, rows: int, indexed: bool, **sizes: int) -> dict[str, Tensor]:
    given = {"x": draw(images, rows, sizes["D"]), **_lora(draw, **sizes), "bias": draw(sizes["out"])}
    ids = torch.arange(images, device=given["x"].device) % sizes["T"]
    return given | ({"ids": ids} if indexed else {})


def _class_sums(draw: Any, n: int, C: int, D: int) -> dict[str, Any]:
    features = draw(n, D)
    return {"features": features, "labels": torch.randint(C, (n,), device=features.device), "num_classes": C}


def _complete(draw: Any, C: int, T: int, D: int) -> dict[str, Tensor]:
    prototypes = draw(C, T, D)
    return {"prototypes": prototypes, "task_of_class": torch.arange(C, device=prototypes.device) * T // C}


def _logits(draw: Any, B: int, C: int, T: int, D: int) -> dict[str, Tensor]:
    given = _complete(draw, C, T, D)
    weights = ops.own_other_weights(given["task_of_class"], T, 0.1)
    return {"features": draw(B, T, D), "prototypes": given["prototypes"], "weights": weights}


_LAYER = {"images": 16, "rows": 197, "D": 768, "out": 768, "T": 10, "r": 16}  # of a ViT-B/16
OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("lora_indexed", partial(_layer, indexed=True), _LAYER),
        Operator("lora_sum", partial(_layer, indexed=False), _LAYER),
        Operator("lora_all", partial(_layer, indexed=False), _LAYER),
        Operator("lora_merge", _lora, {name: _LAYER[name] for name in ("T", "r", "D", "out")}),
        Operator("class_sums", _class_sums, {"n": 50_000, "C": 100, "D": 768}),
        Operator(
            "reconstruct_prototypes",
            lambda draw, old, new, D: {"old": draw(old, D), "new": draw(new, D), "values": draw(new, D)},
            {"old": 900, "new": 100, "D": 768},
        ),
        Operator("complete_prototypes", _complete, {"C": 100, "T": 20, "D": 768}),
        Operator("subspace_logits", _logits, {"B": 128, "C": 100, "T": 20, "D": 768}),
    )
}


# ---------------------------------------------------------------------- measuring


@dataclass
class Case:
    """Forms of one computation, ours first.

    Attributes:
        name: what is computed.
        forms: by name; called without arguments.
        alike: the forms that compute the same numbers as the first, to rounding; the others do the same kind of work.
    """

    name: str
    forms: dict[str, Callable[[], Any]]
    alike: Sequence[str] = ()


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


def in_turn(
    calls: Mapping[Any, Callable[[], Any]], rounds: int, seconds: float = 0.0, most: int = 2000, turning: bool = False
) -> dict[Any, list[Any]]:
    """What each call returns, by its key: round after round, at least `rounds` of them and until `seconds` are over.

    With `turning` every round begins with another call.
    """
    found: dict[Any, list[Any]] = {key: [] for key in calls}
    keys, end, count = list(calls), time.perf_counter() + seconds, 0
    while calls and (count < rounds or (time.perf_counter() < end and count < most)):
        first = count % len(keys) if turning else 0
        for key in (*keys[first:], *keys[:first]):
            found[key].append(calls[key]())
        count += 1
    return found


def fault(error: Exception, of: str, length: int = 150) -> str:
    """The first line of the error of a form, for a table.

    Raises:
        RuntimeError: with the form's name, where the GPU serves this process no more.
    """
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0][:length]
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise RuntimeError(f"{of} broke the GPU's context: {line}") from error
    return line


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call, to its end on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def measure(case: Case, device: torch.device, rounds: int) -> list[Line]:
    """The lines of a case; a form that fails is listed with its error."""
    lines = {name: Line(case.name, name) for name in case.forms}
    expected = _first(case.forms[next(iter(case.forms))]())
    for name, form in case.forms.items():
        try:
            got = _first(form())  # warms up too
            if name in case.alike:
                lines[name].error = float((got.float() - expected.float()).norm() / expected.float().norm())
        except Exception as error:
            lines[name].note = fault(error, f"{case.name}: {name}", 120)
    sound = {name: form for name, form in case.forms.items() if not lines[name].note}
    times = in_turn({name: partial(timed, form, device) for name, form in sound.items()}, rounds)
    ours = next(iter(times.values()))
    for name, own in times.items():
        line, line.times = lines[name], own
        line.median_ms = statistics.median(own)
        quartiles = statistics.quantiles(own, n=4) if len(own) > 1 else [0.0, 0.0, 0.0]
        line.iqr_ms, line.over_ours = quartiles[2] - quartiles[0], line.median_ms / statistics.median(ours)
    return list(lines.values())


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def table(lines: Sequence[Line]) -> str:
    """A Markdown table."""
    rows = ["| case | form | median ms | its time / ours | difference | |", "|---|---|---:|---:|---:|---|"]
    for line in lines:
        numbers = (f"{line.median_ms:.3f}", f"{line.over_ours:.2f}") if line.median_ms == line.median_ms else ("–", "–")
        error = "–" if line.error is None else f"{line.error:.0e}"
        rows.append(f"| {line.case} | {line.form} | {' | '.join(numbers)} | {error} | {line.note} |")
    return "\n".join(rows)


# ---------------------------------------------------------------------- what is measured


def create_vit(name: str) -> Any:
    """A timm model by name with random weights, or a ViT of the embedded backbone's size."""
    torch.manual_seed(0)
    if name == "small":
        return VisionTransformer(img_size=48, patch_size=12, embed_dim=192, depth=4, num_heads=3, num_classes=0)
    return timm.create_model(name, num_classes=0)


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


def ensemble_cases(
    device: torch.device,
    quick: bool = False,
    model: str | None = None,
    T: int = 20,
    rivals: Callable[[Any], dict[str, Callable[[Tensor], Any]]] = lambda vit: {},
) -> Iterator[Case]:
    """One batch under T adapters: on a GPU ViT-B/16 in bfloat16, on a CPU a small ViT in float32.

    `rivals` makes further forms from a copy of the float32 model; they are called with float32 images.
    """
    cuda = device.type == "cuda"
    name = model or ("vit_base_patch16_224" if cuda else "small")
    half = torch.bfloat16 if cuda else torch.float32
    plain = create_vit(name).eval().to(device)
    size = plain.patch_embed.img_size
    others = rivals(copy.deepcopy(plain))
    adapters = inject(copy.deepcopy(plain), ("q", "v"), r=16)
    for t in range(T):
        add_random(adapters, f"task{t}")
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
                **{rival: partial(form, images) for rival, form in others.items()},
                PLAIN: partial(plain, low.repeat(T, 1, 1, 1)),
            },
            alike=[LOOP],
        )


def prototype_cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    """The prototype operators beside their twins, D = 768."""
    torch.manual_seed(0)
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("class_sums", {"n": 5_000 if quick else 50_000}, "{n:,} rows, {C} classes"),
        ("reconstruct_prototypes", {}, "{old:,} x {new:,}"),
        ("reconstruct_prototypes", {} if quick else {"old": 20_000, "new": 1_000}, "{old:,} x {new:,}"),
        ("complete_prototypes", {}, "{C} classes, {T} tasks"),
        ("subspace_logits", {}, "{B} images, {C} classes, {T} tasks"),
    )
    for name, sizes, text in cases:
        operator, given = OPERATORS[name], OPERATORS[name].inputs(device, **sizes)
        forms: dict[str, Callable[[], Any]] = {form: partial(call, **given) for form, call in operator.forms.items()}
        yield Case(f"{name}, {text.format(**operator.sizes | sizes)}", forms, alike=[TWIN])


CASES: dict[str, Callable[..., Iterator[Case]]] = {"ensemble": ensemble_cases, "prototypes": prototype_cases}
