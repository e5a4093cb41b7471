"""Ensembles: one batch under T adapters, and the evaluations of a whole run with and without kept features.

    python benchmarks/ensemble.py [--quick] [--model NAME] [--adapters T] [--images N] [--out FOLDER/NAME]

The batches are those of `plora-ext bench ensemble` and EASE's pass (under autocast) on them: on a GPU ViT-B/16 in
bfloat16, B = 16 and 128; on a CPU a small ViT in float32. The run has T tasks of five classes, N test images each,
random adapters and prototypes, and is evaluated on all classes seen after every task: by this package's loop as it is,
by the same loop with every adapter in turn and nothing kept, and with EASE's pass in its place; on a GPU all under
bfloat16 autocast. Counted are image-forwards: what leaves the last block. Writes NAME.csv and NAME.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import ease
import harness
import numpy as np
import torch
from ease import EASE
from torch import Tensor

from plora_ext import bench
from plora_ext.bench import LOOP, OURS, PLAIN, Line
from plora_ext.cil import Settings
from plora_ext.cil.build import pick_device
from plora_ext.cil.evaluate import Evaluator
from plora_ext.cil.features import FeatureCache
from plora_ext.cil.methods import PLoRAEnsemble
from plora_ext.cil.stream import TaskStream
from plora_ext.cil.training import Trainer

CLASSES = 5  # of a task
# What a form's time must be over ours at least, on one H200 with ViT-B/16 and 20 adapters.
GOALS = {(EASE, "B=16"): 3, (EASE, "B=128"): 1.8, (PLAIN, "B=16"): 1 / 1.15, (PLAIN, "B=128"): 1 / 1.15}
GOALS |= {(EASE, "evaluations"): 10}


class Untrained(PLoRAEnsemble):
    """An ensemble of random adapters and prototypes; `forward(batch, names)` gives [T, B, D]."""

    forward: Callable[[Tensor, Sequence[str]], Tensor]

    def grow(self) -> None:
        t = len(self.adapters.names)
        bench.add_random(self.adapters, f"task{t}")
        tasks = self.head.add_task(CLASSES)
        self.prototypes = torch.randn(len(tasks), t + 1, self.trainer.model.num_features, device=self.trainer.device)

    def features_in(self, images: Tensor, names: Sequence[str]) -> Tensor:
        return self.trainer.features(images, lambda batch: self.forward(batch, names).movedim(0, 1))


def evaluations(form: str, name: str, T: int, per_task: int, device: torch.device) -> tuple[float, int]:
    """Seconds of the evaluations after each of T tasks, and their image-forwards."""
    amp = "bfloat16" if device.type == "cuda" else "none"
    settings = Settings(method="plora-ensemble", target_modules=["q", "v"], amp=amp, eval_batch_size=128)
    model = bench.create_vit(name).eval().to(device)
    rival = ease.EasePass(copy.deepcopy(model), T).eval()
    method = Untrained(Trainer(model, settings, device), settings)
    method.forward = {
        OURS: method.ensemble,
        LOOP: lambda batch, names: bench.one_by_one(method.adapters, batch),
        EASE: lambda batch, names: rival(batch, len(names)),
    }[form]
    passed: list[int] = []
    for vit in (model, rival.vit):
        vit.blocks[-1].mlp.register_forward_hook(lambda module, args, output: passed.append(len(output)))

    labels = np.repeat(np.arange(CLASSES * T), max(1, per_task // CLASSES))
    stream = TaskStream(labels, labels, increment=CLASSES, class_order="sorted")
    torch.manual_seed(0)
    images = torch.randn(len(labels), 3, *model.patch_embed.img_size, device=device)
    cache = FeatureCache(device=device) if form == OURS else None
    evaluator = Evaluator(method, stream.tasks, images, stream.task_of_class(), cache)
    seconds, forwards = 0.0, 0
    for task in stream:
        method.grow()
        if task.index < 2:  # warms up with one adapter, then with two
            method.features(images[:128])
        passed.clear()
        seconds += bench.timed(partial(evaluator.after, task.index), device) / 1e3
        forwards += sum(passed)
    return seconds, forwards


def run_lines(name: str, T: int, per_task: int, device: torch.device) -> list[Line]:
    lines: list[Line] = []
    for form in (OURS, LOOP, EASE):
        seconds, forwards = evaluations(form, name, T, per_task, device)
        line = Line(f"evaluations of {T} tasks, {per_task} test images each, {name}", form, 1e3 * seconds)
        lines.append(line)
        line.over_ours, line.note = line.median_ms / lines[0].median_ms, f"{forwards:,} image-forwards"
    return lines


def judge(lines: Sequence[Line]) -> None:
    """Notes beside a rival what its time over ours was to be, at least."""
    for line in lines:
        for (form, part), goal in GOALS.items():
            if line.form == form and part in line.case.replace(",", " ").split():
                met = "met" if line.over_ours >= goal else "missed"
                line.note = "; ".join(filter(None, (line.note, f"goal on an H200: {goal:.2f}, {met}")))


def main() -> None:
    parser = harness.options(__doc__, "ensemble")
    parser.add_argument("--quick", action="store_true", help="one batch size, few rounds, fewer images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", help="a timm ViT, or small (default: vit_base_patch16_224 on a GPU, small on a CPU)")
    parser.add_argument("--adapters", type=int, default=20, help="T (default: 20)")
    parser.add_argument("--images", type=int, help="test images of a task (default: 100 on a GPU, 20 on a CPU)")
    args = parser.parse_args()
    device = pick_device(args.device)
    cuda, T = device.type == "cuda", args.adapters
    name = args.model or ("vit_base_patch16_224" if cuda else "small")
    lines: list[Line] = []
    for case in bench.ensemble_cases(device, args.quick, name, T, partial(ease.rivals, T=T)):
        lines += bench.measure(case, device, 3 if args.quick else 11)
    lines += run_lines(name, T, args.images or (5 if args.quick else 100 if cuda else 20), device)
    if cuda and name == "vit_base_patch16_224" and T == 20:
        judge(lines)
    rows, text = [asdict(line) for line in lines], bench.table(lines)
    fields = [name for name in rows[0] if name != "times"]
    harness.write(args.out, fields, rows, f"{text}\n", harness.facts(device, args.commit))
    print(text)


if __name__ == "__main__":
    main()
