"""The Python of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("timm")


def test_examples_run(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (repository / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert blocks
    monkeypatch.chdir(tmp_path)
    learner, own = ({}, {})  # type: dict[str, object], dict[str, object]
    for block, values in zip(blocks, (learner, own), strict=True):
        exec(compile(block, "README.md", "exec"), values)
    assert len(learner["learner"].classes) == 6 and (tmp_path / "icons" / "learner.json").is_file()
    assert own["features"].shape == (4, 192) and own["every"].shape == (2, 4, 192)
    assert own["counts"].tolist() == [2, 2]
    assert (tmp_path / "task1" / "adapter_model.safetensors").is_file()
