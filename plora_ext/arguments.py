"""What the command line takes: its commands, their options, and settings as options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from plora_ext.cil.settings import Settings, parse


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The settings among `names` that were given as options."""
    texts = {name: getattr(args, name, None) for name in names}
    return {name: parse(name, text) for name, text in texts.items() if text is not None}


def settings_from(args: argparse.Namespace, **defaults: Any) -> Settings:
    """The settings that a parser with `add_settings` has read: defaults, then the files in turn, then the options."""
    overrides = given(args, [f.name for f in fields(Settings)])
    config = getattr(args, "config", None)
    return Settings.load(config, {**({} if config else defaults), **overrides})


def hyphens(word: str) -> str:
    """--weight_decay=0 as --weight-decay=0, so that settings may be written as they are in YAML."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def parser(functions: Mapping[str, Callable[..., None]]) -> argparse.ArgumentParser:
    """The parser of the command line, of the functions behind its commands; their docstrings are its help."""
    from plora_ext import __version__

    made = _Parser(prog="plora-ext", description=f"The command line: `plora-ext {' | '.join(functions)}`.")
    made.add_argument("--version", action="version", version=f"plora-ext {__version__}")
    commands = made.add_subparsers(required=True, metavar=" | ".join(functions), parser_class=_Parser)

    def add(group: Any, name: str, text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = group.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(options=added._option_string_actions)
        return added

    def command(name: str) -> argparse.ArgumentParser:
        added = add(commands, name, functions[name].__doc__ or "")
        added.set_defaults(command=functions[name])
        return added

    demonstrator, trainer = command("demo"), command("train")
    add_settings(demonstrator, skip=("method",))
    add_config(trainer)
    trainer.add_argument("--print-config", action="store_true", help="print the settings as YAML instead of running")
    trainer.add_argument("--resume", action="store_true", help="continue the run that the output folder holds")
    trainer.add_argument("--overwrite", action="store_true", help="replace a finished run of other settings there")
    add_settings(trainer)
    for added in (demonstrator, trainer):
        added.add_argument("--tensorboard", action="store_true", help="write TensorBoard scalars to OUT/tensorboard")
    evaluator = command("eval")
    evaluator.add_argument("run", metavar="RUN", help="a folder that train wrote")
    evaluator.add_argument("--out", metavar="FILE", help="JSON file for the figures")
    predictor = command("predict")
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
    reporter = command("report")
    reporter.add_argument("runs", nargs="+", metavar="RUN", help="a folder that demo, train or report wrote")
    reporter.add_argument("--out", default="plora-report", help="folder for the comparison (default: plora-report)")
    what = command("bench").add_subparsers(dest="what", required=True, metavar="ensemble | prototypes | run")
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
    add_plan(command("info"))
    return made


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
