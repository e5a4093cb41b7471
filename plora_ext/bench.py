"""Every operator with inputs and its twin, and what `plora-ext bench ensemble | prototypes | run` times.

Times are medians over rounds that visit every form in turn (A B C A B C ...), each call to its end on the device.
Before it is timed, what a form computes is compared with the first one's. A run is timed part by part (`time_run`).
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext import ops, reference
from plora_ext.cil import Settings
from plora_ext.cil.build import load_data, make_cache, make_stream
from plora_ext.cil.callbacks import Callback
from plora_ext.cil.evaluate import Evaluator
from plora_ext.cil.learner import Learner
from plora_ext.cil.stream import Task
from plora_ext.data import View
from plora_ext.info import environment
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


def fault(error: Exception, length: int = 150) -> str:
    """The first line of an error, for a table."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:length]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    expected = _first(case.forms[next(iter(case.forms))]())
    for name, form in case.forms.items():
        try:
            got = _first(form())  # warms up too
            if name in case.alike:
                lines[name].error = float((got.float() - expected.float()).norm() / expected.float().norm())
        except Exception as error:
            lines[name].note = fault(error, 120)
    times = in_turn({n: partial(timed, form) for n, form in case.forms.items() if not lines[n].note}, rounds)
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


# ---------------------------------------------------------------------- a run, part by part

EPOCHS = 3  # of which the first starts workers, decodes and captures


class Resident:
    """What a view of images gives, but the same random batch again and again, which is on the device."""

    def __init__(self, n: int, size: int, device: torch.device):
        self.n, self.batch = n, torch.empty(0)
        self.size, self.device = size, device

    def __len__(self) -> int:
        return self.n

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order."""
        if len(self.batch) != batch_size:
            self.batch = torch.randn(batch_size, 3, self.size, self.size, device=self.device)
        for first in range(0, self.n, batch_size):
            yield self.batch[: self.n - first]

    def __getitem__(self, rows: Tensor) -> Resident:
        part = Resident(len(rows), self.size, self.device)
        part.batch = self.batch
        return part

    def epoch(self, order: Tensor, batch_size: int, _: Any = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, batch) of a pass for training."""
        return zip(order.split(batch_size), self.split(batch_size))


class Clock(Callback):
    """When each fit began and its epochs ended, at which the host waits for the device."""

    def __init__(self) -> None:
        self.fits: list[list[float]] = []

    def fit(self, task: int, images: int) -> None:
        self.fits.append([time.perf_counter()])

    def epoch(self, number: int, loss: float) -> None:
        self.fits[-1].append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each epoch of the last fit."""
        return np.diff(self.fits[-1]).tolist() if self.fits else []


def time_run(settings: Settings, seconds: float = 2.0, tell: Callable[[str], None] = lambda line: None) -> Any:
    """Images a second of the parts of a run, and the seconds of its phases, on as many images as a part has time for.

    Args:
        settings: The run's.
        seconds: Of an epoch on one batch again and again, uncaptured; the first epoch of three counts only as such.
        tell: Called with the lines of a Markdown table of the parts as they are found.

    Returns:
        `images_per_second`: by part. `phases`: seconds of each over the first two tasks, training carried on to all
        epochs. `cuda_graphs`: what the run says of them. `images`: of the first task, and
        how many it has. `classes`: of each task.

    Raises:
        ValueError, OSError, torch.OutOfMemoryError: as the run itself.
    """
    if not 0 < seconds <= 600:
        raise ValueError(f"seconds must be above 0 and at most 600, got {seconds}")
    data = load_data(settings)
    stream = make_stream(settings, data)
    tasks = [stream.joined()] if settings.method == "joint" else stream.tasks
    rates: dict[str, float] = {}

    def found(part: str, images: int, seconds: float) -> None:
        if not rates:
            tell("| part | images/s |\n|---|---:|")
        rates[part] = images / seconds
        tell(f"| {part} | {rates[part]:,.0f} |")

    def learner(**changes: Any) -> tuple[Learner, Clock]:
        clock = Clock()
        return Learner(settings, callbacks=[clock], num_tasks=len(tasks), **{"epochs": EPOCHS, **changes}), clock

    def on_one_batch(task: Task, **changes: Any) -> list[float]:
        made, clock = learner(**changes)
        resident: Any = Resident(len(task.train), made.preparation.image_size, made.trainer.device)
        with made.random():
            made.learn(task, resident, task.classes)
        del made
        gc.collect()  # one model and graph at a time
        return clock.seconds

    whole, batch = len(tasks[0].train), settings.batch_size
    probe = on_one_batch(_thinned(tasks[0], 2 * batch), graphs="off", epochs=2)
    steps = int(2 * seconds / probe[-1]) if probe else 16  # nothing is trained
    n = min(whole, batch * max(4, steps))
    some = [_thinned(task, n) for task in tasks[:2]]
    n = len(some[0].train)

    made, clock = learner()
    trainer, look = made.trainer, made.preparation
    cuda = trainer.device.type == "cuda"
    if probe:
        found("step on one batch, eager", 2 * n, sum(on_one_batch(some[0], graphs="off")[1:]))
        if cuda and settings.graphs == "auto":
            found("step on one batch, captured", 2 * n, sum(on_one_batch(some[0])[1:]))

    train, test = View(data.train_images, look), View(data.test_images, look)
    evaluator = Evaluator(made.method, some, test, stream.task_of_class(), make_cache(settings, trainer))
    later = 0.0
    with made.random():
        for task in some:
            fits = len(clock.fits)
            made.learn(task, train, task.classes)
            if len(clock.fits) > fits:
                later += sum(clock.seconds[1:]) / (EPOCHS - 1)
            with trainer.phases("eval"):
                evaluator.after(task.index)
            if task.index == 0 and clock.fits:
                found("loop, first epoch", n, clock.seconds[0])
                found("loop, later", 2 * n, sum(clock.seconds[1:]))
        phases = dict(trainer.phases.seconds)
        if "train" in phases:
            phases["train"] += (settings.epochs - EPOCHS) * later

        def passed(call: Callable[[], Any]) -> float:
            call()
            synchronize(trainer.device)
            start = time.perf_counter()
            call()
            synchronize(trainer.device)
            return time.perf_counter() - start

        rows = torch.from_numpy(some[0].train)
        own, same = train[rows], Resident(n, look.image_size, trainer.device)
        if probe:
            found("data alone", n, passed(lambda: [None for _ in own.epoch(torch.randperm(n), batch)]))
        for part, images in (("evaluation, one batch", same), ("evaluation", own)):
            found(part, n, passed(partial(made.method.features, images)))  # type: ignore[arg-type]
    return {
        "settings": settings.as_dict(),
        "environment": environment(trainer.device),
        "images": [n, whole],
        "classes": [len(task.classes) for task in some],
        "images_per_second": rates,
        "phases": phases,
        "cuda_graphs": trainer.speed.graphs,
    }


def _thinned(task: Task, n: int) -> Task:
    """A task of n of its training images, at least one a class, and as large a part of its test images."""

    def chosen(labels: np.ndarray, number: int) -> np.ndarray:
        first = np.unique(labels, return_index=True)[1]
        rest = np.setdiff1d(np.arange(len(labels)), first)
        more = np.linspace(0, len(rest) - 1, min(max(number - len(first), 0), len(rest))).astype(int)
        return np.sort(np.concatenate([first, rest[more]]))

    train = chosen(task.train_labels, n)
    test = chosen(task.test_labels, round(len(task.test) * len(train) / len(task.train)))
    return replace(
        task, train=task.train[train], train_labels=task.train_labels[train], test=task.test[test],
        test_labels=task.test_labels[test],
    )  # fmt: skip


def shares(figures: dict[str, Any]) -> str:
    """The phases of `time_run` as a Markdown table."""
    phases, (n, whole) = figures["phases"], figures["images"]
    total, tasks, epochs = sum(phases.values()), len(figures["classes"]), figures["settings"]["epochs"]
    rows = [
        f"| phase ({tasks} task{'s' * (tasks > 1)}, {n} of {whole} images, {epochs} epochs) | seconds | share |",
        "|---|---:|---:|",
    ]
    rows += [f"| {name} | {spent:.2f} | {spent / total:.0%} |" for name, spent in phases.items()]
    return "\n".join([*rows, *(f"CUDA graph of {what}: {said}" for what, said in figures["cuda_graphs"].items())])
