"""How benchmarks keep what they measured: NAME.csv and NAME.md, each whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


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
