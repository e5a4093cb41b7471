"""LAMDA-PILOT (https://github.com/LAMDA-CL/LAMDA-PILOT): EASE and MOS on this package's operators, and PLoRA in it.

In a checkout of PILOT, `python -m plora_ext.integrations.pilot --config exps/ease.json` is its `python main.py --config
exps/ease.json`, patched. In code, with the checkout on `sys.path`:

    from plora_ext.integrations import pilot
    print(pilot.patch())

Predictions stay what they were. EASE runs all T subspaces of a batch as one forward that shares the first block and
computes the class token alone in the last, reads the training images once for all subspaces' prototypes instead of once
for each, completes the prototypes in one operator call, classifies by one product, and remembers features of frozen
adapters from one evaluation to the next. Old adapters become part of `state_dict()`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.integrations import _patch, _pilot_family
from plora_ext.integrations._layers import constant
from plora_ext.integrations._patch import Patch

__all__ = ["adapter_features", "patch", "unpatch"]

IMAGES = 512
"""Images times adapters in one forward at most: more take more memory and no less time."""


def patch(mos: str = "as shipped", cache: bool = True) -> Patch:
    """Replace the slow parts of EASE and MOS, and register `plora` as a learner ("model_name": "plora").

    In a checkout of InfLoRA, SD-LoRA or CL-LoRA, which have PILOT's skeleton, it replaces their LoRA layers instead.

    Args:
        mos: PILOT's MOS changes its adapters whenever it looks at them: every block of every forward pass, also while
            testing, moves all of them towards the mean of their predecessors. "as shipped" keeps that, to the same
            numbers; "fixed" moves them where training asks for it (once after every step) and nowhere else.
        cache: keep the features of EASE's frozen adapters between evaluations, N T D float32 on the network's device
            (614 MB for CIFAR-100 in 20 tasks). Checked against the weights and the images every time.

    Returns:
        What was replaced and what was left; also a context manager.

    Raises:
        ImportError: no checkout of PILOT is on `sys.path`.
        ValueError: `mos` is neither of the two.
    """
    if mos not in ("as shipped", "fixed"):
        raise ValueError(f'mos must be "as shipped" or "fixed", got {mos!r}')
    _old_timm_names()
    groups = {marker: hooks for marker, hooks in _hooks(mos, cache).items() if _is_here(marker)}
    if not groups:
        how = "run in a checkout of LAMDA-PILOT with its requirements, or put it on sys.path"
        raise ImportError(f"none of {', '.join(_hooks(mos, cache))} can be imported: {how}")

    def build(patch: Patch) -> None:
        for hooks in groups.values():
            for path, make in hooks.items():
                patch.replace(path, make)
        if "backbone.vit_ease" in groups:
            patch.leave("adapters in training", "they drop activations between their projections")
            patch.leave("EASE with moni_adam or use_old_data", "their prototypes are made otherwise")
            patch.leave("nn.DataParallel, VPT, sequential adapters, layer norm in adapters", "EASE does not use them")
        if "backbone.lora" in groups:
            patch.leave("compute_ortho_loss of SD-LoRA", "it reads every old adapter from disk in each step")

    return _patch.apply("LAMDA-PILOT", build)


def _hooks(mos: str, cache: bool) -> dict[str, dict[str, Callable[[Any], Any]]]:
    """What is replaced by what, by the module that tells whether a checkout has the method."""
    vit, learner = "backbone.vit_ease:VisionTransformer", "models.ease:Learner"
    of_mos: dict[str, Callable[[Any], Any]] = {
        "backbone.vit_mos:Attention.forward": _make_attention,
        "models.mos:Learner._eval_cnn": lambda original: _make_mos_eval(original, mos == "as shipped"),
    }
    if mos == "fixed":
        of_mos["backbone.vit_mos:VisionTransformer.forward_features"] = _make_mos_features
    return {
        "backbone.vit_ease": {
            "backbone.vit_ease:Attention.forward": _make_attention,
            f"{vit}.forward_test": _make_forward_test,
            f"{vit}.forward_proto": _make_forward_proto,
            f"{vit}.forward": _make_forward,
            f"{vit}.add_adapter_to_list": _make_add_adapter,
            f"{vit}._load_from_state_dict": _make_load,
            f"{learner}.replace_fc": _make_replace_fc,
            f"{learner}.solve_similarity": lambda original: _make_solve(original, "last"),
            f"{learner}.solve_sim_reset": lambda original: _make_solve(original, "reset"),
            f"{learner}._eval_cnn": lambda original: _make_eval(original, cache),
            "backbone.linears:EaseCosineLinear.forward_reweight": _make_reweight,
            "utils.factory:get_model": _make_get_model,
        },
        "backbone.vit_mos": of_mos,
        "models.vit_inflora": {"models.vit_inflora:Attention_LoRA.forward": _pilot_family.make_inflora},
        "backbone.lora": {"backbone.lora:_LoRA_qkv_timm_train.forward": _pilot_family.make_sd_lora},
        "backbone.vit_cllora": {"backbone.vit_cllora:VisionTransformer.forward_test": _pilot_family.make_cl_lora},
    }


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _old_timm_names() -> None:
    """PILOT imports two modules of timm 0.6 that timm 1 has elsewhere."""
    for name in ("helpers", "weight_init"):
        sys.modules.setdefault(f"timm.models.layers.{name}", importlib.import_module(f"timm.layers.{name}"))


def unpatch() -> None:
    """Put PILOT's own functions back. Old adapters that became part of a network's state stay there."""
    _patch.remove("LAMDA-PILOT")
    _kept.clear()


# ---------------------------------------------------------------------- one forward for all adapters


def adapter_features(vit: Any, images: Tensor, adapters: Sequence[Any], class_token_only: bool = True) -> list[Tensor]:
    """Features of a batch in the subspace of every adapter: the T forward passes of EASE as one.

    Args:
        vit: PILOT's `vit_ease.VisionTransformer` or `vit_mos.VisionTransformer`, in evaluation mode.
        images: [B, 3, H, W].
        adapters: T adapters, each a list of one AdaptFormer adapter for every block, or None for the frozen backbone.
        class_token_only: compute nothing in the last block but the class token.

    Returns:
        T tensors [B, 1, D], or [B, N, D] with all tokens.
    """
    x = vit.patch_embed(images)
    x = vit.pos_drop(torch.cat((vit.cls_token.expand(len(x), -1, -1), x), dim=1) + vit.pos_embed)
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


def _make_attention(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training and self.attn_drop.p > 0:
            return original(self, x)
        return _attention(self, x)

    return forward


def _is_served(vit: Any) -> bool:
    """Whether this is EASE's own arrangement, at rest: parallel adapters without a layer norm, evaluation mode."""
    config = vit.config
    return (
        not vit.training
        and not vit.global_pool
        and not config.vpt_on
        and config.ffn_adapt
        and config.ffn_option == "parallel"
        and config.ffn_adapter_layernorm_option == "none"
        and config.ffn_adapter_scalar != "learnable_scalar"
    )


def _subspaces(vit: Any, use_init_ptm: bool) -> list[Any]:
    """EASE's adapters in the order of its feature blocks."""
    return [*([None] if use_init_ptm else []), *vit.adapter_list, vit.cur_adapter]


# ---------------------------------------------------------------------- backbone/vit_ease.py


def _make_forward_test(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_test(self: Any, x: Tensor, use_init_ptm: bool = False) -> list[Tensor]:
        if not _is_served(self):
            return original(self, x, use_init_ptm)
        return adapter_features(self, x, _subspaces(self, use_init_ptm), class_token_only=False)

    return forward_test


def _make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor, test: bool = False, use_init_ptm: bool = False) -> Tensor:
        if not test or not _is_served(self):
            return original(self, x, test, use_init_ptm)
        return torch.cat(adapter_features(self, x, _subspaces(self, use_init_ptm)), dim=2)[:, 0]

    return forward


def _make_forward_proto(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_proto(self: Any, x: Tensor, adapt_index: int) -> Tensor:
        if not _is_served(self):
            return original(self, x, adapt_index)
        old = self.adapter_list
        chosen = None if adapt_index == -1 else old[adapt_index] if adapt_index < len(old) else self.cur_adapter
        return adapter_features(self, x, [chosen])[0][:, 0]

    return forward_proto


def _make_add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_adapter_to_list(self: Any) -> None:
        if isinstance(self.adapter_list, list):  # which state_dict(), .to() and .eval() do not see
            self.adapter_list = nn.ModuleList(self.adapter_list)
        original(self)

    return add_adapter_to_list


def _make_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """A network that has seen fewer tasks grows to those of the file."""
        saved = {key[len(prefix) :].split(".")[1] for key in state_dict if key.startswith(prefix + "adapter_list.")}
        while len(self.adapter_list) < len(saved):
            self.add_adapter_to_list()
        original(self, state_dict, prefix, *args, **kwargs)

    return _load_from_state_dict


# ---------------------------------------------------------------------- models/ease.py


def _make_replace_fc(original: Callable[..., None]) -> Callable[..., None]:
    def replace_fc(self: Any, train_loader: Any) -> None:
        network = self._network.eval()
        if self.moni_adam or self.use_exemplars or not _is_served(network.backbone):
            return original(self, train_loader)
        subspaces, D = _subspaces(network.backbone, self.use_init_ptm), network.out_dim
        # The diagonal alone: the frozen backbone, if it is used, and the newest adapter.
        wanted = [i for i, a in enumerate(subspaces) if not self.use_diagonal or a is None or i == len(subspaces) - 1]
        sums = torch.zeros(self._total_classes, len(wanted) * D, device=self._device)
        counts = torch.zeros(self._total_classes, dtype=torch.int64, device=self._device)
        with torch.no_grad():
            for _, images, labels in train_loader:
                parts = adapter_features(network.backbone, images.to(self._device), [subspaces[i] for i in wanted])
                ops.class_sums(
                    torch.cat(parts, 2)[:, 0].float(),
                    labels.to(self._device),
                    self._total_classes,
                    sums=sums,
                    counts=counts,
                )
            for _ in wanted[1:]:
                _draw_as_if_read(train_loader)
            classes = torch.as_tensor(np.unique(self.train_dataset_for_protonet.labels), device=self._device)
            means = sums[classes] / counts[classes, None]
            for column, i in enumerate(wanted):
                network.fc.weight[classes, i * D : (i + 1) * D] = means[:, column * D : (column + 1) * D]
        if self.use_diagonal:
            return None
        return self.solve_sim_reset() if self.recalc_sim else self.solve_similarity()

    return replace_fc


def _draw_as_if_read(loader: Any) -> None:
    """The random numbers that one more pass over a loader takes, so that later ones stay those of the unpatched run."""
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    next(iter(loader.sampler), None)


def _make_solve(original: Callable[..., None], mode: str) -> Callable[..., None]:
    def solve(self: Any) -> None:
        if self.moni_adam:
            return original(self)
        weight, D = self._network.fc.weight.data, self._network.out_dim
        blocks = weight.view(len(weight), -1, D)[:, int(self.use_init_ptm) :]  # the frozen backbone's are all real
        tasks = _task_of_class(len(weight), self.init_cls, self.inc, weight.device)
        blocks.copy_(ops.complete_prototypes(blocks, tasks, tau=1.0, mode=mode))
        return None

    return solve


@lru_cache(maxsize=64)
def _task_of_class(num_classes: int, init_cls: int, inc: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return ((torch.arange(num_classes) - init_cls).div(inc, rounding_mode="floor") + 1).clamp_(min=0).to(device)


@lru_cache(maxsize=64)
def _reweights(
    num_classes: int, blocks: int, cur_task: int, alpha: float, beta: float, init_cls: int, inc: int, ptm: bool,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """What `forward_reweight` multiplies the cosine of a class with in every block."""
    with torch.inference_mode(False):
        weights = torch.full((num_classes, blocks), alpha / max(cur_task, 1))
        own = _task_of_class(num_classes, init_cls, inc, torch.device("cpu")) + int(ptm)
        weights.scatter_(1, own[:, None].clamp(max=blocks - 1), 1.0)
        if ptm:
            weights[:, 0] = beta
        return weights.to(device)


def _make_reweight(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_reweight(
        self: Any,
        input: Tensor,
        cur_task: int,
        alpha: float = 0.1,
        beta: float = 0.0,
        init_cls: int = 10,
        inc: int = 10,
        out_dim: int = 768,
        use_init_ptm: bool = False,
    ) -> dict[str, Tensor]:
        if self.to_reduce or self.nb_proxy != 1 or self.in_features % out_dim or input.shape[1] != self.in_features:
            return original(self, input, cur_task, alpha, beta, init_cls, inc, out_dim, use_init_ptm)
        seen = min(len(self.weight), init_cls + cur_task * inc)
        prototypes = self.weight[:seen].view(seen, -1, out_dim)
        weights = _reweights(
            seen, prototypes.shape[1], cur_task, alpha, beta, init_cls, inc, use_init_ptm, input.device
        )
        logits = ops.subspace_logits(input.to(prototypes.dtype).view(len(input), -1, out_dim), prototypes, weights)
        return {"logits": logits if self.sigma is None else self.sigma * logits}

    return forward_reweight


# What was computed at earlier evaluations: images, {adapter: its checksum}, features [N, T, D].
_kept: WeakKeyDictionary[Any, tuple[Any, list[Any], Tensor]] = WeakKeyDictionary()


def _make_eval(original: Callable[..., Any], cache: bool) -> Callable[..., Any]:
    def _eval_cnn(self: Any, loader: Any) -> tuple[np.ndarray, np.ndarray]:
        network = self._network.eval()
        if isinstance(network, nn.DataParallel) or not _is_served(network.backbone):
            return original(self, loader)
        with torch.no_grad():
            predicted, targets, own_task, given_task = [], [], [], []
            for features, labels in _features_of(self, loader, cache):
                outputs = _logits(network, features)
                tasks = _task_of_class(outputs.shape[1], self.init_cls, self.inc, outputs.device)
                labels = labels.to(outputs.device)
                task_ids = (labels - self.init_cls).div(self.inc, rounding_mode="floor") + 1
                inside = torch.where(tasks == task_ids[:, None], outputs, 0)  # zeros elsewhere, as PILOT has it
                best = outputs.max(dim=1)[1]
                own_task.append(((best - self.init_cls).div(self.inc, rounding_mode="floor") + 1) == task_ids)
                given_task.append(inside.max(dim=1)[1] == labels)
                predicted.append(torch.topk(outputs, k=self.topk, dim=1, largest=True, sorted=True)[1])
                targets.append(labels)
            for text, right in (("Task correct: {}", own_task), ("Task acc: {}", given_task)):
                logging.info(text.format(torch.cat(right).sum().cpu().numpy() * 100 / len(torch.cat(right))))
            return torch.cat(predicted).cpu().numpy(), torch.cat(targets).cpu().numpy()

    return _eval_cnn


def _logits(network: Any, features: Tensor) -> Tensor:
    """`EaseNet.forward` from its features on."""
    if network.args["moni_adam"] or not network.args["use_reweight"]:
        logits: Tensor = network.fc(features)["logits"]
        return logits
    of_network = {name: getattr(network, name) for name in ("alpha", "beta", "init_cls", "inc", "use_init_ptm")}
    reweighted = network.fc.forward_reweight(
        features, cur_task=network._cur_task, out_dim=network.out_dim, **of_network
    )
    result: Tensor = reweighted["logits"]
    return result


def _features_of(learner: Any, loader: Any, cache: bool) -> Any:
    """Features [B, T * D] and labels of every batch, computing only what no earlier evaluation did."""
    network, device = learner._network, learner._device
    subspaces = _subspaces(network.backbone, learner.use_init_ptm)
    dataset = loader.dataset
    in_order = isinstance(loader.sampler, torch.utils.data.SequentialSampler) and not loader.drop_last
    if not cache or not in_order or not hasattr(dataset, "images"):
        for _, images, labels in loader:
            yield torch.cat(adapter_features(network.backbone, images.to(device), subspaces), 2)[:, 0], labels
        return

    sums = _checksums(network.backbone, subspaces, device)
    look = (repr(dataset.trsf), torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
    features = torch.empty(len(dataset), len(subspaces), network.out_dim, device=device)
    known, valid = 0, [False] * len(subspaces)
    if learner in _kept:
        (images, before), old_sums, old = _kept[learner]
        n = len(images)
        if before == look and n <= len(dataset) and np.array_equal(images, dataset.images[:n]):
            known = n
            for i, of_adapter in enumerate(sums):
                if of_adapter in old_sums:
                    valid[i] = True
                    features[:n, i] = old[:, old_sums.index(of_adapter)]
        del old
    start = 0
    for _, images, labels in loader:
        stop = start + len(labels)
        for rows, missing in (
            (slice(start, min(stop, known)), [i for i, ok in enumerate(valid) if not ok]),
            (slice(max(start, known), stop), list(range(len(subspaces)))),
        ):
            if rows.start < rows.stop and missing:
                batch = images[rows.start - start : rows.stop - start].to(device)
                parts = adapter_features(network.backbone, batch, [subspaces[i] for i in missing])
                for i, part in zip(missing, parts):
                    features[rows, i] = part[:, 0].to(features)
        yield features[start:stop].flatten(1), labels
        start = stop
    _kept[learner] = ((np.array(dataset.images), look), sums, features)  # a copy: images may be changed in place


def _checksums(vit: Any, subspaces: list[Any], device: torch.device) -> list[tuple[float, ...]]:
    """Two sums over the weights of the backbone and of each adapter; what trains in between gets others."""
    skip = {id(p) for adapters in (*vit.adapter_list, vit.cur_adapter) for p in adapters.parameters()}
    groups = [[p for p in vit.parameters() if id(p) not in skip]]
    groups += [[] if adapters is None else list(adapters.parameters()) for adapters in subspaces]
    flat = [torch.stack([_two_sums(p) for p in group]).sum(0) if group else torch.zeros(2) for group in groups]
    backbone, *rest = torch.stack([t.to(device, torch.float64) for t in flat]).tolist()
    return [(*backbone, *of_adapter) for of_adapter in rest]


def _two_sums(p: Tensor) -> Tensor:
    values = p.detach().double().flatten()
    return torch.stack([values.sum(), values @ torch.linspace(1, 2, len(values), dtype=values.dtype, device=p.device)])


# ---------------------------------------------------------------------- models/mos.py


def _make_mos_features(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_features(self: Any, x: Tensor, adapter_id: int, train: bool) -> dict[str, Tensor]:
        momentum, self.config.adapter_momentum = self.config.adapter_momentum, 0.0  # `reweight_adapter` does nothing
        try:
            features: dict[str, Tensor] = original(self, x, adapter_id, train)
        finally:
            self.config.adapter_momentum = momentum
        return features

    return forward_features


def _make_mos_eval(original: Callable[..., Any], as_shipped: bool) -> Callable[..., Any]:
    def _eval_cnn(self: Any, loader: Any) -> tuple[np.ndarray, np.ndarray]:
        network = self._network.eval()
        backbone = network.backbone
        if not _is_served(backbone) or len(backbone.adapter_list) <= self._cur_task:
            return original(self, loader)
        task_of = torch.tensor([self.cls2task[c] for c in range(self._total_classes)], device=self._device)
        predicted, targets, orig_right = [], [], []
        with torch.no_grad():
            for _, images, labels in loader:
                adapters = _mos_adapters(backbone, self._cur_task + 1, as_shipped)
                parts = adapter_features(backbone, images.to(self._device), adapters)
                features = torch.cat(parts, 1)  # [B, T, D]
                # The first adapter is never moved: its features are also those of `forward_orig`.
                orig_logits = network.fc(features[:, 0])["logits"][:, : self._total_classes]
                logits = backbone(features, fc_only=True)["logits"][..., : self._total_classes]
                orig = orig_logits.max(dim=1)[1]
                next_task, chosen, row = task_of[logits.max(dim=2)[1]], task_of[orig], torch.arange(len(orig))
                for _ in range(3):  # four looks at most; where a choice confirms itself it stays
                    chosen = next_task[row, chosen]
                outputs = logits[row, chosen]
                if self.ensemble:
                    sharpened = F.softmax(orig_logits / (1 / (self._cur_task + 1)), dim=1)
                    outputs = F.softmax(outputs, dim=1) + sharpened
                predicted.append(torch.topk(outputs, k=self.topk, dim=1, largest=True, sorted=True)[1])
                orig_right.append(orig == labels.to(orig.device))
                targets.append(labels)
        right = torch.cat(orig_right)
        percent = right.sum().cpu().numpy() * 100 / len(right)
        logging.info(f"the accuracy of the original model:{np.around(percent, 2)}")
        return torch.cat(predicted).cpu().numpy(), torch.cat(targets).numpy()

    return _eval_cnn


class _Factor:
    """An adapter of one block with weights of its own."""

    def __init__(self, adapter: Any, weights: dict[str, Tensor]) -> None:
        self.scale = adapter.scale
        self.down_proj, self.up_proj = (
            type("Linear", (), {"weight": weights[f"{side}.weight"], "bias": weights[f"{side}.bias"]})
            for side in ("down_proj", "up_proj")
        )


def _mos_adapters(backbone: Any, count: int, as_shipped: bool) -> list[Any]:
    """The adapters of one test batch; as shipped, block l sees them moved l + 1 times, and all are moved at the end.

    w <- (1 - a) w + a m, towards the mean m of its predecessors, k times, gives (1 - a)^k w + (1 - (1 - a)^k) m.
    """
    a = backbone.config.adapter_momentum
    if not as_shipped or a == 0:
        return list(backbone.adapter_list[:count])
    sums = {
        "down_proj.weight": backbone.down_weight_sum, "down_proj.bias": backbone.down_bias_sum,
        "up_proj.weight": backbone.up_weight_sum, "up_proj.bias": backbone.up_bias_sum,
    }  # fmt: skip
    depth, result = len(backbone.blocks), [backbone.adapter_list[0]]
    for task in range(1, count):
        moved = []
        for block, adapter in enumerate(backbone.adapter_list[task]):
            seen = {}
            for name, of_blocks in sums.items():
                parameter, mean = adapter.get_parameter(name), of_blocks[block][task - 1] / task
                seen[name] = torch.lerp(mean, parameter.data, (1 - a) ** (block + 1))
                parameter.data = torch.lerp(mean, parameter.data, (1 - a) ** depth)
            moved.append(_Factor(adapter, seen))
        result.append(moved)
    return result


# ---------------------------------------------------------------------- PLoRA as a learner


def _make_get_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_model(model_name: str, args: dict[str, Any]) -> Any:
        if model_name.lower() != "plora":
            return original(model_name, args)
        from plora_ext.integrations._pilot_learner import make_learner

        return make_learner()(args)

    return get_model


def main() -> None:
    """PILOT's own main.py, patched; arguments are PILOT's."""
    sys.path.insert(0, "")
    print(patch())
    _patch.require("main", "run in a checkout of LAMDA-PILOT").main()


if __name__ == "__main__":
    main()
