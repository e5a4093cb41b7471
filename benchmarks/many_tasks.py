"""What a task costs when there are many: 100 tasks of ten classes, seconds, memory and checkpoint after each.

    python benchmarks/many_tasks.py --out benchmarks/results/many_tasks
    python benchmarks/many_tasks.py --methods plora --tasks 1000 --train 2 --test 1 --every 10 --out ...
    python benchmarks/many_tasks.py --device cuda --model vit_base_patch16_224 --amp bfloat16 --train 50 --out ...

Images are random, each class around a picture of its own; the loop and its checkpoints are the package's. Every method
runs in a process of its own. Writes OUT.csv, a row for each method and task (of more than 200, each tenth), and OUT.md:
medians over ten tasks at the beginning and at the end, and their ratio. Evaluation is over all classes seen, so its
time grows with them whatever the method; its time per image is what a method answers for.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from plora_ext.cil import Settings, training
from plora_ext.cil.build import pick_device
from plora_ext.cil.callbacks import Callback
from plora_ext.cil.checkpoint import Checkpoint
from plora_ext.cil.loop import run
from plora_ext.cil.methods import METHODS
from plora_ext.data import Backbone, Images
from plora_ext.info import environment

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
FIGURES = {  # column: title of the table, digits
    "train": ("train s", 3), "prototypes": ("prototypes s", 3), "align": ("align s", 4),
    "checkpoint": ("checkpoint s", 4), "eval_us_per_image": ("evaluation µs an image", 1), "peak_mb": ("peak MiB", 0),
    "rss_mb": ("resident MiB", 0), "live_mb": ("tensors MiB", 1), "checkpoint_kib": ("checkpoint KiB a task", 1),
}  # fmt: skip


def create(model: str) -> Backbone:
    torch.manual_seed(0)
    vit = VisionTransformer(num_classes=0, **TINY) if model == "tiny" else timm.create_model(model, num_classes=0)
    return Backbone(vit.eval(), vit.patch_embed.img_size[0], [0.5] * 3, [0.5] * 3)


def synthetic(classes: int, train: int, test: int, every: int, size: int = 32) -> Images:
    """Random images [n, size, size, 3], half the picture of their class and half noise; tests of every n-th class."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (classes, size, size, 3), dtype=np.uint8)

    def side(each: int, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
        labels = np.tile(np.arange(0, classes, every), each)
        noise = rng.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
        return pictures[labels] // 2 + noise // 2, labels

    return Images(*side(train), *side(test, every), None)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def live_mb(device: torch.device) -> float:
    """Bytes of all tensors there are; the resident set of a process also holds what the allocator keeps."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / 2**20


class Clock(Checkpoint):
    """A checkpoint that takes the time of its writes."""

    seconds = 0.0
    clock = staticmethod(time.perf_counter)

    def _save(self, *args: Any, **keywords: Any) -> None:
        start = self.clock()
        super()._save(*args, **keywords)
        self.seconds += self.clock() - start


class Ear(Callback):
    """Takes down, after every task, what is not in the run's own record."""

    def __init__(self, checkpoint: Clock, device: torch.device):
        self.checkpoint, self.device, self.rows = checkpoint, device, []
        self.bytes = 0

    def measured(self, task: int, figures: Mapping[str, float]) -> None:
        total = sum(path.stat().st_size for path in self.checkpoint.folder.iterdir())
        row = {"checkpoint": self.checkpoint.seconds, "checkpoint_kib": (total - self.bytes) / 2**10}
        self.rows.append({**row, "live_mb": live_mb(self.device), "rss_mb": resident_mb()})
        self.bytes, self.checkpoint.seconds = total, 0.0


def measure(method: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each task."""
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    clock = time.perf_counter
    if args.clock == "cpu":  # of this process: what others do on the machine does not count
        clock = time.process_time
        training.time = SimpleNamespace(perf_counter=clock)
    backbone = create(args.model)
    data = synthetic(args.tasks * args.increment, args.train, args.test, args.every)
    settings = Settings(
        method=method, increment=args.increment, epochs=args.epochs, batch_size=args.batch_size, r=args.r,
        amp=args.amp, device=args.device, class_order="sorted",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Clock(Path(folder))
        checkpoint.clock = clock
        ear = Ear(checkpoint, device)
        result = run(settings, data=data, backbone=backbone, callbacks=[ear], checkpoint=checkpoint)
    facts = {name: environment(device)[name] for name in ("device", "torch")}
    rows = []
    for t, (cost, own) in enumerate(zip(result.costs, ear.rows)):
        if args.tasks > 200 and t % 10 and 10 < t < args.tasks - 10:  # enough to fit
            continue
        seconds, seen = cost["seconds"], result.classes_seen[t]
        tested = len(range(0, seen, args.every)) * args.test
        phases = {phase: seconds.get(phase, 0.0) for phase in ("train", "prototypes", "align", "eval")}
        rows.append({
            "method": method, "task": t + 1, "classes_seen": seen, **phases,
            "eval_us_per_image": 1e6 * seconds["eval"] / tested, "peak_mb": max(cost["peak_mb"].values()), **own,
            "accuracy": result.curve[t],
            "train_images": args.increment * args.train, "test_images": tested, "epochs": args.epochs,
            "batch_size": args.batch_size, "model": args.model, "width": backbone.model.num_features,
            "depth": len(backbone.model.blocks), "r": args.r, "amp": args.amp, "clock": args.clock, **facts,
        })  # fmt: skip
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each method the medians over ten tasks at the beginning (without the first) and at the end."""
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method]
        count = min(10, len(own) // 2)
        for name, (title, digits) in FIGURES.items():
            first, last = (np.median([float(r[name]) for r in part]) for part in (own[1 : 1 + count], own[-count:]))
            figures = (f"{first:.{digits}f}", f"{last:.{digits}f}", f"{last / first:.2f}" if first else "–")
            lines.append([f"{method}, {title}", *figures])
    return harness.table(("median", f"tasks 2 … {count + 1}", f"last {count} tasks", "ratio"), lines)


def main() -> None:
    parser = harness.options(__doc__, "many_tasks")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["plora", "plora-ensemble"])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--increment", type=int, default=10, help="classes of a task")
    parser.add_argument("--train", type=int, default=20, help="training images of a class")
    parser.add_argument("--test", type=int, default=2, help="test images of a class")
    parser.add_argument("--every", type=int, default=1, help="test images of every so-manyth class alone")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--model", default="tiny", help="tiny, or a timm ViT with random weights")
    parser.add_argument("--amp", default="none", choices=("none", "bfloat16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: on a shared machine")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows += pool.apply(measure, (method, args))
        where = {name: rows[0][name] for name in ("device", "torch")} | harness.origin(args.commit)
        harness.write(args.out, list(rows[0]), rows, table(rows), where)
    print(table(rows))


if __name__ == "__main__":
    main()
