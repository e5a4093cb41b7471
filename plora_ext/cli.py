"""The command line: `plora-ext demo | train | eval | predict | report | bench | info`."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plora_ext.arguments import given, hyphens, parser, settings_from
from plora_ext.cil.files import exclusive, write_whole
from plora_ext.cil.settings import DERIVED, MethodName, Settings, closest
from plora_ext.variables import unwatched

if TYPE_CHECKING:  # functions import what takes seconds: --help and what is mistyped are answered without torch
    from plora_ext.cil.distributed import World

DEMO_METHODS: tuple[MethodName, ...] = ("simplecil", "lora-first", "plora")


class _Pipe(io.FileIO):
    """A standard output whose reader may go, as `head` does: what is written then is lost, and the work goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 after an error of the user's, 128 + N after signal N."""
    warnings.showwarning = _one_line
    if (out := sys.__stdout__) is not None and sys.stdout is out:
        raw = io.BufferedWriter(_Pipe(out.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(raw, out.encoding, errors="replace", line_buffering=True)
    words = sys.argv[1:] if arguments is None else arguments
    args, unknown = parser(COMMANDS).parse_known_args([hyphens(word) for word in words])
    try:
        with _signals():
            if unknown:
                flags = [option for option in args.options if option.startswith("--")]
                known = closest(unknown[0].split("=")[0], flags) if unknown[0].startswith("-") else ""
                raise ValueError(f"unknown argument {unknown[0]!r}{known}")
            if _alone():  # else one process is to say it
                settings_from(args)
            if args.command in (demo, train, evaluate, predict):
                from rich.console import Console

                # seconds; nothing where no terminal is
                with Console(stderr=True, quiet=unwatched()).status("importing torch and timm"):
                    import plora_ext.cil.trained  # noqa: F401
            from plora_ext.cil.distributed import launched

            with launched() as args.world:
                if args.world.size > 1 and args.command not in (demo, train, evaluate, predict):
                    raise ValueError("only demo, train, eval and predict are for many processes: leave torchrun out")
                args.command(args)
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            resume = "; go on with --resume" if args.command is train else ""
            print(f"interrupted: what was finished is kept, nothing else was written{resume}", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if args.debug:
            raise
        return _refused(error)
    except RuntimeError as error:
        from torch import OutOfMemoryError

        from plora_ext.cil.distributed import Stopped

        if args.debug or not isinstance(error, OutOfMemoryError | Stopped):
            raise
        return 2 if isinstance(error, Stopped) else _refused(error)  # of the former another process speaks
    return 0


def _alone() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


def _refused(error: Exception) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


@contextmanager
def _signals() -> Iterator[None]:
    """What ends a process from outside (a scheduler, a container, a closed connection) ends it as Ctrl-C does.

    Not one of many: it may be waiting for others that are gone, and Python would wait with it.
    """

    def end(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt(number)

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP) if _alone() else ():
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one
                with suppress(ValueError):  # not the main thread
                    before[number] = signal.signal(number, end)
        yield
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)


def _one_line(message: Warning | str, *rest: Any, **keywords: Any) -> None:
    """A warning as a user of the command line reads it: without the line of this package that it comes from."""
    print("warning:", " ".join(str(message).split()), file=sys.stderr)


def demo(args: argparse.Namespace) -> None:
    """PLoRA beside two baselines on the embedded benchmark, with the Gaussian head."""
    settings = settings_from(args, out="plora-demo", head="gaussian", sought=5)
    _run([replace(settings, method=method) for method in DEMO_METHODS], settings, args.world, None, args.tensorboard)


def train(args: argparse.Namespace) -> None:
    """One method, as the settings say."""
    settings = settings_from(args)
    if args.resume and not args.config:  # what is not said is as it was
        from plora_ext.cil.checkpoint import Checkpoint

        before = Checkpoint(Path(settings.out), resume=True, world=args.world)
        if before.manifest:
            saved = before.settings
            if given(args, ["plugins"]):  # those of before may be gone
                saved["plugins"] = settings.plugins
            free = {**saved, **dict.fromkeys(DERIVED)}  # unless they were chosen, they are to follow from the others
            settings = settings_from(args, **(free if Settings(**free).as_dict() == saved else saved))
        elif not set(given(args, [f.name for f in fields(Settings)])) - {"out", "device", "workers"}:
            raise ValueError(f"{settings.out} holds no checkpoint to resume: is it the right folder?")
        elif args.world.first:
            print(f"note: {settings.out} holds no checkpoint to resume, this run starts anew", file=sys.stderr)
    if args.print_config:
        print(settings.to_yaml(), end="")
        return
    _run([settings], settings, args.world, args.resume, args.tensorboard, args.overwrite)


def evaluate(args: argparse.Namespace) -> None:
    """Accuracy of a run's last checkpoint on its own test images, or those that it held out."""
    from plora_ext.cil.trained import Trained

    figures = Trained(
        args.run, args.world, **given(args, ("device", "workers", "weights", "data", "data_root"))
    ).evaluate()
    if not args.world.first:
        return
    print(
        f"{args.run}: {figures['accuracy']:.2f} % on {figures['evaluated_on']} of {figures['classes_seen']} classes, "
        f"after {figures['tasks_learned']} of {figures['tasks']} tasks"
    )
    print("on each task:", " ".join(f"{accuracy:.1f}" for accuracy in figures["task_accuracies"]))
    if args.out:
        write_whole(Path(args.out), (json.dumps(figures, indent=1) + "\n").encode())


def predict(args: argparse.Namespace) -> None:
    """Classes of images, by a run's last checkpoint."""
    from plora_ext.cil import trained
    from plora_ext.data import ImageFiles
    from plora_ext.data.folders import decodable
    from plora_ext.data.inputs import image_paths

    if Path(args.out).suffix not in (".csv", ".json"):
        raise ValueError(f"out must end in .csv or .json, got {args.out!r}")
    if Path(args.out).exists() and not args.overwrite:
        raise ValueError(f"{args.out} is there already: choose another file by --out, or --overwrite it")
    paths = image_paths(args.images)
    run = trained.Trained(args.run, args.world, **given(args, ("device", "workers", "weights", "corrupt")))
    if run.settings.corrupt == "skip":
        (paths,) = decodable([paths], "skip")
    predictions = run.predict(ImageFiles(paths), args.top)
    if not args.world.first:
        return
    trained.write_predictions(Path(args.out), paths, predictions)
    print(f"written to {args.out}: predictions for {len(paths)} {'image' if len(paths) == 1 else 'images'}")


def report(args: argparse.Namespace) -> None:
    """Compares runs over seeds: a page (report.html), its figures as PNG and PDF, and CSV files."""
    from rich.console import Console

    from plora_ext.report import files as reports
    from plora_ext.report.runs import distinct, group

    reports.drawers()  # before any work: matplotlib may not be installed
    from plora_ext.report.page import notes

    results = distinct(result for run in args.runs for result in reports.load_results(run, args.out))
    _refuse_others(Path(args.out), "a report")
    folder = reports.prepare_folder(args.out)
    names = reports.write_report(folder, results)
    protocols, console = group(results), Console()
    for protocol in protocols:
        if protocol.finished:
            console.print(reports.comparison_table(protocol, console.width))
    for note in notes(protocols, results):
        print(note)
    print(f"written to {folder}: {', '.join(names)}")


def bench(args: argparse.Namespace) -> None:
    """Times a part of this package beside its rivals, or the parts of a run of yours, on this machine."""
    if args.what == "run":
        from plora_ext.cil import timing

        figures = timing.time_run(settings_from(args), args.seconds, lambda line: print(line, flush=True))
        print("\n" + timing.shares(figures))
        if args.json:
            write_whole(Path(args.json), (json.dumps(figures, indent=1) + "\n").encode())
        return
    from plora_ext import bench as benchmarks
    from plora_ext.cil.build import pick_device

    device = pick_device(args.device)
    lines: list[benchmarks.Line] = []
    for case in benchmarks.CASES[args.what](device, quick=args.quick):
        lines += benchmarks.measure(case, device, 3 if args.quick else 11)
    print(benchmarks.table(lines))


def info(args: argparse.Namespace) -> None:
    """What is installed, and why whatever is missing is missing; with --plan, how CUDA computes adapted layers."""
    from plora_ext import info as facts

    if args.plan is None:
        facts.main()
    else:
        keywords = ("family", "adapters", "rank", "dtype", "rows_per_id", "capability")
        print(facts.plans(args.plan, **{name: getattr(args, name) for name in keywords}))


def _run(
    jobs: Sequence[Settings],
    shown: Settings,
    world: World,
    resume: bool | None = None,
    tensorboard: bool = False,
    overwrite: bool = False,
) -> None:
    """Runs jobs into one folder; with `resume` not None, a single job with a checkpoint."""
    from plora_ext.cil.build import load_data, make_stream
    from plora_ext.cil.checkpoint import Checkpoint
    from plora_ext.cil.loop import run
    from plora_ext.cil.metrics import evaluated_on
    from plora_ext.cil.result import Result
    from plora_ext.report import files as reports
    from plora_ext.report.console import ConsoleProgress
    from plora_ext.report.runs import group
    from plora_ext.report.trackers import TensorBoard

    if Path(shown.data).is_dir() and Path(shown.out).resolve().is_relative_to(Path(shown.data).resolve()):
        raise ValueError(f"out must lie outside of the data folder {shown.data!r}, got {shown.out!r}")
    folder = world.from_first(lambda: reports.prepare_folder(shown.out))
    with ExitStack() as stack:
        if world.first:
            stack.enter_context(exclusive(folder))
        if not overwrite:
            world.from_first(lambda: _refuse_others(folder, "a demo" if resume is None else "a run"))
        checkpoint = None if resume is None else Checkpoint(folder, resume, world, overwrite)
        console = ConsoleProgress()
        callbacks: list[Any] = [console] if world.first else []
        if tensorboard and world.first:  # before any work: it may not be installed
            resumed = bool(checkpoint and checkpoint.manifest)
            board = TensorBoard(folder / "tensorboard", not resumed, shown, several=len(jobs) > 1)
            callbacks.append(stack.enter_context(board))
        with world.host_first() if shown.download else nullcontext():
            data = load_data(shown)
        stream = make_stream(shown, data)
        if world.first:
            for line in _odd(shown, data, stream):
                print(f"note: {line}", file=sys.stderr)
            together = f", {world.size} processes" if world.size > 1 else ""
            kind = "held-out" if data.held_out else "test"
            print(
                f"{shown.data}: {len(data.train_images)} training and {len(data.test_images)} {kind} images, "
                f"{stream.num_classes} classes in {len(stream)} {'task' if len(stream) == 1 else 'tasks'}{together}"
            )
            if data.held_out:
                print(f"evaluated on: {evaluated_on(shown.validation)}, not the test set")
        results: list[Result] = []
        with console if world.first else nullcontext():
            for job in jobs:
                results.append(run(job, data=data, callbacks=callbacks, checkpoint=checkpoint, world=world))
                results[-1].learner = None  # its model need not stay in memory
                if world.first:
                    names = reports.write_folder(folder, results, shown.to_yaml())
    if not world.first:
        return
    (protocol,) = group(results)
    console.console.print(reports.comparison_table(protocol, console.console.width))
    print(f"written to {folder}: {', '.join(names)}")
    if not any(name.endswith(".png") for name in names):
        print(f"note: no figures without matplotlib: {reports.INSTALL}", file=sys.stderr)


def _refuse_others(folder: Path, wanted: str) -> None:
    """What another command wrote would be replaced without a word; of one run by another, the checkpoint decides."""
    run, metrics, page = ((folder / name).exists() for name in ("checkpoint", "metrics.json", "report.html"))
    held = "a run" if run else "a report" if page else "a demo" if metrics else wanted
    if held != wanted:
        or_so = ", or --overwrite it" if wanted == "a run" else ""
        raise ValueError(f"{folder} holds {held}, whose results {wanted} would replace: choose another folder{or_so}")


def _odd(settings: Settings, data: Any, stream: Any) -> Iterator[str]:
    """What is allowed and yet hardly meant."""
    from plora_ext.cil.build import pick_device
    from plora_ext.data.images import doubles

    if number := doubles(data):
        kind = "held-out" if data.held_out else "test"
        yield f"{number} of {len(data.test_images)} {kind} images are training images as well, byte for byte"
    if settings.amp == "float16" and pick_device(settings.device).type == "cpu":
        yield "amp float16 makes a CPU slower, not faster: it is for GPUs; bfloat16 or none"
    if settings.init_cls > stream.num_classes:
        yield f"init_cls is {settings.init_cls}, but there are only {stream.num_classes} classes"
    if len(stream) == 1 and settings.method != "joint":
        yield f"all {stream.num_classes} classes fit into one task: nothing is incremental; lower increment"


COMMANDS = {
    "demo": demo, "train": train, "eval": evaluate, "predict": predict, "report": report, "bench": bench, "info": info,
}  # fmt: skip
