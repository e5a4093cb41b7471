"""Turns a pytest-benchmark JSON file into a CSV and a Markdown table.

pytest benchmarks/bench_lora.py benchmarks/bench_prototypes.py --benchmark-json=bench.json
python benchmarks/table.py bench.json --out benchmarks/results/cpu_operators
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import record
import torch

import plora_ext

OURS = "plora_ext"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="path of the results without its suffix")
    args = parser.parse_args()
    report = json.loads(args.json.read_text(encoding="utf-8"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else report["machine_info"]["cpu"]["brand_raw"]
    where = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "plora_ext": plora_ext.__version__,
        "commit": report["commit_info"]["id"][:12],
        "date": report["datetime"][:10],
    }
    cases = [
        {
            "case": b["group"] or b["name"],
            "rival": b["params"]["rival"],
            "median_ms": round(1e3 * b["stats"]["median"], 3),
            "iqr_ms": round(1e3 * b["stats"]["iqr"], 3),
            "rounds": b["stats"]["rounds"],
        }
        for b in report["benchmarks"]
    ]
    ours = {c["case"]: c["median_ms"] for c in cases if c["rival"] == OURS}
    lines = [", ".join(f"{k} {v}" for k, v in where.items()), ""]
    lines += ["| case | form | median ms | its time / ours |", "|---|---|---:|---:|"]
    for c in cases:
        ratio = f"{c['median_ms'] / ours[c['case']]:.2f}" if c["case"] in ours else "–"
        lines.append(f"| {c['case']} | {c['rival']} | {c['median_ms']:.3f} | {ratio} |")
    record.write(args.out, [*cases[0], *where], ({**c, **where} for c in cases), "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
