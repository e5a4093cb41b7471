"""The loop against its own captured step, and passes against timm's: images a second, part by part.

    python benchmarks/graphs.py [--parts arrays files evaluation step small] [--batches 16 48 128] [--out FOLDER/NAME]

A ViT-B/16 with random weights, r = 16 on qkv and proj, bfloat16, transform pilot, cropped on the device.

    arrays      the loop over uint8 arrays on the device, against its step captured on one batch again and again
    files       the same over JPEG files of 256 pixels, which workers decode once or in every epoch
    evaluation  features and evaluation, against timm's plain forward, captured
    step        the captured step with two or all four linear layers of a block adapted, against the frozen backbone's
                captured forward and gradient to its input
    small       the loop of a small model, against itself without graphs

A loop's rate is that of the epochs after the first, which captures and decodes. `ratio` is the rate over that of what
it is measured against; of `step` the time over its.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import torch.nn.functional as F
from throughput import CLASSES, Loop, jpegs
from torch import Tensor

from plora_ext.bench import timed
from plora_ext.cil import Settings
from plora_ext.cil.build import pick_device
from plora_ext.cil.evaluate import classify
from plora_ext.cil.methods import METHODS
from plora_ext.cil.timing import Resident
from plora_ext.data import ImageFiles, Preparation, View
from plora_ext.data.view import SHARE
from plora_ext.graphs import Captured
from plora_ext.nn import Adapters

FIELDS = ("part", "case", "images_per_s", "against", "its_images_per_s", "ratio", "goal", "note")
EPOCHS = 4
Row = dict[str, Any]


class Bench(Loop):
    """The loop with bfloat16 and some linear layers adapted, and how images are looked at."""

    def __init__(
        self, args: argparse.Namespace, batch: int, model: str = "", modules: str = "qkv proj", **changes: Any
    ):
        name, _, size = (model or args.model).partition(":")
        settings = Settings(
            backbone=name, image_size=int(size) if size else None, weights="random", epochs=EPOCHS, batch_size=batch,
            eval_batch_size=args.eval_batch, amp="bfloat16", target_modules=modules.split(), **changes,
        )  # fmt: skip
        super().__init__(settings, pick_device(args.device))
        self.batch, self.plain = batch, copy.deepcopy(self.trainer.model)  # as timm has it

    def view(self, images: np.ndarray | ImageFiles, **look: Any) -> View:
        """Images of transform pilot, cropped on the device."""
        half = [0.5] * 3
        return View(images, Preparation(self.size, half, half, self.device, transform="pilot", on_device=True, **look))

    def arrays(self, n: int) -> View:
        return self.view(np.random.default_rng(0).integers(0, 256, (n, self.size, self.size, 3), dtype=np.uint8))

    def loop(self, adapters: Adapters, images: Any) -> float:
        """Images a second of the epochs after the first."""
        return len(images) / statistics.median(self.seconds(adapters, images)[1:])

    def step(self, adapters: Adapters) -> float:
        """Images a second of the captured step on a batch that does not change."""
        images = torch.randn(self.batch, 3, self.size, self.size, device=self.device)
        labels = torch.arange(self.batch, device=self.device) % CLASSES
        head = torch.randn(CLASSES, self.trainer.model.num_features, device=self.device).requires_grad_()
        optimizer = self.trainer.speed.optimizer([{"params": [*adapters.parameters("task0"), head]}])
        self.trainer.speed.set_rate(optimizer, 1e-3)
        self.trainer.model.train()

        def update(images: Tensor, labels: Tensor) -> Tensor:
            features = self.trainer.speed.forward(images, self.trainer.model)
            loss = F.cross_entropy(16 * F.linear(F.normalize(features), F.normalize(head)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return self.rate(Captured(update), images, labels)

    def rate(self, call: Callable[..., Any], *tensors: Tensor, calls: int = 20) -> float:
        """Images a second of a call with these tensors, again and again."""
        number = calls if self.device.type == "cuda" else 1

        def several() -> None:
            for _ in range(number):
                call(*tensors)

        for _ in range(6):
            call(*tensors)
        return 1e3 * number * len(tensors[0]) / statistics.median(timed(several, self.device) for _ in range(5))

    def said(self) -> str:
        return "; ".join(f"{what}: {line}" for what, line in self.trainer.speed.graphs.items())


def images_of(args: argparse.Namespace, batch: int) -> int:
    """Of an epoch, which is long enough for what begins and ends it."""
    return batch * args.steps * (1 if batch >= 128 else 2)


STEP = "its captured step on one batch"


def compared(
    case: str, rate: float, its: float, goal: str, against: str = STEP, note: str = "", times: bool = False
) -> Row:
    ratio = its / rate if times else rate / its
    return dict(zip(FIELDS[1:], (case, rate, against, its, ratio, goal, note)))


def arrays(args: argparse.Namespace) -> Iterator[Row]:
    for batch in args.batches:
        bench = Bench(args, batch)
        adapters = bench.adapted()
        rate = bench.loop(adapters, bench.arrays(images_of(args, batch)))
        yield compared(f"loop over arrays, B={batch}", rate, bench.step(adapters), ">= 0.95", note=bench.said())


def files(args: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="plora-graphs-") as folder:
        for batch in args.batches[-2:]:
            images = ImageFiles(jpegs(Path(folder, str(batch)), images_of(args, batch)))
            for what, cache, goal in (("once", SHARE, ">= 0.90"), ("every epoch", 0.0, ">= 0.75")):
                bench = Bench(args, batch)
                adapters = bench.adapted()
                rate = bench.loop(adapters, bench.view(images, workers=args.workers, cache=cache))
                case = f"loop over JPEG files decoded {what}, B={batch}, {args.workers} workers"
                yield compared(case, rate, bench.step(adapters), goal)


def evaluation(args: argparse.Namespace) -> Iterator[Row]:
    batch = args.eval_batch
    bench = Bench(args, batch)
    trainer, one = bench.trainer, torch.randn(batch, 3, bench.size, bench.size, device=bench.device)

    @torch.no_grad()
    def plain(images: Tensor) -> Tensor:
        return trainer.speed.forward(images, bench.plain)

    its = bench.rate(Captured(plain), one)
    method: Any = METHODS["plora"](trainer, bench.settings)
    method.adapters.add_adapter("task0")
    n = images_of(args, batch)
    method.prototypes = torch.randn(100, trainer.model.num_features, device=bench.device)
    on_device, stored = Resident(n, bench.size, bench.device), bench.arrays(n)
    calls: dict[str, Callable[[], Any]] = {
        "features of a batch on the device": lambda: trainer.features(on_device),  # type: ignore[arg-type]
        "features of arrays": lambda: trainer.features(stored),
        "evaluation on arrays, 100 classes": lambda: classify(method, stored, torch.arange(n), 100).cpu(),
    }
    for case, call in calls.items():
        _, *later = (timed(call, bench.device) for _ in range(4))
        rate = 1e3 * n / statistics.median(later)
        yield compared(f"{case}, B={batch}", rate, its, ">= 0.95", "timm's forward, captured", bench.said())


def step(args: argparse.Namespace) -> Iterator[Row]:
    batch = args.batches[-1]
    for modules, goal in (("qkv proj", "<= 1.08"), ("qkv proj fc1 fc2", "<= 1.12")):
        bench = Bench(args, batch, modules=modules)
        speed, model = bench.trainer.speed, bench.plain

        def to_input(images: Tensor, speed: Any = speed, model: Any = model) -> Tensor:
            pixels = images.detach().requires_grad_()
            return torch.autograd.grad(speed.forward(pixels, model).sum(), pixels)[0]

        its = bench.rate(Captured(to_input), torch.randn(batch, 3, bench.size, bench.size, device=bench.device))
        rate = bench.step(bench.adapted())
        against = "the frozen backbone's captured forward and gradient to its input"
        yield compared(f"captured step, {modules.replace(' ', ', ')}, B={batch}", rate, its, goal, against, times=True)


def small(args: argparse.Namespace) -> Iterator[Row]:
    rates = {}
    for graphs in ("off", "auto"):
        bench = Bench(args, args.small_batch, model=args.small, graphs=graphs)
        rates[graphs] = bench.loop(bench.adapted(), bench.arrays(images_of(args, args.small_batch)))
    case = f"loop, {args.small}, B={args.small_batch}"
    goal = ">= 6 x the loop before graphs"
    yield compared(case, rates["auto"], rates["off"], goal, "without graphs", bench.said())


PARTS = {part.__name__: part for part in (arrays, files, evaluation, step, small)}


def main() -> None:
    parser = harness.options(__doc__, "graphs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 48, 128])
    parser.add_argument("--model", default="vit_base_patch16_224:224", metavar="NAME:PIXELS", help="a model of timm")
    parser.add_argument("--small", default="vit_small_patch14_dinov2:84", metavar="NAME:PIXELS")
    parser.add_argument("--small-batch", type=int, default=64)
    parser.add_argument("--eval-batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=48, help="batches of an epoch")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = pick_device(args.device)
    if device.type == "cuda":
        harness.need_cuda()
    rows: list[Row] = []
    cells: list[list[Any]] = []
    for row in ({"part": part, **found} for part in args.parts for found in PARTS[part](args)):
        rows.append(row)
        cells.append([f"{v:{'.2f' if v < 9 else '.0f'}}" if isinstance(v, float) else v for v in row.values()])
        print(*cells[-1], sep=" | ", flush=True)
        text = harness.table(FIELDS, cells, texts=2, notes=2)
        harness.write(args.out, FIELDS, rows, text, harness.facts(device, args.commit))
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
