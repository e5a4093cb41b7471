"""Images a second with the loaders, beside the same step on a batch that is on the device; and whole runs by phase.

    python benchmarks/throughput.py [--model NAME] [--images N] [--amp bfloat16] [--out FOLDER/NAME]
    python benchmarks/throughput.py --phases [--epochs N] [--images N] [--amp none bfloat16] [--forms plora ease ...]

Without --phases: evaluation and training (r = 16 on qkv and proj) of a backbone with random weights: on a batch that is
on the device, on uint8 arrays, and on JPEG files of 256 pixels that the device or the workers crop. `first` is the
first pass, which starts workers and decodes (of evaluation, which comes first), `later` the median of the others,
`share` its part of the rate on the batch on the device.

With --phases: B0 Inc10 on random images of CIFAR-100's shape, random weights, batches of 48, PILOT's transforms:
seconds and peak memory by phase; the last column carries them on to 20 epochs and all images, as if all but the
alignment were linear. `ease` is LAMDA-PILOT's own loop and settings, `ease, patched` the same with this package's patch
(PLORA_PILOT: a checkout). A form that is a file of configs/ has that file's settings and its data set's numbers.
Writes NAME.csv and NAME.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import now
from PIL import Image
from pilot_ease import PilotData, ease_learner, ease_vit, import_pilot

from plora_ext.cil import Images, Settings, run
from plora_ext.cil.build import load_backbone, pick_device
from plora_ext.cil.phases import Phases
from plora_ext.cil.timing import Clock, Resident
from plora_ext.cil.training import Trainer
from plora_ext.data import ImageFiles, Preparation, View
from plora_ext.data.view import SHARE
from plora_ext.integrations import pilot
from plora_ext.nn import Adapters, inject

RATES = ("part", "source", "first", "later", "share", "peak_mb")
PHASES = ("form", "amp", "phase", "seconds", "peak_mb", "images_per_s", "seconds_whole")
CLASSES = 10
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CIFAR = (50_000, 10_000, 100, 32)
PROTOCOLS = {  # training and test images, classes, pixels
    "cifar100_b0_inc10": CIFAR,
    "imagenet-r_b0_inc20": (24_000, 6_000, 200, 256),
    "cub_b0_inc10": (9_430, 2_358, 200, 256),
}


def jpegs(folder: Path, number: int) -> list[Path]:
    """Pictures of 256 pixels, 64 of them distinct; the others are the same files by other names."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.jpg" for i in range(number)]
    for picture, path in zip(coarse, paths):
        smooth = np.asarray(Image.fromarray(picture).resize((256, 256), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path, quality=90)
    for i, path in enumerate(paths[64:]):
        path.hardlink_to(paths[i % 64])
    return paths


def sources(args: argparse.Namespace, size: int, device: torch.device, folder: Path) -> dict[str, Callable[[], Any]]:
    """The images in each form; made when they are measured, gone after."""
    rng, paths = np.random.default_rng(0), jpegs(folder, args.images)

    def view(images: np.ndarray | ImageFiles, **look: Any) -> View:
        return View(images, Preparation(size, [0.5] * 3, [0.5] * 3, device, workers=args.workers, **look))

    def arrays() -> np.ndarray:
        return rng.integers(0, 256, (args.images, size, size, 3), dtype=np.uint8)

    return {
        "batch on the device": lambda: Resident(args.images, size, device),
        "arrays, resize": lambda: view(arrays()),
        "arrays, pilot on the device": lambda: view(arrays(), transform="pilot", on_device=True),
        "JPEG, pilot on the device": lambda: view(ImageFiles(paths), transform="pilot", on_device=True, cache=SHARE),
        "JPEG, pilot in the workers": lambda: view(ImageFiles(paths), transform="pilot", cache=SHARE),
        "JPEG, not kept": lambda: view(ImageFiles(paths), transform="pilot", on_device=True),
    }


class Loop:
    """A backbone with random weights on a device, and the trainer that teaches it adapters."""

    def __init__(self, settings: Settings, device: torch.device):
        torch.manual_seed(0)
        backbone = load_backbone(settings)
        self.settings, self.clock, self.size, self.device = settings, Clock(), backbone.image_size, device
        self.trainer = Trainer(backbone.model.to(device).requires_grad_(False), settings, device, [self.clock])

    def adapted(self) -> Adapters:
        """The adapters, of which one trains."""
        adapters = inject(self.trainer.model, self.settings.target_modules, r=16)
        adapters.add_adapter("task0")
        return adapters

    def seconds(self, adapters: Adapters, images: Any) -> list[float]:
        """Of each epoch of training."""
        labels = torch.arange(len(images), device=self.device) % CLASSES
        with self.trainer.speed.passes():
            self.trainer.fit(0, adapters.parameters("task0"), images, labels, CLASSES)
        return self.clock.seconds


def rates(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Images a second of evaluation and of training, from every source."""
    device = pick_device(args.device)
    settings = Settings(
        backbone=args.model, weights="random", epochs=args.passes, batch_size=args.batch,
        eval_batch_size=args.eval_batch, amp=args.amp[0], target_modules=["qkv", "proj"],
    )  # fmt: skip
    loop = Loop(settings, device)
    adapters = loop.adapted()

    def evaluate(images: Any) -> list[float]:
        ends = [now(device)]
        for _ in range(args.passes):
            loop.trainer.features(images)
            ends.append(now(device))
        return np.diff(ends).tolist()

    train = partial(loop.seconds, adapters)
    own: dict[str, float] = {}  # the rate on the device's batch
    with tempfile.TemporaryDirectory(prefix="plora-throughput-") as folder:
        for name, make in sources(args, loop.size, device, Path(folder)).items():
            images = make()
            if not own:  # kernels are chosen, graphs compiled
                evaluate(images)
                train(images)
            for part, call in (("evaluation", evaluate), ("training", train)):
                phases = Phases(device)
                with phases(part):
                    first, *others = (args.images / seconds for seconds in call(images))
                later = statistics.median(others)
                share = later / own.setdefault(part, later)
                yield dict(zip(RATES, (part, name, first, later, share, phases.peak_mb[part])))
            del images


# ---------------------------------------------------------------------- whole runs


def noise(train: int, test: int, classes: int = 100, pixels: int = 32) -> Images:
    """Random images, every class with a colour of its own."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 136, (classes, 1, 1, 3), dtype=np.uint8)

    def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(number) % classes
        images = rng.integers(0, 120, (number, pixels, pixels, 3), dtype=np.uint8)
        for i, label in enumerate(labels):
            images[i] += colors[label]
        return images, labels

    return Images(*draw(train), *draw(test))


def ours(form: str, amp: str, args: argparse.Namespace, data: Images) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and peak memory by phase of this package's loop."""
    common: dict[str, Any] = dict(
        weights="random", epochs=args.epochs, eval_batch_size=args.eval_batch, amp=amp, workers=args.workers,
        device=args.device, transform_on="cpu" if "workers" in form else "device",
    )  # fmt: skip
    if form in PROTOCOLS:
        settings = replace(Settings.load(CONFIGS / f"{form}.yaml"), **common)
    else:
        method = "plora-ensemble" if "ensemble" in form else "plora"
        settings = Settings(
            method=method, backbone=args.model, batch_size=48, transform="pilot", normalize="none", lr=5e-4, **common
        )
    result = run(settings, data=data)
    other = result.total_seconds - sum(result.seconds.values())
    return {**result.seconds, "other": other}, result.peak_mb


def ease(form: str, amp: str, args: argparse.Namespace, data: Images) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and peak memory by phase of LAMDA-PILOT's EASE, with the settings of its exps/ease.json."""
    import_pilot()
    from utils.data import build_transform

    device = pick_device(args.device)
    size = {"depth": 12, "mlp_ratio": 4} if "base" in args.model else {"depth": 1, "mlp_ratio": 0.25}
    phases = Phases(device)

    def make_data(arguments: dict[str, Any]) -> PilotData:  # with PILOT's transforms of CIFAR at 224 pixels
        train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
        return PilotData(train, test, *(build_transform(training, arguments) for training in (True, False)))

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*given: Any) -> Any:
            with phases(name):
                return call(*given)

        return inner

    patched = pilot.patch() if "patched" in form else nullcontext()
    with patched, torch.autocast(device.type, torch.bfloat16, enabled=amp == "bfloat16"):
        learner, manager = ease_learner(
            lambda: ease_vit(device, **size), make_data, seed=1993, init_cls=10, increment=10, epochs=args.epochs,
            workers=8 if args.workers is None else args.workers, device=device,
        )  # fmt: skip
        learner._train = timed("train", learner._train)
        prototypes, align = timed("prototypes", learner.replace_fc), timed("align", learner.solve_sim_reset)
        learner.solve_sim_reset = lambda: None  # a phase of its own, after the prototypes

        def replace_fc(loader: Any) -> None:
            prototypes(loader)
            align()

        learner.replace_fc = replace_fc
        for _ in range(manager.nb_tasks):
            learner.incremental_train(manager)
            timed("eval", learner.eval_task)()
            learner.after_task()
    return phases.seconds, phases.peak_mb


FORMS: dict[str, Callable[..., tuple[dict[str, float], dict[str, float]]]] = {
    **dict.fromkeys(("plora", "plora, workers crop", "plora-ensemble"), ours),
    **dict.fromkeys(("ease", "ease, patched"), ease),
    **dict.fromkeys(PROTOCOLS, ours),
}


def runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each phase of each form and precision."""
    share = args.images / CIFAR[0]
    for form, amp in ((form, amp) for form in args.forms for amp in args.amp):
        if FORMS[form] is ease and not os.environ.get("PLORA_PILOT"):
            print(f"{form}: left out, PLORA_PILOT names no checkout")
            continue
        train, test, *look = PROTOCOLS.get(form, CIFAR)
        images = round(train * share)
        seconds, peak = FORMS[form](form, amp, args, noise(images, round(test * share), *look))
        whole = {phase: s * (1 if phase == "align" else 1 / share) for phase, s in seconds.items()}
        whole["train"] *= 20 / args.epochs
        whole["total"] = sum(whole.values())
        for phase, value in {**seconds, "total": sum(seconds.values())}.items():
            rate = images * args.epochs / value if phase == "train" else None
            yield dict(zip(PHASES, (form, amp, phase, value, peak.get(phase, max(peak.values())), rate, whole[phase])))


def cells(row: dict[str, Any]) -> list[str]:
    figures = (harness.number(v, ".3g" if v < 100 else ".0f", "") if isinstance(v, float) else v for v in row.values())
    return ["" if v is None else str(v) for v in figures]


def main() -> None:
    parser = harness.options(__doc__, "throughput")
    parser.add_argument("--model", default="vit_base_patch16_224", help="embedded, or a model of timm")
    parser.add_argument("--images", type=int, help="training images (default: 12800; --phases: 50000, or that share)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", nargs="+", choices=("none", "bfloat16", "float16"), default=["bfloat16"])
    parser.add_argument("--batch", type=int, default=128, help="images of a training step (--phases: always 48)")
    parser.add_argument("--eval-batch", type=int, default=256)
    parser.add_argument("--passes", type=int, default=4, help="over the images, 2 or more")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--phases", action="store_true", help="whole runs by phase")
    parser.add_argument("--epochs", type=int, default=20, help="of --phases")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["plora", "plora-ensemble", "ease"])
    parser.set_defaults(out=None)  # by what is measured
    args = parser.parse_args()
    args.images = args.images or (50_000 if args.phases else 12_800)
    args.out = args.out or Path(__file__).parent / "results" / ("phases" if args.phases else "throughput")
    warnings.simplefilter("ignore", FutureWarning)
    fields, make = (PHASES, runs) if args.phases else (RATES, rates)
    rows: list[dict[str, Any]] = []
    for row in make(args):
        rows.append(row)
        print(*cells(row), sep=" | ", flush=True)
        text = harness.table(fields, map(cells, rows), texts=2)
        harness.write(args.out, fields, rows, text, harness.facts(pick_device(args.device), args.commit))


if __name__ == "__main__":
    main()
