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
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from plora_ext.cil.files import exclusive, write_whole
from plora_ext.cil.settings import MethodName, Settings, closest, parse
from plora_ext.variables import unwatched

if TYPE_CHECKING:  # functions import what takes seconds: --help and what is mistyped are answered without torch
    from plora_ext.cil.distributed import World

DEMO_METHODS: tuple[MethodName, ...] = ("simplecil", "lora-first", "plora")


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


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
    args, unknown = _parser().parse_known_args([_hyphens(word) for word in words])
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
            free = {**saved, "onto": None, "init": None}  # unless they were chosen, they are to follow from the others
            settings = settings_from(args, **(free if Settings(**free).as_dict() == saved else saved))
        elif not set(_given(args, [f.name for f in fields(Settings)])) - {"out", "device", "workers"}:
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
        args.run, args.world, **_given(args, ("device", "workers", "weights", "data", "data_root"))
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
    if args.top < 1:
        raise ValueError(f"top must be at least 1, got {args.top}")
    paths = image_paths(args.images)
    run = trained.Trained(args.run, args.world, **_given(args, ("device", "workers", "weights", "corrupt")))
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
    from plora_ext.report.runs import group

    reports.drawers()  # before any work: matplotlib may not be installed
    from plora_ext.report.page import notes

    results = [result for run in args.runs for result in reports.load_results(run)]
    if (Path(args.out) / "checkpoint").exists():
        raise ValueError(f"out must be a folder of its own, {args.out!r} holds a run, whose metrics would be replaced")
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


def _odd(settings: Settings, data: Any, stream: Any) -> list[str]:
    """What is allowed and yet hardly meant."""
    from plora_ext.cil.build import pick_device
    from plora_ext.data.images import doubles

    lines = []
    if number := doubles(data):
        kind = "held-out" if data.held_out else "test"
        lines.append(f"{number} of {len(data.test_images)} {kind} images are training images as well, byte for byte")
    if settings.amp == "float16" and pick_device(settings.device).type == "cpu":
        lines.append("amp float16 makes a CPU slower, not faster: it is for GPUs; bfloat16 or none")
    if settings.init_cls > stream.num_classes:
        lines.append(f"init_cls is {settings.init_cls}, but there are only {stream.num_classes} classes")
    if len(stream) == 1 and settings.method != "joint":
        lines.append(f"all {stream.num_classes} classes fit into one task: nothing is incremental; lower increment")
    return lines


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The settings among `names` that were given as options."""
    given = {name: getattr(args, name, None) for name in names}
    return {name: parse(name, text) for name, text in given.items() if text is not None}


def settings_from(args: argparse.Namespace, **defaults: Any) -> Settings:
    """The settings that a parser with `add_settings` has read: defaults, then the files in turn, then the options."""
    overrides = _given(args, [f.name for f in fields(Settings)])
    config = getattr(args, "config", None)
    return Settings.load(config, {**({} if config else defaults), **overrides})


def _hyphens(word: str) -> str:
    """--weight_decay=0 as --weight-decay=0, so that settings may be written as they are in YAML."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _parser() -> argparse.ArgumentParser:
    from plora_ext import __version__

    parser = _Parser(prog="plora-ext", description=__doc__)
    parser.add_argument("--version", action="version", version=f"plora-ext {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="demo | train | eval | predict | report | bench | info", parser_class=_Parser
    )

    def add(group: Any, name: str, text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = group.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(options=added._option_string_actions)
        return added

    def command(function: Any, name: str = "") -> argparse.ArgumentParser:
        added = add(commands, name or function.__name__, function.__doc__)
        added.set_defaults(command=function)
        return added

    demonstrator, trainer = command(demo), command(train)
    add_settings(demonstrator, skip=("method",))
    add_config(trainer)
    trainer.add_argument("--print-config", action="store_true", help="print the settings as YAML instead of running")
    trainer.add_argument("--resume", action="store_true", help="continue the run that the output folder holds")
    trainer.add_argument("--overwrite", action="store_true", help="replace a finished run of other settings there")
    add_settings(trainer)
    for added in (demonstrator, trainer):
        added.add_argument("--tensorboard", action="store_true", help="write TensorBoard scalars to OUT/tensorboard")
    evaluator = command(evaluate, "eval")
    evaluator.add_argument("run", metavar="RUN", help="a folder that train wrote")
    evaluator.add_argument("--out", metavar="FILE", help="JSON file for the figures")
    predictor = command(predict)
    predictor.add_argument("run", metavar="RUN", help="a folder that train wrote")
    predictor.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    predictor.add_argument(
        "--out", default="predictions.csv", metavar="FILE", help=".csv or .json (default: %(default)s)"
    )
    predictor.add_argument("--overwrite", action="store_true", help="replace that file")
    predictor.add_argument(
        "--top", type=int, default=1, metavar="K", help="rows for each image: its likeliest classes (default: 1)"
    )
    predictor.add_argument("--corrupt", metavar="error|skip", help="as in train (default: the run's)")
    for added in (evaluator, predictor):
        added.add_argument("--device", metavar="VALUE", help="as in train (default: the run's)")
        added.add_argument("--workers", metavar="VALUE", help="as in train (default: the run's)")
        added.add_argument("--weights", metavar="FILE", help="where the backbone's weights are now, if it has a file")
    for name in ("--data", "--data-root"):
        evaluator.add_argument(name, metavar="VALUE", help="where the run's data are now (default: where they were)")
    reporter = command(report)
    reporter.add_argument("runs", nargs="+", metavar="RUN", help="a folder that demo, train or report wrote")
    reporter.add_argument("--out", default="plora-report", help="folder for the comparison (default: plora-report)")
    what = command(bench).add_subparsers(dest="what", required=True, metavar="ensemble | prototypes | run")
    for name, text in (
        ("ensemble", "one batch under many adapters, beside one pass an adapter"),
        ("prototypes", "the prototype operators, beside plain torch"),
        ("run", "loop, step, data and evaluation of a run with these settings, and the share of its phases"),
    ):
        added = add(what, name, text)
        if name == "run":
            added.add_argument("--out", dest="json", metavar="FILE", help="JSON file for the figures")
            added.add_argument(
                "--seconds", type=float, default=2.0, metavar="VALUE", help="of each part, roughly (default: 2)"
            )
            add_config(added)
            add_settings(added, skip=("out",))
        else:
            added.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
            added.add_argument("--device", default="auto", metavar="VALUE", help="auto, cpu, cuda, cuda:1, ...")
    add_plan(command(info))
    return parser


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `info --plan`."""
    group = parser.add_argument_group("launch plans of the low-rank operators")
    group.add_argument(
        "--plan", nargs="*", metavar="SHAPE", help="rows x in x out, such as 12608x768x768 (default: ViT-B's layers)"
    )
    for name, default, text in (
        ("family", "indexed", "indexed, sum or all"),
        ("adapters", 10, "how many"),
        ("rank", 16, "their rank"),
        ("dtype", "bfloat16", "bfloat16, float16 or float32"),
        ("rows-per-id", 197, "rows of a sample, which share their adapter"),
    ):
        group.add_argument(
            f"--{name}", type=type(default), default=default, metavar="VALUE", help=f"{text} (default: {default})"
        )
    group.add_argument(
        "--device-capability", dest="capability", metavar="VALUE", help="such as 9.0 (default: this GPU's, or 9.0)"
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `-c`, which `settings_from` reads."""
    text = "YAML file of settings; may be given several times, a later file overrides an earlier one, options all"
    parser.add_argument("-c", "--config", metavar="FILE", action="append", help=text)


def add_settings(parser: argparse.ArgumentParser, skip: Sequence[str] = ()) -> None:
    """Adds an option for every setting, a group for every section of them; a switch also as --no-NAME."""
    hints, defaults = get_type_hints(Settings), Settings().as_dict()
    for f in fields(Settings):
        if section := f.metadata["section"]:
            group = parser.add_argument_group(section)
        if f.name in skip:
            continue
        kinds = (hints[f.name], *get_args(hints[f.name]))
        choices = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        text = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        default = defaults[f.name] if isinstance(defaults[f.name], str) else json.dumps(defaults[f.name])
        name, text = f.name.replace("_", "-"), f"{text} (default: {default})"
        if hints[f.name] is bool:  # --NAME, --no-NAME or, as in YAML, --NAME true
            group.add_argument(f"--{name}", dest=f.name, nargs="?", const="true", metavar="true|false", help=text)
            hidden = argparse.SUPPRESS
            group.add_argument(f"--no-{name}", dest=f.name, action="store_const", const="false", help=hidden)
        else:
            group.add_argument(f"--{name}", dest=f.name, metavar="VALUE", help=text)
