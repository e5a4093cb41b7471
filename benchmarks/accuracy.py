"""Accuracy of every method, every alignment of prototypes and every head, over seeds.

    python benchmarks/accuracy.py -c configs/icon100_b0_inc10.yaml --out benchmarks/results/accuracy_embedded
    python benchmarks/accuracy.py ... --seeds 1993 --out a    # seeds side by side, then joined:
    python benchmarks/accuracy.py --merge a.csv b.csv --out benchmarks/results/accuracy_embedded

Writes OUT.csv, a row for each method and seed, and OUT.md, their mean ± standard deviation over seeds. "METHOD + HEAD"
is the method with `--head HEAD`. Alignments and heads only read features, so those that train alike are computed from
the same adapters: plora trains once for the cosine head and all alignments, and, where `--distill` is left to follow
from the head, once more for the other heads.
"""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import harness
import numpy as np
import torch
from torch import Tensor

from plora_ext.arguments import add_config, add_settings, settings_from
from plora_ext.cil import metrics
from plora_ext.cil.alignment import ALIGNMENTS, Drift, class_means
from plora_ext.cil.build import load_data, make_stream, pick_device, tasks_of
from plora_ext.cil.covariances import ClassCovariances
from plora_ext.cil.heads import HEADS, Head, Subspace
from plora_ext.cil.loop import run
from plora_ext.cil.methods import METHODS, Method, PLoRAFused
from plora_ext.cil.result import Result
from plora_ext.cil.settings import MethodName, Settings
from plora_ext.cil.stream import Task
from plora_ext.cil.training import Trainer
from plora_ext.data import Images, View
from plora_ext.report.console import ConsoleProgress
from plora_ext.report.files import prepare_folder

BASELINES = tuple(m for m in get_args(MethodName) if m != "plora")
FIGURES = ("average_accuracy", "last_accuracy", "forgetting", "backward_transfer")
FIELDS = ("method", "seed", *FIGURES, *"passes data init_cls increment backbone epochs lr r device torch".split())


class Heads(Head):
    """Several heads on the same features: all of them learn, and what each predicts is taken down.

    Put in the place of a method's head; the logits of the first one are the method's. Of joint, predictions are among
    the first `among` classes each, else among all.
    """

    def __init__(self, names: Iterable[str], settings: Settings, device: torch.device, among: Sequence[int]):
        super().__init__(settings, device)
        self.heads = {name: HEADS[name](settings, device) for name in names}
        self.predictions: list[dict[str, np.ndarray]] = []
        self.among = among if settings.method == "joint" else ()

    @property
    def covariances(self) -> ClassCovariances | None:  # type: ignore[override]
        """Those of the classes, the same in every head that keeps them."""
        return next((h.covariances for h in self.heads.values() if h.covariances is not None), None)

    def follow(self, drift: Drift) -> None:
        for head in self.heads.values():
            head.follow(drift)

    def learn(self, *given: Any) -> None:
        for head in self.heads.values():
            if head.learns:
                head.learn(*given)

    def __call__(self, features: Tensor, prototypes: Tensor) -> Tensor:
        return self.record({name: head(features, prototypes) for name, head in self.heads.items()})

    def record(self, logits: dict[str, Tensor]) -> Tensor:
        best = {
            name: torch.stack([values[:, :classes].argmax(-1) for classes in self.among or (values.shape[1],)], 1)
            for name, values in logits.items()
        }
        self.predictions.append({name: chosen.cpu().numpy() for name, chosen in best.items()})
        return next(iter(logits.values()))


class Ablation(PLoRAFused):
    """PLoRA under every alignment, the oracle (true means of old classes; with `gaussian` true covariances as well) and
    every head on the alignment of the settings, all from the same adapters."""

    head: Heads

    def __init__(self, trainer: Trainer, settings: Settings):
        super().__init__(trainer, settings)
        self.variants: dict[str, Tensor] = {}
        self.seen: list[tuple[View, Tensor]] = []
        self.oracle: Head | None = None

    def learn(self, task: Task, images: View, labels: Tensor) -> None:
        s, old_model, before = self.settings, None, None
        if task.index:
            old_model = self._frozen()
            before = self.trainer.features(images, old_model)
        self.train_and_fuse(task, images, labels, old_model if s.distillation else None)
        after = self.trainer.features(images)
        new = class_means(after, labels, len(task.classes))
        for name in ALIGNMENTS:
            old = self.variants.get(name, new[:0])
            if old_model is not None and before is not None:
                own = self.head.covariances if name == s.alignment else None
                drift = Drift(name, old, len(new), tau=s.tau, ridge=s.ridge, covariances=own)
                drift.add(before, after, labels)
                if drift.kind.rows and s.sought:
                    sought = self._seek(old_model, self._frozen(), images, before, labels, old)
                    drift.add(*sought.unbind(1), labels=None)
                old = drift.align()
                if name == s.alignment:
                    self.head.follow(drift)
            self.variants[name] = torch.cat([old, new])
        self.prototypes = self.variants[s.alignment]
        self._teach(before, after, labels)
        self.seen.append((images, labels + task.classes.start))
        true, of = torch.cat([self.trainer.features(seen) for seen, _ in self.seen]), [label for _, label in self.seen]
        means = self.variants["oracle"] = class_means(true, torch.cat(of), task.classes.stop)
        if "gaussian" in self.head.heads:
            self.oracle = HEADS["gaussian"](self.settings, self.trainer.device)
            self.oracle.learn(means, None, true, torch.cat(of))

    def logits(self, features: Tensor) -> Tensor:
        heads = dict(self.head.heads)
        cosine = heads.pop("cosine", None)
        logits = {f"plora, {name}": cosine(features, means) for name, means in self.variants.items()} if cosine else {}
        if self.oracle:
            logits["plora, oracle means + gaussian"] = heads["gaussian"](features, self.variants["oracle"])
            logits["plora, oracle + gaussian"] = self.oracle(features, self.variants["oracle"])
        logits |= {name: head(features, self.prototypes) for name, head in heads.items()}
        first = self.head.record(logits)
        return logits.get(f"plora, {self.settings.alignment}", first)


def results_by_head(
    settings: Settings, data: Images, progress: ConsoleProgress, heads: Iterable[str],
    kind: Callable[[Trainer, Settings], Method] | None = None,
) -> dict[str, Result]:  # fmt: skip
    """The settings' method, or `kind`, with each of `heads` from one training; an ensemble has a head of its own."""
    made: list[Method] = []
    stream = make_stream(settings, data)
    ends = [task.classes.stop for task in stream.tasks]

    def make(trainer: Trainer, settings: Settings) -> Method:
        made.append((kind or METHODS[settings.method])(trainer, settings))
        if not isinstance(made[0].head, Subspace):
            made[0].head = Heads(heads, settings, trainer.device, ends)
        return made[0]

    result = run(settings, data=data, callbacks=[progress], make=make)
    if not isinstance(made[0].head, Heads):
        return {"cosine": result}
    predictions, results = made[0].head.predictions, {}
    tasks = tasks_of(settings, stream)
    for name in predictions[0]:
        curve, matrix = [], []
        every = np.concatenate([predicted[name] for predicted in predictions])  # an evaluation may have several parts
        for t in range(len(tasks)):
            labels = np.concatenate([task.test_labels for task in tasks[: t + 1]])
            predicted, every = np.split(every, [len(labels)])
            correct = (predicted == labels[:, None]).astype(np.float64)
            of = ends if settings.method == "joint" else ends[t : t + 1]
            curve += [100 * float(correct[labels < end, i].mean()) for i, end in enumerate(of)]
            matrix.append(metrics.task_accuracies(correct[:, -1], stream.task_of_class()[labels]))
        results[name] = replace(result, curve=curve, matrix=matrix)
    return results


def measure(settings: Settings, data: Images, progress: ConsoleProgress) -> list[dict[str, object]]:
    """A row for the method with each classifier; for plora also one for each alignment."""
    kind, method = (Ablation if settings.method == "plora" else None), settings.method
    names = {"cosine": method, **{name: f"{method} + {name}" for name in HEADS if name != "cosine"}}
    alike: dict[float, list[str]] = {}  # heads that train the same adapters
    for name in HEADS:
        alike.setdefault(replace(settings, head=name).distillation if kind else 0.0, []).append(name)
    rows = []
    for heads in alike.values():
        results = results_by_head(replace(settings, head=heads[0]), data, progress, heads, kind)
        rows += [row(names.get(name, name), result) for name, result in results.items()]
    return rows


def row(name: str, result: Result) -> dict[str, object]:
    """One line of the CSV."""
    s = result.settings
    device = pick_device(s["device"])
    where = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    kept = {key: s[key] for key in FIELDS if key in s and key != "method"}
    return {"method": name, **result.summary(), **kept, "passes": result.passes, **where, "torch": torch.__version__}


def table(rows: Sequence[dict[str, object]]) -> str:
    """The Markdown table: a line a method, mean ± standard deviation over its seeds; seconds where rows have them."""
    timed = ["seconds"] if "seconds" in rows[0] else []

    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}" if values else "–"

    lines = []
    for method in dict.fromkeys(str(r["method"]) for r in rows):
        own = [r for r in rows if r["method"] == method]
        figures = [[float(str(r[f])) for r in own if r[f] not in (None, "")] for f in FIGURES]
        seconds = [cell([float(str(r[f])) for r in own]) for f in timed]
        lines.append([method, *map(cell, figures), str(own[0]["passes"]), *seconds, str(len(own))])
    columns = ("Method", "Ā", "A_B", "Forgetting", "BWT", "Passes", *map(str.capitalize, timed), "Seeds")
    return harness.table(columns, lines)


def main() -> None:
    parser = harness.options(__doc__)
    add_config(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1993, 1994, 1995])
    parser.add_argument("--methods", nargs="+", choices=("plora", *BASELINES), default=["plora", *BASELINES])
    parser.add_argument("--merge", nargs="+", metavar="CSV", help="join these instead of running")
    parser.add_argument("--out", required=True, help="path of the results without its suffix")
    add_settings(parser, skip=("method", "seed", "out"))
    args = parser.parse_args()
    out = Path(args.out)
    prepare_folder(out.parent)
    rows: list[dict[str, object]] = []
    if args.merge:
        for file in map(Path, args.merge):
            rows += csv.DictReader(file.read_text(encoding="utf-8").splitlines())
        rows.sort(key=lambda r: int(str(r["seed"])))
        harness.write(out, FIELDS, rows, table(rows))
        print(table(rows))
        return
    del args.out
    settings = settings_from(args)
    data = load_data(settings)
    with ConsoleProgress() as progress:
        for seed, method in itertools.product(args.seeds, args.methods):
            rows += measure(replace(settings, method=method, seed=seed), data, progress)
            harness.write(out, FIELDS, rows, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
