"""Runs CMake for the compiled part; everything else about the package stands in pyproject.toml.

Environment: ``FORCE_CUDA``, ``PLORA_FORCE_CPU``, ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST`` (read by cmake/cuda.cmake),
``PLORA_TORCH_DIR``, ``MAX_JOBS``, ``CMAKE_ARGS``, ``DEBUG=1``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = "compilers.txt"  # in the build folder: what it was configured with
sys.path.insert(0, str(ROOT / "build_backend"))

import plora_toolchain as toolchain  # noqa: E402


class CleanBuild(build):
    """Starts from an empty staging folder, so that no file of an earlier build ends up in the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds with CMake in a folder that stays (the next build is incremental) and installs into the package."""

    def run(self) -> None:
        in_place = self.editable_mode or self.inplace
        package = ROOT / "plora_ext" if in_place else Path(self.build_lib).resolve() / "plora_ext"
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = toolchain.find_tool("cmake")
        if cmake is None:
            raise SystemExit(
                "plora_ext: CMake {}.{} or newer is needed: pip install cmake".format(*toolchain.MIN_CMAKE)
            )
        ninja = toolchain.find_tool("ninja")
        generator = "Ninja" if ninja else "Unix Makefiles"
        self._forget_other_build(folder, generator)
        self._call([cmake, "-S", str(ROOT), "-B", str(folder), *self._settings(generator, ninja)])
        (folder / COMPILERS).write_text(toolchain.compilers())
        self._call([cmake, "--build", str(folder), "--parallel", str(toolchain.jobs())])
        for stale in package.glob("lib/libplora_*.so"):
            stale.unlink()
        self._call([cmake, "--install", str(folder), "--prefix", str(package)])

    def _settings(self, generator: str, ninja: str | None) -> list[str]:
        try:
            import pybind11
        except ImportError:
            raise SystemExit("plora_ext: pybind11 is needed to build: pip install pybind11") from None
        torch = toolchain.find_torch()
        if torch is None:
            found = [
                f"{version} in {path}"
                for path in toolchain.torch_folders()
                if (version := toolchain.torch_version(path))
            ]
            raise SystemExit(
                "plora_ext: torch {}.{} or newer is needed to build, found {}. Install it (pip install torch), or "
                "build without --no-build-isolation.".format(*toolchain.MIN_TORCH, ", ".join(found) or "none")
            )
        return [
            *("-G", generator),
            *([f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            f"-DCMAKE_BUILD_TYPE={'Debug' if os.environ.get('DEBUG') == '1' else 'Release'}",
            f"-DPLORA_TORCH_DIR={torch}",
            "-DPLORA_PYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]

    @staticmethod
    def _forget_other_build(folder: Path, generator: str) -> None:
        """Drops a build folder that CMake would refuse, or where it would keep to the compilers of another build."""
        cache = folder / "CMakeCache.txt"
        if not cache.is_file():
            return
        entries = dict(re.findall(r"^(CMAKE_[A-Z_]+):INTERNAL=(.*)$", cache.read_text(), re.M))
        same = entries.get("CMAKE_HOME_DIRECTORY") == str(ROOT) and entries.get("CMAKE_GENERATOR") == generator
        same = same and Path(entries.get("CMAKE_COMMAND", "")).is_file()
        compilers = folder / COMPILERS
        if not same or not compilers.is_file() or compilers.read_text() != toolchain.compilers():
            shutil.rmtree(folder)

    @staticmethod
    def _call(command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"plora_ext: the build stopped in '{shlex.join(command[:3])} ...'; the cause is above"
            ) from error

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("plora_ext._C", sources=[])], cmdclass={"build": CleanBuild, "build_ext": CMakeBuild})
