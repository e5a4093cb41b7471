"""What settings can name: methods, heads, alignments and backbones, those of this package and a user's own.

    @register_method("mine")
    class Mine(Method): ...

The module that holds such lines is named by the setting `plugins`, so that it is imported wherever a run's settings are
read: from YAML, on the command line, and when a run is continued, evaluated or used.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

__all__ = ["register_alignment", "register_backbone", "register_head", "register_method"]

T = TypeVar("T", bound=Callable[..., Any])

METHODS: dict[str, Any] = {}
HEADS: dict[str, Any] = {}
ALIGNMENTS: dict[str, Alignment] = {}
BACKBONES: dict[str, Any] = {}
_OF = {"method": METHODS, "head": HEADS, "alignment": ALIGNMENTS, "backbone": BACKBONES}


class Alignment(NamedTuple):
    """A rule for old prototypes, with the sums over images that it needs (plora_ext.cil.alignment.Drift)."""

    rule: Callable[[Any], Any]
    linear: bool = False
    images: bool = False
    rows: bool = False


def register_method(name: str) -> Callable[[T], T]:
    """Decorates a `plora_ext.cil.methods.Method`, which `method: name` then means."""
    return lambda made: _add("method", name, made, made)


def register_head(name: str) -> Callable[[T], T]:
    """Decorates a `plora_ext.cil.heads.Head`, which `head: name` then means."""
    return lambda made: _add("head", name, made, made)


def register_alignment(
    name: str, *, linear: bool = False, images: bool = False, rows: bool = False
) -> Callable[[T], T]:
    """Decorates a function of a `plora_ext.cil.alignment.Drift` that gives the old prototypes [C, D] in the new space.

    Args:
        linear: It reads `gram` and `cross`; covariances and the sums of head ranpac follow their linear drift map.
        images: It reads `moved` and `weight`.
        rows: It asks for `local_maps`, and moves each class's own `covariances`, if there are any, by its map.
    """
    return lambda made: _add("alignment", name, Alignment(made, linear, images, rows), made)


def register_backbone(name: str) -> Callable[[T], T]:
    """Decorates a function (pretrained, weights, image_size) that returns a `plora_ext.data.Backbone`."""
    return lambda made: _add("backbone", name, made, made)


def choices(setting: str, builtin: Sequence[Any]) -> tuple[Any, ...]:
    """The values of a setting with choices: those of this package, then a user's own."""
    return (*builtin, *(name for name in _OF.get(setting, ()) if name not in builtin))


def import_plugins(modules: Sequence[str]) -> None:
    """Imports the modules of the setting `plugins`, also from the working directory.

    Raises:
        ValueError: There is no such module.
    """
    for module in modules:
        if module not in sys.modules:
            search_in(os.getcwd())
        package = module.partition(".")[0]
        try:
            if not package:  # "./mine.py"
                raise ModuleNotFoundError(name=module)
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in (package, module):
                raise
            raise ValueError(f"plugins names {module!r}, which is no module here or on the Python path") from error


def search_in(folder: str) -> None:
    """Has modules looked for in a folder, too, after all others."""
    if folder not in sys.path:
        sys.path.append(folder)


def _add(setting: str, name: str, entry: Any, made: T) -> T:
    before = _OF[setting].get(name)
    if before is not None and _where(before) != _where(entry):  # a cell of a notebook may be run again
        raise ValueError(f"{setting} {name!r} is taken by {_where(before)}: choose another name")
    _OF[setting][name] = entry
    return made


def _where(entry: Any) -> str:
    made = entry.rule if isinstance(entry, Alignment) else entry
    return f"{made.__module__}.{made.__qualname__}"
