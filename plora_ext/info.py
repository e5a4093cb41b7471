"""``plora-ext info`` and ``python -m plora_ext.info``: what runs here, and why whatever is missing is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

import plora_ext
from plora_ext import libraries, variables

Facts = Iterator[tuple[str, str]]


def report() -> str:
    """The versions, libraries, CPU and GPUs of this installation, one fact a line: paste it into a bug report."""
    return "\n".join(f"{name:<15} {text}" for name, text in (*_installed(), *_cpu(), *_gpu(), *_variables()))


def _installed() -> Facts:
    yield "plora_ext", plora_ext.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", torch.__version__
    yield "torch's CUDA", torch.version.cuda or "none"
    for name in ("timm", "numpy", "safetensors", "peft"):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"
    yield "backend", libraries.backend()
    for name in ("cpu", "cuda"):
        yield f"{name} library", libraries.loaded.get(name) or f"not loaded: {libraries.missing[name]}"
    info = libraries.build_info()
    yield "built", info["decision"] if info else "no compiled module for this Python"
    if info:
        yield "compiler", f"{info['compiler']}, {info['build_type']}: {info['cxx_flags']}"


def _cpu() -> Facts:
    try:
        import plora_ext._C as _C
    except ImportError:
        return
    isa, wish = _C.cpu_isa(), os.environ.get("PLORA_CPU_ISA")
    missing = f" (PLORA_CPU_ISA={wish} is more than this CPU or build has)" if wish and wish != isa else ""
    yield "cpu features", " ".join(name for name, present in _C.cpu_features().items() if present) or "baseline"
    yield "cpu kernels", f"{isa}{missing}, {torch.get_num_threads()} threads"
    yield "frozen layers", f"in float32 on the CPU: {_base_maker(_C.cpu_makes_base)}"


def _base_maker(own: Callable[[int, int, int], bool]) -> str:
    """Who makes the frozen layer's product, for the width of ViT-B."""
    if wish := os.environ.get("PLORA_CPU_BASE"):
        return f"PLORA_CPU_BASE={wish}"
    rows = next((M for M in range(1, 4096) if own(M, 768, 768)), None)
    return f"plora_ext's product from {rows} rows on (768 x 768), else torch's" if rows else "torch's product"


def _gpu() -> Facts:
    info = libraries.build_info()
    yield "gpu kernels", (" ".join(info["cuda_archs"]) or "none") if info else "unknown"
    if info and info["cuda_archs"]:
        hopper = "sm_90a" in info["cuda_archs"]
        yield "hopper kernels", "yes" if hopper else "no: not built for 9.0a (TORCH_CUDA_ARCH_LIST)"
    if not torch.cuda.is_available():
        yield "gpus", "none seen by torch"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        size = f"{device.total_memory / 2**30:.0f} GiB"
        yield f"gpu {index}", f"{device.name}, compute capability {device.major}.{device.minor}, {size}"


def _variables() -> Facts:
    """The environment variables that change how this process computes, as far as they are set."""
    yield from variables.in_force.items()
    yield from ((name, os.environ[name]) for name in variables.WAITING if name in os.environ)


def environment(device: torch.device) -> dict[str, str]:
    """What a run on `device` ran with: versions, the device's name, the kernels."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    return {
        "plora_ext": plora_ext.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": name,
        "kernels": libraries.backend(),
    }


def _cpu_name() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# rows x in x out: the layers of ViT-B/16 on 64 images of 224 pixels
VIT_B = ("12608x768x2304", "12608x768x768", "12608x768x3072", "12608x3072x768")


def plans(
    shapes: Sequence[str],
    family: str = "indexed",
    adapters: int = 10,
    rank: int = 16,
    dtype: str = "bfloat16",
    rows_per_id: int = 197,
    capability: str | None = None,
) -> str:
    """How CUDA computes adapted layers of these shapes ("rows x in x out", default ViT-B's): a table, one line a pass.

    Args:
        shapes: such as "12608x768x768".
        family: "indexed", "sum" or "all".
        adapters: T.
        rank: r.
        dtype: "bfloat16", "float16" or "float32".
        rows_per_id: rows of a sample, which share their adapter.
        capability: compute capability of the GPU, such as "9.0"; default: this one's, or 9.0 where there is none.

    Raises:
        ValueError: a shape, family, dtype, capability or number is none. ImportError: nothing is compiled.
    """
    import plora_ext._C as _C

    present = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    if capability is None:
        capability = f"{present.major}.{present.minor}" if present else "9.0"
    if not (digits := re.fullmatch(r"(\d+)\.(\d)", capability)):
        raise ValueError(f"a compute capability is such as 9.0, got {capability!r}")
    for name, value in (("adapters", adapters), ("rank", rank), ("rows_per_id", rows_per_id)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    lines = [("rows x in x out", "pass", "path", "algorithm", "tile", "waves", "because")]
    for text in shapes or VIT_B:
        if not (sizes := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)):
            raise ValueError(f"a shape is rows x in x out, such as {VIT_B[1]}, got {text!r}")
        M, n_in, out = map(int, sizes.groups())
        for name in ("inference", "forward", "backward"):
            plan = _C.lora_plan(
                family, M, n_in, out, adapters, rank, dtype, rows_per_id=rows_per_id,
                capability=10 * int(digits[1]) + int(digits[2]),
                num_sms=present.multi_processor_count if present else 132,
                path=os.environ.get("PLORA_CUDA_PATH") or "auto",
                keep=name == "forward", backward=name == "backward",
            )  # fmt: skip
            tile = "x".join(map(str, plan["tile"] or ())) or "-"
            lines.append((text, name, plan["path"], plan["algorithm"], tile, str(plan["waves"] or "-"), plan["reason"]))
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    head = f"{family}, {adapters} adapters of rank {rank}, {dtype}, compute capability {capability}"
    rows = ("".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join((head, *rows))


def main() -> None:
    """Prints the report."""
    print(report())


if __name__ == "__main__":
    main()
