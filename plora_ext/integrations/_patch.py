"""Replacing functions of another package, saying which, and putting them back."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

_ABSENT = object()


@dataclass
class Report:
    """What runs on this package's operators, and what stays the host's and why."""

    host: str
    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.host}: {len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  replaced  {name}" for name in self.replaced]
        lines += [f"  left      {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


class Patch:
    """Functions of a host that were replaced. As a context manager it puts them back at the end.

    Attributes:
        report: what was replaced, what was left and why.
    """

    def __init__(self, host: str) -> None:
        self.report = Report(host)
        self._originals: list[tuple[Any, str, Any]] = []
        self._missing: list[str] = []

    def replace(self, path: str, make: Callable[[Any], Any]) -> None:
        """Replace `package.module:Class.function` by `make(it)`; a path that does not exist is noted, not an error."""
        module, _, attribute = path.partition(":")
        *owners, name = attribute.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for part in owners:
                owner = getattr(owner, part)
            original = getattr(owner, name)
        except Exception as error:  # a module of the host may fail in any way while it is imported
            self._missing.append(path)
            self.report.left[path] = f"this version has no such hook ({type(error).__name__}: {error})"
            return
        # What the class itself holds: an inherited function comes back by deleting ours.
        self._originals.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, make(original))
        self.report.replaced.append(path)

    def leave(self, what: str, why: str) -> None:
        """Say what stays the host's."""
        self.report.left[what] = why

    def restore(self) -> None:
        """Put the host's own functions back; harmless when they are."""
        while self._originals:
            owner, name, original = self._originals.pop()
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        for host, active in list(_active.items()):
            if active is self:
                del _active[host]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __str__(self) -> str:
        return str(self.report)


_active: dict[str, Patch] = {}


def apply(host: str, build: Callable[[Patch], None]) -> Patch:
    """The patch of a host, built if it is not on. A second one has nothing of its own to put back."""
    if host in _active:
        again = Patch(host)
        again.report = _active[host].report
        return again
    patch = Patch(host)
    try:
        build(patch)
    except BaseException:
        patch.restore()
        raise
    if patch._missing:
        warnings.warn(
            f"{host}: this version has no {', '.join(patch._missing)}; that part stays the host's, the rest is patched",
            stacklevel=3,
        )
    _active[host] = patch
    return patch


def remove(host: str) -> None:
    """Put a host's functions back, if they were replaced."""
    if host in _active:
        _active[host].restore()


def require(module: str, how: str) -> ModuleType:
    """Import a host, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): {how}") from error
