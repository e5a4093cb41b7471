"""Fixtures and settings that every test sees.

The tests import the installed package: run them with ``pytest python_tests`` (``python -m pytest`` would put the source
folder, which has no compiled libraries unless installed with ``pip install -e``, in front of it).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import plora_ext
from plora_ext import libraries


def pytest_report_header() -> str:
    return f"plora_ext {plora_ext.__version__} ({libraries.backend()}) at {Path(plora_ext.__file__).parent}"


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """The same few threads everywhere, so that timings and thread-dependent sums do not depend on the machine."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device type in turn; CUDA is skipped where there is none. TF32 is off, so that CUDA compares to the CPU."""
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch fills memory that nobody has written yet with NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed: draw on the CPU, then move, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The source folder that holds these tests."""
    return Path(__file__).resolve().parents[1]
