"""How benchmarks keep what they measured: NAME.csv and NAME.md, each whole or not at all, and where it is from."""

from __future__ import annotations

import csv
import datetime
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plora_ext


def write(out: Path, fields: Sequence[str], rows: Iterable[Mapping[str, Any]], text: str) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for suffix, content in ((".csv", table.getvalue()), (".md", text)):
        part = out.with_name(f".{out.name}{suffix}.part")
        part.write_text(content, encoding="utf-8")
        os.replace(part, out.with_name(out.name + suffix))


def commit() -> str:
    try:
        where = Path(__file__).resolve().parent
        return subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=where, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def origin(given: str | None = None) -> dict[str, str]:
    """Version, commit (`given` where this is no git checkout), date and command of this process."""
    command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *(Path(a).name for a in sys.argv[1:])]
    return {
        "plora_ext": plora_ext.__version__,
        "commit": given or commit(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(command),
    }
