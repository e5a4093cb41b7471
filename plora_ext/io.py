"""Adapters to and from the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from plora_ext.nn.adapters import Adapters
from plora_ext.nn.linear import MultiLoRALinear

__all__ = ["load_adapter", "save_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # where PEFT keeps the model
_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")

# Fields of PEFT's configuration that are read, or that leave the function what lora_A, lora_B and alpha make of it.
_READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type", "velora_config",
)  # fmt: skip
# Those with a value under which lora_A, lora_B and alpha are the whole adapter. Any other field must be null, false
# or empty: what a later PEFT may add is not known.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others change the base weights too
}


def save_adapter(adapters: Adapters, folder: str | os.PathLike[str], name: str) -> None:
    """Write one adapter as PEFT does, for `peft.PeftModel.from_pretrained(model, folder)` and `load_adapter`.

    Row slices (q and v of a qkv) become the one block-wise adapter of rank `len(slices) * r` that equals them.
    An adapter already in the folder is replaced; if the writing is cut short, the folder holds no configuration
    rather than one that does not belong to the weights.

    Args:
        adapters: handle on the model.
        folder: folder to write to, made if missing.
        name: which adapter. (The files do not carry the name.)

    Raises:
        KeyError: the name is unknown.
        OSError: the folder cannot be written.

    Warns:
        UserWarning: a layer is in several places of the model, of which PEFT adapts the first alone.
    """
    adapters.parameters(name)  # raises for an unknown name
    _warn_of_shared(adapters)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for key, layer in _layers(adapters).items():
        lora_A, lora_B = layer.factors(name)
        tensors[f"{PREFIX}{key}.lora_A.weight"] = lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{key}.lora_B.weight"] = lora_B.detach().cpu().contiguous()
        # alpha / r stays the same where slices multiply r.
        ranks[key] = lora_A.shape[0]
        alphas[key] = layer.lora_alpha[name] * (len(layer.slices) if layer.slices else 1)
    first = next(iter(adapters.layers.values()))
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "target_modules": _exact_targets(adapters),
        "rank_pattern": {_only(key): rank for key, rank in ranks.items() if rank != r},
        "alpha_pattern": {_only(key): value for key, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    _write_pair(Path(folder), json.dumps(config, indent=2).encode() + b"\n", save(tensors, metadata={"format": "pt"}))


def load_adapter(adapters: Adapters, folder: str | os.PathLike[str], name: str) -> None:
    """Read an adapter that `save_adapter` or PEFT wrote, bit for bit, as a new adapter, frozen and not active.

    The file must cover exactly the layers that were injected. Where those have row slices, the file must hold a
    block-wise adapter of them. The adapter keeps its own rank and alpha, whatever those of `inject` are; factors take
    the dtype that new adapters have. Where several expressions of a pattern match a layer, the first one counts, as it
    does to PEFT.

    Args:
        adapters: handle on the model; nothing changes in it if anything is wrong.
        folder: folder with the two files.
        name: name for the new adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the name is taken, the configuration is not that of a plain LoRA, or a key or a shape is wrong.

    Warns:
        UserWarning: as `save_adapter`.
    """
    adapters.check_new(name)
    config_path, weights_path = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: folder must hold {CONFIG} and {WEIGHTS}")
    config = _read_config(config_path)
    layers = _layers(adapters)
    factors = _read_factors(weights_path, layers)
    ready = {}
    for key, layer in layers.items():
        lora_A, lora_B = factors[key]
        r = _of_pattern(config, "rank_pattern", key, config["r"])
        alpha = _of_pattern(config, "alpha_pattern", key, config["lora_alpha"])
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"{config_path}: lora_alpha must be a number, got {alpha!r} for {key}")
        if config.get("use_rslora"):
            alpha *= math.sqrt(r)  # its scale is alpha / sqrt(r)
        expected = (r, layer.in_features), (layer.out_features, r)
        for which, tensor, shape in zip("AB", (lora_A, lora_B), expected, strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{weights_path}: {key}.lora_{which}.weight must be {list(shape)}, got {list(tensor.shape)}"
                )
        ready[key] = _into_slices(layer, key, lora_A, lora_B, alpha, weights_path)
    adapters._add(name, ready.values())
    _warn_of_shared(adapters)


def _layers(adapters: Adapters) -> dict[str, MultiLoRALinear]:
    """The layers by the names that they have in the model that is not compiled."""
    return {_plain(key): layer for key, layer in adapters.layers.items()}


def _warn_of_shared(adapters: Adapters) -> None:
    """Of a module in several places, PEFT wraps the first place alone; `inject` all of them."""
    children = [child for module in adapters.model.modules() for child in module._modules.values()]
    number = Counter(id(child) for child in children)
    shared = [key for key, layer in _layers(adapters).items() if number[id(layer)] > 1]
    if shared:
        warnings.warn(
            f"the layers {shared} are in several places of the model: PEFT adapts the first place alone, so that its "
            "model computes something else with the same file",
            stacklevel=3,
        )


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")  # torch.compile's


# ---------------------------------------------------------------------- writing


def _exact_targets(adapters: Adapters) -> list[str] | str:
    """`target_modules` that PEFT matches to the adapted layers and nothing else."""
    ours = list(_layers(adapters))
    others = {_plain(name) for name, _ in adapters.model.named_modules()} - {
        *ours,
        *(f"{key}.base_layer" for key in ours),
    }
    if any(name.endswith("." + key) for name in others for key in ours):
        return "|".join(re.escape(key) for key in ours)  # a suffix would match more: the full names, as an expression
    return ours


def _only(key: str) -> str:
    r"""An expression in a pattern that is this layer to every PEFT, and no other.

    PEFT matches `.*\.KEY$` up to 0.14 and `(.*\.)?(KEY)$` since; `^` alone would match nothing to the former.
    """
    return rf"(?!)|^{re.escape(key)}"


def _write_pair(folder: Path, config: bytes, weights: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    new = {folder / WEIGHTS: weights, folder / CONFIG: config}
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in new}
    try:
        for path, data in new.items():
            temporary[path].write_bytes(data)
        # Without a configuration there is no adapter, so the pair changes with the configuration alone.
        (folder / CONFIG).unlink(missing_ok=True)
        for path in new:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- reading


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    missing = [key for key in ("peft_type", "r", "lora_alpha") if not isinstance(config, dict) or key not in config]
    if missing:
        raise ValueError(f"{path} lacks {missing}: it is not the configuration of a LoRA adapter")
    odd = {
        key: value
        for key, value in config.items()
        if key not in _READ and key not in _HARMLESS and value and value not in _PLAIN.get(key, ())
    }
    if odd:
        raise ValueError(
            f"{path} asks for more than plain LoRA on linear layers: {odd} is not supported; delete from the file what "
            "changes nothing"
        )
    for pattern in ("rank_pattern", "alpha_pattern"):
        given = config.get(pattern) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{path}: {pattern} must be an object of expressions and numbers, got {given!r}")
        for expression in given:
            try:
                re.compile(_as_peft_reads(expression))
            except re.error as error:
                raise ValueError(f"{path}: {pattern} has {expression!r}, no regular expression: {error}") from None
    return config


def _read_factors(path: Path, layers: dict[str, MultiLoRALinear]) -> dict[str, tuple[Tensor, Tensor]]:
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    found: dict[tuple[str, str], Tensor] = {}
    unexpected = []
    prefix = PREFIX if all(key.startswith(PREFIX) for key in tensors) else ""
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(prefix))
        if match is None or match["layer"] not in layers:
            unexpected.append(f"{key} {list(tensor.shape)}")
        else:
            found[match["layer"], match["factor"]] = tensor
    missing = [f"{key}.lora_{f}.weight" for key in layers for f in "AB" if (key, f) not in found]
    if unexpected or missing:
        raise ValueError(
            f"{path} does not fit the {len(layers)} adapted linear layers: "
            f"it has {_some(unexpected)} that no adapted layer takes and lacks {_some(missing)}; "
            "inject the model with the target_modules of the saved adapter"
        )
    return {key: (found[key, "A"], found[key, "B"]) for key in layers}


def _some(keys: list[str]) -> str:
    return f"{len(keys)} keys ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "0 keys"


def _of_pattern(config: dict[str, Any], pattern: str, key: str, default: Any) -> Any:
    """PEFT's rule (since 0.15): the first expression that matches the end of the module's name, or else its name."""
    given = config.get(pattern) or {}
    return next((v for e, v in given.items() if re.match(_as_peft_reads(e), key)), given.get(key, default))


def _as_peft_reads(expression: str) -> str:
    return rf"(.*\.)?({expression})$"


def _into_slices(
    layer: MultiLoRALinear, key: str, lora_A: Tensor, lora_B: Tensor, alpha: float, path: Path
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """The inverse of `MultiLoRALinear.factors`: A and B of each slice."""
    if layer.slices is None:
        return [(lora_A, lora_B)], alpha
    number, r = len(layer.slices), lora_B.shape[1] // len(layer.slices)
    blocks, rest = [], lora_B.clone()
    for i, (start, stop) in enumerate(layer.slices.values()):
        blocks.append(lora_B[start:stop, i * r : (i + 1) * r])
        rest[start:stop, i * r : (i + 1) * r] = 0
    if r * number != lora_B.shape[1] or rest.any():
        raise ValueError(
            f"{path}: {key}.lora_B.weight must be block-wise, a block for each slice {list(layer.slices)}; it is one "
            "adapter of the whole layer: inject the model with 'qkv' instead of its slices"
        )
    alpha = alpha / number
    alpha = int(alpha) if alpha == int(alpha) else alpha
    return list(zip(lora_A.split(r), blocks, strict=True)), alpha
