"""What the build of plora_ext finds on the machine: torch's folder, CMake and Ninja, and how many jobs fit.

Nothing here imports torch: its folder is enough, and in an isolated build the torch of the environment that is being
installed into lies outside ``sys.path``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

MIN_TORCH = (2, 10)
MIN_CMAKE = (3, 20)


def torch_folders() -> list[Path]:
    """Where torch may lie, best first: ``PLORA_TORCH_DIR``, ``sys.path``, this environment, the active one.

    pip isolates a build by taking the environment's folders off ``sys.path``, but it runs the environment's own
    interpreter, so ``sysconfig`` still names them; other tools build with an interpreter of their own. Any torch from
    ``MIN_TORCH`` on will do: the libraries keep to its stable ABI.
    """
    chosen = os.environ.get("PLORA_TORCH_DIR")
    if chosen:
        return [Path(chosen)]
    folders: list[Path] = []
    spec = importlib.util.find_spec("torch")  # finds the package, does not import it
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parent)
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        packages += [*site.getsitepackages(), site.getusersitepackages()]
    elif _sees_system_packages():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        packages.append(sysconfig.get_path("purelib", vars=base))
    active = os.environ.get("VIRTUAL_ENV")
    if active:
        packages.append(sysconfig.get_path("purelib", vars={"base": active, "platbase": active}))
    return folders + [Path(folder) / "torch" for folder in dict.fromkeys(packages)]


def _sees_system_packages() -> bool:
    """Whether this virtual environment was made with --system-site-packages."""
    config = Path(sys.prefix) / "pyvenv.cfg"
    return config.is_file() and bool(re.search(r"include-system-site-packages\s*=\s*true", config.read_text(), re.I))


def torch_version(folder: Path) -> str | None:
    """The version of the torch in ``folder``, or None if there is none."""
    try:
        match = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    except OSError:
        return None
    return match.group(1) if match else None


def find_torch() -> Path | None:
    """The first folder with a torch new enough to build against, or None."""
    for folder in torch_folders():
        version = torch_version(folder)
        if version and _numbers(version) >= MIN_TORCH:
            return folder
    return None


def find_tool(name: str) -> str | None:
    """A working ``cmake`` or ``ninja``: on PATH, or installed beside this interpreter, or None."""
    for folder in (None, sysconfig.get_path("scripts")):
        path = shutil.which(name, path=folder)
        if path is None:
            continue
        # The target environment's pip-installed cmake is on PATH in an isolated build too, but cannot run there.
        result = subprocess.run([path, "--version"], capture_output=True, text=True)
        if result.returncode == 0 and (name != "cmake" or _numbers(result.stdout) >= MIN_CMAKE):
            return path
    return None


def compilers() -> str:
    """The compilers that CMake takes in this environment, with paths and versions."""
    lines = []
    for variable, default in (("CC", "cc"), ("CXX", "c++"), ("CUDAHOSTCXX", "")):
        lines.append(_tool_and_version(variable, os.environ.get(variable) or default))
    homes = [Path(home, "bin") for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    folders = [str(path) for path in homes] + [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    lines.append(_tool_and_version("nvcc", shutil.which("nvcc", path=os.pathsep.join(folders)) or ""))
    return "\n".join(lines)


def _tool_and_version(name: str, command: str) -> str:
    words = shlex.split(command)
    path = shutil.which(words[0]) if words else None
    if path is None:
        return f"{name}: {command or 'none'}"
    result = subprocess.run([path, *words[1:], "--version"], capture_output=True, text=True)
    return f"{name}: {path} {' '.join(words[1:])}\n{result.stdout}"


def jobs() -> int:
    """``MAX_JOBS``, else one job a core as long as each has 2 GB of free memory."""
    wish = os.environ.get("MAX_JOBS")
    if wish is not None:
        if not wish.isdigit() or int(wish) < 1:
            raise SystemExit(f"plora_ext: MAX_JOBS must be a positive number, got {wish!r}")
        return int(wish)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    return max(1, min(cores, int(available.group(1)) // (2 * 1024**2))) if available else cores


def _numbers(text: str) -> tuple[int, ...]:
    match = re.search(r"(\d+)\.(\d+)", text)
    return tuple(int(number) for number in match.groups()) if match else ()
