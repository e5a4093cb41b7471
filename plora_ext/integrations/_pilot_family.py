"""MOS, and codebases with PILOT's skeleton: InfLoRA, SD-LoRA and CL-LoRA's layers, TUNA's and ACMap's adapters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.integrations._layers import ones
from plora_ext.integrations._patch import Original
from plora_ext.integrations._pilot_vit import (
    adapter_features,
    best_classes,
    class_means,
    draw_as_if_read,
    embed,
    features_of,
    is_served,
)


def inflora(
    original: Original,
    self: Any,
    x: Tensor,
    task: int,
    register_hook: bool = False,
    get_feat: bool = False,
    get_cur_feat: bool = False,
) -> Tensor:
    """InfLoRA's attention (liangyanshuo/InfLoRA, `models/vit_inflora.py`).

    It forms T dense products B_t A_t for k and for v in every forward and adds them; here k and v are one `lora_sum`
    each, attention is torch's fused one, and the Gram matrix of the input is one product instead of one per image.
    """
    if register_hook or (self.training and self.attn_drop.p > 0):
        return original(self, x, task, register_hook, get_feat, get_cur_feat)
    for asked, prefix in ((get_feat, ""), (get_cur_feat, "cur_")):
        if asked:
            rows, seen = x.detach().flatten(0, 1), getattr(self, f"n_{prefix}matrix")
            total = getattr(self, f"{prefix}matrix") * seen + (rows.T @ rows).cpu()
            setattr(self, f"{prefix}matrix", total / (seen + len(rows)))
            setattr(self, f"n_{prefix}matrix", seen + len(rows))
    C, heads = x.shape[-1], self.num_heads
    q, k, v = self.qkv(x).split(C, dim=-1)
    if task > -0.5:
        count = int(task) + 1
        k = k + _sum_of(x, self.lora_A_k[:count], self.lora_B_k[:count])
        v = v + _sum_of(x, self.lora_A_v[:count], self.lora_B_v[:count])
    q, k, v = (t.unflatten(-1, (heads, C // heads)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


def _sum_of(x: Tensor, downs: Any, ups: Any) -> Tensor:
    lora_A, lora_B = (torch.stack([layer.weight for layer in layers]) for layers in (downs, ups))
    asks = [i for i, pair in enumerate(zip(downs, ups)) if any(layer.weight.requires_grad for layer in pair)]
    return ops.lora_sum(x, lora_A, lora_B, ones(len(downs), x), trainable=asks)


def sd_lora(original: Original, self: Any, x: Tensor) -> Tensor:
    """SD-LoRA's qkv (WuYichen-97/SD-Lora-CL, `backbone/lora.py:_LoRA_qkv_timm_train`).

    qkv(x) with c_t B_t A_t x + sum_{i < t} c_i B_i A_i x / (|B_i| |A_i|) added to the q and to the v rows. In every
    forward it makes four new layers on the CPU and loops over the tasks; here q and v are one `lora_sum` each, with
    gradients to the newest factors and to all c.
    """
    if x.dim() != 3:
        return original(self, x)
    qkv: Tensor = self.qkv(x)
    d = self.dim
    for slot, (rows, down, up) in enumerate(
        ((slice(0, d), self.linear_a_q, self.linear_b_q), (slice(-d, None), self.linear_a_v, self.linear_b_v))
    ):
        old = [
            (list(self.saved_A[f"saved_A_{i}"])[2 * self.t_layer_i + slot].weight.detach().to(x.device),
             list(self.saved_B[f"saved_B_{i}"])[2 * self.t_layer_i + slot].weight.detach().to(x.device))
            for i in range(self.task_id)
        ]  # fmt: skip
        coeff = [self.scaling_factor_prev[i].param.flatten() / (A.norm() * B.norm()) for i, (A, B) in enumerate(old)]
        y = ops.lora_sum(
            x,
            torch.stack([*(A for A, _ in old), down.weight]),
            torch.stack([*(B for _, B in old), up.weight]),
            ones(len(old) + 1, x),
            coeff=torch.cat([*coeff, self.scaling_factor[0].param.flatten()]),
            trainable=[len(old)],
        )
        qkv[..., rows] += y
    return qkv


def cl_lora(original: Original, self: Any, x: Tensor, use_init_ptm: bool = False) -> list[Tensor]:
    """CL-LoRA's test forward (JiangpengHe/CL-LoRA, `backbone/vit_cllora.py:VisionTransformer.forward_test`).

    The blocks before the first task-specific one are the same for every task; they run once instead of T times.
    """
    if self.training or not self.config.ffn_adapt:
        return original(self, x, use_init_ptm)
    x = embed(self, x)
    features = [self.norm(self.blocks(x))] if use_init_ptm else []
    depth = len(self.blocks)
    shared = next((j for j in range(depth) if j in self.adapt_pos and j not in self.general_pos), depth)
    for j in range(shared):
        x = self.blocks[j](x, self.cur_adapter[self.adapt_pos.index(j)] if j in self.adapt_pos else None)
    for task in range(len(self.adapter_list) + 1):
        y = x
        for j in range(shared, depth):
            y = self.blocks[j](y, *_of_block(self, task, j))
        features.append(self.norm(y))
    return features


def _of_block(vit: Any, task: int, j: int) -> tuple[Any, ...]:
    """Adapter, two unused prompts and block weight of block j for a task, the newest being the last."""
    if j not in vit.adapt_pos:
        return None, None, None, None
    newest = task == len(vit.adapter_list)
    specific = j in vit.specfic_pos
    if newest or j in vit.general_pos:
        adapter = vit.cur_adapter[vit.adapt_pos.index(j)]
    else:
        adapter = vit.adapter_list[task][vit.specfic_pos.index(j)]
    if not (vit.use_block_weight and specific):
        return adapter, None, None, None
    weights = vit.block_weight if newest else vit.block_weight_list[task]
    return adapter, None, None, weights[:, vit.specfic_pos.index(j)]


# ---------------------------------------------------------------------- MOS


def mos_features(original: Original, self: Any, x: Tensor, adapter_id: int, train: bool) -> dict[str, Tensor]:
    momentum, self.config.adapter_momentum = self.config.adapter_momentum, 0.0  # `reweight_adapter` does nothing
    try:
        features: dict[str, Tensor] = original(self, x, adapter_id, train)
    finally:
        self.config.adapter_momentum = momentum
    return features


def mos_eval(original: Original, self: Any, loader: Any, *, as_shipped: bool) -> tuple[np.ndarray, np.ndarray]:
    network = self._network.eval()
    backbone = network.backbone
    if not is_served(backbone) or len(backbone.adapter_list) <= self._cur_task:
        return original(self, loader)
    task_of = torch.tensor([self.cls2task[c] for c in range(self._total_classes)], device=self._device)
    orig_right = []

    def outputs() -> Iterator[tuple[Tensor, Tensor]]:
        for _, images, labels in loader:
            adapters = _mos_adapters(backbone, self._cur_task + 1, as_shipped)
            features = torch.cat(adapter_features(backbone, images.to(self._device), adapters), 1)  # [B, T, D]
            # The first adapter is never moved: its features are also those of `forward_orig`.
            orig_logits = network.fc(features[:, 0])["logits"][:, : self._total_classes]
            logits = backbone(features, fc_only=True)["logits"][..., : self._total_classes]
            orig = orig_logits.max(dim=1)[1]
            next_task, chosen, row = task_of[logits.max(dim=2)[1]], task_of[orig], torch.arange(len(orig))
            for _ in range(3):  # four looks at most; where a choice confirms itself it stays
                chosen = next_task[row, chosen]
            found = logits[row, chosen]
            if self.ensemble:
                found = F.softmax(found, dim=1) + F.softmax(orig_logits / (1 / (self._cur_task + 1)), dim=1)
            orig_right.append(orig == labels.to(orig.device))
            yield found, labels

    predicted = best_classes(self, outputs())
    right = torch.cat(orig_right)
    percent = right.sum().cpu().numpy() * 100 / len(right)
    logging.info(f"the accuracy of the original model:{np.around(percent, 2)}")
    return predicted


def _mos_adapters(backbone: Any, count: int, as_shipped: bool) -> list[Any]:
    """The adapters of one test batch; as shipped, block l sees them moved l + 1 times, and all are moved at the end.

    w <- (1 - a) w + a m, towards the mean m of its predecessors, k times, gives (1 - a)^k w + (1 - (1 - a)^k) m.
    """
    a = backbone.config.adapter_momentum
    if not as_shipped or a == 0:
        return list(backbone.adapter_list[:count])
    depth, result = len(backbone.blocks), [backbone.adapter_list[0]]
    for task in range(1, count):
        moved = []
        for block, adapter in enumerate(backbone.adapter_list[task]):
            seen = SimpleNamespace(scale=adapter.scale)
            for side in ("down", "up"):
                layer = SimpleNamespace()
                for kind in ("weight", "bias"):
                    parameter = adapter.get_parameter(f"{side}_proj.{kind}")
                    mean = getattr(backbone, f"{side}_{kind}_sum")[block][task - 1] / task
                    setattr(layer, kind, torch.lerp(mean, parameter.data, (1 - a) ** (block + 1)))
                    parameter.data = torch.lerp(mean, parameter.data, (1 - a) ** depth)
                setattr(seen, f"{side}_proj", layer)
            moved.append(seen)
        result.append(moved)
    return result


# ---------------------------------------------------------------------- TUNA


def tuna_eval(
    original: Original, self: Any, loader: Any, *, cache: bool, as_shipped: bool
) -> tuple[np.ndarray, np.ndarray]:
    """TUNA's evaluation (LAMDA-CL/ICCV2025-TUNA, `models/tuna.py`).

    Every sample is classified by the adapter whose prediction has the least entropy, and by a general one; the sum of
    both softmaxes decides. TUNA runs the network once for every adapter; here they are one forward. As shipped, the
    general adapter is `cur_adapter`, the newest once more: no id that TUNA asks for reaches the merged one.
    """
    network = self._network.eval()
    vit, count = network.backbone, self._cur_task + 1
    if not is_served(vit) or len(vit.adapter_list) != count:
        return original(self, loader)
    adapters = list(vit.adapter_list)
    general = vit.cur_adapter if as_shipped else vit.merged_adapter
    if count > 1 and not _are_equal(general, adapters[-1]):
        adapters.append(general)

    def outputs() -> Iterator[tuple[Tensor, Tensor]]:
        for features, labels in features_of(self, loader, cache, adapters):
            every = network.fc(features.view(len(labels) * len(adapters), -1))["logits"][:, : self._total_classes]
            logits = every.view(len(labels), len(adapters), -1)
            if count == 1:
                yield logits[:, 0], labels
                continue
            probabilities = F.softmax(logits * self.args["scale"], dim=2)
            entropy = -(probabilities * torch.log(probabilities + 1e-10)).sum(2)
            chosen = entropy[:, :count].argmin(1)
            yield probabilities[torch.arange(len(labels)), chosen] + probabilities[:, -1], labels

    return best_classes(self, outputs())


def _are_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def tuna_features(original: Original, self: Any, x: Tensor, adapter_id: int, train: bool) -> dict[str, Tensor]:
    """One adapter at rest, as the class means and covariances ask for: the last block's class token alone."""
    if not is_served(self):
        return original(self, x, adapter_id, train)
    old = self.adapter_list
    if adapter_id == -1:
        adapter = None
    elif train or adapter_id == len(old):
        adapter = self.cur_adapter
    else:
        adapter = old[adapter_id] if adapter_id < len(old) else self.merged_adapter
    outcome = adapter_features(self, x, [adapter])[0][:, 0]
    return {"x": outcome, "pre_logits": outcome, "features": outcome}


def tuna_merge(original: Original, self: Any) -> None:
    """TUNA's merged adapter: of every weight the largest that has the sign of the mean.

    TUNA copies all adapters to the CPU and back for it; masks and rescaling factors, which nobody reads, are left out.
    """
    with torch.no_grad():
        names = [name for name, _ in self.cur_adapter.named_parameters()]
        merged = {}
        for name in names:
            weights = torch.stack([adapter.get_parameter(name) for adapter in self.adapter_list])
            sign = torch.where(weights.mean(0) > 0, 1.0, -1.0)
            merged[name] = (weights * sign).clamp_(min=0).amax(0) * sign
        self.merged_adapter = copy.deepcopy(self.cur_adapter)
        self.merged_adapter.load_state_dict(merged)


def tuna_orth_loss(original: Original, self: Any, features: Tensor) -> Tensor:
    """TUNA's orthogonality loss: the mean of U V^T over all pairs of rows is the product of the mean rows."""
    vit = self._network.backbone
    every = [*list(vit.adapter_list)[: self._cur_task], vit.cur_adapter]
    weights = torch.stack([block.up_proj.weight for adapter in every for block in list(adapter)[:12]])
    rows = F.normalize(weights, dim=2).mean(1).unflatten(0, (len(every), -1))
    return (rows[:-1] * rows[-1]).sum(2).abs().sum() / 12


def tuna_loss(original: Original, self: Any, wf: Tensor, labels: Tensor) -> Tensor:
    """TUNA's cosine loss, a cross-entropy with a margin, without its loop over the samples."""
    if self.loss_type != "cosface":
        return original(self, wf, labels)
    margin = self.m * F.one_hot(labels, wf.shape[1]) if self.m else 0
    return F.cross_entropy(self.s * (wf - margin), labels)


# ---------------------------------------------------------------------- ACMap


def _is_served_acmap(vit: Any, adapters: Sequence[Any], as_shipped: bool) -> bool:
    """Parallel adapters without a layer norm, nothing dropped.

    ACMap keeps its merged adapters in a list that `eval()` does not reach, and makes prototypes in training mode: as
    shipped, both drop activations of the adapters, if the configuration has them drop any.
    """
    config, transformer = vit.config, vit.config.transformer
    drops = (config.block.dropout, config.attention.proj_drop, transformer.drop_rate, transformer.drop_path_rate)
    trains = any(adapter is not None and adapter.training for adapter in adapters)
    return (
        not (trains and config.adapter.dropout and as_shipped)
        and not (vit.training and any(drops))
        and not (vit.global_pool or transformer.vpt_on or vit.distilled)
        and config.block.ffn_adapt
        and config.block.ffn_option == "parallel"
        and config.adapter.layernorm_option == "none"
    )


def acmap_test(original: Original, self: Any, x: Tensor, adapter_list: Sequence[Any], *, as_shipped: bool) -> Tensor:
    """ACMap's test forward (tf63/ACMap, `backbone/vit_acmap.py`): class tokens of all adapters side by side."""
    if not _is_served_acmap(self, adapter_list, as_shipped):
        return original(self, x, adapter_list)
    return torch.cat(adapter_features(self, x, adapter_list), 2)[:, 0]


def acmap_proto(original: Original, self: Any, x: Tensor, adapter: Any = None, *, as_shipped: bool) -> Tensor:
    """ACMap's forward with one adapter, or none."""
    if not _is_served_acmap(self, [adapter], as_shipped):
        return original(self, x, adapter)
    return adapter_features(self, x, [adapter])[0][:, 0]


def acmap_replace_fc(original: Original, self: Any, dataset: Any, data_loader: Any, *, as_shipped: bool) -> None:
    """ACMap's prototypes: class means under all T merged adapters, which its centroid mapping asks for, in one pass."""
    merged, ours = self.merged_adapter_list, self.config.our
    mapped = ours.use_centroid_map and 1 < len(merged) < ours.limit_centroid_map
    adapters = [merged[-1], *(merged[:-1] if mapped else ()), *([None] if self.use_init_ptm else ())]
    if not _is_served_acmap(self.backbone, adapters, as_shipped):
        return original(self, dataset, data_loader)
    _, of_adapters = class_means(self.backbone, data_loader, dataset.labels, adapters, self.device)
    means = [of_adapter.cpu() for of_adapter in of_adapters]
    passes = iter(range(len(adapters)))

    def extract_prototype(dataset: Any, data_loader: Any, adapter: Any) -> Tensor:
        number = next(passes)
        if number:
            draw_as_if_read(data_loader)  # the pass that is not made
        return means[next(i for i, known in enumerate(adapters) if known is adapter)]

    self.extract_prototype = extract_prototype
    try:
        return original(self, dataset, data_loader)
    finally:
        del self.extract_prototype
