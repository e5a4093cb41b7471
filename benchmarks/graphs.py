"""The training loop and passes without gradients, with CUDA graphs and without: images a second.

    python benchmarks/graphs.py [--models vit_base_patch16_224:224 ...] [--batches 16 48 128] [--out FOLDER/NAME]

Random weights, r = 16 on qkv and proj, uint8 arrays on the device that are cropped there (transform pilot), bfloat16.
`first` is the first epoch, which captures; `later` the median of the others; `evaluation` the median of three readings
of all images, 256 at a time. `same_step` is the captured step on one batch again and again: what a loop could reach.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import harness
import numpy as np
import torch
import torch.nn.functional as F
from throughput import CLASSES
from torch import Tensor

from plora_ext.bench import Clock
from plora_ext.cil import Settings
from plora_ext.cil.build import load_backbone
from plora_ext.cil.training import Trainer
from plora_ext.data import Preparation, View
from plora_ext.graphs import Captured
from plora_ext.nn import inject

FIELDS = ("model", "batch", "graphs", "first", "later", "evaluation", "same_step", "loop_over_step", "peak_mb", "said")
EPOCHS, EVALUATION = 4, 256


def rates(model: str, batch: int, graphs: str) -> dict[str, Any]:
    device, (name, size) = torch.device("cuda"), model.split(":")
    n = batch * (48 if batch >= 128 else 96)
    s = Settings(
        backbone=name, image_size=int(size), weights="random", epochs=EPOCHS, batch_size=batch,
        eval_batch_size=EVALUATION, amp="bfloat16", graphs=graphs,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    backbone, clock = load_backbone(s), Clock()
    trainer = Trainer(backbone.model.to(device).requires_grad_(False), s, device, [clock])
    adapters = inject(trainer.model, ["qkv", "proj"], r=16)
    adapters.add_adapter("task0")
    pixels = np.random.default_rng(0).integers(0, 256, (n, 224, 224, 3), dtype=np.uint8)
    look = Preparation(backbone.image_size, [0.5] * 3, [0.5] * 3, device, transform="pilot", on_device=True)
    images, labels = View(pixels, look), torch.arange(n, device=device) % CLASSES
    with trainer.speed.passes():
        trainer.fit(0, adapters.parameters("task0"), images, labels, CLASSES)
    torch.cuda.synchronize()
    first, *later = (n / seconds for seconds in clock.seconds)
    read = []
    for _ in range(3):
        start = time.perf_counter()
        trainer.features(images)[0, 0].item()
        read.append(n / (time.perf_counter() - start))
    peak = torch.cuda.max_memory_reserved() / 2**20
    alone = one_batch(trainer, adapters.parameters("task0"), batch)
    rate = statistics.median(later)
    said = "; ".join(f"{what}: {line}" for what, line in trainer.speed.graphs.items())
    return dict(
        zip(FIELDS, (model, batch, graphs, first, rate, statistics.median(read), alone, rate / alone, peak, said))
    )


def one_batch(trainer: Trainer, parameters: list[Tensor], batch: int) -> float:
    """Images a second of the captured step on a batch that does not change."""
    size = trainer.settings.image_size
    images = torch.randn(batch, 3, size, size, device="cuda")
    labels = torch.arange(batch, device="cuda") % CLASSES
    head = torch.randn(CLASSES, trainer.model.num_features, device="cuda").requires_grad_()
    optimizer = trainer.speed.optimizer([{"params": [*parameters, head]}])
    trainer.speed.set_rate(optimizer, 1e-3)
    trainer.model.train()

    def update(images: Tensor, labels: Tensor) -> Tensor:
        features = trainer.speed.forward(images, trainer.model)
        loss = F.cross_entropy(16 * F.linear(F.normalize(features), F.normalize(head)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step, times = Captured(update), []
    for _ in range(6):
        step(images, labels)
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            step(images, labels)
        torch.cuda.synchronize()
        times.append(20 * batch / (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = harness.options(__doc__, "graphs")
    models = ["vit_base_patch16_224:224", "vit_small_patch14_dinov2:84"]
    parser.add_argument("--models", nargs="+", default=models, help="NAME:PIXELS, models of timm")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 48, 128])
    args = parser.parse_args()
    harness.need_cuda()
    rows: list[dict[str, Any]] = []
    for model in args.models:
        for batch in args.batches:
            for graphs in ("off", "auto"):
                rows.append(rates(model, batch, graphs))
                torch.cuda.empty_cache()
                print(rows[-1], flush=True)
    cells = [
        [harness.number(v, ".2f" if v < 9 else ".0f") if isinstance(v, float) else v for v in r.values()] for r in rows
    ]
    text = harness.table(FIELDS, cells, texts=3, notes=1)
    harness.write(args.out, FIELDS, rows, text, harness.facts(torch.device("cuda"), args.commit))


if __name__ == "__main__":
    main()
