"""The ViT that EASE, MOS, TUNA and ACMap share: all AdaptFormer adapters of a batch in one forward, and a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.change import fingerprint
from plora_ext.cil.features import FeatureCache
from plora_ext.integrations._layers import constant
from plora_ext.integrations._patch import Original
from plora_ext.ops.autocast import autocast_dtype

IMAGES = 512
"""Images times adapters in one forward at most: more take more memory and no less time."""


def embed(vit: Any, images: Tensor) -> Tensor:
    """What the first block sees of images [B, 3, H, W]: tokens [B, N, D], the class token first."""
    x = vit.patch_embed(images)
    x = torch.cat((vit.cls_token.expand(len(x), -1, -1), x), dim=1) + vit.pos_embed
    return vit.pos_drop(x)


def adapter_features(vit: Any, images: Tensor, adapters: Sequence[Any], class_token_only: bool = True) -> list[Tensor]:
    """Features of a batch in the subspace of every adapter: the T forward passes of EASE as one.

    Args:
        vit: the `VisionTransformer` of PILOT's `vit_ease` or `vit_mos`, of TUNA's `vit_tuna` or ACMap's `vit_acmap`, in
            evaluation mode.
        images: [B, 3, H, W].
        adapters: T adapters, each a list of one AdaptFormer adapter for every block, or None for the frozen backbone.
        class_token_only: compute nothing in the last block but the class token.

    Returns:
        T tensors [B, 1, D], or [B, N, D] with all tokens.
    """
    x = embed(vit, images)
    # The frozen backbone first: an operator call then sees it as rows of id -1.
    order = sorted(range(len(adapters)), key=lambda i: adapters[i] is not None)
    step = max(1, IMAGES // max(1, len(x)))
    result: list[Any] = [None] * len(adapters)
    for start in range(0, len(order), step):
        part = order[start : start + step]
        features = _run_blocks(vit, x, [adapters[i] for i in part], class_token_only)
        for i, of_one in zip(part, features):
            result[i] = of_one
    return result


def _run_blocks(vit: Any, x: Tensor, adapters: list[Any], class_token_only: bool) -> Sequence[Tensor]:
    real = [adapter for adapter in adapters if adapter is not None]
    frozen = len(adapters) - len(real)
    ids = torch.arange(-frozen, len(real), device=x.device).clamp_(min=-1).repeat_interleave(len(x))
    for number, block in enumerate(vit.blocks):
        last = class_token_only and number == len(vit.blocks) - 1
        x = (x[:, :1] if last else x) + _attention(block.attn, block.norm1(x), last)
        base = x + block.fc2(block.act(block.fc1(block.norm2(x))))
        if not real:
            x = base if number else base.repeat(frozen, 1, 1)
        elif number == 0:  # the same x for all of them
            x = _adapt(ops.lora_all, x, base, [adapter[number] for adapter in real]).flatten(0, 1)
            x = torch.cat([base.repeat(frozen, 1, 1), x]) if frozen else x
        else:
            x = _adapt(ops.lora_indexed, x, base, [adapter[number] for adapter in real], ids)
    return vit.norm(x).view(len(adapters), -1, *x.shape[1:]).unbind(0)


def _adapt(op: Callable[..., Tensor], x: Tensor, base: Tensor, adapters: list[Any], *ids: Tensor) -> Tensor:
    """base + s (W_up relu(W_down x + b_down) + b_up) of every adapter."""
    down, up = [a.down_proj for a in adapters], [a.up_proj for a in adapters]
    weights = [torch.stack([layer.weight for layer in side]) for side in (down, up)]
    biases = [torch.stack([layer.bias for layer in side]) for side in (down, up)]
    scaling = constant(tuple(float(a.scale) for a in adapters), torch.float32, x.device)
    low_rank = {"bias_A": biases[0], "bias_B": biases[1], "activation": "relu"}
    if torch.is_autocast_enabled(x.device.type):  # the residual stream keeps its own, wider dtype
        return base + op(x, *ids, *weights, scaling, **low_rank)
    return op(x, *ids, *weights, scaling, base=base, **low_rank)


def _attention(attention: Any, x: Tensor, class_token_only: bool = False) -> Tensor:
    """PILOT's attention without the matrix of weights in memory."""
    B, C, heads = len(x), x.shape[-1], attention.num_heads
    q = attention.q_proj(x[:, :1] if class_token_only else x)
    q, k, v = (t.view(B, -1, heads, C // heads).transpose(1, 2) for t in (q, attention.k_proj(x), attention.v_proj(x)))
    y = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    return attention.proj_drop(attention.proj(y.transpose(1, 2).reshape(B, -1, C)))


def attention(original: Original, self: Any, x: Tensor) -> Tensor:
    if self.training and self.attn_drop.p > 0:
        return original(self, x)
    return _attention(self, x)


def training_features(vit: Any, images: Tensor) -> Tensor:
    """Class tokens [B, D] of EASE's training pass: in the last block nothing else is computed.

    It drops the activations that PILOT drops.
    """
    x = embed(vit, images)
    *blocks, last = vit.blocks
    for block, adapter in zip(blocks, vit.cur_adapter):
        x = block(x, adapter)
    tokens, adapter = x.shape[1], vit.cur_adapter[len(blocks)]
    x = x[:, :1] + _attention(last.attn, last.norm1(x), class_token_only=True)
    h = F.relu(adapter.down_proj(x))
    if adapter.training:  # the same random numbers as for all tokens
        h = h * F.dropout(h.new_ones(len(h), tokens, h.shape[-1]), adapter.dropout)[:, :1]
    y: Tensor = x + last.fc2(last.act(last.fc1(last.norm2(x)))) + adapter.scale * adapter.up_proj(h)
    return vit.norm(y)[:, 0]


def trains_plainly(vit: Any) -> bool:
    """Whether this is EASE's own arrangement, of whose last block only the adapter drops anything in training."""
    last = vit.blocks[-1]
    drops = (last.attn.attn_drop.p, last.attn.proj_drop.p, last.mlp_drop.p)
    return _is_eases(vit) and not (vit.training and (any(drops) or not isinstance(last.drop_path, nn.Identity)))


def is_served(vit: Any) -> bool:
    """Whether this is EASE's own arrangement, at rest: parallel adapters without a layer norm, evaluation mode."""
    return not vit.training and _is_eases(vit)


def _is_eases(vit: Any) -> bool:
    config = vit.config
    return (
        not vit.global_pool
        and not config.vpt_on
        and config.ffn_adapt
        and config.ffn_option == "parallel"
        and config.ffn_adapter_layernorm_option == "none"
        and config.ffn_adapter_scalar != "learnable_scalar"
    )


kept: WeakKeyDictionary[Any, FeatureCache] = WeakKeyDictionary()
"""What was computed at earlier evaluations of a learner."""


def features_of(learner: Any, loader: Any, cache: bool, subspaces: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [B, T * D] and labels of every batch, computing only what no earlier evaluation did."""
    vit, device = learner._network.backbone, learner._device
    names = [str(i) for i in range(len(subspaces))]
    spaces = dict(zip(names, _fingerprints(vit, subspaces, device))) if cache else {}

    def compute(images: Tensor, names: Sequence[str]) -> Tensor:
        parts = adapter_features(vit, images, [subspaces[int(name)] for name in names])
        return torch.cat(parts, 1).float()

    for _, images, labels in loader:
        images = images.to(device)
        if cache:
            features = kept.setdefault(learner, FeatureCache(device=device))(images, spaces, compute)
        else:
            features = compute(images, names)
        yield features.flatten(1), labels


def _fingerprints(vit: Any, subspaces: Sequence[Any], device: torch.device) -> list[str]:
    """What the features of each subspace follow from: the backbone's tensors, the adapter's, scales, and autocast."""
    named, autocast = [*vit.named_parameters(), *vit.named_buffers()], str(autocast_dtype(device.type))
    backbone = fingerprint(autocast, *(tensor for name, tensor in named if "adapter" not in name))
    return [
        fingerprint(
            backbone,
            *(() if adapters is None else (*adapters.parameters(), *(str(float(a.scale)) for a in adapters))),
        )
        for adapters in subspaces
    ]


def best_classes(learner: Any, outputs: Iterable[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """What PILOT's `_eval_cnn` returns, the best classes [N, topk] and the labels [N], of every batch's logits."""
    with torch.no_grad():
        found = [(torch.topk(logits, k=learner.topk, dim=1)[1], labels) for logits, labels in outputs]
    best, labels = (torch.cat(part).cpu().numpy() for part in zip(*found))
    return best, labels


@torch.no_grad()
def class_means(
    vit: Any, loader: Any, labels: np.ndarray, adapters: Sequence[Any], device: torch.device
) -> tuple[Tensor, Sequence[Tensor]]:
    """The classes [n] among the labels, and their mean features [n, D] under every adapter, in one pass over a loader.

    Args:
        vit, adapters: as in `adapter_features`.
        loader: gives (index, images, labels).
        labels: all labels of its data set.
    """
    C = int(np.max(labels)) + 1
    sums, counts = None, torch.zeros(C, dtype=torch.int64, device=device)
    for _, images, classes in loader:
        features = torch.cat(adapter_features(vit, images.to(device), adapters), 2)[:, 0].float()
        sums = features.new_zeros(C, features.shape[1]) if sums is None else sums
        ops.class_sums(features, classes.to(device), C, sums=sums, counts=counts)
    present = torch.as_tensor(np.unique(labels), device=device)
    assert sums is not None
    return present, (sums[present] / counts[present, None]).chunk(len(adapters), 1)


def draw_as_if_read(loader: Any) -> None:
    """The random numbers that one more pass over a loader takes, so that later ones stay those of the unpatched run."""
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    next(iter(loader.sampler), None)
