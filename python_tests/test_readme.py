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
    for block in blocks:
        values: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), values)
        assert values["features"].shape == (4, 192)
        assert values["counts"].tolist() == [2, 2]
    assert (tmp_path / "task1" / "adapter_model.safetensors").is_file()
