"""The structure of the package: who imports whom, what is private, how far an input walks to its kernel."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plora_ext
from plora_ext import libraries

ROOT = Path(plora_ext.__file__).parent

# Rooms from the ground up: none imports from a floor above its own.
FLOORS = (
    ("variables", "torch_private", "_C"),
    ("change", "graphs", "libraries", "memory", "reference"),
    ("info", "ops"),
    ("nn",),
    ("io", "data", "bench"),
    ("cil",),
    ("report", "integrations"),
    ("arguments",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Arrows that are still to go, (importing file, imported module).
ALLOWED_BACK: set[tuple[str, str]] = set()
ALLOWED_PRIVATE: set[tuple[str, str]] = set()


def imports() -> Iterator[tuple[str, str]]:
    """(file, imported module of this package), of every import, also those inside of functions and for types alone."""
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = [".".join(("plora_ext", *path.relative_to(ROOT).parts[: -node.level]))] if node.level else []
                module = ".".join([*above, *filter(None, [node.module])])
                found = [f"{module}.{alias.name}" if is_module(module, alias.name) else module for alias in node.names]
            else:
                continue
            yield from ((name, module) for module in found if module.partition(".")[0] == "plora_ext")


def is_module(package: str, name: str) -> bool:
    if package.partition(".")[0] != "plora_ext":
        return False
    path = ROOT.joinpath(*package.split(".")[1:], name)
    return path.is_dir() or path.with_suffix(".py").is_file() or any(path.parent.glob(f"{name}.*.so"))


def room(module: str) -> str:
    """ "cil" of "plora_ext.cil.loop" and of "cil/loop.py"; "" of the package itself."""
    parts = module.removeprefix("plora_ext").strip(".").removesuffix(".py").replace("/", ".").split(".")
    return "" if parts[0] == "__init__" else parts[0]


def test_no_arrow_points_back() -> None:
    graph: dict[str, set[str]] = {}
    back = set()
    for file, module in imports():
        here, there = room(file), room(module)
        if here != there and here:  # the package itself names its rooms
            graph.setdefault(here, set()).add(there or "plora_ext")
            if there and FLOOR[there] >= FLOOR[here] and (file, module) not in ALLOWED_BACK:
                back.add(f"{file} imports {module}")
    print("\n".join(f"{here:14} -> {', '.join(sorted(graph[here]))}" for here in sorted(graph, key=FLOOR.__getitem__)))
    assert not back, back
    assert {"ops"} <= graph["nn"] and {"nn", "data"} <= graph["cil"]  # it looked


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Packages' own files, which name what is in them, left out."""
    graph: dict[str, set[str]] = {}
    for file, module in imports():
        graph.setdefault("plora_ext." + file.removesuffix(".py").replace("/", "."), set()).add(module)
    circles = []

    def follow(path: tuple[str, ...]) -> None:
        for module in sorted(graph.get(path[-1], ())):
            if module in path:
                circles.append(path[path.index(module) :])
            elif module not in done:
                follow((*path, module))
        done.add(path[-1])

    done: set[str] = set()
    for module in sorted(graph):
        if module not in done:
            follow((module,))
    assert not circles, circles
    assert "plora_ext.nn.linear" in graph["plora_ext.nn.adapters"]  # it looked


def test_private_modules_stay_in_their_package() -> None:
    found = set()
    for file, module in imports():
        *owners, name = module.split(".")
        if not name.startswith("_") or name == "_C":
            continue
        if Path(file).parent.parts != tuple(owners[1:]):
            found.add((file, module))
    assert found <= ALLOWED_PRIVATE, found - ALLOWED_PRIVATE
    assert found >= ALLOWED_PRIVATE, f"mended: {ALLOWED_PRIVATE - found}"


def test_private_names_of_torch_are_in_one_file() -> None:
    """Their absence means a slower way, never an import that fails."""
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.attr.startswith("_"):
                if ast.unparse(node.value) in ("torch._C", "torch.autograd", "torch.nn.modules"):
                    found.add((path.name, ast.unparse(node)))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch._C"):
                found.add((path.name, node.module))
    assert {name for name, _ in found} <= {"torch_private.py"}, found


def walk(call: Any, x: Tensor) -> list[tuple[str, str]]:
    """The functions of the package that `x`, or a view of it, is handed to while `call(x)` runs: (room, name)."""
    found: list[tuple[str, str]] = []
    storage = x.untyped_storage().data_ptr()

    def look(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(ROOT)):
            return
        named = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        values: list[Any] = []
        for name in code.co_varnames[:named]:
            value = frame.f_locals.get(name)
            values += value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else [value]
        if any(isinstance(v, Tensor) and v.untyped_storage().data_ptr() == storage for v in values):
            found.append((Path(code.co_filename).relative_to(ROOT).as_posix(), code.co_name))

    sys.setprofile(look)
    try:
        call(x)
    finally:
        sys.setprofile(None)
    return list(dict.fromkeys(found))


@pytest.mark.skipif(libraries.backend() != "native", reason="to a compiled kernel")
@pytest.mark.parametrize("several", [False, True], ids=["one adapter", "several"])
def test_an_input_walks_through_few_functions_to_the_kernel(several: bool) -> None:
    adapters = plora_ext.inject(nn.Sequential(nn.Linear(16, 16)), ["0"], r=4)
    for name in "abc":
        adapters.add_adapter(name)
    adapters.set_adapter(["a", "b", "c"] if several else "c")
    x = torch.randn(5, 3, 16)
    layer = adapters.layers["0"]
    steps = walk(layer, x)
    rooms = {file for file, _ in steps}
    print(f"{len(steps)} functions in {len(rooms)} rooms: {' -> '.join(f'{file}:{name}' for file, name in steps)}")
    assert steps[0] == ("nn/linear.py", "forward") and ("ops/autograd.py", "forward") in steps
    assert len(steps) <= 12 and len(rooms) <= 3


NAMES = ("Adapters", "Ensemble", "MultiLoRALinear", "inject", "load_adapter", "save_adapter")


def test_the_top_level() -> None:
    for name in NAMES:
        assert getattr(plora_ext, name).__name__ == name and name in dir(plora_ext)
    assert plora_ext.inject is plora_ext.nn.inject and plora_ext.save_adapter is plora_ext.io.save_adapter
    with pytest.raises(AttributeError, match="'plora_ext' has no attribute 'injekt'"):
        _ = plora_ext.injekt
    names = [*NAMES, *(["Learner"] if importlib.util.find_spec("plora_ext.cil.learner") else [])]
    script = (
        "import sys, time, torch\nstart = time.perf_counter()\n"
        f"from plora_ext import {', '.join(names)}\n"
        "print(time.perf_counter() - start, *({'timm', 'torchvision', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    times = []
    for _ in range(5):  # the quickest counts: another process may have had the cores
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        seconds, *late = done.stdout.split()
        assert not late, f"imported {late}"
        times.append(float(seconds))
        if times[-1] < 0.3:
            break
    assert min(times) < 0.3, times


def test_code_written_before_finds_what_has_moved() -> None:
    from plora_ext.cil import PLoRA, loop
    from plora_ext.integrations._plora import PLoRANet

    sys.modules.pop("plora_ext.cil.engine", None)
    with pytest.warns(DeprecationWarning, match=r"is now plora_ext\.cil\.loop"):
        from plora_ext.cil import engine
    assert engine.run is loop.run and PLoRANet is PLoRA
    assert all(hasattr(engine, name) for name in engine.__all__)
