"""Every example runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEEDS = {"peft_faster": "peft", "avalanche_split_mnist": "avalanche", "export_to_peft": "peft"}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name: str, tmp_path: Path) -> None:
    host = NEEDS.get(name)
    if host and importlib.util.find_spec(host) is None:
        pytest.skip(f"needs {host}: pip install 'plora_ext[integrations]'")
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / f"{name}.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    assert result.stdout.strip()
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_pilot_configuration() -> None:
    from plora_ext.integrations._pilot_learner import DEFAULTS

    settings = json.loads((EXAMPLES / "pilot_plora.json").read_text())
    of_pilot = {
        "prefix", "dataset", "memory_size", "memory_per_class", "fixed_memory", "shuffle", "init_cls", "increment",
        "model_name", "backbone_type", "pretrained", "device", "seed", "batch_size",
    }  # fmt: skip
    assert set(settings) <= of_pilot | set(DEFAULTS)  # no setting that nobody reads
    assert all(settings.get(name, value) == value for name, value in DEFAULTS.items())
