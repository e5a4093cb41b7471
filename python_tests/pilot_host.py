"""A small EASE and MOS in a checkout of LAMDA-PILOT: a tiny ViT, 9 classes of coloured noise, three tasks.

Without a checkout a stand-in takes its place.
"""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from plora_ext.integrations import pilot

REAL = os.environ.get("PLORA_PILOT", "")
CHECKOUT = REAL or str(Path(__file__).parent / "hosts" / "pilot")

EASE = {
    "prefix": "", "dataset": "noise", "memory_size": 0, "memory_per_class": 0, "fixed_memory": False, "shuffle": True,
    "init_cls": 3, "increment": 3, "model_name": "ease", "backbone_type": "vit_tiny_ease", "device": [-1], "seed": [1],
    "init_epochs": 1, "init_lr": 0.05, "later_epochs": 1, "later_lr": 0.05, "batch_size": 10, "weight_decay": 5e-4,
    "min_lr": 0, "optimizer": "sgd", "scheduler": "cosine", "pretrained": False, "ffn_num": 4, "use_diagonal": False,
    "recalc_sim": True, "alpha": 0.1, "use_init_ptm": False, "beta": 0, "use_old_data": False, "use_reweight": True,
    "moni_adam": False, "adapter_num": -1,
}  # fmt: skip
MOS = {
    **EASE, "model_name": "mos", "tuned_epoch": 1, "reinit_optimizer": True, "init_milestones": [10],
    "init_lr_decay": 0.1, "reg": 0.1, "adapter_momentum": 0.1, "ensemble": True, "crct_epochs": 2, "ca_lr": 0.005,
    "ca_storage_efficient_method": "covariance", "n_centroids": 3, "drop": 0.0, "drop_path": 0.0,
}  # fmt: skip


class Noise:
    """PILOT's idea of a data set: images whose class is their mean colour, and transforms."""

    use_path = False
    class_order = None

    def __init__(self, classes: int, per_class: int, size: int) -> None:
        from torchvision import transforms

        rng = np.random.default_rng(0)
        self.train_trsf, self.test_trsf = [transforms.RandomHorizontalFlip()], [transforms.CenterCrop(32)]
        self.common_trsf = [transforms.Resize(size), transforms.ToTensor()]
        colours = rng.integers(80, 175, (classes, 1, 1, 1, 3))

        def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
            images = colours + rng.integers(-40, 40, (classes, n, 1, 1, 3)) + rng.integers(-40, 40, (1, 1, 32, 32, 3))
            return images.reshape(-1, 32, 32, 3).astype(np.uint8), np.repeat(np.arange(classes), n)

        self.train_data, self.train_targets = draw(per_class)
        self.test_data, self.test_targets = draw(per_class // 2)

    def download_data(self) -> None:
        """There is nothing to download."""


def enter(monkeypatch: Any, classes: int = 9, per_class: int = 8, size: int = 32) -> None:
    """Make the checkout importable, with the tiny network and data in the place of the large ones."""
    monkeypatch.syspath_prepend(CHECKOUT)
    pilot._old_timm_names()
    import backbone.vit_ease
    import backbone.vit_mos
    import models.ease
    import models.mos
    import utils.data_manager
    import utils.inc_net

    def get_backbone(args: dict[str, Any], pretrained: bool = False) -> nn.Module:
        config = SimpleNamespace(
            ffn_adapt=True, ffn_option="parallel", ffn_adapter_layernorm_option="none",
            ffn_adapter_init_option="lora", ffn_adapter_scalar="0.1", ffn_num=args["ffn_num"], d_model=768,
            vpt_on=False, vpt_num=0, _device=args["device"][0], adapter_momentum=args.get("adapter_momentum", 0),
        )  # fmt: skip
        module, mos = (backbone.vit_mos, True) if args["model_name"] == "mos" else (backbone.vit_ease, False)
        vit = module.VisionTransformer(
            img_size=32, patch_size=16, embed_dim=768, depth=2, num_heads=12, mlp_ratio=0.25,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_classes=args["nb_classes"] if mos else 0, tuning_config=config,
        )  # fmt: skip
        nn.init.normal_(vit.patch_embed.proj.weight, std=0.5)  # features that differ from image to image
        for name, parameter in vit.named_parameters():
            parameter.requires_grad_("adapter" in name or "head" in name)
        vit.out_dim = 768
        return vit

    monkeypatch.setattr(utils.inc_net, "get_backbone", get_backbone)
    monkeypatch.setattr(utils.data_manager, "_get_idata", lambda name, args=None: Noise(classes, per_class, size))
    for module in (models.ease, models.mos):
        monkeypatch.setattr(module, "num_workers", 0)


def learn(settings: dict[str, Any], tasks: int | None = None, after: Any = None) -> Any:
    """PILOT's own loop over the tasks; returns the learner, with what it predicted after every task.

    `after(learner, task)` is called between the evaluation and `after_task`. The learner gets `predictions`, the best
    two classes of every test image, `curve`, accuracies in percent, and `weights`, those of the classifier.
    """
    import utils.data_manager
    from utils import factory

    args = {**settings, "device": [torch.device("cpu")]}
    random.seed(1)
    torch.manual_seed(1)
    data = utils.data_manager.DataManager("noise", True, 1, args["init_cls"], args["increment"], args)
    args["nb_classes"], args["nb_tasks"] = data.nb_classes, data.nb_tasks
    learner = factory.get_model(args["model_name"], args)
    learner.topk, learner.predictions, learner.curve, learner.weights = 2, [], [], []
    for task in range(tasks or data.nb_tasks):
        learner.incremental_train(data)
        predicted, targets = learner._eval_cnn(learner.test_loader)
        learner.predictions.append(predicted)
        learner.curve.append(100 * float((predicted[:, 0] == targets).mean()))
        if args["model_name"] != "plora":
            fc = learner._network.fc
            learner.weights.append(torch.cat([p.detach() for p in fc.parameters() if p.dim() == 2]))
        if after is not None:
            after(learner, task)
        learner.after_task()
    return learner
