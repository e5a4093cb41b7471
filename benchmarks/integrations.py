"""Other codebases with and without this package's patch, and beside the best plain-torch form of the same work.

    python benchmarks/integrations.py [--quick] [--rows peft-train ease-eval ...] [--device cuda] [--limit SECONDS]

PEFT rows need peft; the others a checkout each: PLORA_PILOT of LAMDA-PILOT, PLORA_MAMMOTH of Mammoth. Weights are
random: only time is measured, and that results agree.

Rounds visit every form in turn; figures are medians over rounds. `error` is the largest difference of the result from
the host's own (for EASE from the host's own in fp32), relative to its largest entry; `equal` the share of equal
predictions. Writes NAME.csv, a line for each form, and NAME.md, after every case.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import numpy as np
import torch
import torch.nn.functional as F
from harness import Costs, costs
from pilot_ease import PilotData, ease_learner, ease_vit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from plora_ext import libraries, reference
from plora_ext.bench import fault
from plora_ext.integrations import _patch, _pilot_ease, _pilot_vit, pilot

FIELDS = (
    "row", "case", "form", "gpu_ms", "wall_ms", "peak_mb", "over_host", "over_torch", "error", "equal", "rounds",
    "note",
)  # fmt: skip


@dataclass
class Form:
    """One way to do the work: what to call, and what is patched while it is called."""

    name: str
    call: Callable[[], Any]
    inside: Callable[[], Any] = nullcontext
    before: Callable[[], None] = lambda: None
    plain: bool = False  # whether it is plain torch


@dataclass
class Case:
    """The same work in several forms; the first is the host's own."""

    row: str
    name: str
    forms: list[Form]
    truth: Callable[[], Any] | None = None  # what results are compared with, if not those of the host in this dtype
    note: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)


# ---------------------------------------------------------------------- measuring


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, np.ndarray):
        return [torch.from_numpy(result)]
    return [] if result is None else [t for part in result for t in flat(part)]


def compare(theirs: Any, ours: Any) -> tuple[float, float]:
    """Largest relative difference of floating-point results, and share of equal integer ones."""
    error = equal = float("nan")
    for a, b in zip(flat(theirs), flat(ours)):
        if a.is_floating_point():
            worst = float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30))
            error = max(worst, error) if error == error else worst
        else:
            equal = float((a == b).double().mean())
    return error, equal


def timed(form: Form, device: torch.device) -> Costs:
    form.before()
    return costs(form.call, device)


def measure(case: Case, device: torch.device, seconds: float, until: float) -> None:
    """Fills the lines of a case, in about `seconds`; a third round and later ones only before the time `until`."""
    times: dict[str, list[Costs]] = {}
    results: dict[str, tuple[float, float]] = {}
    first = [t.cpu() for t in flat(case.truth())] if case.truth else None
    for form in case.forms:
        try:
            with form.inside():
                form.before()
                begin = time.perf_counter()
                found = [t.to("cpu", copy=True) for t in flat(form.call())]
                if time.perf_counter() - begin < 1:
                    timed(form, device)  # warm; a longer call is warm enough by itself
            first = found if first is None else first
            results[form.name], times[form.name] = compare(first, found), []
        except Exception as error:
            case.lines.append({"form": form.name, "note": f"failed: {fault(error, f'{case.name}: {form.name}')}"})
    forms, start = [form for form in case.forms if form.name in times], time.perf_counter()
    for count in range(200 if forms else 0):
        now = time.perf_counter()
        spent = now - start
        if (count and now > until) or (count >= 3 and spent > 2 * seconds) or (count >= 5 and spent > seconds):
            break
        for form in forms:
            with form.inside():
                times[form.name].append(timed(form, device))
    for form in forms:
        measured = (statistics.median(part) for part in zip(*times[form.name]))
        line = dict(zip(("gpu_ms", "wall_ms", "peak_mb", "error", "equal"), (*measured, *results[form.name])))
        case.lines.append({"form": form.name, **line, "rounds": len(times[form.name])})
    clock = "gpu_ms" if device.type == "cuda" else "wall_ms"
    known = {line["form"]: line[clock] for line in case.lines if clock in line}
    best = min((known[form.name] for form in forms if form.plain), default=None)
    for line in case.lines:
        line.update(row=case.row, case=case.name, note=line.get("note") or case.note)
        for key, other in (("over_host", known.get(case.forms[0].name)), ("over_torch", best)):
            if line["form"] in known and other is not None:
                line[key] = other / known[line["form"]]
    gc.collect()


# ---------------------------------------------------------------------- PEFT


def peft_model(quick: bool, adapters: int, dtype: torch.dtype, device: torch.device) -> Any:
    import peft
    import timm

    sizes = {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 3} if quick else {}
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, **sizes).to(device, dtype)
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=["qkv", "proj", "fc1", "fc2"],
                             exclude_modules=["patch_embed.proj"], init_lora_weights=False)  # fmt: skip
    model = peft.get_peft_model(vit, config, adapter_name="a0", autocast_adapter_dtype=False)
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    return model.to(dtype).to(device)


def peft_forward(make: Callable[[], Callable[..., Tensor]]) -> Any:
    """Another forward in the place of PEFT's LoRA layer's, while this is entered."""
    import peft.tuners.lora as lora

    return mock.patch.object(lora.Linear, "forward", make())


def lean() -> Callable[..., Tensor]:
    """One adapter with nothing around it: three products, the last one added in place of a sum of its own."""

    def forward(self: Any, x: Tensor) -> Tensor:
        (name,) = self.active_adapters
        h = F.linear(x, self.lora_A[name].weight).flatten(0, -2)
        y = self.base_layer(x)
        up = self.lora_B[name].weight.T
        return torch.addmm(y.flatten(0, -2), h, up, alpha=self.scaling[name]).view_as(y)

    return forward


def mixed(masked: bool) -> Callable[..., Tensor]:
    """Mixed batches without PEFT's loop: each sample's own factors in two batched products, or, masked, all adapters'
    factors side by side in two plain ones, with zeros where a sample has another adapter."""
    indices: dict[tuple[str, ...], Tensor] = {}

    def forward(self: Any, x: Tensor, adapter_names: list[str]) -> Tensor:
        known, key = list(self.lora_A), tuple(adapter_names)
        if key not in indices:
            indices[key] = torch.tensor([known.index(name) for name in key], device=x.device)
        ids = indices[key]
        A, B = (torch.stack([factors[name].weight for name in known]) for factors in (self.lora_A, self.lora_B))
        y, B = self.base_layer(x), B * self.scaling[known[0]]
        if not masked:
            return torch.baddbmm(y, x @ A[ids].transpose(1, 2), B[ids].transpose(1, 2))
        h = F.linear(x, A.flatten(0, 1)).unflatten(-1, (len(known), -1))
        h = (h * F.one_hot(ids, len(known)).to(h.dtype)[:, None, :, None]).flatten(2).flatten(0, 1)
        return torch.addmm(y.flatten(0, 1), h, B.transpose(1, 2).flatten(0, 1)).view_as(y)

    return forward


def training_step(net: Any, images: Tensor, labels: Tensor, optimizer: Any, autocast: bool) -> Tensor:
    """The gradient of the first parameter that trains."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(net(images).float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return optimizer.param_groups[0]["params"][0].grad.clone()


def peft_training(quick: bool, device: torch.device, compiled: bool) -> Iterator[Case]:
    from plora_ext.integrations import peft as integration

    size, B = (64, 4) if quick else (224, 128)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True), *(((torch.float32, False),) * quick)):
        model = peft_model(quick, 1, dtype, device).train()
        images = torch.randn(B, 3, size, size, device=device, dtype=dtype)
        labels = torch.randint(model.num_features, (B,), device=device)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
        step = partial(training_step, images=images, labels=labels, optimizer=optimizer, autocast=autocast)
        forms = [Form("PEFT", partial(step, model)), Form("PEFT, patched", partial(step, model), integration.patch)]
        if compiled:
            torch._dynamo.reset()
            forms.append(Form("PEFT, torch.compile", partial(step, torch.compile(model)), plain=True))
        else:
            inside = partial(peft_forward, lean)
            forms.append(Form("PEFT, three plain products", partial(step, model), inside, plain=True))
        what = "autocast to bf16" if autocast else str(dtype).removeprefix("torch.")
        yield Case("peft", f"training step, ViT-B/16, r=16 on all linears, B={B}, {what}", forms)


def peft_mixed(quick: bool, device: torch.device) -> Iterator[Case]:
    from plora_ext.integrations import peft as integration

    adapters, size, B = (10, 64, 10) if quick else (10, 224, 64)
    for dtype in (torch.bfloat16, torch.float32):
        model = peft_model(quick, adapters, dtype, device).eval()
        images = torch.randn(B, 3, size, size, device=device, dtype=dtype)
        segments = [f"a{i * adapters // B}" for i in range(B)]
        shuffled = [segments[i] for i in np.random.default_rng(0).permutation(B)]
        for order, names in (("in segments", segments), ("shuffled", shuffled)):
            infer = torch.no_grad()(partial(model, images, adapter_names=names))
            rows, what = B * (size // 16) ** 2 + B, str(dtype).removeprefix("torch.")
            forms = [Form("PEFT", infer), Form("PEFT, patched", infer, integration.patch)]
            for name, masked in (("PEFT, two batched products", False), ("PEFT, all adapters masked", True)):
                forms.append(Form(name, infer, partial(peft_forward, partial(mixed, masked)), plain=True))
            yield Case("peft", f"mixed batch of {adapters} adapters {order}, ViT-B/16, M={rows}, {what}", forms)


# ---------------------------------------------------------------------- LAMDA-PILOT


class Images:
    """A data set in memory, as PILOT's loaders want it."""

    def __init__(self, n: int, per_class: int, size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = np.arange(n) // per_class
        self.images = np.arange(n)
        self.trsf, self.use_path = None, False
        # A coarse pattern for each class, and noise: what is classified has a margin.
        coarse = torch.rand(int(self.labels[-1]) + 1, 3, 4, 4, generator=generator)
        patterns = F.interpolate(coarse, size=(size, size), mode="bilinear")[torch.from_numpy(self.labels)]
        self.pixels = (patterns + 0.2 * torch.rand(n, 3, size, size, generator=generator)).to(device)

    def first(self, n: int) -> Images:
        """A data set of the first n images."""
        part = copy.copy(self)
        part.images, part.labels = self.images[:n], self.labels[:n]
        return part

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[int, Tensor, int]:
        return i, self.pixels[i], int(self.labels[i])


def learner(T: int, quick: bool, inc: int, device: torch.device) -> Any:
    """An EASE learner that has seen T tasks, with random adapters and prototypes."""
    pilot._old_timm_names()
    logging.disable(logging.INFO)
    size = {"img_size": 32, "depth": 2, "mlp_ratio": 0.25} if quick else {"depth": 12, "mlp_ratio": 4}
    labels = np.arange(T * inc)
    ease, _ = ease_learner(
        lambda: ease_vit(device, **size), lambda _: PilotData((labels, labels), (labels, labels)), seed=0,
        init_cls=inc, increment=inc, epochs=1, workers=0, device=device,
    )  # fmt: skip
    network = ease._network.requires_grad_(False).to(device)
    for task in range(T):
        for parameter in network.backbone.cur_adapter.parameters():
            nn.init.normal_(parameter, std=0.05)
        network.update_fc((task + 1) * inc)
        network.eval()  # before adapters join the list, where PILOT does not reach them
        if task < T - 1:
            network.backbone.add_adapter_to_list()
    network.to(device).eval()
    ease._cur_task, ease._known_classes, ease._total_classes = T - 1, (T - 1) * inc, T * inc
    return ease


@torch.no_grad()
def fill_prototypes(ease: Any, loader: Any) -> None:
    """Every class's mean in every subspace."""
    vit, device = ease._network.backbone, ease._device
    sums, counts = torch.zeros_like(ease._network.fc.weight), torch.zeros(ease._total_classes, device=device)
    for _, images, labels in loader:
        features = torch.cat(_pilot_vit.adapter_features(vit, images, _pilot_ease.subspaces_of(vit, False)), 2)[:, 0]
        sums.index_add_(0, labels.to(device), features)
        counts += torch.bincount(labels, minlength=len(counts)).to(device)
    ease._network.fc.weight.copy_(sums / counts[:, None])


@contextmanager
def sdpa_only() -> Iterator[None]:
    """PILOT's own loops with torch's fused attention: what one line of plain torch gives."""
    patch = _patch.Patch("attention")
    patch.replace("backbone.vit_ease:Attention.forward", _patch.instead(_pilot_vit.attention))
    with patch:
        yield


def ease_in_memory(quick: bool, device: torch.device) -> Iterator[tuple[int, Any, Images, Any, int]]:
    """T, an EASE learner after T tasks, test images of all classes with their loader, and classes a task."""
    for T, inc, images in ((3, 5, 30),) if quick else ((10, 10, 200), (20, 5, 200)):
        ease = learner(T, quick, inc, device)
        data = Images(images, images // (T * inc), 32 if quick else 224, device)
        loader = DataLoader(data, 6 if quick else 48)
        fill_prototypes(ease, loader)
        yield T, ease, data, loader, inc
        del ease, data, loader
        gc.collect()


def within(call: Callable[[], Any], device: torch.device, autocast: bool) -> Callable[[], Any]:
    """PILOT's way to evaluate: no gradients; autocast as a user would put it around."""

    def run() -> Any:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return call()

    return run


DTYPES = {False: "fp32", True: "bf16 autocast"}
SDPA = "PILOT, torch's attention"
PATCHED: dict[str, dict[str, Any]] = {"PILOT, patched": {"inside": pilot.patch}}


def ease_case(
    name: str, call: Callable[[], Any], device: torch.device, autocast: bool, patched: Any = PATCHED, note: str = ""
) -> Case:
    """A computation without gradients by EASE itself, patched, and with torch's attention."""
    run = within(call, device, autocast)
    ours = [Form(form, run, **how) for form, how in patched.items()]
    forms = [Form("PILOT", run), *ours, Form(SDPA, run, sdpa_only, plain=True)]
    truth = within(call, device, False) if autocast else None
    return Case("pilot", f"{name}, {DTYPES[autocast]}", forms, truth, note)


def kept_before(ease: Any, loader: Any, autocast: bool) -> Any:
    """What the patch keeps of these images where there is no newest adapter yet."""
    vit, device = ease._network.backbone, ease._device
    newest, vit.cur_adapter = vit.cur_adapter, vit.adapter_list[-1]
    with torch.no_grad(), pilot.patch(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        list(_pilot_vit.features_of(ease, loader, True, _pilot_ease.subspaces_of(vit, False)))
        kept = _pilot_vit.kept.get(ease)
    vit.cur_adapter = newest
    return kept


def ease_evaluation(quick: bool, device: torch.device) -> Iterator[Case]:
    for T, ease, data, loader, inc in ease_in_memory(quick, device):
        images = data.pixels[torch.randperm(len(data))[: loader.batch_size].to(device)]
        earlier = DataLoader(data.first((T - 1) * (len(data) // T)), loader.batch_size)

        def batch(network: Any = ease._network, images: Tensor = images) -> list[Tensor]:
            logits = network(images, test=True)["logits"]
            return [logits, logits.argmax(1)]

        def evaluate(ease: Any = ease, loader: Any = loader) -> Any:
            return ease._eval_cnn(loader)[0][:, 0]  # the best of the top 5

        for autocast in DTYPES:
            yield ease_case(f"EASE, one test batch, T={T}, B={len(images)}", batch, device, autocast)
        name = f"EASE, _eval_cnn after task {T}, {len(data)} images of {T * inc} classes"
        note = "the loader and the per-sample loop of the host are part of it"
        for autocast in DTYPES:
            kept = kept_before(ease, earlier, autocast)

            def remember(ease: Any = ease, kept: Any = kept) -> None:
                _pilot_vit.kept[ease] = copy.deepcopy(kept)

            patched = {
                "PILOT, patched, cache": {"inside": pilot.patch, "before": remember},
                "PILOT, patched, no cache": {"inside": partial(pilot.patch, cache=False)},
            }
            yield ease_case(name, evaluate, device, autocast, patched, note)


def ease_prototypes(quick: bool, device: torch.device) -> Iterator[Case]:
    for T, ease, data, loader, inc in ease_in_memory(quick, device):
        weights = ease._network.fc.weight.data.clone()
        new = Images(2 * loader.batch_size, -(-2 * loader.batch_size // inc), data.pixels.shape[-1], device)
        new.labels = new.labels + (T - 1) * inc
        ease.train_dataset_for_protonet = new
        new_loader = DataLoader(new, loader.batch_size)

        def prototypes(ease: Any = ease, loader: Any = new_loader) -> Tensor:
            with mock.patch.object(ease, "solve_sim_reset"):  # a case of its own
                ease.replace_fc(loader)
            return ease._network.fc.weight.data[-ease.inc :].clone()

        for autocast in DTYPES:
            yield ease_case(f"EASE, prototypes of a task, T={T}, {len(new)} images", prototypes, device, autocast)

        def restore(ease: Any = ease, weights: Tensor = weights) -> None:
            ease._network.fc.weight.data.copy_(weights)

        def solve(ease: Any = ease) -> Tensor:
            ease.solve_sim_reset()
            return ease._network.fc.weight.data.clone()

        def vectorised(ease: Any = ease, T: int = T, inc: int = inc) -> Tensor:
            weight = ease._network.fc.weight.data
            blocks = weight.view(len(weight), T, -1)
            tasks = torch.arange(len(weight), device=weight.device) // inc
            blocks.copy_(reference.complete_prototypes(blocks, tasks))
            return weight.clone()

        forms = [Form("PILOT", solve, before=restore), Form("PILOT, patched", solve, pilot.patch, restore)]
        forms += [Form("vectorised torch", vectorised, before=restore, plain=True)]
        yield Case("pilot", f"EASE, solve_sim_reset, T={T}, {T * inc} classes", forms)


def ease_training(quick: bool, device: torch.device) -> Iterator[Case]:
    B, size, inc = (6, 32, 5) if quick else (48, 224, 10)
    ease = learner(1, quick, inc, device)
    network = ease._network
    network.backbone.cur_adapter.requires_grad_(True)
    network.proxy_fc.requires_grad_(True)
    images, labels = torch.rand(B, 3, size, size, device=device), torch.randint(inc, (B,), device=device)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.0)
    for autocast, what in DTYPES.items():
        steps = 5 if quick else 100 if autocast else 30

        def train(autocast: bool = autocast, steps: int = steps) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                ease._init_train([(None, images, labels)] * steps, None, optimizer, None)

        forms = [Form("PILOT", train), Form("PILOT, patched", train, pilot.patch)]
        forms.append(Form(SDPA, train, sdpa_only, plain=True))
        note = "PILOT's loop over a batch on the device; with the patch four steps come before the graph"
        yield Case("pilot", f"EASE, {steps} training steps, B={B}, {what}", forms, note=note)


# ---------------------------------------------------------------------- Mammoth


def mammoth_cases(quick: bool, device: torch.device) -> Iterator[Case]:
    from backbone.utils.lora_utils import LoRALinear

    from plora_ext.integrations import mammoth

    B, N, d, out, T, r = (4, 17, 96, 288, 10, 16) if quick else (128, 197, 768, 2304, 10, 16)
    layer = LoRALinear(d, out).to(device)
    x = torch.randn(B, N, d, device=device)
    A = (torch.randn(T, r, d, device=device) * 0.02).requires_grad_()
    Bs = (torch.randn(T, out, r, device=device) * 0.02).requires_grad_()

    def concatenated(self: Any, x: Tensor, AB: Any = None) -> Tensor:
        wide = AB["B"].transpose(0, 1).reshape(self.out_features, -1)
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, AB["A"].flatten(0, 1)), wide)

    def layer_of(autocast: bool, train: bool) -> list[Tensor]:
        with torch.set_grad_enabled(train), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = layer(x, {"A": A, "B": Bs})
        return [y.detach(), *(torch.autograd.grad(y.float().sum(), [A, Bs]) if train else ())]

    instead = partial(mock.patch.object, LoRALinear, "forward", concatenated)
    for autocast, what in DTYPES.items():
        for train in (False, True):
            call, passes = partial(layer_of, autocast, train), "forward and backward" if train else "forward"
            yield Case(
                "mammoth", f"LoRALinear {d}→{out}, T={T}, r={r}, M={B * N}, {passes}, {what}",
                [
                    Form("Mammoth", call), Form("Mammoth, patched", call, partial(mammoth.patch, model=False)),
                    Form("two products of concatenated factors", call, instead, plain=True),
                ],
            )  # fmt: skip


# ---------------------------------------------------------------------- the table

ROWS: dict[str, tuple[Callable[[bool, torch.device], Iterator[Case]], str]] = {
    "peft-train": (partial(peft_training, compiled=False), ""),
    "peft-mixed": (peft_mixed, ""),
    "ease-eval": (ease_evaluation, "PLORA_PILOT"),
    "ease-prototypes": (ease_prototypes, "PLORA_PILOT"),
    "ease-train": (ease_training, "PLORA_PILOT"),
    "mammoth": (mammoth_cases, "PLORA_MAMMOTH"),
    "peft-compile": (partial(peft_training, compiled=True), ""),  # last: compiling takes longer than all the others
}


FIGURES = {  # of a line: title, format
    "gpu_ms": ("GPU ms", ".3f"), "wall_ms": ("wall ms", ".3f"), "peak_mb": ("peak MB", ".0f"),
    "over_host": ("host's time / its", ".2f"), "over_torch": ("best torch's / its", ".2f"), "error": ("error", ".1e"),
    "equal": ("equal", ".4f"),
}  # fmt: skip


def figures(line: dict[str, Any]) -> list[str]:
    return [harness.number(line.get(name), spec, "") for name, (_, spec) in FIGURES.items()]


def report(cases: list[Case], skipped: list[str], device: torch.device, commit: str | None) -> str:
    where = harness.facts(device, commit)
    text = f"`{where.pop('command')}`\n{harness.said(where)}, {libraries.backend()}\n"
    for case in cases:
        failed = {line["form"]: [line["note"], *[""] * 6] for line in case.lines if "wall_ms" not in line}
        rows = ([line["form"], *failed.get(line["form"], figures(line))] for line in case.lines)
        note, columns = f" ({case.note})" if case.note else "", ("form", *(title for title, _ in FIGURES.values()))
        text += f"\n\n**{case.row}: {case.name}**{note}\n\n{harness.table(columns, rows)}"
    return "\n".join([text, *skipped]) + "\n"


@contextmanager
def checkout(variable: str) -> Iterator[None]:
    """The folder that a variable names, importable; its modules are forgotten after, as hosts share their names."""
    if not variable:
        yield
        return
    folder, before = Path(os.environ[variable]).resolve(), set(sys.modules)
    its = {path.stem for path in folder.iterdir()}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in its:
                del sys.modules[name]


def main() -> None:
    parser = harness.options(__doc__, "integrations")
    rows = list(ROWS)
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, metavar="ROWS", help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--seconds", type=float, default=4.0, help="for the rounds of a case (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1e9, help="no case starts after this many seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    warnings.simplefilter("ignore", FutureWarning)
    torch.manual_seed(0)
    cases: list[Case] = []
    skipped: list[str] = []
    start = time.perf_counter()

    def keep() -> None:
        lines = [line for case in cases for line in case.lines]
        harness.write(args.out, FIELDS, lines, report(cases, skipped, device, args.commit))

    def skip(text: str) -> None:
        skipped.append(text)
        print(text, flush=True)
        keep()

    for row in args.rows:
        make, variable = ROWS[row]
        if variable and not os.environ.get(variable):
            skip(f"{row}: left out, {variable} names no checkout")
            continue
        try:
            with checkout(variable):
                for case in make(args.quick, device):
                    if time.perf_counter() - start > args.limit:
                        skip(f"{row}: cut at {case.name}, {args.limit:.0f} s are over")
                        break
                    measure(case, device, 0.3 if args.quick else args.seconds, start + args.limit)
                    case.forms, case.truth = [], None  # and with them models and data
                    cases.append(case)
                    keep()
                    print(f"{time.perf_counter() - start:5.0f} s", case.row, case.name, sep=" | ")
                    for line in case.lines:
                        print("   ", line["form"], *figures(line), line["note"], sep=" | ", flush=True)
        except Exception as error:  # the other rows are worth having
            skip(f"{row}: failed: {fault(error, row, 300)}")
            traceback.print_exc()


if __name__ == "__main__":
    main()
