"""Loads the compiled operator libraries once, when it is imported: by ``import plora_ext``, by the command when needed.

``PLORA_BACKEND=reference`` loads nothing: every operator then runs its plain-torch twin. Otherwise the CPU library must
load, and the CUDA one must where it was built and torch has CUDA. Nothing is compiled here and CUDA is not initialised.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from plora_ext.torch_private import kernels

FOLDER = Path(__file__).resolve().parent / "lib"
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ."

loaded: dict[str, str] = {}
"""Name of every library loaded ("cpu", "cuda") and its path."""

missing: dict[str, str] = {}
"""Name of every library that is not loaded, and why."""

_kernels: dict[str, frozenset[str]] = {}


def backend() -> str:
    """``"native"`` when the compiled operators are loaded, ``"reference"`` under ``PLORA_BACKEND=reference``."""
    return "native" if loaded else "reference"


def has_kernel(op: str, device_type: str) -> bool:
    """Whether the compiled operator ``plora_ext::op`` has a kernel for this type of device (``"cpu"``, ``"cuda"``).

    A plain look-up, made when the libraries were loaded, so that it is free to call and can be traced.
    """
    return op in _kernels.get(device_type, ())


def build_info() -> dict[str, Any] | None:
    """How the compiled part was built (see ``plora_ext._C.build_info``), or None if there is none for this Python."""
    try:
        import plora_ext._C as _C
    except ImportError:
        return None
    return dict(_C.build_info())


def load() -> None:
    """Loads the libraries that belong to this torch.

    Raises:
        ImportError: a library that should load does not.
    """
    if os.environ.get("PLORA_BACKEND") == "reference":
        missing["cpu"] = missing["cuda"] = "PLORA_BACKEND=reference"
        return

    _load("cpu")
    if torch.version.cuda is None:
        missing["cuda"] = f"torch {torch.__version__} has no CUDA"
    elif not _path("cuda").is_file():
        info = build_info()
        missing["cuda"] = f"not built: {info['cuda_reason']}" if info else "not built"
    elif problem := _driver_problem():
        missing["cuda"] = problem
    else:
        _load("cuda")
    for key in ("CPU", "CUDA"):
        names = kernels(key)
        _kernels[key.lower()] = frozenset(
            name.removeprefix("plora_ext::").partition(".")[0] for name in names if name.startswith("plora_ext::")
        )


def _driver_problem() -> str | None:
    """Why the driver cannot run the CUDA runtime inside the CUDA library; None where it can, or is not there."""
    info, driver = build_info(), _driver_version()
    if info is None or not driver or driver // 1000 >= int(info["nvcc"].partition(".")[0]):
        return None
    version = f"{driver // 1000}.{driver % 1000 // 10}"
    return (
        f"built with CUDA {info['nvcc']}, but this driver serves CUDA {version}: update the driver, or rebuild with "
        f"CUDA_HOME set to a toolkit of CUDA {driver // 1000}, in the source folder of plora_ext: {REINSTALL}"
    )


def _driver_version() -> int:
    """1000 x major + 10 x minor of the newest CUDA that the driver serves; 0 without one. CUDA is not initialised."""
    version = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _path(name: str) -> Path:
    return FOLDER / f"libplora_{name}.so"


def _load(name: str) -> None:
    path = _path(name)
    if not path.is_file():
        raise ImportError(
            f"plora_ext at {FOLDER.parent} has no compiled library {path.name}. If this is the source folder, leave it "
            "or install it in place (pip install --no-build-isolation -e .); otherwise reinstall plora_ext. "
            "PLORA_BACKEND=reference runs without compiled operators."
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        info = build_info()
        built = f"torch {info['torch']}, {_cuda(info['nvcc'])}" if info else "another Python than this one"
        running = f"torch {torch.__version__}, {_cuda(torch.version.cuda)}"
        raise ImportError(
            f"{path} does not load: {error.__cause__ or error}. It was built with {built}; running are {running}. "
            f"Rebuild it for this torch, in the source folder of plora_ext: {REINSTALL}   "
            "Or set PLORA_BACKEND=reference to run without compiled operators."
        ) from error
    loaded[name] = str(path)


def _cuda(version: str | None) -> str:
    return f"CUDA {version}" if version else "no CUDA"


load()
