"""LAMDA-PILOT (https://github.com/LAMDA-CL/LAMDA-PILOT): EASE and MOS on this package's operators, and PLoRA in it.

In a checkout of PILOT, `python -m plora_ext.integrations.pilot --config exps/ease.json` is its `python main.py --config
exps/ease.json`, patched. In code, with the checkout on `sys.path`:

    from plora_ext.integrations import pilot
    print(pilot.patch())

Predictions stay what they were. EASE's training steps are replayed as a CUDA graph. It runs all T subspaces of a batch
as one forward that shares the first block and computes the class token alone in the last, reads the training images
once for all subspaces' prototypes instead of once for each, completes the prototypes in one operator call, classifies
by one product, and remembers features of frozen adapters from one evaluation to the next. Old adapters become part of
`state_dict()`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora_ext import ops
from plora_ext.graphs import Captured, why_not
from plora_ext.integrations import _patch
from plora_ext.integrations import _pilot_family as family
from plora_ext.integrations._layers import kept_on_device
from plora_ext.integrations._patch import Patch
from plora_ext.integrations._pilot_vit import (
    adapter_features,
    class_means,
    draw_as_if_read,
    features_of,
    is_served,
    kept,
    make_attention,
    training_features,
    trains_plainly,
)

__all__ = ["adapter_features", "patch", "unpatch"]

# What the hooks were written for, by the module that tells whether a checkout is that project.
TESTED = {
    "backbone.vit_ease": "LAMDA-CL/LAMDA-PILOT 5240714",
    "backbone.vit_mos": "LAMDA-CL/LAMDA-PILOT 5240714",
    "models.vit_inflora": "liangyanshuo/InfLoRA e08b00e",
    "backbone.lora": "WuYichen-97/SD-Lora-CL 8bacded",
    "backbone.vit_cllora": "JiangpengHe/CL-LoRA df4e74e",
    "backbone.vit_tuna": "LAMDA-CL/ICCV2025-TUNA 77d4f10",
    "acmap.backbone.vit_acmap": "tf63/ACMap 8807d3d",
}

_TRAINING = {"adapters in training": "they drop activations between their projections"}
_LEFT = {  # to the host
    "backbone.vit_ease": {
        "SimpleCIL": "it has no training step, and its one pass over the images is the device's to do",
        "EASE with moni_adam or use_old_data": "their prototypes are made otherwise",
        "nn.DataParallel, VPT, sequential adapters, layer norm in adapters": "EASE does not use them",
    },
    "backbone.lora": {"compute_ortho_loss of SD-LoRA": "it reads every old adapter from disk in each step"},
    "backbone.vit_tuna": {
        **_TRAINING,
        "classifer_align of TUNA": "it draws features class by class from random numbers of its own",
    },
    "acmap.backbone.vit_acmap": {
        **_TRAINING,
        "merge of ACMap": "it runs once in a task, over the adapters' weights alone",
    },
}


def patch(mos: str = "as shipped", cache: bool = True, tuna: str = "as shipped", acmap: str = "as shipped") -> Patch:
    """Replace the slow parts of EASE and MOS, and register `plora` as a learner ("model_name": "plora").

    In a checkout of another codebase with PILOT's skeleton it replaces the LoRA layers of InfLoRA, SD-LoRA or CL-LoRA,
    or what TUNA or ACMap do with their adapters.

    Args:
        mos: PILOT's MOS changes its adapters whenever it looks at them: every block of every forward pass, also while
            testing, moves all of them towards the mean of their predecessors. "as shipped" keeps that, to the same
            numbers; "fixed" moves them where training asks for it (once after every step) and nowhere else.
        cache: keep the features of EASE's and TUNA's frozen adapters between evaluations, N T D float32 on the
            network's device (614 MB for CIFAR-100 in 20 tasks). Checked against the weights and the images every time.
        tuna: TUNA's general prediction comes from its newest adapter, as no id that it asks for reaches the merged one.
            "as shipped" keeps that; "fixed" takes the merged adapter.
        acmap: ACMap drops activations of its adapters also in prototypes and tests, as its merged adapters stay in
            training mode. "as shipped" keeps that (nothing but attention is replaced then, unless `dropout` is 0);
            "fixed" drops nothing there.

    Returns:
        What was replaced and what was left; also a context manager.

    Raises:
        ImportError: no checkout of PILOT or its family is on `sys.path`, or modules of the same names are others'.
        TypeError: the checkout's functions take other arguments; nothing is patched then.
        ValueError: `mos`, `tuna` or `acmap` is neither of the two.
    """
    for name, value in {"mos": mos, "tuna": tuna, "acmap": acmap}.items():
        if value not in ("as shipped", "fixed"):
            raise ValueError(f'{name} must be "as shipped" or "fixed", got {value!r}')
    known = _hooks(mos, cache, tuna, acmap)
    groups = {marker: hooks for marker, hooks in known.items() if _is_here(marker)}
    projects = ", ".join(sorted({TESTED[marker] for marker in groups}))
    if not groups:
        how = "run in a checkout of LAMDA-PILOT with its requirements, or put it on sys.path"
        raise ImportError(f"none of {', '.join(known)} can be imported: {how}")

    def build(patch: Patch) -> None:
        patch.report.host = f"{projects} (as tested)"
        patch.afterwards(_old_timm_names())
        for hooks in groups.values():
            for path, make in hooks.items():
                patch.replace(path, make)
        for marker in groups:
            for what, why in _LEFT.get(marker, {}).items():
                patch.leave(what, why)

    return _patch.apply("LAMDA-PILOT", build)


def _hooks(mos: str, cache: bool, tuna: str, acmap: str) -> dict[str, dict[str, Callable[[Any], Any]]]:
    """What is replaced by what, by the module that tells whether a checkout has the method."""
    vit, ease = "VisionTransformer", "models.ease:Learner"
    of_mos, of_tuna, of_acmap = (how == "as shipped" for how in (mos, tuna, acmap))
    hooks: dict[str, dict[str, Callable[[Any], Any]]] = {
        "backbone.vit_ease": {
            "backbone.vit_ease:Attention.forward": make_attention,
            f"backbone.vit_ease:{vit}.forward_test": _make_forward_test,
            f"backbone.vit_ease:{vit}.forward_proto": _make_forward_proto,
            f"backbone.vit_ease:{vit}.forward": _make_forward,
            f"backbone.vit_ease:{vit}.add_adapter_to_list": _make_add_adapter,
            f"backbone.vit_ease:{vit}._load_from_state_dict": _make_load,
            f"{ease}._init_train": _make_init_train,
            f"{ease}.replace_fc": _make_replace_fc,
            f"{ease}.solve_similarity": partial(_make_solve, mode="last"),
            f"{ease}.solve_sim_reset": partial(_make_solve, mode="reset"),
            f"{ease}._eval_cnn": partial(_make_eval, cache=cache),
            "backbone.linears:EaseCosineLinear.forward_reweight": _make_reweight,
            "utils.factory:get_model": _make_get_model,
        },
        "backbone.vit_mos": {
            "backbone.vit_mos:Attention.forward": make_attention,
            "models.mos:Learner._eval_cnn": partial(_make_mos_eval, as_shipped=of_mos),
        },
        "models.vit_inflora": {"models.vit_inflora:Attention_LoRA.forward": family.make_inflora},
        "backbone.lora": {"backbone.lora:_LoRA_qkv_timm_train.forward": family.make_sd_lora},
        "backbone.vit_cllora": {f"backbone.vit_cllora:{vit}.forward_test": family.make_cl_lora},
        "backbone.vit_tuna": {
            "backbone.vit_tuna:Attention.forward": make_attention,
            f"backbone.vit_tuna:{vit}.forward_features": family.make_tuna_features,
            f"backbone.vit_tuna:{vit}.merge": family.make_tuna_merge,
            "models.tuna:Learner._eval_cnn": partial(family.make_tuna_eval, cache=cache, as_shipped=of_tuna),
            "models.tuna:Learner.orth_loss": family.make_tuna_orth_loss,
            "models.tuna:AngularPenaltySMLoss.forward": family.make_tuna_loss,
        },
        "acmap.backbone.vit_acmap": {
            "acmap.backbone.vit_acmap:Attention.forward": make_attention,
            f"acmap.backbone.vit_acmap:{vit}.forward_test": partial(family.make_acmap_test, as_shipped=of_acmap),
            f"acmap.backbone.vit_acmap:{vit}.forward_proto": partial(family.make_acmap_proto, as_shipped=of_acmap),
            "acmap.utils.inc_net:ACMapNet.replace_fc": partial(family.make_acmap_replace_fc, as_shipped=of_acmap),
        },
    }
    if not of_mos:
        hooks["backbone.vit_mos"][f"backbone.vit_mos:{vit}.forward_features"] = _make_mos_features
    return hooks


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _old_timm_names() -> Callable[[], None]:
    """PILOT imports two modules of timm 0.6 that timm 1 has elsewhere. Returns what takes these names away again."""
    names = {f"timm.models.layers.{name}": f"timm.layers.{name}" for name in ("helpers", "weight_init")}
    new = {old: importlib.import_module(name) for old, name in names.items() if old not in sys.modules}
    sys.modules.update(new)

    def undo() -> None:
        for name, module in new.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    return undo


def unpatch() -> None:
    """Put PILOT's own functions back. Old adapters that became part of a network's state stay there."""
    _patch.remove("LAMDA-PILOT")
    kept.clear()


def _subspaces(vit: Any, use_init_ptm: bool) -> list[Any]:
    """EASE's adapters in the order of its feature blocks."""
    return [*([None] if use_init_ptm else []), *vit.adapter_list, vit.cur_adapter]


# ---------------------------------------------------------------------- backbone/vit_ease.py


def _make_forward_test(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_test(self: Any, x: Tensor, use_init_ptm: bool = False) -> list[Tensor]:
        if not is_served(self):
            return original(self, x, use_init_ptm)
        return adapter_features(self, x, _subspaces(self, use_init_ptm), class_token_only=False)

    return forward_test


def _make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor, test: bool = False, use_init_ptm: bool = False) -> Tensor:
        if not test and trains_plainly(self):
            return training_features(self, x)
        if not test or not is_served(self):
            return original(self, x, test, use_init_ptm)
        return torch.cat(adapter_features(self, x, _subspaces(self, use_init_ptm)), dim=2)[:, 0]

    return forward


def _make_forward_proto(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_proto(self: Any, x: Tensor, adapt_index: int) -> Tensor:
        if not is_served(self):
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
    def _load_from_state_dict(
        self: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """A network that has seen fewer tasks grows to those of the file."""
        saved = {key[len(prefix) :].split(".")[1] for key in state_dict if key.startswith(prefix + "adapter_list.")}
        while len(self.adapter_list) < len(saved):
            self.add_adapter_to_list()
        original(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    return _load_from_state_dict


# ---------------------------------------------------------------------- models/ease.py


def _make_init_train(original: Callable[..., None]) -> Callable[..., None]:
    def _init_train(self: Any, train_loader: Any, test_loader: Any, optimizer: Any, scheduler: Any) -> None:
        """PILOT's loop over the epochs of a task; it waits for the device once in each, not three times a step."""
        from tqdm import tqdm  # as PILOT does

        network, device, known = self._network, self._device, self._known_classes
        if self.moni_adam or isinstance(network, nn.DataParallel):
            return original(self, train_loader, test_loader, optimizer, scheduler)
        epochs = self.args["init_epochs" if self._cur_task == 0 or self.init_cls == self.inc else "later_epochs"]
        learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def gradients(images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            torch.clear_autocast_cache()  # a graph would go on with the casts of these weights
            logits = network(images, test=False)["logits"]
            wanted = (labels - known).clamp(min=-1)
            loss = F.cross_entropy(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            return torch.stack([loss.detach(), (logits.argmax(1) == wanted).sum()]), [p.grad for p in learned]

        captured = Captured(gradients, tried=lambda made: logging.info(f"CUDA graph of EASE's step: {made.report()}"))
        step = gradients if why_not(network, learned) else captured
        progress, info = tqdm(range(epochs)), ""
        for epoch in progress:
            network.train()
            sums, total = torch.zeros(2, dtype=torch.float64, device=device), 0
            for _, images, labels in train_loader:
                found, grads = step(*(_sent(t, device) for t in (images, labels)))
                for parameter, grad in zip(learned, grads):
                    parameter.grad = grad  # a graph's own, also after a batch that ran without it
                optimizer.step()
                sums += found
                total += len(labels)
            if scheduler:
                scheduler.step()
            loss, right = sums.tolist()
            accuracy = np.around(right * 100 / total, decimals=2)
            info = (
                f"Task {self._cur_task}, Epoch {epoch + 1}/{epochs} => Loss {loss / len(train_loader):.3f}, "
                f"Train_accy {accuracy:.2f}"
            )
            progress.set_description(info)
        optimizer.zero_grad()  # the graph's memory
        logging.info(info)

    return _init_train


def _sent(t: Tensor, device: torch.device) -> Tensor:
    """On the device; a copy from the host's pinned memory, for which the host does not wait."""
    return (t.pin_memory() if device.type == "cuda" and not t.is_cuda else t).to(device, non_blocking=True)


def _make_replace_fc(original: Callable[..., None]) -> Callable[..., None]:
    def replace_fc(self: Any, train_loader: Any) -> None:
        network = self._network.eval()
        if self.moni_adam or self.use_exemplars or not is_served(network.backbone):
            return original(self, train_loader)
        subspaces, D = _subspaces(network.backbone, self.use_init_ptm), network.out_dim
        # The diagonal alone: the frozen backbone, if it is used, and the newest adapter.
        wanted = [i for i, a in enumerate(subspaces) if not self.use_diagonal or a is None or i == len(subspaces) - 1]
        labels = self.train_dataset_for_protonet.labels
        chosen = [subspaces[i] for i in wanted]
        classes, means = class_means(network.backbone, train_loader, labels, chosen, self._device)
        for _ in wanted[1:]:
            draw_as_if_read(train_loader)
        with torch.no_grad():
            for i, of_subspace in zip(wanted, means):
                network.fc.weight[classes, i * D : (i + 1) * D] = of_subspace
        if self.use_diagonal:
            return None
        return self.solve_sim_reset() if self.recalc_sim else self.solve_similarity()

    return replace_fc


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


@kept_on_device
def _task_of_class(num_classes: int, init_cls: int, inc: int, device: torch.device) -> Tensor:
    return ((torch.arange(num_classes) - init_cls).div(inc, rounding_mode="floor") + 1).clamp_(min=0).to(device)


@kept_on_device
def _reweights(
    num_classes: int, blocks: int, cur_task: int, alpha: float, beta: float, init_cls: int, inc: int, ptm: bool,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """What `forward_reweight` multiplies the cosine of a class with in every block."""
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


def _make_eval(original: Callable[..., Any], cache: bool) -> Callable[..., Any]:
    def _eval_cnn(self: Any, loader: Any) -> tuple[np.ndarray, np.ndarray]:
        network = self._network.eval()
        if isinstance(network, nn.DataParallel) or not is_served(network.backbone):
            return original(self, loader)
        with torch.no_grad():
            predicted, targets, own_task, given_task = [], [], [], []
            for features, labels in features_of(self, loader, cache, _subspaces(network.backbone, self.use_init_ptm)):
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
        if not is_served(backbone) or len(backbone.adapter_list) <= self._cur_task:
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
    _patch.run_patched(patch, "run in a checkout of LAMDA-PILOT")


if __name__ == "__main__":
    main()
