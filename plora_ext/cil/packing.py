"""What a checkpoint holds, as tensors and JSON: nested values, random generators, adapters."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plora_ext.nn import Adapters


def to_device(value: Any, device: torch.device) -> Any:
    """`value`, nested dicts and lists, with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [to_device(v, device) for v in value]
    return value


def is_plain(value: Any) -> bool:
    """Whether `unpack` gives back the value that `pack` was given: tensors, numbers, texts, lists and dicts of such."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(of) for key, of in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return isinstance(value, Tensor | bool | int | float | str | None)


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, with its tensors moved to `tensors`."""
    if isinstance(value, Tensor):
        key = path or "value"
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"dict": {str(k): pack(v, f"{path}/{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def unpack(tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: unpack(v, tensors) for k, v in content.items()}
    if kind == "list":
        return [unpack(v, tensors) for v in content]
    return content


def rng_state() -> dict[str, Any]:
    """The state of every global random generator."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(words, device="cpu"), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Sets every global random generator."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    with suppress(RuntimeError):  # fewer GPUs than before
        torch.cuda.set_rng_state_all(state["cuda"] if torch.cuda.is_available() else [])


def adapters_state(adapters: Adapters) -> dict[str, Any]:
    """An entry for each adapter, in their order: rank, alpha and the factors of every layer."""
    return {
        f"adapter:{name}": {
            "alpha": {key: layer.lora_alpha[name] for key, layer in adapters.layers.items()},
            "factors": {key: [p for pair in layer.pairs(name) for p in pair] for key, layer in adapters.layers.items()},
        }
        for name in adapters.names
    }


def restore_adapters(adapters: Adapters, state: Mapping[str, Any]) -> None:
    """Adds the adapters of `adapters_state`; the last one is active and trains."""
    for entry, value in state.items():
        if entry.startswith("adapter:"):
            name = entry.removeprefix("adapter:")
            for key, layer in adapters.layers.items():
                factors = value["factors"][key]
                layer.add_adapter(name, list(zip(factors[::2], factors[1::2])), value["alpha"][key])
    if adapters.names:
        adapters.set_adapter(adapters.names[-1])
        adapters.train_adapter(adapters.names[-1])
