"""``plora-ext info`` and ``python -m plora_ext.info``: what runs here, and why whatever is missing is missing."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import plora_ext
from plora_ext import _library


def report() -> str:
    """The versions, libraries, CPU and GPUs of this installation, one fact a line: paste it into a bug report."""
    sections = [_versions(), _libraries(), _cpu(), _gpu()]
    return "\n".join(f"{name:<16}{text}" for section in sections for name, text in section)


def _versions() -> list[tuple[str, str]]:
    lines = [
        ("plora_ext", plora_ext.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("torch's CUDA", torch.version.cuda or "none"),
    ]
    for name in ("timm", "numpy", "safetensors", "peft"):
        try:
            lines.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((name, "not installed"))
    return lines


def _libraries() -> list[tuple[str, str]]:
    lines = [("backend", _library.backend())]
    for name in ("cpu", "cuda"):
        text = _library.loaded.get(name) or f"not loaded: {_library.missing[name]}"
        lines.append((f"{name} library", text))
    info = _library.build_info()
    if info is None:
        return [*lines, ("built", "no compiled module for this Python")]
    lines += [
        ("built", info["decision"]),
        ("compiler", f"{info['compiler']}, {info['build_type']}: {info['cxx_flags']}"),
    ]
    return lines


def _cpu() -> list[tuple[str, str]]:
    try:
        import plora_ext._C as _C
    except ImportError:
        return []
    features = [name for name, present in _C.cpu_features().items() if present]
    threads = f"{torch.get_num_threads()} threads"
    return [("cpu features", " ".join(features) or "baseline"), ("cpu kernels", f"{_C.cpu_isa()}, {threads}")]


def _gpu() -> list[tuple[str, str]]:
    info = _library.build_info()
    lines = [("gpu kernels", " ".join(info["cuda_archs"]) or "none" if info else "unknown")]
    if not torch.cuda.is_available():
        return [*lines, ("gpus", "none seen by torch")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        size = f"{device.total_memory / 2**30:.0f} GiB"
        lines.append((f"gpu {index}", f"{device.name}, compute capability {device.major}.{device.minor}, {size}"))
    return lines


def main() -> None:
    """Prints the report."""
    print(report())


if __name__ == "__main__":
    main()
