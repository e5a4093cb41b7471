"""Images a second of training and evaluation on one process and on several, and what they tell each other.

    python benchmarks/scaling_gpus.py [--processes 1 2] [--batch 128] [--steps 50] [--out FOLDER/NAME]

Starts itself for each number of processes, several by torchrun: NCCL on GPUs, gloo on a CPU with a small model. Every
process has `--batch` images a step, so the ideal is N times the images a second. `Trainer.fit` and `Evaluator`, after a
round to warm up, on a ViT-B/16 with random weights under bfloat16 autocast, as `plora` trains it, and random images on
the device. `collectives` are what the processes send each other in a task, each with a barrier before it. First, every
number of processes learns two small tasks in float32: how far their prototypes are from those of one process.
Writes NAME.csv and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import timm
import torch
import torch.distributed as dist
from harness import now
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext.cil import Settings
from plora_ext.cil.build import pick_device, seed_everything
from plora_ext.cil.callbacks import Callback
from plora_ext.cil.distributed import World, launched
from plora_ext.cil.evaluate import Evaluator
from plora_ext.cil.methods import PLoRAFused
from plora_ext.cil.stream import Task
from plora_ext.cil.training import Trainer

CLASSES = 10
GOAL = 1.9  # times the images a second of one GPU, with two
BEFORE = 4  # steps that are not timed: those before a capture, and the one that makes it
FIELDS = ("part", "processes", "value", "unit", "over_one", "peak_mb")


class Synthetic:
    """What a View gives, for images that are on the device: image i is `pool[i % len(pool)]`."""

    def __init__(self, pool: Tensor, rows: Tensor):
        self.pool, self.rows = pool, rows.to(pool.device)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Synthetic:
        return Synthetic(self.pool, self.rows[rows.to(self.rows.device)])

    def split(self, batch_size: int) -> Iterator[Tensor]:
        for rows in self.rows.split(batch_size):
            yield self.pool[rows % len(self.pool)]

    def epoch(self, order: Tensor, batch_size: int, own: Callable[[int], slice]) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in order.to(self.rows.device).split(batch_size):
            mine = rows[own(len(rows))]
            yield mine, self.pool[self.rows[mine] % len(self.pool)]


class Clock(Callback):
    """When the steps of a fit begin that are timed."""

    def __init__(self, device: torch.device):
        self.device, self.done, self.begun = device, 0, 0.0

    def fit(self, *_: Any) -> None:
        self.done = 0

    def step(self, _: int) -> None:
        self.done += 1
        if self.done == BEFORE:
            self.begun = now(self.device)


def backbone(device: torch.device) -> tuple[nn.Module, int]:
    """The model and its image size."""
    torch.manual_seed(0)
    if device.type == "cuda":
        with device:  # where random weights take no time
            return timm.create_model("vit_base_patch16_224", num_classes=0).eval(), 224
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0).eval(), 32


def start(
    world: World, device: torch.device, images: int, callbacks: Sequence[Callback] = (), **changes: Any
) -> tuple[PLoRAFused, Synthetic, list[Task], Tensor]:
    """A method that has learned nothing, `images` images, two tasks of all of them, and their labels."""
    settings = Settings(**{"epochs": 1, "device": device.type, **changes})
    seed_everything(settings.seed)
    model, size = backbone(device)
    trainer = Trainer(model.requires_grad_(False), settings, device, callbacks, world)
    method = PLoRAFused(trainer, settings)
    torch.manual_seed(0)
    pool = torch.randn(min(images, 512), 3, size, size, device=device)
    rows, labels = np.arange(images), np.arange(images) % CLASSES
    classes = [range(t * CLASSES, (t + 1) * CLASSES) for t in range(2)]
    tasks = [Task(t, c, rows, labels + c.start, rows, labels + c.start) for t, c in enumerate(classes)]
    return method, Synthetic(pool, torch.arange(images)), tasks, torch.from_numpy(labels).to(device)


def agreement(world: World, device: torch.device) -> Tensor:
    """Prototypes after two tasks; the last batch is uneven."""
    # CutMix mixes images of one process, and steps towards what is sought make more of rounding.
    method, images, tasks, labels = start(
        world, device, 81, batch_size=16, eval_batch_size=32, lr=1e-3, cutmix=0.0, sought=0
    )
    for task in tasks:
        method.learn(task, images, labels)  # type: ignore[arg-type]
    assert method.prototypes is not None
    return method.prototypes


def throughput(world: World, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    clock = Clock(device)
    total = args.batch * world.size
    method, images, (task, _), labels = start(
        world, device, total * args.steps, [clock],
        batch_size=total, eval_batch_size=2 * args.batch, amp="bfloat16" if device.type == "cuda" else "none",
    )  # fmt: skip
    trainer = method.trainer
    evaluator = Evaluator(method, [task], images, np.zeros(CLASSES, dtype=np.int64))  # type: ignore[arg-type]
    method.learn(task, images, labels)  # type: ignore[arg-type]
    evaluator.after(0)
    parameters = method.adapters.parameters("task0")
    trainer.phases.seconds.clear()
    trainer.phases.peak_mb.clear()
    seconds: dict[str, list[float]] = {"training": [], "evaluation": []}
    for _ in range(args.rounds):
        method.adapters.set_adapter("task0")
        with trainer.phases("training"):
            trainer.fit(0, parameters, images, labels, CLASSES)  # type: ignore[arg-type]
            seconds["training"].append(now(device) - clock.begun)
        method.activate()
        meet(world)
        begun = now(device)
        with trainer.phases("evaluation"):
            evaluator.after(0)
            seconds["evaluation"].append(now(device) - begun)
    assert device.type == "cpu" or trainer.speed.graphs["training"].startswith("captured"), trainer.speed.graphs
    rows = []
    timed = {"training": total * (args.steps - BEFORE), "evaluation": total * args.steps}
    for part, times in seconds.items():
        peaks: list[Any] = [trainer.phases.peak_mb[part]] * world.size
        if world.size > 1:
            dist.all_gather_object(peaks, trainer.phases.peak_mb[part])
        rate = timed[part] / statistics.median(times)
        rows.append({"part": part, "value": round(rate, 1), "unit": "images/s", "peak_mb": round(max(peaks))})
    return rows


def collectives(world: World, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    width = 768 if device.type == "cuda" else 64
    adapter = 12 * 16 * ((width + 3 * width) + (width + width))  # of r = 16, on qkv and proj of twelve blocks
    classes, task = 1000, 5000
    sums, counts = torch.zeros(classes, width, device=device), torch.zeros(classes, device=device)
    own, gradients = torch.zeros(len(world.rows(task)), width, device=device), torch.zeros(adapter, device=device)
    parts: dict[str, Callable[[], object]] = {
        f"all-reduce of class_sums, {classes} classes ({(sums.nbytes + counts.nbytes) / 1e6:.1f} MB)": (
            lambda: world.sum_(sums, counts)
        ),
        f"gather of features, {task} images ({4 * task * width / 1e6:.1f} MB)": lambda: world.gather(own, task),
        f"all-reduce of an adapter's gradients ({4 * adapter / 1e6:.1f} MB)": lambda: world.sum_(gradients),
        "one object from rank 0": lambda: world.from_first(lambda: {"epochs": 1}),
    }
    rows = []
    for part, call in parts.items():
        times = []
        for _ in range(args.rounds * 10):
            meet(world)
            begun = now(device)
            call()
            times.append(now(device) - begun)
        rows.append({"part": part, "value": round(1e3 * statistics.median(times[5:]), 3), "unit": "ms", "peak_mb": ""})
    return rows


def meet(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def worker(args: argparse.Namespace) -> None:
    """One of the processes."""
    with launched() as world:
        device = world.place(pick_device(args.device))
        prototypes = agreement(world, device)
        rows = throughput(world, device, args)
        if world.size > 1:
            rows += collectives(world, device, args)
        if world.first:
            save_file({"prototypes": prototypes.cpu()}, args.worker / "prototypes.safetensors")
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{args.threads} threads a process"
            (args.worker / "rows.json").write_text(json.dumps({"device": name, "rows": rows}))


def measure(args: argparse.Namespace, processes: int, folder: Path) -> tuple[str, list[dict[str, Any]], Tensor]:
    """Starts `processes` workers; the device's name, what they measured, the prototypes."""
    several = f"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {processes} --".split()
    command = [sys.executable, *(several if processes > 1 else ())]
    folder.mkdir()
    options = ["--worker", str(folder)]
    for name in ("device", "batch", "steps", "rounds", "threads"):
        options += [f"--{name}", str(getattr(args, name))]
    script = Path(__file__).resolve()
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    subprocess.run([*command, str(script), *options], check=True, cwd=script.parent, env=environment)
    measured = json.loads((folder / "rows.json").read_text())
    return measured["device"], measured["rows"], load_file(folder / "prototypes.safetensors")["prototypes"]


def main() -> None:
    parser = harness.options(__doc__, "scaling_gpus")
    cuda = torch.cuda.is_available()
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many in turn (default: 1 2)")
    parser.add_argument("--device", default="auto", help="cuda or cpu (default: a GPU where there is one)")
    parser.add_argument("--batch", type=int, help="images a step and process (default: 128 on a GPU, 16 on a CPU)")
    parser.add_argument("--steps", type=int, help="steps of a round (default: 50 on a GPU, 8 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (default: 5)")
    parser.add_argument("--threads", type=int, default=4 if cuda else 1, help="CPU threads of a process")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    gpus = cuda and args.device != "cpu"
    args.batch, args.steps = args.batch or (128 if gpus else 16), args.steps or (50 if gpus else 8)
    if args.steps <= BEFORE:
        parser.error(f"--steps must be more than {BEFORE}, which are not timed, got {args.steps}")
    if args.worker:
        worker(args)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for n in args.processes:
            device, measured, prototypes = measure(args, n, Path(folder) / str(n))
            alone = {row["part"]: row["value"] for row in rows if row["processes"] == 1}
            if n == 1:
                reference = prototypes
            elif 1 in args.processes[: args.processes.index(n)]:
                off = float((prototypes - reference).abs().max() / reference.abs().max())
                measured.append({"part": "prototypes, largest difference", "value": f"{off:.1e}", "unit": "of largest"})
            for row in measured:
                over = round(row["value"] / alone[row["part"]], 3) if row["part"] in alone else ""
                rows.append({"peak_mb": "", **row, "processes": n, "over_one": over})
    where = {"device": device, "batch": args.batch, "torch": torch.__version__, **harness.origin(args.commit)}
    lines = []
    for row in rows:
        over = f"{row['over_one']}"
        if over and row["processes"] == 2 and gpus:
            over += f" (goal {GOAL}: {'met' if row['over_one'] >= GOAL else 'missed'})"
        lines.append((row["part"], row["processes"], f"{row['value']} {row['unit']}", over, row["peak_mb"]))
    text = harness.table(("", "processes", "", "over one process", "peak MB of a process"), lines)
    harness.write(args.out, FIELDS, rows, text, where)
    print(harness.said(where), text, sep="\n\n", end="")


if __name__ == "__main__":
    main()
