"""Replacing functions of another package, saying which, and putting them back."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

Original = Callable[..., Any]  # a function of a host


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
        self._host = host
        self._ours: list[tuple[Any, str, Any]] = []
        self._missing: list[str] = []
        self._undo = ExitStack()

    def replace(self, path: str, make: Callable[[Any], Any]) -> None:
        """Replace `package.module:Class.function` by `make(it)`; a path that does not exist is noted, not an error.

        Raises:
            TypeError: the host's function has other parameters than the one in its place.
        """
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
        ours = make(original)
        if callable(ours) and (found := _parameters(original)) != (expected := _parameters(ours)):
            raise TypeError(
                f"{path} takes ({found}) here, and what would replace it was written for ({expected}): use a version "
                f"that this package is tested with ({self.report.host}), or the host without the patch"
            )
        if name in vars(owner):
            self._undo.callback(setattr, owner, name, vars(owner)[name])
        else:  # an inherited function comes back by deleting ours
            self._undo.callback(delattr, owner, name)
        self._ours.append((owner, name, ours))
        setattr(owner, name, ours)
        self.report.replaced.append(path)

    def afterwards(self, undo: Callable[[], object]) -> None:
        """Call this when the host's own functions come back."""
        self._undo.callback(undo)

    def leave(self, what: str, why: str) -> None:
        """Say what stays the host's."""
        self.report.left[what] = why

    def restore(self) -> None:
        """Put the host's own functions back; harmless when they are.

        Where somebody else has replaced one of ours in the meantime, everything stays, with a warning that names it:
        to put the host's back would take theirs away, and theirs still calls ours.
        """
        for owner, name, ours in self._ours:
            if vars(owner).get(name) is not ours:
                warnings.warn(
                    f"{owner.__name__}.{name} was replaced again after {self.report.host} was patched; undo that "
                    "first, then unpatch. Until then all stays patched",
                    stacklevel=3,
                )
                return
        self._ours.clear()
        self._undo.close()
        if _active.get(self._host) is self:
            del _active[self._host]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __str__(self) -> str:
        return str(self.report)


def instead(function: Callable[..., Any], **fixed: Any) -> Callable[[Any], Any]:
    """For `Patch.replace`: a call f(*args) of the host becomes `function(f, *args, **fixed)`."""
    parameters = list(inspect.signature(function).parameters.values())[1:]

    def make(original: Any) -> Any:
        def ours(*args: Any, **keywords: Any) -> Any:
            return function(original, *args, **keywords, **fixed)

        ours.__signature__ = inspect.Signature([p for p in parameters if p.name not in fixed])  # type: ignore[attr-defined]
        return ours

    return make


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
    if not patch.report.replaced and patch._missing:
        patch.restore()
        reasons = "; ".join(f"{path}: {patch.report.left[path]}" for path in patch._missing)
        raise ImportError(f"this is not {patch.report.host}, nothing of it was found. {reasons}")
    if patch._missing:
        warnings.warn(
            f"{host}: this version has no {', '.join(patch._missing)}; that part stays the host's, the rest is patched",
            stacklevel=3,
        )
    _active[host] = patch
    return patch


def _parameters(function: Callable[..., Any]) -> str:
    """Its parameters' names, `self, x, *args, **kwargs`."""
    star: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(star.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values())


def check_version(host: str, version: str, oldest: str, newest: str, stacklevel: int) -> None:
    """Warn if the host's version, by its first two numbers, is not within those that were tested."""
    low, here, high = (tuple(map(int, re.findall(r"\d+", v)[:2])) for v in (oldest, version, newest))
    if not low <= here <= high:
        warnings.warn(
            f"this package is tested with {host} {oldest} to {newest}, this is {version}: results may differ",
            stacklevel=stacklevel + 1,
        )


def remove(host: str) -> None:
    """Put a host's functions back, if they were replaced."""
    if host in _active:
        _active[host].restore()


def run_patched(patch: Callable[[], Patch], how: str) -> None:
    """The host's own `main.py` in the working directory, patched; `how` says what to do where there is none."""
    sys.path.insert(0, "")
    print(patch())
    require("main", how).main()


def require(module: str, how: str) -> ModuleType:
    """Import a host, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): {how}") from error
