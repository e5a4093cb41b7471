"""The build backend: setuptools', asking for torch and CMake only where they are missing.

Torch's headers are needed to build, but a fixed build requirement on torch would download a second one into every
isolated build, even when the environment already has it. So torch is required only when that environment has none.
"""

from __future__ import annotations

import plora_toolchain as toolchain
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are


def _requirements() -> list[str]:
    needed = []
    if toolchain.find_torch() is None:
        needed.append("torch>={}.{}".format(*toolchain.MIN_TORCH))
    if toolchain.find_tool("cmake") is None:
        needed.append("cmake>={}.{}".format(*toolchain.MIN_CMAKE))
    return needed


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()
